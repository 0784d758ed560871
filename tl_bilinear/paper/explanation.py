"""One prediction, taken apart (Pearce et al. 2025, appendix C, Fig. 15 and 16).

The logit of a class is the sum of what its eigenvectors add, ``lambda_i (v_i . x)^2``, and of the linear
and constant parts of the biases where there are any. The numbers below sum to the model's logits, to
rounding, so they say what made a class and what suppressed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.paper.image_spectra import ClassSpectra, class_spectra
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import mosaic_figure
from tl_bilinear.plots.decompositions import both_ends
from tl_bilinear.plots.style import NEGATIVE, NEUTRAL, POSITIVE, line, rounded, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ExplanationSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the model."""
    space: str = EMBEDDING_SPACE
    """Whose eigenvectors, "pixels" or "embedding"."""


@dataclass(frozen=True, eq=False)
class Explanation(Result):
    """What each eigenvector of each class adds to its logit on one image.

    Attributes
    ----------
    image: [pixels]
    contributions: [classes, k], in the order of falling absolute eigenvalue, all pairs of each class
    linear, constant: [classes], the biases' parts; zero for a model without
    logits: [classes], as the model computes them
    values: [classes, k], eigenvalues; vectors: [classes, k, pixels], eigenvectors as images
    space: whose eigenvectors, "pixels" or "embedding" (then mapped to pixels)
    classes: their names
    size: (height, width) of the image
    """

    image: Float[Tensor, " pixels"]
    contributions: Float[Tensor, "classes k"]
    linear: Float[Tensor, " classes"]
    constant: Float[Tensor, " classes"]
    logits: Float[Tensor, " classes"]
    values: Float[Tensor, "classes k"]
    vectors: Float[Tensor, "classes k pixels"]
    space: str
    classes: Sequence[str]
    size: Sequence[int]

    @property
    def made(self) -> Float[Tensor, " classes"]:
        """[classes], what eigenvectors of positive eigenvalue add."""
        return self.contributions.clamp_min(0).sum(-1)

    @property
    def suppressed(self) -> Float[Tensor, " classes"]:
        """[classes], what those of negative eigenvalue take off."""
        return self.contributions.clamp_max(0).sum(-1)

    @property
    def gap(self) -> float:
        """Largest absolute difference between a logit and the sum of its parts: rounding."""
        sums = self.contributions.sum(-1) + self.linear + self.constant
        return float((sums - self.logits).abs().max())

    def top(self, k: int) -> pandas.DataFrame:
        """The k largest contributions of each class, in absolute value."""
        table = self.to_pandas()
        order = table["contribution"].abs().sort_values(ascending=False).index
        return table.loc[order].groupby("class", sort=False).head(k).reset_index(drop=True)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a class and eigenvector: rank by absolute eigenvalue, eigenvalue, contribution."""
        import pandas as pd

        classes, k = self.values.shape
        return pd.DataFrame(
            {
                "class": [name for name in self.classes for _ in range(k)],
                "rank": list(range(1, k + 1)) * classes,
                "eigenvalue": self.values.flatten().numpy(),
                "contribution": self.contributions.flatten().numpy(),
            }
        )

    def logit_table(self) -> pandas.DataFrame:
        """One row a class: what made it, what suppressed it, the biases' parts, and the logit."""
        import pandas as pd

        return pd.DataFrame(
            {
                "class": list(self.classes),
                "made": self.made.numpy(),
                "suppressed": self.suppressed.numpy(),
                "linear": self.linear.numpy(),
                "constant": self.constant.numpy(),
                "logit": self.logits.numpy(),
            }
        )


@torch.no_grad()
def explain(
    model: ImageClassifier,
    image: Float[Tensor, " pixels"],
    size: Sequence[int],
    *,
    space: str = PIXEL_SPACE,
    spectra: ClassSpectra | None = None,
    classes: Sequence[str] | None = None,
) -> Explanation:
    """Split the logits of one image over the eigenvectors of every class, exactly.

    Parameters
    ----------
    image: [height * width], of `size` (height, width)
    space: whose eigenvectors, "pixels" or "embedding"
    spectra: of the model, where the caller has them; they are computed otherwise
    classes: their names, numbers by default

    Raises ValueError for an image or size with another number of pixels, or `classes` of another number.
    """
    spectra = class_spectra(model) if spectra is None else spectra
    found, tensor = spectra.of(space), model.tensor(space)
    if image.shape != (spectra.pixel.d,) or size[0] * size[1] != spectra.pixel.d:
        raise ValueError(
            f"image must be one flat row of {spectra.pixel.d} pixels, got shape {list(image.shape)} and "
            f"size {size[0]}x{size[1]}"
        )
    names = tuple(map(str, range(tensor.d_out))) if classes is None else tuple(classes)
    if len(names) != tensor.d_out:
        raise ValueError(f"the model has {tensor.d_out} classes, got {len(names)} names")
    inputs = image if space == PIXEL_SPACE else model.embed(image)
    _, linear, constant = tensor.parts()(inputs)
    return Explanation(
        image,
        found.activations(inputs),
        linear,
        constant,
        model(image),
        found.values,
        spectra.images(space).vectors,
        space,
        names,
        size,
    )


# ---------------------------------------------------------------------- figures


def contributions_figure(result: Explanation, *, title: str = "") -> go.Figure:
    """The contributions to the three largest logits, sorted, and what makes up every logit (Fig. 15)."""
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.1,
        subplot_titles=["contributions of eigenvectors, sorted", "logit = made + suppressed"],
    )
    for number, label in enumerate(_largest(result)):
        ordered = result.contributions[label].sort(descending=True).values
        ends = torch.cat([ordered[:10], ordered[-10:]])
        name = f"class {result.classes[label]}"
        figure.add_trace(line([*range(1, 11), *range(13, 23)], ends, number, name), 1, 1)
    names = list(result.classes)
    for kind, numbers, color in (
        ("made", result.made, POSITIVE),
        ("suppressed", result.suppressed, NEGATIVE),
        ("biases", result.linear + result.constant, NEUTRAL),
    ):
        if kind != "biases" or bool(numbers.any()):
            bar = go.Bar(x=names, y=rounded(numbers), name=kind, marker_color=color, opacity=0.55)
            figure.add_trace(bar, 1, 2)
    mark = {"color": "black", "symbol": "line-ew-open", "size": 16, "line": {"width": 3}}
    logits = go.Scatter(
        x=names, y=rounded(result.logits), mode="markers", name="logit", marker=mark
    )
    figure.add_trace(logits, 1, 2)
    figure.update_xaxes(title="largest 10 | most negative 10", showticklabels=False, col=1)
    figure.update_xaxes(title="class", type="category", col=2)
    figure.update_yaxes(title="λ (v·x)²", col=1)
    figure.update_yaxes(title="logit", col=2)
    margin = {"l": 55, "r": 15, "t": 70 if title else 40, "b": 45}
    return sized(figure, 880, 340, barmode="relative", title=title, margin=margin)


def explanation_figure(result: Explanation, k: int = 3) -> go.Figure:
    """The eigenvectors behind the three largest logits (Fig. 16).

    Shown are the k that made each logit most and the k that suppressed it most, with what each adds.
    """
    top, tiles, captions = _largest(result), [], []
    for label in top:
        pictures, texts = both_ends(result.contributions[label], result.vectors[label], k)
        tiles.append(torch.cat([result.image[None], pictures]))
        captions.append([f"logit {float(result.logits[label]):+.1f}", *texts])
    grey = torch.zeros(len(top), 2 * k + 1, dtype=torch.bool)
    grey[:, 0] = True
    return mosaic_figure(
        torch.stack(tiles),
        result.size,
        rows=[f"class {result.classes[label]}" for label in top],
        columns=[
            "image",
            *(f"{what} {i + 1}" for what in ("made", "suppressed") for i in range(k)),
        ],
        captions=captions,
        grey=grey,
        title="The largest logits, and what the eigenvectors add to each",
    )


def _largest(result: Explanation) -> list[int]:
    return result.logits.argsort(descending=True)[:3].tolist()


@register("explanation", ExplanationSettings)
def explanation_page(data: ImageData, settings: ExplanationSettings, runs: Runs) -> Page:
    model = runs.train(data, [settings.config])[0].model
    spectra = class_spectra(model)
    with torch.no_grad():
        logits = model(data.test_images)
    right = logits.argmax(1) == data.test_labels
    first, second = logits.topk(2, dim=1).values.unbind(1)
    examples = {
        "narrowly right": torch.where(right, first - second, torch.inf).argmin(),
        "wrong": torch.where(right, -torch.inf, first - second).argmax(),  # most confidently so
    }
    plots, tables, summary = [], {}, {}
    for name, index in examples.items():
        found = explain(
            model,
            data.test_images[index],
            data.size,
            space=settings.space,
            spectra=spectra,
            classes=data.classes,
        )
        truth = data.classes[int(data.test_labels[index])]
        title = f"Test image {int(index)}, a {truth}: {name}"
        plots.append(contributions_figure(found, title=title))
        plots.append(explanation_figure(found))
        tables[name] = found.logit_table()
        summary[f"largest gap between logit and sum, {name}"] = found.gap
    return Page(
        "One prediction, taken apart",
        "Fig. 15, 16, appendix C. Every logit is the sum of its eigenvectors' contributions. Shown are "
        "the three classes of largest logit, with the eigenvectors that made each most and those that "
        "suppressed it most, and what each adds on this image.",
        plots,
        tables,
        summary,
    )
