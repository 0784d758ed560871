"""A form of two different inputs: ``f(x, y) = out ((left x) * (right y))``.

A bilinear layer is the case y = x. Others are attention's scores, where x is the token that looks and y
the token that is looked at (`circuits.attention`), a layer between two parts of the residual stream, and
mixtures of experts of multiplicative form (MxD, muMoE: Oldfield et al. 2024, 2025):

>>> experts = TwoInputForm(C.T, D.T, W)         # ((C^T a) * (D^T z)) W^T: gates a, hidden units z
>>> experts.matrix(u).svd(5)                    # which gate direction meets which direction of z, for u

As a tensor ``F[a,i,j] = sum_h out[a,h] left[h,i] right[h,j]``, never formed. A change of basis of either
input, or of the output, is a form again:

>>> f = TwoInputForm(torch.randn(8, 32), torch.randn(8, 48), torch.randn(1, 8))
>>> f.fold(queries, keys).matrix().top(20)      # the strongest pairs of two dictionaries
>>> f.matrix().svd(4).left                      # [4, 32]: singular directions instead of eigenvectors

**One with the symmetric tensor.** One after the other, both inputs are one input of a bilinear layer:
`stacked` is that layer, ``f([x, y])``, whose tensor B has ``||B||^2 = ||F||^2 / 2``. Norms and inner
products are its own, and all methods of bilinear layers (CP, spectra, quartic forms) apply to it. In the
other direction `TwoInputForm.of(layer)` is a layer polarised, symmetric in its two inputs, and
`symmetric` sets y = x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.form import FactoredForm, affine, within
from tl_bilinear.tensor.pair_matrix import PairMatrix, stack


@dataclass(frozen=True, eq=False)
class TwoInputForm(FactoredForm):
    """A form of two inputs in factored form; an immutable value.

    Parameters
    ----------
    left: [d_hidden, d_left], right: [d_hidden, d_right], out: [d_out, d_hidden]
    bias_left, bias_right: [d_hidden], bias_out: [d_out], optional
        Added before the product (left, right) and after the output map.
    left_space, right_space, output_space: str, optional
        What the coordinates are. Kept for reading.

    16-bit factors are held in float32. Gradients flow through evaluation. Raises as `BilinearTensor`:
    TypeError for what is no floating-point tensor, ValueError for shapes that disagree, NaN or infinite
    entries and mixed devices.
    """

    left: Float[Tensor, "d_hidden d_left"]
    right: Float[Tensor, "d_hidden d_right"]
    out: Float[Tensor, "d_out d_hidden"]
    bias_left: Float[Tensor, " d_hidden"] | None = None
    bias_right: Float[Tensor, " d_hidden"] | None = None
    bias_out: Float[Tensor, " d_out"] | None = None
    left_space: str | None = field(default=None, kw_only=True)
    right_space: str | None = field(default=None, kw_only=True)
    output_space: str | None = field(default=None, kw_only=True)

    def _check_sides(self, left: Tensor, right: Tensor) -> None:
        if left.shape[0] != right.shape[0]:
            raise ValueError(
                f"left [d_hidden, d_left] and right [d_hidden, d_right] must have as many hidden "
                f"neurons, got left {checks.shape(left)} and right {checks.shape(right)}"
            )

    @classmethod
    def of(cls, tensor: BilinearTensor) -> TwoInputForm:
        """A bilinear layer polarised: symmetric in x and y, and the layer itself at y = x.

        ``u . f(x, y) = x^T Q_u y`` with the interaction matrix Q_u, biases included: two inputs that one
        layer reads together. It has twice the layer's hidden neurons.
        """

        def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
            return None if one is None or other is None else torch.cat([one, other])

        biased = tensor.bias_left is not None or tensor.bias_right is not None
        left = tensor._bias("bias_left") if biased else None
        right = tensor._bias("bias_right") if biased else None
        return cls(
            torch.cat([tensor.left, tensor.right]),
            torch.cat([tensor.right, tensor.left]),
            torch.cat([tensor.out, tensor.out], 1) / 2,
            both(left, right),
            both(right, left),
            tensor.bias_out,
            left_space=tensor.input_space,
            right_space=tensor.input_space,
            output_space=tensor.output_space,
        )

    # ------------------------------------------------------------------ what it is

    @property
    def d_left(self) -> int:
        return self.left.shape[1]

    @property
    def d_right(self) -> int:
        return self.right.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of F: (d_out, d_left, d_right)."""
        return (self.d_out, self.d_left, self.d_right)

    def __repr__(self) -> str:
        spaces = (
            f"{self.left_space or '?'}, {self.right_space or '?'} -> {self.output_space or '?'}"
        )
        return self._describe(
            f"d_out={self.d_out}, d_left={self.d_left}, d_right={self.d_right}", spaces
        )

    def __call__(
        self, x: Float[Tensor, "... d_left"], y: Float[Tensor, "... d_right"]
    ) -> Float[Tensor, "... d_out"]:
        """``f(x, y)``, biases included; leading dimensions broadcast."""
        x = checks.require_rows(
            "x", x, self.d_left, checks.meaning("d_left", self.left_space), self.left
        )
        y = checks.require_rows(
            "y", y, self.d_right, checks.meaning("d_right", self.right_space), self.left
        )
        hidden = affine(x, self.left, self.bias_left) * affine(y, self.right, self.bias_right)
        return affine(hidden, self.out, self.bias_out)

    # ------------------------------------------------------------------ change of basis

    def fold(
        self,
        left: Float[Tensor, "n d_left"] | None = None,
        right: Float[Tensor, "m d_right"] | None = None,
        *,
        left_offset: Float[Tensor, " d_left"] | None = None,
        right_offset: Float[Tensor, " d_right"] | None = None,
        left_space: str | None = None,
        right_space: str | None = None,
    ) -> TwoInputForm:
        """Change the basis of either input: ``f.fold(D, E)(z, w) == f(z @ D, w @ E)``.

        left, right: directions, one a row; None leaves that input as it is
        left_offset, right_offset: added to the input (a decoder bias, say); they enter the biases

        Raises ValueError for rows of another width, or with NaN or infinite entries.
        """
        left_factor, bias_left, left_space = self._folded(
            "left", left, left_offset, left_space, self.left_space
        )
        right_factor, bias_right, right_space = self._folded(
            "right", right, right_offset, right_space, self.right_space
        )
        return self._with(
            left=left_factor,
            right=right_factor,
            bias_left=bias_left,
            bias_right=bias_right,
            left_space=left_space,
            right_space=right_space,
        )

    def _folded(
        self,
        side: str,
        rows: Tensor | None,
        offset: Tensor | None,
        space: str | None,
        old: str | None,
    ) -> tuple[Tensor, Tensor | None, str | None]:
        factor, bias = getattr(self, side), getattr(self, f"bias_{side}")
        meaning = checks.meaning(f"d_{side}", old)
        if offset is not None:
            offset = checks.require_vector(
                f"{side}_offset", offset, factor.shape[1], meaning, self.left
            )
            bias = affine(offset, factor, bias)
        if rows is None:
            return factor, bias, space or old
        rows = checks.require_matrix(side, rows, factor.shape[1], meaning, self.left)
        return factor @ rows.T, bias, space or within("directions", old)

    def swap(self) -> TwoInputForm:
        """The same form with its inputs exchanged: ``f.swap()(y, x) == f(x, y)``."""
        return self._with(
            left=self.right,
            right=self.left,
            bias_left=self.bias_right,
            bias_right=self.bias_left,
            left_space=self.right_space,
            right_space=self.left_space,
        )

    # ------------------------------------------------------------------ as a bilinear layer

    def stacked(self) -> BilinearTensor:
        """The bilinear layer of both inputs one after the other, ``f.stacked()([x, y]) == f(x, y)``."""
        left, right = stack(self.left, self.right)
        spaces = f"[{self.left_space or '?'}, {self.right_space or '?'}]"
        return BilinearTensor(
            left,
            right,
            self.out,
            self.bias_left,
            self.bias_right,
            self.bias_out,
            input_space=spaces,
            output_space=self.output_space,
        )

    def symmetric(self) -> BilinearTensor:
        """The bilinear layer of one input read twice, ``f.symmetric()(x) == f(x, x)``.

        Raises ValueError for inputs of different widths.
        """
        if self.d_left != self.d_right:
            raise ValueError(
                f"one input cannot be read twice by a form of inputs of width {self.d_left} and "
                f"{self.d_right}: fold them into a common basis first, or use stacked()"
            )
        return BilinearTensor(
            self.left,
            self.right,
            self.out,
            self.bias_left,
            self.bias_right,
            self.bias_out,
            input_space=self.left_space if self.left_space == self.right_space else None,
            output_space=self.output_space,
        )

    # ------------------------------------------------------------------ parts

    def parts(self) -> TwoInputParts:
        """The exact split into pairs, what is linear in either input, and the constant."""
        pairs = self._with(bias_left=None, bias_right=None, bias_out=None)
        left, right = self._bias("bias_left"), self._bias("bias_right")
        return TwoInputParts(
            pairs,
            self.out @ (right[:, None] * self.left),
            self.out @ (left[:, None] * self.right),
            self.out @ (left * right) + self._bias("bias_out"),
        )

    def matrix(self, direction: Float[Tensor, " d_out"] | None = None) -> PairMatrix:
        """The matrix M of an output direction, ``u . f(x, y) = x^T M y``: its pairs, without biases.

        `direction` may be left out for a form of one output.

        Raises ValueError for a direction of another width, and for none where there are several outputs.
        """
        if direction is None:
            if self.d_out != 1:
                raise ValueError(
                    f"a form of {self.d_out} outputs has a matrix along a direction [d_out] of them: "
                    f"give one"
                )
            weights = self.out[0]
        else:
            meaning = checks.meaning("d_out", self.output_space)
            weights = (
                checks.require_vector("direction", direction, self.d_out, meaning, self.left)
                @ self.out
            )
        return PairMatrix(self.left, self.right, weights, self.left_space, self.right_space)

    def dense(
        self, max_bytes: int = checks.MAX_DENSE_BYTES
    ) -> Float[Tensor, "d_out d_left d_right"]:
        """F itself; the oracle of the tests. Raises MemoryError, with the size, above `max_bytes`."""
        size = self.d_out * self.d_left * self.d_right
        checks.require_affordable(
            f"dense() of shape {list(self.shape)} in {self.dtype}",
            size,
            self.dtype,
            max_bytes,
            "use matrix(u), fold, project or norm, which do not form it",
        )
        hidden = (self.out[:, :, None] * self.left).mT
        return hidden @ self.right

    # ------------------------------------------------------------------ norms

    def _require_same_shape(self, other: TwoInputForm, verb: str) -> None:
        if self.shape != other.shape:
            raise ValueError(
                f"forms of shape {list(self.shape)} and {list(other.shape)} (d_out, d_left, d_right) "
                f"cannot be {verb}; fold or project them into common bases first"
            )
        checks.require_same_device({"the first": self.left, "the second": other.left})

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm of F, in float64 from Grams of the hidden neurons."""
        return self.stacked().norm() * 2**0.5

    def inner(self, other: TwoInputForm) -> Float[Tensor, ""]:
        """``<F, F'> = sum_aij F[a,i,j] F'[a,i,j]``; the hidden sizes may differ."""
        self._require_same_shape(other, "compared")
        return self.stacked().inner(other.stacked()) * 2

    def cosine_similarity(self, other: TwoInputForm) -> Float[Tensor, ""]:
        """``<F, F'> / (|F| |F'|)``; 0 where either is zero."""
        self._require_same_shape(other, "compared")
        return self.stacked().cosine_similarity(other.stacked())


@dataclass(frozen=True, eq=False)
class TwoInputParts(Result):
    """A biased form as ``f(x, y) = pairs(x, y) + left x + right y + constant``.

    Attributes
    ----------
    pairs: TwoInputForm without biases
    left: [d_out, d_left], what is linear in x (met by the other side's bias); right: [d_out, d_right]
    constant: [d_out]
    """

    pairs: TwoInputForm
    left: Float[Tensor, "d_out d_left"]
    right: Float[Tensor, "d_out d_right"]
    constant: Float[Tensor, " d_out"]

    def __call__(
        self, x: Float[Tensor, "... d_left"], y: Float[Tensor, "... d_right"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four contributions on (x, y), [..., d_out] each; their sum is the form."""
        dtype = self.left.dtype
        return (
            self.pairs(x, y),
            x.to(dtype) @ self.left.T,
            y.to(dtype) @ self.right.T,
            self.constant,
        )
