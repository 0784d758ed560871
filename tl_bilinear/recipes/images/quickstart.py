"""The quickstart's first part, on images: train, decompose every class, measure."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tl_bilinear.io import save_tensors
from tl_bilinear.recipes.images.analysis import ClassSpectra, class_spectra, truncation_accuracy
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.recipes.images.training import TrainingConfig, TrainingResult, train_classifier

KEPT = (1, 3, 5, 10, 20)
SHOWN = 10  # eigenvectors of each class and sign that are stored

VECTORS, WEIGHTS = "eigenvectors.safetensors", "model.safetensors"


@dataclass(frozen=True, eq=False)
class ImageQuickstart:
    """What the quickstart found about an image model.

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

    def summary(self) -> dict[str, object]:
        """The numbers, for JSON."""
        spectrum = self.spectra.pixel
        return {
            "data": self.data.name,
            "training_images": len(self.data.train_labels),
            "test_images": len(self.data.test_labels),
            "config": dataclasses.asdict(self.training.config),
            "accuracy": self.training.accuracy,
            "accuracy_with_k_eigenvectors": self.truncation,
            "largest_difference_model_tensor": self.difference,
            "seconds": round(self.seconds, 1),
            "classes": [
                {
                    "class": name,
                    "largest_eigenvalue": float(row.max()),
                    "most_negative_eigenvalue": float(row.min()),
                    "effective_rank": float(rank),
                }
                for name, row, rank in zip(
                    self.data.classes, spectrum.values, spectrum.effective_rank(), strict=True
                )
            ],
        }

    def save(self, folder: Path) -> None:
        """eigenvectors.safetensors (both spaces) and model.safetensors, into a folder."""
        save_file(self.training.model.state_dict(), folder / WEIGHTS)
        tensors = {}
        for space in (PIXEL_SPACE, EMBEDDING_SPACE):
            spectrum = self.spectra.of(space).top(min(SHOWN, self.spectra.of(space).k))
            tensors[f"{space}.values"] = spectrum.values
            tensors[f"{space}.vectors"] = spectrum.vectors
            tensors[f"{space}.images"] = self.spectra.images(space)[:, : spectrum.k]
        save_tensors(
            folder / VECTORS,
            tensors,
            {
                "classes": self.data.classes,
                "size": self.data.size,
                "pixels.vectors": "unit and orthogonal as images",
                "embedding.vectors": "unit and orthogonal behind the embedding",
                "embedding.images": "embedding.vectors mapped to pixels: neither unit nor orthogonal",
            },
        )


def config_for(data: ImageData, **settings: Any) -> TrainingConfig:
    """The paper's settings, with smaller batches and more epochs where images are few.

    At the paper's batch of 2,048 a few thousand images make two steps an epoch.
    """
    few = {"batch": 256, "epochs": 60} if len(data.train_labels) < 20_000 else {}
    return TrainingConfig(**few | settings)


def image_quickstart(
    data: ImageData, config: TrainingConfig, *, progress: bool = True
) -> ImageQuickstart:
    """Train on images and read the eigenvectors off the weights."""
    start = time.monotonic()
    training = train_classifier(data, config, progress=progress)
    spectra = class_spectra(training.model)
    kept = tuple(k for k in KEPT if k <= spectra.pixel.k)
    images, labels = data.test_images, data.test_labels
    truncation = truncation_accuracy(training.model, spectra.pixel, images, labels, kept)
    with torch.no_grad():
        difference = training.model(images) - training.model.tensor(PIXEL_SPACE)(images)
    seconds = time.monotonic() - start
    return ImageQuickstart(
        data, training, spectra, truncation, float(difference.abs().max()), seconds
    )
