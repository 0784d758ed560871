"""Pairs of input features, checked by intervention.

Removing features b and c from the activation at the input dictionary's hook, one at a time and together,
with the token's norm scale held, changes an output feature's pre-activation by

    ``p(r) - p(r - b) - p(r - c) + p(r - b - c) = 2 z_b z_c d_b^T Q d_c / s^2``:

all that is not their interaction drops out. The left side is measured by running the model four times,
the right side comes from weights. Random directions of the same lengths, put in the features' place at
the same tokens, say how large such an effect is by chance.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.features.labels import Named
from tl_bilinear.features.passage import fires_as

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.run import FeatureRun


@dataclass(frozen=True, eq=False)
class PairCheck(Named):
    """Predicted and measured effects of pairs of input features on an output feature.

    Attributes
    ----------
    feature: the output feature
    first, second: [m], pairs of different input features
    tokens: [m], on how many tokens both were active; where it is 0, the rest of the row is NaN
    predicted, measured: [m], mean effect of the pair on those tokens
    difference: [m], largest ``|predicted - measured|`` on one token, over the largest absolute
        prediction on any token of any pair
    control: [m], mean absolute effect of random directions in their place
    """

    feature: int
    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    tokens: Int[Tensor, " m"]
    predicted: Float[Tensor, " m"]
    measured: Float[Tensor, " m"]
    difference: Float[Tensor, " m"]
    control: Float[Tensor, " m"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair."""
        names = ("first", "second", "tokens", "predicted", "measured", "difference", "control")
        return self.table({name: getattr(self, name) for name in names})


@torch.no_grad()
def check_pairs(
    run: FeatureRun,
    feature: int,
    pairs: Iterable[tuple[int, int]],
    *,
    limit: int,
    seed: int,
    progress: bool,
) -> PairCheck:
    """Predict and measure each pair on at most `limit` tokens of a run where both are active."""
    features = run.features
    pairs = list(pairs)
    z = run.activations(side="input")
    Q = features.interaction(feature, basis="activations")
    generator = torch.Generator().manual_seed(seed)
    predictions: list[Tensor] = []
    measurements: list[Tensor] = []
    controls: list[Tensor] = []
    for one, other in tqdm(pairs, unit="pair", disable=not progress):
        where = ((z[..., one] != 0) & (z[..., other] != 0) & run.mask).nonzero()[:limit]
        if len(where) == 0:
            for held in (predictions, measurements, controls):
                held.append(z.new_zeros(0))
            continue
        # Only the sequences met run again, as far as they matter.
        used, place = where[:, 0].unique(return_inverse=True)
        part, at = run[used, : int(where[:, 1].max()) + 1], (place, where[:, 1])
        rows = [
            z[used][at][:, each, None] * features.input_directions[each].to(z)
            for each in (one, other)
        ]
        factor = part.output_scale[at] / part.scale[at][:, 0].square()
        across = (rows[0] * Q.apply(rows[1].to(Q.dtype))).sum(-1)
        predictions.append(2 * factor * across)
        measurements.append(_measured(part, feature, at, *rows))
        controls.append(_measured(part, feature, at, *(_of_length(r, generator) for r in rows)))
    largest = max((float(p.abs().max()) for p in predictions if len(p)), default=1.0) or 1.0

    def column(values: Iterable[Tensor]) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    gaps = zip(predictions, measurements, strict=True)
    met = [one for pair in pairs for one in pair]
    return PairCheck(
        feature=feature,
        first=torch.tensor(met[::2], dtype=torch.long),
        second=torch.tensor(met[1::2], dtype=torch.long),
        tokens=torch.tensor([len(p) for p in predictions], dtype=torch.long),
        predicted=column(p.mean() for p in predictions),
        measured=column(m.mean() for m in measurements),
        difference=column(
            (p - m).abs().max() / largest if len(p) else torch.tensor(torch.nan) for p, m in gaps
        ),
        control=column(c.abs().mean() for c in controls),
        input_labels=features.inputs.labels_of(met),
        output_labels=features.outputs.labels_of([feature]),
    )


def _of_length(rows: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    return drawn * (rows.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def _measured(
    run: FeatureRun, feature: int, at: tuple[Tensor, Tensor], first: Tensor, second: Tensor
) -> Tensor:
    """The second difference of the pre-activation, from four runs of the model [tokens]."""
    direction = run.features.directions[feature]
    total = first.new_zeros(len(first))
    for sign, removed in ((1, None), (-1, first), (-1, second), (1, first + second)):
        along = _output_without(run, at, removed)[at].to(direction) @ direction
        # The output dictionary's own normalisation is held as well.
        total = total + sign * run.output_scale[at] * along
    return total


def _output_without(
    run: FeatureRun, at: tuple[Tensor, Tensor], removed: Tensor | None
) -> Float[Tensor, "batch pos d"]:
    """The layer's output in a run with vectors [n, d] taken from the activations at n tokens.

    `at` is (sequences [n], positions [n]); every token's norm scale is held at that of `run`.
    """
    features = run.features
    passage, model = features.passage, features.model

    def take(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[at] = value[at] - (0 if removed is None else removed.to(value))
        return value

    hooks: list[Any] = [(passage.hook, take)]
    if passage.scale_hook is not None:
        hooks.append((passage.scale_hook, lambda value, hook: run.scale.to(value)))
    held: list[Tensor] = []
    hooks.append((features.output_hook, lambda value, hook: held.append(value)))
    model.run_with_hooks(
        run.tokens,
        # Predicates find what names do not: a hook of SAELens's bridge that once held an SAE.
        fwd_hooks=[(partial(operator.eq, fires_as(model, name)), hook) for name, hook in hooks],
        return_type=None,
        stop_at_layer=features.layer + 1,
    )
    return held[0]
