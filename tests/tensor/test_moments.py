"""Moments, the metric that they make, and every method in it, against dense matrices and samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear.tensor import (
    HOSVD,
    InputMoments,
    Metric,
    cp,
    functional_inner,
    functional_similarity,
    hosvd,
    match_eigenvectors,
    spectrum,
    tucker,
)
from tl_bilinear.tensor.eigendecomposition import Eigendecomposition

seeds = st.integers(0, 2**16)
ridges = st.sampled_from([0.0, 0.05, 0.3, 1.0])


def samples(n, d, seed=0):
    """Correlated inputs away from zero, of very different sizes along the directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (x * 2.0 ** -torch.arange(d)) @ mix + torch.randn(d, generator=generator).double()


def dense_metric(x, ridge):
    M = x.T @ x / len(x)
    return (1 - ridge) * M + ridge * M.trace() / x.shape[1] * torch.eye(x.shape[1]).double()


def power(M, exponent):
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.clamp_min(1e-300) ** exponent) @ vectors.T


@given(seeds, st.integers(1, 40), st.integers(1, 7))
def test_moments_are_those_of_the_samples(seed, n, d):
    x = samples(n, d, seed)
    found = InputMoments.of(x.reshape(n, 1, d))
    assert found.count == n
    assert_close(found.mean, x.mean(0))
    assert_close(found.second, x.T @ x / n)
    assert_close(found.covariance, torch.cov(x.T, correction=0).reshape(d, d), atol=1e-9, rtol=1e-9)
    assert_close(found.centred().second, found.covariance)
    mask = torch.arange(n) % 2 == 0
    assert_close(InputMoments.of(x, mask=mask).second, InputMoments.of(x[mask]).second)
    parts = [InputMoments.of(part) for part in x.split(3)]
    merged = InputMoments.merged(parts)
    assert merged.count == n
    assert_close((merged.mean, merged.second), (found.mean, found.second))
    D, b = torch.randn(d, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    through = found.through(D, b)
    direct = InputMoments.of(x @ D + b)
    assert_close((through.mean, through.second), (direct.mean, direct.second))


def test_effective_dimension():
    x = torch.eye(6, dtype=torch.float64)
    assert InputMoments.of(x).effective_dimension == pytest.approx(6)
    assert InputMoments.of(x[:1]).effective_dimension == pytest.approx(1)


@given(seeds, ridges)
def test_the_metric_is_the_matrix(seed, ridge):
    x = samples(30, 6, seed)
    expected = dense_metric(x, ridge)
    rows = torch.randn(4, 6, dtype=torch.float64)
    for metric in (InputMoments.of(x).metric(ridge), Metric.of_samples(x, ridge)):
        assert metric.ridge == ridge
        assert_close(metric.apply(rows), rows @ expected)
        assert_close(metric.root(metric.root(rows)), rows @ expected)
        assert_close(metric.inverse_root(metric.root(rows)), rows, rtol=1e-6, atol=1e-6)
        lengths = (rows * torch.linalg.solve(expected, rows.T).T).sum(1)
        assert_close(metric.squared_length(rows), lengths, rtol=1e-5, atol=1e-8)
        assert metric.least == pytest.approx(float(torch.linalg.eigvalsh(expected)[0]), rel=1e-5)
        if ridge < 1:
            assert_close(metric.second.apply(rows), rows @ (x.T @ x) / len(x), rtol=1e-6, atol=1e-8)


@given(seeds, st.sampled_from([0.05, 0.3, 1.0]))
def test_few_samples_make_a_metric_without_the_matrix(seed, ridge):
    x = samples(3, 8, seed)
    metric = Metric.of_samples(x, ridge)
    assert len(metric.values) <= 3
    rows = torch.randn(5, 8, dtype=torch.float64)
    assert_close(metric.apply(rows), rows @ dense_metric(x, ridge))
    assert_close(metric.inverse_root(metric.root(rows)), rows, rtol=1e-6, atol=1e-6)


def test_a_singular_metric_sees_only_its_range():
    x = samples(2, 5)
    metric = Metric.of_samples(x, 0.0)
    assert metric.least == 0
    assert torch.isfinite(metric.squared_length(x)).all()
    outside = torch.linalg.svd(x).Vh[-1]
    assert metric.squared_length(outside) == math.inf
    t = random_tensor(5, 9, 3)
    inside = torch.randn(7, 2, dtype=torch.float64) @ x
    found = t.interaction().eigh(metric=metric)
    assert_close(found.quadratic(inside), t.interaction().quadratic(inside), rtol=1e-8, atol=1e-8)
    assert found.certificate(1.0)[0] > 1e100  # nothing is known outside
    full = InputMoments.of(x).metric(0.0)  # d x d, and of rank two as well
    assert_close(full.root(inside), metric.root(inside), atol=1e-6, rtol=1e-6)


@given(seeds, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(["dense", "auto"]))
def test_eigenpairs_in_the_metric(seed, ridge, method):
    x = samples(60, 6, seed)
    t = random_tensor(6, 9, 3, seed=seed)
    metric = InputMoments.of(x).metric(ridge)
    Q = t.interaction()
    found = Q.eigh(metric=metric, method=method)
    assert found.metric is metric
    M = dense_metric(x, ridge)
    root = power(M, 0.5)
    expected = torch.linalg.eigvalsh(root @ t.dense() @ root)
    assert_close(found.values.sort(-1).values, expected, rtol=1e-6, atol=1e-9)
    assert_close(found.quadratic(x), Q.quadratic(x), rtol=1e-6, atol=1e-7)
    assert_close(found.dense(), t.dense(), rtol=1e-5, atol=1e-6)
    assert_close(found.patterns, found.vectors @ M, rtol=1e-6, atol=1e-8)
    unit = found.unit_vectors
    assert_close(unit @ unit.mT, torch.eye(6).double().expand(3, 6, 6), rtol=1e-5, atol=1e-6)
    if ridge < 1:
        contributions = found.activations(x).mean(0)
        assert_close(found.mean_contributions, contributions, rtol=1e-5, atol=1e-8)
    if ridge == 0:
        assert_close(found.mean_contributions, found.values, rtol=1e-5, atol=1e-8)


@given(seeds, st.sampled_from([0.05, 0.3]), st.integers(1, 5))
def test_truncation_in_the_metric_and_its_bounds(seed, ridge, k):
    x = samples(60, 6, seed)
    t = random_tensor(6, 9, 3, seed=seed)
    Q = t.interaction()
    metric = InputMoments.of(x).metric(ridge)
    for found in (Q.eigh(k), Q.eigh(k, metric=metric), Q.eigh(metric=metric)):
        error = (Q.quadratic(x) - found.quadratic(x, k)).abs()
        allowed = found.error_bound(x, k)
        assert (error <= allowed * (1 + 1e-9) + 1e-9).all()
        assert (
            allowed <= found.certificate(float(x.norm(dim=1).max()), k) * (1 + 1e-6) + 1e-6
        ).all()
        assert float((error / allowed.clamp_min(1e-12)).max()) > 1e-3  # not empty


def test_the_metric_beats_the_euclidean_on_its_own_inputs():
    x = samples(400, 10)
    t = random_tensor(10, 30, 4)
    Q = t.interaction()
    exact = Q.quadratic(x)
    plain, fitted = (
        (exact - Q.eigh(2, metric=metric).quadratic(x)).square().mean()
        for metric in (None, InputMoments.of(x).metric(0.01))
    )
    assert float(fitted) < 0.2 * float(plain)


@given(seeds)
def test_orders(seed):
    x = samples(50, 5, seed)
    t = random_tensor(5, 9, 1, seed=seed)
    found = t.interaction()[0].eigh()
    terms = found.activations(x)
    keys = {
        "contribution": terms.mean(0).abs(),
        "variance": terms.var(0, correction=0),
        "covariance": torch.stack(
            [torch.cov(torch.stack([one, terms.sum(1)]), correction=0)[0, 1] for one in terms.T]
        ),
        "magnitude": found.values.abs(),
    }
    for by, key in keys.items():
        ordered = found.ordered(by, x)
        order = key.argsort(descending=True, stable=True)
        assert_close(ordered.values, found.values[order])
        assert_close(ordered.quadratic(x), found.quadratic(x))
        # The bound covers the largest of those left out, wherever it stands.
        kept = ordered.top(2)
        assert float(kept.bound) >= float(ordered.values[2:].abs().max())
        error = (found.quadratic(x) - kept.quadratic(x)).abs()
        assert (error <= kept.error_bound(x) * (1 + 1e-9) + 1e-9).all()
    with pytest.raises(ValueError, match="orders terms by what they do on inputs"):
        found.ordered("variance")


def test_unknown_orders_and_missing_metrics(unchecked):
    found = random_tensor(5, 9, 1).interaction()[0].eigh()
    with pytest.raises(ValueError, match="by must be 'magnitude'"):
        found.ordered("size")
    with pytest.raises(ValueError, match="need the metric of some inputs"):
        _ = found.mean_contributions


@given(seeds, st.sampled_from([0.0, 0.3]))
def test_methods_in_the_metric_are_those_of_the_whitened_layer(seed, ridge):
    x = samples(60, 6, seed)
    t = random_tensor(6, 9, 4, seed=seed)
    metric = InputMoments.of(x, space="inputs").metric(ridge)
    white = t.whiten(metric)
    z = metric.inverse_root(x)
    assert_close(white(z), t(x), rtol=1e-6, atol=1e-7)
    assert_close(white.restore(metric)(x), t(x), rtol=1e-6, atol=1e-7)

    one, other = hosvd(t, metric=metric), hosvd(white)
    assert_close(one.values, other.values)
    assert_close(
        one.interactions.quadratic(x), other.interactions.quadratic(z), rtol=1e-5, atol=1e-6
    )
    filters = hosvd(t, mode="input", metric=metric).vectors
    assert_close(
        filters @ dense_metric(x, ridge) @ filters.T, torch.eye(6).double(), atol=1e-5, rtol=0
    )

    small = tucker(t, 2, 3, metric=metric)
    reference = tucker(white, 2, 3)
    assert small.error == pytest.approx(reference.error)
    assert_close(small.tensor(x), reference.tensor(z), rtol=1e-5, atol=1e-6)

    fitted = cp(t, 3, restarts=1, steps=20, metric=metric, progress=False)
    reference = cp(white, 3, restarts=1, steps=20, progress=False)
    assert fitted.error == pytest.approx(reference.error)
    assert_close(fitted.tensor(x), reference.tensor(z), rtol=1e-4, atol=1e-5)
    assert_close(fitted.to_pandas()["plus"].tolist(), reference.to_pandas()["plus"].tolist())
    rest = (white - reference.top(2).tensor).norm()
    assert float(rest) <= fitted.top(2).error * (1 + 1e-6)

    sweep = spectrum(t, k=2, metric=metric, progress=False)
    expected = t.interaction()[sweep.index].eigh(2, metric=metric).values
    assert_close(sweep.values, expected)
    M = dense_metric(x, ridge)
    assert_close(sweep.traces, torch.einsum("aij,ij->a", t.parts().interaction.dense(), M))


def test_storage_and_matching(tmp_path):
    x = samples(40, 5)
    t = random_tensor(5, 9, 3)
    moments = InputMoments.of(x, population="some", space="inputs")
    moments.save(tmp_path / "m.safetensors")
    loaded = InputMoments.load(tmp_path / "m.safetensors")
    assert_close(loaded.second, moments.second)
    assert (loaded.population, loaded.space, loaded.count) == ("some", "inputs", 40)
    metric = moments.metric(0.1)
    found = t.interaction().eigh(3, metric=metric)
    found.save(tmp_path / "e.safetensors")
    again = Eigendecomposition.load(tmp_path / "e.safetensors")
    assert again.metric.population == "some"
    assert_close(again.patterns, found.patterns)
    assert_close(match_eigenvectors(found, again).cosines, torch.ones(9).double())
    hosvd(t, 2, metric=metric).save(tmp_path / "h.safetensors")
    assert HOSVD.load(tmp_path / "h.safetensors").metric.ridge == 0.1
    assert "some" in str(metric)


@given(seeds, st.booleans())
def test_functional_inner_under_gaussian_inputs(seed, centred):
    moments = InputMoments.of(samples(30, 3, seed) / 3)
    first, second = (random_tensor(3, 4, 2, seed=seed + i, biases=True) for i in range(2))
    # Gauss-Hermite in the three whitened coordinates: exact for polynomials of this degree.
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 3)
    weight = torch.cartesian_prod(*[torch.from_numpy(weights / weights.sum())] * 3).prod(1)
    x = grid @ power(moments.covariance, 0.5) + moments.mean
    f, g = first(x), second(x)
    if centred:
        f, g = (y - weight @ y for y in (f, g))
    expected = weight @ (f * g).sum(1)
    found = functional_inner(first, second, centred=centred, inputs=moments)
    assert_close(found, expected, rtol=1e-6, atol=1e-8)
    norms = [float((weight @ (y * y).sum(1)).sqrt()) for y in (f, g)]
    similarity = functional_similarity(first, second, centred=centred, inputs=moments)
    assert float(similarity) == pytest.approx(
        float(expected) / math.prod(norms), rel=1e-5, abs=1e-8
    )


def test_float32_agrees():
    x = samples(60, 6)
    t = random_tensor(6, 9, 3)
    metric = InputMoments.of(x).metric(0.1)
    wide = t.interaction().eigh(3, metric=metric)
    narrow = t.to(torch.float32).interaction().eigh(3, metric=metric)
    assert narrow.values.dtype == torch.float32
    assert_close(narrow.values.double(), wide.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: InputMoments.of(x[:0]), "at least one input"),
        (
            lambda x: InputMoments.of(x, mask=torch.zeros(9, dtype=torch.bool)),
            "none was given or chosen",
        ),
        (
            lambda x: InputMoments.of(x, mask=torch.ones(3, dtype=torch.bool)),
            r"boolean tensor of shape \[9\]",
        ),
        (lambda x: InputMoments.of(x * torch.nan), "NaN or infinite"),
        (lambda x: InputMoments.of(x).metric(1.5), "between 0 and 1"),
        (lambda x: InputMoments.of(x).metric(math.nan), "between 0 and 1"),
        (lambda x: InputMoments.of(0 * x).metric(0.1), "all inputs are zero"),
        (lambda x: InputMoments.merged([]), "nothing to merge"),
        (
            lambda x: InputMoments.merged([InputMoments.of(x), InputMoments.of(x[:, :2])]),
            "of d 4 and 2 cannot be merged",
        ),
        (lambda x: InputMoments.of(x).metric(1.0).second, "has forgotten the moments"),
        (
            lambda x: (
                random_tensor(5, 3, 2).interaction().eigh(metric=InputMoments.of(x).metric(0.1))
            ),
            "the metric is of 4 coordinates",
        ),
        (
            lambda x: random_tensor(4, 3, 2).whiten(InputMoments.of(x, space="pixels").metric(0.1)),
            "'pixels'|pixels",
        ),
    ],
)
def test_bad_requests(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make(samples(9, 4))
