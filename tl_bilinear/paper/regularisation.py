"""What regularisers and augmentations do to a model (Pearce et al. 2025, Fig. 4, 13, 14 and 17).

A sweep trains the same model under several settings and reads each off its weights: the top
eigenvectors of one class, how many eigenvalues and pixels count, and how much of the top eigenvector
lies on pixels that hardly any training image uses, which is where overfitting shows. Two studies use
it: "regularisation" varies one setting at a time, "sparsity" noise and weight decay together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.paper.image_spectra import pixel_spectra, rare_pixels
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import mosaic_figure
from tl_bilinear.plots.style import POSITIVE, rounded, sized
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.augment import Blur, Perlin, Rotation, SaltAndPepper, Translation
from tl_bilinear.recipes.images.runs import UNKEPT
from tl_bilinear.results import Result
from tl_bilinear.tensor.eigendecomposition import participation

if TYPE_CHECKING:
    import pandas

TOP = 5  # eigenvectors of each class whose pixels are counted, as in Fig. 17


@dataclass(frozen=True)
class RegularisationSettings:
    """Settings of the study "regularisation"."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of every model, but for what is varied."""
    label: int = 5
    """The class whose eigenvectors are shown."""


@dataclass(frozen=True)
class SparsitySettings:
    """Settings of the study "sparsity"."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of every model, but for noise and weight decay."""
    noises: tuple[float, ...] = (0.0, 0.15, 0.4, 0.8)
    """Standard deviations of the input noise."""
    decays: tuple[float, ...] = (0.01, 0.1, 1.0, 3.0)
    """Weight decays."""


@dataclass(frozen=True, eq=False)
class Sweep(Result):
    """What was read off models under several settings: one row a setting, one column a seed.

    Attributes
    ----------
    settings: names of the settings, [n]
    label: the class whose eigenvectors are kept
    accuracy: [n, seeds], on clean test images
    effective_rank: [n, seeds], (L1/L2)^2 of the eigenvalues, mean over classes, in pixel space
    effective_pixels: [n, seeds], (L1/L2)^2 of the entries of the top eigenvectors, mean over the five
        of largest absolute eigenvalue of each class
    rare: [n, seeds], share of the top eigenvector's squared norm on rarely used pixels, mean over
        classes
    values: [n, k], vectors: [n, k, pixels], the largest eigenvalues of `label` and their eigenvectors,
        of the first seed
    size: (height, width) of the images
    """

    settings: Sequence[str]
    label: int
    accuracy: Float[Tensor, "n seeds"]
    effective_rank: Float[Tensor, "n seeds"]
    effective_pixels: Float[Tensor, "n seeds"]
    rare: Float[Tensor, "n seeds"]
    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n k pixels"]
    size: Sequence[int]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a setting and seed."""
        import pandas as pd

        n, seeds = self.accuracy.shape
        return pd.DataFrame(
            {
                "setting": [name for name in self.settings for _ in range(seeds)],
                "seed": list(range(seeds)) * n,
                "accuracy": self.accuracy.flatten().numpy(),
                "effective_rank": self.effective_rank.flatten().numpy(),
                "effective_pixels": self.effective_pixels.flatten().numpy(),
                "rare_pixels": self.rare.flatten().numpy(),
            }
        )


def regularisers(base: TrainingConfig) -> dict[str, TrainingConfig]:
    """The paper's ablations by name, each with one setting of `base` changed.

    Other kinds of noise replace the input noise of `base`. Geometric augmentations keep it: on their own
    they leave the overfitting at the edges.
    """
    clean = replace(base, noise=0.0)
    named = {f"noise {std:g}": replace(base, noise=std) for std in (0.0, 0.15, 0.3, 0.6, 1.0)}
    for share in (0.1, 0.3):
        named[f"salt and pepper {share:g}"] = replace(clean, augment=(SaltAndPepper(share),))
    for std in (0.3, 0.6):
        named[f"Perlin {std:g}"] = replace(clean, augment=(Perlin(std),))
    for std in (0.3, 1.0):
        named[f"activation noise {std:g}"] = replace(clean, activation_noise=std)
    for share in (0.2, 0.6):
        named[f"dropout {share:g}"] = replace(clean, dropout=share)
    for decay in (0.0, 0.1, 1.0, 5.0):
        named[f"weight decay {decay:g}"] = replace(base, weight_decay=decay)
    for pixels in (3, 7):
        named[f"translation {pixels}"] = replace(base, augment=(Translation(pixels),))
    for degrees in (15, 45):
        named[f"rotation {degrees}"] = replace(base, augment=(Rotation(degrees),))
    for sigma in (0.7, 1.5):
        named[f"blur {sigma:g}"] = replace(base, augment=(Blur(sigma),))
    return named


def sweep(
    data: ImageData,
    settings: Mapping[str, TrainingConfig],
    *,
    label: int = 0,
    seeds: int = 1,
    k: int = 4,
    runs: Runs = UNKEPT,
) -> Sweep:
    """Train every setting with `seeds` seeds, counted from its own, and read the models.

    Raises ValueError for a label that is no class.
    """
    if not 0 <= label < len(data.classes):
        raise ValueError(f"label must number one of {len(data.classes)} classes, got {label}")
    configs = [
        replace(config, seed=config.seed + seed)
        for config in settings.values()
        for seed in range(seeds)
    ]
    results = runs.train(data, configs)
    rarely = rare_pixels(data)
    rows = []
    for result in results:
        spectra = pixel_spectra(result.model)
        top = spectra.top(min(TOP, spectra.k)).vectors
        rows.append(
            (
                result.accuracy,
                float(spectra.effective_rank().mean()),
                float(participation(top).mean()),
                float(spectra.vectors[:, 0, rarely].square().sum(-1).mean()),
            )
        )
    numbers = torch.tensor(rows, dtype=torch.float64).reshape(len(settings), seeds, 4)
    accuracy, rank, pixels, rare = numbers.unbind(-1)
    values, vectors = [], []
    for result in results[::seeds]:
        count = min(k, result.config.size)
        found = result.model.tensor().interaction()[label].eigh(count, which="positive")
        values.append(found.values)
        vectors.append(found.vectors)
    return Sweep(
        tuple(settings),
        label,
        accuracy,
        rank,
        pixels,
        rare,
        torch.stack(values),
        torch.stack(vectors),
        data.size,
    )


# ---------------------------------------------------------------------- figures


def sweep_figure(result: Sweep) -> go.Figure:
    """The top eigenvectors of one class under every setting, with the accuracy (Fig. 4, 13, 14)."""
    k = result.vectors.shape[1]
    half = -(-len(result.settings) // 2)
    tiles = result.vectors.new_full((half, 2 * k + 1, result.vectors.shape[-1]), torch.nan)
    captions = [[""] * (2 * k + 1) for _ in range(half)]
    for index, name in enumerate(result.settings):
        row, start = index % half, (index // half) * (k + 1)
        tiles[row, start : start + k] = result.vectors[index]
        accuracy = float(result.accuracy[index].mean())
        captions[row][start + (k - 1) // 2] = f"<b>{name}</b>, accuracy {accuracy:.3f}"
    return mosaic_figure(tiles, result.size, captions=captions)


def sweep_numbers_figure(result: Sweep) -> go.Figure:
    """Accuracy, effective rank, effective pixels and share on rare pixels of every setting."""
    panels = {
        "accuracy": result.accuracy,
        "effective rank": result.effective_rank,
        "effective pixels": result.effective_pixels,
        "share on rare pixels": result.rare,
    }
    figure = make_subplots(
        rows=1, cols=4, shared_yaxes=True, subplot_titles=list(panels), horizontal_spacing=0.03
    )
    for column, numbers in enumerate(panels.values(), start=1):
        for seed in range(numbers.shape[1]):
            points = go.Scatter(
                x=rounded(numbers[:, seed]),
                y=list(result.settings),
                mode="markers",
                marker={"color": POSITIVE, "size": 7, "opacity": 0.7},
            )
            figure.add_trace(points, 1, column)
    figure.update_yaxes(autorange="reversed")
    return sized(figure, 880, 110 + 21 * len(result.settings), showlegend=False)


@register("regularisation", RegularisationSettings)
def regularisation_page(data: ImageData, settings: RegularisationSettings, runs: Runs) -> Page:
    result = sweep(data, regularisers(settings.config), label=settings.label, runs=runs)
    return Page(
        "Regularisers and augmentations",
        f"Fig. 4, 13, 14, appendix B. The top four positive eigenvectors of class "
        f"{data.classes[settings.label]} under every setting. Without input noise they look at single "
        f"pixels at the edge, which hardly any image uses: the share of the top eigenvector on those "
        f"pixels measures it. Geometric augmentations keep the input noise.",
        [sweep_figure(result), sweep_numbers_figure(result)],
        {"settings": result.to_pandas()},
        {name: float(a.mean()) for name, a in zip(result.settings, result.accuracy, strict=True)},
    )


# ---------------------------------------------------------------------- noise and weight decay


@dataclass(frozen=True, eq=False)
class SparsityGrid(Result):
    """A sweep over every noise with every weight decay; its rows go through the decays first."""

    noises: Sequence[float]
    decays: Sequence[float]
    swept: Sweep

    def to_pandas(self) -> pandas.DataFrame:
        """One row a setting and seed."""
        return self.swept.to_pandas()


def sparsity_grid(
    data: ImageData, settings: SparsitySettings = SparsitySettings(), *, runs: Runs = UNKEPT
) -> SparsityGrid:
    """Train and read every noise with every weight decay (Fig. 17)."""
    grid = {
        f"noise {noise:g}, weight decay {decay:g}": replace(
            settings.config, noise=noise, weight_decay=decay
        )
        for noise in settings.noises
        for decay in settings.decays
    }
    return SparsityGrid(settings.noises, settings.decays, sweep(data, grid, runs=runs))


def sparsity_figure(result: SparsityGrid) -> go.Figure:
    """(L1/L2)^2 of eigenvalues and of top eigenvectors over noise and weight decay (Fig. 17)."""
    panels = {
        "eigenvalues that count": (result.swept.effective_rank, "%{z:.1f}"),
        "pixels that count": (result.swept.effective_pixels, "%{z:.1f}"),
        "accuracy": (result.swept.accuracy, "%{z:.3f}"),
    }
    figure = make_subplots(rows=1, cols=3, subplot_titles=list(panels), horizontal_spacing=0.07)
    for column, (numbers, texts) in enumerate(panels.values(), start=1):
        grid = go.Heatmap(
            z=rounded(numbers.mean(1).reshape(len(result.noises), len(result.decays))),
            x=[f"{decay:g}" for decay in result.decays],
            y=[f"{noise:g}" for noise in result.noises],
            colorscale="Blues",
            showscale=False,
            texttemplate=texts,
        )
        figure.add_trace(grid, 1, column)
    figure.update_xaxes(title="weight decay", type="category")
    figure.update_yaxes(type="category")
    figure.update_yaxes(title="input noise", col=1)
    return sized(figure, 880, 340)


@register("sparsity", SparsitySettings)
def sparsity_page(data: ImageData, settings: SparsitySettings, runs: Runs) -> Page:
    result = sparsity_grid(data, settings, runs=runs)
    return Page(
        "Noise makes eigenvectors sparse, weight decay spectra",
        "Fig. 17, appendix D. (L1/L2)² of the eigenvalues, and of the pixels of the five top "
        "eigenvectors, mean over classes.",
        [sparsity_figure(result)],
        {"grid": result.to_pandas()},
    )
