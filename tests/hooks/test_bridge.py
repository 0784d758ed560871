"""The same on a TransformerBridge: hook names are all that is taken from a model."""

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.running import directions
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import EigenComponents, recording, verify

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"


@pytest.fixture(params=[False, True], ids=["raw", "compatibility mode"])
def bridge(request):
    from transformer_lens.model_bridge import TransformerBridge

    fields = {"n_layers": 2, "d_model": 16, "d_head": 8, "n_heads": 2, "n_ctx": 12, "d_vocab": 23}
    model = TransformerBridge.boot_native({**fields, "d_mlp": 24, "act_fn": "relu", "seed": 0})
    if request.param:
        model.enable_compatibility_mode()
    return model


@pytest.fixture
def parts():
    """Of a layer that the model does not have: what is written is the same."""
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randn(shape, generator=generator) / 4 for shape in ((9, 16), (9, 16), (16, 9)))
    u = directions(2, dtype=torch.float32)
    spectrum = BilinearTensor(*factors).interaction(u).eigh(3)
    return EigenComponents(spectrum, layer=1, write="dual")


def run(model, edit):
    with torch.no_grad(), model.hooks(fwd_hooks=edit.fwd_hooks(model)):
        return model.run_with_cache(TOKENS)


def test_interventions_and_verification(bridge, parts):
    logits, cache = bridge.run_with_cache(TOKENS)
    edited_logits, edited = run(bridge, parts.ablate((0, 1)))
    change = parts.activations(cache[READ])[..., 0, 1, None] * parts.writes[0]
    assert_close(edited[WRITTEN], cache[WRITTEN] - change, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(edited_logits, logits)
    assert torch.equal(bridge(TOKENS), logits)
    assert verify(bridge, TOKENS, parts, at="output", progress=False).error.max() < 1e-5


def test_recording(bridge, parts):
    before = set(bridge.hook_dict)
    _, plain = bridge.run_with_cache(TOKENS)
    with recording(bridge, parts) as names:
        _, cache = bridge.run_with_cache(TOKENS, names_filter=names)
        found = cache[names[0]].reshape(2, 6, 2, 3)
        assert_close(found, parts.activations(plain[READ]), rtol=1e-5, atol=1e-6)
        without = bridge.run_with_hooks(
            TOKENS, fwd_hooks=[(names[0], lambda value, hook: 0 * value)]
        )
    assert_close(without, run(bridge, parts.ablate())[0], rtol=1e-5, atol=1e-5)
    assert set(bridge.hook_dict) == before
    assert not hasattr(bridge.blocks[1].mlp, "hook_eigen")
