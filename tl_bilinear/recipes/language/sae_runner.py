"""SAELens's runner for several SAEs at once, on a model and data in memory, resumable."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.io import read_table, whole_directory
from tl_bilinear.recipes.language.config import SAETrainingConfig
from tl_bilinear.recipes.language.data import LanguageData

SAES, CHECKPOINTS = "saes", "checkpoints"

_CHECKPOINTS = 5  # evenly spaced over a run; all are kept until it ends
_LAST_WRITTEN = "runner_cfg.json"  # of what SAELens puts into a checkpoint
_PROMPTS = 32  # rows of text in one forward pass


def name_of(layer: int, point: str) -> str:
    """The name of an SAE and of its folder, such as ``4-resid_mid``."""
    return f"{layer}-{point}"


def hook_of(layer: int, point: str) -> str:
    """TransformerLens's name of a point, such as ``blocks.4.hook_resid_mid``."""
    from tl_bilinear.features.published_saes import HOOKS

    return HOOKS[point.replace("_", "-")].format(layer)


def train_together(
    model: Any,
    data: LanguageData,
    config: SAETrainingConfig,
    names: list[tuple[int, str]],
    folder: Path,
    progress: bool,
) -> None:
    """Train the SAEs of all `names` (layer, point) and write each to its folder in `folder`/saes.

    Raises KeyboardInterrupt, saying where the same command goes on.
    """
    from sae_lens import MultiSAETrainingRunner
    from sae_lens.multi_sae_training_runner import InterruptedException

    bos = data.tokenizer.bos_token_id
    with _quietly(progress), _own_signals(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        settings, saes = _settings(model, config, names, folder, bos, data.n_ctx)
        runner = MultiSAETrainingRunner(
            settings,
            # A copy: SAELens sets the format of the one that it is given.
            override_dataset=data.train.with_format("torch"),
            override_model=model,
            override_saes=saes,
        )
        try:
            trained = runner.run()
        except (KeyboardInterrupt, InterruptedException):
            raise KeyboardInterrupt(
                f"interrupted; the same command goes on from token {_tokens_of(_last(folder)):,} of "
                f"{config.tokens:,}"
            ) from None
    for name, sae in trained.items():
        with whole_directory(folder / SAES / name, "sae") as staging:
            sae.save_inference_model(str(staging))


def _settings(
    model: Any,
    config: SAETrainingConfig,
    names: list[tuple[int, str]],
    folder: Path,
    bos: int,
    n_ctx: int,
) -> tuple[Any, dict[str, Any]]:
    """SAELens's config of the run, and the untrained SAEs."""
    from sae_lens import (
        LoggingConfig,
        MultiSAETrainingRunnerConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    device, width = str(model.cfg.device), model.cfg.d_model
    sae_configs = {
        name_of(*each): TopKTrainingSAEConfig(
            d_in=width,
            d_sae=round(config.expansion * width),
            k=config.k,
            decoder_init_norm=1.0,  # the encoder starts as its transpose
            rescale_acts_by_decoder_norm=True,  # as if its rows were unit: folded exactly at the end
            aux_loss_coefficient=config.aux_loss,
            normalize_activations="none",
            dtype="float32",
            device=device,
        )
        for each in names
    }
    saes = {}
    for name, sae_config in sae_configs.items():
        saes[name] = TopKTrainingSAE(sae_config)
        saes[name].b_enc.requires_grad_(False)  # starts at zero and stays there
    assert config.tokens is not None  # `train_saes` sets them
    steps = config.tokens // config.batch
    last = _last(folder)
    settings = MultiSAETrainingRunnerConfig(
        saes=sae_configs,
        hook_names={name_of(*each): hook_of(*each) for each in names},
        model_name=model.cfg.model_name or "bilinear",
        model_class_name="HookedTransformer",
        model_from_pretrained_kwargs={},
        dataset_path="in-memory",
        streaming=False,
        context_size=n_ctx,
        training_tokens=steps * config.batch,
        train_batch_size_tokens=config.batch,
        store_batch_size_prompts=_PROMPTS,
        n_batches_in_buffer=-(-config.buffer * config.batch // n_ctx),  # SAELens counts rows
        prepend_bos=True,
        exclude_special_tokens=[bos],
        lr=config.learning_rate,
        lr_end=config.final_learning_rate,
        lr_scheduler_name="cosineannealing",
        dead_feature_window=max(1, min(1000, steps // 20)),
        device=device,
        dtype="float32",
        seed=config.seed,
        n_checkpoints=_CHECKPOINTS,
        checkpoint_path=str(folder / CHECKPOINTS),
        resume_from_checkpoint=None if last is None else str(last),
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False, wandb_id="run"),  # which names the folder
    )
    return settings, saes


def _last(folder: Path) -> Path | None:
    """The last checkpoint that is whole: SAELens writes the settings into it last."""
    whole = []
    for path in (folder / CHECKPOINTS).glob(f"*/*/{_LAST_WRITTEN}"):
        with contextlib.suppress(ValueError):
            read_table(path)
            if path.parent.name.isdecimal():
                whole.append(path.parent)
    return max(whole, key=_tokens_of, default=None)


def _tokens_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name) if checkpoint else 0


@contextlib.contextmanager
def _quietly(progress: bool) -> Iterator[None]:
    """Silence SAELens's remarks on data and a model from memory, and its progress bar if so wished."""
    logger = logging.getLogger("sae_lens")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*training dataset contains fewer samples.*")
            warnings.filterwarnings("ignore", message=".*beginning new epoch.*")
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")
            if not progress:
                sink = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(sink))
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Give Ctrl-C and SIGTERM back to the caller after the block: SAELens takes them for itself."""
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
