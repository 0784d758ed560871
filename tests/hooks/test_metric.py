"""Eigencomponents in a metric: taken out at the input obliquely, the other terms exactly unchanged."""

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.running import EXACT, LAYER, TOKENS, directions, model64, through
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import EigenComponents, ProjectInput, verify
from tl_bilinear.tensor import InputMoments, Metric


@pytest.fixture(scope="module", params=[0.0, 0.3, 1.0])
def metric(request):
    """Of inputs with very unequal directions, at three ridges."""
    x = directions(200, seed=4) * torch.linspace(0.1, 3, 16, dtype=torch.float64)
    return InputMoments.of(x + 1).metric(request.param)


@pytest.fixture(scope="module")
def model():
    return model64(bilinear_bias=True)


def parts_of(model, metric, k=None):
    tensor = BilinearTensor.from_model(model, LAYER)
    return EigenComponents(tensor.interaction(directions(2)).eigh(k, metric=metric), LAYER)


def test_what_is_predicted_is_measured(model, metric):
    found = verify(model, TOKENS, parts_of(model, metric), progress=False, controls=2)
    assert found.at == "input"
    assert_close(found.predicted, found.measured, **EXACT)
    assert found.control_error.min() > 1e-3


def test_the_other_terms_stay(model, metric):
    parts = parts_of(model, metric)
    x = through(model)[0]
    for taken in ([1], [0, 3]):
        edit = ProjectInput(directions=parts.eigen.vectors[0, taken], layer=LAYER, metric=metric)
        edited = through(model, edit)[0]
        before, after = parts.activations(x)[..., 0, :], parts.activations(edited)[..., 0, :]
        expected = before.clone()
        expected[..., taken] = 0
        assert_close(after, expected, rtol=1e-8, atol=1e-8)


def test_one_direction_is_subtracted_along_its_pattern(model, metric):
    eigen = parts_of(model, metric, k=2).eigen
    w = eigen.vectors[0, 0]
    x = through(model)[0]
    edited = through(model, ProjectInput(directions=w, layer=LAYER, metric=metric))[0]
    assert_close(edited, x - (x @ w)[..., None] * eigen.patterns[0, 0], **EXACT)


def test_an_orthogonal_projection_would_not_do(model):
    """In a metric that is far from Euclidean the plain projection misses."""
    x = directions(200, seed=4) * torch.linspace(0.1, 3, 16, dtype=torch.float64)
    parts = parts_of(model, InputMoments.of(x).metric(0.0))
    w = parts.eigen.vectors[0, 0]
    given = through(model)[0]
    edited = through(model, ProjectInput(directions=w, layer=LAYER))[0]
    others = (parts.activations(edited) - parts.activations(given))[..., 0, 1:]
    assert others.abs().max() > 0.1


def test_a_metric_of_few_samples(model):
    """Rank-deficient, with a ridge that makes it whole."""
    metric = Metric.of_samples(directions(5, seed=9), 0.2)
    found = verify(model, TOKENS, parts_of(model, metric, 3), progress=False)
    assert_close(found.predicted, found.measured, **EXACT)


def test_a_metric_of_another_width_is_refused(model):
    other = InputMoments.of(directions(9, d=5)).metric(0.1)
    with pytest.raises(ValueError, match="the metric is of 5 coordinates"):
        ProjectInput(directions=directions(1), layer=LAYER, metric=other).fwd_hooks(model)
