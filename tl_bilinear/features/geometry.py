"""The input features of an output feature's strongest pairs: their interactions, and their geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.labels import Named

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Submatrix(Named):
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
class EigenGeometry(Named):
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


def eigen_geometry(
    among: Submatrix,
    directions: Float[Tensor, "m d"],
    values: Float[Tensor, " k"],
    vectors: Float[Tensor, "k d"],
    extra: Mapping[str, Tensor],
    *,
    clusters: int,
    hook: str,
) -> EigenGeometry:
    """Cosines of the features in `among`, written along `directions`, and of `extra` with eigenvectors.

    values, vectors: the eigenvalues and eigenvectors; hook: where the directions are, for errors

    Raises ValueError for an extra direction that is not [d].
    """
    checks.require_positive("clusters", clusters)
    rows = [directions]
    for name, row in extra.items():
        if row.shape != vectors.shape[-1:]:
            raise ValueError(
                f"{name!r} must have shape [{vectors.shape[-1]}] (activations at {hook}), "
                f"got {list(row.shape)}"
            )
        rows.append(row.to(vectors)[None])
    cosines = unit(torch.cat(rows)) @ vectors.T
    return EigenGeometry(
        among.feature,
        [*among.labels, *extra],
        values,
        cosines,
        _clusters(cosines, clusters),
        output_labels=among.output_labels,
    )


def unit(rows: Float[Tensor, "*m d"]) -> Float[Tensor, "*m d"]:
    """Rows scaled to length 1; zero rows stay zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _clusters(cosines: Tensor, count: int) -> Tensor:
    """Groups of rows that point alike, from 1, by average linkage on their directions."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(cosines) < 2:
        return torch.ones(len(cosines), dtype=torch.long)
    rows = cosines.double().cpu().numpy()
    tree = linkage(rows, "average")
    return torch.from_numpy(fcluster(tree, count, "maxclust")).long()
