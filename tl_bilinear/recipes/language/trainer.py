"""transformers' Trainer, with a teacher, a clock, and checkpoints that are whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.recipes.language.checkpoints import keep_checkpoint
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.distillation import Distillation
from tl_bilinear.recipes.language.llama import Collate
from tl_bilinear.recipes.language.run_folder import is_first_process, wait_for_all


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
            self.seconds = seconds

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._mark = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds, self._mark = self.seconds + now - self._mark, now

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
    if distillation is not None:
        distillation.teacher.to(arguments.device)
    trainer = RecipeTrainer(
        llama,
        arguments,
        data_collator=Collate(data.tokenizer.bos_token_id),
        train_dataset=data.train.with_format("numpy").select(range(rows)),
        eval_dataset=data.validation.with_format("numpy"),
        callbacks=[Clock(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
