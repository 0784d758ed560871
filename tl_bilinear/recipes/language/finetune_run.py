"""Making a gated Llama bilinear by finetuning (Pearce et al. 2025, appendix H).

While the model trains, the activation on its gates turns into an affine function (`annealing`), along
the path "affine" or "beta". At the end that function is folded into weights and biases, so the result
is a plain Llama with ``hidden_act="linear"``. On the path "closed" the model is bilinear from the first
step: each layer is replaced by its closed form, output map refitted and, with ``extra``, neurons
added, and the run recovers what that lost. On the path "none", the baseline, the gates stay as they
were.

With ``distill`` a frozen teacher adds its predictions to what the model learns (`Distillation`): the
model as it was or, in a comparison, the finished baseline, which knows the text as well.

>>> data = LanguageData.load("data")                  # `tl-bilinear data ... --tokenizer MODEL`
>>> run = finetune("MODEL", data, FinetuneConfig(), folder="runs/finetune")
>>> run.loss, run.hooked()                            # a HookedBilinearTransformer
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tl_bilinear.io import digest_of
from tl_bilinear.models.approximation import (
    approximate_llama,
    require_gated_llama,
    to_bilinear_llama,
)
from tl_bilinear.models.files import require_numbers
from tl_bilinear.models.huggingface import (
    load_llama,
    load_tokenizer,
    no_file_bars,
    read_llama,
    read_llama_config,
)
from tl_bilinear.recipes.language.annealing import (
    annealing_callback,
    even_progress,
    final_gates,
    fold_gates,
    gate_pool,
    install_gates,
)
from tl_bilinear.recipes.language.config import FinetuneConfig, LoopConfig, RunOptions
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.distillation import Distillation
from tl_bilinear.recipes.language.language_run import LanguageRun
from tl_bilinear.recipes.language.tokenizer import require_same_tokenizer
from tl_bilinear.recipes.language.train import complete_run


@dataclass(frozen=True, eq=False)
class FinetuneRun(LanguageRun):
    """A finished run, as `LanguageRun`. Its model is bilinear, unless the path is "none"."""

    config: FinetuneConfig  # type: ignore[assignment]  # its settings, in place of a whole model's

    config_type: ClassVar[type[LoopConfig]] = FinetuneConfig
    command: ClassVar[str] = "tl-bilinear finetune"

    def __str__(self) -> str:
        path, schedule, anneal = (getattr(self.config, n) for n in ("path", "schedule", "anneal"))
        how = f"path {path!r}" + (f", {schedule} over {anneal:.0%}" if self.config.anneals else "")
        how += f", {self.config.extra} neurons more" if self.config.extra else ""
        how += f", distilled {self.config.distill:.0%}" if self.config.distill else ""
        return (
            f"{self.folder}: {how}; {self.tokens:,} tokens in {self.seconds:.0f} s\n"
            f"validation loss {self.loss:.4f} nats a token"
        )


def finetune(
    model: str | PathLike[str],
    data: LanguageData | str | PathLike[str],
    config: FinetuneConfig = FinetuneConfig(),
    *,
    folder: str | PathLike[str],
    teacher: str | PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> FinetuneRun:
    """Finetune a gated Llama until it is bilinear, go on with such a run, or read a finished one.

    Parameters
    ----------
    model:
        A folder with a Hugging Face Llama (any activation on the gate, grouped-query attention, tied
        embeddings), or its name on the hub.
    data:
        Rows made with its own tokenizer: `tl-bilinear data SOURCE --tokenizer MODEL`. The tokenizer
        beside the model is compared; of a model without one, only the size of its vocabulary.
    teacher:
        With `config.distill`: a causal language model of the same vocabulary, a folder or a name.
        Default: the model as it was, which knows of the text only what it was trained on.
    folder, options:
        As for `train_language_model`, and errors as there.

    Raises TypeError for a model that is no Llama; ValueError for text of another tokenizer or longer
    rows than the model or the teacher reads, or an activation that the path does not lead away from.
    """
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    if config.extra and config.path != "closed":
        raise ValueError(
            f"extra={config.extra} neurons are added on path='closed' alone, got path={config.path!r}"
        )
    start = load_gated_llama(model, data)  # refused, if it is, before the folder is claimed
    made_from = {"model": _digest(start), "teacher": ""}
    distillation: Distillation | None = None
    if config.distill:
        teaches = start if teacher is None else _load_teacher(teacher, start, data)
        made_from["teacher"] = _digest(teaches)
        distillation = Distillation(teaches, config.distill)
    rows = torch.tensor(data.train[: config.fit_rows]["input_ids"])
    even: Tensor | None = None

    def build() -> Any:
        nonlocal even
        llama = load_gated_llama(model, data)
        if config.path == "none":
            return llama
        if config.path == "closed":
            fitted = approximate_llama(
                llama, rows, extra=config.extra, warn_below=-math.inf, progress=progress
            )
            return to_bilinear_llama(llama, {n: one.tensor for n, one in fitted.items()}).train()
        gates = final_gates(llama, config.path, rows, progress=progress)
        if config.schedule == "even" and config.path == "beta":
            pool = gate_pool(llama, rows, progress=progress)
            even = even_progress(llama.model.layers[0].mlp.act_fn, pool)
        install_gates(llama, config.path, gates)
        return llama.train()

    def restore(checkpoint: Path) -> Any:
        if not config.anneals:
            return load_llama(checkpoint)
        return fold_gates(load_gated_llama(model, data), config.path, checkpoint)

    complete_run(
        folder,
        config,
        data,
        command=FinetuneRun.command,
        build=build,
        restore=restore,
        made_from=made_from,
        callbacks=lambda llama: [annealing_callback(llama, config, even)] if config.anneals else [],
        distillation=distillation,
        options=RunOptions(**options),
        progress=progress,
    )
    return FinetuneRun.load(folder)


def _digest(llama: Any) -> str:
    return digest_of(llama.state_dict(), {"hidden_act": getattr(llama.config, "hidden_act", None)})


def _source(model: str | PathLike[str]) -> str:
    """A folder, or else a name on the hub."""
    folder = Path(model).expanduser()
    return str(folder if folder.exists() else model)


def _load_teacher(teacher: str | PathLike[str], llama: Any, data: LanguageData) -> Any:
    from transformers import AutoModelForCausalLM

    with no_file_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(_source(teacher), dtype=torch.float32)
    vocabulary = loaded.config.vocab_size
    longest = getattr(loaded.config, "max_position_embeddings", data.n_ctx)  # some have no limit
    if vocabulary != llama.config.vocab_size or longest < data.n_ctx:
        raise ValueError(
            f"the teacher {teacher} has a vocabulary of {vocabulary} and reads {longest} tokens; "
            f"it must have the model's tokenizer, of {llama.config.vocab_size}, and read rows of "
            f"{data.n_ctx}"
        )
    require_same_tokenizer(data, load_tokenizer(_source(teacher)), f"the teacher {teacher}")
    require_numbers(str(teacher), loaded.state_dict())
    return loaded


def load_gated_llama(model: str | PathLike[str], data: LanguageData) -> Any:
    """The Llama to finetune, which has to fit this text.

    Raises ValueError where it does not, or where it is no gated Llama.
    """
    source = _source(model)
    config = read_llama_config(source)
    if config.model_type != "llama":
        raise ValueError(
            f"{model} is a {config.model_type!r} model; only a Llama can be stored with a linear gate. "
            "approximate reads single layers of other gated models"
        )
    if config.hidden_act in ("linear", "identity"):
        raise ValueError(f"{model} is bilinear already (hidden_act={config.hidden_act!r})")
    if len(data.tokenizer) > config.vocab_size or data.n_ctx > config.max_position_embeddings:
        raise ValueError(
            f"the text has a vocabulary of {len(data.tokenizer)} and rows of {data.n_ctx} tokens, "
            f"{model} takes {config.vocab_size} and {config.max_position_embeddings}: prepare the text "
            "with the model's tokenizer (`tl-bilinear data SOURCE --tokenizer MODEL --n-ctx N`)"
        )
    require_same_tokenizer(data, load_tokenizer(source), str(model))
    with no_file_bars():
        llama = read_llama(source, config, torch.float32)
    require_gated_llama(llama)
    return llama
