"""Searches for changed inputs: what they find is proved, what they do not find is not.

Beside `adversarial_distances`, which is exact: a projected-gradient attack of stated strength, and an
attack that keeps to a box and so bounds the distance in it from above.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.robustness import (
    ROWS,
    AdversarialDistances,
    Norm,
    as_box,
    as_classifier,
    as_inputs,
    as_labels,
    require_model,
)


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
    wide = as_classifier(tensor)
    inputs = as_inputs(wide, inputs)
    labels = as_labels(labels, inputs.new_empty(len(inputs), wide.d_out))
    sizes = torch.as_tensor(radius, dtype=inputs.dtype, device=inputs.device).expand(len(inputs))
    if not bool((sizes >= 0).all()):
        raise ValueError(f"a radius is a length and must be at least 0, got {sizes.min().item()}")
    low, high = as_box(box)
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
    wide = as_classifier(tensor)
    inputs = as_inputs(wide, inputs)
    if len(inputs) != len(distances):
        raise ValueError(f"{len(inputs)} inputs, but distances of {len(distances)}")
    low, high = as_box(box)
    if bool(((inputs < low) | (inputs > high)).any()):
        raise ValueError(
            f"inputs lie between {inputs.min().item():g} and {inputs.max().item():g}, outside the box "
            f"{list(box)}"
        )
    upper = distances.radius.new_full((len(inputs),), torch.inf)
    best = inputs.clone()
    for rows in torch.arange(len(inputs), device=inputs.device).split(ROWS):
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
