"""The matrix between two inputs that an output direction reads, in factored form.

For an output direction u of a form of two inputs, ``u . f(x, y) = x^T M y`` with

    ``M = left^T diag(weights) right``,  ``weights = out^T u``,

d_left x d_right and of rank at most h, the hidden neurons. Where an interaction matrix has eigenpairs, M
has singular pairs, ``M = sum_i s_i a_i b_i^T``: the direction a_i of the one input that meets the
direction b_i of the other. M itself is formed by `dense()` only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor import top
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS, Factors
from tl_bilinear.tensor.form import within

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class PairMatrix(Result):
    """One d_left x d_right matrix ``left^T diag(weights) right``; made by `TwoInputForm.matrix`.

    Parameters
    ----------
    left: [h, d_left], right: [h, d_right], weights: [h]
    left_space, right_space: str, optional
        What the coordinates of the two inputs are.
    """

    _finite = ("left", "right", "weights")

    left: Float[Tensor, "h d_left"]
    right: Float[Tensor, "h d_right"]
    weights: Float[Tensor, " h"]
    left_space: str | None = None
    right_space: str | None = None

    @property
    def shape(self) -> torch.Size:
        """(d_left, d_right)"""
        return torch.Size((self.left.shape[1], self.right.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def __matmul__(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``M @ y`` for y [d_right] or [d_right, m]; M is not formed."""
        y = checks.require_tensor("y", y)
        if y.ndim not in (1, 2) or y.shape[0] != self.shape[1]:
            raise ValueError(
                f"M @ y needs y of shape [{self.shape[1]}] or [{self.shape[1]}, m], got "
                f"{checks.shape(y)}"
            )
        hidden = self.right @ y.to(self.dtype)
        weights = self.weights if y.ndim == 1 else self.weights[:, None]
        return self.left.T @ (weights * hidden)

    @property
    def T(self) -> PairMatrix:
        """The matrix read the other way round."""
        return PairMatrix(self.right, self.left, self.weights, self.right_space, self.left_space)

    def fold(
        self,
        left: Float[Tensor, "n d_left"] | None = None,
        right: Float[Tensor, "m d_right"] | None = None,
    ) -> PairMatrix:
        """The matrix between directions: entries ``d_i^T M e_j`` for the rows of `left` and `right`."""
        d, e = self._sides(left, right)
        return PairMatrix(
            self.left if d is None else self.left @ d.T,
            self.right if e is None else self.right @ e.T,
            self.weights,
            self.left_space if d is None else within("directions", self.left_space),
            self.right_space if e is None else within("directions", self.right_space),
        )

    def dense(self, max_bytes: int = checks.MAX_DENSE_BYTES) -> Float[Tensor, "d_left d_right"]:
        """M itself; raises MemoryError, with the size in bytes, above `max_bytes`."""
        checks.require_affordable(
            f"dense() of shape {list(self.shape)} in {self.dtype}",
            self.shape.numel(),
            self.dtype,
            max_bytes,
            "use @, svd(k), top(k), entries or frobenius_norm, which do not form it",
        )
        return (self.left.T * self.weights) @ self.right

    def frobenius_norm(self) -> Float[Tensor, ""]:
        """``||M||_F``, through the Gram of the hidden neurons, in float64."""
        return self._stacked().frobenius_norm()[0] * 2**0.5

    def _stacked(self) -> Factors:
        """``1/2 [[0, M], [M^T, 0]]``: the symmetric matrix of both inputs, one after the other."""
        left, right = stack(self.left, self.right)
        return Factors(left, right, self.weights[None])

    # ------------------------------------------------------------------ reading it

    def svd(self, k: int | None = None) -> SVD:
        """The k strongest singular pairs ``M = sum_i s_i a_i b_i^T`` (all that h neurons can make).

        Exact, in float64, from the factors: two QR decompositions and the SVD of what is between them,
        ``2 (d_left + d_right) h^2 + ~20 h^3`` flops where h is smaller than both inputs.

        Raises ValueError for k below 1 or above the rank that M can have.
        """
        rank = min(len(self.left), *self.shape)
        k = rank if k is None else checks.require_count("k", k, rank, "the rank that M can have")
        wide = checks.gram_dtype(self.left)
        (left, upper), (right, lower) = (_thin(f.to(wide)) for f in (self.left, self.right))
        core = (upper * self.weights.to(wide)) @ lower.T
        a, values, b = torch.linalg.svd(core, full_matrices=False)
        a, b = (a.T if left is None else a.T @ left.T), (b if right is None else b @ right.T)
        largest = a.gather(1, a.abs().argmax(1, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0)
        rest = float(values[k]) if k < len(values) else 0.0
        return SVD(
            checks.narrowed("singular values", values[:k], self.dtype),
            (a * signs)[:k].to(self.dtype),
            (b * signs)[:k].to(self.dtype),
            rest,
            float(values.norm()),
            self.left_space,
            self.right_space,
        )

    def top(
        self,
        k: int,
        *,
        left: Float[Tensor, "n d_left"] | None = None,
        right: Float[Tensor, "m d_right"] | None = None,
    ) -> TopPairs:
        """The k pairs (i, j) of largest ``|d_i^T M e_j|``, exact; most pairs are never computed.

        left: [n, d_left], right: [m, d_right], optional
            Directions of the two inputs; the coordinates themselves where None.

        With the singular pairs, an entry is the product of two short vectors, whose lengths and leading
        terms leave out most of the n m pairs (top.py). How many depends on the directions: of random
        ones nothing can be left out, and all products are computed, in blocks. Values are accumulated
        in float64.
        """
        left, right = self._sides(left, right)
        n = self.shape[0] if left is None else len(left)
        m = self.shape[1] if right is None else len(right)
        checks.require_count("k", k, n * m, f"the pairs of {n} and {m} directions")
        spaces = [
            space if rows is None else within("directions", space)
            for rows, space in ((left, self.left_space), (right, self.right_space))
        ]
        # In float64: what is small beside the largest pair is still found, whatever the scale of M.
        found = self.to(checks.gram_dtype(self.left)).svd()
        root = (found.values / max(float(found.values.max()), 1e-300)).sqrt()[:, None]
        rows, columns = (
            weights.T if given is None else given @ weights.T
            for given, weights in (
                (left, (root * found.left).to(self.dtype)),
                (right, (root * found.right).to(self.dtype)),
            )
        )
        first, second = top.search(top.DirectionEntries(rows, columns, symmetric=False), k)
        values = self._entries(left, right, first, second)
        order = values.abs().argsort(descending=True, stable=True)[:k]
        values = checks.narrowed("entries", values[order], self.dtype)
        return TopPairs(first[order], second[order], values, *spaces)

    def entries(
        self,
        left: Float[Tensor, "n d_left"] | None,
        right: Float[Tensor, "m d_right"] | None,
        first: Int[Tensor, " p"],
        second: Int[Tensor, " p"],
    ) -> Float[Tensor, " p"]:
        """``d_i^T M e_j`` of chosen pairs, of directions or (for None) coordinates, through float64.

        Raises IndexError for a pair that does not exist.
        """
        left, right = self._sides(left, right)
        chosen = []
        for name, index, rows, size in (
            ("first", first, left, self.shape[0]),
            ("second", second, right, self.shape[1]),
        ):
            count = size if rows is None else len(rows)
            chosen.append(checks.require_index(name, index, count, "directions", self.left))
        if chosen[0].shape != chosen[1].shape or chosen[0].ndim != 1:
            raise ValueError(
                f"first and second must be index vectors of one length, got "
                f"{checks.shape(chosen[0])} and {checks.shape(chosen[1])}"
            )
        return checks.narrowed("entries", self._entries(left, right, *chosen), self.dtype)

    def _entries(
        self, left: Tensor | None, right: Tensor | None, first: Tensor, second: Tensor
    ) -> Tensor:
        wide = checks.gram_dtype(self.left)
        hidden = []
        for rows, factor, index in ((left, self.left, first), (right, self.right, second)):
            used, places = index.unique(return_inverse=True)
            factor = factor.to(wide)
            hidden.append(
                (factor.T[used] if rows is None else rows[used].to(wide) @ factor.T, places)
            )
        (a, i), (b, j) = hidden
        a = a * self.weights.to(wide)
        step = max(1, BLOCK_ELEMENTS // (4 * max(1, a.shape[1])))
        parts = [(a[x] * b[y]).sum(1) for x, y in zip(i.split(step), j.split(step), strict=True)]
        return torch.cat(parts) if parts else a.new_empty(0)

    def _sides(
        self, left: Tensor | None, right: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Directions of both inputs, checked."""
        sides = (("left", left, self.left_space), ("right", right, self.right_space))
        checked = [
            None
            if rows is None
            else checks.require_matrix(
                name, rows, width, checks.meaning(f"d_{name}", space), self.left
            )
            for (name, rows, space), width in zip(sides, self.shape, strict=True)
        ]
        return checked[0], checked[1]


def stack(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[left, 0]`` and ``[0, right]``: of a form of both inputs, one after the other."""
    none_right, none_left = torch.zeros_like(right), torch.zeros_like(left)
    return torch.cat([left, none_right], 1), torch.cat([none_left, right], 1)


def _thin(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """``factor^T = basis @ upper`` for a factor [h, d]; the basis is None, the identity, for h >= d."""
    if len(factor) >= factor.shape[1]:
        return None, factor.T
    basis, upper = torch.linalg.qr(factor.T)
    return basis, upper


@dataclass(frozen=True, eq=False)
class SVD(Result):
    """Singular pairs of a matrix between two inputs, strongest first.

    Attributes
    ----------
    values: [k], falling
    left: [k, d_left], right: [k, d_right]
        Unit directions, one a row. Their sign is common: the left one's largest coordinate is positive.
    rest: the largest singular value left out, so that ``||M - sum|| = rest`` in spectral norm
    norm: ``||M||_F``
    left_space, right_space: what the coordinates are
    """

    _finite = ("values", "left", "right")

    values: Float[Tensor, " k"]
    left: Float[Tensor, "k d_left"]
    right: Float[Tensor, "k d_right"]
    rest: float
    norm: float
    left_space: str | None = None
    right_space: str | None = None

    @property
    def explained(self) -> Float[Tensor, " k"]:
        """[k], share of the squared norm that the first pairs hold together."""
        return (self.values.double() / (self.norm or 1.0)).square().cumsum(0).to(self.values.dtype)

    @property
    def effective_rank(self) -> float:
        """``(sum s)^2 / sum s^2`` of the pairs held: how many equal ones they are like."""
        squares = float(self.values.double().square().sum())
        return float(self.values.double().sum()) ** 2 / squares if squares else 0.0

    def top(self, k: int) -> SVD:
        """The first k pairs."""
        checks.require_count("k", k, len(self.values), "the pairs held")
        rest = float(self.values[k]) if k < len(self.values) else self.rest
        return replace(
            self, values=self.values[:k], left=self.left[:k], right=self.right[:k], rest=rest
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: value, share of the squared norm."""
        import pandas as pd

        shares = (self.values.double() / (self.norm or 1.0)).square()
        return pd.DataFrame({"value": self.values.tolist(), "share": shares.tolist()})


@dataclass(frozen=True, eq=False)
class TopPairs(Result):
    """The strongest pairs of a direction of one input with one of the other, strongest first.

    Attributes
    ----------
    first, second: [k], numbers of the left and the right directions
    coefficients: [k], ``d_first^T M e_second``: what stands before the product of their activations
    first_space, second_space: what the numbers count
    """

    first: Int[Tensor, " k"]
    second: Int[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    first_space: str | None = None
    second_space: str | None = None

    def top(self, k: int) -> TopPairs:
        """The first k of them."""
        checks.require_count("k", k, len(self.first), "the pairs held")
        names = ("first", "second", "coefficients")
        return replace(self, **{name: getattr(self, name)[:k] for name in names})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: first, second, coefficient."""
        import pandas as pd

        return pd.DataFrame(
            {
                "first": self.first.tolist(),
                "second": self.second.tolist(),
                "coefficient": self.coefficients.tolist(),
            }
        )
