"""Pairs of input features: the strongest of the weights, and those that are active together on text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.labels import Named, kinds
from tl_bilinear.results import Kind

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class FeaturePairs(Named):
    """The pairs of input features with the largest absolute coefficients, strongest first.

    Attributes
    ----------
    features: [..., k], the output feature that each pair makes
    first, second: [..., k], input features, first <= second; equal for a self-interaction
    values: [..., k], the entries ``Q[first, second]``
    space: what the input features are
    """

    _finite = ("values",)

    features: Int[Tensor, "*batch k"]
    first: Int[Tensor, "*batch k"]
    second: Int[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]
    space: str | None = None

    @property
    def is_self(self) -> Bool[Tensor, "*batch k"]:
        """[..., k], true where a feature interacts with itself."""
        return self.first == self.second

    @property
    def coefficients(self) -> Float[Tensor, "*batch k"]:
        """What stands before ``z_first z_second``: the entry for self, twice the entry for cross."""
        return torch.where(self.is_self, self.values, 2 * self.values)

    def top(self, k: int) -> FeaturePairs:
        """The first k pairs."""
        checks.require_count("k", k, self.first.shape[-1], "the pairs held")
        names = ("features", "first", "second", "values")
        return replace(self, **{name: getattr(self, name)[..., :k] for name in names})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: feature, first, second, kind, value, coefficient, labels."""
        return self.table(
            {
                "feature": self.features,
                "first": self.first,
                "second": self.second,
                "kind": kinds(self.first, self.second),
                "value": self.values,
                "coefficient": self.coefficients,
            },
            outputs=("feature",),
        )


@dataclass(frozen=True, eq=False)
class ActiveInteractions(Named):
    """The interactions that made an output feature on the tokens where it was active (section 3.1).

    Attributes
    ----------
    feature: the output feature
    first, second: [m], input features that were active together, first <= second, largest total first
    counts: [m], on how many tokens
    means: [m], contribution of the pair, averaged over all tokens that were looked at
    spread: [m], its root mean square over the tokens where the pair was active
    tokens: how many tokens were looked at
    pairs_per_token: active pairs, on average
    preactivation: the feature's mean pre-activation on these tokens
    """

    feature: int
    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    counts: Int[Tensor, " m"]
    means: Float[Tensor, " m"]
    spread: Float[Tensor, " m"]
    tokens: int
    pairs_per_token: float
    preactivation: float

    @property
    def explained(self) -> float:
        """Share of the mean pre-activation that comes from pairs of features."""
        return float(self.means.sum()) / self.preactivation if self.preactivation else float("nan")

    def top(self, k: int, *, kind: Kind = "all") -> ActiveInteractions:
        """The first k pairs, of a kind: "self", "cross" or both."""
        own = self.first == self.second
        kinds = {"all": own | ~own, "self": own, "cross": ~own}
        if kind not in kinds:
            raise ValueError(f"kind must be 'all', 'self' or 'cross', got {kind!r}")
        chosen = kinds[kind].nonzero()[:, 0]
        checks.require_count("k", k, len(chosen), "the pairs held")
        names = ("first", "second", "counts", "means", "spread")
        return replace(self, **{name: getattr(self, name)[chosen[:k]] for name in names})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: first, second, kind, tokens, mean and rms contribution, labels."""
        return self.table(
            {
                "first": self.first,
                "second": self.second,
                "kind": kinds(self.first, self.second),
                "tokens": self.counts,
                "mean": self.means,
                "rms_when_active": self.spread,
            }
        )


class ActiveTokens(NamedTuple):
    """Tokens on which an output feature is active.

    coefficients: [t, n], of the input features, over the token's norm scale
    gain: [t], what the output dictionary's normalisation multiplies the layer's output by
    preactivation: [t]
    """

    coefficients: Tensor
    gain: Tensor
    preactivation: Tensor


def active_interactions(
    feature: int, form: Tensor, directions: Tensor, tokens: Iterable[ActiveTokens]
) -> ActiveInteractions:
    """Every pair of active input features on some tokens, summed over them.

    form: [d, d], the output feature's interaction matrix; directions: [n, d], the input features
    """
    n = len(directions)
    keys: list[Tensor] = [torch.empty(0, dtype=torch.long, device=form.device)]
    amounts: list[Tensor] = [form.new_empty(0)]
    sums, seen = 0.0, 0
    for z, gain, preactivation in tokens:
        seen += len(z)
        sums += float(preactivation.sum())
        for row, factor in zip(z, gain, strict=True):
            active = row.nonzero()[:, 0]
            rows = row[active, None] * directions[active].to(row)
            block = factor * (rows @ form.to(row) @ rows.T)
            i, j = torch.triu_indices(len(active), len(active), device=row.device)
            keys.append(active[i] * n + active[j])
            amounts.append(block[i, j] * torch.where(i == j, 1.0, 2.0))
    joined, values = torch.cat(keys), torch.cat(amounts).double()
    pairs, place, counts = joined.unique(return_inverse=True, return_counts=True)
    total = values.new_zeros(len(pairs)).index_add_(0, place, values)
    squares = values.new_zeros(len(pairs)).index_add_(0, place, values.square())
    order = total.abs().argsort(descending=True, stable=True)
    pairs, counts, total, squares = (part[order] for part in (pairs, counts, total, squares))
    return ActiveInteractions(
        feature=feature,
        first=pairs // n,
        second=pairs % n,
        counts=counts,
        means=(total / max(1, seen)).to(form.dtype),
        spread=(squares / counts.clamp_min(1)).sqrt().to(form.dtype),
        tokens=seen,
        pairs_per_token=len(joined) / max(1, seen),
        preactivation=sums / max(1, seen),
    )
