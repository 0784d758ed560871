"""Toy tasks whose interaction matrices are known: boolean gates, small arithmetic (appendix J).

A task lists all its inputs x and the outputs y it wants. A bilinear layer without biases computes
``x^T Q x`` for each output, one with biases ``[x, 1]^T Q [x, 1]``; either is linear in Q. So the
matrices that compute an output form an affine space, and everything asked of a trained layer is a
least-squares problem in the products ``x_i x_j`` over the inputs:

- what the operation must look like: the smallest matrix (Frobenius norm) that computes it best,
- what the inputs see of a trained matrix: the smallest matrix that computes the same on them (on bits
  ``x^2 = x``, so that a diagonal and a linear part can be traded),
- how far the layer is from the operation: the distance of these two, relative to the first,
- what no such matrix can do: the part of y outside their reach (a NAND without biases: a quadratic form
  is 0 at 0).

>>> task = boolean_task("xor", bits=2)
>>> task.expected(bias=False)[0]          # [[1, -1], [-1, 1]]: (x_1 - x_2)^2
>>> fitted = fit_toy(task, bias=False)
>>> fitted.distance, fitted.error         # per output, matrix and function
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Generator, Tensor

from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import mosaic_figure
from tl_bilinear.recipes.images import ImageData, Runs
from tl_bilinear.recipes.images.model import BilinearLayer
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearTensor

if TYPE_CHECKING:
    import pandas

GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda a, b: a * b,
    "or": lambda a, b: a + b - a * b,
    "xor": lambda a, b: (a - b).abs(),
    "nand": lambda a, b: 1 - a * b,
    "nor": lambda a, b: (1 - a) * (1 - b),
    "xnor": lambda a, b: 1 - (a - b).abs(),
}

Arithmetic = Literal["sum", "product", "modular sum"]

_ROUNDING = 1e-5


@dataclass(frozen=True)
class ToySettings:
    """Settings of the study; it looks at no images."""

    steps: int = 1000
    """Training steps of each layer."""
    learning_rate: float = 0.03
    """Of AdamW at the start; it falls to zero along a cosine."""
    modulus: int = 5
    """Of the modular sum."""


@dataclass(frozen=True, eq=False)
class ToyTask(Result):
    """All inputs of a task, and the outputs wanted.

    Attributes
    ----------
    name: of the task
    inputs: [n, d], targets: [n, outputs]
    outputs: names of the outputs, coordinates: names of the inputs
    """

    name: str
    inputs: Float[Tensor, "n d"]
    targets: Float[Tensor, "n outputs"]
    outputs: Sequence[str]
    coordinates: Sequence[str]

    def expected(self, bias: bool) -> Float[Tensor, "outputs d d"]:
        """The smallest matrices that compute the outputs best; with `bias` of [x, 1], [d + 1, d + 1]."""
        return _smallest(_augment(self.inputs, bias), self.targets)

    def unreachable(self, bias: bool) -> Float[Tensor, " outputs"]:
        """Share of the norm of each output that no such matrix computes."""
        inputs = _augment(self.inputs, bias)
        rest = self.targets.double() - _quadratic(self.expected(bias), inputs)
        return rest.norm(dim=0) / self.targets.double().norm(dim=0)


@dataclass(frozen=True, eq=False)
class FittedToy(Result):
    """A layer trained on a task.

    Attributes
    ----------
    raw: [outputs, d', d'], the interaction matrices as the weights have them, not symmetric
    matrices: the same, symmetrised: the bilinear tensor; d' = d + 1 with biases, the last the constant 1
    seen: [outputs, d', d'], what the inputs see of them
    expected: [outputs, d', d'], the task's own
    values: [outputs, d'], vectors: [outputs, d', d'], their eigenpairs
    error: [outputs], largest absolute difference between output and target over all inputs
    best_error: [outputs], the same of `expected`: what is out of reach
    distance: [outputs], norm of `seen` less `expected`, relative to `expected` (absolute where that is
        zero: a sum without biases)
    bias: whether the layer has biases
    """

    task: str
    outputs: Sequence[str]
    raw: Float[Tensor, "outputs d d"]
    matrices: Float[Tensor, "outputs d d"]
    seen: Float[Tensor, "outputs d d"]
    expected: Float[Tensor, "outputs d d"]
    values: Float[Tensor, "outputs d"]
    vectors: Float[Tensor, "outputs d d"]
    error: Float[Tensor, " outputs"]
    best_error: Float[Tensor, " outputs"]
    distance: Float[Tensor, " outputs"]
    bias: bool

    def to_pandas(self) -> pandas.DataFrame:
        """One row an output."""
        import pandas as pd

        return pd.DataFrame(
            {
                "task": self.task,
                "output": list(self.outputs),
                "biases": self.bias,
                "error": self.error.numpy(),
                "best_error": self.best_error.numpy(),
                "distance": self.distance.numpy(),
            }
        )


@dataclass(frozen=True, eq=False)
class ToyFits(Result):
    """Layers trained on several tasks."""

    fits: Sequence[FittedToy]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer and output."""
        import pandas as pd

        return pd.concat([fit.to_pandas() for fit in self.fits], ignore_index=True)


def boolean_task(gate: str, bits: int = 2) -> ToyTask:
    """A gate of every pair of `bits` bits in {0, 1}, over all ``2^bits`` inputs.

    Raises ValueError for an unknown gate (naming those there are) or fewer than two bits.
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if not 2 <= bits <= 12:
        raise ValueError(f"bits must lie between 2 and 12, got {bits}")
    inputs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * bits)
    pairs = list(combinations(range(bits), 2))
    targets = torch.stack([GATES[gate](inputs[:, i], inputs[:, j]) for i, j in pairs], 1)
    names = tuple(f"x{i + 1} {gate} x{j + 1}" for i, j in pairs)
    return ToyTask(gate, inputs, targets, names, tuple(f"x{i + 1}" for i in range(bits)))


def arithmetic_task(kind: Arithmetic, modulus: int = 5) -> ToyTask:
    """Sums and products of two numbers on a grid of [-1, 1], or a sum modulo `modulus`.

    "sum" and "product" read the two numbers themselves. "modular sum" reads a and b as one-hot vectors,
    [a, b] of 2 modulus coordinates, and has an output for each remainder, 1 where it is the sum's.

    Raises ValueError for another kind, or a modulus below 2.
    """
    if modulus < 2:
        raise ValueError(f"modulus must be at least 2, got {modulus}")
    if kind == "modular sum":
        a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).unbind(1)
        one_hot = torch.eye(modulus)
        inputs = torch.cat([one_hot[a], one_hot[b]], 1)
        names = tuple(f"{name}={i}" for name in "ab" for i in range(modulus))
        outputs = tuple(f"a+b={i} mod {modulus}" for i in range(modulus))
        return ToyTask(kind, inputs, one_hot[(a + b) % modulus], outputs, names)
    if kind not in ("sum", "product"):
        raise ValueError(f"kind must be 'sum', 'product' or 'modular sum', got {kind!r}")
    grid = torch.linspace(-1, 1, 9)
    inputs = torch.cartesian_prod(grid, grid)
    targets = inputs.sum(1) if kind == "sum" else inputs.prod(1)
    return ToyTask(kind, inputs, targets[:, None], (kind,), ("a", "b"))


def fit_toy(
    task: ToyTask,
    *,
    bias: bool = False,
    hidden: int | None = None,
    steps: int = 1000,
    learning_rate: float = 0.03,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> FittedToy:
    """Train a bare bilinear layer on all inputs of a task by full-batch AdamW, squared error.

    It has `hidden` neurons, by default four for each output: a neuron's form has at most one positive
    and one negative eigenvalue, and few neurons train badly. The learning rate falls to zero along a
    cosine.
    """
    inputs, targets = task.inputs, task.targets
    hidden = 4 * targets.shape[1] if hidden is None else hidden
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        layer = BilinearLayer(inputs.shape[1], hidden, targets.shape[1], bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5 * inputs.shape[1] ** -0.5, generator=generator)
    optimizer = torch.optim.AdamW(
        layer.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        loss = (layer(inputs) - targets).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return read_toy(task, BilinearTensor.from_mlp(layer))


def read_toy(task: ToyTask, tensor: BilinearTensor) -> FittedToy:
    """A layer from anywhere, beside what the task's operations must look like."""
    bias = tensor.has_biases
    whole = (tensor.augmented() if bias else tensor).to(torch.float64)
    matrices = whole.dense()
    raw = (whole.left.T * whole.out[:, None]) @ whole.right
    spectrum = whole.interaction().eigh()
    inputs, targets = _augment(task.inputs, bias), task.targets.double()
    expected = task.expected(bias)
    best = _quadratic(expected, inputs)
    found = _quadratic(matrices, inputs)
    seen = _smallest(inputs, found)
    scale = expected.flatten(1).norm(dim=1)
    return FittedToy(
        task.name,
        task.outputs,
        raw,
        matrices,
        seen,
        expected,
        spectrum.values,
        spectrum.vectors,
        (found - targets).abs().amax(0),
        (best - targets).abs().amax(0),
        (seen - expected).flatten(1).norm(dim=1) / torch.where(scale > 1e-9, scale, 1.0),
        bias,
    )


def _augment(inputs: Tensor, bias: bool) -> Tensor:
    inputs = inputs.double()
    return torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1) if bias else inputs


def _smallest(inputs: Tensor, targets: Tensor) -> Tensor:
    """[outputs, d, d], the symmetric matrices of least norm with ``x^T Q x`` nearest to the targets."""
    products = (inputs[:, :, None] * inputs[:, None, :]).flatten(1)
    found = torch.linalg.pinv(products, rtol=1e-10) @ targets.double()
    return found.T.reshape(-1, inputs.shape[1], inputs.shape[1])


def _quadratic(matrices: Tensor, inputs: Tensor) -> Tensor:
    """[n, outputs]"""
    return torch.einsum("ni,nai->na", inputs, torch.einsum("aij,nj->nai", matrices, inputs))


# ---------------------------------------------------------------------- figures


def toy_figure(result: ToyFits) -> go.Figure:
    """First output of each task: its matrix as trained, symmetrised, seen by the inputs, and expected.

    Beside them are the first two eigenvectors of the symmetrised one, a coordinate a column. What is
    zero to rounding is left white.
    """
    width = max(fit.matrices.shape[-1] for fit in result.fits)
    tiles, captions, names = [], [], []
    for fit in result.fits:
        d = fit.matrices.shape[-1]
        count = min(2, d)
        rows = fit.vectors[0, :count, None, :].expand(count, d, d)
        rows = rows * (fit.values[0, :count].abs() > _ROUNDING)[:, None, None]
        pictures = torch.stack([fit.raw[0], fit.matrices[0], fit.seen[0], fit.expected[0], *rows])
        pictures = pictures * (pictures.abs().amax((1, 2), keepdim=True) > _ROUNDING)
        # Smaller matrices are put in the upper left corner of the same frame.
        tile = pictures.new_zeros(4 + 2, width, width)
        tile[: len(pictures), :d, :d] = pictures
        tiles.append(tile.flatten(1).float())
        values = [f"λ = {float(v):+.2f}" for v in fit.values[0, :count]]
        distance = f"distance {float(fit.distance[0]):.0e}"
        captions.append(["", "", distance, "", *values, *[""] * (2 - count)])
        names.append(f"{fit.outputs[0]}{', biases' if fit.bias else ''}")
    columns = ["as trained", "symmetrised", "seen by inputs", "expected"]
    columns += ["eigenvector 1", "eigenvector 2"]
    size = (width, width)
    return mosaic_figure(torch.stack(tiles), size, rows=names, columns=columns, captions=captions)


@register("toy", ToySettings)
def toy_page(data: ImageData, settings: ToySettings, runs: Runs) -> Page:
    def fitted(tasks: Sequence[ToyTask], biases: Sequence[bool] = (False, True)) -> ToyFits:
        steps, rate = settings.steps, settings.learning_rate
        return ToyFits(
            [
                fit_toy(task, bias=bias, steps=steps, learning_rate=rate)
                for task in tasks
                for bias in biases
            ]
        )

    groups = [
        fitted([boolean_task(gate) for gate in GATES]),
        fitted([arithmetic_task("sum"), arithmetic_task("product")]),
        fitted([arithmetic_task("modular sum", settings.modulus)], (False,)),
    ]
    table = ToyFits([fit for group in groups for fit in group.fits]).to_pandas()
    return Page(
        "Boolean gates and arithmetic",
        Markup(
            "Appendix J. A bare bilinear layer trained on all inputs of a task, with and without "
            "biases (the last coordinate is then the constant 1). Shown are its matrix as the weights "
            "have it; the same symmetrised; what the inputs see of it, the smallest matrix that "
            "computes the same on them (on bits x² = x, so many do); what the operation must look "
            "like, the smallest matrix that computes it best; and its eigenvectors, a coordinate a "
            "column. The distance is that of the middle two, relative. Without biases NAND, NOR, XNOR "
            "and a sum are out of reach: see <code>best_error</code> in the table."
        ),
        [toy_figure(group) for group in groups],
        {"outputs": table},
        {
            "largest distance": float(table["distance"].max()),
            "largest error beyond the best possible": float(
                (table["error"] - table["best_error"]).max()
            ),
        },
    )
