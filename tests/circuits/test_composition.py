"""Two layers of a model as one form: equal to the model where nothing else writes in between."""

import copy

import pytest
import torch

from tests.circuits.building import DIRECTION, TOKENS, D, model
from tl_bilinear import BilinearTensor
from tl_bilinear.circuits import composed


def quiet(**fields):
    """A model whose second layer's attention writes nothing."""
    built = copy.deepcopy(model(**fields))
    with torch.no_grad():
        built.blocks[1].attn.W_O.zero_()
        built.blocks[1].attn.b_O.zero_()
    return built


@pytest.mark.parametrize("norm", [None, "RMS", "LN"])
def test_both_layers_are_one_form(norm):
    """With biases, the residual connection and the norms' scales of the run: the output itself."""
    built = quiet(normalization_type=norm)
    _, cache = built.run_with_cache(TOKENS)
    for position in (0, 3):
        scales = tuple(
            1.0 if norm is None else float(cache[f"blocks.{layer}.ln2.hook_scale"][0, position])
            for layer in (0, 1)
        )
        form = composed(built, 0, 1, DIRECTION, residual=True, scales=scales)
        r = cache["blocks.0.hook_resid_mid"][0, position]
        one = torch.cat([r, torch.ones(1, dtype=torch.float64)])
        expected = cache["blocks.1.mlp.hook_out"][0, position] @ DIRECTION
        assert form.d == D + 1
        assert float(form(one)) == pytest.approx(float(expected), rel=1e-8)


def test_without_biases_it_is_a_form_of_the_residual_stream():
    built = model(bilinear_bias=False, normalization_type="RMS")
    form = composed(built, 0, 2, DIRECTION)
    early, late = (BilinearTensor.from_model(built, layer) for layer in (0, 2))
    r = torch.randn(D, dtype=torch.float64)
    through = early(r * built.blocks[0].ln2.w)
    expected = (late(through * built.blocks[2].ln2.w) @ DIRECTION).detach()
    assert form.d == D
    assert form.space == "blocks.0.hook_resid_mid"
    assert float(form(r)) == pytest.approx(float(expected), rel=1e-9)
    scaled = composed(built, 0, 2, DIRECTION, scales=(2.0, 3.0))
    assert float(scaled(r)) == pytest.approx(float(form(r)) / (2**4 * 3**2), rel=1e-9)


def test_bad_requests():
    built = model()
    with pytest.raises(ValueError, match="the first before the second, got 1 and 1"):
        composed(built, 1, 1, DIRECTION)
    with pytest.raises(ValueError, match="scales are scales of norms and must be positive"):
        composed(built, 0, 1, DIRECTION, scales=(1.0, 0.0))
