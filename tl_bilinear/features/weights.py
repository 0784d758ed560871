"""What `FeatureInteractions` computes from weights alone; documented on its methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.features.results import (
    EigenGeometry,
    FeatureSweep,
    InteractionStatistics,
    Submatrix,
    semicircle,
)
from tl_bilinear.tensor import Eigendecomposition, TopInteractions
from tl_bilinear.tensor._sweeps import Rows, sweep
from tl_bilinear.tensor._top import BLOCK_ELEMENTS, DirectionEntries
from tl_bilinear.tensor.storage import digest_of

if TYPE_CHECKING:
    from tl_bilinear.features.interactions import FeatureInteractions

_PAIRS_PER_BATCH = 16


def submatrix(self: FeatureInteractions, feature: int, k: int) -> Submatrix:
    pairs = self.top(feature, k)
    met = torch.cat([pairs.rows, pairs.columns[~pairs.is_self]])
    features, counts = met.unique(return_counts=True)
    features = features[counts.argsort(descending=True, stable=True)]
    rows = self.input_directions[features]
    matrix = self.interaction(feature, basis="activations").fold(rows).dense()
    return Submatrix(feature, features, matrix, [self.inputs.label(int(i)) for i in features])


def statistics(
    self: FeatureInteractions, feature: int, bins: int, sigmas: float, progress: bool
) -> InteractionStatistics:
    Q = self.interaction(feature, basis="activations")
    directions = self.input_directions
    n = len(directions)
    if n < 3:
        raise ValueError(
            f"statistics of cross-interactions need at least 3 input features, got {n}"
        )
    largest = float(Q.top(1, kind="cross", directions=directions).values.abs().max())
    # A little more: blocks round, and the largest entry belongs into the last bin.
    largest = (largest or torch.finfo(Q.dtype).tiny) * (1 + 1e-4)
    edges = torch.linspace(-largest, largest, bins + 1)
    entries = DirectionEntries(Q, directions)
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
    step = max(1, BLOCK_ELEMENTS // n)
    for start in tqdm(range(0, n, step), unit="block", disable=not progress):
        block = entries.block(slice(start, min(start + step, n)), slice(start, n))
        values = block[torch.ones_like(block, dtype=torch.bool).triu_(1)]
        counts += torch.histc(values, bins, -largest, largest).double().cpu()
        away = (values - mean).abs_()
        outliers += (away > sigmas * std).sum()
        fourth += away.square_().square_().sum(dtype=torch.float64)
    eigenvalues = Q.eigh().values.sort(descending=True).values
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


def geometry(
    self: FeatureInteractions,
    feature: int,
    k: int,
    spectrum: Eigendecomposition | None,
    extra: Mapping[str, Tensor],
    clusters: int,
) -> EigenGeometry:
    if spectrum is None:
        Q = self.interaction(feature, basis="activations")
        ends = [Q.eigh(1, which=end) for end in ("positive", "negative")]
        values = torch.cat([end.values for end in ends])
        vectors = torch.cat([end.vectors for end in ends])
    else:
        values, vectors = spectrum.values, spectrum.vectors
    among = submatrix(self, feature, k)
    names = list(among.labels) + list(extra)
    rows = [self.input_directions[among.features]]
    for name, row in extra.items():
        if row.shape != vectors.shape[-1:]:
            raise ValueError(
                f"{name!r} must have shape [{vectors.shape[-1]}] (activations at {self.passage.hook}), "
                f"got {list(row.shape)}"
            )
        rows.append(row.to(vectors)[None])
    directions = torch.cat(rows)
    unit = directions / directions.norm(dim=-1, keepdim=True).clamp_min(
        torch.finfo(directions.dtype).tiny
    )
    cosines = unit @ vectors.T
    return EigenGeometry(feature, names, values, cosines, _clusters(cosines, clusters))


def _clusters(cosines: Tensor, count: int) -> Tensor:
    """Groups of rows that point alike, from 1, by average linkage on their directions."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(cosines) < 2:
        return torch.ones(len(cosines), dtype=torch.long)
    rows = cosines.double().cpu().numpy()
    tree = linkage(rows, "average")
    return torch.from_numpy(fcluster(tree, count, "maxclust")).long()


def feature_sweep(
    self: FeatureInteractions,
    features: Tensor,
    k: int,
    screen: int | None,
    checkpoint: str | Path | None,
    max_bytes: int,
    progress: bool,
) -> FeatureSweep:
    folder = None if checkpoint is None else Path(checkpoint)
    found = self.tensor.spectrum(
        self.directions[features],
        k,
        screen=screen,
        max_bytes=max_bytes,
        checkpoint=None if folder is None else folder / "spectra",
        progress=progress,
    )
    index = features[found.index]

    def work(rows: slice) -> Rows:
        pairs = self.top(index[rows], 1, kind="cross")
        return {"rows": pairs.rows, "columns": pairs.columns, "values": pairs.values}

    weights: dict[str, Tensor | None] = {
        "left": self.tensor.left,
        "right": self.tensor.right,
        "out": self.tensor.out,
        "directions": self.directions,
        "inputs": self.input_directions,
        "index": index,
    }
    pairs = sweep(
        work,
        len(index),
        _PAIRS_PER_BATCH,
        checkpoint=None if folder is None else folder / "pairs",
        identity=lambda: digest_of(weights, {"what": "strongest pairs"}),
        progress=progress,
        unit="feature",
        describe="strongest pairs",
    )
    rows, columns, values = (
        pairs[name].reshape(len(index)).to(index.device) for name in ("rows", "columns", "values")
    )
    single = self.tensor.interaction(self.directions[index])
    own = torch.stack(
        [
            matrix.entries(self.input_directions[torch.stack([b, c])]).abs().sum()
            for matrix, b, c in zip(single, rows, columns, strict=True)
        ]
        or [values.new_zeros(())]
    )[: len(index)]
    coefficients = 2 * values
    size = coefficients.abs()
    opposites, cosines = most_opposed(self.outputs.decoder, index)
    return FeatureSweep(
        features=index,
        norms=found.norms[found.index],
        traces=found.traces[found.index],
        values=found.values,
        share=found.share,
        bound=found.bound,
        converged=found.converged,
        rows=rows,
        columns=columns,
        coefficients=coefficients,
        and_gate=size / (size + own).clamp_min(torch.finfo(size.dtype).tiny),
        opposites=opposites,
        cosines=cosines,
    )


def most_opposed(decoder: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """For each chosen row, the row of lowest cosine with it, and that cosine."""
    unit = decoder / decoder.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(decoder.dtype).tiny)
    step = max(1, BLOCK_ELEMENTS // max(1, len(unit)))
    lowest = [(unit[part] @ unit.T).min(1) for part in index.split(step)]
    if not lowest:
        return index, decoder.new_empty(0)
    return torch.cat([m.indices for m in lowest]), torch.cat([m.values for m in lowest])


def top_overall(self: FeatureInteractions, k: int, kind: Any) -> tuple[Tensor, TopInteractions]:
    matrices = self.interaction(basis="activations")
    which, pairs = matrices.top_of_batch(k, kind=kind, directions=self.input_directions)
    space = f"features at {self.passage.hook}"
    return which, TopInteractions(pairs.rows, pairs.columns, pairs.values, space)
