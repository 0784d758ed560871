"""Language models with gated MLPs, bilinear or not (Pearce et al. 2025, section 5, appendices F, G).

Text becomes a tokenizer (`make_tokenizer`) and rows of tokens (`prepare_text`), rows become a model
(`train_language_model`) that is a Hugging Face Llama and a HookedBilinearTransformer, with SAEs around
its layers (`train_saes`). A trained Llama with another gate is made bilinear (`finetune`).
"""

from tl_bilinear.recipes.language.compare import ActivationComparison, compare_activations
from tl_bilinear.recipes.language.data import LanguageData, pack_stories, prepare_text
from tl_bilinear.recipes.language.finetune import (
    FinetuneComparison,
    FinetuneConfig,
    FinetuneRun,
    compare_finetuning,
    finetune,
)
from tl_bilinear.recipes.language.saes import SAERun, SAETrainingConfig, train_saes
from tl_bilinear.recipes.language.text import Cleaner, CleaningReport, clean_story, read_stories
from tl_bilinear.recipes.language.tokenizer import load_tokenizer, make_tokenizer, train_tokenizer
from tl_bilinear.recipes.language.train import (
    ACTIVATIONS,
    CONFIGS,
    LanguageConfig,
    LanguageRun,
    choose_config,
    language_loss,
    sample_stories,
    sample_text,
    train_language_model,
)

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
    "SAERun",
    "SAETrainingConfig",
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
