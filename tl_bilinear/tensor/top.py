"""The k strongest interactions of one matrix, exact, streamed in blocks.

Blocks of ``S = D Q D^T`` (rows of D are directions) come one after the other and only entries that can
still be among the k largest survive. Where D is given apart from Q, the search is in two steps. With
the eigenpairs of Q, ``w_i = |Lambda|^(1/2) V d_i``, an entry is ``sum_r sign(lambda_r) w_ir w_jr``. Of a
matrix M between two dictionaries, ``S = D M E^T``, singular pairs give ``sum_r w_ir v_jr`` in the same
way. Three bounds leave little to compute exactly:

- ``|S[i,j]| <= a_i c_j``, a_i = ||w_i||, c_j = ||v_j||: with rows and columns ordered by falling length,
  a row needs to meet a prefix of the columns only, and the search ends where ``a_i c_1`` is too small;
- the m leading terms differ from the whole sum by at most the product of what the rest of both leaves,
  which the size of the next eigenvalue bounds without computing it;
- in bfloat16, of unit roundoff u, they are off by a few ``u a_i c_j`` more.

So blocks of few terms, in the precision that is faster on the machine, find every pair that may be among
the k, and those are computed in full. The result does not depend on m or on the precision. A matrix
without leading terms is met block by block instead.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Kind
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS, Factors

CORNER = 1024
"""Rows and columns of the first block, which finds a threshold for the others."""

_CACHE_ELEMENTS = 2**21
"""Entries of a block of a screen on a processor: it is met several times, best where it is near."""

SCREEN_FROM = 4096
"""Directions from which screening in few terms pays for itself."""

_FLAT = 0.45
"""From where on a matrix counts as flat (`_is_flat`)."""

_PROBES = 16
"""Random vectors that tell a flat matrix from another."""

_SAMPLE = 256
"""Directions that say how many terms are needed."""

_MOST_TERMS = 0.85
"""Share of d above which terms cost as much as the whole product."""

_MARGIN = 0.25
"""What the terms left out may amount to, as a share of the threshold: more saves products and costs
candidates, which are cheap as long as they are few."""


def flops(d: int, hidden: int, n: int) -> float:
    """For the strongest pair of n directions, where no product can be left out: the most it takes."""
    return 2 * hidden * d**2 + 2 * n * d**2 + n**2 * d


def entries(
    matrices: Factors, directions: Tensor | None, first: Tensor | None, second: Tensor | None
) -> Tensor:
    """Entries ``d_i^T Q d_j`` of chosen pairs of directions (of inputs, for None): [n, m], in float64.

    Without `first` and `second` the diagonal.
    """
    if directions is None:
        left, right = matrices.left.T, matrices.right.T
    else:
        used = torch.arange(len(directions), device=matrices.device)
        if first is not None and second is not None:
            used, places = torch.cat([first, second]).unique(return_inverse=True)
            first, second = places[: len(first)], places[len(first) :]
        left, right = directions[used] @ matrices.left.T, directions[used] @ matrices.right.T
    if first is None or second is None:
        first = second = torch.arange(len(left), device=matrices.device)
    dtype = checks.gram_dtype(matrices.left)
    weights = matrices.weights.to(dtype)
    step = max(1, BLOCK_ELEMENTS // (4 * matrices.d_hidden))
    parts = []
    for i, j in zip(first.split(step), second.split(step), strict=True):
        a, b = left[i].to(dtype), right[i].to(dtype)
        hidden = (a * right[j] + b * left[j]) / 2
        parts.append(weights @ hidden.T)
    found = torch.cat(parts, 1) if parts else weights.new_empty(len(weights), 0)
    return checks.narrowed("entries", found, matrices.dtype)


def strongest(
    matrix: Factors, k: int, kind: Kind, directions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(first, second, values) of the k pairs of largest coefficient of one matrix, strongest first."""
    if kind == "self":
        diagonal = entries(matrix, directions, None, None)[0]
        own = diagonal.abs().topk(k).indices
        return own, own, diagonal[own]
    if directions is None:
        first, second, values = strongest_of_factors(matrix, k, kind)
    else:
        first, second = strongest_of_directions(matrix, directions, k, kind)
        values = entries(matrix, directions, first, second)[0]
    coefficients = torch.where(first == second, 1.0, 2.0) * values.abs()
    kept = coefficients.topk(k).indices
    return first[kept], second[kept], values[kept]


class DirectionEntries:
    """Blocks of ``S = rows @ columns^T``, both ordered by falling reach.

    `symmetric` for a matrix over one set of directions: entries on and above the diagonal are met, and
    one off it counts twice. `row_rest` and `column_rest` are the lengths of what `rows` and `columns`
    leave out of S, here nothing; a reach is the length of both together.
    """

    def __init__(
        self, rows: Tensor, columns: Tensor, rest: Tensor | None = None, *, symmetric: bool
    ) -> None:
        self.symmetric = symmetric
        self.row_order, self.row_reach, self.rows, self.row_rest = _by_reach(rows, rest)
        self.column_order, self.column_reach, self.columns, self.column_rest = (
            _by_reach(columns, rest)
            if not symmetric
            else (self.row_order, self.row_reach, columns[self.row_order], self.row_rest)
        )

    @classmethod
    def of_matrix(cls, matrix: Tensor, directions: Tensor) -> DirectionEntries:
        """``D Q D^T`` through the eigenpairs of Q [d, d], of normalised factors."""
        values, vectors = _leading_first(matrix)
        weighted = directions @ (vectors * values.abs().sqrt())
        return cls(weighted * values.sign(), weighted, symmetric=True)

    @property
    def times(self) -> float:
        """How often an entry of the search counts."""
        return 2.0 if self.symmetric else 1.0

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Entries of S, nothing left out."""
        return self.rows[rows] @ self.columns[columns].T

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Single entries of S, nothing left out."""
        return _products(self.rows, self.columns, rows, columns)


class LeadingEntries(DirectionEntries):
    """``D Q D^T`` of many directions, whose `rows` and `columns` are the leading terms only.

    Blocks and entries come from D and Q themselves. What the terms left out, with eigenvalues up to mu,
    amount to for a direction is at most ``sqrt(mu)`` times the length of its part outside the leading
    eigenvectors: they need not be computed.
    """

    def __init__(
        self, matrix: Tensor, directions: Tensor, values: Tensor, vectors: Tensor, terms: int
    ) -> None:
        inside = directions @ vectors[:, :terms]
        squares = torch.linalg.vector_norm(directions, dim=1).square()
        outside = (squares - torch.linalg.vector_norm(inside, dim=1).square()).clamp_min(0)
        # The two sums of squares are rounded.
        outside += _rounding(directions.dtype, directions.shape[1]) * squares
        weighted = inside.mul_(values[:terms].abs().sqrt())
        rest = (values[terms].abs() * outside).sqrt()
        super().__init__(weighted * values[:terms].sign(), weighted, rest, symmetric=True)
        self._matrix, self._directions = matrix, directions

    @classmethod
    def of(cls, matrix: Tensor, directions: Tensor, k: int) -> LeadingEntries | None:
        """With as many terms as a sample of the directions asks for; None where most would be needed."""
        sample = _sample(directions)
        met = sample @ matrix @ sample.T
        # The pairs of the sample say about how large the k-th largest of all is.
        rank = 1 + k * len(sample) ** 2 // len(directions) ** 2
        sizes = met.abs_().triu_(1).flatten()
        needed = float(sizes.topk(min(rank, len(sizes))).values[-1])
        if _is_flat(matrix, needed / max(float(sample.square().sum(1).mean()), 1e-300)):
            return None
        values, vectors = _leading_first(matrix)
        terms = int((values.abs() * _left_out(sample @ vectors) > _MARGIN * needed).sum()) or 1
        if terms > _MOST_TERMS * len(values):
            return None
        return cls(matrix, directions, values, vectors, terms)

    def block(self, rows: slice, columns: slice) -> Tensor:
        left, right = (self._directions[self.row_order[side]] for side in (rows, columns))
        return (left @ self._matrix) @ right.T

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        used, places = rows.unique(return_inverse=True)
        through = self._directions[self.row_order[used]] @ self._matrix
        return _products(through, self._directions, places, self.row_order[columns])


def _leading_first(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, by falling size, and eigenvectors (columns) of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    leading = values.abs().argsort(descending=True)
    return values[leading], vectors[:, leading]


def _sample(rows: Tensor) -> Tensor:
    """At least `_SAMPLE` of many rows, evenly spaced."""
    return rows[:: max(1, len(rows) // _SAMPLE)]


def _left_out(rows: Tensor) -> Tensor:
    """Entry m: the mean square of what rows leave out without their first m terms."""
    return rows.square().mean(0).flip(0).cumsum(0).flip(0)


def _products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``left[i] . right[j]`` of chosen pairs of rows."""
    step = max(1, BLOCK_ELEMENTS // (4 * right.shape[1]))
    parts = [
        (left[i] * right[j]).sum(1)
        for i, j in zip(rows.split(step), columns.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else right.new_empty(0)


def _by_reach(rows: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order, reach, rows, rest) by falling reach: the length of a row and what is left out of it."""
    reach = torch.linalg.vector_norm(rows, dim=1)
    rest = torch.zeros_like(reach) if rest is None else rest
    reach = torch.hypot(reach, rest)
    order = reach.argsort(descending=True)
    return order, reach[order], rows[order], rest[order]


class _Screen:
    """Entries to within a margin: few terms, in the faster precision."""

    def __init__(self, entries: DirectionEntries, needed: float) -> None:
        sides = ((entries.rows, entries.row_rest), (entries.columns, entries.column_rest))
        means = [_left_out(_sample(terms)) + rest.square().mean() for terms, rest in sides]
        m = int(((means[0] * means[1]).sqrt() > _MARGIN * needed).sum()) or 1
        largest = float(entries.row_reach[0] * entries.column_reach[0])
        dtype = (
            _faster_dtype(entries.rows.device)
            if _rounding(torch.bfloat16, m) * largest < _MARGIN * needed
            else torch.float32
        )
        out = [
            torch.hypot(torch.linalg.vector_norm(terms[:, m:], dim=1), rest)
            for terms, rest in sides
        ]
        self.rows, self.columns = (terms[:, :m].to(dtype) for terms, _ in sides)
        rounding = _rounding(dtype, m) * entries.column_reach[0] * entries.row_reach
        self.margin = out[1].max() * out[0] + rounding

    def block(self, rows: slice, columns: slice) -> Tensor:
        return self.rows[rows] @ self.columns[columns].T


def strongest_of_factors(matrix: Factors, k: int, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """(first, second, values) of the k entries of Q of largest coefficient, first <= second."""
    best = Strongest(k, like=matrix.weights)
    step = max(1, BLOCK_ELEMENTS // matrix.d)
    for start in range(0, matrix.d, step):
        block = matrix.block(slice(start, start + step), slice(start, None))
        row, column = _candidates(block, start, kind, best.threshold / 2, k)
        best.add(row, column, block[row - start, column - start])
    return best.first, best.second, best.values


@torch.no_grad()  # places, not values
def strongest_of_directions(
    matrix: Factors, directions: Tensor, k: int, kind: Kind
) -> tuple[Tensor, Tensor]:
    """(first, second) of at least the k entries of ``D Q D^T`` of largest coefficient, first <= second.

    A few more than k: those whose order against the k-th rounding leaves open.
    """
    dense = matrix.dense()[0]
    found = (
        LeadingEntries.of(dense, directions, k)
        if len(directions) >= SCREEN_FROM
        else DirectionEntries.of_matrix(dense, directions)
    )
    if found is None:
        return _all_entries(dense, directions, k, kind)
    rows, columns = search(found, k, kind)
    return torch.minimum(rows, columns), torch.maximum(rows, columns)


def _is_flat(matrix: Tensor, needed: float) -> bool:
    """Whether screening by leading terms would hardly save anything, for entries of size `needed`.

    The more so, the more eigenvalues of one size there are and the less of it a pair makes: by the
    effective rank ``tr(Q^2)^2 / tr(Q^4)`` as a share of d, beside `needed` in units of the root mean
    square of the eigenvalues. ``tr(Q^4)`` is a mean over random vectors, ``|Q Q z|^2``.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(matrix), _PROBES, generator=generator).to(matrix)
    fourth = float((matrix @ (matrix @ probes)).square().sum()) / _PROBES
    square = float(matrix.square().sum())
    share = square**2 / max(fourth, torch.finfo(torch.float64).tiny) / len(matrix)
    return share * (square / len(matrix)) ** 0.5 > _FLAT * needed


def _all_entries(matrix: Tensor, directions: Tensor, k: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """`strongest_of_directions` where nothing can be left out: every block is computed, once.

    All blocks lie in the same memory: fresh memory costs as much as what is done with it.
    """
    best = Strongest(k, like=directions, slack=1e-3)
    through = directions @ matrix
    memory = directions.new_empty(min(CORNER, len(directions)) * len(directions))
    for start in range(0, len(directions), CORNER):
        rows, columns = through[start : start + CORNER], directions[start:]
        block = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
        torch.mm(rows, columns.T, out=block)
        score = _score(block.abs_(), kind, diagonal=0.5)
        row, column = _reaching(score, best.threshold / 2, k)
        values = (rows[row] * columns[column]).sum(1)
        best.add(row + start, column + start, values)
    return best.first, best.second


def search(pairs: DirectionEntries, k: int, kind: Kind = "all") -> tuple[Tensor, Tensor]:
    """(rows, columns) of at least the k entries of largest coefficient, in no order."""
    symmetric, times = pairs.symmetric, pairs.times
    if not symmetric and float(pairs.row_reach[0] * pairs.column_reach[0]) == 0:
        index = torch.arange(k, device=pairs.rows.device)  # all are zero: any will do
        return index // len(pairs.columns), index % len(pairs.columns)
    # The search rounds: what is within this share of the k-th is left to an exact second look.
    best = Strongest(k, like=pairs.rows, slack=1e-3, symmetric=symmetric)
    # The corner where the largest can be gives a threshold to begin with.
    block = pairs.rows[:CORNER] @ pairs.columns[:CORNER].T
    row, column = _candidates(block, 0, kind, 0.0, k, symmetric)
    best.add(row, column, pairs.entries(row, column))
    floor = best.threshold
    best = Strongest(k, like=pairs.rows, slack=1e-3, symmetric=symmetric)
    n, size = len(pairs.rows), max(len(pairs.rows), len(pairs.columns))
    screen = _Screen(pairs, floor / times) if floor > 0 and size >= SCREEN_FROM else None
    start = 0
    while start < n:
        threshold = max(best.threshold, floor)
        # Falling: the columns that can still reach the threshold are a prefix.
        tiny = torch.finfo(pairs.row_reach.dtype).tiny
        reach = times * pairs.column_reach * pairs.row_reach[start]
        first = start if symmetric else 0
        limit = int((reach >= max(threshold, tiny)).sum())
        if threshold > 0 and limit <= first:
            break
        limit = limit if threshold > 0 else len(pairs.columns)
        width = limit - first
        # Where the columns get fewer from row to row, a tall block would compute what is not needed.
        step = min(BLOCK_ELEMENTS // width, max(CORNER, width // 8))
        if screen is not None and pairs.rows.device.type == "cpu":
            step = min(step, max(1, _CACHE_ELEMENTS // width))
        rows, columns = slice(start, min(start + max(1, step), n)), slice(first, limit)
        if screen is None:
            block = pairs.block(rows, columns)
            row, column = _candidates(block, start, kind, threshold / times, k, symmetric)
            best.add(row, column, block[row - start, column - first])
        else:
            block = screen.block(rows, columns)
            needed = threshold / times - screen.margin[rows]
            # A diagonal entry stays as if it counted twice: rounding must not lose it.
            score = _score(block.abs_(), kind, diagonal=1.0) if symmetric else block.abs_()
            needed = (needed * (1 - torch.finfo(score.dtype).eps)).to(score.dtype)
            found = _at_least(score, needed, score.numel() // 32)
            if found is None:  # the margin says too little here
                screen = None
                continue
            row, column = found[0] + start, found[1] + first
            best.add(row, column, pairs.entries(row, column))
        start = rows.stop
    return pairs.row_order[best.first], pairs.column_order[best.second]


class Strongest:
    """The strongest pairs met so far, and the coefficient that a newcomer must reach."""

    def __init__(self, k: int, like: Tensor, slack: float = 0.0, symmetric: bool = True) -> None:
        self.k, self.slack, self.symmetric = k, slack, symmetric
        self.threshold = 0.0
        self.values = like.new_empty(0)
        self.first = self.second = self.matrices = torch.empty(
            0, dtype=torch.long, device=like.device
        )

    @property
    def coefficients(self) -> Tensor:
        """Absolute coefficients: of a symmetric matrix twice the entry for two different inputs."""
        if not self.symmetric:
            return self.values.abs()
        return torch.where(self.first == self.second, 1.0, 2.0) * self.values.abs()

    def add(self, first: Tensor, second: Tensor, values: Tensor, matrix: int = 0) -> None:
        """Take in pairs of one of the matrices, and let go what can no longer be among the k."""
        self.values = torch.cat([self.values, values])
        self.first = torch.cat([self.first, first])
        self.second = torch.cat([self.second, second])
        self.matrices = torch.cat([self.matrices, torch.full_like(first, matrix)])
        if len(self.values) < self.k:
            return
        coefficients = self.coefficients
        self.threshold = float(coefficients.topk(self.k).values[-1]) * (1 - self.slack)
        kept = coefficients >= self.threshold
        self.values, self.matrices = self.values[kept], self.matrices[kept]
        self.first, self.second = self.first[kept], self.second[kept]


def _candidates(
    block: Tensor, start: int, kind: Kind, needed: float, k: int, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """(rows, columns) of entries of at least `needed` in a block at `start`.

    A symmetric matrix's begins at the diagonal, and `needed` is half a coefficient. At 0 the block's own
    k strongest say what is needed.
    """
    score = _score(block.abs(), kind, diagonal=0.5) if symmetric else block.abs()
    row, column = _reaching(score, needed, k)
    return row + start, column + (start if symmetric else 0)


def _reaching(score: Tensor, needed: float, k: int) -> tuple[Tensor, Tensor]:
    """Where a score is at least `needed`, or at 0 at least what k of its entries reach."""
    if needed <= 0 and len(score) >= 8 * k:  # k rows have an entry of at least this
        needed = float(score.amax(1).topk(k).values[-1])
    elif needed <= 0 and score.numel() > 4 * k:
        needed = float(score.flatten().topk(k).values[-1])
    found = _at_least(score, score.new_full((len(score),), needed), score.numel())
    assert found is not None
    return found


def _score(sizes: Tensor, kind: Kind, diagonal: float) -> Tensor:
    """Absolute entries of a block, changed in place to -1 where they do not count.

    Twice an entry is its coefficient. The rows and columns of the block begin at the same place: what
    lies below the diagonal was met above it. A diagonal entry counts once, hence the factor.
    """
    square = sizes[:, : min(sizes.shape)]
    own = square.diagonal().clone() * diagonal
    square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), -1)
    if kind == "all":
        square.diagonal().copy_(own)
    return sizes


def _at_least(score: Tensor, needed: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Where rows of `score` reach what each row needs; None for more than `most` places."""
    needed = needed.clamp_min(0)
    rows = (score.amax(1) >= needed).nonzero()[:, 0]
    met = score[rows] >= needed[rows, None]
    if int(torch.count_nonzero(met)) > most:
        return None
    row, column = met.nonzero(as_tuple=True)
    return rows[row], column


def _rounding(dtype: torch.dtype, terms: int) -> float:
    """Error of a sum of products of rounded factors, relative to the product of their norms.

    Both factors and the result are rounded; partial sums are held in float32, on some devices less.
    """
    return 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps


@cache
def _faster_dtype(device: torch.device) -> torch.dtype:
    """float32 or bfloat16, whichever a device multiplies faster; measured once in a process."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        part = torch.ones(CORNER, 512, dtype=dtype, device=device)
        for _ in range(2):  # the first call sets things up
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            float((part @ part.T)[0, 0])
            seconds[dtype] = time.perf_counter() - begin
    return min(seconds, key=lambda dtype: seconds[dtype])
