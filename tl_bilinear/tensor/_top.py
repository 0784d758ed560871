"""The k strongest interactions of one matrix, exact, streamed in blocks.

Blocks of ``S = D Q D^T`` (rows of D are directions) come one after the other and only entries that can
still be among the k largest survive. Where D is given apart from Q, the search is in two steps. With
the eigenpairs of Q, ``w_i = |Lambda|^(1/2) V d_i``, an entry is ``sum_r sign(lambda_r) w_ir w_jr``, and
three bounds leave little to compute exactly:

- ``|S[i,j]| <= a_i a_j``, a_i = ||w_i||: with the rows ordered by falling a_i, a row needs to meet a
  prefix of the columns only, and the search ends where ``a_i^2`` is too small;
- the m leading terms differ from the whole sum by at most ``b_i b_j``, b_i the norm of the rest of w_i;
- in bfloat16, of unit roundoff u, they are off by a few ``u a_i a_j`` more.

So blocks of few terms, in the precision that is faster on the machine, find every pair that may be among
the k, and those are computed in full. The result does not depend on m or on the precision.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tl_bilinear.tensor.interaction import InteractionMatrix, Kind

BLOCK_ELEMENTS = 2**24
"""Entries of a block alive at a time: 64 MB in float32."""

CORNER = 1024
"""Rows and columns of the first block, which finds a threshold for the others."""

SCREEN_FROM = 4096
"""Directions from which screening in few terms pays for itself."""

_MARGIN = 0.2
"""What the terms left out may amount to, as a share of the threshold: more saves products and costs
candidates, which are cheap as long as they are few."""


class FactorEntries:
    """Blocks of Q itself, from the factors of the layer."""

    def __init__(self, matrix: InteractionMatrix) -> None:
        self.left, self.right, self.weights = matrix.left, matrix.right, matrix.weights
        self.n = matrix.d

    def block(self, rows: slice, columns: slice) -> Tensor:
        left, right = self.left[:, rows].T * self.weights, self.right[:, rows].T * self.weights
        return (left @ self.right[:, columns] + right @ self.left[:, columns]) / 2


class DirectionEntries:
    """Blocks of ``D Q D^T`` through the eigenpairs of Q, rows ordered by falling reach a_i."""

    def __init__(self, matrix: InteractionMatrix, directions: Tensor) -> None:
        pairs = matrix.eigh()  # by falling magnitude: the leading terms come first
        weighted = directions @ (pairs.vectors * pairs.values.abs().sqrt()[:, None]).T
        reach = torch.linalg.vector_norm(weighted, dim=1)
        self.order = reach.argsort(descending=True)
        self.reach = reach[self.order]
        self.weighted = weighted[self.order]
        self.signs = pairs.values.sign()
        self.n = len(directions)

    def block(self, rows: slice, columns: slice) -> Tensor:
        return (self.weighted[rows] * self.signs) @ self.weighted[columns].T

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        step = max(1, BLOCK_ELEMENTS // (4 * self.weighted.shape[1]))
        parts = [
            (self.weighted[i] * self.signs * self.weighted[j]).sum(1)
            for i, j in zip(rows.split(step), columns.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else self.weighted.new_empty(0)


class _Screen:
    """Entries to within a margin: few terms, in the faster precision."""

    def __init__(self, entries: DirectionEntries, needed: float) -> None:
        weighted = entries.weighted
        rest = (
            weighted.square().flip(1).cumsum(1).flip(1)
        )  # [:, m] is b_i^2 without the first m terms
        m = int((rest.mean(0) > _MARGIN * needed).sum()) or 1
        dtype = (
            _faster_dtype(weighted)
            if _rounding(torch.bfloat16, m) * float(entries.reach[0].square()) < _MARGIN * needed
            else torch.float32
        )
        left_out = rest[:, m].sqrt() if m < weighted.shape[1] else torch.zeros_like(entries.reach)
        self.columns = weighted[:, :m].to(dtype)
        self.rows = (weighted[:, :m] * entries.signs[:m]).to(dtype)
        rounding = _rounding(dtype, m) * entries.reach[0] * entries.reach
        self.margin = left_out.max() * left_out + rounding

    def block(self, rows: slice, columns: slice) -> Tensor:
        return self.rows[rows] @ self.columns[columns].T


def strongest_of_factors(
    matrix: InteractionMatrix, k: int, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, values) of the k entries of Q of largest coefficient, rows <= columns."""
    entries = FactorEntries(matrix)
    best = _Best(k, matrix.weights)
    step = max(1, BLOCK_ELEMENTS // entries.n)
    for start in range(0, entries.n, step):
        block = entries.block(slice(start, start + step), slice(start, None))
        row, column = _candidates(block, start, kind, best.threshold / 2, k)
        best.add(block[row - start, column - start], row, column)
    return best.rows, best.columns, best.values


def strongest_of_directions(
    matrix: InteractionMatrix, directions: Tensor, k: int, kind: Kind
) -> tuple[Tensor, Tensor]:
    """(rows, columns) of at least the k entries of ``D Q D^T`` of largest coefficient, rows <= columns.

    A few more than k: those whose order against the k-th rounding leaves open.
    """
    entries = DirectionEntries(matrix, directions)
    # The search rounds: what is within this share of the k-th is left to an exact second look.
    best = _Best(k, matrix.weights, slack=1e-3)
    # The corner where the largest can be gives a threshold to begin with.
    corner = slice(0, min(CORNER, entries.n))
    block = entries.block(corner, corner)
    row, column = _candidates(block, 0, kind, 0.0, k)
    best.add(block[row, column], row, column)
    floor = best.threshold
    best.clear()
    screen = _Screen(entries, floor / 2) if floor > 0 and entries.n >= SCREEN_FROM else None
    start = 0
    while start < entries.n:
        threshold = max(best.threshold, floor)
        # Falling: the columns that can still reach the threshold are a prefix.
        tiny = torch.finfo(entries.reach.dtype).tiny
        limit = int((2 * entries.reach * entries.reach[start] >= max(threshold, tiny)).sum())
        if threshold > 0 and limit <= start:
            break
        limit = limit if threshold > 0 else entries.n
        # Where the columns get fewer from row to row, a tall block would compute what is not needed.
        step = min(BLOCK_ELEMENTS // (limit - start), max(CORNER, (limit - start) // 8))
        rows = slice(start, min(start + max(1, step), entries.n))
        if screen is None:
            block = entries.block(rows, slice(start, limit))
            row, column = _candidates(block, start, kind, threshold / 2, k)
            best.add(block[row - start, column - start], row, column)
        else:
            block = screen.block(rows, slice(start, limit))
            needed = threshold / 2 - screen.margin[rows]
            # A diagonal entry stays as if it counted twice: rounding must not lose it.
            score = _score(block, kind, diagonal=1.0)
            needed = (needed * (1 - torch.finfo(score.dtype).eps)).to(score.dtype)
            found = _at_least(score, needed, score.numel() // 32)
            if found is None:  # the margin says too little here
                screen = None
                continue
            row, column = found[0] + start, found[1] + start
            best.add(entries.entries(row, column), row, column)
        start = rows.stop
    rows, columns = entries.order[best.rows], entries.order[best.columns]
    return torch.minimum(rows, columns), torch.maximum(rows, columns)


class _Best:
    """The strongest entries met so far, and the coefficient that a newcomer must reach."""

    def __init__(self, k: int, like: Tensor, slack: float = 0.0) -> None:
        self.k, self.slack, self.like = k, slack, like
        self.clear()

    def clear(self) -> None:
        self.values = self.like.new_empty(0)
        self.rows = torch.empty(0, dtype=torch.long, device=self.like.device)
        self.columns = self.rows
        self.threshold = 0.0

    def add(self, values: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.values = torch.cat([self.values, values])
        self.rows = torch.cat([self.rows, rows])
        self.columns = torch.cat([self.columns, columns])
        if len(self.values) < self.k:
            return
        coefficients = torch.where(self.rows == self.columns, 1.0, 2.0) * self.values.abs()
        self.threshold = float(coefficients.topk(self.k).values[-1]) * (1 - self.slack)
        kept = coefficients >= self.threshold
        self.values, self.rows, self.columns = (
            part[kept] for part in (self.values, self.rows, self.columns)
        )


def _candidates(
    block: Tensor, start: int, kind: Kind, needed: float, k: int
) -> tuple[Tensor, Tensor]:
    """(rows, columns) of entries of at least `needed`, half a coefficient, in a block at `start`.

    At 0 the block's own k strongest say what is needed.
    """
    score = _score(block, kind, diagonal=0.5)
    if needed <= 0 and score.numel() > 4 * k:
        needed = float(score.flatten().topk(k).values[-1])
    found = _at_least(score, score.new_full((len(score),), needed), score.numel())
    assert found is not None
    return found[0] + start, found[1] + start


def _score(block: Tensor, kind: Kind, diagonal: float) -> Tensor:
    """Absolute entries, -1 where they do not count: twice an entry is its coefficient.

    The rows and columns of the block begin at the same place: what lies below the diagonal was met
    above it. A diagonal entry counts once, hence the factor.
    """
    score = block.abs()
    square = score[:, : min(score.shape)]
    own = square.diagonal().clone() * diagonal
    square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), -1)
    if kind == "all":
        square.diagonal().copy_(own)
    return score


def _at_least(score: Tensor, needed: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Where rows of `score` reach what each row needs; None for more than `most` places."""
    needed = needed.clamp_min(0)
    rows = (score.amax(1) >= needed).nonzero()[:, 0]
    met = score[rows] >= needed[rows, None]
    if int(met.sum()) > most:
        return None
    row, column = met.nonzero(as_tuple=True)
    return rows[row], column


def _rounding(dtype: torch.dtype, terms: int) -> float:
    """Error of a sum of products of rounded factors, relative to the product of their norms.

    Both factors and the result are rounded; partial sums are held in float32, on some devices less.
    """
    return 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps


def _faster_dtype(weighted: Tensor) -> torch.dtype:
    """float32 or bfloat16, whichever multiplies a corner of these faster on this machine."""
    corner = weighted[:CORNER]
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        part = corner.to(dtype)
        for _ in range(2):  # the first call sets things up
            if part.device.type == "cuda":
                torch.cuda.synchronize(part.device)
            begin = time.perf_counter()
            float((part @ part.T)[0, 0])
            seconds[dtype] = time.perf_counter() - begin
    return min(seconds, key=lambda dtype: seconds[dtype])
