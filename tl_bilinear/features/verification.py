"""Pairs of input features, checked by intervention.

Removing features b and c from the activation at the input dictionary's hook, one at a time and together,
with the token's norm scale held, changes an output feature's pre-activation by

    ``p(r) - p(r - b) - p(r - c) + p(r - b - c) = 2 z_b z_c d_b^T Q d_c / s^2``:

all that is not their interaction drops out. The left side is measured by running the model four times,
the right side comes from weights. Random directions of the same lengths, put in the features' place at
the same tokens, say how large such an effect is by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.features.text import with_labels
from tl_bilinear.tensor.storage import Storable

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.activity import ActiveInteractions
    from tl_bilinear.features.interactions import FeatureInteractions
    from tl_bilinear.features.running import Run
    from tl_bilinear.tensor import TopInteractions


@dataclass(frozen=True, eq=False)
class PairCheck(Storable):
    """Predicted and measured effects of pairs of input features on an output feature.

    Attributes
    ----------
    feature: the output feature
    rows, columns: [m], pairs of different input features
    tokens: [m], on how many tokens both were active; 0 leaves the rest of the row NaN
    predicted, measured: [m], mean effect of the pair on those tokens
    difference: [m], largest ``|predicted - measured|`` on one token, over the largest absolute
        prediction on any token of any pair
    control: [m], mean absolute effect of random directions in their place
    """

    feature: int
    rows: Int[Tensor, " m"]
    columns: Int[Tensor, " m"]
    tokens: Int[Tensor, " m"]
    predicted: Float[Tensor, " m"]
    measured: Float[Tensor, " m"]
    difference: Float[Tensor, " m"]
    control: Float[Tensor, " m"]

    def to_pandas(self, labels: Sequence[str] | None = None) -> pandas.DataFrame:
        """One row a pair; `labels`, a name for each input feature, adds label_b and label_c."""
        import pandas as pd

        names = ("rows", "columns", "tokens", "predicted", "measured", "difference", "control")
        found = {name: getattr(self, name).cpu().numpy() for name in names}
        table = pd.DataFrame(found).rename(columns={"rows": "b", "columns": "c"})
        return with_labels(table, labels)


@torch.no_grad()
def verify_pairs(
    self: FeatureInteractions,
    text: Any,
    feature: int,
    pairs: TopInteractions | ActiveInteractions,
    skip: int,
    limit: int,
    seed: int,
) -> PairCheck:
    """See :meth:`FeatureInteractions.verify_pairs`."""
    feature = int(self._features(feature))
    run = self.run(text)
    z = self.inputs.read(run.activations, run.source).coefficients
    different = pairs.rows != pairs.columns
    b, c = pairs.rows[different], pairs.columns[different]
    form = self.interaction(feature, basis="activations")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one, other in zip(b.tolist(), c.tolist(), strict=True):
        both = (z[..., one] != 0) & (z[..., other] != 0)
        both[:, :skip] = False
        where = both.nonzero()[:limit]
        if len(where) == 0:
            found.append((0, [torch.nan] * 2, z.new_zeros(0), z.new_zeros(0), torch.nan))
            continue
        # Only the sequences met run again, as far as they matter.
        used, place = where[:, 0].unique(return_inverse=True)
        part, at = run[used, : int(where[:, 1].max()) + 1], (place, where[:, 1])
        active = z[used][at]
        first = active[:, one, None] * self.input_directions[one].to(z)
        second = active[:, other, None] * self.input_directions[other].to(z)
        factor = part.output_scale[at] / part.scale[at][:, 0].square()
        predicted = 2 * factor * (first * form.apply(second.to(form.dtype))).sum(-1)
        measured = _measured(self, part, feature, at, first, second)
        random = [_of_length(part, generator) for part in (first, second)]
        control = _measured(self, part, feature, at, random[0], random[1])
        found.append(
            (
                len(where),
                [float(predicted.mean()), float(measured.mean())],
                predicted,
                measured,
                float(control.abs().mean()),
            )
        )
    every = [predicted.abs().max() for _, _, predicted, _, _ in found if len(predicted)]
    largest = float(torch.stack(every).max()) if every else 1.0
    differences = [
        float((predicted - measured).abs().max()) / (largest or 1.0)
        if len(predicted)
        else torch.nan
        for _, _, predicted, measured, _ in found
    ]
    return PairCheck(
        feature=feature,
        rows=b,
        columns=c,
        tokens=torch.tensor([entry[0] for entry in found], dtype=torch.long),
        predicted=torch.tensor([entry[1][0] for entry in found], dtype=torch.float64),
        measured=torch.tensor([entry[1][1] for entry in found], dtype=torch.float64),
        difference=torch.tensor(differences, dtype=torch.float64),
        control=torch.tensor([entry[4] for entry in found], dtype=torch.float64),
    )


def _of_length(rows: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    return drawn * (rows.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def _measured(
    self: FeatureInteractions,
    run: Run,
    feature: int,
    at: tuple[Tensor, Tensor],
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """The second difference of the pre-activation, from four runs of the model [tokens]."""
    total = first.new_zeros(len(first))
    for sign, removed in ((1, None), (-1, first), (-1, second), (1, first + second)):
        output = self.output_without(run, at, removed)
        # The output dictionary's own normalisation is held as well.
        along = output[at].to(self.directions) @ self.directions[feature]
        total = total + sign * run.output_scale[at] * along
    return total
