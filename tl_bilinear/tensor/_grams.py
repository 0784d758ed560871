"""Grams of hidden neurons, in tiles: what norms, inner products, HOSVD and CP are made of.

Hidden neuron h of a layer is the matrix ``sym(l_h r_h^T)``. The inner products of two sets of them,

    ``M[g,h] = 1/2 [(l_g . l'_h) (r_g . r'_h) + (l_g . r'_h) (r_g . l'_h)]``,

give ``<Q, Q'> = p^T M p'`` for interaction matrices with neuron weights p and p'.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tl_bilinear.tensor import _checks

TILE_BYTES = 256 * 2**20
"""Memory that one tile of M may take, in bytes; a few are alive at a time."""


def pair_gram_tiles(
    left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of M for two sets of neurons, factors [h, d] each: (rows of the first set, tile)."""
    dtype = _checks.gram_dtype(left)
    other_left, other_right = other_left.to(dtype), other_right.to(dtype)
    step = max(1, TILE_BYTES // (max(1, len(other_left)) * dtype.itemsize))
    for start in range(0, len(left), step):
        rows = slice(start, min(start + step, len(left)))
        a, b = left[rows].to(dtype), right[rows].to(dtype)
        same = (a @ other_left.T) * (b @ other_right.T)
        crossed = (a @ other_right.T) * (b @ other_left.T)
        yield rows, (same + crossed) / 2
