"""Exact l2 distance from points to the boundary of a quadratic form, each with its certificate.

The nearest point of ``{q <= 0}`` to x, for ``q(x + e) = m + g . e + e^T A e`` with m = q(x) > 0, is a
trust-region problem: not convex, yet solved exactly (Moré and Sorensen 1983). With a multiplier nu,

    ``e = -nu/2 (I + nu A)^-1 g``,  ``q(x + e) = 0``,  ``I + nu A >= 0``

is not only necessary but sufficient. In the eigenbasis of A, with ``s = max(0, -lambda_min)``,
``mu_i = lambda_i + s >= 0`` and ``kappa = 1/nu - s >= 0`` the condition is one equation,

    ``h(kappa) = sum_i g_i^2 (2 kappa + mu_i + s) / (4 (kappa + mu_i)^2) = m``,

whose terms are all positive (nothing cancels) and whose left side falls with kappa. Newton's method on
``log h`` over ``log kappa``, kept inside a bracket that bisection shrinks, finds it to rounding.

**The hard case.** Where g has no part in the eigenspace of lambda_min, h may stay below m down to
kappa = 0. Then nu = 1/s and e has a part along that eigenspace as long as q still needs; both signs of
it are nearest.

**The certificate.** (nu, e, a bound on lambda_min) prove the distance without another solution:
``|e'|^2 + nu q(x + e')`` is convex in e' where ``I + nu A >= 0``, flat at e, and a lower bound of
``|e'|^2`` on ``{q <= 0}``. `certificate_checker` uses just that, in arithmetic that rounds outward.

>>> found = boundary_distance(margin, images)
>>> found.distance, found.nearest                # [n], [n, d]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.quadratic import QuadraticForm

_MOST_STEPS = 200
"""Newton takes about ten; halving the logarithm of any bracket in float64 takes about sixty."""

_ROUNDING = 1e-15
"""Error of log h below which a step of Newton would only follow rounding."""


@dataclass(frozen=True, eq=False)
class BoundaryDistance(Result):
    """How far each of n points is from ``{q <= 0}``, and why no nearer point exists.

    Attributes
    ----------
    distance: [n], 0 where q is not positive already, infinite where q is positive everywhere
    multiplier: [n], nu; 0 where the distance is 0, infinite where it is
    nearest: [n, d], the nearest point of ``{q <= 0}``; the point itself where there is none
    margin: [n], q at the point
    residual: [n], |q| at `nearest` over the scale of its terms: rounding where solved; 0 elsewhere
    stationarity: [n], ``|2 e + nu grad q(x + e)|`` over ``|2 e|``
    smallest: [], the smallest eigenvalue of A; 0 within rounding
    """

    distance: Float[Tensor, " n"]
    multiplier: Float[Tensor, " n"]
    nearest: Float[Tensor, "n d"]
    margin: Float[Tensor, " n"]
    residual: Float[Tensor, " n"]
    stationarity: Float[Tensor, " n"]
    smallest: Float[Tensor, ""]

    @property
    def curvature(self) -> Float[Tensor, " n"]:
        """[n], ``1 + nu lambda_min``: no less than 0, up to rounding, where the point is nearest."""
        inside = self.multiplier.isfinite()
        nu = torch.where(inside, self.multiplier, 0.0)
        return torch.where(inside, 1 + nu * self.smallest, (self.smallest >= 0).to(nu.dtype))


class Steps(NamedTuple):
    """Solutions in the eigenbasis."""

    steps: Tensor  # [n, r]
    distance: Tensor  # [n]
    multiplier: Tensor  # [n]


@torch.no_grad()
def boundary_distance(form: QuadraticForm, x: Float[Tensor, "n d"]) -> BoundaryDistance:
    """The exact l2 distance of each point to where one form is not positive.

    Parameters
    ----------
    form: a single QuadraticForm (index a batch first)
    x: [n, d]

    Computed in float64. One eigendecomposition of Q, then ``O(n d^2)``. Eigenvalues within rounding of
    zero (``d eps |lambda|max``) count as zero. Entries, and their products, must lie within 1e-100
    and 1e100 for float64 to hold them.

    Raises ValueError for a batch of forms, vectors of another width, NaN.
    """
    if form.batch_shape:
        raise ValueError(
            f"boundary_distance is of one form, this is a batch of {list(form.batch_shape)}; index "
            f"it, or use adversarial_distances for all pairs of classes"
        )
    wide = form.to(torch.float64)
    x = checks.require_matrix("x", x, wide.d, "d, the width of the form", wide.linear)
    checks.require_finite("x", x)
    values, vectors = torch.linalg.eigh(wide.interaction.dense())
    margin = wide(x)
    gradient = wide.gradient(x)
    found = solve(values, gradient @ vectors, margin)
    steps = found.steps @ vectors.T
    nearest = x + steps
    solved = found.distance.isfinite() & (margin > 0)
    linear, curved = (gradient * steps).sum(1), (found.steps.square() * values).sum(1)
    scale = margin.abs() + linear.abs() + (found.steps.square() * values.abs()).sum(1)
    tiny = torch.finfo(x.dtype).tiny
    residual = torch.where(solved, (margin + linear + curved).abs() / scale.clamp_min(tiny), 0.0)
    nu = torch.where(solved, found.multiplier, 0.0)
    slope = gradient + 2 * wide.interaction.apply(steps)
    flat = (2 * steps + nu[:, None] * slope).norm(dim=1) / (2 * found.distance).clamp_min(tiny)
    flat = torch.where(solved, flat, 0.0)
    least = values.min()
    flat_at = wide.d * torch.finfo(x.dtype).eps * values.abs().max()
    smallest = torch.where(least.abs() <= flat_at, 0.0, least)
    return BoundaryDistance(
        found.distance, found.multiplier, nearest, margin, residual, flat, smallest
    )


def solve(
    values: Float[Tensor, " r"], gradient: Float[Tensor, "n r"], margin: Float[Tensor, " n"]
) -> Steps:
    """The shortest e with ``margin + gradient . e + sum values e^2 <= 0``, in float64."""
    n = len(margin)
    steps, distance = torch.zeros_like(gradient), margin.new_zeros(n)
    multiplier = margin.new_zeros(n)
    todo = (margin > 0).nonzero()[:, 0]
    if not len(todo):
        return Steps(steps, distance, multiplier)
    eps = torch.finfo(values.dtype).eps
    top = values.abs().max() if len(values) else values.new_zeros(())
    lam = torch.where(values.abs() <= len(values) * eps * top, 0.0, values)
    shift = (-lam.min()).clamp_min(0) if len(lam) else top

    m, g = margin[todo], gradient[todo]
    length = g.norm(dim=1)
    # A gradient that changes the distance by less than rounding counts as none.
    still = length <= eps / 4 * (shift * m).sqrt()
    alone = m / shift if float(shift) > 0 else torch.ones_like(m)
    unit = torch.where(still, alone, (m / length.clamp_min(1e-300)) ** 2)
    # Units in which m = 1 and, unless it is none, |g| = 1: lengths in sqrt(unit), curvature in m / unit.
    g = torch.where(still[:, None], 0.0, g * (unit.sqrt() / m)[:, None])
    ratio = unit / m
    mu, s = (lam + shift)[None] * ratio[:, None], shift * ratio
    at_pole = (lam + shift) == 0
    if float(shift) == 0:
        # Along a flat direction of a convex form even rounding of g would reach the boundary.
        g = torch.where(at_pole & (g.abs() <= len(lam) * eps), 0.0, g)
    squares = g.square()
    pole = squares[:, at_pole].sum(1)

    def parts(kappa: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """h and the slope of log h over log kappa."""
        inverse = 1 / (kappa[:, None] + mu[rows])
        weighted = squares[rows] * inverse
        h = (weighted * (1 + (kappa + s[rows])[:, None] * inverse)).sum(1) / 4
        falls = (weighted * inverse.square()).sum(1) * (kappa + s[rows]) / 2
        return h, -kappa * falls / h

    # At kappa = 0, without the pole: h there decides between a root, the hard case and no solution.
    inverse = torch.where(at_pole, 0.0, 1 / mu.masked_fill(at_pole[None], 1.0))
    floor = (squares * inverse * (1 + s[:, None] * inverse)).sum(1) / 4
    hard = (pole == 0) & (floor < 1)
    kappa = torch.zeros_like(m)
    rows = (~hard & ~((pole == 0) & (floor == 1))).nonzero()[:, 0]
    if len(rows):
        total = squares[rows].sum(1)
        high = _root(total, s[rows])
        low = torch.maximum(_root(pole[rows], s[rows]), total / 4 - mu[rows].amax(1))
        low = low.clamp_min(1e-300).minimum(high)
        low, high = low.log() - 1e-9, high.log() + 1e-9
        at = high.clone()
        for _ in range(_MOST_STEPS):
            h, slope = parts(at.exp(), rows)
            error = h.log()
            low, high = torch.where(error > 0, at, low), torch.where(error > 0, high, at)
            step = at - error / slope
            inside = (step >= low) & (step <= high)
            new = torch.where(inside, step, (low + high) / 2)
            # log h is known to rounding of its sum, log kappa to eps |log kappa|.
            close = (new - at).abs() <= 2 * eps * at.abs().clamp_min(1)
            done = close | (error.abs() <= _ROUNDING)
            at = torch.where(done, at, new)
            kappa[rows[done]] = at[done].exp()
            left = ~done
            rows, at, low, high = rows[left], at[left], low[left], high[left]
            if not len(rows):
                break
        kappa[rows] = at.exp()
        kappa[rows] = at.exp()
    denominator = (kappa[:, None] + mu).masked_fill((at_pole[None]) & (kappa == 0)[:, None], 1.0)
    e = -g / (2 * denominator)
    e = torch.where(at_pole & (kappa == 0)[:, None], 0.0, e)
    never = hard & (s == 0)
    rest = (1 - floor).clamp_min(0)
    extra = torch.where(hard & (s > 0), (rest / s.clamp_min(1e-300)).sqrt(), 0.0)
    if len(lam):
        e[:, int(lam.argmin())] += extra
    size = e.norm(dim=1) * unit.sqrt()
    inf = math.inf
    steps[todo] = torch.where(never[:, None], 0.0, e * unit.sqrt()[:, None])
    distance[todo] = torch.where(never, inf, size)
    multiplier[todo] = torch.where(never, inf, ratio / (kappa + s))
    return Steps(steps, distance, multiplier)


def _root(weight: Tensor, s: Tensor) -> Tensor:
    """kappa at which ``weight (2 kappa + s) / (4 kappa^2) = 1``: h, were all its weight at the pole."""
    return (weight + (weight.square() + 4 * weight * s).sqrt()) / 4
