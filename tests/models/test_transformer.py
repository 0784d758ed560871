"""HookedBilinearTransformer: what TransformerLens's users do with a model."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests.models.building import SIZES, TOKENS, bilinear_model, config, reference_mlp
from tl_bilinear import BilinearMLP, BilinearTransformerConfig, HookedBilinearTransformer

NORMS = ("RMS", "RMSPre", "LN", "LNPre", None)
MLP_SHAPES = {"hook_in": 16, "hook_pre": 24, "hook_pre_linear": 24, "hook_post": 24, "hook_out": 16}


@pytest.fixture(scope="module")
def model():
    return bilinear_model(bilinear_bias=True)


@pytest.fixture(scope="module")
def cached(model):
    return model.run_with_cache(TOKENS)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parallel", [False, True])
def test_forward_is_the_formula(norm, parallel):
    model = bilinear_model(
        normalization_type=norm, parallel_attn_mlp=parallel, bilinear_bias=True, d_mlp=6
    )
    logits, cache = model.run_with_cache(TOKENS)
    for layer in range(2):
        block = f"blocks.{layer}."
        resid = cache[block + ("hook_resid_pre" if parallel else "hook_resid_mid")]
        x = resid.double()
        ln = model.blocks[layer].ln2
        if norm in ("LN", "LNPre"):
            x = x - x.mean(-1, keepdim=True)
        if norm is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        if norm in ("LN", "RMS"):
            x = x * ln.w
        if norm == "LN":
            x = x + ln.b
        assert_close(cache[block + "mlp.hook_in"].double(), x, rtol=1e-5, atol=1e-5)
        expected = reference_mlp(model.blocks[layer].mlp, x)
        assert_close(cache[block + "hook_mlp_out"].double(), expected, rtol=1e-5, atol=1e-5)
        written = cache[block + "hook_resid_post"] - resid
        if parallel:
            written = written - cache[block + "hook_attn_out"]
        assert_close(written.double(), expected, rtol=1e-4, atol=1e-5)
    assert logits.shape == (2, 6, 23)


def test_every_block_is_bilinear(model):
    assert all(type(block.mlp) is BilinearMLP for block in model.blocks)
    assert all(block.mlp.cfg is model.cfg for block in model.blocks)
    assert isinstance(model.cfg, BilinearTransformerConfig)


# ---------------------------------------------------------------------- hooks and caches


def test_hooks_have_names_and_shapes(model, cached):
    _, cache = cached
    for layer in range(2):
        for hook, width in MLP_SHAPES.items():
            name = f"blocks.{layer}.mlp.{hook}"
            assert name in model.hook_dict
            assert cache[name].shape == (2, 6, width)
        assert torch.equal(
            cache[f"blocks.{layer}.mlp.hook_out"], cache[f"blocks.{layer}.hook_mlp_out"]
        )


def test_an_edit_in_the_last_layer_moves_the_residual_stream_by_as_much(model, cached):
    """Zeroing neuron 3 takes its row of W_out away, and nothing else."""
    logits, cache = cached

    def ablate(value, hook):
        value[..., 3] = 0
        return value

    with model.hooks([("blocks.1.mlp.hook_post", ablate)]):
        edited, edited_cache = model.run_with_cache(TOKENS)
    removed = cache["blocks.1.mlp.hook_post"][..., 3, None] * model.W_out[1, 3]
    moved = cache["blocks.1.hook_resid_post"] - edited_cache["blocks.1.hook_resid_post"]
    assert_close(moved, removed, rtol=1e-4, atol=1e-5)
    assert torch.equal(cache["blocks.1.hook_resid_mid"], edited_cache["blocks.1.hook_resid_mid"])
    assert not torch.allclose(logits, edited)


@pytest.mark.parametrize("hook", MLP_SHAPES)
def test_an_edit_at_one_position_leaves_earlier_ones(model, cached, hook):
    logits, _ = cached

    def edit(value, hook):
        value = value.clone()
        value[:, 3] += 1
        return value

    edited = model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.0.mlp.{hook}", edit)])
    assert torch.equal(edited[:, :3], logits[:, :3])
    assert not torch.allclose(edited[:, 3:], logits[:, 3:])
    assert torch.equal(model(TOKENS), logits)


def test_backward_hooks(model):
    grads = {}
    model.add_hook("blocks.0.mlp.hook_in", lambda grad, hook: grads.update(x=grad), dir="bwd")
    model(TOKENS, return_type="loss").backward()
    model.reset_hooks()
    model.zero_grad()
    assert grads["x"].shape == (2, 6, 16)


def test_activation_cache_helpers_add_up(model, cached):
    _, cache = cached
    resid = cache["blocks.1.hook_resid_post"]
    neurons = cache.get_neuron_results(1)
    assert neurons.shape == (2, 6, 24, 16)
    assert_close(
        neurons.sum(-2) + model.b_out[1], cache["blocks.1.hook_mlp_out"], rtol=1e-4, atol=1e-5
    )
    stacked, labels = cache.stack_neuron_results(-1, return_labels=True)
    assert stacked.shape[0] == len(labels) == 48
    assert labels[24] == "L1N0"
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert_close(parts.sum(0), resid, rtol=1e-4, atol=1e-5)
    assert cache.decompose_resid(1, mlp_input=True).shape[0] == 5
    assert_close(cache.accumulated_resid(incl_mid=True)[-1], resid)
    full, labels = cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
    assert "bias" in labels
    assert_close(full.sum(0), resid, rtol=1e-4, atol=1e-5)
    attributed = cache.logit_attrs(parts, TOKENS)
    assert attributed.shape == (6, 2, 6)
    assert cache.apply_ln_to_stack(parts).shape == parts.shape


def test_hook_mlp_in(model):
    model = bilinear_model()
    model.set_use_hook_mlp_in(True)
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["blocks.0.hook_mlp_in"], cache["blocks.0.hook_resid_mid"])


@pytest.mark.parametrize("positions", ["standard", "rotary"])
def test_generate(positions):
    model = bilinear_model(positional_embedding_type=positions)
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    generated = model.generate(TOKENS, use_past_kv_cache=False, **options)
    tokens = TOKENS
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens)
    if positions == "rotary":
        # TransformerLens 3.9 offsets absolute positions twice when it generates with its cache,
        # in its own models as well.
        assert torch.equal(model.generate(TOKENS, use_past_kv_cache=True, **options), tokens)


def test_key_value_cache(model, cached):
    from transformer_lens import TransformerLensKeyValueCache

    logits, _ = cached
    past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    ones = torch.ones(2, 6, dtype=torch.int)
    first = model(TOKENS[:, :4], past_kv_cache=past, attention_mask=ones[:, :4])
    rest = model(TOKENS[:, 4:], past_kv_cache=past, attention_mask=ones[:, 4:])
    assert_close(torch.cat([first, rest], 1), logits, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- weights


def test_weight_stacks(model):
    assert model.W_gate.shape == model.W_in.shape == (2, 16, 24)
    assert model.W_out.shape == (2, 24, 16)
    assert model.b_gate.shape == model.b_in.shape == (2, 24)
    assert model.b_out.shape == (2, 16)
    assert torch.equal(model.b_gate[1], model.blocks[1].mlp.b_gate)
    assert_close(
        model.accumulated_bias(2),
        sum(model.b_O[i] + model.b_out[i] for i in range(2)),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attn_only", [False, True])
def test_n_params_counts_the_matrices(bias, attn_only):
    model = bilinear_model(bilinear_bias=bias, attn_only=attn_only)
    counted = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "W_" in name and name.startswith("blocks.")
    )
    assert model.cfg.n_params == counted
    biases = 2 * (24 + 24 + 16) if bias and not attn_only else 0
    plain = bilinear_model(attn_only=attn_only)
    assert model.n_params_total == plain.n_params_total + biases


@pytest.mark.parametrize(
    "mode",
    ["gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP"],
)
def test_initial_weights_of_the_gate_are_like_those_of_w_in(mode):
    sizes = {"d_model": 64, "d_mlp": 96, "init_mode": mode}
    model = HookedBilinearTransformer(config(**sizes))
    assert torch.isfinite(model(TOKENS)).all()
    assert_close(model.W_gate.std(), model.W_in.std(), rtol=0.05, atol=0)
    fan_in, fan_out = 64, 96
    expected = {
        "gpt2": 0.8 / fan_in**0.5,
        "xavier": (2 / (fan_in + fan_out)) ** 0.5,
        "kaiming": (2 / fan_in) ** 0.5,
        "muP": fan_in**-0.5,
    }[mode.partition("_")[0]]
    assert_close(model.W_gate.std().item(), expected, rtol=0.05, atol=0)
    assert model.W_gate.mean().abs() < 0.1 * expected
    assert not torch.equal(model.W_gate, model.W_in)
    assert not model.b_gate.any()


def test_a_seed_repeats_and_gives_the_weights_of_a_gated_mlp():
    one, two = (HookedBilinearTransformer(config(seed=5)) for _ in range(2))
    gated = HookedTransformer(
        HookedTransformerConfig(**config(seed=5), gated_mlp=True, act_fn="identity")
    )
    assert torch.equal(one.W_gate, two.W_gate)
    assert torch.equal(one(TOKENS), gated(TOKENS))
    other = HookedBilinearTransformer(config(seed=6))
    assert not torch.equal(one.W_gate, other.W_gate)


def test_training_moves_weights_but_not_absent_biases():
    for bias in (False, True):
        model = HookedBilinearTransformer(config(bilinear_bias=bias))
        before = copy.deepcopy(model.state_dict())
        losses = []
        for _ in range(8):
            loss = model(TOKENS, return_type="loss")
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name in ("W_gate", "W_in", "W_out"):
            assert not torch.equal(getattr(model, name)[0], before[f"blocks.0.mlp.{name}"])
        assert model.b_gate.any() == model.b_in.any() == model.b_out.any() == bias


def test_state_dict_goes_between_models_with_and_without_biases():
    with_bias, without = bilinear_model(bilinear_bias=True), bilinear_model()
    assert with_bias.state_dict().keys() == without.state_dict().keys()
    without.load_state_dict(with_bias.state_dict())
    assert torch.equal(with_bias(TOKENS), without(TOKENS))


# ---------------------------------------------------------------------- copies, moves, variants


def test_deepcopy_is_independent(model, cached):
    logits, _ = cached
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        twin.blocks[0].mlp.W_out.zero_()
    seen = []
    twin.add_hook("blocks.0.mlp.hook_in", lambda value, hook: seen.append(value))
    assert torch.equal(model(TOKENS), logits)
    assert not seen
    assert not torch.allclose(twin(TOKENS), logits)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype(dtype):
    model = bilinear_model(bilinear_bias=True)
    reference = model(TOKENS).detach().double()
    assert model.to(dtype, print_details=False) is model
    assert model.cfg.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.b_gate.dtype == dtype
    logits, cache = model.run_with_cache(TOKENS)
    assert logits.dtype == cache["blocks.0.mlp.hook_pre"].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    assert (logits.double() - reference).abs().max() < tolerance * reference.abs().max()


def test_to_dtype_takes_absent_biases_along():
    model = bilinear_model().to(torch.bfloat16, print_details=False)
    assert model.b_gate.dtype == torch.bfloat16
    assert model(TOKENS).dtype == torch.bfloat16


def test_to_device():
    model = bilinear_model()
    model.to("meta", print_details=False)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_bfloat16_from_the_start():
    model = HookedBilinearTransformer(config(dtype=torch.bfloat16, bilinear_bias=True))
    assert model(TOKENS).dtype == torch.bfloat16
    assert torch.isfinite(model(TOKENS)).all()


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_attention_only(norm):
    model = bilinear_model(attn_only=True, normalization_type=norm)
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.isfinite(logits).all()
    assert not any(".mlp." in name for name in model.hook_dict)
    assert cache.decompose_resid().shape[0] == 4
    before = logits.log_softmax(-1)
    model.process_weights_()
    assert_close(model(TOKENS).log_softmax(-1), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"positional_embedding_type": "rotary"},
        {"n_key_value_heads": 1},
        {"use_attn_result": True},
        {"use_split_qkv_input": True, "use_hook_mlp_in": True},
        {"n_layers": 1, "attention_dir": "bidirectional"},
        {"d_vocab_out": 5},
        {"use_normalization_before_and_after": True},
    ],
    ids=str,
)
def test_other_settings_of_transformer_lens(fields):
    model = bilinear_model(**fields)
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.isfinite(logits).all()
    mlp = model.blocks[0].mlp
    assert_close(mlp(cache["blocks.0.mlp.hook_in"]), cache["blocks.0.mlp.hook_out"])


def test_pickled_model_loads_in_a_fresh_process(tmp_path):
    from sae_lens import HookedSAETransformer

    plain = bilinear_model(bilinear_bias=True)
    models = {
        "plain": plain,
        "sae": HookedSAETransformer.from_config(config(), bilinear=True),
    }
    logits = {name: model(TOKENS).detach() for name, model in models.items()}
    (tmp_path / "models.pkl").write_bytes(pickle.dumps((models, TOKENS, logits)))
    program = (
        "import pickle, torch\n"
        "models, tokens, logits = pickle.load(open('models.pkl', 'rb'))\n"
        "for name, model in models.items():\n"
        "    assert torch.equal(model(tokens), logits[name]), name\n"
        "    _, cache = model.run_with_cache(tokens)\n"
        "    assert 'blocks.1.mlp.hook_in' in cache\n"
        "print([type(model).__name__ for model in models.values()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "['HookedBilinearTransformer', 'HookedBilinearSAETransformer']" in done.stdout


def test_constructor_copies_its_config():
    cfg = HookedTransformerConfig(**config())
    before = dict(cfg.to_dict())
    model = HookedBilinearTransformer(cfg)
    model.to(torch.float64, print_details=False)
    model.process_weights_()
    assert cfg.to_dict() == before
    given = config()
    HookedBilinearTransformer(given)
    assert given == config()
    assert model.cfg.d_mlp == SIZES["d_mlp"]
