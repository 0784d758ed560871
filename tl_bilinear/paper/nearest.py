"""The nearest image with another answer: which eigenvectors pay for it, and how far detours are.

The smallest change that turns an answer is known exactly (`tl_bilinear.tensor.robustness`). Here it is
taken apart into the eigenvectors of the margin, and held against changes along given directions: the
steepest one, the paper's adversarial mask (section 4.4), a random one. Along a line every margin is a
parabola, so those lengths are exact as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.paper.adversarial import adversarial_masks
from tl_bilinear.plots import mosaic_figure
from tl_bilinear.recipes.images import ImageClassifier, ImageData
from tl_bilinear.results import Result
from tl_bilinear.tensor import (
    AdversarialDistances,
    BilinearTensor,
    QuadraticForm,
    adversarial_distances,
    box_attack,
)

if TYPE_CHECKING:
    import pandas

DIRECTIONS = ("steepest", "adversarial mask", "random")
PAYERS = 3


@dataclass(frozen=True, eq=False)
class NearestImages(Result):
    """Images, the nearest images with another answer, and the eigenvectors that pay for the change.

    The margin of the answer over its rival falls from m to 0 along the change; with eigenvectors v_i of
    the margin's form (and a linear part, where the model has biases) it falls by
    ``sum_i lambda_i ((v_i . nearest)^2 - (v_i . image)^2)``, term by term.

    Attributes
    ----------
    images, nearest: [n, pixels]
    predicted, rival: [n]
    distance: [n], proved: no nearer image has another answer
    within: [n], distance of an image with another answer that stays in [0, 1], found by an attack:
        the least such distance lies between the two
    vectors: [n, 3, pixels], eigenvectors that pay most; payments: [n, 3], as shares of the margin
    size: (height, width); names: of the classes
    """

    images: Float[Tensor, "n pixels"]
    nearest: Float[Tensor, "n pixels"]
    predicted: Int[Tensor, " n"]
    rival: Int[Tensor, " n"]
    distance: Float[Tensor, " n"]
    within: Float[Tensor, " n"]
    vectors: Float[Tensor, "n 3 pixels"]
    payments: Float[Tensor, "n 3"]
    size: Sequence[int]
    names: Sequence[str]


@torch.no_grad()
def nearest_images(
    tensor: BilinearTensor, images: Float[Tensor, "n pixels"], data: ImageData
) -> NearestImages:
    """The nearest adversarial image of each image, and the three eigenvectors that pay most for it."""
    wide = images.to(torch.float64)
    found = adversarial_distances(tensor, wide)
    boxed = box_attack(tensor, wide, found)
    vectors, payments = [], []
    for row in range(len(images)):
        weights = wide.new_zeros(tensor.d_out)
        weights[found.predicted[row]], weights[found.rival[row]] = 1, -1
        form = QuadraticForm.of(tensor, weights)
        values, basis = torch.linalg.eigh(form.interaction.dense())
        before, after = basis.T @ wide[row], basis.T @ found.nearest[row]
        paid = values * (before.square() - after.square()) / form(wide[row])
        most = paid.argsort(descending=True)[:PAYERS]
        vectors.append(basis[:, most].T)
        payments.append(paid[most])
    return NearestImages(
        wide,
        found.nearest,
        found.predicted,
        found.rival,
        found.radius,
        boxed.upper,
        torch.stack(vectors),
        torch.stack(payments),
        data.size,
        data.classes,
    )


def nearest_figure(result: NearestImages) -> go.Figure:
    """Images, their nearest adversarial images, the change, and the eigenvectors that pay for it."""
    change = result.nearest - result.images
    tiles = torch.cat(
        [torch.stack([result.images, result.nearest, change], 1), result.vectors], 1
    ).float()
    grey = torch.zeros(tiles.shape[:2], dtype=torch.bool)
    grey[:, :2] = True
    names = result.names
    captions = [
        [
            f"taken for {names[int(own)]}",
            f"for {names[int(rival)]} at {float(distance):.2f}",
            "",
            *(f"pays {float(share):.0%}" for share in paid),
        ]
        for own, rival, distance, paid in zip(
            result.predicted, result.rival, result.distance, result.payments, strict=True
        )
    ]
    columns = ["image", "nearest other", "change", *(["eigenvector"] * PAYERS)]
    return mosaic_figure(
        tiles,
        result.size,
        columns=columns,
        captions=captions,
        grey=grey,
        title="The nearest image with another answer, and what pays for the change",
    )


@dataclass(frozen=True, eq=False)
class Detours(Result):
    """How much longer than the smallest change a change along a given direction must be.

    Attributes
    ----------
    reached: [3], share of the images whose answer changes anywhere along the direction: the steepest
        one (down the margin to the nearest rival), the paper's mask, a random one
    ratio: [3], median over those of the length along the direction over the exact distance
    label: the class that the masks steer towards; images of other classes were tried
    """

    reached: Float[Tensor, " 3"]
    ratio: Float[Tensor, " 3"]
    label: int

    def to_pandas(self) -> pandas.DataFrame:
        """One row a direction."""
        import pandas as pd

        columns = {"reached": self.reached.tolist(), "over the minimum": self.ratio.tolist()}
        return pd.DataFrame({"direction": list(DIRECTIONS)} | columns)


@torch.no_grad()
def detours(
    model: ImageClassifier,
    tensor: BilinearTensor,
    images: Float[Tensor, "n pixels"],
    distances: AdversarialDistances,
    *,
    label: int = 3,
    seed: int = 0,
) -> Detours:
    """Follow three directions from each image until its answer changes; along a line this is exact.

    Raises ValueError where every image is already taken for the label.
    """
    rows = (distances.predicted != label).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"every image is taken for class {label}: no other class to start from")
    x, own = images[rows].to(torch.float64), distances.predicted[rows]
    weights = x.new_zeros(len(x), tensor.d_out)
    weights.scatter_(1, own[:, None], 1.0)
    weights.scatter_(1, distances.rival[rows, None], -1.0)
    slope = _gradient(tensor, x, weights)
    mask = adversarial_masks(model, label, k=1).masks[0].to(x).expand(len(x), -1)
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    reached, ratio = [], []
    for direction in (-slope, mask, random):
        length = first_change(tensor, x, own, direction / direction.norm(dim=1, keepdim=True))
        changes = length.isfinite()
        reached.append(changes.double().mean())
        over = (length / distances.radius[rows])[changes]
        ratio.append(over.median() if len(over) else over.new_tensor(torch.inf))
    return Detours(torch.stack(reached), torch.stack(ratio), label)


@torch.no_grad()
def first_change(
    tensor: BilinearTensor,
    x: Float[Tensor, "n d"],
    predicted: Int[Tensor, " n"],
    directions: Float[Tensor, "n d"],
) -> Float[Tensor, " n"]:
    """The least t >= 0 at which a rival's logit at ``x + t direction`` is no smaller; infinite if none.

    Along a line every margin is a parabola in t: its first root, not a search.
    """
    start, end, back = tensor(x), tensor(x + directions), tensor(x - directions)
    margins = [each.gather(1, predicted[:, None]) - each for each in (start, end, back)]
    zero, one, other = margins
    square, linear = (one + other) / 2 - zero, (one - other) / 2
    inside = linear.square() - 4 * square * zero
    root = inside.clamp_min(0).sqrt()
    # The two roots without cancellation: q / a and c / q.
    q = -(linear + torch.where(linear >= 0, root, -root)) / 2
    roots = torch.stack([q / square, zero / q])
    valid = (roots > 0) & roots.isfinite() & (inside >= 0)
    least = torch.where(valid, roots, torch.inf).amin(0)
    own = torch.arange(zero.shape[1], device=x.device) == predicted[:, None]
    return least.masked_fill(own, torch.inf).amin(1)


def _gradient(tensor: BilinearTensor, x: Tensor, weights: Tensor) -> Tensor:
    """Gradient of ``weights . f`` at each x, with weights of its own."""
    left, right, out = tensor.left, tensor.right, weights @ tensor.out
    pre_left = x @ left.T + (0 if tensor.bias_left is None else tensor.bias_left)
    pre_right = x @ right.T + (0 if tensor.bias_right is None else tensor.bias_right)
    return (out * pre_right) @ left + (out * pre_left) @ right
