"""What forms of one input and of two have in common: their factors, and all algebra of their output.

A form is ``out ((left x + bias_left) * (right y + bias_right)) + bias_out``. With y = x it is a bilinear
layer (:class:`~tl_bilinear.tensor.bilinear.BilinearTensor`), with two inputs a
:class:`~tl_bilinear.tensor.two_input.TwoInputForm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result

FACTORS = ("left", "right", "out", "bias_left", "bias_right", "bias_out")

AnyForm = TypeVar("AnyForm", bound="FactoredForm")


class FactoredForm(Result):
    """The factors of a form, checked, and sums, multiples and projections of its output."""

    left: Tensor
    right: Tensor
    out: Tensor
    bias_left: Tensor | None
    bias_right: Tensor | None
    bias_out: Tensor | None
    output_space: str | None

    def __post_init__(self) -> None:
        given = {
            name: checks.require_tensor(name, getattr(self, name))
            for name in FACTORS
            if getattr(self, name) is not None or name in FACTORS[:3]
        }
        self._check_shapes(given)
        checks.require_same_device(given)
        dtype = torch.float32
        for tensor in given.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        for name, tensor in given.items():
            checks.require_finite(name, tensor)
            object.__setattr__(self, name, tensor.to(dtype))

    def _check_shapes(self, given: dict[str, Tensor]) -> None:
        """Raise ValueError for factors that do not fit each other; `given` may lack biases."""
        for name, tensor in given.items():
            if tensor.ndim != (1 if name.startswith("bias") else 2):
                raise ValueError(
                    f"{name} must have "
                    f"{'one dimension' if name.startswith('bias') else 'two dimensions'}"
                    f", got shape {checks.shape(tensor)}"
                )
        self._check_sides(given["left"], given["right"])
        left, out = given["left"], given["out"]
        if out.shape[1] != left.shape[0]:
            raise ValueError(
                f"out must be [d_out, d_hidden] with d_hidden={left.shape[0]} as in left "
                f"{checks.shape(left)}, got out {checks.shape(out)}"
                + ("; transpose it" if out.shape[0] == left.shape[0] else "")
            )
        sizes = {"bias_left": left.shape[0], "bias_right": left.shape[0], "bias_out": out.shape[0]}
        for name, size in sizes.items():
            if name in given and given[name].shape[0] != size:
                raise ValueError(
                    f"{name} must have {size} entries "
                    f"({'d_out' if name == 'bias_out' else 'd_hidden'}), got "
                    f"{checks.shape(given[name])}"
                )

    def _check_sides(self, left: Tensor, right: Tensor) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------ what it is

    @property
    def d_hidden(self) -> int:
        return self.left.shape[0]

    @property
    def d_out(self) -> int:
        return self.out.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def has_biases(self) -> bool:
        return any(b is not None for b in (self.bias_left, self.bias_right, self.bias_out))

    def _describe(self, sizes: str, spaces: str) -> str:
        biases = [name for name in FACTORS[3:] if getattr(self, name) is not None]
        return (
            f"{type(self).__name__}({sizes}, d_hidden={self.d_hidden}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device}, "
            f"biases={', '.join(biases) or 'none'}, {spaces})"
        )

    def to(self: AnyForm, *args: Any, **kwargs: Any) -> AnyForm:
        """Move to a device or dtype, as `torch.Tensor.to`; a 16-bit dtype is held as float32."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self: AnyForm) -> AnyForm:
        """The same tensor outside the autograd graph."""
        return self._map(Tensor.detach)

    # ------------------------------------------------------------------ its output

    def project(
        self: AnyForm, directions: Float[Tensor, "n d_out"], *, space: str | None = None
    ) -> AnyForm:
        """Change the output basis: ``t.project(E)(x) == t(x) @ E.T``; bias_out is projected too.

        Returns a form with n outputs; raises ValueError for rows of another width, or with NaN or
        infinite entries.
        """
        directions = checks.require_matrix(
            "directions",
            directions,
            self.d_out,
            checks.meaning("d_out", self.output_space),
            self.left,
        )
        return self._with(
            out=directions @ self.out,
            bias_out=None if self.bias_out is None else directions @ self.bias_out,
            output_space=space or within("directions", self.output_space),
        )

    def _weights(
        self, directions: Float[Tensor, "... d_out"] | None
    ) -> tuple[Float[Tensor, "... d_out"] | None, Float[Tensor, "... d_hidden"]]:
        """Output directions (all outputs, for None) and what the hidden neurons count for along them."""
        if directions is None:
            if self.d_out > self.d_hidden:  # directions may then be larger than the layer
                return None, self.out
            return torch.eye(self.d_out, dtype=self.dtype, device=self.device), self.out
        directions = checks.require_rows(
            "directions",
            directions,
            self.d_out,
            checks.meaning("d_out", self.output_space),
            self.left,
        )
        return directions, directions @ self.out

    # ------------------------------------------------------------------ algebra

    def _require_same_shape(self: AnyForm, other: AnyForm, verb: str) -> None:
        """Raise ValueError for forms of different widths or devices."""
        raise NotImplementedError

    def __add__(self: AnyForm, other: AnyForm) -> AnyForm:
        """The sum of two forms with the same inputs and outputs; hidden dimensions stack."""
        if type(other) is not type(self):
            return NotImplemented
        self._require_same_shape(other, "added")

        def stacked(name: str) -> Tensor | None:
            if getattr(self, name) is None and getattr(other, name) is None:
                return None
            return torch.cat([self._bias(name), other._bias(name)])

        bias_out = None
        if self.bias_out is not None or other.bias_out is not None:
            bias_out = self._bias("bias_out") + other._bias("bias_out")
        return self._with(
            left=torch.cat([self.left, other.left]),
            right=torch.cat([self.right, other.right]),
            out=torch.cat([self.out, other.out], 1),
            bias_left=stacked("bias_left"),
            bias_right=stacked("bias_right"),
            bias_out=bias_out,
        )

    def __mul__(self: AnyForm, factor: float) -> AnyForm:
        """The form with its output scaled by a number."""
        if isinstance(factor, Tensor) and factor.ndim > 0:
            raise ValueError(
                f"a {type(self).__name__} is scaled by a number, got a tensor of shape "
                f"{checks.shape(factor)}; to scale outputs one by one use project(torch.diag(...))"
            )
        if not isinstance(factor, (int, float, Tensor)):
            return NotImplemented
        bias_out = None if self.bias_out is None else self.bias_out * factor
        return self._with(out=self.out * factor, bias_out=bias_out)

    __rmul__ = __mul__

    def __truediv__(self: AnyForm, divisor: float) -> AnyForm:
        return self * (1 / divisor)

    def __neg__(self: AnyForm) -> AnyForm:
        return self * -1.0

    def __sub__(self: AnyForm, other: AnyForm) -> AnyForm:
        if type(other) is not type(self):
            return NotImplemented
        return self + (-other)

    # ------------------------------------------------------------------ inside

    def _bias(self, name: str) -> Tensor:
        bias = getattr(self, name)
        size = self.d_out if name == "bias_out" else self.d_hidden
        return torch.zeros(size, dtype=self.dtype, device=self.device) if bias is None else bias

    def _with(self: AnyForm, **changes: Any) -> AnyForm:
        return replace(self, **changes)  # type: ignore[type-var]

    def _map(self: AnyForm, function: Callable[[Tensor], Tensor]) -> AnyForm:
        factors = {name: getattr(self, name) for name in FACTORS}
        return self._with(**{n: None if t is None else function(t) for n, t in factors.items()})


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``weight x + bias`` for rows x."""
    return torch.nn.functional.linear(x, weight, bias)


def within(what: str, space: str | None) -> str | None:
    """A space by what it is a part of."""
    return None if space is None else f"{what} in {space}"
