"""Extremes of forms over balls and ellipsoids: against grids, never exceeded, always attained."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor, InputMoments
from tl_bilinear.tensor import QuadraticForm
from tl_bilinear.tensor.regions import InputRegion, change_bounds, extremes, truncation_change

f64 = torch.float64
seeds = st.integers(0, 2**16)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def some_form(seed, d, spectrum):
    """A form of a chosen kind of spectrum, in a random basis, with its linear part."""
    basis, _ = torch.linalg.qr(normal(seed, d, d))
    values = {
        "indefinite": normal(seed + 1, d),
        "positive": normal(seed + 1, d).abs() + 0.1,
        "negative": -normal(seed + 1, d).abs() - 0.1,
        "zero": torch.zeros(d, dtype=f64),
        "repeated": torch.ones(d, dtype=f64),
        "hard": torch.cat([torch.tensor([2.0], dtype=f64), -normal(seed + 1, d - 1).abs()]),
    }[spectrum]
    slope = 0.3 * normal(seed + 2, d)
    if spectrum == "hard":
        slope[0] = 0
    return QuadraticForm.from_matrix(basis.T @ values.diag() @ basis, slope @ basis, 0.7)


SPECTRA = ["indefinite", "positive", "negative", "zero", "repeated", "hard"]


@given(seeds, st.integers(1, 6), st.sampled_from(SPECTRA), st.floats(0.01, 30), st.booleans())
def test_no_input_goes_beyond_and_the_ends_are_attained(seed, d, spectrum, radius, ball):
    form = some_form(seed, d, spectrum)
    region = InputRegion.ball(d, radius)
    if not ball:
        x = normal(seed + 3, 2 * d + 2, d) * torch.logspace(0, -2, d, dtype=f64) + 1
        region = InputRegion.ellipsoid(InputMoments.of(x), radius, ridge=0.1)
    found = extremes(form, region)
    low, high = float(found.lowest[0]), float(found.highest[0])
    ends = torch.cat([found.at_lowest, found.at_highest])
    assert bool(region.contains(ends).all())
    scale = 1e-9 * (abs(low) + abs(high) + 1)
    assert_close(form(ends), torch.tensor([low, high], dtype=f64), rtol=1e-7, atol=scale)
    y = normal(seed + 4, 4000, d)
    y = radius * y / y.norm(dim=1, keepdim=True)
    y[:1000] *= torch.rand(1000, 1, generator=torch.Generator().manual_seed(seed), dtype=f64)
    met = form(region.centre + y @ region.root)
    assert float(met.min()) >= low - scale
    assert float(met.max()) <= high + scale


def test_a_grid_in_two_dimensions_finds_the_same():
    angle, size = torch.meshgrid(
        torch.linspace(0, 2 * math.pi, 1501, dtype=f64),
        torch.linspace(0, 1, 201, dtype=f64),
        indexing="ij",
    )
    y = torch.stack([size * angle.cos(), size * angle.sin()], -1).reshape(-1, 2)
    region = InputRegion.ellipsoid(InputMoments.of(normal(0, 50, 2) + 2), 1.7)
    x = region.centre + region.radius * y @ region.root
    for seed, spectrum in enumerate(SPECTRA):
        form = some_form(10 * seed, 2, spectrum)
        found, met = extremes(form, region), form(x)
        spread = float(met.max() - met.min())
        assert 0 <= float(found.highest[0] - met.max()) < 1e-4 * spread
        assert 0 <= float(met.min() - found.lowest[0]) < 1e-4 * spread


def test_over_a_ball_a_truncation_costs_its_largest_dropped_eigenvalue():
    t = random_tensor(9, 7, 3, True, 0)
    matrices = t.interaction(torch.eye(3, dtype=f64))
    whole, kept = matrices.eigh(), matrices.eigh(2)
    change = truncation_change(t, kept)
    x = normal(1, 20, 9)
    assert_close(change(x), kept.quadratic(x) - matrices.quadratic(x))
    found = change_bounds(change, [InputRegion.ball(9, 3.0)], x)
    dropped = whole.values[:, 2:]
    assert_close(found.highest[0], 9 * (-dropped).amax(1).clamp_min(0))
    assert_close(found.lowest[0], -9 * dropped.amax(1).clamp_min(0))
    assert bool((found.bound[0] <= kept.certificate(3.0) * (1 + 1e-9)).all())


def test_measured_stands_beside_the_bounds():
    t = random_tensor(8, 12, 2, False, 1)
    x = normal(2, 300, 8) * torch.logspace(0, -1.5, 8, dtype=f64) + 0.5
    moments = InputMoments.of(x, population="these")
    regions = [
        InputRegion.ball(8, 1.0).holding(x),
        InputRegion.ellipsoid(moments).holding(x),
        InputRegion.ellipsoid(moments).holding(x, 0.9),
    ]
    change = truncation_change(t, t.interaction(torch.eye(2, dtype=f64)).eigh(2))
    found = change_bounds(change, regions, x)
    assert found.inside.tolist() == [1.0, 1.0, 0.9]
    assert bool((found.looseness[:2] >= 1 - 1e-9).all())
    # An ellipsoid around anisotropic inputs is a far smaller set than the ball that holds them.
    assert bool((found.bound[1] < found.bound[0]).all())
    assert bool((found.bound[2] < found.bound[1]).all())
    assert_close(found.measured_highest, change(x).amax(0))
    table = found.to_pandas()
    assert list(table["region"].unique()) == [str(region) for region in regions]
    assert len(table) == 6


def test_a_direction_that_inputs_never_take_is_outside():
    x = normal(3, 40, 4)
    x[:, 3] = 1.0
    region = InputRegion.ellipsoid(InputMoments.of(x), 10.0, ridge=0.0)
    away = x[:2].clone()
    away[1, 3] = 1.5
    assert region.contains(away).tolist() == [True, False]


def test_wrong_arguments_are_refused():
    t = random_tensor(5, 6, 2, False, 0)
    change = truncation_change(t, t.interaction(torch.eye(2, dtype=f64)).eigh(2))
    x = normal(0, 6, 5)
    with pytest.raises(ValueError, match="radius bounds a length and must not be negative"):
        InputRegion.ball(5, -1.0)
    with pytest.raises(ValueError, match="the region is of 4 inputs, the form of 5"):
        extremes(change, InputRegion.ball(4, 1.0))
    with pytest.raises(ValueError, match="give at least one region"):
        change_bounds(change, [], x)
    with pytest.raises(ValueError, match="inputs must have shape"):
        change_bounds(change, [InputRegion.ball(5, 1.0)], x[:, :3])
    with pytest.raises(ValueError, match="inputs has 30 NaN"):
        change_bounds(change, [InputRegion.ball(5, 1.0)], x * math.nan)
    with pytest.raises(ValueError, match="share lies above 0"):
        InputRegion.ball(5, 1.0).holding(x, 1.5)
    with pytest.raises(ValueError, match="all inputs are zero"):
        InputRegion.ellipsoid(InputMoments.of(torch.ones_like(x)))
    one = BilinearTensor(t.left, t.right, t.out)
    eigen = one.interaction().eigh(2)
    if eigen.directions is None:
        with pytest.raises(ValueError, match="carry no output directions"):
            truncation_change(one, eigen)
    with pytest.raises(ValueError, match="from 5 to 2, the tensor goes from 6 to 2"):
        truncation_change(
            random_tensor(6, 3, 2, False, 0), t.interaction(torch.eye(2, dtype=f64)).eigh(2)
        )
