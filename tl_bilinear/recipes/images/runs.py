"""Trained models kept on disk, each under a digest of what made it.

>>> runs = Runs("runs")
>>> results = runs.train(data, [TrainingConfig(seed=seed) for seed in range(5)])   # trains
>>> results = runs.train(data, [TrainingConfig(seed=seed) for seed in range(9)])   # trains four more

A file is named by a digest of the images and labels, of the settings, and of the version of the
training (:data:`~tl_bilinear.recipes.images.training.RECIPE`). Only weights are kept; what is read off
them is computed again. A file is written whole or not at all, so that an interrupted sweep continues
where it stopped. Another machine or version of torch may give other last digits; the file names its
version of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_bilinear.io import digest_of, load_tensors, save_tensors
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import ImageClassifier
from tl_bilinear.recipes.images.training import (
    RECIPE,
    TrainingConfig,
    TrainingResult,
    train_classifiers,
)

_KIND = "tl_bilinear image run"
_ALONE = 2**15
"""Above this many embedded numbers a step (size x batch), matrix products fill the processor and models
train one after another. Measured: together is up to 1.4 times as fast below it, and slower above."""


@dataclass(frozen=True)
class Runs:
    """Trains models and keeps them in a folder; without a folder nothing is kept.

    Attributes
    ----------
    folder: made when the first model is written
    device: where models train; they are returned on the CPU
    progress: whether to show a bar over the models
    """

    folder: Path | None = None
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder).expanduser())

    def train(self, data: ImageData, configs: Sequence[TrainingConfig]) -> list[TrainingResult]:
        """The trained models of `configs`, in their order, read from the folder where it has them.

        The others train in groups of one shape. A group is written as soon as it is done.
        """
        found = {config: self._load(data, config) for config in configs}
        missing = [config for config, result in found.items() if result is None]
        with tqdm(total=len(missing), unit="model", disable=not (self.progress and missing)) as bar:
            for group in _groups(missing):
                bar.set_postfix_str(f"size {group[0].size}, {group[0].epochs} epochs")
                for result in train_classifiers(data, group, device=self.device, progress=False):
                    result.model.cpu()
                    self._save(data, result)
                    found[result.config] = result
                bar.update(len(group))
        return [found[config] for config in configs]  # type: ignore[misc]

    def path(self, data: ImageData, config: TrainingConfig) -> Path | None:
        """Where a run is kept."""
        return None if self.folder is None else self.folder / f"{run_key(data, config)}.safetensors"

    def _load(self, data: ImageData, config: TrainingConfig) -> TrainingResult | None:
        path = self.path(data, config)
        if path is None or not path.is_file():
            return None
        try:
            tensors, stored = load_tensors(path)
        except ValueError:
            return None  # damaged: trained and written again
        if (stored.get("kind"), stored.get("key")) != (_KIND, path.stem):
            return None
        # The weights are overwritten; a generator of its own leaves the caller's random numbers alone.
        unused = torch.Generator()
        model = ImageClassifier(
            data.pixels, len(data.classes), config.size, config.bias, unused, config.depth
        )
        try:
            model.load_state_dict(tensors)
            losses, accuracies = tuple(stored["losses"]), tuple(stored["accuracies"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold the model that its name says: {error}. Delete it, to train again"
            ) from error
        return TrainingResult(model.eval(), config, losses, accuracies)

    def _save(self, data: ImageData, result: TrainingResult) -> None:
        path = self.path(data, result.config)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "kind": _KIND,
            "key": path.stem,
            "data": data.name,
            "config": _settings(result.config),
            "losses": result.losses,
            "accuracies": result.accuracies,
            "torch": torch.__version__,
        }
        save_tensors(path, result.model.state_dict(), metadata)


UNKEPT = Runs()
"""Trains and keeps nothing."""


def run_key(data: ImageData, config: TrainingConfig) -> str:
    """Digest of the images and labels, the settings and the version of the training."""
    made_by = {"data": data.fingerprint, "config": _settings(config), "recipe": RECIPE}
    return digest_of({}, made_by)[:32]


def _groups(configs: Sequence[TrainingConfig]) -> list[list[TrainingConfig]]:
    groups: dict[tuple[Any, ...], list[TrainingConfig]] = {}
    for number, config in enumerate(configs):
        alone = config.size * config.batch > _ALONE
        groups.setdefault((config.shape, number if alone else -1), []).append(config)
    return list(groups.values())


def _settings(config: TrainingConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    named = [[type(a).__name__, dataclasses.asdict(a)] for a in config.augment]
    if config.depth == 1:  # whose runs were kept before there were deeper ones
        del settings["depth"]
    return settings | {"augment": named}
