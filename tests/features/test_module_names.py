"""SAEs at modules of Hugging Face: against what the modules write."""

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from tests.models.building import write_tokenizer
from tests.models.test_approximation import make
from tl_bilinear.circuits import FeatureCircuit, direct_path
from tl_bilinear.features import Dictionary, FeatureInteractions, evaluate_saes
from tl_bilinear.features.module_names import hook_of
from tl_bilinear.models.approximation import approximate_llama

LAYER = 1
MODULES = {
    LlamaConfig: ("", ".mlp", ".self_attn", ".post_attention_layernorm"),
    Gemma2Config: (
        "",
        ".mlp",
        ".self_attn",
        ".pre_feedforward_layernorm",
        ".post_feedforward_layernorm",
    ),
}


@pytest.fixture(scope="module", params=MODULES, ids=lambda config: config.model_type)
def pair(request, tmp_path_factory):
    """A model of Hugging Face and a bridge around the same weights; processed on request."""
    from transformer_lens.model_bridge import TransformerBridge

    llama = make(request.param)
    folder = tmp_path_factory.mktemp("model")
    llama.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder))
    bridges = [
        TransformerBridge.boot_transformers(
            str(folder),
            hf_model=AutoModelForCausalLM.from_pretrained(folder),
            tokenizer=tokenizer,
            device="cpu",
        )
        for _ in range(2)
    ]
    bridges[1].enable_compatibility_mode(disable_warnings=True)
    return request.param, llama, *bridges


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 50, (40, 16), generator=torch.Generator().manual_seed(0))


def sae(module, d=16, n=6):
    torch.manual_seed(0)
    config = StandardSAEConfig(d_in=d, d_sae=n, metadata=SAEMetadata(hook_name=module))
    return StandardSAE(config)


def test_the_hook_holds_what_the_module_writes(pair, rows):
    config, llama, raw, _ = pair
    for part in MODULES[config]:
        name = f"model.layers.{LAYER}{part}"
        written = []
        handle = llama.get_submodule(name).register_forward_hook(
            lambda m, a, out, to=written: to.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            llama(rows[:2])
            handle.remove()
            hook = hook_of(raw, name)
            _, cache = raw.run_with_cache(rows[:2])
        assert_close(cache[hook], written[0], rtol=1e-4, atol=1e-5)
        assert hook_of(raw, hook) == hook


def test_saes_of_the_ecosystem_go_in_by_their_own_names(pair, rows, tmp_path):
    config, _, raw, _ = pair
    before = MODULES[config][3]
    sae(f"model.layers.{LAYER}{before}").save_model(tmp_path / "in")
    into = SAE.load_from_disk(tmp_path / "in")
    out = sae(f"model.layers.{LAYER}.mlp")
    one = approximate_llama(raw, rows, [LAYER], warn_below=-1e9, progress=False)[LAYER]
    features = FeatureInteractions(raw, LAYER, into, out, layer_tensor=one)
    assert features.passage.hook == f"blocks.{LAYER}.mlp.hook_in"
    by_hand = FeatureInteractions(
        raw, LAYER, Dictionary(into.W_dec.detach()), out.W_enc.detach().T, layer_tensor=one
    )
    assert_close(features.top(0, 3).coefficients, by_hand.top(0, 3).coefficients)
    features.run(rows[:2], progress=False).labels()
    evaluated = evaluate_saes(raw, {"out": out}, rows[:2], progress=False)
    assert len(evaluated.to_pandas()) == 1

    residual = sae("model.layers.0")
    assert direct_path(raw, LAYER, residual).n == 6
    circuit = FeatureCircuit(raw, {LAYER: out}, {"before": residual}, layer_tensors={LAYER: one})
    assert len(circuit.graph(2).pairs) == 2


def test_other_modules_are_refused_with_the_mapping(pair):
    config, _, raw, processed = pair
    with pytest.raises(ValueError, match=r"input_layernorm.*model\.layers\.1\.mlp \(blocks\.1\."):
        hook_of(raw, f"model.layers.{LAYER}.input_layernorm")
    with pytest.raises(ValueError, match="of layer 7: the model's are 0 to 2"):
        hook_of(raw, "model.layers.7.mlp")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_in has other coordinates"):
        hook_of(processed, f"model.layers.{LAYER}{MODULES[config][3]}")
    assert hook_of(raw, "transformer.h.1") == "transformer.h.1"  # left to the check that follows
