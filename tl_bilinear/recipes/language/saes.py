"""Training SAEs around the bilinear layers of a model (Pearce et al. 2025, Table 3).

SAELens trains them: its runner for several SAEs takes all their activations from one forward pass of the
model in memory. The settings are the paper's: TopK, a decoder with unit rows, an encoder that starts as
its transpose and has no bias, no auxiliary loss.

>>> run = train_saes(model, "data", SAETrainingConfig(layers=(4,)), folder="runs/saes")
>>> run.evaluation.to_pandas()             # NMSE, L0, dead features, loss added and recovered (Fig. 21)
>>> features = FeatureInteractions(model, 4, run.sae(4, "resid_mid"), run.sae(4, "mlp_out"))

A run lives in a folder. Started again with the same settings, it goes on from its last checkpoint; once
it is finished, it is only read:

    run.json            the settings, which a later start is compared with
    checkpoints/        SAELens's, gone when the run is finished
    saes/4-mlp_out/     an SAE as SAELens writes it: SAE.load_from_disk
    evaluation.safetensors, result.json
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_bilinear import checks
from tl_bilinear.io import digest_of, read_json, read_table, write_json
from tl_bilinear.models.files import require_numbers
from tl_bilinear.models.huggingface import no_file_bars
from tl_bilinear.recipes.language.config import SAETrainingConfig
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.run_folder import RESULT, SETTINGS, require_finished, work_in
from tl_bilinear.recipes.language.sae_runner import (
    CHECKPOINTS,
    SAES,
    hook_of,
    name_of,
    train_together,
)
from tl_bilinear.recipes.language.tokenizer import require_same_tokenizer
from tl_bilinear.tensor.estimates import expected_seconds, human_seconds

if TYPE_CHECKING:
    from tl_bilinear.features.evaluation import SAEEvaluation

FORMAT = "tl_bilinear SAEs"
EVALUATION = "evaluation.safetensors"

_COMMAND = "tl-bilinear train saes"


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
        name = name_of(layer, point)
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
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{folder} was not written by this version of `{_COMMAND}`: {error}"
            ) from error


def train_saes(
    model: Any,
    data: LanguageData | str | PathLike[str],
    config: SAETrainingConfig = SAETrainingConfig(),
    *,
    folder: str | PathLike[str],
    device: str | None = None,
    evaluate_on: int = 256,
    progress: bool = True,
) -> SAERun:
    """Train SAEs, go on with a run that was interrupted, or read one that is finished.

    Parameters
    ----------
    model:
        A model with TransformerLens hooks; or the folder or hub name of a Llama with a linear gate, or
        of what `HookedBilinearTransformer.from_pretrained` reads.
    data:
        Rows made with the model's tokenizer: `tl-bilinear data SOURCE --tokenizer MODEL`. [BOS] is left
        out.
    folder:
        Where the run lives. Two runs of different settings need two folders.
    device:
        Where model and SAEs are; default: the model's, or TransformerLens's choice.
    evaluate_on:
        Rows of validation text to measure the SAEs on.

    A run that goes on shuffles its activations afresh, so it ends close to the uninterrupted one, not at
    the same bits. SAELens handles Ctrl-C and SIGTERM while it trains, and writes a checkpoint first; it
    therefore needs the main thread.

    Raises ValueError for settings that contradict the model, the data or the folder; FileExistsError
    for a folder that holds something else.
    """
    from tl_bilinear.features.evaluation import evaluate_saes

    checks.require_count("evaluate_on", evaluate_on, 2**31, "rows of validation text")
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    folder = Path(folder).expanduser().resolve()
    model = load_hooked(model, device)
    layers = _require_fit(model, data, config)
    config = config.for_weights(sum(weight.numel() for weight in model.parameters()))
    made_from = {
        "fingerprint": data.fingerprint,
        "n_ctx": data.n_ctx,
        "model": digest_of(dict(model.state_dict()), {}),
        "evaluate_on": evaluate_on,
    }
    with work_in(folder, FORMAT, _plain(config), made_from, _COMMAND):
        if (folder / RESULT).is_file():
            return SAERun.load(folder)
        names = [(layer, point) for layer in layers for point in config.points]
        if not all((folder / SAES / name_of(*each)).is_dir() for each in names):
            if progress:
                print(announcement(model, config, len(names)), flush=True)
            train_together(model, data, config, names, folder, progress)
        rows = data.validation.with_format("torch")[:evaluate_on]["input_ids"].long()
        device = model.cfg.device
        saes = {name_of(*each): _load_sae(folder, name_of(*each), device) for each in names}
        evaluation = evaluate_saes(model, saes, rows.to(device), progress=progress)
        evaluation.save(folder / EVALUATION)
        write_json(folder / RESULT, {"layers": list(layers)})
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return SAERun.load(folder)


def announcement(model: Any, config: SAETrainingConfig, saes: int) -> str:
    """What a run is about to do, and about how long that takes on this machine."""
    cfg = model.cfg
    width = round(config.expansion * cfg.d_model)
    # A token costs a forward of the model; in each SAE encoder and decoder, forward and backward.
    weights = sum(weight.numel() for weight in model.parameters())
    config = config.for_weights(weights)
    tokens = config.tokens or 0
    flops = tokens * (2 * weights + saes * 2 * 6 * cfg.d_model * width)
    seconds = expected_seconds(flops, next(model.parameters()).device)
    return (
        f"{saes} SAE{'' if saes == 1 else 's'} of {width:,} features, {tokens:,} tokens: at "
        f"least {human_seconds(seconds)} here (fewer with tokens=, --tokens)"
    )


def _load_sae(folder: Path, name: str, device: str | torch.device) -> Any:
    from sae_lens import SAE

    place = folder / SAES / name
    try:
        sae = SAE.load_from_disk(place, device=str(device))
    except Exception as error:  # SAELens passes on what JSON, safetensors and torch raise
        raise ValueError(f"the SAE in {place} cannot be read: {error}") from error
    require_numbers(place, sae.state_dict())
    return sae


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


def _plain(config: SAETrainingConfig) -> dict[str, Any]:
    """The config as JSON gives it back."""
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
            f"the text again with `tl-bilinear data --n-ctx {cfg.n_ctx}`"
        )
    if len(data.tokenizer) > cfg.d_vocab:
        raise ValueError(
            f"the text is tokenized with {len(data.tokenizer)} entries, the model has {cfg.d_vocab}: "
            "prepare it again with the model's tokenizer (`tl-bilinear data --tokenizer MODEL`)"
        )
    require_same_tokenizer(data, model.tokenizer, "the model")
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
