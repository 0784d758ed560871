"""Trained models kept on disk, each under a hash of everything that made it.

>>> runs = Runs("runs")
>>> results = runs.train(data, [TrainingConfig(seed=seed) for seed in range(5)])   # trains
>>> results = runs.train(data, [TrainingConfig(seed=seed) for seed in range(9)])   # trains four more

The name of a file is the hash of the images and labels, of the settings, and of the code that trains
(comments and docstrings aside); only weights are kept, and what is read off them is computed from
them. A file is written whole or not at all, so that an interrupted sweep goes on where it stopped.
Another machine or version of torch may differ in the last digits: the file says which it was.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_bilinear.io import load_tensors, save_tensors
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import ImageClassifier
from tl_bilinear.recipes.images.training import (
    TrainingConfig,
    TrainingResult,
    train_classifiers,
)

_KIND = "tl_bilinear image run"
_CODE = ("augment.py", "model.py", "training.py")
_ALONE = 2**15
"""Above this many embedded numbers a step (size x batch) matrix products fill the processor, and models
train one after another: measured, together is up to 1.4 times as fast below it and slower above."""


@dataclass(frozen=True)
class Runs:
    """Training through a folder of finished runs; without a folder nothing is kept.

    Attributes
    ----------
    folder: made when the first run is written
    device: where models train; they are returned on the CPU
    progress: show a bar over the models
    """

    folder: Path | None = None
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder).expanduser())

    def train(self, data: ImageData, configs: Sequence[TrainingConfig]) -> list[TrainingResult]:
        """The trained models of `configs`, in their order, from the folder where they are there.

        Missing ones train in groups of one shape; each is written as soon as its group is done.
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
        unused = torch.Generator()  # the weights are overwritten, the caller's draws left alone
        model = ImageClassifier(data.pixels, len(data.classes), config.size, config.bias, unused)
        model.load_state_dict(tensors)
        losses, accuracies = tuple(stored["losses"]), tuple(stored["accuracies"])
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
    """Hash of the images and labels, the settings and the code that trains."""
    described = json.dumps([data.fingerprint, _settings(config), _code()], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _groups(configs: Sequence[TrainingConfig]) -> list[list[TrainingConfig]]:
    groups: dict[tuple[Any, ...], list[TrainingConfig]] = {}
    for number, config in enumerate(configs):
        alone = config.size * config.batch > _ALONE
        groups.setdefault((config.shape, number if alone else -1), []).append(config)
    return list(groups.values())


def _settings(config: TrainingConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    named = [[type(a).__name__, dataclasses.asdict(a)] for a in config.augment]
    return settings | {"augment": named}


@lru_cache(maxsize=1)
def _code() -> str:
    dumps = [_without_prose((Path(__file__).parent / name).read_text("utf-8")) for name in _CODE]
    return hashlib.sha256("".join(dumps).encode()).hexdigest()


def _without_prose(source: str) -> str:
    """The syntax tree of a module as text, its comments and docstrings left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
