"""What a truncation can cost at most: certificates beside the errors met on real images.

Dropping all but k eigenpairs of a class changes its logit by at most ``||x||^2 max |dropped lambda|``.
The bound holds for every image of a norm, and stands beside the largest error on test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from tl_bilinear.paper.image_spectra import pixel_spectra
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots.style import line, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import PIXEL_SPACE
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class CertificatesSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the model."""
    kept: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 40)
    """Numbers of eigenvectors of each class."""


@dataclass(frozen=True, eq=False)
class Certificates(Result):
    """Error of truncated logits: the bound for every image of a norm, and what real images show.

    Attributes
    ----------
    radius: the norm
    kept: eigenvectors of each class
    bound: [classes, kept], for every image of norm at most `radius`, whatever it shows
    worst, mean: [classes, kept], largest and mean absolute error on the test images within the radius
    spread: [classes], standard deviation of the logit over them, the scale to read errors by
    """

    radius: float
    kept: Sequence[int]
    bound: Float[Tensor, "classes kept"]
    worst: Float[Tensor, "classes kept"]
    mean: Float[Tensor, "classes kept"]
    spread: Float[Tensor, " classes"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a class and number of eigenvectors."""
        import pandas as pd

        rows = [
            (label, k, *(float(each[label, j]) for each in (self.bound, self.worst, self.mean)))
            for label in range(len(self.bound))
            for j, k in enumerate(self.kept)
        ]
        return pd.DataFrame(rows, columns=["class", "eigenvectors", "bound", "worst", "mean"])


@torch.no_grad()
def certificates(
    model: ImageClassifier,
    data: ImageData | Float[Tensor, "n pixels"],
    *,
    kept: Sequence[int] = (1, 2, 3, 5, 10, 20, 40),
    radius: float | None = None,
) -> Certificates:
    """Bound and measure what a truncation to k eigenvectors of each class does to its logit.

    `data` are images to measure on, of an ImageData its test images. `radius` None takes the largest
    norm among them. Biases are not truncated and play no part.

    Raises ValueError where no image lies within the radius.
    """
    images = data.test_images if isinstance(data, ImageData) else data
    norms = images.norm(dim=1)
    radius = float(norms.max()) if radius is None else radius
    inside = images[norms <= radius]
    if not len(inside):
        raise ValueError(
            f"no image has a norm of at most {radius}; the smallest is {float(norms.min()):.3g}"
        )
    tensor = model.tensor(PIXEL_SPACE)
    spectra = pixel_spectra(model)
    kept = [k for k in kept if k <= spectra.k]
    logits = tensor.interaction().quadratic(inside)
    running = spectra.activations(inside).cumsum(-1)
    errors = [(logits - running[..., k - 1]).abs() for k in kept]
    return Certificates(
        radius,
        kept,
        torch.stack([spectra.certificate(radius, k) for k in kept], 1),
        torch.stack([error.amax(0) for error in errors], 1),
        torch.stack([error.mean(0) for error in errors], 1),
        logits.std(0),
    )


def certificates_figure(result: Certificates) -> go.Figure:
    """Bound and worst error of any class's truncated logit, and the mean one, on a logarithmic axis."""
    figure = go.Figure()
    for number, (name, errors) in enumerate(
        (
            (
                f"bound for every image of norm ≤ {result.radius:.1f}, worst class",
                result.bound.amax(0),
            ),
            ("largest on test images, worst class", result.worst.amax(0)),
            ("mean on test images and classes", result.mean.mean(0)),
        )
    ):
        figure.add_trace(line(result.kept, errors, number, name))
    spread = [float(result.spread.mean())] * len(result.kept)
    dashed = line(result.kept, spread, 6, "standard deviation of a logit, mean over classes")
    figure.add_trace(dashed.update(mode="lines", line_dash="dash"))
    axis = {"type": "log", "tickvals": list(result.kept)}
    figure.update_xaxes(title="eigenvectors kept for each class", **axis)
    figure.update_yaxes(title="error of a logit", type="log", exponentformat="power", dtick=1)
    title = "What leaving out the other eigenvectors can change, and does"
    return sized(figure, 760, 380, title=title)


@register("certificates", CertificatesSettings)
def certificates_page(data: ImageData, settings: CertificatesSettings, runs: Runs) -> Page:
    model = runs.train(data, [settings.config])[0].model
    result = certificates(model, data, kept=settings.kept)
    table = result.to_pandas()
    rows = table.groupby("eigenvectors").agg({"bound": "max", "worst": "max", "mean": "mean"})
    return Page(
        "What a truncation can cost, certified",
        Markup(
            "Dropping all but k eigenvectors changes a logit by at most "
            "<code>|x|² max|λ dropped|</code>, on every image of that norm, whatever it shows. Beside "
            "it are the largest and the mean error on test images. Bound and largest error are those of "
            "the class where they are largest, so that they hold for every class; the table has each."
        ),
        [certificates_figure(result)],
        {"classes": table},
        {f"{k} eigenvectors": row.to_dict() for k, row in rows.iterrows()},
    )
