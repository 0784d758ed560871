"""The factored bilinear tensor: a bilinear layer as a mathematical object.

A bilinear layer ``f(x) = out ((left x) * (right x))`` is a third-order tensor, symmetric in its two
input modes (Pearce et al. 2025, section 2),

    ``B[a,i,j] = 1/2 sum_h out[a,h] (left[h,i] right[h,j] + left[h,j] right[h,i])``,
    ``f(x)[a] = x^T B[a] x``.

:class:`BilinearTensor` keeps the three factors and never forms B. A change of basis of a factored
tensor is a factored tensor, so `fold` (input basis) and `project` (output basis) cost one matrix
product each, and everything composes:

>>> import torch
>>> from tl_bilinear import BilinearTensor
>>> left, right, out = torch.randn(64, 32), torch.randn(64, 32), torch.randn(10, 64)
>>> tensor = BilinearTensor(left, right, out)              # [10, 32, 32], never formed
>>> dictionary = torch.randn(200, 32)                      # rows: feature directions
>>> features = tensor.fold(dictionary)                     # [10, 200, 200], never formed
>>> features.interaction(torch.eye(10)[3]).top(5)          # strongest pairs for output 3

**Biases.** ``f(x) = out ((left x + bias_left) * (right x + bias_right)) + bias_out`` is the sum of an
interaction part (quadratic), a linear part and a constant (appendix J); `parts()` splits them exactly.
`dense`, `interaction`, `norm`, `inner` and the decompositions speak of the interaction part B.
`augmented()` makes the biases part of B by appending a coordinate that is always 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor import registry
from tl_bilinear.tensor.factors import Factors, rescaled
from tl_bilinear.tensor.form import FactoredForm, affine, within
from tl_bilinear.tensor.grams import pair_gram_tiles, squared_norms
from tl_bilinear.tensor.interaction import InteractionMatrix
from tl_bilinear.tensor.moments import Metric


@dataclass(frozen=True, eq=False)
class BilinearTensor(FactoredForm):
    """A bilinear layer in factored form; an immutable value, not an nn.Module.

    Parameters
    ----------
    left, right: [d_hidden, d_in]
        In TransformerLens's layout ``W_gate.T`` and ``W_in.T``.
    out: [d_out, d_hidden]
        ``W_out.T``.
    bias_left, bias_right: [d_hidden], bias_out: [d_out], optional
        Added before the product (left, right) and after the output map.
    input_space, output_space: str, optional
        What the coordinates are ("pixels", "blocks.3.mlp.hook_in"). Kept for reading: results name
        the space they live in.

    16-bit factors are held, computed and returned in float32, float64 stays float64. The factors are
    not copied; `from_model` and `from_mlp` take a detached copy, so that later training does not
    change a tensor under its decompositions. Gradients flow through evaluation.

    Raises TypeError for integer or non-tensor factors, ValueError for shapes that disagree (naming
    both), NaN or infinite entries (saying where) and mixed devices.
    """

    left: Float[Tensor, "d_hidden d_in"]
    right: Float[Tensor, "d_hidden d_in"]
    out: Float[Tensor, "d_out d_hidden"]
    bias_left: Float[Tensor, " d_hidden"] | None = None
    bias_right: Float[Tensor, " d_hidden"] | None = None
    bias_out: Float[Tensor, " d_out"] | None = None
    input_space: str | None = field(default=None, kw_only=True)
    output_space: str | None = field(default=None, kw_only=True)

    def _check_sides(self, left: Tensor, right: Tensor) -> None:
        if left.shape != right.shape:
            raise ValueError(
                f"left and right must both be [d_hidden, d_in], got left {checks.shape(left)} and "
                f"right {checks.shape(right)}"
            )

    # ------------------------------------------------------------------ where tensors come from

    @classmethod
    def from_model(cls, model: nn.Module, layer: int | None = None) -> BilinearTensor:
        """The bilinear layer of a model, as a detached copy of its weights.

        `model` is a bilinear HookedTransformer or TransformerBridge (or SAELens's of either), or any
        model with a registered reader; `layer` counts from 0, negative from the end. The result's
        `input_space` says where the layer reads: for a transformer the normalised MLP input,
        `mlp.hook_in`.

        Raises IndexError for a layer that does not exist, ValueError for a layer that is not
        bilinear (naming what was found), TypeError for a model that no reader recognises.
        """
        return registry.read_model(model, layer)

    @classmethod
    def from_mlp(cls, module: nn.Module, maps: Sequence[str] | None = None) -> BilinearTensor:
        """One bilinear layer given as a module, as a detached copy of its weights.

        Parameters
        ----------
        module:
            A class with a reader (see `register_mlp_reader`): TransformerLens's, a Hugging Face Llama
            MLP, linear maps named left, right and out, torch.nn.Bilinear of one input with itself.
        maps: sequence of str, optional
            The names of torch.nn.Linear submodules, where it is a class of your own: left, right and
            out, such as ``("w1", "w3", "w2")``, or two names where the first is one matrix whose output
            is cut into halves, left then right. "mlp.w1" is w1 of a submodule mlp. Bare parameters serve
            too, without biases: left and right [d_hidden, d_in], out [d_out, d_hidden].

        A plain module's forward is compared with what was read, on random inputs.

        Raises ValueError for a module that is not bilinear (naming what was found) and for maps that it
        does not have (naming those it has), TypeError for one that no reader recognises.
        """
        return registry.read_mlp(module if maps is None else registry.NamedMaps(module, maps))

    # ------------------------------------------------------------------ what it is

    @property
    def d_in(self) -> int:
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of B: (d_out, d_in, d_in)."""
        return (self.d_out, self.d_in, self.d_in)

    @property
    def factors(self) -> Factors:
        """The interaction part, ``B[a]`` for every output: what methods take that know no biases."""
        return Factors(self.left, self.right, self.out)

    def __repr__(self) -> str:
        spaces = f"{self.input_space or '?'} -> {self.output_space or '?'}"
        return self._describe(f"d_out={self.d_out}, d_in={self.d_in}", spaces)

    # ------------------------------------------------------------------ evaluation

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The layer's output, biases included."""
        x = checks.require_rows(
            "x", x, self.d_in, checks.meaning("d_in", self.input_space), self.left
        )
        hidden = affine(x, self.left, self.bias_left) * affine(x, self.right, self.bias_right)
        return affine(hidden, self.out, self.bias_out)

    # ------------------------------------------------------------------ change of basis

    def fold(
        self,
        directions: Float[Tensor, "n d_in"],
        offset: Float[Tensor, " d_in"] | None = None,
        *,
        space: str | None = None,
    ) -> BilinearTensor:
        """Change the input basis: ``t.fold(D, b)(z) == t(z @ D + b)``; rows of D are directions.

        The result reads n coordinates, the coefficients of the rows (a dictionary's activations,
        the pixels before an embedding). An `offset` (a decoder bias, say) enters the biases exactly.

        Returns a tensor of shape [d_out, n, n]; raises ValueError for rows of another width, or with NaN
        or infinite entries.
        """
        directions = checks.require_matrix(
            "directions", directions, self.d_in, checks.meaning("d_in", self.input_space), self.left
        )
        bias_left, bias_right = self.bias_left, self.bias_right
        if offset is not None:
            offset = checks.require_rows(
                "offset", offset, self.d_in, checks.meaning("d_in", self.input_space), self.left
            )
            bias_left = affine(offset, self.left, bias_left)
            bias_right = affine(offset, self.right, bias_right)
        return BilinearTensor(
            self.left @ directions.T,
            self.right @ directions.T,
            self.out,
            bias_left,
            bias_right,
            self.bias_out,
            input_space=space or within("directions", self.input_space),
            output_space=self.output_space,
        )

    def around(self, point: Float[Tensor, " d_in"]) -> BilinearTensor:
        """The layer as a function of the distance from a point: ``t.around(b)(z) == t(z + b)``.

        Its `parts()` are then the value at the point, the main effects around it and the interactions.
        """
        meaning = checks.meaning("d_in", self.input_space)
        point = checks.require_vector("point", point, self.d_in, meaning, self.left)
        return self._with(
            bias_left=affine(point, self.left, self.bias_left),
            bias_right=affine(point, self.right, self.bias_right),
        )

    def whiten(self, metric: Metric) -> BilinearTensor:
        """The layer as a function of ``z = x M^-1/2``: what is best for it is best in the metric."""
        metric.require_fit("the layer", self.d_in, self.input_space)
        return replace(
            self,
            left=metric.root(self.left),
            right=metric.root(self.right),
            input_space=f"{self.input_space or 'inputs'}, whitened",
        )

    def restore(self, metric: Metric, *, space: str | None = None) -> BilinearTensor:
        """A function of ``z = x M^-1/2`` as one of x again: the inverse of `whiten`."""
        metric.require_fit("the layer", self.d_in, None)
        left, right = metric.inverse_root(self.left), metric.inverse_root(self.right)
        return replace(self, left=left, right=right, input_space=space)

    # ------------------------------------------------------------------ biases

    def parts(self) -> BilinearParts:
        """The exact split into interaction, linear and constant parts (appendix J)."""
        bare = self._with(bias_left=None, bias_right=None, bias_out=None)
        left, right = self._bias("bias_left"), self._bias("bias_right")
        linear = self.out @ (left[:, None] * self.right + right[:, None] * self.left)
        constant = self.out @ (left * right) + self._bias("bias_out")
        return BilinearParts(bare, linear, constant)

    def augmented(self) -> BilinearTensor:
        """The same function of ``[x, 1]``, with no biases: ``t.augmented()([x, 1]) == t(x)``.

        The last input coordinate is the constant 1; bias_out takes one more hidden dimension. The
        last row and column of an interaction matrix then hold the linear part (halved: it is met
        twice), its last entry the constant.
        """
        left = torch.cat([self.left, self._bias("bias_left")[:, None]], 1)
        right = torch.cat([self.right, self._bias("bias_right")[:, None]], 1)
        out = self.out
        if self.bias_out is not None:
            one = torch.zeros(1, self.d_in + 1, dtype=self.dtype, device=self.device)
            one[0, -1] = 1
            left, right = torch.cat([left, one]), torch.cat([right, one])
            out = torch.cat([out, self.bias_out[:, None]], 1)
        return BilinearTensor(
            left,
            right,
            out,
            input_space=None if self.input_space is None else f"[{self.input_space}, 1]",
            output_space=self.output_space,
        )

    # ------------------------------------------------------------------ interaction matrices

    def interaction(
        self, directions: Float[Tensor, "... d_out"] | None = None
    ) -> InteractionMatrix:
        """The interaction matrix ``Q_u = sum_a u[a] B[a]`` of an output direction, or of many.

        ``u . f(x) = x^T Q_u x`` for a layer without biases; with biases Q_u is the interaction part
        (`parts()` holds the rest, `augmented().interaction(u)` all of it). Leading dimensions of
        `directions` become batch dimensions; None stands for every output, ``B`` itself.

        Raises ValueError for a direction of the wrong width, or with NaN or infinite entries (naming its
        row).
        """
        directions, weights = self._weights(directions)
        return InteractionMatrix(
            self.left, self.right, weights, self.input_space, directions, self.output_space
        )

    def dense(self, max_bytes: int = checks.MAX_DENSE_BYTES) -> Float[Tensor, "d_out d_in d_in"]:
        """B itself, symmetric in its input modes; the oracle of the tests, rarely what you want.

        Raises MemoryError, with the size in bytes, above `max_bytes`.
        """
        return self.interaction().dense(max_bytes)

    # ------------------------------------------------------------------ algebra

    def _require_same_shape(self, other: BilinearTensor, verb: str) -> None:
        require_same_shape(self, other, verb)

    def inner(self, other: BilinearTensor) -> Float[Tensor, ""]:
        """``<B1, B2> = sum_aij B1[a,i,j] B2[a,i,j]``, exact, from Grams of the factors in float64.

        The hidden sizes may differ. Costs O(h1 h2 (d_in + d_out)), holds a few tiles of h1 x h2.
        """
        require_same_shape(self, other, "compared")
        total, exponent = self._inner(other)
        return rescaled("inner products", total, exponent, self.dtype)

    def _inner(self, other: BilinearTensor) -> tuple[Tensor, Tensor]:
        """The inner product over a power of two, and its exponent."""
        (one, first), (two, second) = (each.factors.normalised_together() for each in (self, other))
        total = torch.zeros((), dtype=checks.gram_dtype(self.left), device=self.device)
        out = one.weights.to(total.dtype)
        for rows, tile in pair_gram_tiles(one.left, one.right, two.left, two.right):
            total = total + ((out[:, rows].T @ two.weights.to(total.dtype)) * tile).sum()
        return total, first + second

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm of B."""
        factors, exponent = self.factors.normalised_together()
        squares = squared_norms(factors.weights, factors.left, factors.right)
        return rescaled("norms", squares.sum().clamp_min(0).sqrt(), exponent, self.dtype)

    def cosine_similarity(self, other: BilinearTensor) -> Float[Tensor, ""]:
        """``<B1, B2> / (|B1| |B2|)``; 0 where either is zero."""
        require_same_shape(self, other, "compared")
        (one, _), (two, _) = (each.factors.normalised_together() for each in (self, other))
        norms = [squared_norms(f.weights, f.left, f.right).sum() for f in (one, two)]
        scale = (norms[0] * norms[1]).clamp_min(0).sqrt()
        safe = torch.where(scale > 0, scale, 1.0)
        return torch.where(scale > 0, self._inner(other)[0] / safe, 0.0).to(self.dtype)


@dataclass(frozen=True, eq=False)
class BilinearParts(Result):
    """A biased layer as ``f(x) = interaction(x) + linear x + constant`` (appendix J).

    Attributes
    ----------
    interaction: BilinearTensor without biases
    linear: [d_out, d_in], from each input bias met by the other side
    constant: [d_out]
    """

    interaction: BilinearTensor
    linear: Float[Tensor, "d_out d_in"]
    constant: Float[Tensor, " d_out"]

    def __call__(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_out"], Float[Tensor, "... d_out"], Float[Tensor, " d_out"]]:
        """The three contributions to the layer's output on x; their sum is the layer."""
        return self.interaction(x), x.to(self.linear.dtype) @ self.linear.T, self.constant


def require_same_shape(first: BilinearTensor, second: BilinearTensor, verb: str) -> None:
    """Raise ValueError for layers of different widths or devices."""
    if first.shape != second.shape:
        raise ValueError(
            f"tensors of shape {list(first.shape)} and {list(second.shape)} (d_out, d_in, d_in) "
            f"cannot be {verb}; fold or project them into common bases first"
        )
    checks.require_same_device({"the first": first.left, "the second": second.left})
