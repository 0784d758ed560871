"""Grams of hidden neurons, in tiles: what norms, inner products, HOSVD and CP are made of.

Hidden neuron h of a layer is the matrix ``sym(l_h r_h^T)``. The inner products of two sets of them,

    ``M[g,h] = 1/2 [(l_g . l'_h) (r_g . r'_h) + (l_g . r'_h) (r_g . l'_h)]``,

give ``<Q, Q'> = p^T M p'`` for interaction matrices with neuron weights p and p'.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tl_bilinear import checks

TILE_BYTES = 64 * 2**20
"""Memory that one tile of M may take, in bytes; a few are alive at a time."""


def pair_gram_tiles(
    left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of M for two sets of neurons, factors [h, d] each: (rows of the first set, tile)."""
    dtype = checks.gram_dtype(left)
    other_left, other_right = other_left.to(dtype), other_right.to(dtype)
    step = max(1, TILE_BYTES // (max(1, len(other_left)) * dtype.itemsize))
    for start in range(0, len(left), step):
        rows = slice(start, min(start + step, len(left)))
        a, b = left[rows].to(dtype), right[rows].to(dtype)
        same = (a @ other_left.T) * (b @ other_right.T)
        crossed = (a @ other_right.T) * (b @ other_left.T)
        yield rows, (same + crossed) / 2


def self_gram_tiles(left: Tensor, right: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """M of one set of neurons, its upper half: (rows, columns from the rows on, tile).

    M is symmetric. A sum over all of it takes the leading square of a tile once and the rest twice.
    """
    dtype = checks.gram_dtype(left)
    left, right = left.to(dtype), right.to(dtype)
    hidden = len(left)
    start = 0
    while start < hidden:
        step = max(1, TILE_BYTES // ((hidden - start) * dtype.itemsize))
        rows, columns = slice(start, min(start + step, hidden)), slice(start, hidden)
        a, b = left[rows], right[rows]
        tile = (a @ left[columns].T).mul_(b @ right[columns].T)
        tile.add_((a @ right[columns].T).mul_(b @ left[columns].T)).div_(2)
        yield rows, columns, tile
        start = rows.stop


def congruence(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``weights M weights^T`` [n, n] for weights [n, h], M in tiles, in float64."""
    dtype = checks.gram_dtype(left)
    weights = weights.to(dtype)
    total = weights.new_zeros(len(weights), len(weights))
    for rows, columns, tile in self_gram_tiles(left, right):
        size = rows.stop - rows.start
        tile[:, :size] /= 2
        total += weights[:, rows] @ (tile @ weights[:, columns].T)
    return total + total.T


def squared_norms(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``p^T M p`` [n] for each row p of weights [n, h], M in tiles, in float64."""
    dtype = checks.gram_dtype(left)
    chunks = weights.split(max(1, TILE_BYTES // (max(1, weights.shape[1]) * dtype.itemsize)))
    totals = [chunk.new_zeros(len(chunk), dtype=dtype) for chunk in chunks]
    for rows, columns, tile in self_gram_tiles(left, right):
        size = rows.stop - rows.start
        tile[:, :size] /= 2
        for index, chunk in enumerate(chunks):
            through = chunk[:, columns].to(dtype) @ tile.T
            totals[index] = totals[index] + 2 * (through * chunk[:, rows]).sum(1)
    return torch.cat(totals) if totals else weights.new_zeros(0, dtype=dtype)
