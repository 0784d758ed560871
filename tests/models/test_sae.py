"""The bilinear HookedSAETransformer."""

import copy

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch.testing import assert_close

from tests.models.building import TOKENS, config, randomise
from tl_bilinear import BilinearMLP, HookedBilinearTransformer
from tl_bilinear.models import HookedBilinearSAETransformer, bilinear_class


@pytest.fixture(scope="module")
def model():
    return randomise(HookedSAETransformer.from_config(config(), bilinear=True))


def sae(hook: str) -> SAE:
    torch.manual_seed(0)
    return StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, metadata=SAEMetadata(hook_name=hook)))


def test_class(model):
    assert type(model) is HookedBilinearSAETransformer is bilinear_class(HookedSAETransformer)
    assert isinstance(model, HookedSAETransformer)
    assert isinstance(model, HookedBilinearTransformer)
    assert type(model).__name__ == "HookedBilinearSAETransformer"
    assert all(type(block.mlp) is BilinearMLP for block in model.blocks)
    plain = randomise(HookedBilinearTransformer(config()))
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_hook_in_fires_once(model):
    fired = []
    model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.0.mlp.hook_in", lambda value, hook: fired.append(hook.name))]
    )
    assert fired == ["blocks.0.mlp.hook_in"]
    assert "forward" not in vars(model.blocks[0].mlp)


def test_a_forward_that_the_user_hung_on_the_mlp_stays(model):
    twin = copy.deepcopy(model)
    forward = twin.blocks[0].mlp.forward
    twin.blocks[0].mlp.forward = lambda x: 2 * forward(x)
    twin.setup()
    assert not torch.allclose(twin(TOKENS), model(TOKENS))


def test_deepcopy_runs_its_own_mlp(model):
    logits = model(TOKENS)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        twin.blocks[0].mlp.W_out.zero_()
    assert torch.equal(model(TOKENS), logits)
    _, cache = twin.run_with_cache(TOKENS)
    assert not cache["blocks.0.hook_mlp_out"].any()


@pytest.mark.parametrize("hook", ["blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out"])
def test_saes_attach_at_the_mlp(model, hook):
    logits = model(TOKENS)
    one = sae(hook)
    edited, cache = model.run_with_cache_with_saes(TOKENS, saes=[one])
    assert cache[f"{hook}.hook_sae_acts_post"].shape == (2, 6, 32)
    assert not torch.allclose(edited, logits)
    one.use_error_term = True
    exact, cache = model.run_with_cache_with_saes(TOKENS, saes=[one])
    assert_close(exact, logits, rtol=1e-4, atol=1e-5)
    assert_close(cache[f"{hook}.hook_sae_output"], model.run_with_cache(TOKENS)[1][hook])
    assert torch.equal(model(TOKENS), logits)


def test_weight_processing_and_saving(model, tmp_path):
    twin = copy.deepcopy(model)
    twin.process_weights_()
    assert_close(twin(TOKENS).log_softmax(-1), model(TOKENS).log_softmax(-1), rtol=0, atol=1e-5)
    twin.save_pretrained(tmp_path / "model")
    loaded = HookedBilinearSAETransformer.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(TOKENS), twin(TOKENS))


def test_ordinary_sae_models_stay_as_they_are():
    ordinary = HookedSAETransformer.from_config(config(act_fn="relu"))
    assert type(ordinary) is HookedSAETransformer
    gated = HookedSAETransformer.from_config(config(act_fn="silu", gated_mlp=True))
    assert "forward" in vars(gated.blocks[0].mlp)
