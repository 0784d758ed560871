"""Leading eigenpairs of many interaction matrices at once, by block Krylov on the factors.

For each direction an orthonormal basis V of the Krylov space of a random block grows until the wanted
Rayleigh-Ritz pairs have small residuals. All directions share the four matrix products of a step: their
blocks are stacked into one matrix. Full reorthogonalisation; ``Q V`` is kept, so residuals are measured,
not estimated.

Cost of c basis columns for one direction of a layer with d inputs and h hidden neurons: ``8 c d h``
flops on the factors, or ``2 h d^2 + 2 c d^2`` with Q formed once; equal at ``c = d / (4 - d / h)``,
where the solver forms Q and goes on with the same basis. A direction that does not converge before c
reaches ``d / 3`` has a flat spectrum and is decomposed densely.

**Nothing silently missed.** A Krylov space holds at most as many copies of a repeated eigenvalue as its
block has columns, and residuals cannot tell. So a converged direction is probed: fresh Gaussian
vectors w_i go through q steps of ``E = Q - sum_i lambda_i v_i v_i^T``. If they grow faster than the
smallest wanted eigenvalue, the basis takes them in and goes on. Otherwise they certify what was left
out (Halko, Martinsson and Tropp 2011, lemma 4.1): with r probes

    ``||E|| <= (alpha sqrt(2/pi) max_i ||E^q w_i||)^(1/q)`` except with probability ``alpha^-r``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tl_bilinear.tensor.factors import Factors

Which = Literal["magnitude", "positive", "negative"]

PROBES = 4
PROBE_STEPS = 4
FAILURE_PROBABILITY = 1e-6
"""Chance, over the random probes, that the bound of one direction does not hold."""

BLOCK = 16
ROWS = 128
"""A block has ROWS / n columns, 2 to BLOCK: narrow blocks need fewer columns in all, but the stacked
blocks of the n directions should stay a matrix product rather than a few vectors."""

DENSE_AT = 1 / 3
"""Share of d at which a basis that has not converged gives way to a dense solver."""


class Pairs(NamedTuple):
    """Eigenpairs of n directions: [n, k], [n, k, d], [n, k], [n]."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bound: Tensor


@dataclass
class Outcome:
    """Where the solver stands: pairs found so far, which directions are done, and at what cost."""

    pairs: Pairs
    converged: Tensor  # [n] bool
    columns: int  # most basis columns that any direction took


def implicit_columns(d: int, hidden: int) -> int:
    """Basis columns up to which products on the factors are cheaper than forming Q."""
    return int(d / (4 - d / hidden)) if hidden > d / 4 else d


def applicable(d: int, k: int) -> bool:
    """Whether k pairs are few enough of d for a basis to be worth growing."""
    return 2 * k + 2 * BLOCK <= d


def bytes_per_direction(d: int, hidden: int, k: int, itemsize: int) -> int:
    """Memory of one direction at the solver's largest: two bases, and Q once it is formed."""
    columns = _most_columns(d, k) + BLOCK
    formed = d * d if columns > implicit_columns(d, hidden) else 0
    return (2 * columns * d + columns**2 + formed + 4 * hidden) * itemsize


def _most_columns(d: int, k: int) -> int:
    return min(d - BLOCK, max(int(DENSE_AT * d), 2 * k + BLOCK))


def select(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the k wanted of `values` [..., m], ordered by falling absolute value."""
    key = {"magnitude": values.abs(), "positive": values, "negative": -values}[which]
    kept = key.argsort(dim=-1, descending=True, stable=True)[..., :k]
    order = values.gather(-1, kept).abs().argsort(dim=-1, descending=True, stable=True)
    return kept.gather(-1, order)


def block_krylov(
    matrix: Factors, k: int, which: Which, tol: float, generator: torch.Generator
) -> Outcome:
    """The k wanted eigenpairs of each of the n matrices of a flat batch.

    A direction counts as converged when every wanted residual is at most `tol` times its largest
    absolute Ritz value and the probes found nothing larger.
    """
    n, width, hidden = len(matrix), matrix.d, matrix.d_hidden
    block = max(2, min(BLOCK, ROWS // max(1, n)))
    most = _most_columns(width, k)
    make = matrix.left.new_zeros
    found = Pairs(make(n, k), make(n, k, width), make(n, k), make(n) + math.inf)
    converged = torch.zeros(n, dtype=torch.bool, device=matrix.device)
    active = torch.arange(n, device=matrix.device)
    products = _Products(matrix)
    basis = _Basis(n, width, min(most, 2 * k + 64) + block, like=matrix.left)
    fresh: Tensor | None = _first_block(matrix, block, generator)
    check_at = min(2 * k + 2 * block, most)
    while True:
        if basis.size + block > implicit_columns(width, hidden) and basis.size:
            products.form()
        if fresh is None:
            fresh = basis.next_block(block)
        basis.append(fresh, products(fresh))
        fresh = None
        if basis.size >= check_at or basis.size + block > most:
            check_at = basis.size + max(block, basis.size // 8)
            pairs = basis.ritz_pairs(k, which)
            scale = pairs.values.abs().amax(-1, keepdim=True)
            settled = (pairs.residuals <= tol * scale).all(-1)
            missed, probes = torch.zeros_like(settled), None
            if settled.any():
                some = settled.nonzero()[:, 0]
                bound, larger, probes = _probe(products.of(some), pairs, some, which, generator)
                pairs = pairs._replace(bound=pairs.bound.index_copy(0, some, bound))
                missed[some] = larger
            done = settled & ~missed
            last = basis.size + block > most
            write = torch.ones_like(done) if last else done
            for target, source in zip(found, pairs, strict=True):
                target[active[write]] = source[write]
            converged[active[done]] = True
            if last or bool(done.all()):
                return Outcome(found, converged, basis.size)
            if probes is not None and missed.any():
                fresh = basis.next_block(block)
                fresh[missed] = basis.extended_by(probes, missed, some, block)
            if done.any():
                keep = (~done).nonzero()[:, 0]
                active = active[keep]
                basis.keep(keep)
                products = products.of(keep)
                fresh = None if fresh is None else fresh[keep]


class _Products:
    """``rows @ Q`` for the directions still active: on the factors, or on Q once it is formed."""

    def __init__(self, matrix: Factors, formed: Tensor | None = None) -> None:
        self.matrix = matrix
        self.formed = formed

    def form(self) -> None:
        if self.formed is None:
            self.formed = self.matrix.dense()

    def of(self, index: Tensor) -> _Products:
        formed = None if self.formed is None else self.formed[index]
        return _Products(self.matrix[index], formed)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.formed is not None:
            return rows @ self.formed
        # Stacked rows make one large product of each factor; matmul would batch strided ones.
        left, right = self.matrix.left, self.matrix.right
        n, block, width = rows.shape
        flat = rows.reshape(n * block, width)
        weights = (self.matrix.weights / 2)[:, None, :]
        hidden = (flat @ left.T).view(n, block, -1).mul_(weights).view(n * block, -1)
        product = hidden @ right
        hidden = (flat @ right.T).view(n, block, -1).mul_(weights).view(n * block, -1)
        return product.addmm_(hidden, left).view(n, block, width)


class _Basis:
    """Orthonormal rows V [n, m, d], their images W = V Q, and H = V Q V^T [n, m, m]."""

    def __init__(self, n: int, width: int, capacity: int, like: Tensor) -> None:
        self.size = 0
        self.vectors = like.new_empty(n, capacity, width)
        self.images = like.new_empty(n, capacity, width)
        self.reduced = like.new_zeros(n, capacity, capacity)

    def append(self, rows: Tensor, images: Tensor) -> None:
        start, stop = self.size, self.size + rows.shape[1]
        if stop > self.vectors.shape[1]:
            self._grow(stop + stop // 2)
        self.vectors[:, start:stop] = rows
        self.images[:, start:stop] = images
        self.size = stop
        overlaps = images @ self.vectors[:, :stop].mT
        self.reduced[:, start:stop, :stop] = overlaps
        self.reduced[:, :stop, start:stop] = overlaps.mT

    def next_block(self, block: int) -> Tensor:
        """Orthonormal rows of the last images' part outside the basis."""
        return self._outside(self.images[:, self.size - block : self.size])

    def extended_by(self, probes: Tensor, missed: Tensor, some: Tensor, block: int) -> Tensor:
        """The block that takes in what the probes of the missed directions found."""
        where = missed.nonzero()[:, 0]
        position = torch.searchsorted(some, where)
        rows = self.images[where, self.size - block : self.size].clone()
        rows[:, : min(PROBES, block)] = probes[position, : min(PROBES, block)]
        vectors = self.vectors[where, : self.size]
        return _orthonormal(_orthogonalised(rows, vectors), vectors)

    def _outside(self, rows: Tensor) -> Tensor:
        vectors = self.vectors[:, : self.size]
        return _orthonormal(_orthogonalised(rows, vectors), vectors)

    def ritz_pairs(self, k: int, which: Which) -> Pairs:
        m = self.size
        reduced = self.reduced[:, :m, :m]
        values, rotation = torch.linalg.eigh((reduced + reduced.mT) / 2)
        index = select(values, k, which)
        values = values.gather(-1, index)
        rotation = rotation.gather(-1, index[:, None, :].expand(-1, m, -1)).mT
        vectors = rotation @ self.vectors[:, :m]
        images = rotation @ self.images[:, :m]
        residuals = torch.linalg.vector_norm(images - values[..., None] * vectors, dim=-1)
        return Pairs(values, vectors, residuals, torch.full_like(values[:, 0], math.inf))

    def keep(self, index: Tensor) -> None:
        self.vectors = self.vectors[index]
        self.images = self.images[index]
        self.reduced = self.reduced[index]

    def _grow(self, capacity: int) -> None:
        n, old, width = self.vectors.shape
        grown = _Basis(n, width, min(max(capacity, old), width + PROBES * 8), like=self.vectors)
        grown.vectors[:, :old], grown.images[:, :old] = self.vectors, self.images
        grown.reduced[:, :old, :old] = self.reduced
        self.vectors, self.images, self.reduced = grown.vectors, grown.images, grown.reduced


def _probe(
    products: _Products, pairs: Pairs, some: Tensor, which: Which, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Bound on ``||E||``, whether something larger than a wanted pair was left out, and where."""
    values, vectors = pairs.values[some], pairs.vectors[some]
    n, _, width = vectors.shape
    scale = values.abs().amax(-1)
    scale = torch.where(scale > 0, scale, 1.0)[:, None, None]
    probes = _gaussian(n, PROBES, width, generator, like=vectors)
    before = probes
    for _ in range(PROBE_STEPS):
        before = probes
        held = (probes @ vectors.mT) * values[:, None, :]
        probes = (products(probes) - held @ vectors) / scale
    size = torch.linalg.vector_norm(probes, dim=-1)
    alpha = FAILURE_PROBABILITY ** (-1 / PROBES)
    bound = (alpha * math.sqrt(2 / math.pi) * size.amax(-1)) ** (1 / PROBE_STEPS)
    # What the residuals leave of the wanted pairs is part of E as well.
    bound = bound * scale[:, 0, 0] + pairs.residuals[some].square().sum(-1).sqrt()
    tiny = torch.finfo(size.dtype).tiny
    length = torch.linalg.vector_norm(before, dim=-1).clamp_min(tiny)
    if which == "magnitude":
        growth = (size / length).amax(-1)
        least = values.abs().amin(-1)
    else:
        sign = 1 if which == "positive" else -1
        growth = (sign * (before * probes).sum(-1) / length.square()).amax(-1)
        least = (sign * values).amin(-1)
    margin = 10 * pairs.residuals[some].amax(-1) + 1e-4 * scale[:, 0, 0]
    larger = growth * scale[:, 0, 0] > least + margin
    return bound, larger, before


def _first_block(matrix: Factors, block: int, generator: torch.Generator) -> Tensor:
    """Random rows, drawn towards the inputs that the layer reads at all; [n, block, d].

    What both factors ignore every Q ignores. Two steps with ``L^T L + R^T R``, one block for all
    directions, save each direction about a tenth of its columns.
    """
    left, right = matrix.left, matrix.right
    rows = _gaussian(1, block, matrix.d, generator, like=left)[0]
    for _ in range(2):
        rows = _orthonormal((rows @ left.T) @ left + (rows @ right.T) @ right)
    return rows.expand(len(matrix), block, matrix.d).contiguous()


def _gaussian(n: int, rows: int, width: int, generator: torch.Generator, like: Tensor) -> Tensor:
    # Drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.randn(n, rows, width, generator=generator, dtype=like.dtype)
    return drawn.to(like.device)


def _orthogonalised(rows: Tensor, vectors: Tensor) -> Tensor:
    for _ in range(2):
        rows = rows - (rows @ vectors.mT) @ vectors
    return rows


def _orthonormal(rows: Tensor, against: Tensor | None = None) -> Tensor:
    """Orthonormal rows of the same span; where that is smaller, the rest is orthogonal to it."""
    basis = torch.linalg.qr(rows.mT).Q.mT
    if against is None:
        return basis
    # The span may have run out (an invariant subspace): QR then fills up with directions that need
    # not be orthogonal to the basis.
    basis = _orthogonalised(basis, against)
    return torch.linalg.qr(basis.mT).Q.mT
