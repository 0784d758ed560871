"""How well a few eigenvectors predict an output feature's pre-activation, token by token (Fig. 9)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.labels import Named
from tl_bilinear.features.terms import FeatureTerms
from tl_bilinear.tensor import Eigendecomposition
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class LowRankCorrelation(Named):
    """How well k eigenvectors of an output feature predict its pre-activation (Fig. 9).

    Attributes
    ----------
    features: [m], output features
    everywhere: [m, K], correlation over all tokens, with 1 to K eigenvectors; NaN where one is constant
    active: [m, K], over the tokens on which the feature is active
    counts: [m], how many those are
    tokens: how many tokens there were
    """

    features: Int[Tensor, " m"]
    everywhere: Float[Tensor, "m K"]
    active: Float[Tensor, "m K"]
    counts: Int[Tensor, " m"]
    tokens: int

    def enough(self, min_active: int) -> Bool[Tensor, " m"]:
        """[m], features active on at least so many tokens, with a correlation."""
        return (self.counts >= min_active) & ~self.active.isnan().any(1)

    def mean_active(self, min_active: int = 10) -> Float[Tensor, " K"]:
        """[K], mean active-only correlation with 1 to K eigenvectors (Fig. 9A)."""
        return self.active[self.enough(min_active)].mean(0)

    def mean_everywhere(self, min_active: int = 10) -> Float[Tensor, " K"]:
        """[K], mean correlation of the same features over all tokens, with 1 to K eigenvectors."""
        return self.everywhere[self.enough(min_active)].nanmean(0)

    def share_above(self, threshold: float = 0.75, *, rank: int = 2, min_active: int = 10) -> float:
        """Share of features whose active-only correlation with `rank` eigenvectors is above `threshold`.

        It depends strongly on `min_active`: with few samples correlations are noisy. Report both.
        """
        checks.require_count("rank", rank, self.active.shape[1], "the ranks held")
        checks.require_number("threshold", threshold, "is a correlation", signed=True)
        chosen = self.active[self.enough(min_active), rank - 1]
        return float((chosen > threshold).double().mean()) if len(chosen) else float("nan")

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature: feature, active tokens, active_k and everywhere_k for each rank."""
        columns = {"feature": self.features, "active_tokens": self.counts}
        for name, values in (("active", self.active), ("everywhere", self.everywhere)):
            for rank in range(values.shape[1]):
                columns[f"{name}_{rank + 1}"] = values[:, rank]
        return self.table(columns, inputs=(), outputs=("feature",))


@dataclass(frozen=True, eq=False)
class ActivationScatter(Named):
    """An output feature's pre-activation beside its low-rank approximation, token by token (Fig. 9C).

    Attributes
    ----------
    feature, k: the output feature, and how many eigenvectors approximate it
    measured, approximation: [tokens]
    active: [tokens], whether the feature is active
    """

    feature: int
    k: int
    measured: Float[Tensor, " tokens"]
    approximation: Float[Tensor, " tokens"]
    active: Bool[Tensor, " tokens"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a token."""
        columns = {
            "measured": self.measured,
            "approximation": self.approximation,
            "active": self.active,
        }
        return self.table(columns, inputs=())


class LayerTokens(NamedTuple):
    """What t tokens are to a layer and m of its output features.

    x: [t, d], what the layer reads
    preactivation: [t, m]
    active: [t, m], whether the features are active
    gain: [t], what the output dictionary's normalisation multiplies the layer's output by
    """

    x: Tensor
    preactivation: Tensor
    active: Tensor
    gain: Tensor


@torch.no_grad()
def low_rank_correlation(
    features: Int[Tensor, " m"],
    eigen: Eigendecomposition | FeatureTerms,
    tokens: Iterable[LayerTokens],
) -> LowRankCorrelation:
    """Correlations of pre-activations with their approximations by 1 to K terms, in one pass."""
    m, k = eigen.values.shape
    everywhere, active = (_Correlation(m, k, features.device) for _ in range(2))
    total = 0
    for x, p, on, gain in tokens:
        total += len(x)
        step = max(1, BLOCK_ELEMENTS // max(1, m * k))
        for part in torch.arange(len(x), device=x.device).split(step):
            approximations = eigen.activations(x[part]).cumsum(-1) * gain[part, None, None]
            everywhere.add(p[part], approximations, torch.ones_like(p[part]))
            active.add(p[part], approximations, on[part])
    return LowRankCorrelation(
        features, everywhere.value(), active.value(), active.n[:, 0].long(), total
    )


@torch.no_grad()
def activation_scatter(
    feature: int, eigen: Eigendecomposition, tokens: Iterable[LayerTokens]
) -> ActivationScatter:
    """A feature's pre-activation and its approximation by all eigenpairs given, token by token."""
    parts = [(p[:, 0], eigen.quadratic(x) * gain, active[:, 0]) for x, p, active, gain in tokens]
    measured, near, on = (torch.cat(column) for column in zip(*parts, strict=True))
    return ActivationScatter(feature, eigen.values.shape[-1], measured, near, on)


class _Correlation:
    """Running sums of a variable [m] and K approximations of it [m, K], for their correlation."""

    def __init__(self, m: int, ranks: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n, self.p, self.pp = zeros(m, 1), zeros(m, 1), zeros(m, 1)
        self.q, self.qq, self.pq = zeros(m, ranks), zeros(m, ranks), zeros(m, ranks)

    def add(self, p: Tensor, q: Tensor, weight: Tensor) -> None:
        """p [t, m], q [t, m, K], weight [t, m] of zeros and ones."""
        p, q, weight = p.double()[..., None], q.double(), weight.double()[..., None]
        self.n += weight.sum(0)
        self.p += (weight * p).sum(0)
        self.pp += (weight * p * p).sum(0)
        self.q += (weight * q).sum(0)
        self.qq += (weight * q * q).sum(0)
        self.pq += (weight * p * q).sum(0)

    def value(self) -> Tensor:
        covariance = self.n * self.pq - self.p * self.q
        variances = (self.n * self.pp - self.p**2) * (self.n * self.qq - self.q**2)
        found = covariance / variances.clamp_min(0).sqrt()
        return found.where(found.isfinite(), torch.nan).clamp(-1, 1)
