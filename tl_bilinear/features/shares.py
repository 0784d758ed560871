"""What each input feature contributes to an output feature at a token: exact Shapley values.

Players are the input features and, as one, everything that is no feature (the dictionary's biases and
error). Beside a baseline, all absent or a population, their values sum to the difference of the two
pre-activations (`tl_bilinear.tensor.baselines`). Nothing is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.labels import Named
from tl_bilinear.tensor import InputMoments, shapley

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.run import FeatureRun


@dataclass(frozen=True, eq=False)
class FeatureShapley(Named):
    """Shapley values of input features for one pre-activation.

    Attributes
    ----------
    feature: the output feature; position: the token's
    features: [m], input features whose value is not zero, largest first; values: [m]
    rest: the value of what is no feature, 0 where the baseline keeps it
    output, baseline_output: pre-activations of the token and (mean) of the baseline
    baseline: in words
    """

    feature: int
    position: int
    features: Int[Tensor, " m"]
    values: Float[Tensor, " m"]
    rest: float
    output: float
    baseline_output: float
    baseline: str

    @property
    def error(self) -> float:
        """``|sum of values - (output - baseline_output)|``: rounding."""
        return abs(float(self.values.sum()) + self.rest - (self.output - self.baseline_output))

    def to_pandas(self) -> pandas.DataFrame:
        """One row an input feature."""
        columns = {"first": self.features, "value": self.values}
        table = self.table(columns, inputs=("first",))
        names = {"first": "input_feature", "label_first": "label"}
        return table.rename(columns=names)


@torch.no_grad()
def feature_shapley(
    run: FeatureRun,
    feature: int,
    position: int,
    sequence: int,
    chosen: Tensor | None,
    population: str,
    max_bytes: int,
) -> FeatureShapley:
    """See `FeatureRun.shapley`. chosen: [batch, pos], the background; None for absent features."""
    known = run.features
    plain = run.attribute(feature, position, sequence)
    here = torch.zeros_like(run.mask)
    here[sequence, plain.position] = True
    one = next(part for part in replace(run, mask=here).read() if len(part.coefficients))
    n, d = known.input_directions.shape
    double = torch.double
    checks.require_affordable(
        "the background's moments", 2 * (n + d) ** 2, double, max_bytes, "use a point as baseline"
    )
    # Players: activations of the features, then the coordinates of what is no feature.
    players = torch.cat([known.input_directions, torch.eye(d).to(known.input_directions)])
    layer = known.hook_tensor.project(known.directions[feature][None]).fold(players)
    x = torch.cat([one.coefficients, one.rest], 1)[0]
    background: InputMoments | Tensor
    if chosen is None:
        background, name = torch.cat([torch.zeros(n).to(x), x[n:]]).double(), "no feature active"
    else:
        parts = [
            InputMoments.of(torch.cat([part.coefficients, part.rest], 1), population=population)
            for part in run.read(chosen)
            if len(part.coefficients)
        ]
        if not parts:
            raise ValueError(f"there are no {population} in this text: give more text")
        background, name = InputMoments.merged(parts), population
    found = shapley(layer.to(double), x.double(), background)
    gain = float(one.gain[0])
    values = gain * found.values[0]
    met = values[:n].nonzero()[:, 0]
    met = met[values[met].abs().argsort(descending=True, stable=True)]
    constant = plain.measured - gain * float(found.output[0])
    return FeatureShapley(
        feature=feature,
        position=plain.position,
        features=met,
        values=values[met],
        rest=float(values[n:].sum()),
        output=plain.measured,
        baseline_output=gain * float(found.baseline_output[0]) + constant,
        baseline=name,
        input_labels=known.inputs.labels_of(met),
        output_labels=plain.output_labels,
    )
