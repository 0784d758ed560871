"""Quadratic forms with a linear and a constant part: what a biased bilinear layer is along a direction.

``u . f(x) = x^T Q x + l . x + c``: the interaction matrix Q of u, and what the biases add (appendix J).
An :class:`InteractionMatrix` is the first term, `BilinearTensor.parts` splits a whole layer; a
:class:`QuadraticForm` is all three for chosen output directions, with value and gradient:

>>> margin = QuadraticForm.of(tensor, torch.eye(10)[3] - torch.eye(10)[5])
>>> margin(x)                       # logit 3 less logit 5, biases included
>>> margin.gradient(x)              # 2 Q x + l
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.interaction import InteractionMatrix


@dataclass(frozen=True, eq=False)
class QuadraticForm(Result):
    """A batch of forms ``x^T Q x + l . x + c``; immutable.

    Parameters
    ----------
    interaction: InteractionMatrix, Q, with the batch's dimensions
    linear: [*batch, d]
    constant: [*batch]
    """

    interaction: InteractionMatrix
    linear: Float[Tensor, "*batch d"]
    constant: Float[Tensor, "*batch"]

    def __post_init__(self) -> None:
        batch, d = self.interaction.batch_shape, self.interaction.d
        for name, found, expected in (
            ("linear", self.linear, (*batch, d)),
            ("constant", self.constant, tuple(batch)),
        ):
            checks.require_finite(name, checks.require_tensor(name, found))
            if tuple(found.shape) != expected:
                raise ValueError(
                    f"{name} must have shape {list(expected)} as the interaction matrices have, got "
                    f"{checks.shape(found)}"
                )

    @classmethod
    def of(
        cls, tensor: BilinearTensor, directions: Float[Tensor, "... d_out"] | None = None
    ) -> QuadraticForm:
        """The forms of output directions of a layer, biases included; None for every output."""
        interaction, parts = tensor.interaction(directions), tensor.parts()
        if directions is None:
            return cls(interaction, parts.linear, parts.constant)
        u = directions.to(tensor.dtype)
        return cls(interaction, u @ parts.linear, u @ parts.constant)

    @classmethod
    def from_matrix(
        cls,
        matrix: Float[Tensor, "d d"],
        linear: Float[Tensor, " d"] | None = None,
        constant: float = 0.0,
    ) -> QuadraticForm:
        """One form from its matrix, which need not be symmetric: ``x^T A x`` knows its mean with A^T."""
        matrix = checks.require_tensor("matrix", matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, [d, d], got {checks.shape(matrix)}")
        checks.require_finite("matrix", matrix)
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        ones = matrix.new_ones(len(matrix))
        linear = matrix.new_zeros(len(matrix)) if linear is None else linear
        return cls(InteractionMatrix(identity, matrix, ones), linear, matrix.new_tensor(constant))

    @property
    def d(self) -> int:
        return self.interaction.d

    @property
    def batch_shape(self) -> torch.Size:
        return self.interaction.batch_shape

    def __getitem__(self, index: Any) -> QuadraticForm:
        """Index the batch dimensions, as a tensor's."""
        return QuadraticForm(self.interaction[index], self.linear[index], self.constant[index])

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """The values: [*x_batch, *batch], every vector against every form."""
        linear = x.to(self.linear.dtype) @ self.linear.reshape(-1, self.d).T
        linear = linear.reshape(x.shape[:-1] + self.batch_shape)
        return self.interaction.quadratic(x) + linear + self.constant

    def gradient(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "*batch m d"]:
        """``2 Q x + l`` for each vector: [*batch, m, d]."""
        x = checks.require_matrix("x", x, self.d, "d", self.linear)
        return 2 * self.interaction.apply(x) + self.linear[..., None, :]
