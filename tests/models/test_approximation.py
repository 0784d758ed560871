"""Gated MLPs of Hugging Face and TransformerLens, and whole Llamas, with bilinear layers in place."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from tests.models.building import write_tokenizer
from tl_bilinear import BilinearTensor, HookedBilinearTransformer, register_gated_reader
from tl_bilinear.circuits import paths
from tl_bilinear.features import FeatureInteractions
from tl_bilinear.hooks import ReplaceLayer, leave_out, loss_added, with_loss_added
from tl_bilinear.models.approximation import (
    Replacement,
    approximate_llama,
    fidelity_table,
    mlp_inputs,
    to_bilinear_llama,
)
from tl_bilinear.models.repair import repair
from tl_bilinear.tensor import approximate
from tl_bilinear.tensor.registry import read_gated

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def make(config_class=LlamaConfig, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def llama():
    return make(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 50, (40, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fitted(llama, rows):
    return approximate_llama(llama, rows, warn_below=-1e9, progress=False)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (LlamaConfig, {"hidden_act": "silu"}),
        (LlamaConfig, {"hidden_act": "gelu", "mlp_bias": True}),
        (LlamaConfig, {"hidden_act": "relu"}),
        (LlamaConfig, {"hidden_act": "linear"}),
        (MistralConfig, {}),
        (Qwen2Config, {}),
        (GemmaConfig, {"head_dim": 4}),
    ],
)
def test_gated_layers_of_hugging_face(config_class, options):
    mlp = make(config_class, **options).model.layers[1].mlp
    x = torch.randn(4, 7, 16)
    assert_close(read_gated(mlp)(x), mlp(x), rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = approximate(mlp, torch.randn(3000, 16))
    assert found.variance_explained > 0.5
    if options.get("hidden_act") == "linear":
        assert found.variance_explained > 1 - 1e-9
        assert_close(found.tensor(x), mlp(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("act_fn", ["silu", "relu", "gelu_new"])
def test_gated_layers_of_transformer_lens(act_fn):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, d_head=8, n_ctx=8, d_vocab=9, act_fn=act_fn, gated_mlp=True, seed=0
    )
    mlp = HookedTransformer(cfg).blocks[0].mlp
    with torch.no_grad():
        for bias in (mlp.b_in, mlp.b_out):  # b_in stands after the product
            bias.normal_()
    x = torch.randn(4, 7, 16)
    assert_close(read_gated(mlp)(x), mlp(x), rtol=1e-5, atol=1e-6)


def test_what_is_read_is_a_copy(llama):
    mlp = llama.model.layers[0].mlp
    layer = read_gated(mlp)
    layer.gate.zero_()
    assert mlp.gate_proj.weight.any()


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        x = nn.functional.normalize(x, dim=-1)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_modules_that_are_something_else(monkeypatch):
    with pytest.raises(ValueError, match="WithNorm has the names of a gated MLP, but its forward"):
        approximate(WithNorm(), torch.randn(50, 4))
    nameless = WithNorm()
    del nameless.act_fn
    with pytest.raises(ValueError, match="no activation under act_fn, act"):
        approximate(nameless, torch.randn(50, 4))
    with pytest.raises(
        TypeError, match=r"no reader recognises this gated MLP: .*Linear.*GatedLayer"
    ):
        approximate(nn.Linear(4, 4), torch.randn(50, 4))
    with pytest.raises(ValueError, match="'transformer-lens' is registered already"):
        register_gated_reader("transformer-lens", lambda module: None)


# ---------------------------------------------------------------------- a whole model


def test_mlp_inputs_are_what_the_mlps_read(llama, rows):
    found = mlp_inputs(llama, rows[:3], [2], drop_first=False)
    assert list(found) == [2]
    hidden = llama.model(rows[:3], output_hidden_states=True).hidden_states[2]
    block = llama.model.layers[2]
    with torch.no_grad():
        normed = block.input_layernorm(hidden)
        angles = llama.model.rotary_emb(hidden, torch.arange(32)[None])
        mixed = hidden + block.self_attn(normed, position_embeddings=angles, attention_mask=None)[0]
        want = block.post_attention_layernorm(mixed)
    assert_close(found[2].reshape(3, 32, 16), want, rtol=1e-4, atol=1e-5)
    assert len(mlp_inputs(llama, rows[:3])[0]) == 3 * 31
    assert not block.mlp._forward_pre_hooks


def test_a_bilinear_llama_is_the_model_with_its_layers_replaced(llama, fitted, rows, tmp_path):
    bilinear = to_bilinear_llama(llama, {n: one.tensor for n, one in fitted.items()})
    with Replacement(fitted).applied(llama), torch.no_grad():
        want = llama(rows[:4]).logits
    with torch.no_grad():
        assert_close(bilinear(rows[:4]).logits, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(llama(rows[:4]).logits, want, atol=1e-2)  # put back
    assert (bilinear.config.hidden_act, bilinear.config.mlp_bias) == ("linear", True)
    assert bilinear.config.num_key_value_heads == 2
    assert bilinear.lm_head.weight is bilinear.model.embed_tokens.weight
    bilinear.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(rows[:4]).logits, want, rtol=1e-4, atol=1e-4)
    hooked = HookedBilinearTransformer.from_hf(again, fold_ln=False)
    assert_close(hooked(rows[:4]).log_softmax(-1), want.log_softmax(-1), rtol=1e-4, atol=1e-3)
    tensor = BilinearTensor.from_model(hooked, 1)
    x = torch.randn(5, 16)
    assert_close(tensor(x), fitted[1].tensor(x), rtol=1e-4, atol=1e-4)


def test_loss_added(llama, fitted, rows):
    edits = {str(layer): Replacement({layer: one}) for layer, one in fitted.items()}
    edits["all"] = Replacement(fitted)
    found = loss_added(llama, rows[:10], edits, batch_size=4, progress=False)
    with torch.no_grad():
        own = llama(input_ids=rows[:10], labels=rows[:10]).loss.item()
        bilinear = to_bilinear_llama(llama, {n: one.tensor for n, one in fitted.items()})
        together = bilinear(input_ids=rows[:10], labels=rows[:10]).loss.item()
    assert found.clean.mean().item() == pytest.approx(own, abs=1e-5)
    assert found.patched[3].mean().item() == pytest.approx(together, abs=1e-4)
    table = found.to_pandas().set_index("edit")
    assert list(table.index) == ["0", "1", "2", "all"]
    assert table.loc["all", "difference"] == pytest.approx(together - own, abs=1e-4)
    with Replacement({1: fitted[1]}).applied(llama), torch.no_grad():
        alone = llama(input_ids=rows[:10], labels=rows[:10]).loss.item()
    assert found.patched[1].mean().item() == pytest.approx(alone, abs=1e-5)


def test_tokens_that_are_given_and_not_predicted(llama, fitted, rows):
    """As in training: [BOS] is no target."""
    tokens = rows[:6].clone()
    tokens[:, [0, 9, 20]] = 1
    found = loss_added(llama, tokens, Replacement(fitted), mask=tokens != 1, progress=False)
    with torch.no_grad():
        labels = tokens.masked_fill(tokens == 1, -100)
        assert found.clean.mean().item() == pytest.approx(
            llama(input_ids=tokens, labels=labels).loss.item(), abs=1e-5
        )


def test_one_warning_names_the_layers(llama, rows):
    with pytest.warns(
        UserWarning, match=r"less than 100% .* in layer 0 \(.*% of .*\), 2 \("
    ) as caught:
        approximate_llama(llama, rows, [0, 2], warn_below=0.99999)
    assert len(caught) == 1


def test_models_that_cannot_be_made_bilinear(llama, fitted):
    with pytest.raises(TypeError, match="expected a LlamaForCausalLM, got GPT2LMHeadModel"):
        to_bilinear_llama(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)), {})
    with pytest.raises(ValueError, match=r"a bilinear layer everywhere; missing: \[0, 2\]"):
        to_bilinear_llama(llama, {1: fitted[1].tensor})


def test_a_real_model(shared_data):
    """stories260K: the output map refitted saves a third of the loss added, at no cost in size."""
    model = LlamaForCausalLM.from_pretrained(shared_data / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    stories = (shared_data / "tinystories_valid.txt").read_text()[:40_000].split("<|endoftext|>")
    ids = [
        token
        for story in stories
        for token in (1, *tokenizer(story.strip(), add_special_tokens=False).input_ids)
    ]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).reshape(-1, 128)
    found = {
        fit: approximate_llama(model, rows[:-16], fit=fit, warn_below=-1e9, progress=False)
        for fit in ("neuron", "refit")
    }
    for layer in range(5):
        neuron, refit = (found[fit][layer].variance_explained for fit in ("neuron", "refit"))
        assert 0.5 < neuron < refit < 0.95
    inputs = mlp_inputs(model, rows[:-16], [0])[0]
    moments = (inputs.mean(0), torch.cov(inputs.T))
    gaussian = approximate(model.model.layers[0].mlp, moments, warn_below=-1e9)
    with torch.no_grad():
        want = model.model.layers[0].mlp(inputs)
        errors = [
            (one.tensor(inputs) - want).square().mean() for one in (gaussian, found["refit"][0])
        ]
    assert errors[0] > 2 * errors[1]  # real inputs are not Gaussian
    edits = {fit: Replacement(one) for fit, one in found.items()}
    held_out = rows[-16:]
    added = loss_added(model, held_out, edits, mask=held_out != 1, progress=False)
    neuron, refit = added.difference.tolist()
    assert 0.2 < refit < 0.8 * neuron


# ---------------------------------------------------------------------- hooks, bridges and others


@pytest.fixture(scope="module")
def bridges(llama, tmp_path_factory):
    """The Llama as a TransformerBridge, raw and in compatibility mode."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    made = {}
    for name in ("raw", "processed"):
        # Processed weights are written into the model that a bridge wraps, so each has its own.
        own = LlamaForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder))
        made[name] = TransformerBridge.boot_transformers(
            str(folder), hf_model=own, tokenizer=tokenizer, device="cpu"
        )
    made["processed"].enable_compatibility_mode(disable_warnings=True)
    return made


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_the_mlp_of_a_bridge_is_read(bridges, kind):
    mlp, x = bridges[kind].blocks[1].mlp, torch.randn(2, 7, 16)
    with torch.no_grad():
        assert_close(read_gated(mlp)(x), mlp(x), rtol=1e-5, atol=1e-5)
        if kind == "raw":
            own = mlp.original_component
            assert_close(read_gated(own)(x), own(x), rtol=1e-5, atol=1e-5)


def test_a_fused_gate_is_read():
    from transformers import Phi3Config

    mlp = make(Phi3Config, pad_token_id=0).model.layers[1].mlp
    x = torch.randn(4, 7, 16)
    assert_close(read_gated(mlp)(x), mlp(x), rtol=1e-5, atol=1e-5)


def test_an_approximation_fits_the_hooks_of_its_model(llama, fitted, bridges, rows):
    """The Llama's approximation in the bridge does what it does in the Llama."""
    edit = ReplaceLayer(fitted[1].tensor, layer=1)
    assert "approximation of a " in repr(edit)
    with Replacement({1: fitted[1]}).applied(llama), torch.no_grad():
        want = llama(rows[:3]).logits.log_softmax(-1)
    with edit.applied(bridges["raw"]), torch.no_grad():
        given = bridges["raw"](rows[:3]).log_softmax(-1)
    assert_close(given, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"does not fit blocks\.2\.mlp"):
        ReplaceLayer(fitted[1].tensor, layer=2).fwd_hooks(bridges["raw"])


def test_a_raw_tensor_is_refused_by_a_processed_model(fitted, bridges, rows):
    saes = torch.randn(5, 16)
    tensor = fitted[1].tensor
    assert "approximation of a " in repr(
        FeatureInteractions(bridges["raw"], 1, saes, saes, layer_tensor=tensor)
    )
    processed = bridges["processed"]
    with pytest.raises(ValueError, match=r"after RMSNorm and its weight.*RMSNorm without a weight"):
        ReplaceLayer(tensor, layer=1).fwd_hooks(processed)
    with pytest.raises(ValueError, match=r"layer_tensor does not fit .*RMSNorm without a weight"):
        FeatureInteractions(processed, 1, saes, saes, layer_tensor=tensor)
    found = approximate_llama(processed, rows, [1], warn_below=-1e9, progress=False)
    with ReplaceLayer(found[1].tensor, layer=1).applied(processed), torch.no_grad():
        given = processed(rows[:3])
    with ReplaceLayer(tensor, layer=1).applied(bridges["raw"]), torch.no_grad():
        want = bridges["raw"](rows[:3])
    # The same function, fitted in other coordinates: up to the ridge.
    assert_close(given.log_softmax(-1), want.log_softmax(-1), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("norm", ["RMSPre", "LNPre", "RMS"])
def test_a_gated_hooked_transformer(norm):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=16,
            d_head=8,
            n_ctx=12,
            d_vocab=23,
            d_mlp=24,
            act_fn="silu",
            gated_mlp=True,
            normalization_type=norm,
            seed=0,
        )
    )
    tokens = torch.randint(0, 23, (200, 12))
    tensor = approximate_llama(model, tokens, [1], warn_below=-1e9, progress=False)[1].tensor
    edit = ReplaceLayer(tensor, layer=1)
    if norm == "RMS":  # what the layer reads, behind the norm's weight, passes no hook
        with pytest.raises(ValueError, match=r"no hook point .*once its norm is folded"):
            edit.fwd_hooks(model)
        return
    with torch.no_grad():
        given = model.run_with_hooks(tokens[:3], fwd_hooks=edit.fwd_hooks(model))
        seen = []
        handle = model.blocks[1].mlp.register_forward_hook(lambda m, a, out: tensor(a[0]))
        seen.append(model(tokens[:3]))
        handle.remove()
    assert_close(given, seen[0], rtol=1e-5, atol=1e-5)
    direction = torch.randn(16)
    split = paths(model, tokens[0], 1, direction, layer_tensor=tensor, position=5)
    _, cache = model.run_with_cache(tokens[:1])
    want = tensor(cache["blocks.1.ln2.hook_normalized"][0, 5]) @ direction
    assert split.total == pytest.approx(want.item(), rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------- massive tokens


def plant(model, token=7):
    """Make a token massive in layer 1: one neuron reads a coordinate that this token alone has."""
    first, second = model.model.layers[:2]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, -1] = 0
        model.model.embed_tokens.weight[token, -1] = 10
        for writer in (first.self_attn.o_proj, first.mlp.down_proj, second.self_attn.o_proj):
            writer.weight[-1] = 0
        for reader in (second.mlp.gate_proj, second.mlp.up_proj):
            reader.weight[0], reader.weight[:, -1] = 0, 0
            reader.weight[0, -1] = 5
        second.mlp.down_proj.weight[:, 0] = 50
    return model


def test_massive_tokens_of_a_model_are_named_by_their_place():
    model = plant(make(tie_word_embeddings=True))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, 50, (60, 32), generator=draw)
    tokens[[3, 17, 55], [5, 9, 30]] = 7
    with pytest.warns(UserWarning, match=r"massive tokens carry \d+%"):
        found = approximate_llama(model, tokens, [1], warn_below=1.0, progress=False)[1]
    massive = found.fidelity.massive
    places = massive.places.tolist()
    assert places == [[3, 5], [17, 9], [55, 30]]
    assert massive.share > 0.5
    by_row = mlp_inputs(model, tokens, [1], progress=False)[1][massive.rows]
    table = fidelity_table({1: found}).iloc[0]
    assert (table["massive"], table["worst"]) == (len(massive), found.worst[1])
    edits = {
        "bare": Replacement({1: found}),
        "massive tokens kept": Replacement({1: found}, keep_massive=True),
    }
    with edits["massive tokens kept"].applied(model), torch.no_grad():
        y = model.model.layers[1].mlp(by_row)
    assert_close(y, model.model.layers[1].mlp(by_row))
    added = with_loss_added(model, {1: found}, tokens[:20], progress=False)[1].fidelity.loss_added
    alone = loss_added(model, tokens[:20], edits["bare"], progress=False).difference.item()
    assert added == pytest.approx(alone, abs=1e-6)


def test_groups_of_text(llama, rows):
    found = approximate_llama(
        llama, {"one": rows[:25], "other": rows[25:]}, [0], warn_below=-1e9, progress=False
    )[0]
    assert list(found.fidelity.groups) == ["one", "other"]
    assert {"one", "other"} <= set(fidelity_table({0: found}).columns)


# ---------------------------------------------------------------------- all layers at once


def test_fitted_in_order_each_layer_reads_what_the_replaced_ones_write(llama, rows):
    found = approximate_llama(llama, rows, in_order=True, warn_below=-1e9, progress=False)
    with Replacement({0: found[0], 1: found[1]}).applied(llama):
        inputs = mlp_inputs(llama, rows, [2], progress=False)[2]
    again = approximate(llama.model.layers[2].mlp, inputs, warn_below=-1e9)
    assert_close(found[2].tensor.left, again.tensor.left)
    with pytest.raises(TypeError, match="in_order replaces layers of a Hugging Face model"):
        approximate_llama(
            HookedBilinearTransformer.from_hf(make(hidden_act="linear")), rows, in_order=True
        )


@pytest.mark.parametrize("trains", ["gates", "gates and out"])
def test_repair(llama, fitted, rows, trains):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    options = {"steps": 30, "batch": 8, "trains": trains, "progress": False}
    found = repair(llama, fitted, rows[:32], **options)
    assert all(torch.equal(before[n], p) for n, p in llama.named_parameters())
    assert all(p.requires_grad for p in llama.parameters())
    kinds = {type(block.mlp).__name__ for block in llama.model.layers}
    assert kinds == {"LlamaMLP"}  # put back

    def divergence(layers):
        with torch.no_grad():
            want = llama(rows[:32]).logits.log_softmax(-1)
            with Replacement(layers).applied(llama):
                given = llama(rows[:32]).logits.log_softmax(-1)
        return (want.exp() * (want - given)).sum(-1).mean().item()

    start = divergence(fitted)
    assert divergence(found.layers) < 0.9 * start
    again = repair(llama, fitted, rows[:32], **options)
    assert torch.equal(again.layers[1].tensor.left, found.layers[1].tensor.left)
    one, other = found.layers[1].tensor, fitted[1].tensor
    assert_close(one.right, other.right)
    scale = (one.left / other.left).nan_to_num(1)
    assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-3, atol=1e-3)
    assert torch.equal(one.out, other.out) == (trains == "gates")
    assert one.output_space.startswith("blocks.1.hook_mlp_out (approximation of a ")


@pytest.mark.usefixtures("unchecked")
def test_repair_of_nothing(llama, fitted, rows):
    with pytest.raises(ValueError, match="there is no approximation to repair"):
        repair(llama, {}, rows)
    with pytest.raises(ValueError, match="unknown trains 'all'; there are gates, gates and out"):
        repair(llama, fitted, rows, trains="all")
    with pytest.raises(ValueError, match=r"steps=300 of batch=8 .* of 4 rows"):
        repair(llama, fitted, rows[:4])


# ---------------------------------------------------------------------- layers left out


def test_layers_that_cost_most_are_left_out_first(llama, fitted, rows):
    """Against every subset, measured one by one."""
    tokens = rows[:6]

    def added(layers):
        with torch.no_grad(), Replacement({n: fitted[n] for n in layers}).applied(llama):
            loss = llama(input_ids=tokens, labels=tokens).loss.item()
        with torch.no_grad():
            return loss - llama(input_ids=tokens, labels=tokens).loss.item()

    found = leave_out(llama, fitted, tokens, progress=False)
    remaining = [0, 1, 2]
    assert found.loss[0].item() == pytest.approx(added(remaining), abs=1e-5)
    for layer, loss in zip(found.order, found.loss[1:].tolist(), strict=True):
        trials = [added([n for n in remaining if n != each]) for each in remaining]
        assert loss == pytest.approx(min(trials), abs=1e-5)
        remaining.remove(layer)
    assert found.loss[-1].item() == pytest.approx(0, abs=1e-6)
    assert found.kept() == {}
    assert list(found.kept(1)) == [n for n in (0, 1, 2) if n != found.order[0]]
    assert found.to_pandas()["saved"].sum() == pytest.approx(found.loss[0].item(), abs=1e-5)
    assert f"left out: {found.order[0]}, " in str(found)

    one = leave_out(llama, fitted, tokens, at_most=1, progress=False)
    assert one.order == found.order[:1]
    enough = leave_out(llama, fitted, tokens, budget=found.loss[0].item() + 1, progress=False)
    assert enough.order == []
    assert "left out: none" in str(enough)
    with pytest.raises(ValueError, match=r"at_most must lie between 1 and 3"):
        leave_out(llama, fitted, tokens, at_most=4)
    with pytest.raises(ValueError, match="there is no approximation to leave out"):
        leave_out(llama, {}, tokens)


def test_wider_layers_make_a_wider_bilinear_llama(llama, fitted, rows):
    wide = approximate_llama(llama, rows, extra=8, warn_below=-1e9, progress=False)
    bilinear = to_bilinear_llama(llama, {n: one.tensor for n, one in wide.items()})
    assert bilinear.config.intermediate_size == 24 + 8 + 16
    with torch.no_grad(), Replacement(wide).applied(llama):
        want = llama(rows[:2]).logits
    with torch.no_grad():
        assert_close(bilinear(rows[:2]).logits, want, rtol=1e-4, atol=1e-4)
    mixed = {0: wide[0].tensor, 1: fitted[1].tensor, 2: fitted[2].tensor}
    with pytest.raises(ValueError, match=r"one width, these have \[24, 48\] neurons"):
        to_bilinear_llama(llama, mixed)
    better = repair(llama, wide, rows[:32], steps=2, progress=False)
    assert better.layers[0].tensor.d_hidden == 48
