"""process_weights_ and load_and_process_state_dict: same log-probabilities, folded and centred."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import HookedTransformer
from transformer_lens.weight_processing import ProcessWeights

from tests.models.building import TOKENS, bilinear_model, config
from tl_bilinear import BilinearTensor, HookedBilinearTransformer

WIDTHS = {"wide": 24, "square": 16, "narrow": 6}
CASES = list(itertools.product(["RMS", "LN"], [False, True], WIDTHS.values(), [False, True]))


def log_probs(model):
    return model(TOKENS).detach().log_softmax(-1)


def column_means(weight):
    """Mean over d_model of a stack [n_layers, d_model, d_mlp]."""
    return weight.detach().mean(dim=1).abs().max().item()


def assert_folded(model, before):
    """Both matrices are w[:, None] * W (centred under LN), both biases have the norm's bias."""
    centre = model.cfg.normalization_type == "LNPre"
    for layer, block in enumerate(model.blocks):
        norm = f"blocks.{layer}.ln2."
        for w, b in (("W_gate", "b_gate"), ("W_in", "b_in")):
            weight = before[f"blocks.{layer}.mlp.{w}"]
            bias = before[f"blocks.{layer}.mlp.{b}"]
            if norm + "b" in before:
                bias = bias + before[norm + "b"] @ weight
            weight = before[norm + "w"][:, None] * weight
            if centre:
                weight = weight - weight.mean(0)
            assert_close(getattr(block.mlp, w).detach(), weight, rtol=1e-5, atol=1e-6)
            assert_close(getattr(block.mlp, b).detach(), bias, rtol=1e-5, atol=1e-6)
    if centre:
        assert column_means(model.W_gate) < 1e-6
        assert column_means(model.W_in) < 1e-6


@pytest.mark.parametrize(("norm", "bias", "d_mlp", "parallel"), CASES)
def test_process_weights(norm, bias, d_mlp, parallel):
    model = bilinear_model(
        normalization_type=norm, bilinear_bias=bias, d_mlp=d_mlp, parallel_attn_mlp=parallel
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = log_probs(model)
    model.process_weights_()
    assert model.cfg.normalization_type == f"{norm}Pre"
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)
    assert_folded(model, before)
    if norm == "LN":
        assert model.W_out.mean(-1).abs().max() < 1e-6
        assert model.b_out.mean(-1).abs().max() < 1e-6
    else:
        assert torch.equal(
            model.W_out, torch.stack([before[f"blocks.{i}.mlp.W_out"] for i in (0, 1)])
        )
    assert model.b_V.abs().max() == 0
    assert model.W_U.mean(-1).abs().max() < 1e-6


@pytest.mark.parametrize(("norm", "bias", "d_mlp", "parallel"), CASES[::3])
def test_load_and_process_state_dict(norm, bias, d_mlp, parallel):
    fields = {
        "normalization_type": norm,
        "bilinear_bias": bias,
        "d_mlp": d_mlp,
        "parallel_attn_mlp": parallel,
    }
    trained = bilinear_model(**fields)
    state = trained.state_dict()
    snapshot = {name: tensor.clone() for name, tensor in state.items()}
    for target_norm in (norm, f"{norm}Pre"):
        model = HookedBilinearTransformer(config(**{**fields, "normalization_type": target_norm}))
        model.load_and_process_state_dict(state, refactor_factored_attn_matrices=True)
        assert_close(log_probs(model), log_probs(trained), rtol=0, atol=2e-5)
        assert_folded(model, snapshot)
        assert state.keys() == snapshot.keys()
        assert all(torch.equal(state[name], snapshot[name]) for name in snapshot)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
@pytest.mark.parametrize(
    "flags",
    [
        {"fold_ln": False},
        {"center_writing_weights": False},
        {"center_unembed": False},
        {"fold_ln": False, "center_writing_weights": False, "center_unembed": False},
    ],
    ids=str,
)
def test_flags(norm, flags):
    model = bilinear_model(normalization_type=norm, bilinear_bias=True)
    logits, expected = model(TOKENS).detach(), log_probs(model)
    model.process_weights_(**flags)
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)
    if not flags.get("center_unembed", True):
        assert_close(model(TOKENS).detach(), logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
@pytest.mark.parametrize(
    "sizes", [{"d_vocab": 16}, {"d_vocab": 16, "d_vocab_out": 5}, {"d_vocab_out": 16}], ids=str
)
def test_vocabulary_as_large_as_d_model(norm, sizes):
    model = bilinear_model(normalization_type=norm, **sizes)
    expected = log_probs(model)
    model.process_weights_()
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_one_norm_shared_by_attention_and_mlp(norm):
    """A state dict of a parallel model with ln1 only, as of GPT-J: its MLP reads ln1's output."""
    fields = {"parallel_attn_mlp": True, "bilinear_bias": True}
    tied = bilinear_model(normalization_type=norm, **fields)
    for block in tied.blocks:
        block.ln2.load_state_dict(block.ln1.state_dict())
    state = {name: t for name, t in tied.state_dict().items() if ".ln2." not in name}
    model = HookedBilinearTransformer(config(normalization_type=f"{norm}Pre", **fields))
    model.load_and_process_state_dict(state)
    assert_close(log_probs(model), log_probs(tied), rtol=0, atol=1e-5)
    assert_folded(model, tied.state_dict())


@pytest.mark.parametrize("norm", ["RMSPre", "LNPre", None])
def test_nothing_to_fold(norm):
    model = bilinear_model(normalization_type=norm, bilinear_bias=True)
    expected, gate = log_probs(model), model.W_gate.clone()
    model.process_weights_()
    assert torch.equal(model.W_gate, gate)
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_processing_twice_changes_nothing(norm):
    model = bilinear_model(normalization_type=norm, bilinear_bias=True)
    model.process_weights_()
    expected, gate, b_gate = log_probs(model), model.W_gate.clone(), model.b_gate.clone()
    model.process_weights_()
    assert_close(model.W_gate, gate)
    assert_close(model.b_gate, b_gate)
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)


def test_norms_before_and_after_the_mlp():
    """With RMSNorm: TransformerLens 3.9 cannot build LayerNorm before and after."""
    model = bilinear_model(use_normalization_before_and_after=True)
    expected = log_probs(model)
    model.process_weights_()
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_the_step_alone_on_a_state_dict(norm):
    model = bilinear_model(normalization_type=norm, bilinear_bias=True, d_mlp=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    is_ln = norm == "LN"
    folded = model.fold_layer_norm(model.state_dict(), fold_biases=is_ln, center_weights=is_ln)
    folded = model.center_unembed(folded)
    other = HookedBilinearTransformer(
        config(normalization_type=f"{norm}Pre", bilinear_bias=True, d_mlp=16)
    )
    other.load_state_dict(folded, strict=False)
    assert_folded(other, before)
    assert_close(log_probs(other), log_probs(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_bfloat16_is_folded_in_float32(norm):
    model = bilinear_model(normalization_type=norm, bilinear_bias=True)
    model.to(torch.bfloat16, print_details=False)
    before = {name: tensor.float() for name, tensor in model.state_dict().items()}
    model.process_weights_(center_writing_weights=False)
    weight = before["blocks.0.ln2.w"][:, None] * before["blocks.0.mlp.W_gate"]
    if norm == "LN":
        weight = weight - weight.mean(0)
    assert model.W_gate.dtype == torch.bfloat16
    assert torch.equal(model.W_gate[0], weight.to(torch.bfloat16))


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_the_tensor_is_that_of_the_layer_before_and_after(norm):
    """Folding moves the norm's weight into the tensor; on the normalised input both are the layer."""
    model = bilinear_model(normalization_type=norm)
    for processed in (False, True):
        if processed:
            model.process_weights_()
        _, cache = model.run_with_cache(TOKENS)
        for layer in (0, 1):
            tensor = BilinearTensor.from_model(model, layer)
            assert_close(
                tensor(cache[f"blocks.{layer}.mlp.hook_in"]),
                cache[f"blocks.{layer}.hook_mlp_out"],
                rtol=1e-4,
                atol=1e-5,
            )
            # A LayerNorm's bias was folded into biases that the model did not train.
            assert tensor.has_biases == (processed and norm == "LN")


def test_final_rms_is_refused_rather_than_changed():
    model = bilinear_model(normalization_type="LN", final_rms=True)
    expected = log_probs(model)
    with pytest.raises(ValueError, match="final_rms=True"):
        model.process_weights_()
    model.process_weights_(fold_ln=False, center_writing_weights=False)
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)
    rms = bilinear_model(normalization_type="RMS", final_rms=True)
    expected = log_probs(rms)
    rms.process_weights_()
    assert_close(log_probs(rms), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_float64_keeps_its_dtype(norm):
    """TransformerLens rounds to float32 on the way: exact to that."""
    model = bilinear_model(normalization_type=norm, dtype=torch.float64)
    expected = log_probs(model)
    model.process_weights_()
    assert model.W_gate.dtype == torch.float64
    assert_close(log_probs(model), expected, rtol=0, atol=1e-5)


def test_what_transformer_lens_alone_gets_wrong():
    """The reason for our own folding; should this fail, TransformerLens has mended it."""
    model = bilinear_model(normalization_type="LN", bilinear_bias=True, d_mlp=16)
    expected = log_probs(model)
    HookedTransformer.load_and_process_state_dict(model, model.state_dict())
    assert (log_probs(model) - expected).abs().max() > 1e-3
    assert column_means(model.W_gate) > 1e-3


def test_one_block_at_a_time(monkeypatch):
    """TransformerLens copies all that it is given several times over: it is given one piece."""
    model = bilinear_model(n_layers=8, bilinear_bias=True)
    sizes = []
    stock = ProcessWeights.process_weights

    def watched(state, *arguments, **options):
        sizes.append(sum(tensor.numel() for tensor in state.values()))
        return stock(state, *arguments, **options)

    monkeypatch.setattr(ProcessWeights, "process_weights", staticmethod(watched))
    whole = sum(tensor.numel() for tensor in model.state_dict().values())
    model.process_weights_()
    assert len(sizes) == 8 + 2  # the embedding, the unembedding
    assert max(sizes) < whole / 6
    assert sum(sizes) < 1.1 * whole


def test_a_state_dict_of_another_model_changes_nothing():
    model = bilinear_model(bilinear_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = bilinear_model(bilinear_bias=True, d_mlp=10).state_dict()
    with pytest.raises(ValueError, match=r"W_in has shape \[16, 10\], this model's \[16, 24\]"):
        model.load_and_process_state_dict(other)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.cfg.normalization_type == "RMS"
