"""Training tensor transformers: what comes out is hooked, and without norms it is one polynomial."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer

from tl_bilinear import BilinearTensor
from tl_bilinear.circuits import tensor_polynomial
from tl_bilinear.models import TensorTransformer
from tl_bilinear.models.tensor_language_model import TensorLanguageModel
from tl_bilinear.recipes.language import LanguageConfig, LanguageRun, train_language_model
from tl_bilinear.recipes.language.llama import build_language_model, language_loss

TINY = LanguageConfig(
    n_layers=2,
    d_model=16,
    d_mlp=32,
    n_heads=2,
    batch=16,
    steps=20,
    learning_rate=1e-2,
    attention="product",
)
OPTIONS = {"device": "cpu", "progress": False, "precision": "fp32"}


@pytest.fixture(scope="module", params=["norms", "no norms", "squared"])
def run(request, story_data, tmp_path_factory):
    changes = {"norms": {}, "no norms": {"norm": False}, "squared": {"attention": "squared"}}
    config = dataclasses.replace(TINY, **changes[request.param])
    folder = tmp_path_factory.mktemp("tensor") / "run"
    return train_language_model(story_data, config, folder=folder, **OPTIONS)


def test_it_starts_at_nothing_and_learns(run, story_data):
    untrained = build_language_model(run.config, story_data.tokenizer, story_data.n_ctx)
    assert not untrained(torch.zeros(1, 3, dtype=torch.long)).logits.any()
    before = language_loss(untrained, story_data.validation, bos=1)
    assert_close(before, float(torch.tensor(180.0).log()))
    assert run.loss < before - 0.5
    assert f"bilinear, {run.config.attention} attention" in str(run)
    assert run.sample
    again = LanguageRun.load(run.folder)
    measured = language_loss(again.llama(), story_data.validation, bos=1)
    assert abs(measured - run.loss) < 1e-4


def test_the_hooked_model_computes_the_same(run, story_data):
    trained, hooked = run.llama(), run.hooked()
    assert type(trained) is TensorLanguageModel
    assert type(hooked) is TensorTransformer
    tokens = torch.as_tensor(story_data.validation[:2]["input_ids"]).long()
    logits = trained(tokens).logits
    assert_close(hooked(tokens), logits, rtol=0, atol=1e-5 * max(1.0, float(logits.abs().max())))
    assert hooked.cfg.n_ctx == story_data.n_ctx
    assert hooked.to_tokens("once upon a time").ndim == 2
    assert BilinearTensor.from_model(hooked, 1).shape == (16, 16, 16)


def test_a_trained_model_is_one_polynomial(run, story_data):
    tokens = torch.as_tensor(story_data.validation[0]["input_ids"]).long()
    model = run.hooked(dtype=torch.float64)
    if run.config.attention == "squared":
        with pytest.raises(ValueError, match="divides by its row's sum"):
            tensor_polynomial(model)
        return
    held = tokens if run.config.norm else None
    logits, cache = model.run_with_cache(tokens[None])
    found = tensor_polynomial(model, held)(cache["hook_embed"][0])
    if run.config.norm:
        found = 30 * torch.tanh(found / 30)
    assert_close(found, logits[0], rtol=0, atol=1e-8)


def test_interrupted_and_started_again(story_data, tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, steps=6)
    whole = train_language_model(story_data, config, folder=tmp_path / "whole", **OPTIONS)
    original, left = Trainer.training_step, [4]

    def step(trainer, *args, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt, match="goes on from step 3 of 6"):
        train_language_model(story_data, config, folder=tmp_path / "parts", **OPTIONS)
    again = train_language_model(story_data, config, folder=tmp_path / "parts", **OPTIONS)
    for one, other in zip(whole.llama().parameters(), again.llama().parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "linear"},
            "unknown attention 'linear'; there are softmax, product, squared",
        ),
        ({"attention": "softmax", "norm": False}, "norm=False needs attention='product'"),
        ({"activation": "geglu"}, "its activation is bilinear or swiglu"),
        ({"bias": True}, "its only bias that of the MLP's output"),
        ({"d_mlp": 24}, "its d_mlp a multiple of d_model; got bilinear, bias=False, 24 and 16"),
    ],
)
def test_settings_that_make_no_tensor_transformer(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


def test_padded_text_is_refused(story_data):
    model = build_language_model(TINY, story_data.tokenizer, story_data.n_ctx)
    with pytest.raises(ValueError, match="padded text is not supported"):
        model(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]]))
