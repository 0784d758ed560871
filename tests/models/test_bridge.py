"""Bilinear models as TransformerBridges. Runs on TransformerLens 3.9 with SAELens, and on 4 without."""

import copy
import importlib.metadata
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models import slow_transformer
from tests.models.slow_transformer import SIZES, TOKENS, log_probs, random_state
from tl_bilinear import BilinearTensor, FeatureInteractions
from tl_bilinear.features import Dictionary
from tl_bilinear.hooks import EigenComponents, recording, verify
from tl_bilinear.io import read_json
from tl_bilinear.models import (
    BilinearMLPBridge,
    conversion,
    files,
    folders,
    registration,
    save_bridge,
)

CLOSE = {"rtol": 0, "atol": 1e-5}
HOOKED_TRANSFORMER = importlib.metadata.version("transformer-lens") < "4"


def tl_log_probs(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).log_softmax(-1)


def saved(folder, **fields):
    """A folder in save_pretrained's format with random weights; returns its log-probabilities."""
    cfg = slow_transformer.config(**fields)
    state = random_state(cfg)
    folders.write(folder, cfg, state, None)
    return log_probs(state, cfg).float()


@pytest.fixture
def native(tmp_path):
    """A native bridge with random weights."""

    def boot(**fields):
        saved(tmp_path / "model", **fields)
        return TransformerBridge.boot_bilinear(tmp_path / "model", device="cpu")

    return boot


def llama(**fields):
    fields = {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True, **fields}
    config = LlamaConfig(
        **{
            "vocab_size": 23,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 12,
            "hidden_act": "linear",
            "attn_implementation": "eager",
            "bos_token_id": None,
            "eos_token_id": None,
            **fields,
        }
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.4 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def layer_in_a_run(bridge, layer, tokens=TOKENS):
    """Input and output of a layer, by TransformerLens's hooks."""
    names = [f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out"]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in names)
    return [cache[name] for name in names]


def assert_reads(bridge):
    """The tensor of every layer maps what goes into the MLP to what comes out of it, in a run."""
    for layer in range(bridge.cfg.n_layers):
        tensor = BilinearTensor.from_model(bridge, layer)
        x, output = layer_in_a_run(bridge, layer)
        assert_close(tensor(x), output, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- from scratch and processed

NORMS = ["RMS", "LN", "RMSPre", "LNPre", None]


@pytest.mark.parametrize("d_mlp", [24, 16, 8])
@pytest.mark.parametrize("norm", NORMS)
def test_exact_before_and_after_compatibility_mode(norm, d_mlp, tmp_path):
    """Also where TransformerLens's own processing is not: LayerNorm with d_mlp == d_model."""
    for fields in ({"bilinear_bias": False}, {"n_key_value_heads": 1}):
        folder = tmp_path / str(fields)
        expected = saved(folder, normalization_type=norm, d_mlp=d_mlp, **fields)
        bridge = TransformerBridge.boot_bilinear(folder, device="cpu")
        assert_close(tl_log_probs(bridge), expected, **CLOSE)
        assert_reads(bridge)
        bridge.enable_compatibility_mode(disable_warnings=True)
        assert_close(tl_log_probs(bridge), expected, **CLOSE)
        assert_reads(bridge)
        if norm in ("LN", "LNPre"):
            tensor = BilinearTensor.from_model(bridge, 1)
            assert tensor.left.mean(1).abs().max() < 1e-6
            assert tensor.right.mean(1).abs().max() < 1e-6


def test_each_kind_of_processing_alone_is_exact(tmp_path):
    expected = saved(tmp_path / "m", normalization_type="LN", d_mlp=16)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    for step in steps:
        bridge = TransformerBridge.boot_bilinear(tmp_path / "m", device="cpu")
        options = {name: name == step for name in steps}
        bridge.enable_compatibility_mode(disable_warnings=True, **options)
        assert_close(tl_log_probs(bridge), expected, **CLOSE)
        assert_reads(bridge)


def test_new_model():
    fields = {**SIZES, "normalization_type": "RMS", "positional_embedding_type": "rotary"}
    fields |= {"d_mlp": 24, "seed": 3, "device": "cpu"}
    before = torch.random.get_rng_state()
    bridge = TransformerBridge.boot_bilinear(**fields)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = TransformerBridge.boot_bilinear(fields)
    config = TransformerBridgeConfig(**fields)
    from_object = TransformerBridge.boot_bilinear(config)
    assert config.act_fn == "relu"
    assert torch.equal(bridge(TOKENS), again(TOKENS))
    assert torch.equal(bridge(TOKENS), from_object(TOKENS))
    assert not torch.equal(bridge(TOKENS), TransformerBridge.boot_bilinear(fields, seed=4)(TOKENS))
    assert (bridge.cfg.act_fn, bridge.cfg.gated_mlp) == ("identity", True)
    mlp = bridge.blocks[1].mlp
    assert type(mlp) is BilinearMLPBridge
    alone = BilinearTensor.from_mlp(mlp)
    assert torch.equal(alone.left, BilinearTensor.from_model(bridge, 1).left)
    assert alone.input_space is None
    assert not any("mlp" in n and n.endswith("bias") for n, _ in bridge.named_parameters())
    assert not BilinearTensor.from_model(bridge, 0).has_biases
    std = 0.8 / 16**0.5  # as TransformerLens initialises
    assert abs(float(bridge.W_gate.detach().std()) / std - 1) < 0.1
    assert_reads(bridge)


def test_new_model_with_biases_and_dtype():
    fields = {**SIZES, "bilinear_bias": True}
    bridge = TransformerBridge.boot_bilinear(fields, dtype=torch.bfloat16, device="cpu")
    biases = [p for n, p in bridge.named_parameters() if ".mlp." in n and n.endswith("bias")]
    assert len(biases) == 6
    assert not any(b.any() for b in biases)
    assert all(p.dtype == torch.bfloat16 for p in bridge.parameters())
    assert BilinearTensor.from_model(bridge, 0).dtype == torch.float32


@pytest.mark.parametrize("processed", [False, True])
def test_it_trains(native, processed):
    bridge = native()
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    optimiser = torch.optim.SGD(bridge.parameters(), lr=0.05)
    before = BilinearTensor.from_model(bridge, 1)
    losses = []
    for _ in range(5):
        loss = bridge(TOKENS, return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = BilinearTensor.from_model(bridge, 1)
    for name in ("left", "right", "out", "bias_left", "bias_right", "bias_out"):
        assert not torch.equal(getattr(before, name), getattr(after, name)), name
    assert_reads(bridge)


def test_hooks_fire_in_both_modes(native):
    bridge = native()
    for _ in range(2):
        _, cache = bridge.run_with_cache(TOKENS)
        block = "blocks.1.mlp."
        tensor = BilinearTensor.from_model(bridge, 1)
        x = cache[f"{block}hook_in"]
        gate = x @ tensor.left.T + tensor.bias_left
        linear = x @ tensor.right.T + tensor.bias_right
        assert_close(cache[f"{block}hook_pre"], gate, rtol=1e-4, atol=1e-5)
        assert_close(cache[f"{block}hook_pre_linear"], linear, rtol=1e-4, atol=1e-5)
        assert_close(cache[f"{block}hook_post"], gate * linear, rtol=1e-4, atol=1e-5)
        assert torch.equal(cache[f"{block}hook_out"], cache["blocks.1.hook_mlp_out"])
        zeroed = bridge.run_with_hooks(
            TOKENS, fwd_hooks=[(f"{block}hook_post", lambda value, hook: 0 * value)]
        )
        assert not torch.allclose(zeroed, bridge(TOKENS))
        bridge.enable_compatibility_mode(disable_warnings=True)


def test_a_copy_is_its_own(native):
    bridge = native()
    copied = copy.deepcopy(bridge)
    expected = tl_log_probs(bridge)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.zero_()
    assert torch.equal(tl_log_probs(copied), expected)


# ---------------------------------------------------------------------- spaces


def test_spaces_follow_processing(native):
    for norm, before, after in (
        ("RMS", "after RMSNorm and its weight", "after RMSNorm without a weight"),
        (
            "LN",
            "after LayerNorm, its weight and its bias",
            "after LayerNorm without weight and bias",
        ),
        (None, "no normalisation", "no normalisation"),
    ):
        bridge = native(normalization_type=norm)
        for said in (before, after):
            tensor = BilinearTensor.from_model(bridge, -1)
            assert tensor.input_space == f"blocks.1.mlp.hook_in (input of the MLP, {said})"
            assert tensor.output_space == "blocks.1.hook_mlp_out"
            bridge.enable_compatibility_mode(disable_warnings=True)


def test_layers_that_are_not_there(native):
    bridge = native()
    with pytest.raises(IndexError, match="layer 2 does not exist"):
        BilinearTensor.from_model(bridge, 2)
    attention = TransformerBridge.boot_bilinear(**SIZES, attn_only=True, device="cpu")
    with pytest.raises(ValueError, match=r"blocks\.0 has no MLP"):
        BilinearTensor.from_model(attention, 0)


# ---------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp_bias": False, "attention_bias": False},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 8},
        {"num_key_value_heads": 4, "intermediate_size": 16},
    ],
    ids=str,
)
def test_llama(fields):
    model = llama(**fields)
    original = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(TOKENS).logits.log_softmax(-1)
    bridge = TransformerBridge.boot_bilinear(model)
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    tensor = BilinearTensor.from_model(bridge, 1)
    assert torch.equal(tensor.left, original.model.layers[1].mlp.gate_proj.weight)
    assert torch.equal(tensor.right, original.model.layers[1].mlp.up_proj.weight)
    assert tensor.has_biases == model.config.mlp_bias
    assert_reads(bridge)
    x, _ = layer_in_a_run(bridge, 1)
    weight = bridge.blocks[1].ln2.w.detach().clone()
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    assert_reads(bridge)
    folded = BilinearTensor.from_model(bridge, 1)
    assert_close(folded(x / weight), tensor(x), rtol=1e-4, atol=1e-5)
    assert "without a weight" in folded.input_space
    assert type(bridge.adapter).__name__ == "BilinearLlamaAdapter"


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A Llama with a linear gate, and the same weights with SiLU, as Hugging Face saves them."""
    vocabulary = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{i}": i for i in range(3, 23)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    root = tmp_path_factory.mktemp("llamas")
    for activation in ("linear", "silu"):
        llama(hidden_act=activation).save_pretrained(root / activation)
        tokenizer.save_pretrained(root / activation)
    return lambda activation: str(root / activation)


def test_transformer_lens_boots_a_folder(llama_folder):
    bridge = TransformerBridge.boot_transformers(llama_folder("linear"), device="cpu")
    with torch.no_grad():
        expected = llama()(TOKENS).logits.log_softmax(-1)
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    assert_reads(bridge)
    assert bridge.to_tokens("w3 w4", prepend_bos=False).tolist() == [[3, 4]]


def test_a_llama_with_an_activation_is_left_to_transformer_lens(llama_folder):
    bridge = TransformerBridge.boot_transformers(llama_folder("silu"), device="cpu")
    assert type(bridge.adapter) is SUPPORTED_ARCHITECTURES["LlamaForCausalLM"]
    with torch.no_grad():
        expected = llama(hidden_act="silu")(TOKENS).logits.log_softmax(-1)
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp is not bilinear: its gate goes through"):
        BilinearTensor.from_model(bridge, 0)
    with pytest.raises(ValueError, match="the bridge is not bilinear: its adapter is a Llama"):
        save_bridge(bridge, "nowhere")
    with pytest.raises(ValueError, match="this Llama is not bilinear: its gate goes through silu"):
        TransformerBridge.boot_bilinear(llama(hidden_act="silu"))


@pytest.fixture
def stock_adapter(monkeypatch):
    """TransformerLens as it is without this package."""
    stock = SUPPORTED_ARCHITECTURES["LlamaForCausalLM"]
    monkeypatch.setitem(ArchitectureAdapterFactory._adapters, "LlamaForCausalLM", stock)


@pytest.mark.usefixtures("stock_adapter")
def test_what_transformer_lens_does_by_itself():
    """Its bridge is read as long as it runs the Llama as it is, and refused once it computes SiLU."""
    bridge = TransformerBridge.boot_bilinear(llama())
    expected = tl_log_probs(bridge)
    assert_reads(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    if torch.allclose(tl_log_probs(bridge), expected, **CLOSE):
        pytest.fail("TransformerLens keeps a linear gate: BilinearLlamaAdapter is no longer needed")
    with pytest.raises(ValueError, match=r"puts SiLU on its gate in compatibility mode\. Import"):
        BilinearTensor.from_model(bridge, 0)


def test_another_mlp_is_named():
    bridge = TransformerBridge.boot_native({**SIZES, "act_fn": "relu", "device": "cpu"})
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp is not bilinear: it is a MLPBridge"):
        BilinearTensor.from_model(bridge, 1)


# ---------------------------------------------------------------------- registration


@pytest.mark.parametrize("options", [{"seed": 3}, {"seed": 3, "init_weights": False}, {}])
def test_native_fields_and_random_state_are_those_of_boot_native(options):
    fields = {**SIZES, "normalization_type": "RMS", "d_mlp": 24, "device": "cpu", **options}
    moved, architectures = [], []
    for boot in (TransformerBridge.boot_bilinear, TransformerBridge.boot_native):
        before = torch.random.get_rng_state()
        bridge = boot(TransformerBridgeConfig(**fields, architecture="TransformerLensNative"))
        moved.append(not torch.equal(torch.random.get_rng_state(), before))
        architectures.append(bridge.cfg.architecture)
    assert moved[0] == moved[1]
    assert architectures == ["TransformerLensNative"] * 2
    assert_reads(TransformerBridge.boot_bilinear(fields))


def test_found_by_its_entry_point(tmp_path, monkeypatch):
    """As an installed package declares it, read from pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    group = project["project"]["entry-points"]["transformer_lens.architectures"]
    metadata = tmp_path / "declared-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in group.items())
    (metadata / "entry_points.txt").write_text("[transformer_lens.architectures]\n" + lines)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", {})
    monkeypatch.setattr(ArchitectureAdapterFactory, "_entry_points_discovered", False)
    cfg = TransformerBridgeConfig(**SIZES, architecture="TLBilinearNative", device="cpu")
    with warnings.catch_warnings():
        # An installed tl_bilinear declares the same name, which comes second.
        warnings.filterwarnings("ignore", "Custom architecture adapter")
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    assert type(adapter).__name__ == "BilinearNativeAdapter"


def test_a_factory_of_another_shape_is_a_warning():
    """`import transformer_lens` does not fail for what a later version renames."""
    with pytest.warns(UserWarning, match="does not take tl_bilinear's adapter.*may compute SiLU"):
        registration._register_adapter(ModuleType("transformer_lens.factories.renamed"))


def test_described():
    assert "TransformerBridge" in TransformerBridge.boot_bilinear.__doc__
    assert TransformerBridge.boot_bilinear.__name__ == "boot_bilinear"


# ---------------------------------------------------------------------- refused


def test_processing_that_transformer_lens_gets_wrong_is_refused_by_name(native):
    for fields, said in (
        ({"normalization_type": "LN", "final_rms": True}, "normalization_type='LN' with final_rms"),
        ({"d_vocab": 16, "d_vocab_out": 16}, "d_vocab=16, d_vocab_out=16 beside d_model=16"),
        (
            {"normalization_type": "LN", "d_vocab_out": 10},
            "d_vocab=23, d_vocab_out=10 beside d_model=16",
        ),
    ):
        bridge = native(**fields)
        tokens = TOKENS % 16
        expected = tl_log_probs(bridge, tokens)
        cfg = slow_transformer.config(**fields)
        assert_close(expected, log_probs(random_state(cfg), cfg, tokens).float(), **CLOSE)
        with pytest.raises(ValueError, match=f"does not process this model correctly: {said}"):
            bridge.enable_compatibility_mode(disable_warnings=True)
        assert_close(tl_log_probs(bridge, tokens), expected, **CLOSE)
        bridge = native(**fields)
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        assert_close(tl_log_probs(bridge, tokens), expected, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"n_layer": 2}, TypeError, r"'n_layer' \(did you mean 'n_layers'\?\)"),
        ({"act_fn": "gelu"}, ValueError, "act_fn='gelu'.*no element-wise nonlinearity"),
        ({"gated_mlp": False}, ValueError, "gated_mlp=False"),
        ({"num_experts": 4, "experts_per_token": 2}, ValueError, "num_experts=4"),
        ({"architecture": "LlamaForCausalLM"}, ValueError, "only a native model is made from"),
    ],
)
def test_configs_of_something_else(fields, error, said):
    with pytest.raises(error, match=said):
        TransformerBridge.boot_bilinear(**SIZES, **fields)


def test_missing_fields_and_other_sources(tmp_path):
    with pytest.raises(TypeError, match="needs d_head, n_ctx, d_vocab"):
        TransformerBridge.boot_bilinear(n_layers=1, d_model=16)
    with pytest.raises(TypeError, match=r"boot_bilinear takes .* not builtins\.int"):
        TransformerBridge.boot_bilinear(3)
    with pytest.raises(TypeError, match="n_layers, bilinear_bias: fields are for a new model"):
        TransformerBridge.boot_bilinear(tmp_path, n_layers=2, bilinear_bias=True)
    with pytest.raises(FileNotFoundError, match="is not a directory: boot_bilinear takes one that"):
        TransformerBridge.boot_bilinear(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        TransformerBridge.boot_bilinear(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"not written by save_pretrained.*boot_transformers"):
        TransformerBridge.boot_bilinear(tmp_path)
    with pytest.raises(TypeError, match=r"save_bridge takes a TransformerBridge, not torch\.nn"):
        save_bridge(torch.nn.Linear(2, 2), tmp_path / "nowhere")


# ---------------------------------------------------------------------- checkpoints

CHECKPOINTS = [
    {},
    {"rotary_adjacent_pairs": True},
    {"rotary_dim": 4},
    {"n_key_value_heads": 1},
    {"n_heads": 1, "d_head": 24},
    {"normalization_type": "LN"},
    {"positional_embedding_type": "standard", "rotary_dim": None},
    {"bilinear_bias": False},
    {"attn_scale": 2.0},
    {"use_attn_scale": False},
]


@pytest.mark.parametrize("fields", CHECKPOINTS, ids=str)
def test_checkpoints_there_and_back(fields, tmp_path):
    """Against a transformer written out in float64; on 3.9 HookedTransformer loads what comes back."""
    expected = saved(tmp_path / "model", **fields)
    bridge = TransformerBridge.boot_bilinear(tmp_path / "model", device="cpu")
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    save_bridge(bridge, tmp_path / "back")
    again = TransformerBridge.boot_bilinear(tmp_path / "back", device="cpu")
    assert torch.equal(tl_log_probs(again), tl_log_probs(bridge))
    bridge.enable_compatibility_mode(disable_warnings=True)
    save_bridge(bridge, tmp_path / "processed")
    if HOOKED_TRANSFORMER:
        from tl_bilinear import HookedBilinearTransformer

        for folder in ("model", "back", "processed"):
            hooked = HookedBilinearTransformer.from_pretrained(tmp_path / folder, device="cpu")
            assert_close(tl_log_probs(hooked), expected, **CLOSE)
            assert_close(tl_log_probs(TransformerBridge.boot_bilinear(hooked)), expected, **CLOSE)
            hooked.process_weights_()
            assert_close(tl_log_probs(TransformerBridge.boot_bilinear(hooked)), expected, **CLOSE)
    for folder in ("back", "processed"):
        cfg = folders.read_fields(tmp_path, read_json(tmp_path / folder / "config.json"))
        state = files.read_tensors(tmp_path / folder / "model.safetensors")
        assert_close(log_probs(state, cfg).float(), expected, **CLOSE)


def test_a_round_trip_keeps_every_bit(tmp_path):
    cfg = slow_transformer.config(n_key_value_heads=1, rotary_dim=4)
    state = random_state(cfg)
    there = conversion.to_bridge(state, cfg)
    assert not torch.equal(
        there["blocks.0.attn.q.weight"], state["blocks.0.attn.W_Q"].transpose(1, 2).flatten(0, 1)
    )
    back = conversion.from_bridge(there, cfg, adjacent_pairs=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(("d_head", "rotary_dim"), [(8, 8), (8, 4), (6, 2), (2, 2)])
def test_adjacent_order_puts_the_halves_of_a_pair_together(d_head, rotary_dim):
    order = conversion.adjacent_order(d_head, rotary_dim).tolist()
    for i in range(rotary_dim // 2):
        assert order[2 * i : 2 * i + 2] == [i, i + rotary_dim // 2]
    assert order[rotary_dim:] == list(range(rotary_dim, d_head))


def test_scores_do_not_see_the_convention():
    """One rotation is the other after the permutation, of a query and a key alike."""
    half = slow_transformer.config(rotary_dim=4)
    adjacent = {**half, "rotary_adjacent_pairs": True}
    order = conversion.adjacent_order(8, 4)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    rotated = slow_transformer.rotate(x, half)
    assert_close(slow_transformer.rotate(x[..., order], adjacent), rotated[..., order])
    assert not torch.allclose(slow_transformer.rotate(x, adjacent), rotated)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parallel_attn_mlp": True}, "parallel_attn_mlp=True"),
        ({"use_yarn_rope": True, "use_qk_norm": True}, "use_qk_norm=True, use_yarn_rope=True"),
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type='alibi'"),
        ({"rotary_base": 1.5}, "rotary_base=1.5"),
        ({"original_architecture": "Olmo2ForCausalLM"}, "original_architecture='Olmo2ForCausalLM'"),
    ],
)
def test_checkpoints_that_the_native_model_does_not_compute(fields, said, tmp_path):
    saved(tmp_path / "model", **fields)
    with pytest.raises(ValueError, match=f"does not compute this one: it has no .*{said}"):
        TransformerBridge.boot_bilinear(tmp_path / "model")


def test_checkpoints_that_are_damaged(tmp_path):
    cfg = slow_transformer.config()
    state = random_state(cfg)
    del state["blocks.1.mlp.W_in"]
    state["embed.W_E"] = state["embed.W_E"][:-1]
    folders.write(tmp_path / "model", cfg, state, None)
    with pytest.raises(ValueError, match=r"safetensors does not fit its config\.json") as raised:
        TransformerBridge.boot_bilinear(tmp_path / "model")
    assert "blocks.1.mlp.in.weight is missing" in str(raised.value)
    assert "embed.weight has shape [22, 16]" in str(raised.value)


@pytest.mark.parametrize("processed", [False, True])
def test_a_llama_becomes_a_checkpoint(processed, tmp_path):
    """Half-rotated as it is: no permutation."""
    bridge = TransformerBridge.boot_bilinear(llama(attention_bias=False))
    expected = tl_log_probs(bridge)
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    save_bridge(bridge, tmp_path / "model")
    native = TransformerBridge.boot_bilinear(tmp_path / "model", device="cpu")
    assert_close(tl_log_probs(native), expected, **CLOSE)
    assert type(native.adapter).__name__ == "BilinearNativeAdapter"
    if HOOKED_TRANSFORMER:
        from tl_bilinear import HookedBilinearTransformer

        hooked = HookedBilinearTransformer.from_pretrained(tmp_path / "model", device="cpu")
        assert_close(tl_log_probs(hooked), expected, **CLOSE)


def test_rotary_embeddings_that_the_format_does_not_hold(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    bridge = TransformerBridge.boot_bilinear(llama(rope_parameters=rope))
    with pytest.raises(ValueError, match=r"rope_parameters=.*'linear'.* cannot be saved"):
        save_bridge(bridge, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tokenizer_and_dtype_come_along(llama_folder, tmp_path):
    bridge = TransformerBridge.boot_transformers(
        llama_folder("linear"), device="cpu", dtype=torch.bfloat16
    )
    save_bridge(bridge, tmp_path / "model")
    native = TransformerBridge.boot_bilinear(tmp_path / "model", device="cpu")
    assert native.to_tokens("w3 w4", prepend_bos=False).tolist() == [[3, 4]]
    assert native.cfg.dtype == torch.bfloat16
    wide = TransformerBridge.boot_bilinear(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in wide.parameters())


# ---------------------------------------------------------------------- hooks and features


@pytest.fixture(params=["native RMS", "native LN", "llama"])
def any_bridge(request, native):
    if request.param == "llama":
        return TransformerBridge.boot_bilinear(llama())
    return native(normalization_type=request.param.split()[1])


def directions(n, seed=0):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("processed", [False, True])
def test_interventions_and_recording(any_bridge, processed):
    bridge = any_bridge
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    u = directions(2)
    spectrum = BilinearTensor.from_model(bridge, 1).interaction(u).eigh(3)
    parts = EigenComponents(spectrum, layer=1, write="dual")
    x, output = layer_in_a_run(bridge, 1)
    with torch.no_grad(), bridge.hooks(fwd_hooks=parts.ablate((0, 1)).fwd_hooks(bridge)):
        _, edited = layer_in_a_run(bridge, 1)
    change = parts.activations(x)[..., 0, 1, None] * parts.writes[0]
    assert_close(edited, output - change, rtol=1e-4, atol=1e-5)
    assert verify(bridge, TOKENS, parts, progress=False).error.max() < 1e-4
    with recording(bridge, parts) as names:
        _, cache = bridge.run_with_cache(TOKENS, names_filter=names)
    assert_close(cache[names[0]].reshape(2, 6, 2, 3), parts.activations(x), rtol=1e-4, atol=1e-4)


def test_components_of_an_unprocessed_layer_are_refused_after_processing(any_bridge):
    u = directions(2)
    spectrum = BilinearTensor.from_model(any_bridge, 1).interaction(u).eigh(3)
    any_bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match=r"does not fit blocks\.1\.mlp.*without"):
        EigenComponents(spectrum, layer=1).ablate().fwd_hooks(any_bridge)


@pytest.mark.parametrize("hook", ["mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid"])
def test_features(any_bridge, hook):
    bridge = any_bridge
    bias = 0.3 * directions(1, seed=3)[0]
    inputs = Dictionary(
        directions(40), hook=f"blocks.1.{hook}", encoder=directions(40, seed=4),
        encoder_hook=f"blocks.1.{hook}", decoder_bias=bias,
        encode=lambda x: (x @ directions(40, seed=4).T).relu(),
    )  # fmt: skip
    for _ in range(2):
        f = FeatureInteractions(bridge, 1, inputs, directions(8, seed=1))
        run = f.run(TOKENS, mask=torch.ones_like(TOKENS, dtype=torch.bool))
        found = run.attribute(3, 4, sequence=1)
        _, output = layer_in_a_run(bridge, 1, TOKENS[1:])
        measured = float(output[0, 4] @ directions(8, seed=1)[3])
        scale = float(found.quadratic.abs().max())
        assert abs(found.total - measured) <= 1e-5 * scale
        assert abs(found.measured - measured) <= 1e-5 * scale
        check = run.verify_pairs(3, 2)
        assert check.tokens.sum() > 0
        assert float(check.difference.nan_to_num().max()) < 1e-3
        assert torch.isfinite(f.unembedding(7)).all()
        bridge.enable_compatibility_mode(disable_warnings=True)


def test_sae_lens_bridge(native, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import SAEMetadata

    saved(tmp_path / "saes")
    bridge = sae_lens.SAETransformerBridge.boot_bilinear(tmp_path / "saes", device="cpu")
    assert type(bridge) is sae_lens.SAETransformerBridge
    expected = tl_log_probs(bridge)
    hook = "blocks.1.hook_mlp_out"
    made = []
    for where in (hook, "blocks.1.hook_resid_mid"):
        metadata = SAEMetadata(hook_name=where)
        made.append(
            sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=16, d_sae=40, k=6, metadata=metadata))
        )
        with torch.no_grad():
            for parameter in made[-1].parameters():
                parameter.copy_(torch.randn(parameter.shape))
    sae, sae_in = made
    _, cache = bridge.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
    x, output = layer_in_a_run(bridge, 1)
    tensor = BilinearTensor.from_model(bridge, 1)
    assert_close(tensor(x), output, rtol=1e-4, atol=1e-5)
    acts = next(value for name, value in cache.items() if name.endswith("hook_sae_acts_post"))
    assert_close(acts, sae.encode(output), rtol=1e-4, atol=1e-4)
    f = FeatureInteractions(bridge, 1, sae_in, sae)
    run = f.run(TOKENS)
    assert run.attribute(3, 4, sequence=1).error < 1e-4
    assert float(run.verify_pairs(3, 10).difference.nan_to_num().max()) < 1e-3
    bridge.add_sae(sae)
    with pytest.raises(ValueError, match=f"SAEs are attached to the model at {hook}"):
        f.run(TOKENS)
    bridge.reset_saes()
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert_close(tl_log_probs(bridge), expected, **CLOSE)
    assert_reads(bridge)


# ---------------------------------------------------------------------- real weights


@pytest.mark.shared
def test_a_real_llama(shared_data):
    """stories260K with its activation taken away: a real tokenizer, tied embeddings, grouped queries."""
    from transformers import AutoTokenizer

    folder = shared_data / "stories260K"
    model = LlamaForCausalLM.from_pretrained(folder, hidden_act="linear", dtype=torch.float32)
    text = "Once upon a time there was a little girl named Lily."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.eval()(tokens).logits.log_softmax(-1)
    bridge = TransformerBridge.boot_bilinear(model, tokenizer=tokenizer)
    assert_close(tl_log_probs(bridge, tokens), expected, rtol=0, atol=1e-4)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert_close(tl_log_probs(bridge, tokens), expected, rtol=0, atol=1e-4)
    tensor = BilinearTensor.from_model(bridge, 2)
    assert tensor.shape == (64, 64, 64)
    x, output = layer_in_a_run(bridge, 2, tokens)
    assert_close(tensor(x), output, rtol=1e-4, atol=1e-4)
