"""Neurons that all classes share, beside eigenvectors of each class.

Eigenvectors give each class components of its own. A CP decomposition gives the classes neurons that
they share (:func:`~tl_bilinear.tensor.cp`). Both are measured here by the accuracy they leave and the
numbers they store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from markupsafe import Markup

from tl_bilinear.paper.image_spectra import pixel_spectra, truncate
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import cp_figure
from tl_bilinear.plots.style import NEUTRAL, line, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import PIXEL_SPACE
from tl_bilinear.tensor import CP, cp

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class NeuronsSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the model."""
    ranks: tuple[int, ...] = (5, 10, 20, 40)
    """Numbers of shared neurons."""
    kept: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    """Numbers of eigenvectors of each class."""
    steps: int = 60
    """Steps of each fit."""
    shown: int = 20
    """The number of shared neurons of the fit that is shown, one of `ranks`."""


@dataclass(frozen=True, eq=False)
class SharedNeurons:
    """A classifier by neurons that all classes share, and by eigenvectors of each class.

    Attributes
    ----------
    fits: one CP decomposition for each rank, in pixel space
    accuracy: [ranks], test accuracy of each
    kept: eigenvectors of each class, eigen_accuracy: [kept], test accuracy with so many
    whole: test accuracy of the model
    """

    fits: Sequence[CP]
    accuracy: Sequence[float]
    kept: Sequence[int]
    eigen_accuracy: Sequence[float]
    whole: float

    def to_pandas(self) -> pandas.DataFrame:
        """One row a method and number of components: numbers stored, accuracy, accuracy lost."""
        import pandas as pd

        rows = [
            ("shared neurons", fit.rank, fit.left.numel() + fit.right.numel() + fit.out.numel(), a)
            for fit, a in zip(self.fits, self.accuracy, strict=True)
        ]
        classes, pixels = self.fits[0].out.shape[0], self.fits[0].left.shape[1]
        rows += [
            ("eigenvectors of each class", k, k * classes * (pixels + 1), a)
            for k, a in zip(self.kept, self.eigen_accuracy, strict=True)
        ]
        table = pd.DataFrame(rows, columns=["method", "components", "numbers", "accuracy"])
        return table.assign(lost=self.whole - table["accuracy"])


@torch.no_grad()
def shared_neurons(
    model: ImageClassifier,
    data: ImageData,
    *,
    ranks: Sequence[int] = (5, 10, 20, 40),
    kept: Sequence[int] = (1, 2, 3, 5, 10, 20),
    steps: int = 60,
    progress: bool = False,
) -> SharedNeurons:
    """Fit CP decompositions of several ranks, and measure them beside per-class truncation.

    Each rank starts from the eigenvectors of the HOSVD components (one restart). The biases of a model
    that has them are kept whole on both sides.
    """
    tensor = model.tensor(PIXEL_SPACE)
    _, linear, constant = tensor.parts()(data.test_images)
    fits = [cp(tensor, rank, restarts=1, steps=steps, progress=progress) for rank in ranks]
    guesses = [(fit.tensor(data.test_images) + linear + constant).argmax(-1) for fit in fits]
    spectra = pixel_spectra(model)
    kept = [k for k in kept if k <= spectra.k]
    truncated = truncate(model, spectra, data.test_images, data.test_labels, kept)
    return SharedNeurons(
        fits,
        [float((g == data.test_labels).float().mean()) for g in guesses],
        truncated.kept,
        truncated.accuracy,
        truncated.whole,
    )


def neurons_figure(result: SharedNeurons) -> go.Figure:
    """Accuracy against numbers stored, shared neurons beside eigenvectors of each class."""
    figure = go.Figure()
    for number, (method, part) in enumerate(result.to_pandas().groupby("method", sort=False)):
        curve = line(part["numbers"].tolist(), part["accuracy"].tolist(), number, str(method))
        labels = part["components"].astype(str).tolist()
        curve.update(mode="lines+markers+text", text=labels, textposition="bottom right")
        figure.add_trace(curve)
    figure.add_hline(y=result.whole, line={"color": NEUTRAL, "dash": "dash"})
    figure.update_xaxes(title="numbers stored", type="log", dtick="D1")
    return sized(figure, 760, 360, yaxis_title="test accuracy")


@register("neurons", NeuronsSettings)
def neurons_page(data: ImageData, settings: NeuronsSettings, runs: Runs) -> Page:
    model = runs.train(data, [settings.config])[0].model
    result = shared_neurons(
        model, data, ranks=settings.ranks, kept=settings.kept, steps=settings.steps
    )
    reached = dict(zip(settings.ranks, result.accuracy, strict=True))
    shown = result.fits[settings.ranks.index(settings.shown)]
    return Page(
        "Neurons that the classes share",
        Markup(
            "A CP decomposition writes the whole model as a few neurons, each a product of two "
            "patterns <code>(l·x)(m·x)</code> that all classes read with weights of their own; "
            "eigenvectors serve one class each. Labels: numbers of components. Below, the strongest "
            "neurons of the fit of {}: the pattern whose square adds, the one whose square is taken "
            "off, and the three classes that it changes most."
        ).format(settings.shown),
        [neurons_figure(result), cp_figure(shown, data.size, names=data.classes)],
        {"components": result.to_pandas()},
        {f"accuracy with {rank} shared neurons": value for rank, value in reached.items()}
        | {"accuracy of the model": result.whole},
    )
