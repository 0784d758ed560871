"""The hidden-target task: does an eigenvector find what a model was trained on? (section 4.3, Fig. 6)

An image is labelled True where its cosine similarity to a target image, or to the target's complement
(one minus the target), exceeds a threshold (Casper 2023). A model with biases learns it; the direction
True - False of its output is decomposed. The biases split that logit exactly into an interaction, a
linear and a constant part (appendix J).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.runs import UNKEPT, Runs
from tl_bilinear.recipes.images.sweep import rare_pixels
from tl_bilinear.recipes.images.training import TrainingConfig
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

TARGET_CONFIG = TrainingConfig(size=64, bias=True, noise=0.1, weight_decay=1.0, epochs=100)
"""The paper's settings for this task."""

_DIFFERENCE = torch.tensor([-1.0, 1.0])  # True - False, of the logits (False, True)


@dataclass(frozen=True, eq=False)
class HiddenTarget(Result):
    """What the weights of models trained on the task say; the first dimension is the seed.

    Attributes
    ----------
    target: [pixels]
    accuracy: [seeds], base_rate: share of the more frequent label in the test images
    values: [seeds, k], vectors: [seeds, k, pixels], eigenpairs of True - False by absolute eigenvalue
    cosines: [seeds, k], absolute cosine of each eigenvector with the target over the pixels that at
        least 1 % of the training images use (no weight of the others is learnt), both less their mean: a
        target and its complement then differ in nothing but the sign
    raw_cosines: [seeds, k], the same over all pixels, no mean taken off
    linear: [seeds, pixels], what the biases make of the image, constant: [seeds]
    parts: [seeds, 3], mean over test images of the interaction, linear and constant part of True - False
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
    """The target of the challenge where `data` is MNIST: training image 6, a "1"; else the first "1"."""
    ones = (data.train_labels == 1).nonzero()[:, 0]
    if not len(ones):
        raise ValueError("the images have no class 1 to take a target from; pass target=")
    index = 6 if len(data.train_labels) > 6 and data.train_labels[6] == 1 else int(ones[0])
    return data.train_images[index]


def hidden_target(
    data: ImageData,
    config: TrainingConfig = TARGET_CONFIG,
    *,
    target: Tensor | None = None,
    threshold: float = 0.4,
    seeds: int = 1,
    k: int = 6,
    runs: Runs = UNKEPT,
) -> HiddenTarget:
    """Train models on the task and read them; `target` None takes :func:`default_target`."""
    target = default_target(data) if target is None else target
    task = target_data(data, target, threshold)
    results = runs.train(task, [replace(config, seed=config.seed + s) for s in range(seeds)])
    found, linears, constants, parts = [], [], [], []
    for result in results:
        difference = result.model.tensor().project(_DIFFERENCE[None], space="True - False")
        found.append(difference.interaction()[0].eigh(k))
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
    )
