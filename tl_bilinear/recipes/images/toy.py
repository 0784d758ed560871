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

import torch
from jaxtyping import Float
from torch import Generator, Tensor

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

    `hidden` neurons, four for each output by default: a neuron's form has at most one positive and one
    negative eigenvalue, and few neurons train badly. The learning rate falls to zero (cosine).
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
    """A layer, however it was made, beside what the task's operations must look like."""
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
