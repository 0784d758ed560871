"""What is found about a layer between dictionaries from weights alone: small tables of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear.tensor import _checks
from tl_bilinear.tensor.eigen import participation
from tl_bilinear.tensor.storage import Storable

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Submatrix(Storable):
    """The interaction matrix of one output feature among a few input features (Fig. 8A).

    Attributes
    ----------
    feature: the output feature
    features: [m], input features, those that meet most of the strongest pairs first
    matrix: [m, m], entries between them (half of a pair's coefficient off the diagonal)
    labels: a name for each of the m features
    """

    feature: int
    features: Int[Tensor, " m"]
    matrix: Float[Tensor, "m m"]
    labels: list[str]

    def to_pandas(self) -> pandas.DataFrame:
        """[m, m] with the labels as rows and columns."""
        import pandas as pd

        return pd.DataFrame(self.matrix.cpu().numpy(), index=self.labels, columns=self.labels)


@dataclass(frozen=True, eq=False)
class InteractionStatistics(Storable):
    """All interactions of one output feature, as distributions (Fig. 24).

    Attributes
    ----------
    feature: the output feature
    self_values: [n], every diagonal entry
    cross_mean, cross_std, cross_kurtosis: of the n (n-1) / 2 entries off the diagonal; the kurtosis is
        the excess over a normal distribution's
    edges: [bins + 1], counts: [bins], histogram of the entries off the diagonal
    outliers: how many of them lie more than `sigmas` standard deviations from their mean
    expected_outliers: how many would if they were normal
    eigenvalues: [d], of the interaction matrix in the basis of activations, falling
    reference: [d], eigenvalues expected of a random symmetric matrix of the same norm, falling
    """

    feature: int
    self_values: Float[Tensor, " n"]
    cross_mean: float
    cross_std: float
    cross_kurtosis: float
    edges: Float[Tensor, " bins_and_one"]
    counts: Float[Tensor, " bins"]
    outliers: int
    expected_outliers: float
    sigmas: float
    eigenvalues: Float[Tensor, " d"]
    reference: Float[Tensor, " d"]

    @property
    def effective_rank(self) -> float:
        """``(L1 / L2)^2`` of the eigenvalues (appendix D)."""
        return float(participation(self.eigenvalues))

    @property
    def outlying_eigenvalues(self) -> Float[Tensor, " m"]:
        """Eigenvalues beyond the edge of the random reference, by falling magnitude."""
        beyond = self.eigenvalues[self.eigenvalues.abs() > self.reference[0]]
        return beyond[beyond.abs().argsort(descending=True)]

    @property
    def cross_shares(self) -> Float[Tensor, " bins"]:
        """Share of the entries off the diagonal that lie in each bin."""
        return self.counts / self.counts.sum().clamp_min(1)

    @property
    def self_shares(self) -> Float[Tensor, " bins"]:
        """Share of the diagonal entries within the edges that lie in each bin."""
        counts = torch.histogram(self.self_values.cpu().float(), self.edges.cpu().float()).hist
        return counts / counts.sum().clamp_min(1)

    def to_pandas(self) -> pandas.DataFrame:
        """One row: what can be said in numbers."""
        import pandas as pd

        return pd.DataFrame(
            {
                "feature": [self.feature],
                "self_mean": [float(self.self_values.mean())],
                "self_std": [float(self.self_values.std())],
                "cross_mean": [self.cross_mean],
                "cross_std": [self.cross_std],
                "cross_kurtosis": [self.cross_kurtosis],
                "outliers": [self.outliers],
                "expected_outliers": [self.expected_outliers],
                "effective_rank": [self.effective_rank],
                "outlying_eigenvalues": [len(self.outlying_eigenvalues)],
            }
        )


@dataclass(frozen=True, eq=False)
class EigenGeometry(Storable):
    """Named directions seen along eigenvectors of one output feature (Fig. 8B).

    Attributes
    ----------
    feature: the output feature
    names: of the m directions
    eigenvalues: [k]
    cosines: [m, k], cosine of each direction with each eigenvector
    clusters: [m], numbers of groups of directions with similar cosines, from 1
    """

    feature: int
    names: list[str]
    eigenvalues: Float[Tensor, " k"]
    cosines: Float[Tensor, "m k"]
    clusters: Int[Tensor, " m"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a direction: name, cluster, a cosine with each eigenvector."""
        import pandas as pd

        columns = {"direction": self.names, "cluster": self.clusters.tolist()}
        for index, value in enumerate(self.eigenvalues.tolist()):
            columns[f"v{index + 1} ({value:+.3g})"] = self.cosines[:, index].tolist()
        return pd.DataFrame(columns)


@dataclass(frozen=True, eq=False)
class FeatureSweep(Storable):
    """A table of output features, ordered by falling |lambda_1|.

    Attributes
    ----------
    features: [m], output features
    norms, traces: [m], ``||Q||_F`` and ``tr Q`` in the basis of activations
    values: [m, k], leading eigenvalues; share: [m], part of ``||Q||_F^2`` they hold
    bound: [m], bound on the norm of what they leave out; converged: [m]
    rows, columns: [m], strongest pair of different input features; coefficients: [m]
    and_gate: [m], ``c / (c + |Q_bb| + |Q_cc|)`` of that pair with c its absolute coefficient: 1 where
        neither feature does anything without the other, 1/2 for the square of a sum
    opposites: [m], the output feature whose decoder row is most opposed; cosines: [m], their cosine
    """

    features: Int[Tensor, " m"]
    norms: Float[Tensor, " m"]
    traces: Float[Tensor, " m"]
    values: Float[Tensor, "m k"]
    share: Float[Tensor, " m"]
    bound: Float[Tensor, " m"]
    converged: Bool[Tensor, " m"]
    rows: Int[Tensor, " m"]
    columns: Int[Tensor, " m"]
    coefficients: Float[Tensor, " m"]
    and_gate: Float[Tensor, " m"]
    opposites: Int[Tensor, " m"]
    cosines: Float[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.features)

    def top(self, count: int) -> FeatureSweep:
        """The first `count` features."""
        _checks.require_count("count", count, len(self), "the features held")
        return FeatureSweep(**{name: value[:count] for name, value in vars(self).items()})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature, sortable."""
        import pandas as pd

        columns = {"feature": self.features, "norm": self.norms, "trace": self.traces}
        for rank in range(self.values.shape[1]):
            columns[f"value_{rank + 1}"] = self.values[:, rank]
        columns |= {
            "share": self.share,
            "pair_b": self.rows,
            "pair_c": self.columns,
            "coefficient": self.coefficients,
            "and_gate": self.and_gate,
            "opposite": self.opposites,
            "opposite_cosine": self.cosines,
            "converged": self.converged,
        }
        return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def semicircle(radius: float, count: int) -> Tensor:
    """Expected eigenvalues of a random symmetric matrix, falling: quantiles of Wigner's law [count]."""
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    below = 0.5 + (x * (1 - x.square()).clamp_min(0).sqrt() + x.asin()) / math.pi
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    place = torch.searchsorted(below, wanted).clamp(1, len(x) - 1)
    low, high = below[place - 1], below[place]
    share = (wanted - low) / (high - low)
    return (radius * (x[place - 1] + share * (x[place] - x[place - 1]))).flip(0)
