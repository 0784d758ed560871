"""The direction that explains most of a form where it matters: one term fitted to a population.

An eigenvector is the best term under a second moment. What is asked where a feature is active is another
thing: that ``lambda (w . x)^2`` varies as ``f(x) = x^T Q x`` does. So the term is chosen to leave
the least variance of f over that population,

    ``(1 - s) Var_N[f - lambda (w . x)^2] / Var_N[f] + s Var_x[f - lambda (w . x)^2] / Var_x[f]``,

Var_x over the inputs given and Var_N under the normal distribution of their mean and covariance, known
in closed form from Q: ``Var_N[x^T R x] = 2 tr(R C R C) + 4 m^T R C R m``. The first part is what the
weights say of inputs not seen, and keeps a few hundred inputs of d coordinates from being fitted by
chance; the covariance is mixed with that of all tokens (`ridge`). Further terms are fitted to the form
that is left, ``Q - sum_i lambda_i w_i w_i^T``, which is what the terms leave out: nothing is hidden.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PRIOR = 10
"""Inputs a coordinate that weigh as much as the closed form. Chosen on 96 features of the demo model."""
RIDGE = 0.3
MOST = 20_000
"""Inputs that a term is fitted to, evenly spaced among more."""
_STEPS = 40


@torch.no_grad()
def fitted_terms(
    form: Float[Tensor, "d d"],
    x: Float[Tensor, "n d"],
    k: int,
    *,
    overall: Float[Tensor, "d d"] | None = None,
    ridge: float = RIDGE,
    samples: float | None = None,
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """Values [k] of either sign and unit vectors [k, d] of terms ``value (vector . x)^2``.

    Parameters
    ----------
    form: the symmetric matrix Q
    x: inputs of the population
    overall: covariance that x's own is mixed with; by default its mean variance in every direction
    ridge: share of `overall`, above 0 and at most 1
    samples: s, from 0 to 1; by default ``n / (n + 10 d)``

    Two eigendecompositions of d x d matrices and some forty passes over x, or over 20,000 inputs evenly
    spaced in it (mean and covariance are of all), for a term. Raises
    ValueError for fewer than 2 inputs and for a ridge or share outside its range.
    """
    if len(x) < 2:
        raise ValueError(f"a term is fitted to inputs that vary: give at least 2, got {len(x)}")
    if samples is None:
        samples = len(x) / (len(x) + PRIOR * len(form))
    if not 0 < ridge <= 1 or not 0 <= samples <= 1:
        raise ValueError(
            f"ridge lies above 0 and at most at 1, samples from 0 to 1; got {ridge} and {samples}"
        )
    rows, form = x.double(), form.double()
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    if overall is None:
        overall = torch.eye(len(form), dtype=torch.double, device=form.device)
        overall = overall * covariance.trace() / len(form)
    mixed = (1 - ridge) * covariance + ridge * overall.double()
    squares, basis = torch.linalg.eigh((mixed + mixed.T) / 2)
    floor = float(squares.max()) * 1e-12
    if not floor > 0:
        raise ValueError("the inputs do not vary")
    sizes = squares.clamp_min(floor).sqrt()
    root, inverse = (basis * sizes) @ basis.T, (basis / sizes) @ basis.T
    rows = rows[:: -(-len(rows) // MOST)]
    # In coordinates of unit covariance; what is left of the form there, and its values on x.
    left, shift, rows = root @ form @ root, inverse @ mean, rows @ inverse
    values, vectors = [], []
    for _ in range(k):
        sign, vector = _term(left, shift, rows, samples)
        left = left - sign * torch.outer(vector, vector)
        found = inverse @ vector
        length = found.norm()
        values.append(sign * length.square())
        vectors.append(found / length.clamp_min(torch.finfo(torch.double).tiny))
    return torch.stack(values), torch.stack(vectors)


def _term(left: Tensor, shift: Tensor, rows: Tensor, samples: float) -> tuple[float, Tensor]:
    """The sign and vector v whose ``sign (v . u)^2`` leaves least of the form, covariance 1."""
    at_mean = left @ shift
    wanted = ((rows @ left) * rows).sum(1)
    wanted = wanted - wanted.mean()
    measured = wanted.square().mean()
    expected = 2 * left.square().sum() + 4 * at_mean.square().sum()
    if not float(expected) > 0:
        return 1.0, torch.zeros_like(shift)
    cross = torch.outer(at_mean, shift)
    start, directions = torch.linalg.eigh(left + cross + cross.T)
    best = int(start.abs().argmax())
    sign = 1.0 if float(start[best]) >= 0 else -1.0
    first = directions[:, best] * 0.7 * start[best].abs().sqrt()
    share = samples if float(measured) > 0 else 0.0
    with torch.enable_grad():
        v = first.clone().requires_grad_(True)
        solver = torch.optim.LBFGS([v], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def change() -> Tensor:
            """Of the two variances, by subtracting the term."""
            solver.zero_grad()
            size, along, through = v @ v, v @ shift, left @ v
            normal = 2 * size.square() + 4 * along.square() * size
            normal = normal - 2 * sign * (2 * v @ through + 4 * along * (at_mean @ v))
            loss = (1 - share) * normal / expected
            if share:
                term = (rows @ v).square()
                term = term - term.mean()
                loss = loss + share * (term.square() - 2 * sign * term * wanted).mean() / measured
            loss.backward()
            return loss

        solver.step(change)
    return sign, v.detach()
