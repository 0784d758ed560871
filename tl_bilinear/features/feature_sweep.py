"""A table of output features: eigenvalues, strongest pair, AND-gate score, opposite; from weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.geometry import unit
from tl_bilinear.features.labels import Named
from tl_bilinear.io import digest_of
from tl_bilinear.tensor import BilinearTensor, spectrum, top
from tl_bilinear.tensor.batching import Rows, sweep
from tl_bilinear.tensor.estimates import worth_saying
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import pandas

_PAIRS_PER_BATCH = 16


@dataclass(frozen=True, eq=False)
class FeatureSweep(Named):
    """A table of output features, ordered by falling |lambda_1|.

    Attributes
    ----------
    features: [m], output features
    norms, traces: [m], ``||Q||_F`` and ``tr Q`` in the basis of activations
    values: [m, k], leading eigenvalues; share: [m], part of ``||Q||_F^2`` they hold
    bound: [m], bound on the norm of what they leave out; converged: [m]
    first, second: [m], strongest pair of different input features; coefficients: [m]
    and_gate: [m], ``c / (c + |Q_bb| + |Q_cc|)`` of that pair (b, c) with c its absolute coefficient: 1
        where neither feature does anything without the other, 1/2 for the square of a sum
    opposites: [m], the output feature whose decoder row is most opposed; cosines: [m], their cosine
    """

    features: Int[Tensor, " m"]
    norms: Float[Tensor, " m"]
    traces: Float[Tensor, " m"]
    values: Float[Tensor, "m k"]
    share: Float[Tensor, " m"]
    bound: Float[Tensor, " m"]
    converged: Bool[Tensor, " m"]
    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    coefficients: Float[Tensor, " m"]
    and_gate: Float[Tensor, " m"]
    opposites: Int[Tensor, " m"]
    cosines: Float[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.features)

    def top(self, k: int) -> FeatureSweep:
        """The first k features."""
        checks.require_count("k", k, len(self), "the features held")
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: Any = {
            name: value[:k] for name, value in held.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature, sortable."""
        columns = {"feature": self.features, "norm": self.norms, "trace": self.traces}
        for rank in range(self.values.shape[1]):
            columns[f"value_{rank + 1}"] = self.values[:, rank]
        columns |= {
            "share": self.share,
            "first": self.first,
            "second": self.second,
            "coefficient": self.coefficients,
            "and_gate": self.and_gate,
            "opposite": self.opposites,
            "opposite_cosine": self.cosines,
            "converged": self.converged,
        }
        return self.table(columns, outputs=("feature", "opposite"))


def feature_sweep(
    tensor: BilinearTensor,
    directions: Float[Tensor, "n_out d"],
    input_directions: Float[Tensor, "n_in d"],
    decoder: Float[Tensor, "n_out e"],
    features: Int[Tensor, " m"],
    k: int,
    *,
    screen: int | None,
    checkpoint: str | Path | None,
    max_bytes: int,
    progress: bool,
) -> FeatureSweep:
    """The table of chosen output features: rows of `directions` (read) and `decoder` (written)."""
    folder = None if checkpoint is None else Path(checkpoint)
    found = spectrum(
        tensor,
        directions[features],
        k,
        screen=screen,
        max_bytes=max_bytes,
        checkpoint=None if folder is None else folder / "spectra",
        progress=progress,
    )
    index = features[found.index]
    matrices = tensor.interaction(directions[index])

    def work(rows: slice) -> Rows:
        pairs = matrices[rows].top(1, kind="cross", directions=input_directions)
        return {"first": pairs.first, "second": pairs.second, "values": pairs.values}

    weights: dict[str, Tensor | None] = {
        "left": tensor.left,
        "right": tensor.right,
        "out": tensor.out,
        "directions": directions,
        "inputs": input_directions,
        "index": index,
    }
    describe = "strongest pairs"
    if progress:
        one = top.flops(tensor.d_in, tensor.d_hidden, len(input_directions))
        if said := worth_saying(len(index) * one, tensor.device, tensor.dtype):
            describe += f", at most about {said}"
    pairs = sweep(
        work,
        len(index),
        _PAIRS_PER_BATCH,
        checkpoint=None if folder is None else folder / "pairs",
        identity=lambda: digest_of(weights, {"what": "strongest pairs"}),
        progress=progress,
        unit="feature",
        describe=describe,
    )
    first, second, values = (
        pairs[name].reshape(len(index)).to(index.device) for name in ("first", "second", "values")
    )
    own = values.new_zeros(len(index))
    for row, (matrix, b, c) in enumerate(zip(matrices, first, second, strict=True)):
        own[row] = matrix.entries(input_directions[torch.stack([b, c])]).abs().sum()
    coefficients = 2 * values
    size = coefficients.abs()
    opposites, cosines = _most_opposed(decoder, index)
    return FeatureSweep(
        features=index,
        norms=found.norms[found.index],
        traces=found.traces[found.index],
        values=found.values,
        share=found.share,
        bound=found.bound,
        converged=found.converged,
        first=first,
        second=second,
        coefficients=coefficients,
        and_gate=size / (size + own).clamp_min(torch.finfo(size.dtype).tiny),
        opposites=opposites,
        cosines=cosines,
    )


def _most_opposed(decoder: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """For each chosen row, the row of lowest cosine with it, and that cosine."""
    rows = unit(decoder)
    step = max(1, BLOCK_ELEMENTS // max(1, len(rows)))
    lowest = [(rows[part] @ rows.T).min(1) for part in index.split(step)]
    if not lowest:
        return index, decoder.new_empty(0)
    return torch.cat([m.indices for m in lowest]), torch.cat([m.values for m in lowest])
