"""The exact extremes of quadratic forms over all inputs of a region: bounds for language models' layers.

Truncating a layer along a direction u, or taking eigencomponents out of it, changes ``u . f(x)`` by a
quadratic form of x. Over a ball, or over an ellipsoid around the inputs' mean, the largest and the least
value of a form are the solutions of a trust-region problem: not convex, yet exact (Moré and Sorensen
1983). With eigenpairs of A and the multiplier mu of the constraint ``|y| <= r``,

    ``y^T A y + b . y + c <= c + mu r^2 + sum_i b_i^2 / (4 (mu - lambda_i))``

for every mu above 0 and above the largest lambda: a bound whatever mu is, and attained at the best one.

>>> change = truncation_change(tensor, tensor.interaction(u).eigh(k=8))
>>> ball = InputRegion.ball(tensor.d_in, radius=d**0.5)            # behind RMSNorm: every input
>>> cloud = InputRegion.ellipsoid(InputMoments.of(x)).holding(x)   # the smallest that holds these
>>> change_bounds(change, [ball, cloud], x).to_pandas()

A bound over a region says what no input in it can exceed. It is only as useful as the region is small:
hold it against what real inputs show, which `change_bounds` puts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.eigendecomposition import Eigendecomposition
from tl_bilinear.tensor.interaction import InteractionMatrix
from tl_bilinear.tensor.moments import InputMoments
from tl_bilinear.tensor.quadratic import QuadraticForm

if TYPE_CHECKING:
    import pandas

_HALVINGS = 200
"""Of the bracket of log(mu - lambda): sixty reach float64's resolution from any start."""


@dataclass(frozen=True, eq=False)
class InputRegion(Result):
    """The inputs ``centre + root y`` with ``|y| <= radius``: a ball or an ellipsoid.

    Attributes
    ----------
    centre: [d]
    root: [d, d], symmetric, positive semi-definite; the identity for a ball
    radius: at least 0
    name: its shape, in a few words
    space: what the d coordinates are
    """

    centre: Float[Tensor, " d"]
    root: Float[Tensor, "d d"]
    radius: float
    name: str
    space: str | None = None

    def __post_init__(self) -> None:
        checks.require_number("radius", self.radius, "bounds a length")

    @classmethod
    def ball(cls, d: int, radius: float, *, space: str | None = None) -> InputRegion:
        """All inputs of at most a norm; behind RMSNorm or LayerNorm ``sqrt(d)`` holds every input."""
        zero = torch.zeros(d, dtype=torch.float64)
        return cls(zero, torch.eye(d, dtype=torch.float64), radius, "ball around 0", space)

    @classmethod
    def ellipsoid(
        cls, moments: InputMoments, radius: float = 1.0, *, ridge: float = 0.01
    ) -> InputRegion:
        """``(x - mean)^T S^-1 (x - mean) <= radius^2``, S the covariance with a ridge.

        Parameters
        ----------
        radius: in standard deviations; inputs of a Gaussian population lie near ``sqrt(d)``
        ridge: t in ``(1 - t) S + t tr(S)/d I``: 0 leaves no room where inputs never vary

        Raises ValueError for a ridge outside [0, 1] and inputs that are all equal.
        """
        metric = moments.centred().metric(ridge)
        root = metric.root(torch.eye(moments.d, dtype=torch.float64, device=moments.mean.device))
        name = f"ellipsoid of {moments.population}, ridge {ridge:g}"
        return cls(moments.mean.double(), root, radius, name, moments.space)

    def __str__(self) -> str:
        return f"{self.name}, radius {self.radius:.3g}"

    @property
    def d(self) -> int:
        return len(self.centre)

    def length(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """|y| of each input; infinite where no y leads to it."""
        x = checks.require_matrix("x", x, self.d, checks.meaning("d", self.space), self.centre)
        offset = x - self.centre
        y = offset @ torch.linalg.pinv(self.root, hermitian=True)
        off = (y @ self.root - offset).norm(dim=1)
        return torch.where(off > 1e-6 * offset.norm(dim=1), torch.inf, y.norm(dim=1))

    def contains(self, x: Float[Tensor, "n d"]) -> Tensor:
        """[n], whether each input lies in it; float32's rounding outside counts as inside."""
        return self.length(x) <= self.radius * (1 + 1e-5)

    def holding(self, x: Float[Tensor, "n d"], share: float = 1.0) -> InputRegion:
        """The same shape at the smallest radius that holds a share of these inputs.

        Raises ValueError for no inputs, or a share outside (0, 1].
        """
        if not 0 < share <= 1 or not len(x):
            raise ValueError(f"share lies above 0 and up to 1 of at least one input, got {share}")
        return replace(self, radius=float(self.length(x).quantile(share)))


@dataclass(frozen=True, eq=False)
class Extremes(Result):
    """The least and the largest value of forms over a region, and where they are.

    Attributes
    ----------
    lowest, highest: [m], bounds by the dual: no input of the region goes beyond (in float64)
    at_lowest, at_highest: [m, d], inputs of the region that attain them
    """

    lowest: Float[Tensor, " m"]
    highest: Float[Tensor, " m"]
    at_lowest: Float[Tensor, "m d"]
    at_highest: Float[Tensor, "m d"]


@torch.no_grad()
def extremes(form: QuadraticForm, region: InputRegion) -> Extremes:
    """The exact least and largest value of each form of a batch over a region.

    In float64; one eigendecomposition of size d for each form, of one d x d matrix at a time.

    Raises ValueError for a region of another width.
    """
    if region.d != form.d:
        raise ValueError(f"the region is of {region.d} inputs, the form of {form.d}")
    wide = form.to(torch.float64)
    root, centre = region.root.to(wide.linear), region.centre.to(wide.linear)
    if not form.batch_shape:
        wide = QuadraticForm(
            replace(wide.interaction, weights=wide.interaction.weights[None]),
            wide.linear[None],
            wide.constant[None],
        )
    if len(wide.batch_shape) != 1:
        raise ValueError(f"extremes take one batch dimension, got {list(wide.batch_shape)}")
    found = []
    for index in range(wide.batch_shape[0]):
        one = wide[index]
        matrix = root.T @ one.interaction.dense() @ root
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        slope = one.gradient(centre[None])[0] @ root @ vectors
        start = one(centre)
        high, up = _highest(values, slope, region.radius)
        low, down = _highest(-values, -slope, region.radius)
        steps = torch.stack([down, up]) @ vectors.T @ root
        found.append((start - low, start + high, centre + steps[0], centre + steps[1]))
    lowest, highest, at_lowest, at_highest = (
        torch.stack(each) for each in zip(*found, strict=True)
    )
    return Extremes(lowest, highest, at_lowest, at_highest)


def _highest(values: Tensor, slope: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """A bound on ``sum values y^2 + slope . y`` over |y| <= radius, and the y that attains it."""
    top, size = values.max().clamp_min(0), slope.norm()
    scale = values.abs().max() + size / radius
    if not scale > 0:
        return values.new_zeros(()), torch.zeros_like(slope)
    room = top - values  # mu - lambda = room + extra, extra >= 0
    low = (torch.finfo(values.dtype).eps * scale).log()
    high = (scale + size / (2 * radius)).log()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        y = slope / (2 * (room + middle.exp()))
        low, high = (middle, high) if y.norm() > radius else (low, middle)
    extra = high.exp()
    y = slope / (2 * (room + extra))
    bound = (top + extra) * radius**2 + (slope.square() / (room + extra)).sum() / 4
    if bool(y.norm() < radius) and bool((values >= 0).any()):
        # The hard case: what is left of the radius goes along the largest eigenvalue, either way.
        last = int(values.argmax())
        rest = radius**2 - y.square().sum() + y[last] ** 2
        y[last] = rest.sqrt() * (1 if y[last] >= 0 else -1)
    return bound, y


# ---------------------------------------------------------------------- what a layer changes by


@torch.no_grad()
def truncation_change(tensor: BilinearTensor, eigen: Eigendecomposition) -> QuadraticForm:
    """What ``u . f(x)`` changes by when only these eigenpairs of each u are kept, as forms [m].

    Biases stay whole and play no part. The forms are factored: pairs are added to the layer's neurons.

    Raises ValueError for eigenpairs that carry no directions, or of another layer's width.
    """
    directions = eigen.directions
    if directions is None:
        raise ValueError(
            "these eigenpairs carry no output directions: take them from tensor.interaction(u).eigh(k)"
        )
    if (directions.shape[-1], eigen.d) != (tensor.d_out, tensor.d_in):
        raise ValueError(
            f"eigenpairs of a layer from {eigen.d} to {directions.shape[-1]}, the tensor goes from "
            f"{tensor.d_in} to {tensor.d_out}"
        )
    k = eigen.k
    u = directions.reshape(-1, directions.shape[-1]).to(tensor.dtype)
    vectors = eigen.vectors.reshape(-1, eigen.d).to(tensor.dtype)
    values = eigen.values.reshape(-1, k).to(tensor.dtype)
    own = torch.block_diag(*values.split(1))
    interaction = InteractionMatrix(
        torch.cat([tensor.left, vectors]),
        torch.cat([tensor.right, vectors]),
        torch.cat([-(u @ tensor.out), own], 1),
        space=tensor.input_space,
    )
    return QuadraticForm(interaction, u.new_zeros(len(u), eigen.d), u.new_zeros(len(u)))


@dataclass(frozen=True, eq=False)
class ChangeBounds(Result):
    """How far outputs can change over regions of inputs, beside what given inputs show.

    Attributes
    ----------
    regions: their names
    lowest, highest: [regions, m], bounds for each of m outputs
    inside: [regions], share of the given inputs that lies in each
    measured_lowest, measured_highest: [m], over the given inputs
    typical: [m], root mean square change over them
    """

    regions: Sequence[str]
    lowest: Float[Tensor, "regions m"]
    highest: Float[Tensor, "regions m"]
    inside: Float[Tensor, " regions"]
    measured_lowest: Float[Tensor, " m"]
    measured_highest: Float[Tensor, " m"]
    typical: Float[Tensor, " m"]

    @property
    def bound(self) -> Float[Tensor, "regions m"]:
        """[regions, m], on the absolute change."""
        return torch.maximum(self.highest, -self.lowest)

    @property
    def measured(self) -> Float[Tensor, " m"]:
        """[m], the largest absolute change over the given inputs."""
        return torch.maximum(self.measured_highest, -self.measured_lowest)

    @property
    def looseness(self) -> Float[Tensor, "regions m"]:
        """[regions, m], bound over the largest change measured."""
        return self.bound / self.measured

    def to_pandas(self) -> pandas.DataFrame:
        """One row a region and output."""
        import pandas as pd

        return pd.DataFrame(
            {
                "region": [name for name in self.regions for _ in self.typical],
                "output": list(range(len(self.typical))) * len(self.regions),
                "inside": self.inside.repeat_interleave(len(self.typical)).tolist(),
                "bound": self.bound.flatten().tolist(),
                "measured": self.measured.repeat(len(self.regions)).tolist(),
                "typical": self.typical.repeat(len(self.regions)).tolist(),
                "looseness": self.looseness.flatten().tolist(),
            }
        )


@torch.no_grad()
def change_bounds(
    change: QuadraticForm, regions: Sequence[InputRegion], inputs: Float[Tensor, "n d"]
) -> ChangeBounds:
    """Bound changes [m] over regions, and measure them on inputs.

    Parameters
    ----------
    change: forms with one batch dimension, as `truncation_change` makes them
    inputs: [n, d], for example what the layer reads on a text
    """
    if not regions:
        raise ValueError("give at least one region of inputs")
    wide = change.to(torch.float64)
    x = checks.require_matrix("inputs", inputs, change.d, "d, the layer's inputs", wide.linear)
    checks.require_finite("inputs", x)
    if not len(x):
        raise ValueError("give at least one input to measure on")
    met = wide(x)
    found = [extremes(change, region) for region in regions]
    inside = [region.contains(x).double().mean() for region in regions]
    return ChangeBounds(
        tuple(map(str, regions)),
        torch.stack([each.lowest for each in found]),
        torch.stack([each.highest for each in found]),
        torch.stack(inside),
        met.amin(0),
        met.amax(0),
        met.square().mean(0).sqrt(),
    )
