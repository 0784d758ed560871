"""Which input feature an output feature resembles: is it made by the layer, or passed on?

An output feature that is active where one input feature is, as strongly, tells nothing of the layer. The
nearest input feature is the one whose activation correlates most with its own, token by token (Pearson).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.features.labels import Named

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.run import FeatureRun


@dataclass(frozen=True, eq=False)
class NearestInputs(Named):
    """The input feature that is most like each of m output features.

    Attributes
    ----------
    features: [m], output features
    nearest: [m], input features
    correlations: [m], of the two activations; 0 where one of them never varies
    tokens: over how many tokens
    """

    features: Int[Tensor, " m"]
    nearest: Int[Tensor, " m"]
    correlations: Float[Tensor, " m"]
    tokens: int

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature: feature, nearest, correlation."""
        columns = {
            "feature": self.features,
            "nearest": self.nearest,
            "correlation": self.correlations,
        }
        return self.table(columns, inputs=("nearest",), outputs=("feature",))


class CorrelationSums:
    """Running sums of y [t, p] and z [t, n], for all their correlations."""

    def __init__(self, p: int, n: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.double, device=device)

        self.count, self.y, self.yy, self.yz = 0, zeros(p), zeros(p), zeros(p, n)
        self.z, self.zz = zeros(n), zeros(n)

    def add(self, y: Float[Tensor, "t p"], z: Float[Tensor, "t n"]) -> None:
        self.count += len(y)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.z += z.sum(0)
        self.zz += z.square().sum(0)
        self.yz += y.T @ z

    def correlations(self) -> Float[Tensor, "p n"]:
        """0 where one of the two does not vary."""
        covariance = self.count * self.yz - torch.outer(self.y, self.z)
        of_y, of_z = (
            (self.count * squares - total.square()).clamp_min(0).sqrt()
            for total, squares in ((self.y, self.yy), (self.z, self.zz))
        )
        found = covariance / torch.outer(of_y, of_z)
        return found.where(found.isfinite(), 0.0).clamp(-1, 1)


@torch.no_grad()
def nearest_inputs(run: FeatureRun, index: Int[Tensor, " m"], *, progress: bool) -> NearestInputs:
    """See `FeatureRun.nearest_inputs`."""
    known = run.features
    sums = CorrelationSums(len(index), known.inputs.n, run.x.device)
    with tqdm(total=len(run), unit="sequence", disable=not progress) as bar:
        for part in run.read():
            some = part.run
            sums.add(some.activations(index)[some.mask].double(), part.coefficients.double())
            bar.update(len(some))
    best = sums.correlations().max(1)
    return NearestInputs(
        index,
        best.indices,
        best.values.to(run.x),
        sums.count,
        input_labels=known.inputs.labels_of(best.indices.unique()),
        output_labels=known.outputs.labels_of(index),
    )
