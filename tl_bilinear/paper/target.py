"""The hidden-target task: does an eigenvector find what a model was trained on? (section 4.3, Fig. 6)

An image is labelled True where its cosine similarity to a target image, or to the target's complement
(one minus the target), exceeds a threshold (Casper 2023). A model with biases learns it; the direction
True - False of its output is decomposed. The biases split that logit exactly into an interaction, a
linear and a constant part (appendix J).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_bilinear.paper.image_spectra import rare_pixels
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import mosaic_figure
from tl_bilinear.plots.style import category, rounded, sized
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.runs import UNKEPT
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

_DIFFERENCE = torch.tensor([-1.0, 1.0])  # True - False, of the logits (False, True)


@dataclass(frozen=True)
class TargetSettings:
    """Settings of the study; the defaults are the paper's for this task."""

    config: TrainingConfig = TrainingConfig(size=64, bias=True, noise=0.1, epochs=100)
    """Of the models; they need biases."""
    seeds: int = 1
    """Models."""
    threshold: float = 0.4
    """Cosine similarity to the target above which an image is labelled True."""
    k: int = 6
    """Eigenvectors that are kept."""


@dataclass(frozen=True, eq=False)
class HiddenTarget(Result):
    """What the weights of models trained on the task say, one row a seed.

    Attributes
    ----------
    target: [pixels]
    accuracy: [seeds], base_rate: share of the more frequent label in the test images
    values: [seeds, k], vectors: [seeds, k, pixels], eigenpairs of True - False by absolute eigenvalue
    cosines: [seeds, k], absolute cosine of each eigenvector with the target, both less their mean, over
        the pixels that at least 1 % of the training images use: no weight of the others is learnt, and a
        target and its complement differ only in sign
    raw_cosines: [seeds, k], the same over all pixels, without taking off the mean
    linear: [seeds, pixels], the linear part of the biases as an image; constant: [seeds]
    parts: [seeds, 3], mean over test images of the interaction, linear and constant part of True - False
    size: (height, width) of the images
    """

    target: Float[Tensor, " pixels"]
    accuracy: Float[Tensor, " seeds"]
    base_rate: float
    values: Float[Tensor, "seeds k"]
    vectors: Float[Tensor, "seeds k pixels"]
    cosines: Float[Tensor, "seeds k"]
    raw_cosines: Float[Tensor, "seeds k"]
    linear: Float[Tensor, "seeds pixels"]
    constant: Float[Tensor, " seeds"]
    parts: Float[Tensor, "seeds 3"]
    size: Sequence[int]

    @property
    def dominance(self) -> Float[Tensor, " seeds"]:
        """First absolute eigenvalue over the second."""
        return self.values[:, 0].abs() / self.values[:, 1].abs()

    def to_pandas(self) -> pandas.DataFrame:
        """One row a seed."""
        import pandas as pd

        return pd.DataFrame(
            {
                "seed": range(len(self.accuracy)),
                "accuracy": self.accuracy.numpy(),
                "first_eigenvalue": self.values[:, 0].numpy(),
                "first_over_second": self.dominance.numpy(),
                "cosine_with_target": self.cosines[:, 0].numpy(),
                "raw_cosine_with_target": self.raw_cosines[:, 0].numpy(),
                "interaction": self.parts[:, 0].numpy(),
                "linear": self.parts[:, 1].numpy(),
                "constant": self.parts[:, 2].numpy(),
            }
        )


def target_data(data: ImageData, target: Tensor, threshold: float = 0.4) -> ImageData:
    """`data` with labels False and True: is an image like the target, or like its complement?

    Raises ValueError for a target of another size, or where all labels come out the same.
    """
    if target.shape != (data.pixels,):
        raise ValueError(f"target must have {data.pixels} pixels, got shape {list(target.shape)}")

    def labels(images: Tensor) -> Tensor:
        likeness = torch.maximum(
            cosine_similarity(images, target[None]), cosine_similarity(images, 1 - target[None])
        )
        return (likeness > threshold).long()

    train, test = labels(data.train_images), labels(data.test_images)
    if train.min() == train.max():
        raise ValueError(
            f"every training image is {bool(train[0])} at threshold {threshold}: choose another"
        )
    return replace(
        data,
        train_labels=train,
        test_labels=test,
        classes=("False", "True"),
        name=f"{data.name}, hidden target",
    )


def default_target(data: ImageData) -> Tensor:
    """The target of the challenge where `data` is MNIST: training image 6, a "1". Else the first "1"."""
    ones = (data.train_labels == 1).nonzero()[:, 0]
    if not len(ones):
        raise ValueError("the images have no class 1 to take a target from; pass target=")
    index = 6 if len(data.train_labels) > 6 and data.train_labels[6] == 1 else int(ones[0])
    return data.train_images[index]


def hidden_target(
    data: ImageData,
    settings: TargetSettings = TargetSettings(),
    *,
    target: Float[Tensor, " pixels"] | None = None,
    runs: Runs = UNKEPT,
) -> HiddenTarget:
    """Train models on the task and read them; without a `target` it is :func:`default_target`."""
    target = default_target(data) if target is None else target
    task = target_data(data, target, settings.threshold)
    base = settings.config
    configs = [replace(base, seed=base.seed + seed) for seed in range(settings.seeds)]
    results = runs.train(task, configs)
    found, linears, constants, parts = [], [], [], []
    for result in results:
        difference = result.model.tensor().project(_DIFFERENCE[None], space="True - False")
        found.append(difference.interaction()[0].eigh(settings.k))
        split = difference.parts()
        linears.append(split.linear[0])
        constants.append(split.constant[0])
        parts.append([float(part.mean()) for part in split(task.test_images)])
    vectors = torch.stack([spectrum.vectors for spectrum in found])
    used = ~rare_pixels(data)
    found_used, target_used = vectors[..., used], target[used]
    centred = found_used - found_used.mean(-1, keepdim=True)
    target_centred = target_used - target_used.mean()
    return HiddenTarget(
        target,
        torch.tensor([result.accuracy for result in results]),
        float(task.test_labels.float().mean().sub(0.5).abs() + 0.5),
        torch.stack([spectrum.values for spectrum in found]),
        vectors,
        cosine_similarity(centred, target_centred, dim=-1).abs(),
        cosine_similarity(vectors, target, dim=-1).abs(),
        torch.stack(linears),
        torch.stack(constants),
        torch.tensor(parts),
        data.size,
    )


# ---------------------------------------------------------------------- figures


def target_figure(result: HiddenTarget, k: int = 4) -> go.Figure:
    """A row a seed: the target, k eigenvectors by absolute eigenvalue, and the linear part (Fig. 6)."""
    tiles, captions = [], []
    for seed in range(len(result.accuracy)):
        linear = result.linear[seed][None]
        tiles.append(torch.cat([result.target[None], result.vectors[seed, :k], linear]))
        values = [f"{float(v):+.2f}" for v in result.values[seed, :k]]
        cosine = float(result.cosines[seed, 0])
        captions.append([f"cosine {cosine:.2f}", *values, f"{float(result.constant[seed]):+.2f}"])
    grey = torch.zeros(len(tiles), len(tiles[0]), dtype=torch.bool)
    grey[:, 0] = True
    numbers = range(1, len(tiles[0]) - 1)
    return mosaic_figure(
        torch.stack(tiles),
        result.size,
        rows=[f"seed {seed}, accuracy {float(a):.3f}" for seed, a in enumerate(result.accuracy)],
        columns=["target", *(f"eigenvector {i}" for i in numbers), "linear; constant"],
        captions=captions,
        grey=grey,
    )


def parts_figure(result: HiddenTarget) -> go.Figure:
    """Mean interaction, linear and constant part of the logit difference, a bar a seed (appendix J)."""
    figure = go.Figure()
    for seed, parts in enumerate(result.parts):
        bar = go.Bar(
            x=["interaction", "linear", "constant", "sum"],
            y=rounded(torch.cat([parts, parts.sum()[None]])),
            name=f"seed {seed}",
            marker_color=category(seed),
        )
        figure.add_trace(bar)
    return sized(figure, 620, 320, yaxis_title="mean of True - False")


@register("target", TargetSettings)
def target_page(data: ImageData, settings: TargetSettings, runs: Runs) -> Page:
    result = hidden_target(data, settings, runs=runs)
    return Page(
        "The hidden target",
        "Fig. 6, section 4.3. A model with biases learnt whether an image is like a hidden target or "
        "like the target's complement. The first eigenvector of True minus False shows the target; the "
        "cosine is taken over the pixels that images use, with both less their mean. Last column: the "
        "linear part of the biases as an image, above it the constant. Below: what the three parts add "
        "on average over test images, interaction against a learnt threshold.",
        [target_figure(result), parts_figure(result)],
        {"seeds": result.to_pandas()},
        {
            "first eigenvalue over second": result.dominance.tolist(),
            "cosine with the target": result.cosines[:, 0].tolist(),
            "accuracy": result.accuracy.tolist(),
            "share of the more frequent label": result.base_rate,
        },
    )
