"""The pictures of the concepts page: `python demos/docs/pictures/draw.py`, two minutes, no network.

Also writes digits.json: the settings and accuracy of the classifier that the digits' picture reads.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

from tl_bilinear.paper import class_spectra
from tl_bilinear.recipes.images import TrainingConfig, load_images, train_classifier
from tl_bilinear.recipes.images.training import config_for
from tl_bilinear.tensor import BilinearTensor, InteractionMatrix, Metric

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FORMS = {
    "x1 x2: same sign (XNOR)": [[0.0, 0.5], [0.5, 0.0]],
    "x1^2: how far along x1": [[1.0, 0.0], [0.0, 0.0]],
    "x1^2 - x2^2: one makes, one suppresses": [[1.0, 0.0], [0.0, -1.0]],
}


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=110, bbox_inches="tight")
    plt.close(figure)


def matrix_of(form: torch.Tensor) -> InteractionMatrix:
    """A dense symmetric form [d, d] as the layer ``sum_i x_i (form x)_i`` has it."""
    layer = BilinearTensor(torch.eye(len(form)).to(form), form, torch.ones(1, len(form)).to(form))
    return layer.interaction(torch.ones(1).to(form))


def contours(axes: plt.Axes, form: torch.Tensor, reach: float = 2.0) -> None:
    line = np.linspace(-reach, reach, 121)
    x, y = np.meshgrid(line, line)
    points = torch.tensor(np.stack([x, y], -1))
    height = ((points @ form) * points).sum(-1).numpy()
    most = abs(height).max()
    axes.contourf(x, y, height, 20, cmap="RdBu", vmin=-most, vmax=most)
    axes.set_aspect("equal")
    axes.set_xlabel("x1")


def arrows(axes: plt.Axes, values: torch.Tensor, vectors: torch.Tensor) -> None:
    for value, vector in zip(values.tolist(), vectors.tolist(), strict=True):
        if abs(value) > 1e-9:
            axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "->", "lw": 2})
            label = [1.4 * c for c in vector]
            axes.text(*label, f"{value:+.2f}", ha="center", va="center", weight="bold")


def forms() -> None:
    """Three quadratic forms of two inputs, with their eigenvectors and eigenvalues."""
    figure, rows = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    for axes, (title, entries) in zip(rows, FORMS.items(), strict=True):
        form = torch.tensor(entries, dtype=torch.float64)
        eigen = matrix_of(form).eigh()
        contours(axes, form)
        arrows(axes, eigen.values, eigen.vectors)
        axes.set_title(title, fontsize=10)
    rows[0].set_ylabel("x2")
    save(figure, "forms.png")


def metric() -> None:
    """One form, and its eigenvectors by length and by how far the inputs reach."""
    form = torch.tensor([[0.6, 0.0], [0.0, -1.0]], dtype=torch.float64)
    spread = torch.tensor([2.0, 0.35], dtype=torch.float64)
    inputs = (
        torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * spread
    )
    figure, rows = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
    matrix = matrix_of(form)
    found = {
        "by length: -1.00 comes first": matrix.eigh(),
        "by what inputs do: it is last": matrix.eigh(metric=Metric.of_samples(inputs, 1e-6)),
    }
    for axes, (title, eigen) in zip(rows, found.items(), strict=True):
        contours(axes, form, 6.5)
        axes.plot(*inputs.T, ".", color="black", alpha=0.25, markersize=3)
        unit = eigen.vectors / eigen.vectors.norm(dim=-1, keepdim=True)
        for value, vector in zip(eigen.values.tolist(), (3.0 * unit).tolist(), strict=True):
            axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "->", "lw": 2})
            axes.text(
                1.5 * vector[0],
                1.25 * vector[1],
                f"{value:+.2f}",
                ha="center",
                va="center",
                weight="bold",
                bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
            )
        axes.set_title(title, fontsize=10)
    rows[0].set_ylabel("x2")
    save(figure, "metric.png")


def digits() -> None:
    """The strongest eigenvectors of digit classes in pixel space."""
    data = load_images()
    trained = train_classifier(data, config_for(data, TrainingConfig()))
    pixel = class_spectra(trained.model).pixel
    figure, rows = plt.subplots(4, 10, figsize=(11, 4.8), layout="constrained")
    for column in range(10):
        order = pixel.values[column].argsort(descending=True)
        for row, place in enumerate([order[0], order[1], order[-1], order[-2]]):
            axes = rows[row, column]
            vector = pixel.vectors[column, place].reshape(data.size).detach()
            most = float(vector.abs().max())
            axes.imshow(vector, cmap="RdBu", vmin=-most, vmax=most)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{float(pixel.values[column, place]):+.2f}", fontsize=8)
        rows[0, column].set_title(data.classes[column])
    for row, name in enumerate(("makes it", "makes it, 2nd", "suppresses", "suppr., 2nd")):
        rows[row, 0].set_ylabel(name, fontsize=9)
    figure.savefig(HERE / "digits.png", dpi=110)
    plt.close(figure)
    settings = {"config": dataclasses.asdict(trained.config), "accuracy": trained.accuracy}
    (HERE / "digits.json").write_text(json.dumps(settings | {"data": data.name}, indent=2) + "\n")


if __name__ == "__main__":
    plt.rcParams.update({"font.size": 9})
    forms()
    metric()
    digits()
