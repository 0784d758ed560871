"""The k strongest interactions of one matrix, exact, streamed in blocks.

Blocks of ``S = D Q D^T`` (rows of D are directions) come one after the other and only entries that can
still be among the k largest survive. Where D is given apart from Q, most blocks are never computed:
with ``w_i = |Q|^(1/2) d_i`` and ``a_i = ||w_i||``,

    ``|d_i^T Q d_j| = |w_i^T sign(Q) w_j| <= a_i a_j``,

so that with the rows ordered by falling a_i, a row is met by a prefix of the columns, and the search
ends at the first row whose ``a_i^2`` is too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tl_bilinear.tensor.interaction import InteractionMatrix, Kind

BLOCK_ELEMENTS = 2**24
"""Entries of a block alive at a time: 64 MB in float32."""

_CORNER = 1024


class Entries(Protocol):
    """A symmetric matrix that gives blocks of itself."""

    n: int
    reach: Tensor | None
    """a [n], falling: ``|S[i,j]| <= a_i a_j``; None where nothing is known."""

    def block(self, rows: slice, columns: slice) -> Tensor: ...


class FactorEntries:
    """Q itself, from the factors of the layer."""

    reach: Tensor | None = None

    def __init__(self, matrix: InteractionMatrix) -> None:
        self.left, self.right, self.weights = matrix.left, matrix.right, matrix.weights
        self.n = matrix.d

    def block(self, rows: slice, columns: slice) -> Tensor:
        left, right = self.left[:, rows].T * self.weights, self.right[:, rows].T * self.weights
        return (left @ self.right[:, columns] + right @ self.left[:, columns]) / 2


class DirectionEntries:
    """``D Q D^T`` through the eigenpairs of Q, rows ordered by falling reach."""

    def __init__(self, matrix: InteractionMatrix, directions: Tensor) -> None:
        pairs = matrix.eigh()
        weighted = directions @ (pairs.vectors * pairs.values.abs().sqrt()[:, None]).T
        reach = torch.linalg.vector_norm(weighted, dim=1)
        self.order = reach.argsort(descending=True)
        self.reach: Tensor | None = reach[self.order]
        self.weighted = weighted[self.order]
        self.signed = self.weighted * pairs.values.sign()
        self.n = len(directions)

    def block(self, rows: slice, columns: slice) -> Tensor:
        return self.signed[rows] @ self.weighted[columns].T


class _Best:
    """The strongest entries met so far, and the coefficient that a newcomer must reach."""

    def __init__(self, k: int, like: Tensor) -> None:
        self.k = k
        self.values = like.new_empty(0)
        self.rows = torch.empty(0, dtype=torch.long, device=like.device)
        self.columns = self.rows

    def threshold(self, slack: float) -> float:
        if len(self.values) < self.k:
            return 0.0
        return float(self.coefficients().topk(self.k).values[-1]) * (1 - slack)

    def coefficients(self) -> Tensor:
        return torch.where(self.rows == self.columns, 1.0, 2.0) * self.values.abs()

    def add(self, values: Tensor, rows: Tensor, columns: Tensor, slack: float) -> None:
        self.values = torch.cat([self.values, values])
        self.rows = torch.cat([self.rows, rows])
        self.columns = torch.cat([self.columns, columns])
        if len(self.values) > self.k:
            kept = self.coefficients() >= self.threshold(slack)
            self.values, self.rows, self.columns = (
                part[kept] for part in (self.values, self.rows, self.columns)
            )


def strongest(
    entries: Entries, k: int, kind: Kind, like: Tensor, slack: float, floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, values) of at least the k entries of largest coefficient, rows <= columns.

    All entries within a share `slack` of the k-th are returned, for an exact second look; none whose
    coefficient is below `floor`.
    """
    best = _Best(k, like)
    reach = entries.reach
    if reach is not None:
        # The corner where the largest can be gives a threshold to begin with.
        corner = slice(0, min(_CORNER, entries.n))
        _take(best, entries.block(corner, corner), 0, kind, floor, slack)
        floor = max(floor, best.threshold(slack))
        best = _Best(k, like)
    start = 0
    while start < entries.n:
        threshold = max(best.threshold(slack), floor)
        limit = entries.n
        if reach is not None and threshold > 0:
            # Falling: the columns that can still reach the threshold are a prefix.
            needed = threshold / (2 * reach[start].clamp_min(torch.finfo(reach.dtype).tiny))
            limit = int((reach >= needed).sum())
            if limit <= start:
                break
        # Where the columns get fewer from row to row, a tall block would compute what is not needed.
        tallest = entries.n if reach is None else max(_CORNER, (limit - start) // 8)
        step = max(1, min(tallest, BLOCK_ELEMENTS // (limit - start)))
        rows = slice(start, min(start + step, entries.n))
        block = entries.block(rows, slice(start, limit))
        _take(best, block, start, kind, threshold, slack)
        start = rows.stop
    return best.rows, best.columns, best.values


def _take(
    best: _Best, block: Tensor, start: int, kind: Kind, threshold: float, slack: float
) -> None:
    """Add the entries of a block whose rows and columns both begin at `start`."""
    count, width = block.shape
    score = block.abs()
    # Entries below the diagonal were met as columns; twice an off-diagonal entry is its coefficient.
    square = score[:, : min(count, width)]
    diagonal = square.diagonal()
    diagonal_score = diagonal / 2 if kind == "all" else torch.full_like(diagonal, -1)
    square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), -1)
    square.diagonal().copy_(diagonal_score)
    needed = threshold / 2
    if threshold <= 0 and score.numel() > 4 * best.k:
        # No threshold yet: that of this block's own strongest.
        needed = float(score.flatten().topk(best.k).values[-1]) * (1 - slack)
    rows = (score.amax(1) >= max(needed, 0.0)).nonzero()[:, 0]
    if len(rows) == 0:
        return
    row, column = (score[rows] >= max(needed, 0.0)).nonzero(as_tuple=True)
    row = rows[row]
    best.add(block[row, column], row + start, column + start, slack)
