"""Which input directions matter: the moments of what a layer reads, and the metric that they make.

Eigenvectors of Q ranked by |lambda| treat every input direction as equally common. With the second
moment ``M = E[x x^T]`` of a population of inputs the form is read in the metric of the data instead,

    ``M^1/2 Q M^1/2 = sum_i lambda_i y_i y_i^T``,  ``w_i = M^-1/2 y_i``,
    ``x^T Q x = sum_i lambda_i (w_i . x)^2``,

the same exact sum, now with ``E (w_i . x)^2 = 1``: lambda_i is the mean contribution of its term. w_i
is a filter, what x is read along; the pattern ``M w_i`` is what inputs that excite it have in common
(Haufe et al. 2014). Truncation is best in the metric.

>>> moments = InputMoments.of(x, space="blocks.3.mlp.hook_in")       # x [n, d]
>>> eigen = tensor.interaction(u).eigh(k=8, metric=moments.metric(ridge=0.3))
>>> eigen.vectors, eigen.patterns, eigen.mean_contributions

**The ridge.** A metric of the data alone says nothing about directions that the data does not take.
The ridge t mixes it with the Euclidean one, ``M_t = (1 - t) M + t tr(M)/d I``; t = 1 is the Euclidean
metric up to a factor. It is always stated.

**Whose moments.** They are those of a population, and decide what is asked: all inputs, a class's
images, the tokens where a feature is active.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result


@dataclass(frozen=True, eq=False)
class InputMoments(Result):
    """Count, mean and second moment of a population of inputs, in float64.

    Attributes
    ----------
    count: how many inputs
    mean: [d], ``E[x]``
    second: [d, d], ``E[x x^T]``
    population: which inputs, in words
    space: what the d coordinates are
    """

    _finite = ("mean", "second")

    count: int
    mean: Float[Tensor, " d"]
    second: Float[Tensor, "d d"]
    population: str = "all inputs"
    space: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"moments need at least one input, got a count of {self.count}")
        if self.second.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"second must be [d, d] with d={len(self.mean)} as in mean, got "
                f"{checks.shape(self.second)}"
            )
        for name in ("mean", "second"):
            checks.require_finite(name, getattr(self, name))

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "... d"],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        population: str = "all inputs",
        space: str | None = None,
    ) -> InputMoments:
        """The moments of inputs [..., d], or of those that a mask [...] chooses.

        Raises ValueError for no input, for NaN or infinite ones, and for a mask of another shape.
        """
        x = checks.require_tensor("x", x)
        if x.ndim < 2:
            raise ValueError(f"x must be inputs [..., d], got shape {checks.shape(x)}")
        if mask is not None:
            x = x[checks.require_mask(mask, x.shape[:-1], "input")]
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            raise ValueError("moments need at least one input, and none was given or chosen")
        checks.require_finite("x", rows)
        dtype = checks.gram_dtype(rows)
        mean = rows.new_zeros(rows.shape[1], dtype=dtype)
        second = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=dtype)
        for block in rows.split(8192):  # a float64 copy of all of them may not fit
            block = block.to(dtype)
            mean += block.sum(0)
            second += block.T @ block
        n = len(rows)
        return cls(n, mean / n, second / n, population, space)

    @classmethod
    def merged(cls, parts: Iterable[InputMoments]) -> InputMoments:
        """The moments of several populations together: other texts, or other processes' shares.

        Raises ValueError for none, or for parts of other widths, spaces or populations.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("nothing to merge")
        first = parts[0]
        for part in parts[1:]:
            for name in ("d", "space", "population"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(
                        f"moments of {name} {getattr(first, name)!r} and {getattr(part, name)!r} "
                        f"cannot be merged"
                    )
        count = sum(part.count for part in parts)
        mean = sum((part.count / count * part.mean for part in parts), torch.zeros_like(first.mean))
        second = sum(
            (part.count / count * part.second for part in parts), torch.zeros_like(first.second)
        )
        return cls(count, mean, second, first.population, first.space)

    @property
    def d(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """``E[(x - mean) (x - mean)^T]``"""
        return self.second - torch.outer(self.mean, self.mean)

    @property
    def effective_dimension(self) -> float:
        """``tr(M)^2 / tr(M^2)``: how many directions of equal size the second moment is worth."""
        return float(self.second.trace().square() / self.second.square().sum())

    def through(
        self,
        directions: Float[Tensor, "d d_new"],
        offset: Float[Tensor, " d_new"] | None = None,
        *,
        space: str | None = None,
    ) -> InputMoments:
        """The moments of ``x @ directions + offset``, where x are these inputs.

        A tensor in the new coordinates, `tensor`, and ``tensor.fold(directions, offset)`` in the old
        ones belong to the two.
        """
        matrix = checks.require_tensor("directions", directions).to(self.second)
        if matrix.ndim != 2 or len(matrix) != self.d:
            raise ValueError(
                f"directions must have shape [{self.d}, d_new], got {checks.shape(matrix)}"
            )
        mean = self.mean @ matrix
        second = matrix.T @ self.second @ matrix
        if offset is not None:
            offset = offset.to(self.second)
            cross = torch.outer(mean, offset)
            second = second + cross + cross.T + torch.outer(offset, offset)
            mean = mean + offset
        return InputMoments(self.count, mean, second, self.population, space)

    def centred(self) -> InputMoments:
        """The moments of ``x - mean``: their second moment is the covariance."""
        return InputMoments(
            self.count, torch.zeros_like(self.mean), self.covariance, self.population, self.space
        )

    def metric(self, ridge: float) -> Metric:
        """The metric of these inputs, mixed with the Euclidean one: ``(1 - t) M + t tr(M)/d I``.

        Parameters
        ----------
        ridge: t, from 0 (the data alone) to 1 (Euclidean up to a factor); .05 to .3 serve

        Takes one eigendecomposition of M. Raises ValueError for a ridge outside [0, 1] and for inputs
        that are all zero.
        """
        values, vectors = torch.linalg.eigh((self.second + self.second.T) / 2)
        return _metric(values.clamp_min(0), vectors.T, ridge, self.d, self)


@dataclass(frozen=True, eq=False)
class Metric(Result):
    """A symmetric positive (semi-)definite matrix M_t on the inputs, as its eigenpairs.

    ``M_t = vectors^T diag(values) vectors + rest (I - vectors^T vectors)``. Made by
    `InputMoments.metric`, or from samples by `Metric.of_samples`, which keeps only the directions that
    they span and costs nothing for the others.

    Attributes
    ----------
    values: [r]; vectors: [r, d], orthonormal rows
    rest: eigenvalue of M_t outside their span
    ridge: t
    count, population, space: of the inputs that it is made of
    """

    _finite = ("values", "vectors")

    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "r d"]
    rest: float
    ridge: float
    count: int
    population: str = "all inputs"
    space: str | None = None

    @classmethod
    def of_samples(
        cls,
        x: Float[Tensor, "n d"],
        ridge: float,
        *,
        population: str = "all inputs",
        space: str | None = None,
    ) -> Metric:
        """The metric of a few inputs [n, d]: ``InputMoments.of(x).metric(ridge)`` without d x d arrays.

        Costs a singular value decomposition of x, n d min(n, d).
        """
        x = checks.require_tensor("x", x).detach()
        if x.ndim != 2 or not len(x):
            raise ValueError(f"x must be inputs [n, d] with n at least 1, got {checks.shape(x)}")
        checks.require_finite("x", x)
        rows = x.to(checks.gram_dtype(x))
        _, singular, vectors = torch.linalg.svd(rows, full_matrices=False)
        kept = singular > singular[0] * 1e-14 if len(singular) else singular > 0
        values = singular[kept].square() / len(x)
        source = _Source(len(x), population, space)
        return _metric(values, vectors[kept], ridge, x.shape[1], source)

    @property
    def d(self) -> int:
        return self.vectors.shape[1]

    def __str__(self) -> str:
        return (
            f"the second moment of {self.population} ({self.count:,} inputs, ridge {self.ridge:g})"
        )

    def root(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """``rows @ M_t^1/2``"""
        return self._power(self._fitting("rows", rows), 0.5)

    def inverse_root(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """``rows @ M_t^-1/2``; the pseudo-inverse where M_t is singular (ridge 0)."""
        return self._power(self._fitting("rows", rows), -0.5)

    def apply(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """``rows @ M_t``"""
        return self._power(self._fitting("rows", rows), 1.0)

    def require_fit(self, what: str, width: int, space: str | None) -> None:
        """Raise ValueError for a metric of other coordinates."""
        if self.d != width or (None not in (self.space, space) and self.space != space):
            raise ValueError(
                f"the metric is of {self.d} coordinates ({self.space or 'of an unnamed space'}), "
                f"{what} reads {width} ({space or 'of an unnamed space'}): take the moments of what "
                f"it reads, or `through` the map between the two"
            )

    def squared_length(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """``x^T M_t^-1 x``, infinite where M_t is singular and x leaves its range."""
        x = self._fitting("x", x)
        inside = self._power(x, -0.5).square().sum(-1)
        if self.rest > 0:
            return inside
        outside = x - (x @ self.vectors.to(x).T) @ self.vectors.to(x)
        tolerance = 1e3 * torch.finfo(x.dtype).eps * x.norm(dim=-1)
        return torch.where(outside.norm(dim=-1) > tolerance, math.inf, inside)

    @property
    def least(self) -> float:
        """The smallest eigenvalue of M_t."""
        least = float(self.values.min()) if len(self.values) else math.inf
        return min(least, self.rest) if len(self.values) < self.d else least

    @property
    def second(self) -> Metric:
        """The second moment itself, without the ridge, in the same form."""
        shift = self.ridge * self._mean
        if self.ridge == 1:
            raise ValueError("a metric of ridge 1 is Euclidean and has forgotten the moments")
        values = (self.values - shift).clamp_min(0) / (1 - self.ridge)
        return Metric(values, self.vectors, 0.0, 0.0, self.count, self.population, self.space)

    @property
    def _mean(self) -> float:
        """``tr(M)/d``; the ridge does not change the trace."""
        missing = self.d - len(self.values)
        return (float(self.values.sum()) + missing * self.rest) / self.d

    def _fitting(self, name: str, rows: Any) -> Tensor:
        meaning = checks.meaning("d", self.space)
        return checks.require_rows(name, rows, self.d, meaning, like=rows)

    def _power(self, rows: Tensor, exponent: float) -> Tensor:
        values, rest = self.values, self.rest
        if exponent < 0:
            floor = float(values.max()) * self.d * torch.finfo(values.dtype).eps
            powers = torch.where(values > floor, values.clamp_min(floor or 1.0) ** exponent, 0.0)
            outside = rest**exponent if rest > 0 else 0.0
        else:
            powers, outside = values**exponent, rest**exponent
        vectors = self.vectors.to(rows)
        inside = (rows @ vectors.T) * (powers - outside).to(rows)
        return inside @ vectors + outside * rows


@dataclass(frozen=True)
class _Source:
    count: int
    population: str
    space: str | None


def _metric(
    values: Tensor, vectors: Tensor, ridge: float, d: int, source: InputMoments | _Source
) -> Metric:
    ridge = checks.require_number("ridge", ridge, "lies between 0 and 1", signed=True)
    if not 0 <= ridge <= 1:
        raise ValueError(f"ridge lies between 0 and 1, got {ridge}")
    mean = float(values.sum()) / d
    if not mean > 0:
        raise ValueError("all inputs are zero: they make no metric")
    mixed = (1 - ridge) * values + ridge * mean
    return Metric(
        mixed, vectors, ridge * mean, ridge, source.count, source.population, source.space
    )
