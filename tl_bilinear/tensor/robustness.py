"""How far every input of a classifier is from every other class, exactly, and what attacks find.

The logits of a bilinear classifier are quadratic forms of its input, so the margin of class y over a
rival j is one too, and its boundary's distance is exact (`boundary`). The least over rivals is the size
of the smallest change in l2 that changes the answer: not a bound, and no attack can beat it.

>>> found = adversarial_distances(model.tensor(), images)
>>> found.radius, found.nearest                       # [n], [n, d]: the nearest adversarial images
>>> certified_accuracy(found, labels, radii=[0.5, 1.0]).to_pandas()

**Pixels.** Distances live in the tensor's input space. A model with an embedding is folded first, best
in float64: ``tensor.to(torch.float64).fold(embed.weight.T, embed.bias)``.

**Which number is what.** `AdversarialDistances.radius` is exact where inputs may lie anywhere. Where
they must stay in a box ([0, 1] of pixels) it is a lower bound and `attacks.box_attack` gives an upper
bound. `linf.linf_bound` is a lower bound in the l-infinity norm. `attacks.projected_gradient_attack` is
a search, which proves only what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.io import digest_of
from tl_bilinear.results import Result
from tl_bilinear.tensor import boundary
from tl_bilinear.tensor.bilinear import BilinearTensor

if TYPE_CHECKING:
    import pandas

ROWS = 2048
"""Inputs at a time: a few arrays [rows, d] in float64."""

Norm = Literal["l2", "linf"]


@dataclass(frozen=True, eq=False)
class AdversarialDistances(Result):
    """Exact l2 distances of n inputs to every class that is not theirs.

    Attributes
    ----------
    predicted: [n], the class of the largest logit, whatever the label says
    margin: [n, classes], its logit less each other; 0 for itself
    distance: [n, classes], the least l2 change after which a rival's logit is no smaller; infinite for
        the class itself and for a rival that no input reaches
    multiplier: [n, classes], nu of each: what `certificate_checker` needs to prove it again
    rival: [n], the nearest rival
    nearest: [n, d], the input nearest to x at which the rival's logit is no smaller
    model: digest of the weights that these belong to
    space: what the d coordinates are
    """

    predicted: Int[Tensor, " n"]
    margin: Float[Tensor, "n classes"]
    distance: Float[Tensor, "n classes"]
    multiplier: Float[Tensor, "n classes"]
    rival: Int[Tensor, " n"]
    nearest: Float[Tensor, "n d"]
    model: str
    space: str | None = None

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def radius(self) -> Float[Tensor, " n"]:
        """[n], the distance to the nearest rival."""
        return self.distance.amin(1)

    def to_pandas(self) -> pandas.DataFrame:
        """One row an input: predicted, rival, radius."""
        import pandas as pd

        return pd.DataFrame(
            {
                "predicted": self.predicted.cpu().numpy(),
                "rival": self.rival.cpu().numpy(),
                "radius": self.radius.cpu().numpy(),
            }
        )


@torch.no_grad()
def adversarial_distances(
    tensor: BilinearTensor, inputs: Float[Tensor, "n d"], *, progress: bool = False
) -> AdversarialDistances:
    """The exact l2 distance of every input to every rival class, and the nearest input of all.

    Parameters
    ----------
    tensor: the classifier, from the inputs' space to logits, biases included
    inputs: [n, d]
    progress: show a progress bar over pairs of classes

    In float64. Inputs matter only through the span of the layer's factors, of dimension
    ``r <= min(d, 2 h)``: one eigendecomposition ``~13 r^3`` for each pair of classes, then about
    ``4 n (classes - 1) r^2``. The ten classes of MNIST and 10,000 inputs take seconds.

    Raises ValueError for fewer than two outputs, inputs of another width, NaN.
    """
    wide = as_classifier(tensor)
    inputs = as_inputs(wide, inputs)
    basis = span(wide)
    small = wide.fold(basis)
    matrices, parts = small.interaction().dense(), small.parts()
    z = inputs @ basis.T
    logits = wide(inputs)
    predicted = logits.argmax(1)
    n, classes = logits.shape
    own = torch.arange(classes, device=logits.device) == predicted[:, None]
    margin = logits.gather(1, predicted[:, None]) - logits
    distance = torch.full_like(logits, torch.inf)
    multiplier = torch.zeros_like(logits)
    nearest, best = inputs.clone(), logits.new_full((n,), torch.inf)
    for a, b in class_pairs(classes, progress):
        difference = matrices[a] - matrices[b]
        linear = parts.linear[a] - parts.linear[b]
        values, vectors = torch.linalg.eigh(difference)
        for sign, y, j in ((1.0, a, b), (-1.0, b, a)):
            for rows in (predicted == y).nonzero()[:, 0].split(ROWS):
                gradient = sign * (2 * z[rows] @ difference + linear) @ vectors
                found = boundary.solve(sign * values, gradient, margin[rows, j])
                distance[rows, j], multiplier[rows, j] = found.distance, found.multiplier
                nearer = found.distance < best[rows]
                closest = rows[nearer]
                best[closest] = found.distance[nearer]
                nearest[closest] = inputs[closest] + found.steps[nearer] @ vectors.T @ basis
    rival = torch.where(own, torch.inf, distance).argmin(1)
    # Where no rival is reached, the first that is not the class itself.
    rival = torch.where(rival == predicted, (predicted == 0).long(), rival)
    return AdversarialDistances(
        predicted,
        margin,
        distance,
        multiplier,
        rival,
        nearest,
        model_digest(tensor),
        tensor.input_space,
    )


def model_digest(tensor: BilinearTensor) -> str:
    """What a stored result says of the weights it belongs to."""
    names = ("left", "right", "out", "bias_left", "bias_right", "bias_out")
    return digest_of({name: getattr(tensor, name) for name in names}, {})


def span(tensor: BilinearTensor) -> Float[Tensor, "r d"]:
    """Orthonormal rows that span the layer's input factors: a layer sees nothing else of its input."""
    factors = torch.cat([tensor.left, tensor.right])
    _, values, rows = torch.linalg.svd(factors, full_matrices=False)
    floor = max(factors.shape) * torch.finfo(factors.dtype).eps
    count = max(1, int((values > values[0] * floor).sum()))
    if count == tensor.d_in:
        return torch.eye(count, dtype=factors.dtype, device=factors.device)
    return rows[:count]


# ---------------------------------------------------------------------- curves


@dataclass(frozen=True, eq=False)
class CertifiedAccuracy(Result):
    """How many inputs stay right, by the size of the change: proved, and as an attack leaves them.

    Attributes
    ----------
    radii: [m]
    proved: [m], share that is right and cannot be changed within the radius: exact, so that no attack
        finds less (away from a radius that equals a distance)
    attacked: [m], share that an attack left right, an upper bound; None without one
    attack: what the attack was
    norm: "l2" or "linf"
    """

    radii: Float[Tensor, " m"]
    proved: Float[Tensor, " m"]
    attacked: Float[Tensor, " m"] | None = None
    attack: str = ""
    norm: Norm = "l2"

    def to_pandas(self) -> pandas.DataFrame:
        """One row a radius."""
        import pandas as pd

        columns = {"radius": self.radii.tolist(), "proved": self.proved.tolist()}
        if self.attacked is not None:
            columns["attacked"] = self.attacked.tolist()
        return pd.DataFrame(columns)


def certified_accuracy(
    distances: AdversarialDistances, labels: Int[Tensor, " n"], radii: Sequence[float]
) -> CertifiedAccuracy:
    """The share of inputs that are right and whose nearest rival lies beyond each radius.

    Raises ValueError for labels of another number or that are no class, a negative or NaN radius.
    """
    labels = as_labels(labels, distances.distance)
    sizes = torch.tensor([require_radius(radius) for radius in radii], dtype=torch.float64)
    right = distances.predicted == labels
    holds = right & (distances.radius > sizes[:, None].to(labels.device))
    return CertifiedAccuracy(sizes, holds.double().mean(1).cpu())


def require_radius(radius: float) -> float:
    """A radius, which is a number of at least 0."""
    if not radius >= 0:
        raise ValueError(f"a radius is a length and must be at least 0, got {radius}")
    return float(radius)


# ---------------------------------------------------------------------- what callers pass in


def class_pairs(classes: int, progress: bool) -> Iterator[tuple[int, int]]:
    """Every pair of classes a < b, with a progress bar."""
    every = [(a, b) for a in range(classes) for b in range(a + 1, classes)]
    yield from tqdm(every, unit="pair", disable=not progress)


def as_classifier(tensor: BilinearTensor) -> BilinearTensor:
    """The layer in float64, outside the autograd graph; refuses what is no classifier."""
    if not isinstance(tensor, BilinearTensor):
        raise TypeError(
            f"a certificate needs a classifier that is a quadratic form of its input, a "
            f"BilinearTensor, got {type(tensor).__name__}. One bilinear layer is one, an embedding "
            f"before it folded in; several layers, or a norm between, are not: certify the last layer "
            f"on its own input (BilinearTensor.from_model(model, layer))"
        )
    if tensor.d_out < 2:
        raise ValueError("a classifier has at least two outputs, this layer has one")
    return tensor.detach().to(torch.float64)


def as_inputs(wide: BilinearTensor, inputs: Tensor) -> Tensor:
    """Inputs [n, d] in float64, finite."""
    meaning = checks.meaning("d_in", wide.input_space)
    inputs = checks.require_matrix("inputs", inputs, wide.d_in, meaning, wide.left)
    checks.require_finite("inputs", inputs)
    return inputs


def as_labels(labels: Tensor, like: Tensor) -> Tensor:
    """Labels [n] of the classes that `like` [n, classes] has."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.shape != like.shape[:1]:
        raise ValueError(f"labels must be [{len(like)}], one an input, got {checks.shape(labels)}")
    if labels.is_floating_point():
        raise TypeError(f"labels number classes and must be integers, got {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < like.shape[1]:
        raise ValueError(
            f"labels must number the {like.shape[1]} classes from 0, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return labels.to(like.device, torch.long)


def as_box(box: tuple[float, float] | None) -> tuple[float, float]:
    """The ends of a box; everything, where there is none."""
    low, high = (-torch.inf, torch.inf) if box is None else box
    if not low < high:
        raise ValueError(f"box must be (low, high) with low < high, got {box}")
    return low, high


def require_model(tensor: BilinearTensor, digest: str) -> None:
    """Raise ValueError for a result of other weights."""
    if model_digest(tensor) != digest:
        raise ValueError(
            "these distances belong to other weights than this tensor's (a copy in another dtype has "
            "another digest): compute them again"
        )
