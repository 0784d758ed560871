"""transformers' Trainer, with a teacher, a clock, and checkpoints that are whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_bilinear.recipes.language.checkpoints import keep_checkpoint
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.distillation import Distillation
from tl_bilinear.recipes.language.llama import Collate
from tl_bilinear.recipes.language.run_folder import is_first_process, wait_for_all

_VALIDATION_SHARE = (
    0.25  # of the rows that training reads; a validated row costs about a third of one
)
_TIMED = 4  # steps after which a run says how long it will take


def validation_rows(available: int, trained: int, times: int) -> range:
    """Which rows a run of `trained` rows is validated on each of `times` times: some, evenly spaced.

    All of them where they are few beside what is trained; else so many that all validations together
    read a quarter of the rows that training reads, and at least 8. The result of a finished run is
    measured on all.
    """
    most = max(8, int(_VALIDATION_SHARE * trained / max(1, times)))
    return range(0, available, -(-available // most))


def make_trainer(
    folder: Path,
    llama: Any,
    data: LanguageData,
    arguments: Any,
    callbacks: Sequence[Any],
    distillation: Distillation | None,
    seconds: float,
) -> Any:
    """A Trainer of `llama` on whole batches of `data`, whose clock starts at `seconds`."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class RecipeTrainer(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            # Evaluation always measures the cross-entropy, whatever the model learns from.
            if distillation is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            with self.accelerator.autocast():
                divergence = distillation.divergence(outputs.logits, inputs)
            # Trainer's loss is a mean over the tokens of a step, in all micro batches and processes;
            # gradients are then averaged over processes.
            divergence *= self.accelerator.num_processes / num_items_in_batch
            loss = torch.lerp(loss, divergence, distillation.share)
            return (loss, outputs) if return_outputs else loss

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:  # torch, safetensors and Python each have their own kind
                raise OSError(
                    f"the checkpoint of step {self.state.global_step} cannot be written to {folder}: "
                    f"{error}. Make room and start again: the checkpoints before it are whole"
                ) from error

    class Clock(TrainerCallback):
        """Counts the seconds of the steps alone, and keeps each checkpoint once it is written."""

        def __init__(self) -> None:
            self.seconds, self._steps, self._first = seconds, 0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._mark = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds, self._mark = self.seconds + now - self._mark, now
            self._say_time(args, state)

        def _say_time(self, args: Any, state: Any) -> None:
            steps, left = self._steps + 1, state.max_steps - state.global_step
            self._steps = steps
            # The first step is slower than the others: it allocates.
            if steps == 1:
                self._first = self.seconds
            if steps != _TIMED or args.disable_tqdm or not left:
                return
            step = (self.seconds - self._first) / (_TIMED - 1)
            times = state.max_steps // args.eval_steps - state.global_step // args.eval_steps
            validating = times * len(validated) / batch * step / 3
            tqdm.write(
                f"about {_clock(left * step + validating)} left: {left} steps of {step:.2g} s, and "
                f"{times} validations of {len(validated):,} rows, {_clock(validating)}"
            )

        def on_evaluate(self, *_: Any, metrics: Any = None, **__: Any) -> None:
            if not math.isfinite((metrics or {}).get("eval_loss", 0.0)):
                raise ValueError(
                    f"training diverged: the validation loss is {metrics['eval_loss']}. Choose a "
                    f"smaller learning rate, and another folder or delete {folder}"
                )
            self._mark = time.perf_counter()

        def on_save(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            wait_for_all()
            if is_first_process():
                keep_checkpoint(folder, state.global_step, self.seconds)
            wait_for_all()
            self._mark = time.perf_counter()

    # Whole batches only, so that each step is the same for one process and for many.
    batch = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    rows = len(data.train) // batch * batch
    steps = arguments.max_steps
    validated = validation_rows(len(data.validation), steps * batch, steps // arguments.eval_steps)
    if distillation is not None:
        distillation.teacher.to(arguments.device)
    trainer = RecipeTrainer(
        llama,
        arguments,
        data_collator=Collate(data.tokenizer.bos_token_id),
        train_dataset=data.train.with_format("numpy").select(range(rows)),
        eval_dataset=data.validation.with_format("numpy").select(validated),
        callbacks=[Clock(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
