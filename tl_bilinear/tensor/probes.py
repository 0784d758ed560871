"""A bound on one end of a spectrum from a few random vectors, whatever stands at the other end.

Let C be symmetric, x the eigenvector of its largest eigenvalue mu, and Omega r Gaussian vectors,
one a row: ``|Omega x| >= t`` except with probability ``P(chi_r < t)``. For every polynomial p,
whatever the vectors have shown before it is chosen,

    ``|p(mu)| t <= |p(mu)| |x^T Omega^T| = |x^T p(C) Omega^T| <= ||p(C) Omega^T||_F``.

The polynomials pi_j that are orthonormal in ``<p, q> = tr Omega p(C) q(C) Omega^T`` give the best
of them: the right-hand side at its least for ``p(mu) = 1`` is ``(sum_j pi_j(mu)^2)^(-1/2)``, the
Christoffel function, so

    ``t^2 sum_j pi_j(mu)^2 <= 1``.

The sum grows with mu beyond the zeros of the polynomials (the Ritz values). So a level above them
all at which it is larger lies above the spectrum of C. This is the bound of Kuczynski and
Wozniakowski (1992, theorem 4.1) with what was found in place of the worst case. A shift of C
changes nothing; for the lower end take ``-C``. The three-term recurrence of the polynomials is a
Lanczos process on the block Krylov space

    ``Omega = B_0 W_1``,    ``W_j C = B_(j-1)^T W_(j-1) + A_j W_j + B_j W_(j+1)``.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

FAILURE_PROBABILITY = 1e-6
"""Chance, over the random vectors, that what is said of one direction does not hold."""

_SAFETY = 2.0  # for rounding: t is taken so many times smaller
_STEEPEST = 0.93  # of the level: a spectrum that reaches further is not worth more steps


@cache
def shortest(rows: int, failure: float) -> float:
    """What the projection of a unit vector on `rows` Gaussian ones falls below with that chance."""
    from scipy.special import gammaincinv

    return math.sqrt(2 * gammaincinv(rows / 2, failure))


class Chain:
    """The recurrences of n matrices C at once, from `rows` Gaussian vectors each.

    When vectors are drawn again for the same directions, `round` counts up: rounds share the
    probability that any of them fails, half, a quarter, ... of it, and each end has half of that.
    """

    def __init__(self, rows: int, round: int = 0) -> None:
        self.length = shortest(rows, FAILURE_PROBABILITY / 2 ** (round + 2)) / _SAFETY
        steps = math.log(12 / min(self.length, 1.0)) / math.acosh(1 / _STEEPEST)
        self.most = math.ceil(steps)
        self.centres: list[Tensor] = []  # [n] each: level pi_j = links_(j-1) pi_(j-1)
        self.links: list[Tensor] = []  # + centres_j pi_j + links_j pi_(j+1)

    @property
    def steps(self) -> int:
        return len(self.centres)

    def begin(self, start: Tensor) -> None:
        """B_0 [n, r, r]: what the Gaussian vectors are in the first block."""
        start = start.double()
        self.size = torch.linalg.matrix_norm(start)  # of Omega
        self._now = start.mT / self.size[:, None, None]  # pi_j(C) Omega^T in the blocks
        self._before = torch.zeros_like(self._now)
        self._matrix = start.new_zeros(len(start), 0, 0)

    def add(self, own: Tensor, link: Tensor, noise: Tensor) -> None:
        """A_j and B_j [n, r, r]. Less than `noise` [n] is rounding, and counts as that much."""
        own, link = own.double(), link.double()
        n, rows = own.shape[:2]
        size = self._matrix.shape[1]
        if not size:
            self._matrix = own.new_zeros(n, 2 * rows, 2 * rows)
            size = rows
        else:
            self._matrix = torch.nn.functional.pad(self._matrix, (0, rows, 0, rows))
        old, new = slice(size - rows, size), slice(size, size + rows)
        self._matrix[:, old, old] = (own + own.mT) / 2
        self._matrix[:, old, new] = link
        self._matrix[:, new, old] = link.mT
        now = torch.nn.functional.pad(self._now, (0, 0, 0, rows))
        before = torch.nn.functional.pad(self._before, (0, 0, 0, rows))
        after = self._matrix @ now
        centre = (after * now).sum((1, 2))
        after = after - centre[:, None, None] * now
        if self.links:
            after = after - self.links[-1][:, None, None] * before
        after = after - (after * now).sum((1, 2))[:, None, None] * now
        length = torch.linalg.matrix_norm(after)
        self.centres.append(centre)
        self.links.append(torch.maximum(length, noise.double()))
        self._before, self._now = now, after / self.links[-1][:, None, None]

    def of(self, rows: Tensor) -> Chain:
        """The recurrences of some of the matrices."""
        part = Chain.__new__(Chain)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [each[rows] for each in value]
            setattr(part, name, value[rows] if isinstance(value, Tensor) else value)
        return part

    def margin(self, sign: int, level: Tensor) -> Tensor:
        """[n], above 0 where ``sign * C`` lies below `level` [n]; -inf where a Ritz value does not."""
        level = level.double()
        value = total = torch.ones_like(level)
        passed = torch.ones_like(level, dtype=torch.bool)
        step = torch.ones_like(level)
        link = torch.zeros_like(level)
        for centre, following in zip(self.centres, self.links, strict=True):
            step = level - sign * centre - link.square() / step
            passed &= step > 0
            value, link = value * step / following, following
            total = total + value.square()
        margin = total.log() / 2 + (self.length / self.size).log()
        return torch.where(passed & ~margin.isnan(), margin, -math.inf)

    def reach(self, sign: int, known: Tensor | None = None) -> Tensor:
        """[n], the lowest level that ``sign * C`` can be proved to lie below, to a thousandth.

        `known` [n]: a level that has been proved.
        """
        sizes = [each.abs() for each in self.centres + self.links]
        high = torch.stack(sizes).amax(0) if known is None else known.double()
        for _ in range(60 if known is None else 0):
            over = self.margin(sign, high) > 0
            if bool(over.all()):
                break
            high = torch.where(over, high, 2 * high)
        low = torch.minimum(high, torch.zeros_like(high))
        for _ in range(12):
            middle = (low + high) / 2
            over = self.margin(sign, middle) > 0
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return high
