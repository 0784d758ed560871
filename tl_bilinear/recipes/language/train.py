"""Training a language model with gated MLPs, bilinear or not (Pearce et al. 2025, Table 2).

The model is Hugging Face's ``LlamaForCausalLM`` and the loop is ``transformers.Trainer``, which brings
mixed precision, gradient accumulation and several processes (``accelerate launch``, ``torchrun``).

>>> data = LanguageData.load("data")                           # as `tl-bilinear data` writes it
>>> run = train_language_model(data, CONFIGS["small"], folder="runs/small")
>>> run.loss, run.hooked()                                     # a HookedBilinearTransformer

A run lives in a folder. Started again with the same settings, it goes on from its last checkpoint; once
it is finished, it is only read:

    run.json        the settings, which a later start is compared with
    checkpoint-N/   all that is needed to go on from step N
    model/          the trained model, an ordinary Hugging Face checkpoint with its tokenizer
    result.json     loss, time and the curve
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.io import write_json
from tl_bilinear.models.huggingface import no_file_bars, save_llama
from tl_bilinear.recipes.language.checkpoints import (
    WRITING,
    last_checkpoint,
    place_to_write,
    require_whole,
    seconds_of,
    step_of,
)
from tl_bilinear.recipes.language.config import CONFIGS, LanguageConfig, LoopConfig, RunOptions
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.distillation import Distillation
from tl_bilinear.recipes.language.language_run import MODEL, LanguageRun
from tl_bilinear.recipes.language.llama import (
    build_language_model,
    language_loss,
    load_language_model,
)
from tl_bilinear.recipes.language.run_folder import (
    RESULT,
    is_first_process,
    wait_for_all,
    work_in,
)
from tl_bilinear.recipes.language.sampling import sample_text
from tl_bilinear.recipes.language.trainer import make_trainer

FORMAT = "tl_bilinear language run"

_CHECKPOINTS = 10  # evenly spaced over a run
_LARGEST_MICRO_BATCH = 64


def train_language_model(
    data: LanguageData | str | PathLike[str],
    config: LanguageConfig = CONFIGS["paper"],
    *,
    folder: str | PathLike[str],
    progress: bool = True,
    **options: Any,
) -> LanguageRun:
    """Train a model, go on with a run that was interrupted, or read one that is finished.

    Parameters
    ----------
    folder:
        Where the run lives. Two runs of different settings need two folders.
    options:
        Fields of `RunOptions`: micro_batch, precision, device, report_to. They do not change the result,
        and neither do the number of processes and interruptions (up to rounding).

    Raises ValueError for settings that contradict the data, the folder or each other;
    FileExistsError for a folder that holds something else; OSError where a checkpoint cannot be
    written (the ones before it are whole).
    """
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    complete_run(
        folder,
        config,
        data,
        command=LanguageRun.command,
        build=lambda: build_language_model(config, data.tokenizer, data.n_ctx),
        restore=load_language_model,
        options=RunOptions(**options),
        progress=progress,
    )
    return LanguageRun.load(folder)


def complete_run(
    folder: str | PathLike[str],
    config: LoopConfig,
    data: LanguageData,
    *,
    command: str,
    build: Callable[[], Any],
    restore: Callable[[Path], Any],
    made_from: Mapping[str, str] = {},
    callbacks: Callable[[Any], Sequence[Any]] = lambda llama: (),
    distillation: Distillation | None = None,
    options: RunOptions,
    progress: bool,
) -> None:
    """Bring the run in a folder to its end, from wherever it stands; see `train_language_model`.

    `build` makes the Llama to train, and `restore` the final model from the last checkpoint. `callbacks`
    gives Trainer's callbacks for a Llama, `distillation` a teacher that it learns from beside the text.
    `made_from` tells what the run depends on, besides config and data, from others of its kind.
    """
    folder = Path(folder).expanduser().resolve()
    steps = config.total_steps(len(data.train))
    arguments = _arguments(folder, config, options, steps, progress)
    depends_on = {
        "fingerprint": data.fingerprint,
        "n_ctx": data.n_ctx,
        "vocabulary": len(data.tokenizer),
        **made_from,
    }
    with ExitStack() as stack:
        if is_first_process():
            settings = dataclasses.asdict(config)
            stack.enter_context(work_in(folder, FORMAT, settings, depends_on, command))
        wait_for_all()
        if (folder / RESULT).is_file():
            return
        for each in (_own_random_numbers(), place_to_write(folder), no_file_bars()):
            stack.enter_context(each)
        last = last_checkpoint(folder)
        require_whole(last)
        # Trainer, started at the last step in the middle of an epoch, would take one step more.
        if step_of(last) < steps:
            llama = build()
            trainer = make_trainer(
                folder, llama, data, arguments, callbacks(llama), distillation, seconds_of(last)
            )
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except KeyboardInterrupt:
                step = step_of(last_checkpoint(folder))
                raise KeyboardInterrupt(
                    f"interrupted; the same command goes on from step {step} of {steps}"
                ) from None
        last = last_checkpoint(folder)
        assert last is not None  # training ends with one
        require_whole(last)
        _finish(folder, last, restore(last), config, data, arguments)


def _arguments(
    folder: Path, config: LoopConfig, options: RunOptions, steps: int, progress: bool
) -> Any:
    from transformers import TrainingArguments

    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = _micro_batch(config.batch, world, options.micro_batch)
    if "tensorboard" in options.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    every = math.ceil(steps / _CHECKPOINTS)
    # Said outright: transformers refuses bf16 on a processor that it was not told to use.
    use_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    accelerated = not use_cpu and torch.cuda.is_available()
    precision = options.precision
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if accelerated else _processor_has_bf16()
        precision = "bf16" if fast else "fp32"
    arguments = TrainingArguments(
        output_dir=str(folder / WRITING),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=config.batch // (micro_batch * world),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup * steps),
        optim="adamw_torch_fused",
        seed=config.seed,
        data_seed=config.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=use_cpu,
        ddp_backend="gloo" if world > 1 and not accelerated else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=accelerated,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=max(1, steps // 100),
        prediction_loss_only=True,
        report_to=list(options.report_to) or "none",
        disable_tqdm=not progress,
    )
    # One process uses one GPU: left to itself, Trainer gives each of them a batch (nn.DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _micro_batch(batch: int, world: int, wanted: int | None) -> int:
    if batch % world:
        raise ValueError(f"a batch of {batch} rows does not divide among {world} processes")
    share = batch // world
    if wanted is None:
        return max(m for m in range(1, min(share, _LARGEST_MICRO_BATCH) + 1) if share % m == 0)
    if wanted < 1 or share % wanted:
        raise ValueError(
            f"micro_batch={wanted} does not divide the {share} rows that each of {world} processes "
            f"takes of a batch of {batch}"
        )
    return wanted


def _processor_has_bf16() -> bool:
    """Whether the processor computes in bf16 itself: emulated, it is slower than fp32."""
    # An older PyTorch does not tell.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _finish(
    folder: Path, last: Path, llama: Any, config: LoopConfig, data: LanguageData, arguments: Any
) -> None:
    """Measure the model of the last checkpoint, and write it and the result."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    llama = llama.to(arguments.device)
    bos, batch_size = data.tokenizer.bos_token_id, arguments.per_device_eval_batch_size
    loss = language_loss(llama, data.validation, bos, batch_size)
    if not math.isfinite(loss):
        raise ValueError(
            f"the model of {last} has a validation loss of {loss}: training diverged. Choose a smaller "
            "learning rate, and another folder or delete this one"
        )
    if is_first_process():
        result = {
            "loss": loss,
            "parameters": sum(p.numel() for n, p in llama.named_parameters() if "norm" not in n),
            "steps": state.global_step,
            "tokens": state.global_step * config.batch * data.n_ctx,
            "seconds": seconds_of(last),
            "sample": sample_text(llama, data.tokenizer),
            "history": _history(state.log_history),
        }
        llama.config.use_cache = True  # which Trainer turned off
        save_llama(llama.cpu(), data.tokenizer, folder / MODEL)
        write_json(folder / RESULT, result)
    wait_for_all()


def _history(logged: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    names = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    entries = [{name: entry[name] for name in names if name in entry} for entry in logged]
    return [entry for entry in entries if "loss" in entry or "eval_loss" in entry]


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Give the caller's random numbers back after the block: Trainer seeds every generator there is."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()  # noqa: NPY002  what Trainer seeds
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)  # noqa: NPY002
