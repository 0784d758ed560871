"""Text that was made with another tokenizer is refused, also where its vocabulary is no larger."""

import pytest

from tests.faults import files
from tests.models.building import bilinear_model
from tests.recipes.stories import make_stories
from tl_bilinear.models.huggingface import save_llama
from tl_bilinear.recipes.language import (
    FinetuneConfig,
    LanguageConfig,
    LanguageData,
    SAETrainingConfig,
    finetune,
    train_saes,
    train_tokenizer,
)
from tl_bilinear.recipes.language.llama import build_llama

REFUSED = r"the text in .* was made with another tokenizer than that of .*Prepare the text with"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return LanguageData.load(files.copy(files.text, tmp_path_factory.mktemp("text")) / "data")


@pytest.fixture(scope="module")
def other(data):
    """As many entries, for other words."""
    words = [story[::-1] for story in make_stories(60)]
    made = train_tokenizer(words, len(data.tokenizer))
    assert len(made) <= len(data.tokenizer)
    return made


def test_finetuning(data, other, tmp_path):
    config = LanguageConfig(**files.TINY, activation="swiglu")
    save_llama(build_llama(config, data.tokenizer, data.n_ctx), other, tmp_path / "model")
    given = {"folder": tmp_path / "run", "progress": False}
    with pytest.raises(ValueError, match=REFUSED):
        finetune(tmp_path / "model", data, FinetuneConfig(batch=4, steps=1), **given)
    assert not (tmp_path / "run").exists()
    save_llama(build_llama(config, data.tokenizer, data.n_ctx), data.tokenizer, tmp_path / "model")
    # A teacher of another tokenizer would teach other words.
    save_llama(build_llama(config, data.tokenizer, data.n_ctx), other, tmp_path / "teacher")
    distilled = FinetuneConfig(batch=4, steps=1, distill=0.5)
    with pytest.raises(ValueError, match=REFUSED):
        finetune(tmp_path / "model", data, distilled, teacher=tmp_path / "teacher", **given)


def test_saes(data, other, tmp_path):
    model = bilinear_model(d_vocab=len(data.tokenizer), n_ctx=data.n_ctx)
    config = SAETrainingConfig(k=2, tokens=100, batch=50)
    model.set_tokenizer(other)
    with pytest.raises(ValueError, match=REFUSED):
        train_saes(model, data, config, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
