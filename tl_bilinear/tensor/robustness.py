"""How far every input of a classifier is from every other class, exactly, and what attacks find.

The logits of a bilinear classifier are quadratic forms of its input, so the margin of class y over a
rival j is one too, and its boundary's distance is exact (`boundary`). The least over rivals is the size
of the smallest change in l2 that changes the answer: not a bound, and no attack can beat it.

>>> found = adversarial_distances(model.tensor(), images)
>>> found.radius, found.nearest                       # [n], [n, d]: the nearest adversarial images
>>> certified_accuracy(found, labels, radii=[0.5, 1.0]).to_pandas()

**Pixels.** Distances live in the tensor's input space. A model with an embedding is folded first, best
in float64: ``tensor.to(torch.float64).fold(embed.weight.T, embed.bias)``.

**Which number is what.** `AdversarialDistances.radius` is exact where inputs may lie anywhere. Where they
must stay in a box ([0, 1] of pixels) it is a lower bound; :func:`box_attack` gives an upper bound.
:func:`linf_bound` is a lower bound in the l-infinity norm. :func:`projected_gradient_attack` is a search,
which proves only what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.io import digest_of
from tl_bilinear.results import Result
from tl_bilinear.tensor import boundary
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.quadratic import QuadraticForm

if TYPE_CHECKING:
    import pandas

_ROWS = 2048
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
    wide = _classifier(tensor)
    inputs = _inputs(wide, inputs)
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
    for a, b in _pairs(classes, progress):
        difference = matrices[a] - matrices[b]
        linear = parts.linear[a] - parts.linear[b]
        values, vectors = torch.linalg.eigh(difference)
        for sign, y, j in ((1.0, a, b), (-1.0, b, a)):
            for rows in (predicted == y).nonzero()[:, 0].split(_ROWS):
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
    labels = _labels(labels, distances.distance)
    sizes = torch.tensor([require_radius(radius) for radius in radii], dtype=torch.float64)
    right = distances.predicted == labels
    holds = right & (distances.radius > sizes[:, None].to(labels.device))
    return CertifiedAccuracy(sizes, holds.double().mean(1).cpu())


def require_radius(radius: float) -> float:
    """A radius, which is a number of at least 0."""
    if not radius >= 0:
        raise ValueError(f"a radius is a length and must be at least 0, got {radius}")
    return float(radius)


# ---------------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Attack:
    """The strength of a projected-gradient attack.

    Each of `restarts` begins at a random point of the ball (the first at the input itself) and takes
    `steps` steps of `step` times the radius up the gradient of the largest rival logit less the
    label's, with momentum 0.75 and steps that shrink to a tenth.
    """

    steps: int = 100
    restarts: int = 4
    step: float = 0.2
    norm: Norm = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            checks.require_count(name, getattr(self, name), 10**6, "of the attack")
        if not self.step > 0:
            raise ValueError(f"step is a share of the radius above 0, got {self.step}")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm must be 'l2' or 'linf', got {self.norm!r}")

    def __str__(self) -> str:
        return (
            f"projected gradient, {self.norm}, {self.steps} steps of {self.step} radii, "
            f"{self.restarts} restarts, seed {self.seed}"
        )


@torch.no_grad()
def projected_gradient_attack(
    tensor: BilinearTensor,
    inputs: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    radius: float | Float[Tensor, " n"],
    attack: Attack = Attack(),
    *,
    box: tuple[float, float] | None = None,
    progress: bool = False,
) -> Bool[Tensor, " n"]:
    """Whether a search finds a change of at most `radius` after which the label is not the answer.

    Parameters
    ----------
    radius: one for all, or [n]
    box: (low, high), optional, in which changed inputs must stay

    A search: what it does not find may exist. Raises ValueError for a negative radius, labels that are
    no class, a box whose ends are crossed.
    """
    wide = _classifier(tensor)
    inputs = _inputs(wide, inputs)
    labels = _labels(labels, inputs.new_empty(len(inputs), wide.d_out))
    sizes = torch.as_tensor(radius, dtype=inputs.dtype, device=inputs.device).expand(len(inputs))
    if not bool((sizes >= 0).all()):
        raise ValueError(f"a radius is a length and must be at least 0, got {sizes.min().item()}")
    low, high = _box(box)
    generator = torch.Generator().manual_seed(attack.seed)
    broken = wide(inputs).argmax(1) != labels
    shown = tqdm(range(attack.restarts), unit="restart", disable=not progress)
    for restart in shown:
        rows = (~broken).nonzero()[:, 0]
        x, y, r = inputs[rows], labels[rows], sizes[rows, None]
        start = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        change = _within(start.to(x.device)[rows], r, attack.norm) if restart else 0 * x
        heading = torch.zeros_like(x)
        for step in range(attack.steps):
            rate = attack.step * (0.1 ** (step / max(1, attack.steps - 1)))
            gap, slope = _worst_gap(wide, x + change, y)
            broken[rows] |= gap > 0
            heading = 0.75 * heading + _direction(slope, attack.norm)
            moved = change + rate * r * _direction(heading, attack.norm)
            change = (x + _within(moved, r, attack.norm)).clamp(low, high) - x
        gap, _ = _worst_gap(wide, x + change, y)
        broken[rows] |= gap > 0
    return broken


def _worst_gap(wide: BilinearTensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest rival logit less the label's [n], and its gradient [n, d]."""
    left, right = x @ wide.left.T, x @ wide.right.T
    left = left if wide.bias_left is None else left + wide.bias_left
    right = right if wide.bias_right is None else right + wide.bias_right
    logits = torch.nn.functional.linear(left * right, wide.out, wide.bias_out)
    own = labels[:, None]
    rivals = logits.scatter(1, own, -torch.inf)
    rival = rivals.argmax(1)
    weights = wide.out[rival] - wide.out[labels]
    slope = (weights * right) @ wide.left + (weights * left) @ wide.right
    return rivals.amax(1) - logits.gather(1, own)[:, 0], slope


def _direction(slope: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return slope.sign()
    return slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-300)


def _within(change: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return torch.minimum(torch.maximum(change, -radius), radius)
    size = change.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return change * (radius / size).clamp_max(1)


@dataclass(frozen=True, eq=False)
class BoxBounds(Result):
    """The l2 distance to another class for inputs that must stay in a box, between two bounds.

    Attributes
    ----------
    lower: [n], proved: the exact distance without the box
    upper: [n], attained by `nearest`; infinite where the attack found nothing
    nearest: [n, d], inside the box; the input itself where nothing was found
    box: (low, high)
    """

    lower: Float[Tensor, " n"]
    upper: Float[Tensor, " n"]
    nearest: Float[Tensor, "n d"]
    box: tuple[float, float]


@torch.no_grad()
def box_attack(
    tensor: BilinearTensor,
    inputs: Float[Tensor, "n d"],
    distances: AdversarialDistances,
    *,
    box: tuple[float, float] = (0.0, 1.0),
    steps: int = 30,
) -> BoxBounds:
    """Bounds on the distance within a box: below the exact one without it, above by an attack.

    The attack starts at the exact nearest point and solves, `steps` times, the problem with the margin
    replaced by its tangent: the nearest point of the box on the right side of a plane. Fixed points
    satisfy the conditions of a nearest point in the box, which need not be the global one. A point
    counts only where it lies in the box and the rival's logit is no smaller.

    Raises ValueError for distances of other weights or inputs, inputs outside the box.
    """
    require_model(tensor, distances.model)
    wide = _classifier(tensor)
    inputs = _inputs(wide, inputs)
    if len(inputs) != len(distances):
        raise ValueError(f"{len(inputs)} inputs, but distances of {len(distances)}")
    low, high = _box(box)
    if bool(((inputs < low) | (inputs > high)).any()):
        raise ValueError(
            f"inputs lie between {inputs.min().item():g} and {inputs.max().item():g}, outside the box "
            f"{list(box)}"
        )
    upper = distances.radius.new_full((len(inputs),), torch.inf)
    best = inputs.clone()
    for rows in torch.arange(len(inputs), device=inputs.device).split(_ROWS):
        x, own, rival = inputs[rows], distances.predicted[rows], distances.rival[rows]
        weights = wide.out[own] - wide.out[rival]
        bias = 0 if wide.bias_out is None else wide.bias_out[own] - wide.bias_out[rival]
        at = distances.nearest[rows].clamp(low, high)
        for _ in range(steps):
            value, slope = _value_and_slope(wide, at, weights, bias)
            at = _nearest_in_box(x, slope, (slope * at).sum(1) - value, low, high)
            # A little further, so that the point is on the other side and not only at the boundary.
            for stretch in (1e-9, 1e-5, 1e-2):
                candidate = (x + (1 + stretch) * (at - x)).clamp(low, high)
                value, _ = _value_and_slope(wide, candidate, weights, bias)
                size = (candidate - x).norm(dim=1)
                better = (value <= 0) & (size < upper[rows])
                upper[rows[better]], best[rows[better]] = size[better], candidate[better]
    return BoxBounds(distances.radius, upper, best, (low, high))


def _value_and_slope(
    wide: BilinearTensor, x: Tensor, weights: Tensor, bias: Tensor | int
) -> tuple[Tensor, Tensor]:
    """A margin of each row's own output weights [n, h], and its gradient."""
    left, right = x @ wide.left.T, x @ wide.right.T
    left = left if wide.bias_left is None else left + wide.bias_left
    right = right if wide.bias_right is None else right + wide.bias_right
    slope = (weights * right) @ wide.left + (weights * left) @ wide.right
    return (weights * left * right).sum(1) + bias, slope


def _nearest_in_box(x: Tensor, slope: Tensor, level: Tensor, low: float, high: float) -> Tensor:
    """The point of the box nearest to x with ``slope . z <= level``; the most extreme where none is."""
    # z(t) = clip(x - t slope): slope . z falls with t. Ends beyond which nothing moves any more.
    edge = torch.where(slope > 0, x - low, x - high)
    end = torch.where(slope == 0, 0.0, edge / slope.where(slope != 0, torch.ones_like(slope)))
    below, above = torch.zeros_like(level), end.amax(1)
    for _ in range(40):
        middle = (below + above) / 2
        z = (x - middle[:, None] * slope).clamp(low, high)
        beyond = (slope * z).sum(1) <= level
        below, above = torch.where(beyond, below, middle), torch.where(beyond, middle, above)
    return (x - above[:, None] * slope).clamp(low, high)


# ---------------------------------------------------------------------- l-infinity


@torch.no_grad()
def linf_bound(
    tensor: BilinearTensor, inputs: Float[Tensor, "n d"], distances: AdversarialDistances
) -> Float[Tensor, " n"]:
    """A lower bound [n] on the l-infinity distance to another class; never a claim of exactness.

    The better of two for each rival: the exact l2 distance over ``sqrt(d)``; and, with
    ``|g . e| <= eps |g|_1`` and ``e^T A e >= -eps^2 c``, ``c = min(d |lambda_min|, sum_ij |A-_ij|)``
    (A- the part of A with negative eigenvalues), the positive root of ``m = eps |g|_1 + eps^2 c``.

    Rounding is not accounted for. Raises ValueError for distances of other weights or inputs.
    """
    require_model(tensor, distances.model)
    wide = _classifier(tensor)
    inputs = _inputs(wide, inputs)
    if len(inputs) != len(distances):
        raise ValueError(f"{len(inputs)} inputs, but distances of {len(distances)}")
    forms = QuadraticForm.of(wide)
    matrices = forms.interaction.dense()
    result = distances.distance / inputs.shape[1] ** 0.5
    for a, b in _pairs(wide.d_out, False):
        values, vectors = torch.linalg.eigh(matrices[a] - matrices[b])
        linear = forms.linear[a] - forms.linear[b]
        for sign, y, j in ((1.0, a, b), (-1.0, b, a)):
            falling = (sign * values).clamp_max(0)
            concave = (vectors * falling) @ vectors.T
            c = torch.minimum(-len(values) * falling.min(), concave.abs().sum())
            rows = (distances.predicted == y).nonzero()[:, 0]
            gradient = sign * (2 * inputs[rows] @ (matrices[a] - matrices[b]) + linear)
            slope, m = gradient.abs().sum(1), distances.margin[rows, j].clamp_min(0)
            # The root in a form that does not cancel, and holds for c = 0.
            root = 2 * m / (slope + (slope.square() + 4 * c * m).sqrt()).clamp_min(1e-300)
            result[rows, j] = torch.maximum(result[rows, j], root)
    return result.amin(1)


@torch.no_grad()
def linf_sdp_bound(form: QuadraticForm, x: Float[Tensor, " d"], radius: float) -> float:
    """A lower bound on one form over ``|e|_inf <= radius`` around x, by semidefinite programming.

    The largest ``m - radius^2 sum n - g^T (A + diag n)^-1 g / 4`` over ``n >= 0`` with
    ``A + diag n`` positive definite (Shor's relaxation). The solver only proposes n: the bound is then
    computed from it, so that an inexact solver costs tightness, not truth. Needs cvxpy; about
    ``d^3`` an iteration, for d up to a few hundred.

    Raises ImportError naming cvxpy where it is not installed.
    """
    try:
        import cvxpy
    except ImportError as error:
        raise ImportError("the semidefinite bound needs cvxpy: pip install cvxpy") from error
    require_radius(radius)
    wide = form.to(torch.float64)
    row = x.to(torch.float64)[None]
    matrix, gradient = wide.interaction.dense(), wide.gradient(row)[0]
    d, margin = len(matrix), float(wide(row))
    n, gamma = cvxpy.Variable(d, nonneg=True), cvxpy.Variable((1, 1))
    half = gradient.numpy()[:, None] / 2
    corner = margin - radius**2 * cvxpy.sum(n) - gamma
    block = cvxpy.bmat([[matrix.numpy() + cvxpy.diag(n), half], [half.T, corner]])
    cvxpy.Problem(cvxpy.Maximize(gamma[0, 0]), [block >> 0]).solve()
    proposed = torch.zeros(d) if n.value is None else torch.from_numpy(n.value)
    diagonal = proposed.to(torch.float64).clamp_min(0)
    least = torch.linalg.eigvalsh(matrix + torch.diag(diagonal))[0]
    scale = torch.linalg.matrix_norm(matrix, 2).clamp_min(1e-300)
    bounds = []
    for slack in (1e-9, 1e-7, 1e-5, 1e-3):
        raised = diagonal + (slack * scale - least).clamp_min(0)
        inner = torch.linalg.solve(matrix + torch.diag(raised), gradient)
        bounds.append(margin - radius**2 * float(raised.sum()) - float(gradient @ inner) / 4)
    return max(bounds)


# ---------------------------------------------------------------------- inside


def _pairs(classes: int, progress: bool) -> Iterator[tuple[int, int]]:
    every = [(a, b) for a in range(classes) for b in range(a + 1, classes)]
    yield from tqdm(every, unit="pair", disable=not progress)


def _classifier(tensor: BilinearTensor) -> BilinearTensor:
    if not isinstance(tensor, BilinearTensor):
        raise TypeError(
            f"a certificate needs a classifier that is a quadratic form of its input, a "
            f"BilinearTensor, got {type(tensor).__name__}. One bilinear layer is one, an embedding before "
            f"it folded in; several layers, or a norm between, are not: certify the last layer on "
            f"its own input (BilinearTensor.from_model(model, layer))"
        )
    if tensor.d_out < 2:
        raise ValueError("a classifier has at least two outputs, this layer has one")
    return tensor.detach().to(torch.float64)


def _inputs(wide: BilinearTensor, inputs: Tensor) -> Tensor:
    meaning = checks.meaning("d_in", wide.input_space)
    inputs = checks.require_matrix("inputs", inputs, wide.d_in, meaning, wide.left)
    checks.require_finite("inputs", inputs)
    return inputs


def _labels(labels: Tensor, like: Tensor) -> Tensor:
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


def _box(box: tuple[float, float] | None) -> tuple[float, float]:
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
