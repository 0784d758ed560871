"""Adversarial masks from the weights alone (Pearce et al. 2025, section 4.4, Fig. 7 and 23).

The mask of an eigenvector is its dual among the top positive eigenvectors of all classes, a row of their
pseudo-inverse: it has product 1 with its own eigenvector and 0 with every other. No image and no forward
pass is used to make it. What it does is measured on test images, beside its permutations and Gaussian
masks of the same strength.

There are two spaces, and two masks. In embedding space the dual is mapped to pixels as the paper's
eigenvectors are, through the embedding's weights. This gives the paper's effect, but an image changed by
it no longer moves one eigenvector only. In pixel space it does, exactly; but among the many overlapping
eigenvectors of ten classes such a mask is so long that it does next to nothing at these strengths.

A strength is the root mean square of the mask over all pixels, so that it compares with the standard
deviation of training noise; that of a digit is about 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots
from torch import Generator, Tensor

from tl_bilinear.paper.image_spectra import rare_pixels
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import mosaic_figure
from tl_bilinear.plots.style import line, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.recipes.images.runs import UNKEPT
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

KINDS = ("mask", "permuted", "Gaussian")


@dataclass(frozen=True)
class AdversarialSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the models, but for the noise."""
    towards: int = 3
    """The class that the masks steer towards."""
    example: int = 8
    """The class of the image that is shown under a mask."""
    strengths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    """Strengths at which masks are measured."""
    shown: float = 0.3
    """The strength of the mask on the image shown."""


@dataclass(frozen=True, eq=False)
class AdversarialMasks(Result):
    """Masks towards one class, the strongest eigenvector's first.

    Attributes
    ----------
    label: the class they steer towards
    masks: [k, pixels], of root mean square 1; zero outside `region`
    vectors: [k, pixels], the eigenvectors they come from, as images, values: [k]
    space: where the eigenvectors were taken and held apart
    region: [pixels], where a mask may act; None for everywhere
    """

    label: int
    masks: Float[Tensor, "k pixels"]
    vectors: Float[Tensor, "k pixels"]
    values: Float[Tensor, " k"]
    space: str
    region: Bool[Tensor, " pixels"] | None = None


def adversarial_masks(
    model: ImageClassifier,
    label: int,
    *,
    k: int = 3,
    held: int = 10,
    space: str = EMBEDDING_SPACE,
    region: Bool[Tensor, " pixels"] | None = None,
) -> AdversarialMasks:
    """Masks of the k top positive eigenvectors of a class, from the weights.

    Parameters
    ----------
    held: how many positive eigenvectors of each class the pseudo-inverse holds apart; all, where a small
        model has fewer
    space: "embedding" or "pixels", where it does so (see the module)
    region: [pixels], where the mask may act; for a model that looks at the edge this can be the
        :func:`~tl_bilinear.paper.image_spectra.rare_pixels`

    The sign of an eigenvector is arbitrary, and pixels are not negative. So each mask has the sign that
    makes its eigenvector's product with an all-white image positive.

    Raises ValueError for a label that is no class, or k above `held` or the positive eigenvalues.
    """
    matrices = model.tensor(space).interaction()
    if not 0 <= label < len(matrices):
        raise ValueError(f"label must number one of {len(matrices)} classes, got {label}")
    if not 1 <= k <= held:
        raise ValueError(f"k must lie between 1 and held={held}, got {k}")
    spectra = matrices.eigh(min(held, matrices.d), which="positive")
    positive = spectra.values > 0
    if int(positive[label].sum()) < k:
        raise ValueError(
            f"class {label} has {int(positive[label].sum())} positive eigenvalues, fewer than k={k}"
        )
    start = int(positive[:label].sum())
    chosen = slice(start, start + k)
    vectors = spectra.vectors[positive]
    # Columns of the pseudo-inverse: product 1 with the own vector, 0 with every other.
    masks = torch.linalg.pinv(vectors.double()).T[chosen].to(vectors)
    vectors = vectors[chosen]
    if space == EMBEDDING_SPACE:
        masks, vectors = model.to_pixels(masks), model.to_pixels(vectors)
    signs = torch.where(vectors.sum(1) < 0, -1.0, 1.0)[:, None]
    masks, vectors = signs * masks, signs * vectors
    if region is not None:
        masks = masks * region
    masks = masks / masks.square().mean(1, keepdim=True).sqrt()
    return AdversarialMasks(label, masks, vectors, spectra.values[label, :k], space, region)


@dataclass(frozen=True, eq=False)
class MaskEffect(Result):
    """What masks do to a model on images that it was not trained on.

    Attributes
    ----------
    strengths: [s]
    accuracy: [3, masks, s], test accuracy under the mask, its permutations and Gaussian masks
    steered: [3, masks, s], share of the images of other classes that are taken for the masks' class
    """

    strengths: Sequence[float]
    accuracy: Float[Tensor, "kinds masks s"]
    steered: Float[Tensor, "kinds masks s"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a kind, mask and strength."""
        import pandas as pd

        rows = [
            (kind, mask, s, float(self.accuracy[i, mask, j]), float(self.steered[i, mask, j]))
            for i, kind in enumerate(KINDS)
            for mask in range(self.accuracy.shape[1])
            for j, s in enumerate(self.strengths)
        ]
        return pd.DataFrame(rows, columns=["kind", "mask", "strength", "accuracy", "steered"])


@torch.no_grad()
def mask_effect(
    model: ImageClassifier,
    masks: AdversarialMasks,
    images: Float[Tensor, "n pixels"],
    labels: Tensor,
    strengths: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    controls: int = 3,
    seed: int = 0,
) -> MaskEffect:
    """Add each mask to the images at every strength, and beside it `controls` random masks of each kind.

    Control masks act where the mask does. Images under a mask are not clipped to [0, 1].
    """
    generator = Generator().manual_seed(seed)
    others = labels != masks.label
    accuracy, steered = [], []
    for mask in masks.masks:
        for group in _with_controls(mask, masks.region, controls, generator):
            guesses = torch.stack(
                [
                    torch.stack([model(images + s * each).argmax(-1) for each in group])
                    for s in strengths
                ]
            )
            accuracy.append((guesses == labels).double().mean((1, 2)))
            steered.append((guesses[..., others] == masks.label).double().mean((1, 2)))
    shape = (len(masks.masks), len(KINDS), len(strengths))
    stacked = [torch.stack(each).reshape(shape).transpose(0, 1) for each in (accuracy, steered)]
    return MaskEffect(tuple(strengths), *stacked)


def _with_controls(
    mask: Tensor, region: Tensor | None, controls: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask itself, its permutations and Gaussian masks: each [number, pixels]."""
    inside = torch.ones_like(mask, dtype=torch.bool) if region is None else region
    permuted, gaussian = mask.new_zeros(2, controls, len(mask))
    for row in range(controls):
        order = torch.randperm(int(inside.sum()), generator=generator)
        permuted[row, inside] = mask[inside][order]
        gaussian[row, inside] = torch.randn(len(order), generator=generator).to(mask)
    gaussian /= gaussian.square().mean(1, keepdim=True).sqrt()
    return mask[None], permuted, gaussian


# ---------------------------------------------------------------------- the study


@dataclass(frozen=True, eq=False)
class Attack(Result):
    """Masks of models trained with different noise, and what they do; keys say which model and mask.

    `example` [pixels], of `size` (height, width), is an image to show under masks of strength `shown`.
    """

    masks: dict[str, AdversarialMasks]
    effects: dict[str, MaskEffect]
    example: Float[Tensor, " pixels"]
    size: Sequence[int]
    shown: float

    def to_pandas(self) -> pandas.DataFrame:
        """One row a model, kind, mask and strength."""
        import pandas as pd

        tables = [effect.to_pandas().assign(model=name) for name, effect in self.effects.items()]
        return pd.concat(tables, ignore_index=True)


def attack(
    data: ImageData, settings: AdversarialSettings = AdversarialSettings(), *, runs: Runs = UNKEPT
) -> Attack:
    """Train models with different noise, make their masks and measure them on test images."""
    label = settings.towards
    configs = [replace(settings.config, noise=noise) for noise in (0.15, 0.3, 0.0)]
    noisy, noisier, plain = (result.model for result in runs.train(data, configs))
    made = {
        "noise 0.15": (noisy, adversarial_masks(noisy, label)),
        "noise 0.3": (noisier, adversarial_masks(noisier, label)),
        "no noise": (plain, adversarial_masks(plain, label)),
        "no noise, edge only": (plain, adversarial_masks(plain, label, region=rare_pixels(data))),
        "noise 0.15, pixel-space dual": (noisy, adversarial_masks(noisy, label, space=PIXEL_SPACE)),
    }
    test = data.test_images, data.test_labels
    return Attack(
        {name: masks for name, (_, masks) in made.items()},
        {
            name: mask_effect(model, masks, *test, settings.strengths)
            for name, (model, masks) in made.items()
        },
        data.test_images[int((data.test_labels == settings.example).nonzero()[0])],
        data.size,
        settings.shown,
    )


def masks_figure(result: Attack) -> go.Figure:
    """A row a model: eigenvectors, their masks, an image, and it under the first mask (Fig. 7, 23)."""
    tiles = []
    for found in result.masks.values():
        image = (result.example + result.shown * found.masks[0])[None]
        tiles.append(torch.cat([found.vectors, found.masks, result.example[None], image]))
    numbers = range(1, len(found.masks) + 1)
    grey = torch.zeros(len(tiles), len(tiles[0]), dtype=torch.bool)
    grey[:, -2:] = True
    return mosaic_figure(
        torch.stack(tiles),
        result.size,
        rows=[name.replace(", ", "<br>") for name in result.masks],
        columns=[
            *(f"eigenvector {i}" for i in numbers),
            *(f"mask {i}" for i in numbers),
            *("image", f"+ {result.shown:g} mask 1"),
        ],
        grey=grey,
    )


def mask_effect_figure(result: Attack) -> go.Figure:
    """Accuracy and rate of the adversarial class against strength, with both controls (Fig. 7)."""
    figure = make_subplots(
        rows=2,
        cols=len(result.effects),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[name.replace(", ", "<br>") for name in result.effects],
        horizontal_spacing=0.03,
        vertical_spacing=0.08,
    )
    for column, effect in enumerate(result.effects.values(), start=1):
        for row, numbers in enumerate((effect.accuracy, effect.steered), start=1):
            for i, kind in enumerate(KINDS):
                curve = line(effect.strengths, numbers[i].mean(0), i, kind)
                curve.update(showlegend=column == 1 and row == 1, legendgroup=kind)
                figure.add_trace(curve, row, column)
    figure.update_xaxes(title="strength", row=2)
    figure.update_yaxes(range=[0, 1.02])
    figure.update_yaxes(title="accuracy", row=1, col=1)
    figure.update_yaxes(title="taken for the class", row=2, col=1)
    figure.update_annotations(font_size=12)
    return sized(figure, 880, 480).update_layout(margin_t=55)


@register("adversarial", AdversarialSettings)
def adversarial_page(data: ImageData, settings: AdversarialSettings, runs: Runs) -> Page:
    result = attack(data, settings, runs=runs)
    table = result.to_pandas()
    at = table[(table["strength"] == settings.shown) & (table["model"] == "noise 0.15")]
    return Page(
        "Adversarial masks from the weights",
        f"Fig. 7, 23, section 4.4. Masks towards class {data.classes[settings.towards]}, from the "
        f"pseudo-inverse of the ten top positive eigenvectors of every class; no image went into them. "
        f"Accuracy on test images, and how many images of other classes are taken for the class, means "
        f"over three masks, beside the masks' permutations and Gaussian masks of equal strength (root "
        f"mean square over pixels). The edge-only masks act on pixels that fewer than 1 % of training "
        f"images use. The pixel-space dual moves one eigenvector and no other of the hundred, and is "
        f"too long to do harm.",
        [masks_figure(result), mask_effect_figure(result)],
        {"effects": table},
        {
            f"accuracy at strength {settings.shown:g}, noise 0.15": at.groupby("kind")["accuracy"]
            .mean()
            .to_dict()
        },
    )
