"""The authors' published models: HookedBilinearTransformer.from_pretrained of their format."""

import json
import logging

import pytest
import torch
from torch.testing import assert_close

from tests.models.published_format import SIZES, TOKENS, VOCABULARY, config, forward, weights, write
from tl_bilinear import BilinearTensor, HookedBilinearTransformer
from tl_bilinear.models import (
    AttentionScales,
    HookedBilinearSAETransformer,
    compare_attention_scales,
)

load = HookedBilinearTransformer.from_pretrained
SCALED = (2 * SIZES["n_layer"]) ** -0.5


# ---------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("scale", [1.0, SCALED, 0.3])
@pytest.mark.parametrize(
    ("fields", "qkv_bias"),
    [
        ({}, False),
        ({"bias": True}, False),
        ({"bias": True}, True),
        ({"normalization": False}, False),
        ({"gate": "linear"}, False),
        ({"d_hidden": 8, "n_head": 4}, False),
        ({"d_hidden": 16, "n_layer": 1}, False),
    ],
    ids=str,
)
def test_logits(tmp_path, fields, qkv_bias, scale):
    cfg = config(**fields)
    tensors = weights(cfg, qkv_bias)
    write(tmp_path / "model", cfg, tensors)
    model = load(tmp_path / "model", attn_scale=scale)
    expected = forward(cfg, tensors, TOKENS, scale)
    assert_close(model(TOKENS).double(), expected, rtol=0, atol=1e-5)
    assert model.cfg.bilinear_bias is cfg["bias"]
    exact = load(tmp_path / "model", attn_scale=scale, dtype=torch.float64)
    assert_close(exact(TOKENS), expected, rtol=0, atol=1e-10)


def test_the_reference_sees_what_matters(tmp_path):
    """Each choice of the format changes its logits by more than the tolerance of `test_logits`."""
    cfg = config()
    tensors = weights(cfg)
    expected = forward(cfg, tensors, TOKENS, 1.0)
    other = {
        "scale": forward(cfg, tensors, TOKENS, SCALED),
        "norm": forward(config(normalization=False), tensors, TOKENS, 1.0),
        "heads": forward(config(n_head=4), tensors, TOKENS, 1.0),
        "positions": forward(cfg, tensors, TOKENS.flip(1), 1.0).flip(1),
    }
    for name in ("mlp.w.weight", "attn.qkv.weight", "attn.o.weight"):
        key = f"transformer.h.1.{name}"
        shifted = {**tensors, key: tensors[key].roll(1, 0)}
        other[name] = forward(cfg, shifted, TOKENS, 1.0)
    for name, logits in other.items():
        assert (logits - expected).abs().max() > 1e-2, name


def test_left_rows_are_the_gate(tmp_path):
    tensors = write(tmp_path / "model")
    mlp = load(tmp_path / "model").blocks[1].mlp
    left, right = tensors["transformer.h.1.mlp.w.weight"].chunk(2)
    assert torch.equal(mlp.W_gate, left.T)
    assert torch.equal(mlp.W_in, right.T)


def test_the_layer_is_the_bilinear_tensor(tmp_path):
    tensors = write(tmp_path / "model")
    layer = BilinearTensor.from_model(load(tmp_path / "model"), 2)
    x = torch.randn(5, SIZES["d_model"])
    both = x @ tensors["transformer.h.2.mlp.w.weight"].T
    product = both[:, : SIZES["d_hidden"]] * both[:, SIZES["d_hidden"] :]
    assert_close(layer(x), product @ tensors["transformer.h.2.mlp.p.weight"].T)


def test_context_and_vocabulary(tmp_path):
    write(tmp_path / "model")
    model = load(tmp_path / "model")
    assert (model.cfg.d_vocab, model.cfg.n_ctx) == (VOCABULARY, SIZES["n_ctx"])
    assert model.cfg.model_name == "model"
    assert not torch.equal(model.W_E, model.W_U.T)


def test_dtypes(tmp_path):
    cfg = config()
    tensors = {name: t.bfloat16() for name, t in weights(cfg).items()}
    write(tmp_path / "model", cfg, tensors)
    assert load(tmp_path / "model").W_O.dtype == torch.bfloat16
    wide = load(tmp_path / "model", dtype=torch.float64, attn_scale=1.0)
    assert wide.W_in.dtype == wide.cfg.dtype == torch.float64
    assert_close(wide(TOKENS), forward(cfg, tensors, TOKENS, 1.0), rtol=0, atol=1e-10)


def test_saves_trains_and_processes_like_any_other(tmp_path):
    write(tmp_path / "model", config(bias=True))
    model = load(tmp_path / "model")
    logits = model(TOKENS)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours")(TOKENS), logits)
    model(TOKENS, return_type="loss").backward()
    assert model.blocks[0].mlp.b_gate.grad.abs().sum() > 0
    model.process_weights_()
    assert_close(model(TOKENS).log_softmax(-1), logits.log_softmax(-1), rtol=0, atol=1e-5)


def test_sae_lens_class(tmp_path):
    write(tmp_path / "model")
    model = HookedBilinearSAETransformer.from_pretrained(tmp_path / "model")
    assert type(model) is HookedBilinearSAETransformer
    assert torch.equal(model(TOKENS), load(tmp_path / "model")(TOKENS))


def test_random_numbers_are_left_alone(tmp_path):
    write(tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(tmp_path / "model")
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------------- the attention scale


@pytest.mark.parametrize(
    ("folder", "fields", "scale"),
    [
        ("ts-medium", {}, 1.0),
        ("models--tdooms--ts-medium/snapshots/abc", {}, 1.0),
        ("elsewhere", {"repo": "tdooms/ts-medium"}, 1.0),
        ("fw-small", {}, SCALED),
        ("fw-medium", {}, SCALED),
        ("not-ts-medium", {}, SCALED),
        ("elsewhere", {}, SCALED),
        ("ts-medium", {"scale_attn": True}, SCALED),
        ("fw-small", {"scale_attn": False}, 1.0),
    ],
)
def test_default_scale(tmp_path, folder, fields, scale):
    cfg = config(**fields)
    tensors = write(tmp_path / folder, cfg)
    model = load(tmp_path / folder)
    expected = forward(cfg, tensors, TOKENS, scale)
    assert_close(model(TOKENS).double(), expected, rtol=0, atol=1e-5)


def test_hook_attn_out_is_what_the_residual_stream_receives(tmp_path):
    write(tmp_path / "model")
    _, cache = load(tmp_path / "model", attn_scale=0.3).run_with_cache(TOKENS)
    moved = cache["blocks.0.hook_resid_mid"] - cache["blocks.0.hook_resid_pre"]
    assert_close(cache["blocks.0.hook_attn_out"], moved, rtol=0, atol=1e-5)


def reference_loss(cfg, tensors, scale, tokens=TOKENS):
    logits = forward(cfg, tensors, tokens, scale)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_losses_under_both_scales(tmp_path, batch_size):
    cfg = config()
    tensors = write(tmp_path / "ts-medium", cfg)
    result = compare_attention_scales(
        tmp_path / "ts-medium", TOKENS, batch_size=batch_size, progress=False
    )
    expected = [reference_loss(cfg, tensors, scale) for scale in (1.0, SCALED)]
    assert_close(result.scales, torch.tensor([1.0, SCALED]).double(), rtol=0, atol=1e-7)
    assert_close(result.losses, torch.stack(expected), rtol=0, atol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert result.n_tokens == TOKENS[:, 1:].numel()
    assert result.default == 1.0
    assert result.best == (1.0 if expected[0] < expected[1] else pytest.approx(SCALED))


def test_attention_scales_result(tmp_path):
    result = AttentionScales(torch.tensor([1.0, 0.5]), torch.tensor([2.0, 1.5]), 10, 1.0)
    assert result.best == 0.5
    assert result.top(1).scales.tolist() == [0.5]
    table = result.to_pandas()
    assert table["loss"].tolist() == [2.0, 1.5]
    assert table["default"].tolist() == [True, False]
    result.save(tmp_path / "scales.safetensors")
    again = AttentionScales.load(tmp_path / "scales.safetensors")
    assert torch.equal(again.losses, result.losses)
    assert (again.n_tokens, again.default) == (10, 1.0)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("a text", "no tokenizer beside it: pass tokens"),
        (torch.ones(2, 13, dtype=torch.long), r"shape \[2, 13\].*at most 12 positions"),
        (torch.ones(5, dtype=torch.long), r"shape \[5\]"),
        (torch.full((1, 3), VOCABULARY), "tokens from 23 to 23; the model's are 0 to 22"),
        (torch.ones(3, 1, dtype=torch.long), "nothing to predict"),
        ([], "no tokenizer"),
    ],
)
def test_samples_that_do_not_fit(tmp_path, unchecked, sample, message):
    write(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        compare_attention_scales(tmp_path / "model", sample, progress=False)


def test_scales_of_our_own_format_are_refused(tmp_path):
    write(tmp_path / "model")
    load(tmp_path / "model").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="leave attn_scale out"):
        load(tmp_path / "ours", attn_scale=1.0)
    with pytest.raises(ValueError, match="lacks n_layer, n_head"):
        compare_attention_scales(tmp_path / "ours", TOKENS)


# ---------------------------------------------------------------------- tokenizer and hub


@pytest.fixture
def tokenizer():
    """As the authors' for TinyStories: lower-case WordPiece that puts [BOS] first."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[BOS]", "[EOS]", "the", "cat", "sat", "##s"]
    tokens = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def assert_tokenizes(model):
    assert model.to_tokens("The cats").tolist() == [[1, 3, 4, 6]]
    assert model.to_tokens("The cats", prepend_bos=False).tolist() == [[3, 4, 6]]
    assert model.to_tokens(["the cats sat", "the"]).tolist() == [[1, 3, 4, 6, 5], [1, 3, 2, 2, 2]]


def test_tokenizer_beside_the_model(tmp_path, tokenizer):
    write(tmp_path / "model")
    assert load(tmp_path / "model").tokenizer is None
    tokenizer.save_pretrained(tmp_path / "model")
    assert_tokenizes(load(tmp_path / "model"))
    given = load(tmp_path / "model", tokenizer=load(tmp_path / "model").tokenizer)
    assert_tokenizes(given)


def test_losses_of_texts(tmp_path, tokenizer):
    cfg = config()
    tensors = write(tmp_path / "model", cfg)
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["the cat", "the cats sat " * 5]
    result = compare_attention_scales(tmp_path / "model", texts, progress=False)
    rows = [[1, 3, 4], ([1] + [3, 4, 6, 5] * 5)[: SIZES["n_ctx"]]]
    assert result.n_tokens == 2 + SIZES["n_ctx"] - 1
    for scale, loss in zip((1.0, SCALED), result.losses, strict=True):
        sums = [
            reference_loss(cfg, tensors, scale, torch.tensor([row])) * (len(row) - 1)
            for row in rows
        ]
        assert_close(loss, sum(sums) / result.n_tokens, rtol=0, atol=1e-5)


def test_from_the_hub(hub, tokenizer):
    cfg = config()
    tensors = write(hub / "tdooms" / "ts-medium", cfg)
    tokenizer.save_pretrained(hub / "tdooms" / "ts-tokenizer-4096")
    model = load("tdooms/ts-medium")
    assert_close(model(TOKENS).double(), forward(cfg, tensors, TOKENS, 1.0), rtol=0, atol=1e-5)
    assert model.cfg.model_name == "ts-medium"
    assert_tokenizes(model)
    scaled = load("tdooms/ts-medium", attn_scale=SCALED)
    assert_close(scaled(TOKENS).double(), forward(cfg, tensors, TOKENS, SCALED), rtol=0, atol=1e-5)
    assert compare_attention_scales("tdooms/ts-medium", TOKENS, progress=False).default == 1.0


def test_a_tokenizer_in_the_repository_goes_first(hub, tokenizer):
    write(hub / "tdooms" / "fw-small", config(tokenizer="mistral"))
    tokenizer.bos_token, tokenizer.eos_token = "[BOS]", "[EOS]"
    tokenizer.save_pretrained(hub / "tdooms" / "fw-small")
    assert load("tdooms/fw-small").to_tokens("the cat").tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("named", ["ts-4096", "gpt2", "somebody's own", None])
def test_without_a_tokenizer_the_model_still_loads(hub, caplog, named):
    write(hub / "tdooms" / "ts-medium", config(tokenizer=named))
    with caplog.at_level(logging.WARNING, logger="tl_bilinear"):
        model = load("tdooms/ts-medium")
    assert model.tokenizer is None
    assert f"without its tokenizer {named!r}" in caplog.text
    assert "Pass tokenizer=" in caplog.text


def test_our_own_format_from_the_hub(hub, tokenizer, tmp_path):
    write(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    model.save_pretrained(hub / "somebody" / "bilinear")
    again = load("somebody/bilinear")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert torch.equal(again.to_tokens("the cat"), model.to_tokens("the cat"))


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(
        FileNotFoundError, match=r"no repository 'tdooms/ts-large'.*no such folder here"
    ):
        load("tdooms/ts-large")
    (hub / "tdooms" / "empty").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"tdooms/empty on the hub has no file config\.json"
    ):
        load("tdooms/empty")
    write(hub / "tdooms" / "half")
    (hub / "tdooms" / "half" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file model\.safetensors"):
        load("tdooms/half")


def test_offline():
    """The tests run with HF_HUB_OFFLINE=1: huggingface_hub's own answer."""
    with pytest.raises(ConnectionError, match=r"not in the cache.*path of a folder") as caught:
        load("tdooms/ts-medium")
    assert "'tdooms/ts-medium'" in str(caught.value)
    assert "HF_HUB_OFFLINE is set" in str(caught.value)


@pytest.mark.parametrize("error", [OSError("reset by peer"), TimeoutError("timed out")])
def test_a_broken_connection(monkeypatch, error):
    import huggingface_hub

    def fail(**_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConnectionError, match=str(error)):
        load("tdooms/ts-medium")


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("name", sorted(weights(config(bias=True), qkv_bias=True)))
@pytest.mark.parametrize("wrong", ["missing", "shape", "dimensions"])
def test_each_tensor_that_does_not_fit_is_named(tmp_path, name, wrong):
    cfg = config(bias=True)
    tensors = weights(cfg, qkv_bias=True)
    if wrong == "missing":
        del tensors[name]
    elif wrong == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    else:
        tensors[name] = tensors[name][None]
    write(tmp_path / "model", cfg, tensors)
    if wrong == "missing" and "qkv.bias" in name:
        load(tmp_path / "model")  # older versions of the published code have none
        return
    found = "is missing" if wrong == "missing" else "has shape"
    with pytest.raises(ValueError, match=r"does not fit its config\.json") as caught:
        load(tmp_path / "model")
    if (name, wrong) == ("lm_head.weight", "shape"):
        name = "transformer.wte.weight"  # lm_head decides the size of the vocabulary
    assert f"{name} {found}" in str(caught.value)


def test_extra_tensors_are_named_and_strays_dropped(tmp_path):
    cfg = config()
    tensors = weights(cfg)
    strays = {
        "transformer.h.0.n1.norm.linear.weight": torch.ones(16, 16),
        "transformer.n_f.norm.linear.bias": torch.ones(16),
    }
    write(tmp_path / "stray", cfg, tensors | strays)
    assert_close(
        load(tmp_path / "stray", attn_scale=1.0)(TOKENS).double(),
        forward(cfg, tensors, TOKENS, 1.0),
        rtol=0,
        atol=1e-5,
    )
    for name in ("transformer.h.0.n1.norm.weight", "transformer.h.3.mlp.p.weight", "w_enc.weight"):
        folder = tmp_path / name
        write(folder, cfg, {**tensors, name: torch.ones(16)})
        with pytest.raises(ValueError, match=f"{name} is not in the model"):
            load(folder)
    write(tmp_path / "bias", cfg, weights(config(bias=True)))
    with pytest.raises(ValueError, match=r"mlp\.p\.bias is not in the model"):
        load(tmp_path / "bias")


def test_another_rotary_base(tmp_path):
    cfg = config()
    tensors = weights(cfg)
    name = "transformer.h.1.attn.rotary.inv_freq"
    tensors[name] = tensors[name] ** 1.5
    write(tmp_path / "model", cfg, tensors)
    with pytest.raises(ValueError, match=f"{name} is .*rotary base 10000"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "silu"}, "gate is 'silu'.*not bilinear"),
        ({"gate": "relu"}, "gate is 'relu'"),
        ({"gate": True}, "gate is True"),
        ({"bilinear": False}, "one input map, not two"),
        ({"attention2": True}, "attention without softmax"),
        ({"norm_bias": True}, "RMSNorm has no parameters"),
        ({"n_head": 3}, "d_model = 16 is not n_head = 3 times"),
        ({"n_head": 16}, "an even size of a head"),
        ({"n_layer": 0}, "n_layer is 0; expected a positive integer"),
        ({"d_model": "16"}, "d_model is '16'"),
    ],
)
def test_models_that_are_not_the_papers(tmp_path, fields, message):
    write(tmp_path / "model", config(**fields), weights(config()))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_config_that_lacks_a_size(tmp_path, name):
    cfg = config()
    del cfg[name]
    write(tmp_path / "model", cfg, weights(config()))
    with pytest.raises(ValueError, match=f"published models either .it lacks {name}"):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_and_missing_files(tmp_path, name):
    write(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{name} is (truncated|not JSON)"):
        load(tmp_path / "model")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"not a saved model: it has no {name}"):
        load(tmp_path / "model")


def test_a_published_config_with_foreign_weights(tmp_path):
    write(tmp_path / "model", config(), {"encoder.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["n_layer"] == 3
