"""All interactions of one output feature, as distributions (Fig. 24)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.labels import Named
from tl_bilinear.tensor import InteractionMatrix
from tl_bilinear.tensor.eigendecomposition import participation
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class InteractionStatistics(Named):
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
    def cross_shares(self) -> Float[Tensor, " bins"]:
        """Share of the entries off the diagonal that lie in each bin."""
        return self.counts / self.counts.sum().clamp_min(1)

    @property
    def self_shares(self) -> Float[Tensor, " bins"]:
        """Share of the diagonal entries within the edges that lie in each bin."""
        counts = torch.histogram(self.self_values.cpu().float(), self.edges.cpu().float()).hist
        return counts / counts.sum().clamp_min(1)

    @property
    def effective_rank(self) -> float:
        """``(L1 / L2)^2`` of the eigenvalues (appendix D)."""
        return float(participation(self.eigenvalues))

    @property
    def outlying_eigenvalues(self) -> Float[Tensor, " m"]:
        """Eigenvalues beyond the edge of the random reference, by falling magnitude."""
        beyond = self.eigenvalues[self.eigenvalues.abs() > self.reference[0]]
        return beyond[beyond.abs().argsort(descending=True)]

    def to_pandas(self) -> pandas.DataFrame:
        """One row: what can be said in numbers."""
        return self.table(
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
            },
            inputs=(),
            outputs=("feature",),
        )


@torch.no_grad()
def interaction_statistics(
    feature: int,
    Q: InteractionMatrix,
    directions: Float[Tensor, "n d"],
    *,
    bins: int,
    sigmas: float,
    progress: bool,
) -> InteractionStatistics:
    """The entries ``d_b^T Q d_c`` of all pairs of directions, block by block, and Q's eigenvalues.

    Raises ValueError for fewer than 3 directions.
    """
    checks.require_positive("bins", bins)
    checks.require_number("sigmas", sigmas, "is a number of standard deviations", positive=True)
    n = len(directions)
    if n < 3:
        raise ValueError(
            f"statistics of cross-interactions need at least 3 input features, got {n}"
        )
    entries = _Entries(Q, directions)
    # A little more: blocks round, and the largest entry belongs into the last bin.
    largest = (entries.largest_cross() or torch.finfo(Q.dtype).tiny) * (1 + 1e-4)
    # Mean and variance are exact before any pair is met: sum S = 1^T D Q D^T 1, sum S^2 = tr(Q G Q G).
    count = n * (n - 1) // 2
    wide = directions.double()
    exact = Q.to(torch.float64)
    own, total = exact.entries(wide), exact.quadratic(wide.sum(0))
    through = exact @ (wide.T @ wide)
    squares = (through * through.T).sum()
    mean = float(total - own.sum()) / (2 * count)
    variance = max(0.0, float(squares - own.square().sum()) / (2 * count) - mean**2)
    std = math.sqrt(variance)
    fourth = torch.zeros((), dtype=torch.float64, device=directions.device)
    outliers = fourth.clone()
    counts = torch.zeros(bins, dtype=torch.float64)
    for rows in tqdm(entries.steps, unit="block", disable=not progress):
        block = entries.block(rows, slice(rows.start, n))
        values = block[torch.ones_like(block, dtype=torch.bool).triu_(1)]
        counts += torch.histc(values, bins, -largest, largest).double().cpu()
        away = (values - mean).abs_()
        outliers += (away > sigmas * std).sum()
        fourth += away.square_().square_().sum(dtype=torch.float64)
    edges = torch.linspace(-largest, largest, bins + 1)
    eigenvalues = entries.eigenvalues.sort(descending=True).values
    edge = 2 * float(Q.frobenius_norm()) / math.sqrt(Q.d)
    return InteractionStatistics(
        feature=feature,
        self_values=own.to(Q.dtype),
        cross_mean=mean,
        cross_std=std,
        cross_kurtosis=float(fourth) / count / variance**2 - 3 if variance else 0.0,
        edges=edges,
        counts=counts.to(edges.dtype),
        outliers=int(outliers),
        expected_outliers=count * math.erfc(sigmas / math.sqrt(2)),
        sigmas=sigmas,
        eigenvalues=eigenvalues,
        reference=semicircle(edge, Q.d).to(eigenvalues),
    )


class _Entries:
    """Blocks of ``D Q D^T`` through the eigenpairs of Q, longest ``|Lambda|^1/2 V d`` first."""

    def __init__(self, Q: InteractionMatrix, directions: Tensor) -> None:
        eigen = Q.eigh()
        weighted = directions @ (eigen.vectors * eigen.values.abs().sqrt()[:, None]).T
        reach = weighted.norm(dim=1)
        order = reach.argsort(descending=True)
        self.reach, self.weighted = reach[order], weighted[order]
        self.signs, self.eigenvalues = eigen.values.sign(), eigen.values
        n = len(directions)
        step = max(1, BLOCK_ELEMENTS // n)
        self.steps = [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def block(self, rows: slice, columns: slice) -> Tensor:
        return (self.weighted[rows] * self.signs) @ self.weighted[columns].T

    def largest_cross(self) -> float:
        """The largest absolute entry off the diagonal; ``|S_ij| <= reach_i reach_j`` ends the search."""
        largest = 0.0
        for rows in self.steps:
            reached = int((self.reach[rows.start] * self.reach >= largest).sum())
            if reached <= rows.start:
                break
            block = self.block(rows, slice(rows.start, reached)).triu_(1)
            largest = max(largest, float(block.abs().max()))
        return largest


def semicircle(radius: float, count: int) -> Float[Tensor, " count"]:
    """Expected eigenvalues of a random symmetric matrix, falling: quantiles of Wigner's law."""
    from scipy.stats import semicircular

    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return radius * torch.from_numpy(semicircular.ppf(quantiles.numpy())).flip(0)
