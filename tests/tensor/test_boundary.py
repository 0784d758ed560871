"""Exact distances to a boundary: against grids, against their own certificates, in the hard case."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear.tensor.boundary import BoundaryDistance, boundary_distance, solve
from tl_bilinear.tensor.quadratic import QuadraticForm

f64 = torch.float64
seeds = st.integers(0, 2**16)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def form(values, seed=0, linear=None, constant=0.0):
    """A form with these eigenvalues, and its eigenvectors as columns."""
    values = torch.tensor(values, dtype=f64)
    vectors = torch.linalg.qr(normal(seed, len(values), len(values))).Q
    return QuadraticForm.from_matrix((vectors * values) @ vectors.T, linear, constant), vectors


def check(q, x, found):
    """The conditions that are sufficient for a nearest point, from the dense matrix alone."""
    A = q.interaction.dense()
    finite = found.distance.isfinite() & (q(x) > 0)
    steps, nu = (found.nearest - x)[finite], found.multiplier[finite, None]
    at = found.nearest[finite]
    scale = q(x)[finite] + ((steps @ A.abs()) * steps.abs()).sum(1).abs() + 1e-300
    terms = A.abs().sum() * (at.square().sum(1) + steps.square().sum(1)) + scale
    assert (q(at).abs() <= 1e-11 * terms).all()
    flat = (2 * steps + nu * (2 * at @ A + q.linear)).norm(dim=1)
    assert (flat <= 1e-7 * (steps.norm(dim=1) + 1e-12)).all()
    assert (1 + nu[:, 0] * torch.linalg.eigvalsh(A)[0] >= -1e-9).all()
    assert_close(steps.norm(dim=1), found.distance[finite], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ values of a form


@given(seeds)
def test_a_form_is_a_layer_along_a_direction(seed):
    t = random_tensor(4, 5, 3, biases=True, seed=seed)
    u, x = normal(seed, 2, 3), normal(seed + 1, 6, 4)
    q = QuadraticForm.of(t, u)
    assert_close(q(x), t(x) @ u.T)
    assert_close(QuadraticForm.of(t)(x), t(x))
    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((t(leaf) @ u[1]).sum(), leaf)
    assert_close(q.gradient(x)[1], slope)
    assert_close(q[1].gradient(x), slope)


def test_a_matrix_that_is_not_symmetric():
    A, x = normal(0, 3, 3), normal(1, 5, 3)
    q = QuadraticForm.from_matrix(A, normal(2, 3), 0.5)
    assert_close(q(x), ((x @ A) * x).sum(1) + x @ normal(2, 3) + 0.5)


# ------------------------------------------------------------------ distances


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_against_a_grid(d, seed):
    q = QuadraticForm.from_matrix(normal(seed, d, d), normal(seed + 50, d), 1.0)
    x = normal(seed + 99, 6, d)
    x = x[q(x) > 0]
    found = boundary_distance(q, x)
    count = 801 if d == 2 else 81
    for point, distance in zip(x, found.distance, strict=True):
        reach = 1.3 * float(distance) if distance.isfinite() else 20.0
        line = torch.linspace(-reach, reach, count, dtype=f64)
        cell = float(line[1] - line[0]) * d**0.5
        grid = torch.cartesian_prod(*[line] * d)
        inside = q(point + grid) <= 0
        if not distance.isfinite():
            assert not inside.any()
            continue
        best = float(grid[inside].norm(dim=1).min())
        # No point of the grid beats it; one comes near (a thin region may fall between points).
        assert best >= float(distance) - 1e-9
        assert best <= float(distance) + 2 * cell


@pytest.mark.campaign
@pytest.mark.parametrize(
    "kind",
    ["indefinite", "negative", "positive", "semidefinite", "negative-semi", "degenerate", "zero"],
)
def test_random_forms(kind):
    """10,500 forms in all, each held to the conditions that prove it."""
    generator = torch.Generator().manual_seed(1)
    for trial in range(1500):
        d = 1 + trial % 8
        values = torch.randn(d, generator=generator, dtype=f64)
        if kind in ("negative", "negative-semi"):
            values = -values.abs()
        if kind in ("positive", "semidefinite"):
            values = values.abs()
        if kind in ("semidefinite", "negative-semi"):
            values[: (d + 1) // 2] = 0
        if kind == "degenerate":
            values = values[torch.arange(d) // 3]
        if kind == "zero":
            values = torch.zeros(d, dtype=f64)
        linear = torch.randn(d, generator=generator, dtype=f64)
        q, _ = form(values.tolist(), trial, linear, float(torch.randn((), generator=generator)))
        x = torch.randn(3, d, generator=generator, dtype=f64) * 10 ** (trial % 3 - 1)
        found = boundary_distance(q, x)
        check(q, x, found)
        assert (found.distance[q(x) <= 0] == 0).all()
        if kind == "zero":
            plain = (q(x) / linear.norm()).clamp_min(0)
            assert_close(found.distance, plain, rtol=1e-9, atol=1e-12)
        if kind in ("indefinite", "degenerate") and values.min() < -1e-6:
            assert found.distance.isfinite().all()


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("nearly", [0.0, 1e-15, 1e-9, 1e-4])
def test_the_hard_case(multiple, nearly):
    """The gradient has no part, or hardly one, along the smallest eigenvalue."""
    hard = 0
    for seed in range(40):
        rest = normal(seed, 4).abs() + 0.5
        values = [-2.0] * multiple + rest.tolist()
        q, vectors = form(values, seed)
        c = torch.cat([nearly * torch.ones(multiple, dtype=f64), 0.3 * normal(seed + 7, 4)])
        x = (vectors @ c)[None]
        if q(x) <= 0:
            continue
        found = boundary_distance(q, x)
        check(q, x, found)
        # With -2 at the end 1 + nu lambda_i for the rest is at its largest: all of e there is known.
        limit = -c[multiple:] * rest / (2 + rest)
        left = (rest * (c[multiple:] + limit).square()).sum()
        expected = (limit.square().sum() + left / 2).sqrt()
        # A distance to a set changes by no more than the point moves.
        assert_close(found.distance[0], expected, rtol=1e-9, atol=nearly * multiple**0.5)
        hard += 1
    assert hard > 20


def test_a_point_where_the_gradient_vanishes():
    q, vectors = form([-4.0, 1.0, 3.0], constant=1.0)
    found = boundary_distance(q, torch.zeros(1, 3, dtype=f64))
    assert_close(found.distance, torch.tensor([0.5], dtype=f64))
    assert_close((found.nearest[0] @ vectors[:, 0]).abs(), torch.tensor(0.5, dtype=f64))
    assert (
        boundary_distance(form([1.0, 2.0], constant=1.0)[0], torch.zeros(1, 2, dtype=f64)).distance[
            0
        ]
        == math.inf
    )


def test_a_boundary_that_is_touched():
    q = QuadraticForm.from_matrix(torch.diag(torch.tensor([1.0, 0.0], dtype=f64)))
    found = boundary_distance(q, torch.tensor([[3.0, 5.0]], dtype=f64))
    assert_close(found.distance, torch.tensor([3.0], dtype=f64), rtol=1e-6, atol=0)


def test_forms_that_are_positive_everywhere():
    q, _ = form([1.0, 2.0, 0.0], constant=1.0)
    found = boundary_distance(q, normal(0, 9, 3))
    assert (found.distance == math.inf).all()
    assert (found.multiplier == math.inf).all()
    assert (found.curvature > 0).all()


@given(seeds, st.floats(-80, 80), st.floats(-80, 80))
def test_units_do_not_matter(seed, power, length):
    """A form scaled by a number, or measured in other lengths."""
    values, g = normal(seed, 5), normal(seed + 1, 3, 5)
    m = normal(seed + 2, 3).abs()
    plain = solve(values, g, m)
    scale, unit = 10 ** (power / 2), 10 ** (length / 4)
    other = solve(values * scale / unit**2, g * scale / unit, m * scale)
    assert_close(other.distance, plain.distance * unit, rtol=1e-9, atol=0)
    assert_close(other.steps, plain.steps * unit, rtol=1e-6, atol=1e-9 * unit)


def test_float32_and_float64_agree():
    t = random_tensor(12, 9, 3, biases=True)
    u, x = normal(1, 3), normal(2, 40, 12)
    exact = boundary_distance(QuadraticForm.of(t, u), x)
    single = boundary_distance(QuadraticForm.of(t.to(torch.float32), u.float()), x.float())
    assert single.distance.dtype == f64
    assert_close(single.distance, exact.distance, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_read_back(tmp_path):
    q, _ = form([-1.0, 2.0])
    found = boundary_distance(q, normal(0, 4, 2))
    found.save(tmp_path / "distance.safetensors")
    assert torch.equal(
        BoundaryDistance.load(tmp_path / "distance.safetensors").nearest, found.nearest
    )


def test_bad_input(unchecked):
    q = QuadraticForm.of(random_tensor(3, 4, 2))
    with pytest.raises(ValueError, match="of one form, this is a batch of \\[2\\]"):
        boundary_distance(q, normal(0, 1, 3))
    with pytest.raises(ValueError, match="x must have shape"):
        boundary_distance(q[0], normal(0, 1, 4))
    with pytest.raises(ValueError, match="x has 1 NaN"):
        boundary_distance(q[0], torch.tensor([[1.0, math.nan, 0.0]], dtype=f64))
    with pytest.raises(ValueError, match="must be square"):
        QuadraticForm.from_matrix(normal(0, 2, 3))
    with pytest.raises(ValueError, match="linear must have shape"):
        QuadraticForm.from_matrix(normal(0, 2, 2), normal(0, 3))
