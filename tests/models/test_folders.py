"""save_pretrained and from_pretrained."""

import json
import os
import re
import shutil
import stat
import sys

import pytest
import torch
from sae_lens import HookedSAETransformer
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer

from tests.models.building import TOKENS, bilinear_model, config
from tl_bilinear import HookedBilinearTransformer
from tl_bilinear import io as shared_io
from tl_bilinear.models import HookedBilinearSAETransformer, folders

load = HookedBilinearTransformer.from_pretrained


@pytest.fixture
def saved(tmp_path):
    model = bilinear_model(bilinear_bias=True)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def assert_same(loaded, model):
    assert loaded.cfg.to_dict() == model.cfg.to_dict()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bilinear_bias": True},
        {"normalization_type": "LN"},
        {"normalization_type": None},
        {"attn_only": True},
        {"parallel_attn_mlp": True},
        {"positional_embedding_type": "rotary"},
        {"dtype": torch.bfloat16},
        {"d_vocab_out": 5, "d_mlp": 7},
        {"use_local_attn": True, "window_size": 4, "attn_types": ["global", "local"]},
    ],
    ids=str,
)
def test_loaded_model_is_the_same(tmp_path, fields):
    model = bilinear_model(**fields)
    model.save_pretrained(tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
@pytest.mark.parametrize("bias", [False, True])
def test_processed_model(tmp_path, norm, bias):
    model = bilinear_model(normalization_type=norm, bilinear_bias=bias)
    model.process_weights_()
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.cfg.normalization_type == f"{norm}Pre"
    assert_same(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept_or_asked_for(tmp_path, dtype):
    model = bilinear_model(positional_embedding_type="rotary").to(dtype, print_details=False)
    model.save_pretrained(tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)
    wide = load(tmp_path / "model", dtype=torch.float32)
    assert wide.cfg.dtype == wide.W_in.dtype == wide.b_in.dtype == torch.float32


def test_longer_rotary_tables_are_no_obstacle(tmp_path):
    model = bilinear_model(positional_embedding_type="rotary", n_ctx=2100)
    long = torch.ones(1, 2060, dtype=torch.long)
    logits = model(long)
    assert model.blocks[0].attn.rotary_sin.shape[0] > 2048
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(long), logits)


def test_sae_lens_classes_share_the_format(tmp_path):
    model = HookedSAETransformer.from_config(config(), bilinear=True)
    model.save_pretrained(tmp_path / "model")
    plain = load(tmp_path / "model")
    assert type(plain) is HookedBilinearTransformer
    again = HookedBilinearSAETransformer.from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    for other in (plain, again):
        assert torch.equal(other(TOKENS), model(TOKENS))


def test_what_is_written(saved):
    directory, _ = saved
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tl_bilinear.json",
    ]
    assert sorted(p.name for p in directory.parent.iterdir()) == ["model"]
    stored = json.loads((directory / "config.json").read_text())
    assert stored["config"]["dtype"] == "float32"
    assert "device" not in stored["config"]
    assert not stat.S_IMODE(directory.stat().st_mode) & ~0o777
    assert os.access(directory, os.R_OK | os.X_OK)


def test_loading_leaves_the_random_numbers_alone(saved):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    loaded = load(saved[0])
    assert torch.equal(torch.rand(4), expected)
    assert loaded.cfg.seed == 0


def test_a_loaded_model_trains_and_processes(saved):
    loaded = load(str(saved[0]))
    loaded(TOKENS, return_type="loss").backward()
    assert loaded.blocks[0].mlp.b_gate.grad is not None
    expected = loaded(TOKENS).log_softmax(-1)
    loaded.process_weights_()
    torch.testing.assert_close(loaded(TOKENS).log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_tied_weights_are_stored(tmp_path):
    model = bilinear_model()
    model.unembed.W_U = torch.nn.Parameter(model.embed.W_E.T)
    model.blocks[1].mlp.W_in = model.blocks[0].mlp.W_in
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(TOKENS), model(TOKENS))


# ---------------------------------------------------------------------- tokenizer


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[BOS]", "[EOS]", "the", "cat", "sat"]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", eos_token="[EOS]", padding_side="left"
    )


def test_tokenizer_comes_along(tmp_path, tokenizer):
    model = HookedTransformer.from_config(config(d_vocab=-1), bilinear=True, tokenizer=tokenizer)
    assert model.cfg.d_vocab == 6
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    for prepend_bos in (False, True):
        expected = model.to_tokens("the cat sat", prepend_bos=prepend_bos)
        assert torch.equal(loaded.to_tokens("the cat sat", prepend_bos=prepend_bos), expected)
    assert loaded.tokenizer.padding_side == "left"
    assert torch.equal(loaded("cat sat"), model("cat sat"))
    loaded.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(again("cat sat"), model("cat sat"))
    given = load(tmp_path / "model", tokenizer=loaded.tokenizer)
    assert torch.equal(given("cat sat"), model("cat sat"))


# ---------------------------------------------------------------------- replacing, interruptions


def test_a_saved_model_is_replaced_whole(saved):
    directory, _ = saved
    other = bilinear_model(n_layers=1)
    other.save_pretrained(directory)
    assert_same(load(directory), other)
    assert [p.name for p in directory.parent.iterdir()] == ["model"]


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    model = bilinear_model()
    for place in ("empty", "a/b/c"):
        model.save_pretrained(tmp_path / place)
        assert_same(load(tmp_path / place), model)


@pytest.mark.parametrize("other", ["notes.txt", "config.json", "tokenizer"])
def test_a_directory_with_something_else_is_refused(tmp_path, other):
    place = tmp_path / "mine"
    place.mkdir()
    if other == "tokenizer":
        (place / other).mkdir()
    else:
        (place / other).write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match=f"holds {re.escape(other)}"):
        bilinear_model().save_pretrained(place)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", other]


def test_a_users_file_beside_a_saved_model_is_not_deleted(saved):
    directory, model = saved
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        model.save_pretrained(directory)
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        bilinear_model().save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("step", ["save_file", "write_json", "fsync", "_put_in_place"])
@pytest.mark.parametrize(
    "error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk", "ctrl-c"]
)
def test_an_interruption_leaves_what_was_there(saved, monkeypatch, step, error):
    directory, model = saved

    def fail(*args, **kwargs):
        raise error

    owner = {"fsync": os, "_put_in_place": shared_io}.get(step, folders)
    monkeypatch.setattr(owner, step, fail)
    for place in (directory, directory.with_name("new")):
        with pytest.raises(type(error)):
            bilinear_model(n_layers=1).save_pretrained(place)
    assert [p.name for p in directory.parent.iterdir()] == ["model"]
    assert_same(load(directory), model)


def test_an_interruption_between_the_renames_puts_the_old_model_back(saved, monkeypatch):
    directory, model = saved
    rename = type(directory).rename

    def fail_on_staging(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(directory), "rename", fail_on_staging)
    with pytest.raises(KeyboardInterrupt):
        bilinear_model(n_layers=1).save_pretrained(directory)
    monkeypatch.undo()
    assert [p.name for p in directory.parent.iterdir()] == ["model"]
    assert_same(load(directory), model)


def test_a_kill_between_the_renames_is_explained(saved):
    directory, _ = saved
    directory.rename(directory.with_name(".model.0a1b2c3d.old"))
    with pytest.raises(FileNotFoundError, match=r"interrupted.*\.model\.0a1b2c3d\.old"):
        load(directory)


# ---------------------------------------------------------------------- what is not a saved model


def test_a_name_is_not_a_directory():
    with pytest.raises(FileNotFoundError, match=r"'gpt2' is not a directory.*HookedTransformer"):
        load("gpt2")
    with pytest.raises(FileNotFoundError, match="'gpt2' is not a directory"):
        HookedBilinearTransformer.from_pretrained_no_processing("gpt2")


def test_a_file_is_not_a_directory(saved):
    with pytest.raises(NotADirectoryError, match="is a file"):
        load(saved[0] / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"not a saved model: it has no {name}"):
        load(saved[0])


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_truncated_weights(saved, keep):
    path = saved[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"model\.safetensors is truncated.*{keep} bytes"):
        load(saved[0])


def test_weights_with_bytes_too_many_or_of_another_format(saved):
    path = saved[0] / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        load(saved[0])
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        load(saved[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "tl_bil', "is not JSON, or not all of it"),
        ("", "is not JSON"),
        ("[]", "was not written by save_pretrained"),
        ('{"n_head": 8, "n_layer": 6, "bilinear": true}', "was not written by save_pretrained"),
    ],
)
def test_foreign_or_truncated_config(saved, text, message):
    (saved[0] / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "upgrade tl-bilinear"),
        ({"config": None}, "'config' is not a table"),
        ({"config": {"n_layers": None}}, "does not describe a bilinear transformer"),
        ({"config": {"dtype": "float7"}}, "'float7' is not a torch dtype"),
        ({"config": {"act_fn": "gelu"}}, "act_fn='gelu'"),
        ({"config": {"n_heds": 2}}, "n_heds"),
    ],
)
def test_config_that_is_no_bilinear_transformer(saved, change, message):
    path = saved[0] / "config.json"
    stored = json.loads(path.read_text())
    if isinstance(change.get("config"), dict):
        change = {"config": {**stored["config"], **change["config"]}}
    path.write_text(json.dumps({**stored, **change}))
    with pytest.raises(ValueError, match=message):
        load(saved[0])


def test_tensors_that_do_not_fit_are_named(saved):
    path = saved[0] / "model.safetensors"
    tensors = load_file(path)
    del tensors["blocks.0.mlp.W_gate"]
    tensors["blocks.1.mlp.W_in"] = torch.ones(16, 25)
    tensors["blocks.7.mlp.W_in"] = torch.ones(16, 24)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit its config") as caught:
        load(saved[0])
    for part in (
        "blocks.0.mlp.W_gate is missing",
        "blocks.7.mlp.W_in is not in the model",
        "blocks.1.mlp.W_in has shape [16, 25] where the config makes it [16, 24]",
    ):
        assert part in str(caught.value)


def test_a_copied_directory_loads(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "elsewhere" / "copy")
    assert_same(load(tmp_path / "elsewhere" / "copy"), saved[1])


# ---------------------------------------------------------------------- by TransformerLens's own class


@pytest.mark.parametrize("cls", [HookedTransformer, HookedSAETransformer])
def test_transformer_lens_loads_what_was_saved(cls, saved):
    path, model = saved
    for loads in (cls.from_pretrained, cls.from_pretrained_no_processing):
        loaded = loads(str(path), device="cpu")
        assert isinstance(loaded, HookedBilinearTransformer)
        assert isinstance(loaded, cls)
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert cls.from_pretrained(str(path), dtype="float64").W_E.dtype == torch.float64
    with pytest.raises(TypeError, match=r"loaded as it was saved: .* got fold_ln, n_ctx"):
        cls.from_pretrained(str(path), fold_ln=True, n_ctx=5, center_unembed=False)
    with pytest.raises(TypeError, match="others by place"):
        cls.from_pretrained(str(path), True)


def test_transformer_lens_keeps_its_own_names(tmp_path, monkeypatch):
    """A folder of another kind, or a name, reaches TransformerLens's own loader."""
    seen = []

    def stop(name):
        seen.append(name)
        raise KeyError(name)

    loading = sys.modules["transformer_lens.HookedTransformer"].loading
    monkeypatch.setattr(loading, "get_official_model_name", stop)
    (tmp_path / "config.json").write_text("[")
    for name in (str(tmp_path), "gpt2"):
        with pytest.raises(KeyError):
            HookedTransformer.from_pretrained(name)
    assert seen == [str(tmp_path), "gpt2"]
    assert "Load in a Pretrained Model" in HookedTransformer.from_pretrained.__doc__
