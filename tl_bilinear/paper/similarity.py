"""Do models of other seeds and sizes learn the same eigenvectors? (Pearce et al. 2025, Fig. 5 and 18)

Eigenvectors are compared in pixel space, which models of every size share, by absolute cosine: the i-th
positive one with the i-th positive one and the negative ones likewise, never a model with itself.

The paper compares embedding-space eigenvectors mapped to pixels, which are neither unit nor orthogonal
there; ``space="embedding"`` does that, and makes them unit vectors after the mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.paper.image_spectra import as_images, pixel_spectra, truncate
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots.style import band, line, rounded, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import PIXEL_SPACE
from tl_bilinear.recipes.images.runs import UNKEPT
from tl_bilinear.results import Result
from tl_bilinear.tensor import Eigendecomposition, match_eigenvectors

if TYPE_CHECKING:
    import pandas

SIGNS = ("positive", "negative")


@dataclass(frozen=True)
class SimilaritySettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig()
    """Of every model, but for size and seed."""
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Sizes to compare."""
    seeds: int = 3
    """Models of each size; at least two, because no model is compared with itself."""
    k: int = 8
    """Eigenvectors of each sign that are compared."""
    kept: tuple[int, ...] | None = None
    """Numbers of eigenvectors of each class whose accuracy is measured; by default those of 1, 2, 3, 5,
    10, 20 and 30 that models of the smallest size have."""
    space: str = PIXEL_SPACE
    """Where the eigenvectors are taken, "pixels" or "embedding"."""


@dataclass(frozen=True, eq=False)
class SeedsAndSizes(Result):
    """Similarity and truncation over seeds and sizes.

    Attributes
    ----------
    sizes: [n]
    within: [n, 2, k, pairs], mean over classes of the absolute cosine of eigenvectors of equal rank, for
        every two seeds of a size; positive eigenvalues, then negative
    between: [n, n, 2, k], the same between sizes, mean over pairs of different models
    kept: numbers of eigenvectors of each class
    truncated: [n, seeds, kept], test accuracy with so many
    accuracy: [n, seeds], of the whole models
    space: where the eigenvectors were taken
    """

    sizes: Sequence[int]
    within: Float[Tensor, "n 2 k pairs"]
    between: Float[Tensor, "n n 2 k"]
    kept: Sequence[int]
    truncated: Float[Tensor, "n seeds kept"]
    accuracy: Float[Tensor, "n seeds"]
    space: str

    def within_interval(self) -> tuple[Tensor, Tensor, Tensor]:
        """[n, 2, k] each: mean over pairs of `within`, with its 5th and 95th percentile."""
        return interval(self.within)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a size, sign and rank: similarity within the size, with its 90 % interval."""
        import pandas as pd

        mean, low, high = self.within_interval()
        rows = [
            (size, sign, rank + 1, *(float(each[i, j, rank]) for each in (mean, low, high)))
            for i, size in enumerate(self.sizes)
            for j, sign in enumerate(SIGNS)
            for rank in range(mean.shape[-1])
        ]
        return pd.DataFrame(rows, columns=["size", "sign", "rank", "cosine", "low", "high"])

    def truncation(self) -> pandas.DataFrame:
        """One row a size and number of eigenvectors: accuracy, and what is lost, with 90 % intervals."""
        import pandas as pd

        lost = interval((self.accuracy[..., None] - self.truncated).mT)
        reached = self.truncated.mean(1)
        rows = [
            (size, k, float(reached[i, j]), *(float(each[i, j]) for each in lost))
            for i, size in enumerate(self.sizes)
            for j, k in enumerate(self.kept)
        ]
        columns = ["size", "eigenvectors", "accuracy", "lost", "low", "high"]
        return pd.DataFrame(rows, columns=columns)


def seeds_and_sizes(
    data: ImageData, settings: SimilaritySettings = SimilaritySettings(), *, runs: Runs = UNKEPT
) -> SeedsAndSizes:
    """Train the models of every size and compare their first k eigenvectors of each sign.

    Raises ValueError for fewer than two seeds, or for k or kept above the smallest size.
    """
    seeds, k, base = settings.seeds, settings.k, settings.config
    sizes = sorted(settings.sizes)
    usual = (n for n in (1, 2, 3, 5, 10, 20, 30) if n <= sizes[0])
    kept = sorted(usual if settings.kept is None else settings.kept)
    if seeds < 2:
        raise ValueError(
            f"similarity compares different runs: seeds must be at least 2, got {seeds}"
        )
    if max(k, *kept) > sizes[0]:
        raise ValueError(
            f"k={k} and kept={kept} must not exceed the smallest size, {sizes[0]}: a model has no more "
            f"eigenvectors than its size"
        )
    configs = [replace(base, size=size, seed=base.seed + s) for size in sizes for s in range(seeds)]
    results = runs.train(data, configs)
    tops, truncated = [], []
    for result in results:
        spectra = _spectra(result.model, settings.space)
        found = truncate(result.model, spectra, data.test_images, data.test_labels, kept)
        truncated.append(found.accuracy)
        images = as_images(result.model, spectra)
        if settings.space != PIXEL_SPACE:
            unit = torch.nn.functional.normalize(images.vectors, dim=-1)
            images = replace(images, vectors=unit)
        tops.append([_of_sign(images, sign, k) for sign in (1, -1)])
    pairs = {
        (a, b): torch.stack([_by_rank(x, y, k) for x, y in zip(tops[a], tops[b], strict=True)])
        for a, b in combinations(range(len(results)), 2)
    }
    of_size = [range(i * seeds, (i + 1) * seeds) for i in range(len(sizes))]
    within = torch.stack(
        [torch.stack([pairs[p] for p in combinations(rows, 2)], -1) for rows in of_size]
    )
    between = within.new_empty(len(sizes), len(sizes), 2, k)
    for i, j in combinations(range(len(sizes)), 2):
        each = torch.stack([pairs[a, b] for a in of_size[i] for b in of_size[j]])
        between[i, j] = between[j, i] = each.nanmean(0)
    for i in range(len(sizes)):
        between[i, i] = within[i].nanmean(-1)
    shape = (len(sizes), seeds)
    accuracy = torch.tensor([result.accuracy for result in results], dtype=torch.float64)
    return SeedsAndSizes(
        sizes,
        within,
        between,
        kept,
        torch.tensor(truncated, dtype=torch.float64).reshape(*shape, len(kept)),
        accuracy.reshape(shape),
        settings.space,
    )


def interval(values: Float[Tensor, "... n"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and the 5th and 95th percentile, over the last dimension; NaN is left out."""
    low, high = torch.nanquantile(values, torch.tensor([0.05, 0.95]).to(values), dim=-1)
    return values.nanmean(-1), low, high


def _spectra(model: ImageClassifier, space: str) -> Eigendecomposition:
    return (
        pixel_spectra(model) if space == PIXEL_SPACE else model.tensor(space).interaction().eigh()
    )


def _of_sign(spectra: Eigendecomposition, sign: int, k: int) -> Eigendecomposition:
    """The k pairs of largest eigenvalue of one sign, for every class."""
    order = (sign * spectra.values).argsort(dim=-1, descending=True, stable=True)[..., :k]
    picked = order[..., None].expand(*order.shape, spectra.d)
    return replace(
        spectra,
        values=spectra.values.gather(-1, order),
        vectors=spectra.vectors.gather(-2, picked),
        residuals=spectra.residuals.gather(-1, order),
    )


def _by_rank(first: Eigendecomposition, second: Eigendecomposition, k: int) -> Tensor:
    """[k], absolute cosine of eigenvectors of equal rank, mean over classes; NaN where none is left."""
    match = match_eigenvectors(first, second, by="rank")
    total = torch.zeros(k, dtype=torch.float64)
    count = torch.zeros_like(total)
    total.index_add_(0, match.first, match.cosines.double())
    count.index_add_(0, match.first, torch.ones_like(match.cosines, dtype=torch.float64))
    return total / count


# ---------------------------------------------------------------------- figures


def similarity_figure(result: SeedsAndSizes) -> go.Figure:
    """Similarity within sizes and, of several, to the largest and between all (Fig. 5A, 18B, 18C)."""
    several = len(result.sizes) > 1
    titles = [f"within a size, {sign}" for sign in SIGNS]
    if several:
        titles += [f"to size {result.sizes[-1]}, positive", "between sizes, first positive"]
    figure = make_subplots(
        rows=1 + several,
        cols=2,
        subplot_titles=titles,
        horizontal_spacing=0.1,
        vertical_spacing=0.16,
    )
    ranks = list(range(1, result.within.shape[2] + 1))
    mean, low, high = result.within_interval()
    for i, size in enumerate(result.sizes):
        for sign in range(2):
            figure.add_trace(band(ranks, low[i, sign], high[i, sign], i), 1, sign + 1)
            own = line(ranks, mean[i, sign], i, f"size {size}")
            figure.add_trace(own.update(showlegend=sign == 0), 1, sign + 1)
        if i < len(result.sizes) - 1:
            across = line(ranks, result.between[i, -1, 0], i, f"size {size}")
            figure.add_trace(across.update(showlegend=False), 2, 1)
    if several:
        names = [str(size) for size in result.sizes]
        grid = go.Heatmap(
            z=rounded(result.between[:, :, 0, 0]),
            x=names,
            y=names,
            colorscale="Blues",
            showscale=False,
            texttemplate="%{z:.2f}",
            zmin=0,
            zmax=1,
        )
        figure.add_trace(grid, 2, 2)
        figure.update_xaxes(type="category", title="size", row=2, col=2)
        figure.update_yaxes(type="category", title="size", row=2, col=2)
    for row, column in ((1, 1), (1, 2), *([(2, 1)] if several else [])):
        figure.update_yaxes(range=[0, 1.02], title="absolute cosine", row=row, col=column)
        figure.update_xaxes(title="rank", row=row, col=column)
    return sized(figure, 880, 640 if several else 360)


def sizes_truncation_figure(result: SeedsAndSizes) -> go.Figure:
    """Accuracy, and accuracy lost, against the eigenvectors kept for each class (Fig. 5B, 18A)."""
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=["test accuracy", "accuracy lost"], horizontal_spacing=0.1
    )
    for i, (size, part) in enumerate(result.truncation().groupby("size")):
        kept = part["eigenvectors"].tolist()
        accuracy = line(kept, part["accuracy"].tolist(), i, f"size {size}")
        lost = line(kept, part["lost"].tolist(), i, f"size {size}").update(showlegend=False)
        figure.add_trace(accuracy, 1, 1)
        figure.add_trace(band(kept, part["low"].tolist(), part["high"].tolist(), i), 1, 2)
        figure.add_trace(lost, 1, 2)
    axis = {"type": "log", "tickvals": list(result.kept)}
    figure.update_xaxes(title="eigenvectors kept for each class", **axis)
    figure.update_yaxes(title="test accuracy", col=1)
    figure.update_yaxes(title="accuracy lost", col=2)
    return sized(figure, 880, 360)


@register("similarity", SimilaritySettings)
def similarity_page(data: ImageData, settings: SimilaritySettings, runs: Runs) -> Page:
    result = seeds_and_sizes(data, settings, runs=runs)
    truncation = result.truncation()
    largest = truncation[truncation["size"] == result.sizes[-1]]
    shaded = (
        "Two seeds make one pair of each size, which has no spread; the accuracy lost is shaded between "
        "the two runs."
        if settings.seeds == 2
        else "Shaded: the middle 90 % of the pairs, or runs."
    )
    where = "pixel" if settings.space == PIXEL_SPACE else "embedding"
    return Page(
        "The same eigenvectors in other seeds and sizes",
        f"Fig. 5, 18. {settings.seeds} seeds of each size; absolute cosine of eigenvectors of equal "
        f"rank, positive and negative apart, mean over classes, in {where} space, never a model with "
        f"itself. {shaded}",
        [similarity_figure(result), sizes_truncation_figure(result)],
        {"similarity": result.to_pandas(), "truncation": truncation},
        {
            "cosine of the first positive eigenvectors": {
                size: float(result.within[i, 0, 0].nanmean()) for i, size in enumerate(result.sizes)
            },
            "accuracy lost by eigenvectors a class, largest size": dict(
                zip(largest["eigenvectors"].tolist(), largest["lost"].tolist(), strict=True)
            ),
        },
    )
