"""Adversarial masks from the weights alone (Pearce et al. 2025, section 4.4, Fig. 7 and 23).

The mask of an eigenvector is its dual among the top positive eigenvectors of all classes, a row of their
pseudo-inverse: it meets its own eigenvector and no other. No image and no forward pass goes into it;
what it does is measured on test images, beside its permutations and Gaussian masks of its strength.

Two spaces, two masks. In embedding space the dual is mapped to pixels as the paper's eigenvectors are,
through the embedding's weights: that reproduces the paper's effect, but an image changed by it no longer
moves one eigenvector only. In pixel space it does, exactly, and for the many overlapping eigenvectors of
ten classes such a mask is so long that it does next to nothing at these strengths.

A strength is the root mean square of the mask over all pixels, so that it compares with the standard
deviation of training noise; a digit's own is about 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, ImageClassifier
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

KINDS = ("mask", "permuted", "Gaussian")


@dataclass(frozen=True, eq=False)
class AdversarialMasks(Result):
    """Masks towards one class, the strongest eigenvector's first.

    Attributes
    ----------
    label: the class they steer towards
    masks: [count, pixels], of root mean square 1; zero outside `region`
    vectors: [count, pixels], the eigenvectors they come from, as images, values: [count]
    space: where the eigenvectors were taken and held apart
    region: [pixels], where a mask may act; None for everywhere
    """

    label: int
    masks: Float[Tensor, "count pixels"]
    vectors: Float[Tensor, "count pixels"]
    values: Float[Tensor, " count"]
    space: str
    region: Bool[Tensor, " pixels"] | None = None


def adversarial_masks(
    model: ImageClassifier,
    label: int,
    *,
    count: int = 3,
    k: int = 10,
    space: str = EMBEDDING_SPACE,
    region: Bool[Tensor, " pixels"] | None = None,
) -> AdversarialMasks:
    """Masks of the `count` top positive eigenvectors of a class, from the weights.

    Parameters
    ----------
    k: how many positive eigenvectors of each class the pseudo-inverse holds apart
    space: "embedding" or "pixels", where it does (see the module)
    region: [pixels] bool, where the mask may act (for a model that looks at the edge: rarely used
        pixels, :func:`~tl_bilinear.recipes.images.sweep.rare_pixels`)

    Each mask has the sign with which its eigenvector meets an all-white image positively: the
    eigenvector's own is arbitrary, and pixels are not negative.

    Raises ValueError for a label that is no class, or count above k or the positive eigenvalues.
    """
    matrices = model.tensor(space).interaction()
    if not 0 <= label < len(matrices):
        raise ValueError(f"label must number one of {len(matrices)} classes, got {label}")
    if not 1 <= count <= k:
        raise ValueError(f"count must lie between 1 and k={k}, got {count}")
    spectra = matrices.eigh(k, which="positive")
    positive = spectra.values > 0
    if int(positive[label].sum()) < count:
        raise ValueError(
            f"class {label} has {int(positive[label].sum())} positive eigenvalues, fewer than "
            f"count={count}"
        )
    start = int(positive[:label].sum())
    chosen = slice(start, start + count)
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
    return AdversarialMasks(label, masks, vectors, spectra.values[label, :count], space, region)


@dataclass(frozen=True, eq=False)
class MaskEffect(Result):
    """What masks do to a model, on images it was not trained on.

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
    """Add each mask to the images, at every strength, beside `controls` random masks of each kind.

    Control masks live where the mask does. Images under a mask are not clipped to [0, 1].
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
