"""Bilinear layers one after the other, as one polynomial that is never formed.

L layers without biases compose to a form of degree 2^L. Written out it is a tree: the last layer reads
two copies of what the layer below writes, that one four copies of what lies below it. The tree's tensor

    ``T[o, i, j, k, l] = sum_ab B2[o,a,b] B1[a,i,j] B1[b,k,l]``      (two layers)

has ``d_out d_in^(2^L)`` entries; its inner products need only a Gram for each wire, O(L h^2 d):
``K_l = out_l M(K_(l-1)) out'_l^T`` with M the Gram of hidden neurons in the metric K of the wire below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.quartic import with_residual


@dataclass(frozen=True, eq=False)
class BilinearStack(Result):
    """Bilinear layers of which each reads what the one before it writes, the first one first.

    >>> stack = BilinearStack((first, second, third))
    >>> stack(x)                       # third(second(first(x)))
    >>> stack.norm()                   # of the tree's tensor, from Grams

    Raises ValueError for no layer, and for two neighbours whose widths differ.
    """

    layers: tuple[BilinearTensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("a stack needs at least one layer, got none")
        for number, (below, above) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if below.d_out != above.d_in:
                raise ValueError(
                    f"layer {number} writes {below.d_out} coordinates and layer {number + 1} reads "
                    f"{above.d_in}: fold or project one of them first"
                )

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def d_in(self) -> int:
        return self.layers[0].d_in

    @property
    def d_out(self) -> int:
        return self.layers[-1].d_out

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the wires between layers, from the first one up: ``len(stack) - 1`` of them."""
        return tuple(layer.d_out for layer in self.layers[:-1])

    @property
    def degree(self) -> int:
        """Of the polynomial: ``2^L``."""
        return int(2 ** len(self))

    def __repr__(self) -> str:
        sizes = " -> ".join(map(str, (self.d_in, *self.widths, self.d_out)))
        return f"BilinearStack({len(self)} layers, {sizes}, degree {self.degree})"

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """What the last layer writes, biases included."""
        for layer in self.layers:
            x = layer(x)
        return x

    def homogeneous(self) -> BilinearStack:
        """The same function of ``[x, 1]`` without biases: every wire carries a constant coordinate.

        ``stack.homogeneous()(torch.cat([x, ones], -1)) == stack(x)``; a stack without biases returns
        itself, and reads x.
        """
        if not any(layer.has_biases for layer in self.layers):
            return self
        inner = [with_residual(layer, residual=False) for layer in self.layers[:-1]]
        return BilinearStack((*inner, self.layers[-1].augmented()))

    def inner(self, other: BilinearStack) -> Float[Tensor, ""]:
        """``<T, T'>`` of two stacks of equal depth that read and write the same; float64.

        The tree's tensor is symmetric in the two inputs of each layer, not in all 2^L of them. Widths of
        wires may differ. Costs O(L h^2 d).

        Raises ValueError for stacks that do not fit, and for biases (see `homogeneous`).
        """
        for stack in (self, other):
            stack.require_no_biases("inner products")
        mine, theirs = ((s.d_in, s.d_out, len(s)) for s in (self, other))
        if mine != theirs:
            raise ValueError(
                f"stacks of (d_in, d_out, layers) {mine} and {theirs} have no inner product: they must "
                "agree"
            )
        wide = checks.gram_dtype(self.layers[0].left)
        gram = torch.eye(self.d_in, dtype=wide, device=self.layers[0].device)
        for one, two in zip(self.layers, other.layers, strict=True):
            left, right, out = (t.to(wide) for t in (one.left, one.right, one.out))
            a, b, c = (t.to(wide) for t in (two.left, two.right, two.out))
            left, right = left @ gram, right @ gram
            pairs = ((left @ a.T) * (right @ b.T) + (left @ b.T) * (right @ a.T)) / 2
            gram = out @ pairs @ c.T
        return gram.trace()

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm of T; ``|f(x)| <= norm |x|^(2^L)``."""
        return self.inner(self).clamp_min(0).sqrt()

    def distance(self, other: BilinearStack) -> Float[Tensor, ""]:
        """``||T - T'||``, from inner products: below about 1e-8 of the norms it is rounding."""
        square = self.inner(self) - 2 * self.inner(other) + other.inner(other)
        return square.clamp_min(0).sqrt()

    def require_no_biases(self, what: str) -> None:
        """Raise ValueError where a layer has biases."""
        biased = [number for number, layer in enumerate(self.layers) if layer.has_biases]
        if biased:
            raise ValueError(
                f"{what} are of forms without biases, and layers {biased} have them: take "
                "stack.homogeneous(), the same function of [x, 1]"
            )

    def replaced(self, layers: list[BilinearTensor]) -> BilinearStack:
        """Other layers between the same input and output spaces."""
        layers[0] = replace(layers[0], input_space=self.layers[0].input_space)
        layers[-1] = replace(layers[-1], output_space=self.layers[-1].output_space)
        return BilinearStack(tuple(layers))
