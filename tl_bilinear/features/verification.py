"""Pairs of input features, checked by intervention.

Removing features b and c from the activation at the input dictionary's hook, one at a time and together,
with the token's norm scale held, changes an output feature's pre-activation by

    ``p(r) - p(r - b) - p(r - c) + p(r - b - c) = 2 z_b z_c d_b^T Q d_c / s^2``:

all that is not their interaction drops out. The left side is measured by running the model four times
from that hook on, the right side comes from weights. Random directions of the same lengths, put in the
features' place at the same tokens, say how large such an effect is by chance.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.labels import Named
from tl_bilinear.features.passage import fires_as
from tl_bilinear.hooks.effects import starts_at_blocks

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
    generator = checks.generator(seed)
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
        drawn = [_of_length(r, generator) for r in rows]
        changes = _measured(part, feature, at, torch.stack([torch.stack(rows), torch.stack(drawn)]))
        predictions.append(2 * factor * across)
        measurements.append(changes[0])
        controls.append(changes[1])
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
    run: FeatureRun, feature: int, at: tuple[Tensor, Tensor], pairs: Float[Tensor, "m 2 n d"]
) -> Float[Tensor, "m n"]:
    """The second difference of the pre-activation at n tokens for m pairs, from four runs each."""
    first, second = pairs.unbind(1)
    removed = torch.stack([torch.zeros_like(first), first, second, first + second])
    outputs = _outputs_without(run, at, removed.flatten(0, 1)).unflatten(0, removed.shape[:2])
    direction = run.features.directions[feature]
    # The output dictionary's own normalisation is held as well.
    along = run.output_scale[at] * (outputs.to(direction) @ direction)
    return along[0] - along[1] - along[2] + along[3]


def _outputs_without(
    run: FeatureRun, at: tuple[Tensor, Tensor], removed: Float[Tensor, "runs n d"]
) -> Float[Tensor, "runs n d"]:
    """The layer's output at n tokens in runs with vectors taken from the activations there.

    `at` is (sequences [n], positions [n]); every token's norm scale is held at that of `run`. After
    attention a block reads each token by itself: where a forward can start at a block, it gets these
    tokens only, and all runs at once.
    """
    if starts_at_blocks(run.features.model):
        given = (run.hook_activations[at] - removed.to(run.hook_activations)).flatten(0, 1)[:, None]
        scale = run.scale[at].repeat(len(removed), 1)[:, None]
        found = _output(run, given, scale, lambda value: given, start_at_layer=run.features.layer)
        return found[:, 0].unflatten(0, removed.shape[:2])

    def less(vectors: Tensor) -> Callable[[Tensor], Tensor]:
        def take(value: Tensor) -> Tensor:
            value = value.clone()
            value[at] = value[at] - vectors.to(value)
            return value

        return take

    return torch.stack(
        [_output(run, run.tokens, run.scale, less(vectors))[at] for vectors in removed]
    )


def _output(
    run: FeatureRun, given: Tensor, scale: Tensor, edit: Callable[[Tensor], Tensor], **options: Any
) -> Tensor:
    """The layer's output where the activations are edited and the norm's scale is held."""
    features = run.features
    passage, model = features.passage, features.model
    held: list[Tensor] = []
    hooks: list[Any] = [(passage.hook, lambda value, hook: edit(value).to(value))]
    if passage.scale_hook is not None:
        hooks.append((passage.scale_hook, lambda value, hook: scale.to(value)))
    hooks.append((features.output_hook, lambda value, hook: held.append(value)))
    model.run_with_hooks(
        given,
        # Predicates find what names do not: a hook of SAELens's bridge that once held an SAE.
        fwd_hooks=[(partial(operator.eq, fires_as(model, name)), hook) for name, hook in hooks],
        return_type=None,
        stop_at_layer=features.layer + 1,
        **options,
    )
    return held[0]
