"""Symmetric matrices in factored form: what interaction matrices are made of and solvers take.

``Q_n = sum_h weights[n,h] sym(left_h right_h^T)``, ``sym(A) = (A + A^T) / 2``: n matrices that share
their h hidden neurons and are never formed unless `dense` is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.tensor.grams import squared_norms

BLOCK_ELEMENTS = 2**24
"""Entries of a block alive at a time: 64 MB in float32."""

_TAME = 15
"""Rows of the factors whose largest entry lies within 2**-15 and 2**15 are taken as they are: no sum of
products of four of them and a million neurons leaves float32."""

_NEAR = 30
"""Weights whose largest lies within 2**-30 and 2**30 are taken as they are, if the factors are."""


@dataclass(frozen=True, eq=False)
class Factors:
    """n symmetric d x d matrices over the same hidden neurons; left and right [h, d], weights [n, h]."""

    left: Float[Tensor, "h d"]
    right: Float[Tensor, "h d"]
    weights: Float[Tensor, "n h"]

    @property
    def d(self) -> int:
        return self.left.shape[1]

    @property
    def d_hidden(self) -> int:
        return self.left.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: Any) -> Factors:
        """Some of the matrices: a slice or an index tensor."""
        return Factors(self.left, self.right, self.weights[rows])

    def normalised(self) -> tuple[Factors, Int[Tensor, " n"]]:
        """The same matrices over powers of two, with entries near 1: ``Q_n = 2^exponents_n Q'_n``.

        Scaling by powers of two is exact, so that layers of any scale are computed alike. Matrices of
        moderate entries are left as they are. Raises ValueError, naming the matrix, where a direction
        times the output factors is not finite.
        """
        if self._is_moderate():
            return self, torch.zeros(len(self), dtype=torch.int32, device=self.device)
        sizes = self.weights.detach().abs().amax(1) if self.d_hidden else self.weights.sum(1)
        if not math.isfinite(float(sizes.sum())):
            wrong = int((~torch.isfinite(sizes)).nonzero()[0])
            raise ValueError(
                f"matrix {wrong} has hidden weights that are NaN or infinite: its direction times the "
                f"layer's output factors leaves {str(self.dtype).removeprefix('torch.')}; scale them, "
                f"or use .to(torch.float64)"
            )
        if not self.weights.numel() or not self.left.numel():
            return self, sizes.to(torch.int32)
        (left, left_powers), (right, right_powers) = _tame(self.left), _tame(self.right)
        exponents = torch.frexp(sizes).exponent
        shift = -exponents[:, None]
        if left_powers is not None or right_powers is not None:
            taken = sum(powers for powers in (left_powers, right_powers) if powers is not None)
            own = torch.frexp(self.weights.detach()).exponent + taken
            none = torch.iinfo(own.dtype).min
            largest = torch.where(self.weights == 0, none, own).amax(1)
            exponents = torch.where(sizes > 0, largest, 0)
            shift = taken - exponents[:, None]
        return Factors(left, right, times_power(self.weights, shift)), exponents

    def normalised_together(self) -> tuple[Factors, Int[Tensor, ""]]:
        """The same over one power of two for all: the largest matrix has entries near 1."""
        matrices, exponents = self.normalised()
        largest = exponents.max() if len(exponents) else exponents.sum()
        weights = times_power(matrices.weights, (exponents - largest)[:, None])
        return Factors(matrices.left, matrices.right, weights), largest

    def neurons(self) -> Float[Tensor, " n"]:
        """``sqrt(sum_h p_h^2 |l_h|^2 |r_h|^2)``: about ``||Q||_F`` if no two neurons overlap."""
        left, right = self._lengths
        return (self.weights.square() @ (left * right).square()).sqrt()

    @cached_property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        """The norms of the rows of left and of right."""
        left, right = self.left.detach(), self.right.detach()
        return torch.linalg.vector_norm(left, dim=1), torch.linalg.vector_norm(right, dim=1)

    def _is_moderate(self) -> bool:
        """Whether no sum of products of these numbers comes near the ends of the dtype."""
        if not self.weights.numel() or not self.left.numel():
            return False
        largest = torch.linalg.vector_norm(self.weights.detach(), math.inf, dim=1)
        ranges = ((largest, _NEAR), *((lengths, _TAME) for lengths in self._lengths))
        for sizes, room in ranges:
            low, high = torch.aminmax(sizes)
            if not 2.0**-room <= float(low) <= float(high) <= 2.0**room:
                return False
        return True

    def apply(self, rows: Float[Tensor, "*n m d"]) -> Float[Tensor, "*n m d"]:
        """``rows @ Q`` for each matrix: four products of the factors."""
        return apply(self.left, self.right, self.weights, rows)

    def dense(self) -> Float[Tensor, "n d d"]:
        """The matrices themselves, of factors whose products the dtype can hold (`normalised`)."""
        # One block is [matrices, d, h] before its product, whence the step.
        step = max(1, BLOCK_ELEMENTS // max(1, self.d * self.d_hidden))
        blocks = []
        for weights in (self.weights / 2).split(step):
            half = (self.left.T * weights[:, None, :]) @ self.right
            blocks.append(half + half.mT)
        if len(blocks) == 1:
            return blocks[0]
        return torch.cat(blocks) if blocks else self.left.new_empty(0, self.d, self.d)

    def block(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """A block of the entries of a single matrix."""
        weights = self.weights[0]
        left, right = self.left[:, rows].T * weights, self.right[:, rows].T * weights
        return (left @ self.right[:, columns] + right @ self.left[:, columns]) / 2

    def frobenius_norm(self) -> Float[Tensor, " n"]:
        """``||Q||_F``: through the Gram of the hidden neurons, or for few matrices blocks of Q."""
        count, hidden, width = len(self), self.d_hidden, self.d
        matrices, exponents = self.normalised()
        # In flops; a float64 product costs two.
        through_blocks = 4 * count * hidden * width**2
        through_gram = 2 * (4 * hidden**2 * width + count * hidden**2)
        if through_blocks < through_gram:
            each = [matrices[i : i + 1]._square_sum() for i in range(count)]
            squares = torch.stack(each) if each else self.weights.sum(1)
        else:
            squares = squared_norms(matrices.weights, matrices.left, matrices.right)
        norms = squares.clamp_min(0).sqrt()
        return rescaled("Frobenius norms", norms, exponents, self.dtype)

    def trace(self) -> Float[Tensor, " n"]:
        """``tr Q``."""
        matrices, exponents = self.normalised()
        traces = matrices.weights @ (matrices.left * matrices.right).sum(1)
        return rescaled("traces", traces, exponents, self.dtype)

    def _square_sum(self) -> Float[Tensor, ""]:
        step = max(1, BLOCK_ELEMENTS // max(1, self.d))
        total = self.weights.new_zeros((), dtype=checks.gram_dtype(self.weights))
        for start in range(0, self.d, step):
            block = self.block(slice(start, start + step), slice(None))
            total = total + block.square().sum(dtype=total.dtype)
        return total


def rounding(neurons: Tensor, norm: Tensor) -> Tensor:
    """What the working precision leaves uncertain of matrices, as a spectral norm.

    ``eps (neurons + 8 ||Q||)`` with `Factors.neurons`, about twice what is measured: rounding errors of
    the neurons are independent. Large beside ``||Q||`` where the neurons cancel.
    """
    return torch.finfo(neurons.dtype).eps * (neurons + 8 * norm)


def apply(left: Tensor, right: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """``rows @ Q`` with weights [..., h] and rows [..., m, d]; leading dimensions broadcast."""
    weights = weights[..., None, :]
    through_left = (rows @ left.T) * weights
    through_right = (rows @ right.T) * weights
    return (through_left @ right + through_right @ left) / 2


def times_power(values: Tensor, exponents: Tensor) -> Tensor:
    """``values * 2^exponents``, exact but where the result leaves the dtype."""
    wide = values.to(checks.gram_dtype(values))
    # In two steps: a power of two may leave the dtype where the result does not.
    half = torch.div(exponents, 2, rounding_mode="floor")
    for step in (half, exponents - half):
        wide = wide * power_of_two(step, wide.dtype)
    return wide.to(values.dtype)


def rescaled(name: str, values: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Results of normalised matrices in the scale of the given ones, in `dtype`; [n] or [n, ...].

    Raises ValueError where `dtype` cannot hold numbers of that size.
    """
    exponents = exponents.reshape(exponents.shape + (1,) * (values.ndim - exponents.ndim))
    if fits(exponents, dtype):
        return (values * power_of_two(exponents, values.dtype)).to(dtype)
    wide = values.to(checks.gram_dtype(values))
    return checks.narrowed(name, times_power(wide, exponents), dtype)


def fits(exponents: Tensor, dtype: torch.dtype) -> bool:
    """Whether results of normalised matrices can be scaled back in a dtype without a second thought."""
    room = 60 if dtype.itemsize < 8 else 500  # they are far from the ends of the dtype themselves
    return not exponents.numel() or int(exponents.abs().max()) <= room


def power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=dtype), exponents)


def _tame(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """A factor [h, d] with rows of moderate size, and the powers of two taken out of each, if any."""
    sizes = factor.detach().abs().amax(1)
    largest, smallest = torch.frexp(sizes.max()).exponent, sizes[sizes > 0]
    if not len(smallest):
        return factor, None
    lowest = torch.frexp(smallest.min()).exponent
    if int(lowest) >= -_TAME and int(largest) <= _TAME:
        return factor, None
    powers = torch.frexp(sizes).exponent
    return times_power(factor, -powers[:, None]), powers
