"""The quickstart's first part, on images: train, decompose every class, measure."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.io import save_tensors
from tl_bilinear.paper.image_controls import Controls, image_controls
from tl_bilinear.paper.image_spectra import (
    ClassSpectra,
    Truncation,
    class_spectra,
    metric_spectra,
    truncate,
    truncation_figure,
)
from tl_bilinear.paper.page import SummaryTable
from tl_bilinear.plots import eigenvectors_figure, filters_figure
from tl_bilinear.recipes.images import ImageData, TrainingConfig, TrainingResult, train_classifier
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.tensor import Eigendecomposition

KEPT = (1, 3, 5, 10, 20)
STORED = 10  # eigenvectors of each class

VECTORS, WEIGHTS = "eigenvectors.safetensors", "model.safetensors"


@dataclass(frozen=True, eq=False)
class ImageQuickstart:
    """What the quickstart found about an image model.

    Attributes
    ----------
    weighted: the largest eigenpairs in the metric of the training images, in pixel space
    truncation: test accuracy with the k largest eigenpairs of each class, in pixel space
    difference: largest absolute difference between the model's and its tensor's logits on test images
    seconds: of training and analysis
    controls: whether it learned anything, beside models that could not; None where they were left out
    """

    data: ImageData
    training: TrainingResult
    spectra: ClassSpectra
    weighted: Eigendecomposition
    truncation: Truncation
    difference: float
    seconds: float
    controls: Controls | None = None

    def summary(self) -> dict[str, object]:
        """The numbers, for JSON."""
        truncation = self.truncation
        checked = self.controls
        controls = {} if checked is None else {"controls": dataclasses.asdict(checked)}
        if checked is not None:
            controls["controls"]["verdict"] = checked.verdict
        return {
            "data": self.data.name,
            "training_images": len(self.data.train_labels),
            "test_images": len(self.data.test_labels),
            "config": dataclasses.asdict(self.training.config),
            "accuracy": self.training.accuracy,
            "accuracy_with_k_eigenvectors": dict(
                zip(truncation.kept, truncation.accuracy, strict=True)
            ),
            "largest_difference_model_tensor": self.difference,
            "seconds": round(self.seconds, 1),
            "classes": [
                {
                    "class": name,
                    "largest_eigenvalue": float(row.max()),
                    "most_negative_eigenvalue": float(row.min()),
                    "effective_rank": float(rank),
                }
                for name, row, rank in self.classes()
            ],
            **controls,
        }

    def classes(self) -> list[tuple[str, torch.Tensor, float]]:
        """Name, eigenvalues [k] and effective rank of every class, in pixel space."""
        pixel = self.spectra.pixel
        ranks = pixel.effective_rank().tolist()
        return list(zip(self.data.classes, pixel.values, ranks, strict=True))

    def summary_tables(self) -> list[SummaryTable]:
        """The numbers, as tables for a terminal or a notebook."""
        import pandas as pd

        kept = [*self.truncation.kept, "whole model"]
        accuracy = [*self.truncation.accuracy, self.training.accuracy]
        columns = ["class", "largest", "second", "third", "most negative", "effective rank"]
        values = [
            (name, *row.sort(descending=True).values[:3].tolist(), float(row.min()), rank)
            for name, row, rank in self.classes()
        ]
        checked = self.controls
        controls = (
            []
            if checked is None
            else [SummaryTable("Did it learn?", checked.to_pandas(), checked.verdict)]
        )
        return [
            SummaryTable(
                f"{self.data.name}: accuracy on {len(self.data.test_labels):,} images",
                pd.DataFrame({"eigenvectors a class": kept, "accuracy": accuracy}),
            ),
            SummaryTable(
                "Eigenvalues of the classes' interaction matrices, in pixel space",
                pd.DataFrame(values, columns=columns),
                f"Largest difference between model and tensor: {self.difference:.1e}   "
                f"({self.seconds:.0f} s of training and analysis)",
            ),
            *controls,
        ]

    def figures(self) -> dict[str, Any]:
        """The figures of the report: "truncation", "filters", and for each space one of every class."""
        size = self.data.size
        by_class = {
            space: [
                eigenvectors_figure(self.spectra.images(space)[i], size)
                for i in range(len(self.data.classes))
            ]
            for space in (PIXEL_SPACE, EMBEDDING_SPACE)
        }
        names = [f"class {name}" for name in self.data.classes]
        filters = filters_figure(self.weighted, size, names=names)
        return {"truncation": truncation_figure(self.truncation), "filters": filters, **by_class}

    def save(self, folder: Path) -> None:
        """Write eigenvectors.safetensors, of both spaces, and model.safetensors into a folder."""
        save_tensors(folder / WEIGHTS, self.training.model.state_dict(), {})
        tensors = {}
        for space in (PIXEL_SPACE, EMBEDDING_SPACE):
            k = min(STORED, self.spectra.of(space).k)
            tensors[f"{space}.values"] = self.spectra.of(space).values[:, :k]
            tensors[f"{space}.vectors"] = self.spectra.of(space).vectors[:, :k]
            tensors[f"{space}.images"] = self.spectra.images(space).vectors[:, :k]
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


def image_quickstart(
    data: ImageData, config: TrainingConfig, *, controls: bool = True, progress: bool = True
) -> ImageQuickstart:
    """Train on images and read the eigenvectors off the weights; `controls` trains three models more."""
    start = time.monotonic()
    training = train_classifier(data, config, progress=progress)
    spectra = class_spectra(training.model)
    kept = [k for k in KEPT if k <= spectra.pixel.k]
    images, labels = data.test_images, data.test_labels
    truncation = truncate(training.model, spectra.pixel, images, labels, kept)
    with torch.no_grad():
        difference = training.model(images) - training.model.tensor(PIXEL_SPACE)(images)
    checked = None
    if controls:
        checked = image_controls(training.model, data, training.config, progress=progress)
    seconds = time.monotonic() - start
    weighted = metric_spectra(training.model, data, STORED)
    return ImageQuickstart(
        data,
        training,
        spectra,
        weighted,
        truncation,
        float(difference.abs().max()),
        seconds,
        checked,
    )
