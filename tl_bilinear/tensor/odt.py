"""ODT: orthogonalise, diagonalise and truncate the wires of a stack of bilinear layers.

A HOSVD of one layer orders the directions it writes by how much of *them* there is, not by what the
layers above do with them. ODT orders them by their share in the whole stack (the CompInterp papers
describe it):

1. **Orthogonalise**, from below: each layer's output directions are made orthonormal as forms of the
   input, and what that takes goes into the next layer.
2. **Diagonalise**, from above: with everything below orthonormal, the Gram of one copy of a wire is
   ``G = sum_ab K_ab B_a B_b``, K being that of the layer's outputs. Its eigenvectors are the wire's
   basis, the roots of its eigenvalues its singular values: those of the tree's tensor T, flattened to
   the inputs under one copy of the wire against everything else.
3. **Truncate**: the first k coordinates of each wire.

Each step is a change of basis of a wire, so that without truncation the function is kept to rounding.

**The bound.** A wire with m layers on top of it is met ``2^m`` times in the tree, and cutting it cuts
every copy. Cutting one copy is an orthogonal projection of T that leaves out ``sum_(i>k) s_i^2``;
together

    ``||T - T'||^2 <= sum over wires of copies * sum_(i>k) s_i^2``.

**Where it does not apply.** It uses that a wire's basis is nobody else's business. A transformer's
residual stream is one wire for all layers, and its basis is pinned by embedding and unembedding, and by
every head and norm that reads it: there a layer's own `hosvd`, in the metric of what it reads, is what
remains.
(`with_residual` makes a plain stack of ``[x, 1]`` of layers with residual connections. ODT is exact for
it too, but its directions are then of the stream, not of what a layer writes.)

>>> found = odt(BilinearStack((first, second, third)))
>>> found.values                    # singular values of each wire, from the first one up
>>> small = found.truncate(16)      # a BilinearStack with wires of 16
>>> found.bound(16), float(small.distance(found.stack))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor import grams
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.eigendecomposition import fix_signs
from tl_bilinear.tensor.hosvd import input_gram
from tl_bilinear.tensor.moments import Metric
from tl_bilinear.tensor.stack import BilinearStack

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class ODT(Result):
    """A stack in the bases of its own wires.

    Attributes
    ----------
    stack: the same function; coordinate i of a wire is its i-th singular direction
    values: for each wire between two layers, from the first one up, its singular values [width], falling
    norm: Frobenius norm of the tree's tensor; each wire's squared values sum to its square
    floor: singular values below it are rounding
    metric: of the inputs, in which norms and values are; None for the Euclidean one
    """

    stack: BilinearStack
    values: tuple[Float[Tensor, " _"], ...]
    norm: float
    floor: float
    metric: Metric | None = None

    @property
    def copies(self) -> tuple[int, ...]:
        """How often the tree meets each wire: 2 below the last layer, 4 below the one before it ..."""
        return tuple(2**above for above in range(len(self.values), 0, -1))

    def truncate(self, k: int | Sequence[int]) -> BilinearStack:
        """The stack with the first k coordinates of each wire, or k of each in turn.

        Raises ValueError for a k below 1 or above the wire's width.
        """
        kept = self._kept(k)
        layers = list(self.stack.layers)
        for wire, size in enumerate(kept):
            below, above = layers[wire], layers[wire + 1]
            layers[wire] = replace(below, out=below.out[:size])
            layers[wire + 1] = replace(
                above, left=above.left[:, :size], right=above.right[:, :size]
            )
        return BilinearStack(tuple(layers))

    def bound(self, k: int | Sequence[int]) -> float:
        """Upper bound on ``||T - T'||`` of `truncate` with the same k; in the metric."""
        square = 0.0
        for values, copies, size in zip(self.values, self.copies, self._kept(k), strict=True):
            left_out = values[size:].to(checks.gram_dtype(values))
            square += copies * (float(left_out.square().sum()) + len(left_out) * self.floor**2)
        return math.sqrt(square)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a wire and number kept: its singular value, and the share of the norm left out."""
        import pandas as pd

        rows = []
        for wire, values in enumerate(self.values):
            squares = values.double().square()
            rest = (squares.sum() - squares.cumsum(0)).clamp_min(0).sqrt() / (self.norm or 1.0)
            rows += [
                (wire + 1, k + 1, float(values[k]), float(rest[k])) for k in range(len(values))
            ]
        return pd.DataFrame(rows, columns=["wire", "kept", "singular value", "left out"])

    def _kept(self, k: int | Sequence[int]) -> list[int]:
        each = [k] * len(self.values) if isinstance(k, int) else list(k)
        if len(each) != len(self.values):
            raise ValueError(
                f"k is one number, or one for each of the {len(self.values)} wires, got {len(each)}"
            )
        return [
            checks.require_count("k", size, len(values), f"the coordinates of wire {wire}")
            for wire, (size, values) in enumerate(zip(each, self.values, strict=True), 1)
        ]


def odt(stack: BilinearStack, *, metric: Metric | None = None) -> ODT:
    """Orthogonalise and diagonalise the wires of a stack; `ODT.truncate` cuts them.

    Parameters
    ----------
    stack: BilinearStack without biases (`homogeneous` takes them in)
    metric: of the inputs, in which forms are compared: norms, values and bounds are those of the stack
        whose first layer is ``first.whiten(metric)``. The stack of the result reads x as before.

    Costs O(L h^2 d) in float64, h x h Grams in memory.

    Raises ValueError for biases, and a metric of another width.
    """
    stack.require_no_biases("wires")
    wide = checks.gram_dtype(stack.layers[0].left)
    layers = list(stack.to(wide).layers)
    if metric is not None:
        layers[0] = layers[0].whiten(metric)
    layers = _orthogonalise(layers)
    top = layers[-1]
    norm = float(top.norm())
    layers, values = _diagonalise(layers)
    if metric is not None:
        layers[0] = layers[0].restore(metric)
    # Grams are rounded to eps of the size of their terms, which cancelling neurons make larger.
    size = max(norm, grams.size_of(top.left, top.right, top.out))
    floor = math.sqrt(8 * torch.finfo(wide).eps) * size
    dtype = stack.layers[0].dtype
    for layer in stack.layers[1:]:
        dtype = torch.promote_types(dtype, layer.dtype)
    named = [replace(layer.to(dtype), input_space=f"wire {n}") for n, layer in enumerate(layers)]
    named = [replace(layer, output_space=f"wire {n}") for n, layer in enumerate(named, 1)]
    held = tuple(each.to(dtype) for each in values)
    return ODT(stack.replaced(named), held, norm, floor, metric)


def _orthogonalise(layers: list[BilinearTensor]) -> list[BilinearTensor]:
    """The same function, with every layer's outputs but the last one's orthonormal as forms."""
    done = []
    layer = layers[0]
    for above in layers[1:]:
        gram = grams.congruence(layer.out, layer.left, layer.right)
        squares, vectors = torch.linalg.eigh(gram)
        # Directions that nothing is written along stay, at a scale that rounding cannot blow up.
        least = torch.finfo(gram.dtype).eps * squares[-1].clamp_min(0)
        scale = squares.clamp_min(float(least)).sqrt()
        divisor = torch.where(scale > 0, scale, 1.0)  # a layer of zeros
        done.append(layer.project(vectors.T / divisor[:, None]))
        layer = above.fold((vectors * scale).T)
    return [*done, layer]


def _diagonalise(layers: list[BilinearTensor]) -> tuple[list[BilinearTensor], list[Tensor]]:
    """The same function with every wire in the eigenvectors of its Gram, and the singular values."""
    layers = list(layers)
    values: list[Tensor] = []
    weights = torch.ones(layers[-1].d_out, dtype=layers[-1].dtype, device=layers[-1].device)
    for number in range(len(layers) - 1, 0, -1):
        above = layers[number]
        gram = input_gram(above.left, above.right, weights.sqrt()[:, None] * above.out)
        squares, vectors = torch.linalg.eigh(gram)
        basis = fix_signs(vectors.T.flip(0))
        weights = squares.flip(0).clamp_min(0)
        values.insert(0, weights.sqrt())
        layers[number] = above.fold(basis)
        layers[number - 1] = layers[number - 1].project(basis)
    return layers, values
