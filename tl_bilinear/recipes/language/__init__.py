"""Language models with gated MLPs, bilinear or not (Pearce et al. 2025, section 5, appendices F, G).

Text becomes a tokenizer (`make_tokenizer`) and rows of tokens (`prepare_text`). Rows become a model
(`train_language_model`) that is a Hugging Face Llama and a HookedBilinearTransformer, with SAEs around
its layers (`train_saes`). A trained Llama with another gate is made bilinear (`finetune`).

`config` has the settings of all of them. What trains is loaded at first use, so that reading the
settings is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tl_bilinear.recipes.language.config import (
    ACTIVATIONS,
    CONFIGS,
    FinetuneConfig,
    LanguageConfig,
    RunOptions,
    SAETrainingConfig,
    TextConfig,
    TokenizerConfig,
    choose_config,
)

if TYPE_CHECKING:
    from tl_bilinear.recipes.language.comparison import (
        ActivationComparison,
        FinetuneComparison,
        compare_activations,
        compare_finetuning,
    )
    from tl_bilinear.recipes.language.data import LanguageData, prepare_text
    from tl_bilinear.recipes.language.finetune_run import FinetuneRun, finetune
    from tl_bilinear.recipes.language.language_run import LanguageRun
    from tl_bilinear.recipes.language.llama import language_loss
    from tl_bilinear.recipes.language.packing import pack_stories
    from tl_bilinear.recipes.language.saes import SAERun, train_saes
    from tl_bilinear.recipes.language.sampling import sample_stories, sample_text
    from tl_bilinear.recipes.language.text import (
        Cleaner,
        CleaningReport,
        clean_story,
        read_stories,
    )
    from tl_bilinear.recipes.language.tokenizer import (
        load_tokenizer,
        make_tokenizer,
        train_tokenizer,
    )
    from tl_bilinear.recipes.language.train import train_language_model

__all__ = [
    "ACTIVATIONS",
    "CONFIGS",
    "ActivationComparison",
    "Cleaner",
    "CleaningReport",
    "FinetuneComparison",
    "FinetuneConfig",
    "FinetuneRun",
    "LanguageConfig",
    "LanguageData",
    "LanguageRun",
    "RunOptions",
    "SAERun",
    "SAETrainingConfig",
    "TextConfig",
    "TokenizerConfig",
    "choose_config",
    "clean_story",
    "compare_activations",
    "compare_finetuning",
    "finetune",
    "language_loss",
    "load_tokenizer",
    "make_tokenizer",
    "pack_stories",
    "prepare_text",
    "read_stories",
    "sample_stories",
    "sample_text",
    "train_language_model",
    "train_saes",
    "train_tokenizer",
]

_NAMES = {  # of each module, loaded at first use
    "comparison": "ActivationComparison FinetuneComparison compare_activations compare_finetuning",
    "data": "LanguageData prepare_text",
    "finetune_run": "FinetuneRun finetune",
    "language_run": "LanguageRun",
    "llama": "language_loss",
    "packing": "pack_stories",
    "saes": "SAERun train_saes",
    "sampling": "sample_stories sample_text",
    "text": "Cleaner CleaningReport clean_story read_stories",
    "tokenizer": "load_tokenizer make_tokenizer train_tokenizer",
    "train": "train_language_model",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
