"""Symmetric matrices in factored form: what interaction matrices are made of and solvers take.

``Q_n = sum_h weights[n,h] sym(left_h right_h^T)``, ``sym(A) = (A + A^T) / 2``: n matrices that share
their h hidden neurons and are never formed unless `dense` is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.tensor.grams import squared_norms

BLOCK_ELEMENTS = 2**24
"""Entries of a block alive at a time: 64 MB in float32."""


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

    def apply(self, rows: Float[Tensor, "*n m d"]) -> Float[Tensor, "*n m d"]:
        """``rows @ Q`` for each matrix: four products of the factors."""
        return apply(self.left, self.right, self.weights, rows)

    def dense(self) -> Float[Tensor, "n d d"]:
        """The matrices themselves."""
        # One block is [matrices, d, h] before its product, whence the step.
        step = max(1, BLOCK_ELEMENTS // max(1, self.d * self.d_hidden))
        blocks = []
        for weights in self.weights.split(step):
            half = (self.left.T * weights[:, None, :]) @ self.right
            blocks.append((half + half.mT) / 2)
        return torch.cat(blocks) if blocks else self.left.new_empty(0, self.d, self.d)

    def block(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """A block of the entries of a single matrix."""
        weights = self.weights[0]
        left, right = self.left[:, rows].T * weights, self.right[:, rows].T * weights
        return (left @ self.right[:, columns] + right @ self.left[:, columns]) / 2

    def frobenius_norm(self) -> Float[Tensor, " n"]:
        """``||Q||_F``: through the Gram of the hidden neurons, or for few matrices blocks of Q."""
        count, hidden, width = len(self), self.d_hidden, self.d
        # In flops; a float64 product costs two.
        through_blocks = 4 * count * hidden * width**2
        through_gram = 2 * (4 * hidden**2 * width + count * hidden**2)
        if through_blocks < through_gram:
            each = [self[i : i + 1]._square_sum() for i in range(count)]
            squares = torch.stack(each) if each else self.weights.sum(1)
        else:
            squares = squared_norms(self.weights, self.left, self.right)
        return squares.clamp_min(0).sqrt().to(self.dtype)

    def _square_sum(self) -> Float[Tensor, ""]:
        step = max(1, BLOCK_ELEMENTS // max(1, self.d))
        total = self.weights.new_zeros((), dtype=checks.gram_dtype(self.weights))
        for start in range(0, self.d, step):
            block = self.block(slice(start, start + step), slice(None))
            total = total + block.square().sum(dtype=total.dtype)
        return total


def apply(left: Tensor, right: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """``rows @ Q`` with weights [..., h] and rows [..., m, d]; leading dimensions broadcast."""
    weights = weights[..., None, :]
    through_left = (rows @ left.T) * weights
    through_right = (rows @ right.T) * weights
    return (through_left @ right + through_right @ left) / 2
