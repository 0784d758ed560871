"""Tensor transformers: TensorTransformer.from_pretrained of the published format, and back."""

import json

import pytest
import torch
from torch.testing import assert_close

from tests.models.tensor_format import TOKENS, config, forward, weights, write
from tl_bilinear import BilinearTensor
from tl_bilinear.circuits import AttentionInteractions, direct_path, embedding, paths, through_head
from tl_bilinear.features import Dictionary
from tl_bilinear.models import TensorTransformer
from tl_bilinear.models.tensor_language_model import TensorLanguageConfig, TensorLanguageModel

load = TensorTransformer.from_pretrained

VARIANTS = {
    "product": {},
    "difference": {"squared_attn": False},
    "squared": {"bilinear_attn": False},
    "softmax": {"bilinear_attn": False, "squared_attn": False},
    "gated": {"gated": True},
    "squared mlp": {"bilinear": False, "squared_mlp": True},
    "relu2 mlp": {"bilinear": False},
    "no norm": {"norm": False},
    "one layer, one head": {"n_layer": 1, "n_head": 1},
}


def checkpoint(**fields):
    cfg = config(**fields)
    tensors = weights(cfg)
    if not cfg.get("norm", True):  # its logits would grow with a high power of the weights
        tensors = {n: 0.5 * t if n.endswith("weight") else t for n, t in tensors.items()}
    return cfg, tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published") / "model"


@pytest.fixture(scope="module")
def model(folder):
    cfg, tensors = checkpoint()
    write(folder, cfg, tensors)
    return load(folder, dtype=torch.float64)


# ---------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_the_hooked_and_of_the_trained_class(tmp_path, name):
    cfg, tensors = checkpoint(**VARIANTS[name])
    write(tmp_path / "model", cfg, tensors)
    expected = forward(cfg, tensors, TOKENS)
    assert_close(load(tmp_path / "model")(TOKENS).double(), expected, rtol=0, atol=1e-5)
    exact = load(tmp_path / "model", dtype=torch.float64)
    assert_close(exact(TOKENS), expected, rtol=0, atol=1e-10)
    fields = {name: value for name, value in cfg.items() if name != "step"}
    trained = TensorLanguageModel(TensorLanguageConfig(**fields))
    trained.load_state_dict(tensors)
    assert_close(trained(TOKENS).logits.double(), expected, rtol=0, atol=1e-5)


def test_the_reference_sees_what_matters():
    """Each choice of the format changes its logits by far more than the tolerance above."""
    row = TOKENS[:1, :4]
    cfg, tensors = checkpoint(n_layer=2)
    expected = forward(cfg, tensors, row)
    other = {"positions": forward(cfg, tensors, row.flip(1)).flip(1)}
    for name, fields in VARIANTS.items():
        if name not in ("product", "one layer, one head"):
            other[name] = forward(*checkpoint(n_layer=2, **fields), row)
    for name in ("lambdas", "attn.lamb", "attn.c_q2.weight", "attn.c_v.weight", "mlp.Down_bias"):
        key = f"transformer.h.1.{name}"
        moved = 1.5 * tensors[key]
        other[name] = forward(cfg, {**tensors, key: moved.flip(-1) if moved.ndim else moved}, row)
    for name, logits in other.items():
        assert (logits - expected).abs().max() > 1e-3, name


def test_hooks(model):
    _, cache = model.run_with_cache(TOKENS)
    block = "blocks.1"
    for name in (
        "hook_attn_out",
        "hook_mlp_out",
        "mlp.hook_in",
        "ln1.hook_normalized",
        "ln2.hook_scale",
    ):
        assert f"{block}.{name}" in cache
    get = {n.removeprefix(f"{block}.attn."): v for n, v in cache.items() if f"{block}.attn." in n}
    assert get["hook_q"].shape == get["hook_k2"].shape == (2, 7, 2, 8)
    assert_close(get["hook_pattern"], get["hook_attn_scores"] * get["hook_attn_scores2"])
    assert not get["hook_pattern"].triu(1).any()
    dots = torch.einsum("bihd,bjhd->bhij", get["hook_rot_q2"], get["hook_rot_k2"]) / 8
    assert_close(get["hook_attn_scores2"], dots.tril())
    z = torch.einsum("bhij,bjhd->bihd", get["hook_pattern"], get["hook_v_mixed"])
    assert_close(get["hook_z"], z)
    assert_close(
        get["q_norm.hook_normalized"].square().mean(-1), torch.ones(2, 7, 2, dtype=torch.float64)
    )
    lamb, first = model.blocks[1].attn.lamb, cache["blocks.0.attn.hook_v"]
    assert_close(get["hook_v_mixed"], (1 - lamb) * get["hook_v"] + lamb * first)
    lambdas = model.blocks[1].lambdas
    mixed = lambdas[0] * cache["blocks.0.hook_resid_post"] + lambdas[1] * cache["hook_embed"]
    assert_close(cache[f"{block}.hook_resid_pre"], mixed)
    mid = cache[f"{block}.hook_resid_pre"] + cache[f"{block}.hook_attn_out"]
    assert_close(cache[f"{block}.hook_resid_mid"], mid)
    assert model.carried.x0 is None  # nothing of a run stays behind


def test_hooks_change_the_run(model):
    whole = model(TOKENS)
    for name in ("hook_pattern", "hook_v_mixed", "hook_q2"):
        changed = model.run_with_hooks(
            TOKENS, fwd_hooks=[(f"blocks.1.attn.{name}", lambda value, hook: 0 * value)]
        )
        assert (changed - whole).abs().max() > 1e-3, name
    model.set_use_attn_result(True)
    try:
        _, cache = model.run_with_cache(TOKENS)
        assert_close(cache["blocks.2.attn.hook_result"].sum(2), cache["blocks.2.hook_attn_out"])
    finally:
        model.set_use_attn_result(False)
    model.set_use_split_qkv_input(True)
    try:
        assert_close(model(TOKENS), whole)
    finally:
        model.set_use_split_qkv_input(False)


def test_padding_on_the_left_changes_nothing(model):
    row = TOKENS[:1, :5]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), row], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert_close(model(padded, attention_mask=mask)[:, 2:], model(row))


def test_every_layer_is_a_bilinear_tensor(model):
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(3):
        tensor = BilinearTensor.from_model(model, layer)
        assert tensor.input_space.startswith(f"blocks.{layer}.mlp.hook_in")
        assert_close(
            tensor(cache[f"blocks.{layer}.mlp.hook_in"]), cache[f"blocks.{layer}.hook_mlp_out"]
        )


def test_a_squared_mlp_is_a_bilinear_layer_too(tmp_path):
    write(tmp_path / "model", *checkpoint(**VARIANTS["squared mlp"]))
    tensor = BilinearTensor.from_model(load(tmp_path / "model"), 1)
    assert torch.equal(tensor.left, tensor.right)


@pytest.mark.parametrize(
    ("name", "found"), [("gated", "GatedMLP with act_fn='silu'"), ("relu2 mlp", "MLP with")]
)
def test_layers_that_are_not_bilinear_are_refused(tmp_path, name, found):
    write(tmp_path / "model", *checkpoint(**VARIANTS[name]))
    with pytest.raises(ValueError, match=f"blocks.0.mlp is not bilinear: it is a {found}"):
        BilinearTensor.from_model(load(tmp_path / "model"), 0)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", VARIANTS)
def test_back_to_the_format(tmp_path, name):
    cfg, tensors = checkpoint(**VARIANTS[name])
    write(tmp_path / "published", cfg, tensors)
    one = load(tmp_path / "published")
    one.save_pretrained(tmp_path / "saved")
    other = load(tmp_path / "saved")
    assert torch.equal(one(TOKENS), other(TOKENS))
    trained = TensorLanguageModel.from_pretrained(tmp_path / "saved")
    held = trained.state_dict()
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[key], value) for key, value in tensors.items())
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored == {n: v for n, v in cfg.items() if n != "step"}


def test_from_the_hub(hub, model, caplog):
    write(hub / "someone" / "tensor", *checkpoint())
    assert_close(load("someone/tensor", dtype=torch.float64)(TOKENS), model(TOKENS))
    assert not caplog.records  # the vocabulary is not GPT-2's


def test_n_ctx(folder, model):
    short = load(folder, n_ctx=5)
    with pytest.raises(
        ValueError, match="longer than n_ctx = 5: load the model with a larger n_ctx"
    ):
        short(TOKENS)
    assert model.cfg.n_ctx == 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 3}, "n_embd = 16 is not n_head = 3 times an even size of a head"),
        ({"n_layer": 0}, "n_layer is 0; expected a positive integer"),
        ({"gated": "no"}, "gated is 'no'; expected true or false"),
        ({"n_layer": 4}, "transformer.h.3.attn.c_k.weight is missing"),
        ({"bilinear_attn": False}, "c_k2.weight is not in the model"),
        ({"expansion_factor": 3}, r"has shape \[16, 32\] where the config makes it \[16, 48\]"),
    ],
)
def test_damaged_configs(tmp_path, fields, message):
    write(tmp_path / "model", {**config(), **fields}, weights(config()))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


def test_damaged_weights_and_folders(tmp_path):
    cfg, tensors = checkpoint()
    write(tmp_path / "nan", cfg, {**tensors, "transformer.h.0.attn.lamb": torch.tensor(torch.nan)})
    with pytest.raises(ValueError, match=r"attn\.lamb is nan"):
        load(tmp_path / "nan")
    write(tmp_path / "short", cfg, tensors)
    path = tmp_path / "short" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is truncated, or holds more than tensors"
    ):
        load(tmp_path / "short")
    write(tmp_path / "other", {"n_layer": 2}, tensors)
    with pytest.raises(ValueError, match="it lacks vocab_size, n_head, n_embd, bilinear_attn"):
        load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="takes a folder, or a name on the hub"):
        load(tmp_path / "nowhere")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no pytorch_model\.bin"):
        load(tmp_path / "short")


# ---------------------------------------------------------------------- refused by name


def test_what_a_tensor_transformer_does_not_have(model):
    stream = model(TOKENS, stop_at_layer=1)
    with pytest.raises(ValueError, match="start_at_layer does not fit a tensor transformer"):
        model(stream, start_at_layer=1)
    with pytest.raises(ValueError, match="reads the first one's input: run the model"):
        model.blocks[1](stream)
    with torch.no_grad():
        written = model.generate(
            TOKENS[:1], max_new_tokens=3, stop_at_eos=False, verbose=False, do_sample=False
        )
    assert written.shape == (1, 10)
    best = model(written[:, :-1].clone())[0, -1].argmax()
    assert int(written[0, -1]) == int(best)
    with pytest.raises(ValueError, match="past_kv_cache does not fit"):
        model.generate(
            TOKENS[:1], max_new_tokens=1, stop_at_eos=False, use_past_kv_cache=True, verbose=False
        )


def test_analyses_that_need_a_plain_stream_refuse(model):
    u = torch.ones(16, dtype=torch.float64)
    for analysis in (
        lambda: embedding(model),
        lambda: direct_path(model, 1, torch.eye(16)),
        lambda: through_head(model, torch.eye(16), 0, 0),
        lambda: paths(model, TOKENS[0], 1, u),
    ):
        with pytest.raises(
            ValueError, match="a tensor transformer mixes the embedding into the stream"
        ):
            analysis()
    features = Dictionary(torch.eye(16, dtype=torch.float64), hook="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match=r"attention scores of tensor-transformer .* are not read"):
        AttentionInteractions(model, 1, 0, features, features)
