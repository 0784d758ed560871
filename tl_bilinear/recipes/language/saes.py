"""Training SAEs around the bilinear layers of a model (Pearce et al. 2025, Table 3).

SAELens trains: its runner for several SAEs takes all their activations from one forward pass of the
model in memory. The settings are the paper's: TopK, a decoder of unit rows that the encoder starts
tied to, no encoder bias, no auxiliary loss.

>>> run = train_saes(model, "data", SAETrainingConfig(layers=(4,)), folder="runs/saes")
>>> run.evaluation.to_pandas()             # NMSE, L0, dead features, loss added and recovered (Fig. 21)
>>> features = FeatureInteractions(model, 4, run.sae(4, "resid_mid"), run.sae(4, "mlp_out"))

A run lives in a folder. Started again with the same settings it goes on from its last checkpoint, and
when it is finished it is only read:

    run.json            settings: what a later start is compared with
    checkpoints/        SAELens's, gone when the run is finished
    saes/4-mlp_out/     an SAE as SAELens writes it: SAE.load_from_disk
    evaluation.safetensors, result.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_bilinear.models.files import read_json, read_table, write_table
from tl_bilinear.models.huggingface import no_file_bars
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.runs import RESULT, SETTINGS, enter_run, require_finished
from tl_bilinear.tensor.storage import digest_of, whole_directory

if TYPE_CHECKING:
    from tl_bilinear.features.evaluation import SAEEvaluation

FORMAT = "tl_bilinear SAEs"
SAES, CHECKPOINTS, EVALUATION = "saes", "checkpoints", "evaluation.safetensors"
POINTS = ("mlp_in", "resid_mid", "mlp_out", "resid_pre", "resid_post", "attn_out")

_COMMAND = "tl-bilinear train saes"
_CHECKPOINTS = 5  # evenly spaced over a run; all are kept until it ends
_LAST_WRITTEN = "runner_cfg.json"  # of what SAELens puts into a checkpoint
_PROMPTS = 32  # rows of text in one forward pass


@dataclass(frozen=True)
class SAETrainingConfig:
    """The settings that decide the result; the defaults are the paper's (Table 3).

    Attributes
    ----------
    points: of POINTS; `mlp_in` is what the MLP reads, after the norm
    layers: count from 0; None for all
    k: features active on a token
    expansion: features for each dimension of the activations
    tokens, batch: in all, and a step
    learning_rate, final_learning_rate: along a cosine
    aux_loss: weight of SAELens's auxiliary loss, which revives dead features; worth trying where tokens
        are few
    buffer: batches of activations that are shuffled together
    """

    points: tuple[str, ...] = ("mlp_in", "resid_mid", "mlp_out")
    layers: tuple[int, ...] | None = None
    k: int = 30
    expansion: float = 4.0
    tokens: int = 150_000_000
    batch: int = 4096
    learning_rate: float = 1e-4
    final_learning_rate: float = 2e-5
    aux_loss: float = 0.0
    buffer: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("points", "layers"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) < len(given)):
                raise ValueError(f"{name} must name at least one, each once, got {given}")
        if unknown := sorted(set(self.points) - set(POINTS)):
            raise ValueError(f"unknown points {', '.join(unknown)}; there are {', '.join(POINTS)}")
        for name in ("k", "batch", "buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("expansion", "learning_rate", "final_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.aux_loss < 0:
            raise ValueError(f"aux_loss must not be negative, got {self.aux_loss}")
        if self.tokens < self.batch:
            raise ValueError(f"{self.tokens} tokens do not make one batch of {self.batch}")


@dataclass(frozen=True, eq=False)
class SAERun:
    """A finished run: SAEs by layer and point, and what they cost the model on validation text."""

    folder: Path
    config: SAETrainingConfig
    layers: tuple[int, ...]
    evaluation: SAEEvaluation

    def __str__(self) -> str:
        return f"{self.folder}: {self.evaluation}"

    def sae(self, layer: int, point: str, device: str | torch.device = "cpu") -> Any:
        """The SAELens SAE of one point. Raises KeyError, naming those that there are."""
        name = _name(layer, point)
        if name not in self.evaluation.names:
            there = ", ".join(self.evaluation.names)
            raise KeyError(f"no SAE {name} in {self.folder}; there are {there}")
        return _load_sae(self.folder, name, device)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> SAERun:
        """Read a finished run.

        Raises FileNotFoundError for a folder without one, ValueError for a damaged one.
        """
        from tl_bilinear.features.evaluation import SAEEvaluation

        folder = Path(folder).expanduser()
        stored = require_finished(folder, _COMMAND)
        given = read_table(folder / SETTINGS)["config"]
        try:
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in given.items()
            }
            config = SAETrainingConfig(**fields)
            evaluation = SAEEvaluation.load(folder / EVALUATION)
            return cls(folder, config, tuple(stored["layers"]), evaluation)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} was not written by this version of `{_COMMAND}`: {error}"
            ) from error


def train_saes(
    model: Any,
    data: LanguageData | str | PathLike[str],
    config: SAETrainingConfig | None = None,
    *,
    folder: str | PathLike[str],
    device: str | None = None,
    evaluate_on: int = 256,
    progress: bool = True,
) -> SAERun:
    """Train SAEs, or go on with a run that was interrupted, or read one that is finished.

    Parameters
    ----------
    model:
        A model with TransformerLens hooks; or the folder or hub name of a Llama with a linear gate, or
        of what `HookedBilinearTransformer.from_pretrained` reads.
    data:
        As `tl-bilinear data` writes it, with the model's tokenizer. [BOS] is left out.
    folder:
        Where the run lives. Two runs of different settings need two folders.
    device:
        Where model and SAEs are; default: the model's, or TransformerLens's choice.
    evaluate_on:
        Rows of validation text.

    A run that goes on starts with freshly shuffled activations, so it ends close to the uninterrupted
    one, not at the same bits. Ctrl-C and SIGTERM write a checkpoint first; they are SAELens's while it
    trains, which needs the main thread.

    Raises ValueError for settings that contradict the model, the data or the folder; FileExistsError
    for a folder that holds something else.
    """
    from tl_bilinear.features.evaluation import evaluate_saes

    config = SAETrainingConfig() if config is None else config
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    folder = Path(folder).expanduser().resolve()
    model = load_hooked(model, device)
    layers = _require_fit(model, data, config)
    made_from = {
        "fingerprint": data.fingerprint,
        "n_ctx": data.n_ctx,
        "model": digest_of(dict(model.state_dict()), {}),
        "evaluate_on": evaluate_on,
    }
    enter_run(folder, FORMAT, _plain(config), made_from, _COMMAND)
    if (folder / RESULT).is_file():
        return SAERun.load(folder)

    names = [(layer, point) for layer in layers for point in config.points]
    if not all((folder / SAES / _name(*each)).is_dir() for each in names):
        _train(model, data, config, names, folder, progress)
    rows = data.validation.with_format("torch")[:evaluate_on]["input_ids"].long()
    saes = {_name(*each): _load_sae(folder, _name(*each), model.cfg.device) for each in names}
    evaluation = evaluate_saes(model, saes, rows.to(model.cfg.device), progress=progress)
    evaluation.save(folder / EVALUATION)
    write_table(folder / RESULT, {"layers": list(layers)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return SAERun.load(folder)


def _load_sae(folder: Path, name: str, device: str | torch.device) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(folder / SAES / name, device=str(device))


def load_hooked(model: Any, device: str | None = None) -> Any:
    """A model with TransformerLens hooks: the object itself, or from a folder or hub name.

    Raises what `HookedBilinearTransformer.from_hf` and `from_pretrained` raise.
    """
    if not isinstance(model, str | PathLike):
        return model if device is None else model.to(device)
    from tl_bilinear.models import HookedBilinearTransformer, pretrained
    from tl_bilinear.models.files import CONFIG

    stored = read_json(pretrained.find_source(HookedBilinearTransformer, model).require(CONFIG))
    load = (
        HookedBilinearTransformer.from_hf
        if stored.get("model_type") == "llama"
        else HookedBilinearTransformer.from_pretrained
    )
    with no_file_bars():
        return load(model, device=device)


def hook_of(layer: int, point: str) -> str:
    """TransformerLens's name of a point, such as ``blocks.4.hook_resid_mid``."""
    from tl_bilinear.features.published import HOOKS

    return HOOKS[point.replace("_", "-")].format(layer)


# ---------------------------------------------------------------------- SAELens


def _train(
    model: Any,
    data: LanguageData,
    config: SAETrainingConfig,
    names: list[tuple[int, str]],
    folder: Path,
    progress: bool,
) -> None:
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
        with whole_directory(folder / SAES / name, lambda place: True) as staging:
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
        _name(*each): TopKTrainingSAEConfig(
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
    steps = config.tokens // config.batch
    last = _last(folder)
    settings = MultiSAETrainingRunnerConfig(
        saes=sae_configs,
        hook_names={_name(*each): hook_of(*each) for each in names},
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
            whole.append(path.parent)
    return max(whole, key=_tokens_of, default=None)


def _tokens_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name) if checkpoint else 0


@contextlib.contextmanager
def _quietly(progress: bool) -> Iterator[None]:
    """Without SAELens's remarks on data and a model from memory, and without its bar if so wished."""
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
    """SAELens takes Ctrl-C and SIGTERM for itself; afterwards they are the caller's again."""
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------- checks and names


def _name(layer: int, point: str) -> str:
    return f"{layer}-{point}"


def _plain(config: SAETrainingConfig) -> dict[str, Any]:
    """As JSON gives it back."""
    given = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


def _require_fit(model: Any, data: LanguageData, config: SAETrainingConfig) -> tuple[int, ...]:
    cfg = model.cfg
    layers = tuple(range(cfg.n_layers)) if config.layers is None else config.layers
    if outside := [layer for layer in layers if not 0 <= layer < cfg.n_layers]:
        raise ValueError(f"no layers {outside}: the model's are 0 to {cfg.n_layers - 1}")
    if data.n_ctx > cfg.n_ctx:
        raise ValueError(
            f"rows of {data.n_ctx} tokens are longer than the model's context of {cfg.n_ctx}: prepare "
            f"the text again with `tl-bilinear data --context {cfg.n_ctx}`"
        )
    if len(data.tokenizer) > cfg.d_vocab:
        raise ValueError(
            f"the text is tokenized with {len(data.tokenizer)} entries, the model has {cfg.d_vocab}: "
            "prepare it again with the model's tokenizer (`tl-bilinear data --tokenizer MODEL`)"
        )
    if config.k > round(config.expansion * cfg.d_model):
        raise ValueError(
            f"k={config.k} features cannot be active of {round(config.expansion * cfg.d_model)}: "
            "choose a smaller k or a larger expansion"
        )
    missing = [
        hook_of(layer, point)
        for layer in layers
        for point in config.points
        if hook_of(layer, point) not in model.hook_dict
    ]
    if missing:
        raise ValueError(f"the model has no hook {', '.join(missing)}")
    return layers
