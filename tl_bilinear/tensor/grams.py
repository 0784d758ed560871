"""Grams of hidden neurons, in tiles: what norms, inner products, HOSVD and CP are made of.

Hidden neuron h of a layer is the matrix ``sym(l_h r_h^T)``. The inner products of two sets of them,

    ``M[g,h] = 1/2 [(l_g . l'_h) (r_g . r'_h) + (l_g . r'_h) (r_g . l'_h)]``,

give ``<Q, Q'> = p^T M p'`` for interaction matrices with neuron weights p and p'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tl_bilinear import checks

TILE_BYTES = 64 * 2**20
"""Memory that one tile of M may take, in bytes; a few are alive at a time."""

EXACT_FLOPS = 2e9
"""Work up to which the norm of a difference is taken from its entries: a second or less."""

_ROUNDING = 8  # of sums in float64, in eps of the size of their terms


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


def mode_gram(left: Tensor, right: Tensor, out: Tensor, mode: str) -> Tensor:
    """The Gram of one mode of ``F[a,i,j] = sum_h out[a,h] left[h,i] right[h,j]``, in float64.

    "left": ``sum_a M_a M_a^T`` [d_left, d_left]; "right" and "output" likewise. In tiles of neurons.
    """
    wide = checks.gram_dtype(left)
    sides = {"left": left.to(wide), "right": right.to(wide), "output": out.T.to(wide)}
    kept = sides.pop(mode)
    one, other = sides.values()
    step = max(1, TILE_BYTES // (max(1, len(one)) * wide.itemsize))
    total = kept.new_zeros(kept.shape[1], kept.shape[1])
    for start in range(0, len(one), step):
        rows = slice(start, start + step)
        total += kept[rows].T @ (((one[rows] @ one.T) * (other[rows] @ other.T)) @ kept)
    return (total + total.T) / 2


def size_of(left: Tensor, right: Tensor, out: Tensor) -> float:
    """``sqrt(sum_h |out_h|^2 |l_h|^2 |r_h|^2)``: what rounding of sums over neurons is relative to."""
    wide = checks.gram_dtype(left)
    parts = [torch.linalg.vector_norm(half, dim=1, dtype=wide) for half in (left, right)]
    parts.append(torch.linalg.vector_norm(out, dim=0, dtype=wide))
    return float(torch.linalg.vector_norm(parts[0] * parts[1] * parts[2]))


def norm_bound(left: Tensor, right: Tensor, out: Tensor, size: float = 0.0) -> float:
    """An upper bound on the norm of ``sum_h out_h (x) sym(l_h r_h^T)``, near it.

    From the entries, where that can be afforded: they are rounded to eps of the neurons' size, and a
    Gram to its root. Else from the Gram. `size` is that of numbers whose difference `out` is.
    """
    wide = checks.gram_dtype(left)
    left, right, out = left.to(wide), right.to(wide), out.to(wide)
    size = max(size, size_of(left, right, out))
    eps = torch.finfo(wide).eps
    if affordable(left, out):
        return _entries_norm(left, right, out) + _ROUNDING * eps * size
    squares = float(squared_norms(out, left, right).sum())
    return math.sqrt(max(0.0, squares) + _ROUNDING * eps * size**2)


def affordable(left: Tensor, out: Tensor) -> bool:
    """Whether all entries of such a layer can be met one after the other."""
    hidden, width = left.shape
    return 2.0 * len(out) * hidden * width**2 <= EXACT_FLOPS


def distance(
    one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], square: float
) -> float:
    """An upper bound on ``||B - B'||``, near it, for (left, right, out) of two layers.

    `square` is ``||B||^2``. As `norm_bound` of the difference; where that cannot be afforded,
    ``|B|^2 - 2 <B, B'> + |B'|^2`` and what its cancellation may leave.
    """
    wide = checks.gram_dtype(one[0])
    (left, right, out), others = (tuple(t.to(wide) for t in each) for each in (one, other))
    stacked = torch.cat([left, others[0]]), torch.cat([right, others[1]])
    if affordable(stacked[0], out):
        return norm_bound(*stacked, torch.cat([out, -others[2]], 1), math.sqrt(square))
    own = float(squared_norms(others[2], others[0], others[1]).sum())
    shared = 0.0
    for rows, tile in pair_gram_tiles(others[0], others[1], left, right):
        shared += float(((others[2][:, rows].T @ out) * tile).sum())
    size = size_of(left, right, out) ** 2 + size_of(*others) ** 2 + square + max(0.0, own)
    rounding = _ROUNDING * torch.finfo(wide).eps * size
    return math.sqrt(max(0.0, square - 2 * shared + own) + rounding)


def _entries_norm(left: Tensor, right: Tensor, out: Tensor) -> float:
    step = max(1, TILE_BYTES // (max(1, left.shape[1] * max(left.shape)) * left.element_size()))
    total = 0.0
    for rows in out.split(step):
        half = (left.T * rows[:, None, :]) @ right
        total += float((half + half.mT).square().sum()) / 4
    return math.sqrt(total)
