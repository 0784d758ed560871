"""Eigendecompositions of interaction matrices.

``u . f(x) = x^T Q x = sum_i lambda_i (v_i . x)^2`` (Pearce et al. 2025, equations 2 and 3): each
eigenvector is a direction that makes the output, quadratically and without cross terms. The pairs of
largest absolute eigenvalue give the best approximation of Q of their rank.

>>> eigen = tensor.interaction(u).eigh(k=8)
>>> eigen.values, eigen.vectors            # [8], [8, d]
>>> eigen.activations(x)                   # [..., 8], lambda_i (v_i . x)^2
>>> eigen.certificate(radius=d**0.5)       # |x| <= radius: how far 8 pairs are from u . f(x)

**What is arbitrary.** An eigenvector's sign: here its coordinate of largest magnitude is positive.
A basis of a degenerate group (equal eigenvalues): use `projectors`, which are unique.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.moments import Metric

if TYPE_CHECKING:
    import pandas


Order = Literal["magnitude", "contribution", "variance", "covariance"]

Which = Literal["magnitude", "positive", "negative"]
"""Which eigenvalues come first: the largest in absolute value, the largest, or the most negative."""


def signed(values: Tensor, which: Which) -> Tensor:
    """What an order goes by: the largest comes first."""
    if which == "magnitude":
        return values.abs()
    return values if which == "positive" else -values


class EigenProjector(NamedTuple):
    """A group of equal eigenvalues and the projector on its eigenspace."""

    value: float
    rank: int
    matrix: Float[Tensor, "d d"]


@dataclass(frozen=True, eq=False)
class Eigendecomposition(Result):
    """Eigenpairs of interaction matrices, the wanted ones first.

    Attributes
    ----------
    values: [..., k], in the order asked for: by falling absolute value, or from one end of the
        spectrum: the largest first ("positive"), or the most negative ("negative"). Where fewer than k
        have that sign, zeros follow, and after them the other sign: see `n_signed`
    vectors: [..., k, d], one unit eigenvector a row, largest-magnitude coordinate positive. In a
        metric M the filters ``w_i = M^-1/2 y_i`` of unit eigenvectors y_i of ``M^1/2 Q M^1/2``
    residuals: [..., k], ``||Q v - lambda v||`` for each pair (in a metric, of the y_i)
    bound: [...], upper bound on the spectral norm of ``Q - sum_i lambda_i v_i v_i^T``, what these
        pairs leave out; only rounding where all d pairs are held. In a metric, of M^1/2 that M^1/2
    method: how it was computed
    space: what the d coordinates are
    tol: relative residual that counts as converged
    bound_failure: probability that `bound` and `rest` of one matrix do not hold; 0 for "dense" and
        "lowrank", 1e-6 over the solver's random vectors for "krylov"
    directions: [..., d_out], the output direction that each matrix belongs to, where there is one
    output_space: what the coordinates of the directions are
    which: "magnitude", "positive" or "negative", the order asked for
    rest: [...], no eigenvalue that was left out comes before this one in that order; for "magnitude"
        it is `bound`, for "negative" it is a lower bound
    norm: [...], ``||Q||``, the largest absolute eigenvalue; a top(k) keeps it
    rounding: [...], what the working precision leaves uncertain of Q, as a spectral norm: large where
        hidden neurons cancel. `bound` and `rest` contain it
    metric: the metric in which they are eigenpairs; None for the Euclidean one
    """

    _finite = ("values", "vectors")

    values: Float[Tensor, "*batch k"]
    vectors: Float[Tensor, "*batch k d"]
    residuals: Float[Tensor, "*batch k"]
    bound: Float[Tensor, "*batch"]
    method: str = "dense"
    space: str | None = None
    tol: float = 1e-5
    bound_failure: float = 0.0
    directions: Float[Tensor, "*batch d_out"] | None = None
    output_space: str | None = None
    which: Which = "magnitude"
    rest: Float[Tensor, "*batch"] | None = None
    norm: Float[Tensor, "*batch"] | None = None
    rounding: Float[Tensor, "*batch"] | None = None
    metric: Metric | None = None

    @property
    def errors(self) -> Float[Tensor, "*batch k"]:
        """[..., k], how far each value may be from the eigenvalue of its rank, in the order asked for.

        For "magnitude" in absolute value. All residuals together, what may have been left out that
        comes before it (`rest`), and rounding; holds for every method, with `bound_failure`.
        """
        coupling = self._coupling + self._rounding
        return (self._ahead - self._key).clamp_min(0) + coupling[..., None]

    @property
    def converged(self) -> Bool[Tensor, "*batch"]:
        """[...], whether these are the wanted pairs, to within ``tol * ||Q||``.

        Every residual, with what rounding may hide, is at most that; and no eigenvalue that was left out
        comes before the last of these by more.
        """
        norm = self.values.abs().amax(-1) if self.norm is None else self.norm
        slack = self.tol * norm
        good = self.residuals.amax(-1) + self._rounding <= slack
        return good & (self._ahead[..., 0] - self._rounding <= self._key.amin(-1) + slack)

    @property
    def n_signed(self) -> Int[Tensor, "*batch"]:
        """[...], how many of the values have the sign asked for, beyond rounding; k for "magnitude"."""
        if self.which == "magnitude":
            return torch.full(self.batch_shape, self.k, device=self.values.device)
        return (self._key > self.residuals + self._rounding[..., None]).sum(-1)

    @property
    def _coupling(self) -> Tensor:
        """[...], all residuals together; their squares may not fit the dtype."""
        wide = checks.gram_dtype(self.residuals)
        return torch.linalg.vector_norm(self.residuals, dim=-1, dtype=wide).to(self.residuals.dtype)

    @property
    def _rounding(self) -> Tensor:
        return torch.zeros_like(self.bound) if self.rounding is None else self.rounding

    @property
    def _key(self) -> Tensor:
        """What the order goes by, falling."""
        return signed(self.values, self.which)

    @property
    def _ahead(self) -> Tensor:
        """[..., 1], `rest` in the order asked for."""
        rest = self.bound if self.rest is None else self.rest
        return (-rest if self.which == "negative" else rest)[..., None]

    @property
    def k(self) -> int:
        return self.values.shape[-1]

    @property
    def d(self) -> int:
        return self.vectors.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        return self.values.shape[:-1]

    def __getitem__(self, index: Any) -> Eigendecomposition:
        """Index the batch dimensions."""
        if not self.batch_shape:
            raise IndexError(
                "a single eigendecomposition has no batch dimension to index; its pairs are in "
                "values [k] and vectors [k, d]"
            )
        names = (
            "values",
            "vectors",
            "residuals",
            "bound",
            "directions",
            "rest",
            "norm",
            "rounding",
        )
        held: dict[str, Any] = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {n: None if t is None else t[index] for n, t in held.items()}
        return replace(self, **chosen)

    # ------------------------------------------------------------------ evaluation

    def activations(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """What each eigenvector contributes, ``lambda_i (v_i . x)^2``: [*x_batch, *batch, k]."""
        x = checks.require_rows("x", x, self.d, checks.meaning("d", self.space), self.vectors)
        products = x @ self.vectors.reshape(self.values.numel(), self.d).T
        return products.square().reshape(x.shape[:-1] + self.values.shape) * self.values

    def quadratic(self, x: Float[Tensor, "... d"], k: int | None = None) -> Float[Tensor, "..."]:
        """``sum_i lambda_i (v_i . x)^2`` over the first k pairs (all held): [*x_batch, *batch]."""
        return (self if k is None else self.top(k)).activations(x).sum(-1)

    def dense(self, max_bytes: int = checks.MAX_DENSE_BYTES) -> Float[Tensor, "*batch d d"]:
        """``sum_i lambda_i v_i v_i^T`` over the pairs held; Q itself where all are."""
        count = self.batch_shape.numel() * self.d**2
        checks.require_affordable(
            "dense()", count, self.values.dtype, max_bytes, "use quadratic or activations"
        )
        return (self.vectors.mT * self.values[..., None, :]) @ self.vectors

    # ------------------------------------------------------------------ part of it

    def top(self, k: int) -> Eigendecomposition:
        """The first k pairs; `bound` and `rest` then cover the pairs left out as well."""
        checks.require_count("k", k, self.k, "the pairs held")
        bound, ahead = self.bound, self._ahead[..., 0]
        if k < self.k:
            # The dropped pairs and what was left out before are orthogonal up to the residuals.
            slack = self._coupling
            dropped = self.values[..., k:].abs().amax(-1)
            bound = torch.maximum(bound, dropped + self._rounding) + slack
            ahead = torch.maximum(ahead, self._key[..., k:].amax(-1) + self._rounding) + slack
        return replace(
            self,
            values=self.values[..., :k],
            vectors=self.vectors[..., :k, :],
            residuals=self.residuals[..., :k],
            bound=bound,
            rest=-ahead if self.which == "negative" else ahead,
            norm=self.values.abs().amax(-1) if self.norm is None else self.norm,
        )

    def certificate(self, radius: float, k: int | None = None) -> Float[Tensor, "*batch"]:
        """Bound on ``|u . f(x) - quadratic(x, k)|`` over every x with ``||x|| <= radius``.

        Behind RMSNorm or LayerNorm whose weight is folded into the layer, ``radius = sqrt(d)`` holds
        for every input. The layer's biases, if it has any, are not part of Q. In a metric the bound is
        that of the direction the data takes least, and `error_bound` says much more of a given x.
        """
        radius = checks.require_number("radius", radius, "bounds a norm")
        longest = radius**2
        if self.metric is not None:
            longest /= max(self.metric.least, 1e-300)
        return (self if k is None else self.top(k)).bound * longest

    def error_bound(self, x: Float[Tensor, "... d"], k: int | None = None) -> Float[Tensor, "..."]:
        """Bound on ``|x^T Q x - quadratic(x, k)|`` for each x: [*x_batch, *batch].

        ``bound (|x|^2 - sum_i (v_i . x)^2)``: only the part of x that the pairs do not read counts. In a
        metric |x|^2 is ``x^T M^-1 x``. For pairs that have converged; residuals enter through `bound`.
        """
        part = self if k is None else self.top(k)
        x = checks.require_rows("x", x, self.d, checks.meaning("d", self.space), self.vectors)
        length = x.square().sum(-1) if self.metric is None else self.metric.squared_length(x)
        products = x @ part.vectors.reshape(part.values.numel(), self.d).T
        read = products.square().reshape(x.shape[:-1] + part.values.shape).sum(-1)
        length = length.reshape(length.shape + (1,) * len(self.batch_shape))
        rounding = 100 * torch.finfo(x.dtype).eps * length
        return part.bound * ((length - read).clamp_min(0) + rounding)

    @property
    def patterns(self) -> Float[Tensor, "*batch k d"]:
        """What inputs that excite each eigenvector have in common: ``M w_i`` (Haufe et al. 2014).

        An eigenvector says along which direction x is read; in correlated inputs that is not what such
        an input looks like. Without a metric the eigenvectors themselves.
        """
        return self.vectors if self.metric is None else self.metric.apply(self.vectors)

    @property
    def unit_vectors(self) -> Float[Tensor, "*batch k d"]:
        """The orthonormal eigenvectors: of Q, or of ``M^1/2 Q M^1/2`` in a metric."""
        return self.vectors if self.metric is None else self.metric.root(self.vectors)

    @property
    def mean_contributions(self) -> Float[Tensor, "*batch k"]:
        """``lambda_i E (w_i . x)^2`` over the inputs of the metric: lambda_i itself for ridge 0.

        Raises ValueError without a metric, which says what is common.
        """
        if self.metric is None:
            raise ValueError(
                "mean contributions need the metric of some inputs: eigh(k, metric=...)"
            )
        reached = (self.metric.second.apply(self.vectors) * self.vectors).sum(-1)
        return self.values * reached

    def ordered(self, by: Order, x: Float[Tensor, "n d"] | None = None) -> Eigendecomposition:
        """The pairs in another order, so that `top(k)` and `quadratic(x, k)` take others first.

        Parameters
        ----------
        by: "magnitude" (|lambda|), "contribution" (mean over x of lambda (v . x)^2, in absolute value),
            "variance" of that term over x, or its "covariance" with the whole form, which says
            how much of what varies each term makes
        x: [n, d], inputs for all orders but the first; the whole is the sum of the pairs held

        Raises ValueError for an unknown order or missing inputs.
        """
        if by not in ("magnitude", "contribution", "variance", "covariance"):
            raise ValueError(
                f"by must be 'magnitude', 'contribution', 'variance' or 'covariance', got {by!r}"
            )
        if by == "magnitude":
            key = self.values.abs()
        elif x is None:
            raise ValueError(
                f"by={by!r} orders terms by what they do on inputs x: give some, [n, d]"
            )
        else:
            terms = self.activations(x).double().flatten(0, x.ndim - 2)
            if by == "contribution":
                key = terms.mean(0).abs()
            else:
                away = terms - terms.mean(0)
                whole = away if by == "variance" else away.sum(-1, keepdim=True)
                key = (away * whole).mean(0)
        order = key.argsort(dim=-1, descending=True, stable=True)
        rows = order[..., None].expand_as(self.vectors)
        return replace(
            self,
            values=self.values.gather(-1, order),
            vectors=self.vectors.gather(-2, rows),
            residuals=self.residuals.gather(-1, order),
        )

    def effective_rank(self) -> Float[Tensor, "*batch"]:
        """``(L1 / L2)^2`` of the eigenvalues held (appendix D); 0 for a zero matrix."""
        return participation(self.values)

    def projectors(self, rtol: float = 1e-6) -> list[EigenProjector]:
        """Groups of eigenvalues within ``rtol * max|lambda|`` of each other, and their projectors.

        Unique where an eigenvector is not. A truncation may cut through its last group. For one
        matrix; index a batch first. Ordered by falling absolute eigenvalue.
        """
        if self.batch_shape:
            raise ValueError(
                f"projectors are of one matrix, this is a batch of {list(self.batch_shape)}; "
                f"index it first"
            )
        rtol = checks.require_number("rtol", rtol, "is a relative gap")
        order = self.values.argsort(descending=True)
        values = self.values[order]
        gap = rtol * values.abs().max()
        starts = [0, *((values[:-1] - values[1:] > gap).nonzero()[:, 0] + 1).tolist(), self.k]
        groups = []
        for start, stop in itertools.pairwise(starts):
            vectors = self.unit_vectors[order[start:stop]]
            value = float(values[start:stop].mean())
            groups.append(EigenProjector(value, stop - start, vectors.T @ vectors))
        return sorted(groups, key=lambda group: -abs(group.value))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: matrix (of a flattened batch), rank, value, residual."""
        import pandas as pd

        matrix = torch.arange(self.batch_shape.numel()).repeat_interleave(self.k)
        columns = {} if not self.batch_shape else {"matrix": matrix.tolist()}
        columns["rank"] = torch.arange(1, self.k + 1).repeat(self.batch_shape.numel()).tolist()
        columns["value"] = self.values.flatten().tolist()
        columns["residual"] = self.residuals.flatten().tolist()
        return pd.DataFrame(columns)


def participation(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """``(L1 / L2)^2``: how many values of one size these are worth; 0 where all are zero."""
    sizes = values.abs()
    largest = sizes.amax(-1, keepdim=True) if sizes.shape[-1] else sizes.sum(-1, keepdim=True)
    sizes = sizes / torch.where(largest > 0, largest, 1.0)  # their squares may not fit the dtype
    squares = sizes.square().sum(-1)
    return torch.where(squares > 0, sizes.sum(-1).square() / squares.clamp_min(1.0), 0.0)


def fix_signs(vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Each row with its largest-magnitude coordinate positive; of two as large, the first."""
    if vectors.numel() == 0:
        return vectors
    fixed = vectors.detach()
    reach = fixed.amax(-1, keepdim=True) + fixed.amin(-1, keepdim=True)
    if not bool(reach.all()):  # two are as large
        largest = fixed.gather(-1, fixed.abs().argmax(-1, keepdim=True))
        reach = torch.where(reach == 0, largest, reach)
    return vectors * torch.copysign(torch.ones_like(reach), reach)
