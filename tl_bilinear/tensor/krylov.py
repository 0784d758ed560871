"""Leading eigenpairs of many interaction matrices at once, by block Krylov on the factors.

For each direction an orthonormal basis V of a Krylov space grows until the wanted Rayleigh-Ritz
pairs have small residuals. All directions share the four matrix products of a step: their blocks
are stacked into one matrix. Full reorthogonalisation; ``V Q`` is kept, so that the residuals
returned are measured.

Cost of c basis columns for one direction of a layer with d inputs and h hidden neurons: ``8 c d h``
flops. A direction that is not finished before c reaches ``d / 3`` has a flat spectrum and is
decomposed densely.

**Nothing left out.** Residuals say that the pairs found are pairs of Q, not that they are the
wanted ones: a Krylov space holds at most as many copies of a repeated eigenvalue as its block has
columns. So what Q is outside V is bounded, at each end of its spectrum that matters, by fresh
random vectors (probes.py), and a direction is finished when this proves that the wanted pairs come
first, to within the tolerance (`basis.Ritz`). Where the fresh vectors find something larger, the
basis takes them in and goes on, with twice as many the next time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tl_bilinear.tensor.basis import Basis, Ritz, first_block
from tl_bilinear.tensor.eigendecomposition import Which, signed
from tl_bilinear.tensor.factors import Factors, rounding

BLOCK = 8
ROWS = 64
"""A block has ROWS / n columns, 1 to BLOCK: narrow blocks need fewer columns in all, but the stacked
blocks of the n directions should stay a matrix product rather than a few vectors."""

DENSE_AT = 1 / 3
"""Share of d at which a basis that is not finished gives way to a dense solver."""

ROUNDS = 6
"""How often fresh vectors may find something larger before a direction is given up."""

_FRESH = 2
"""Fresh vectors at least. A single one may be as good as orthogonal to what it should show (1e-7, with
the chance that is allowed), and float32's rounding then hides it: 21 false statements in 1,300 on one
hard case. Two are not (5e-4): none."""

_READY = (
    0.8  # share of the last wanted value that the part outside V may reach, before it is probed
)
_PATIENCE = 1.25  # a direction that has settled waits for others until the basis is so much larger
_SCOUTS = 8  # directions looked at to see whether it is time to look at all of them


class Pairs(NamedTuple):
    """Eigenpairs of n directions, in the order asked for, and what bounds the others.

    values [n, k], vectors [n, k, d], residuals [n, k]; `bound` [n] on the norm of what the pairs leave
    out; `rest` [n], which no eigenvalue left out passes in the order asked for; `norm` [n], of Q;
    `dropped` [n], the norm of a change of Q that all of this does not see.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bound: Tensor
    rest: Tensor
    norm: Tensor
    dropped: Tensor


@dataclass
class Outcome:
    """Pairs of every direction, which of them are proved to be the wanted ones, and at what cost."""

    pairs: Pairs
    finished: Tensor  # [n] bool
    columns: int  # most columns that any direction took


def applicable(d: int, k: int) -> bool:
    """Whether k pairs are few enough of d for a basis to be worth growing."""
    return 2 * k + 2 * BLOCK <= d


def block_size(n: int) -> int:
    """Columns of a block of each of n directions."""
    return max(1, min(BLOCK, ROWS // max(1, n)))


def bytes_per_direction(d: int, hidden: int, k: int, itemsize: int) -> int:
    """Memory of one direction at the solver's largest: the basis and its images."""
    columns = _most_columns(d, k) + BLOCK
    return (2 * columns * d + 3 * columns**2 + 4 * hidden) * itemsize


def _most_columns(d: int, k: int) -> int:
    return min(d - BLOCK, max(int(DENSE_AT * d), 2 * k + BLOCK))


class _Settings(NamedTuple):
    k: int
    which: Which
    tol: float
    most: int
    neurons: Tensor  # [n] of the whole batch, for its rounding
    generator: torch.Generator

    @property
    def ends(self) -> tuple[int, ...]:
        """Of the spectrum, those that matter: 1 the upper, -1 the lower."""
        return {"magnitude": (1, -1), "positive": (1,), "negative": (-1,)}[self.which]


class _Run(NamedTuple):
    """Directions whose bases grow together."""

    where: Tensor  # [n], which of the batch
    matrix: Factors
    basis: Basis
    rounds: int = 0  # how often fresh vectors have been taken in

    def of(self, rows: Tensor) -> _Run:
        if len(rows) == len(self.where):
            return self
        return _Run(self.where[rows], self.matrix[rows], self.basis.of(rows), self.rounds)


def block_krylov(
    matrix: Factors, k: int, which: Which, tol: float, generator: torch.Generator
) -> Outcome:
    """The k wanted eigenpairs of each of the n matrices of a flat batch, of normalised factors.

    A direction is finished when every wanted residual is at most `tol` times its largest absolute Ritz
    value, and nothing left out comes before the last wanted value by more than that.
    """
    n, width = len(matrix), matrix.d
    zeros, none = matrix.left.new_zeros, matrix.left.new_full((n,), math.inf)
    pairs = Pairs(
        zeros(n, k), zeros(n, k, width), zeros(n, k), none, none.clone(), zeros(n), zeros(n)
    )
    outcome = Outcome(pairs, torch.zeros(n, dtype=torch.bool, device=matrix.device), 0)
    settings = _Settings(k, which, tol, _most_columns(width, k), matrix.neurons(), generator)
    block = block_size(n)
    basis = Basis(first_block(matrix, block, generator), min(settings.most, 3 * k + 48) + BLOCK)
    runs = [_Run(torch.arange(n, device=matrix.device), matrix, basis)]
    while runs:
        runs += _grown(runs.pop(), settings, outcome)
    return outcome


def _grown(run: _Run, settings: _Settings, outcome: Outcome) -> list[_Run]:
    """Grow the bases until some have settled, and probe those; what must still go on is returned."""
    basis, k, generator = run.basis, settings.k, settings.generator
    check_at = 0 if run.rounds else 2 * k + 2 * basis.block
    first = math.inf  # columns at which a direction first settled
    while True:
        basis.advance(run.matrix, generator)
        outcome.columns = max(outcome.columns, basis.size)
        last = basis.size + basis.block > settings.most
        if basis.size < check_at and not last:
            continue
        check_at = basis.size + max(basis.block, basis.size // 12)
        if first == math.inf and not last and len(run.where) > 2 * _SCOUTS:
            scouts = torch.arange(_SCOUTS, device=run.where.device)
            found = basis.ritz(k, settings.which, scouts)
            if not bool(_settled(run.where[scouts], found, basis.dropped[scouts], settings).any()):
                continue
        ritz = basis.ritz(k, settings.which)
        settled = _settled(run.where, ritz, basis.dropped, settings)
        if settled.any():
            first = min(first, basis.size)
        if not (last or basis.size >= _PATIENCE * first or bool(settled.all())):
            continue
        if last:
            _store(run, ritz, settings, outcome)
        done, others = settled.nonzero()[:, 0], (~settled).nonzero()[:, 0]
        left = [] if last or not len(others) else [run.of(others)]
        return left + (_probed(run.of(done), ritz.of(done), settings, outcome) if len(done) else [])


def _settled(index: Tensor, ritz: Ritz, dropped: Tensor, settings: _Settings) -> Tensor:
    """Whether the wanted pairs are good, and there is a chance to prove that they come first."""
    slack = settings.tol * ritz.norm
    # What rounding hides counts as well; where it is all of the tolerance nothing converges.
    hidden = rounding(settings.neurons[index], ritz.norm) + dropped
    good = ritz.residuals.amax(-1) <= torch.maximum(0.9 * (slack - hidden), slack / 4)
    goal, last = _goal(ritz, settings)
    for sign in settings.ends:
        good &= (ritz.limit(sign, goal) >= _READY * last) | (last <= 0)
    return good


def _goal(ritz: Ritz, settings: _Settings) -> tuple[Tensor, Tensor]:
    """What nothing left out may pass, in the order asked for, and the last wanted value."""
    last = signed(ritz.wanted, settings.which)[:, -1]
    return last + 0.9 * settings.tol * ritz.norm, last


def _probed(run: _Run, ritz: Ritz, settings: _Settings, outcome: Outcome) -> list[_Run]:
    """Bound what the bases do not reach; store what is proved, and return what must go on."""
    which, generator = settings.which, settings.generator
    goal, _ = _goal(ritz, settings)
    limits = {sign: ritz.limit(sign, goal) for sign in settings.ends}
    rows = min(
        block_size(len(run.where)) * 2**run.rounds,
        BLOCK,
        (run.basis.width - run.basis.size) // 2,
    )
    rows = max(_FRESH, rows)
    run.basis.begin_probing(rows, run.rounds, generator)
    left: list[_Run] = []
    while True:
        basis = run.basis
        basis.advance(run.matrix, generator)
        outcome.columns = max(outcome.columns, basis.size)
        chain = basis.chain
        assert chain is not None
        margins = {sign: chain.margin(sign, limits[sign]) for sign in settings.ends}
        least = torch.stack(list(margins.values())).amin(0)
        proved = least > 0
        spent = basis.size + rows > settings.most or chain.steps >= chain.most
        decided = proved | (least == -math.inf) | spent
        if 2 * int(decided.sum()) < len(decided) or not bool(decided.any()):
            continue
        done, lost = proved.nonzero()[:, 0], (decided & ~proved).nonzero()[:, 0]
        if len(done):
            links = chain.of(done)
            reach = {
                sign: links.reach(sign, limits[sign][done] if sign in limits else None)
                for sign in (1, -1)
            }
            _store(run.of(done), ritz.of(done), settings, outcome, reach)
        if len(lost):
            again = run.of(lost)
            again.basis.end_probing(generator)
            room = again.basis.size + again.basis.block <= settings.most
            if room and run.rounds + 1 < ROUNDS:
                left.append(again._replace(rounds=run.rounds + 1))
            else:
                _store(again, again.basis.ritz(settings.k, which), settings, outcome)
        rest = (~decided).nonzero()[:, 0]
        if not len(rest):
            return left
        run, ritz = run.of(rest), ritz.of(rest)
        limits = {sign: limit[rest] for sign, limit in limits.items()}


def _store(
    run: _Run,
    ritz: Ritz,
    settings: _Settings,
    outcome: Outcome,
    reach: dict[int, Tensor] | None = None,
) -> None:
    """Write the wanted pairs: finished ones, where the reach of what is outside the basis is known."""
    values, vectors, residuals = run.basis.pairs(ritz)
    bound = rest = torch.full_like(ritz.norm, math.inf)
    if reach is not None:
        ends = {sign: ritz.end(sign, beta) for sign, beta in reach.items()}
        coupling = torch.linalg.vector_norm(residuals.double(), dim=-1)
        bound = torch.maximum(ends[1], ends[-1]).clamp_min(0) + coupling
        rest = torch.stack([ends[sign] for sign in settings.ends]).amax(0)
        outcome.finished[run.where] = True
    found = Pairs(values, vectors, residuals, bound, rest, ritz.norm, run.basis.dropped)
    for target, source in zip(outcome.pairs, found, strict=True):
        target[run.where] = source.to(target.dtype)
