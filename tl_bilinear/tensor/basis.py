"""Orthonormal bases of many directions at once, as a Krylov solver grows them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_bilinear.tensor.eigendecomposition import Which, signed
from tl_bilinear.tensor.factors import Factors
from tl_bilinear.tensor.probes import Chain

_NOISE = 8  # times eps: a row with less than that outside, beside Q, is dropped as rounding
_PASSES = 4  # of orthogonalisation at most, after the first: two do almost always
_CACHE_BYTES = 2**20  # vectors that one core holds near


def select(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the k wanted of `values` [..., m], in the order asked for."""
    return signed(values, which).argsort(dim=-1, descending=True, stable=True)[..., :k]


class Basis:
    """Rows V [n, m, d], their images W = V Q, and H = V Q V^T [n, m, m].

    The images of the rows `open` reach outside: ``W[open] - H[open] V = coupling @ ahead``, with
    orthonormal rows `ahead` [n, a, d], the next to be taken in. What was dropped on the way, as small as
    rounding, is at most `dropped` [n] as a spectral norm: all else is exact for a matrix so near to Q.
    """

    def __init__(self, ahead: Tensor, capacity: int) -> None:
        n, _, width = ahead.shape
        self.size = 0
        self.vectors = ahead.new_empty(n, capacity, width)
        self.images = ahead.new_empty(n, capacity, width)
        self.reduced = ahead.new_zeros(n, capacity, capacity)
        self.scale = ahead.new_zeros(n)  # of Q: the longest image so far
        self._lost = ahead.new_zeros(n)  # squared
        self.open: list[int] = []
        self.ahead = ahead
        self.coupling = ahead.new_zeros(n, 0, ahead.shape[1])
        self.chain: Chain | None = None
        self.aside: tuple[int, list[int], Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def block(self) -> int:
        """Rows of the next step."""
        return self.ahead.shape[1]

    @property
    def width(self) -> int:
        return self.vectors.shape[2]

    @property
    def dropped(self) -> Tensor:
        return self._lost.sqrt().double()

    @property
    def _noise(self) -> Tensor:
        return _NOISE * torch.finfo(self.scale.dtype).eps * self.scale

    def of(self, rows: Tensor) -> Basis:
        """The bases of some of the directions."""
        part = Basis.__new__(Basis)
        part.size, part.open = self.size, self.open
        for name in ("vectors", "images", "reduced", "scale", "_lost", "ahead", "coupling"):
            setattr(part, name, getattr(self, name)[rows])
        part.chain = None if self.chain is None else self.chain.of(rows)
        part.aside = self.aside
        if self.aside is not None:
            size, opened, ahead, coupling = self.aside
            part.aside = (size, opened, ahead[rows], coupling[rows])
        return part

    def advance(self, matrix: Factors, generator: torch.Generator) -> None:
        """Take in the rows ahead, and find what their images have outside."""
        start, stop = self.size, self.size + self.block
        if stop > self.vectors.shape[1]:
            self._grow(stop + stop // 2)
        images = products(matrix, self.ahead)
        self.vectors[:, start:stop] = self.ahead
        self.images[:, start:stop] = images
        self.size, self.open = stop, list(range(start, stop))
        longest = torch.linalg.vector_norm(images, dim=-1).amax(-1)
        self.scale = torch.maximum(self.scale, longest)
        held = self.vectors[:, :stop]
        overlaps, self.ahead, self.coupling, lost = _outside(images, held, self._noise, generator)
        self._lost += lost
        self.reduced[:, start:stop, :stop] = overlaps
        self.reduced[:, :stop, start:stop] = overlaps.mT
        if self.chain is not None:
            self.chain.add(overlaps[:, :, start:stop], self.coupling, self._noise)

    # ------------------------------------------------------------------ fresh random rows

    def begin_probing(self, rows: int, round: int, generator: torch.Generator) -> Chain:
        """Put fresh random rows ahead, orthogonal to V, and set aside what was ahead."""
        self.aside = (self.size, self.open, self.ahead, self.coupling)
        drawn = _gaussian(len(self), rows, self.width, generator, like=self.vectors)
        none = torch.zeros_like(self.scale)
        _, self.ahead, link, _ = _outside(drawn, self.vectors[:, : self.size], none, generator)
        self.chain = Chain(rows, round)
        self.chain.begin(link)
        return self.chain

    def end_probing(self, generator: torch.Generator) -> None:
        """Keep the random rows as part of V, and go on with all that is ahead."""
        assert self.aside is not None
        _, opened, ahead, coupling = self.aside
        reaching = torch.cat([coupling @ ahead, self.coupling @ self.ahead], 1)
        held = self.vectors[:, : self.size]
        self.open = [*opened, *self.open]
        _, self.ahead, self.coupling, lost = _outside(reaching, held, self._noise, generator)
        self._lost += lost
        self.chain = self.aside = None

    # ------------------------------------------------------------------ what it holds

    def ritz(self, k: int, which: Which, rows: Tensor | None = None) -> Ritz:
        """All Rayleigh-Ritz values of V (of some directions), the k wanted marked."""
        reduced, coupling = self.reduced[:, : self.size, : self.size], self.coupling
        if rows is not None:
            reduced, coupling = reduced[rows], coupling[rows]
        values, columns = torch.linalg.eigh(reduced)
        outside = columns[:, self.open].mT @ coupling
        index = select(values, k, which)
        rotation = columns.mT.gather(1, index[..., None].expand(-1, -1, self.size))
        return Ritz(values.double(), rotation, outside.double(), index)

    def pairs(self, ritz: Ritz) -> tuple[Tensor, Tensor, Tensor]:
        """Values, vectors and measured residuals of the wanted pairs."""
        size = ritz.values.shape[1]
        values = ritz.wanted.to(self.vectors.dtype)
        vectors = ritz.rotation @ self.vectors[:, :size]
        gaps = (ritz.rotation @ self.images[:, :size]).addcmul_(
            values[..., None], vectors, value=-1
        )
        return values, vectors, torch.linalg.vector_norm(gaps, dim=-1)

    def _grow(self, capacity: int) -> None:
        n, old, width = self.vectors.shape
        for name in ("vectors", "images"):
            grown = self.vectors.new_empty(n, capacity, width)
            grown[:, :old] = getattr(self, name)
            setattr(self, name, grown)
        reduced = self.reduced.new_zeros(n, capacity, capacity)
        reduced[:, :old, :old] = self.reduced
        self.reduced = reduced


@dataclass
class Ritz:
    """Rayleigh-Ritz pairs of bases of m columns, in float64: all values, and which are wanted.

    Let R be the part of ``V Q`` outside V and C what Q is between rows outside V. By Sylvester's law,
    for ``C <= beta < level``, no more eigenvalues of Q pass the level than of the m x m matrix
    ``V Q V^T + R R^T / (level - beta)``.
    """

    values: Tensor  # [n, m]
    rotation: Tensor  # [n, k, m], the wanted vectors
    outside: Tensor  # [n, m, a], what the image of each Ritz vector has outside V
    index: Tensor  # [n, k], the wanted ones

    def of(self, rows: Tensor) -> Ritz:
        return Ritz(*(part[rows] for part in vars(self).values()))

    @property
    def norm(self) -> Tensor:
        return self.values.abs().amax(-1)

    @property
    def wanted(self) -> Tensor:
        return self.values.gather(-1, self.index)

    @property
    def residuals(self) -> Tensor:
        return torch.linalg.vector_norm(self.outside, dim=-1).gather(-1, self.index)

    def limit(self, sign: int, level: Tensor) -> Tensor:
        """[n]: with ``sign * C`` below this, none but the wanted pairs of ``sign * Q`` pass `level`."""
        return level - self._reaction(sign, level)

    def end(self, sign: int, beta: Tensor) -> Tensor:
        """[n]: what none but the wanted pairs of ``sign * Q`` pass, for ``sign * C <= beta``."""
        others = (sign * self.values).scatter(-1, self.index, -math.inf).amax(-1)
        low = torch.maximum(others, beta)
        high = low + torch.linalg.matrix_norm(self.outside)
        for _ in range(20):
            middle = (low + high) / 2
            fits = self._reaction(sign, middle) <= middle - beta
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        return high

    def _reaction(self, sign: int, level: Tensor) -> Tensor:
        """Norm of ``sum_j r_j r_j^T / (level - theta_j)`` over the pairs that are not wanted."""
        gaps = level[:, None] - sign * self.values
        weights = torch.where(gaps > 0, 1 / gaps, math.inf).scatter(-1, self.index, 0.0)
        gram = (self.outside.mT * weights[:, None, :]) @ self.outside
        # Positive semi-definite: this is no less than the largest eigenvalue, and equal for one row.
        return torch.linalg.matrix_norm(gram).nan_to_num(nan=math.inf)


# ---------------------------------------------------------------------- products and rows


def products(matrix: Factors, rows: Tensor) -> Tensor:
    """``rows @ Q`` for rows [n, m, d], the rows of all directions stacked into one product."""
    left, right = matrix.left, matrix.right
    n, block, width = rows.shape
    flat = rows.reshape(n * block, width)
    weights = (matrix.weights / 2)[:, None, :]
    hidden = (flat @ left.T).view(n, block, -1).mul_(weights).view(n * block, -1)
    product = hidden @ right
    hidden = (flat @ right.T).view(n, block, -1).mul_(weights).view(n * block, -1)
    return product.addmm_(hidden, left).view(n, block, width)


def first_block(matrix: Factors, block: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows, drawn towards the inputs that the layer reads at all; [n, block, d].

    What both factors ignore every Q ignores. Two steps with ``L^T L + R^T R``, one block for all
    directions, save each direction about a tenth of its columns.
    """
    left, right = matrix.left, matrix.right
    rows = _gaussian(1, block, matrix.d, generator, like=left)[0]
    for _ in range(2):
        rows = (rows @ left.T) @ left + (rows @ right.T) @ right
        rows = torch.linalg.qr(rows.T).Q.T
    return rows.expand(len(matrix), block, matrix.d).contiguous()


def _gaussian(n: int, rows: int, width: int, generator: torch.Generator, like: Tensor) -> Tensor:
    # Drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.randn(n, rows, width, generator=generator, dtype=like.dtype)
    return drawn.to(like.device)


def _outside(
    rows: Tensor, held: Tensor, noise: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of rows [n, r, d] outside the orthonormal rows `held`: (overlaps, ahead, coupling, lost).

    ``rows = overlaps @ held + coupling @ ahead`` with orthonormal rows `ahead`, orthogonal to the held
    ones, and `coupling` lower triangular. Where less than `noise` [n] is outside, a row ahead is random;
    `lost` [n] is the sum of squares of what was there.
    """
    overlaps, rest = _projected_out(rows, held)
    ahead, coupling, lost = _triangular(rest, noise, generator)
    # Once more, since what was small beside the rows was rounded; and again where that was most of it.
    for _ in range(_PASSES):
        _, ahead = _projected_out(ahead, held)
        ahead, again, _ = _triangular(ahead, torch.zeros_like(noise), generator)
        coupling = coupling @ again
        if bool((again.diagonal(dim1=1, dim2=2) > 0.5).all()):
            break
    return overlaps, ahead, coupling, lost


def _projected_out(rows: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """(overlaps, rows less their part in `held`), in parts that stay in a core's cache."""
    overlaps = rows.new_empty(len(rows), rows.shape[1], held.shape[1])
    rest = torch.empty_like(rows)
    step = max(1, _CACHE_BYTES // max(1, held[0].numel() * held.element_size()))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        torch.bmm(rows[part], held[part].mT, out=overlaps[part])
        torch.baddbmm(rows[part], overlaps[part], held[part], alpha=-1, out=rest[part])
    return overlaps, rest


def _triangular(
    rows: Tensor, noise: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """``rows = lower @ orthonormal``; a row that adds less than `noise` gives way to a random one.

    Third: the sum of squares [n] of what such rows would have added.
    """
    result = torch.empty_like(rows)
    lower = rows.new_zeros(len(rows), rows.shape[1], rows.shape[1])
    gone = torch.zeros_like(noise)
    for i in range(rows.shape[1]):
        row = rows[:, i]
        for j in range(i):
            overlap = torch.linalg.vecdot(row, result[:, j])
            lower[:, i, j] = overlap
            row = row - overlap[:, None] * result[:, j]
        length = torch.linalg.vector_norm(row, dim=-1)
        lost = length <= noise
        if bool(lost.any()):
            fresh = _gaussian(len(rows), 1, rows.shape[2], generator, like=rows)[:, 0]
            for j in range(i):
                fresh = fresh - torch.linalg.vecdot(fresh, result[:, j])[:, None] * result[:, j]
            row = torch.where(lost[:, None], fresh, row)
            lower[:, i, i] = torch.where(lost, 0.0, length)
            gone = gone + torch.where(lost, length.square(), 0.0)
            length = torch.linalg.vector_norm(row, dim=-1)
        else:
            lower[:, i, i] = length
        result[:, i] = row / length[:, None]
    return result, lower, gone
