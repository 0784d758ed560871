"""Populations of tokens, and the moments of what a layer reads on them.

`FeatureRun.moments` takes them from activations that are held, `FeatureInteractions.moments` from a text
of any length (`tl_bilinear.features.streaming`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.hooks.points import LayerPoints
from tl_bilinear.tensor import InputMoments

if TYPE_CHECKING:
    from tl_bilinear.features.interactions import FeatureInteractions


class MomentSums:
    """Running sums of m populations of inputs [d], in float64."""

    def __init__(self, m: int, d: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(m, dtype=torch.long, device=device)
        self.sum = torch.zeros(m, d, dtype=torch.double, device=device)
        self.squares = torch.zeros(m, d, d, dtype=torch.double, device=device)

    def add(self, number: int, x: Float[Tensor, "n d"]) -> None:
        rows = x.double()
        self.count[number] += len(rows)
        self.sum[number] += rows.sum(0)
        self.squares[number] += rows.T @ rows

    def moments(self, names: list[str], space: str | None) -> list[InputMoments]:
        """Raises ValueError for a population without tokens."""
        for name, count in zip(names, self.count.tolist(), strict=True):
            if not count:
                raise ValueError(f"there are no {name} in this text: give more text")
        n = self.count[:, None]
        means, seconds = self.sum / n, self.squares / n[..., None]
        parts = zip(self.count.tolist(), means, seconds, names, strict=True)
        return [
            InputMoments(count, mean, second, name, space) for count, mean, second, name in parts
        ]


@torch.no_grad()
def layer_moments(
    model: Any,
    layers: Iterable[int],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    batch_size: int = 16,
    population: str = "tokens",
    progress: bool = False,
) -> list[InputMoments]:
    """The moments of what several layers read, in one pass over a text, without any dictionary.

    `mask` says which tokens count, by default all but the first of a row. Memory: d x d float64 numbers
    for each layer. Raises what `LayerPoints.of` does for a model without hooks.
    """
    points = [LayerPoints.of(model, layer) for layer in layers]
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
    mask = checks.require_mask(mask, tokens.shape)
    sums = MomentSums(len(points), model.cfg.d_model, tokens.device)
    last = 1 + max((point.layer for point in points), default=0)
    with tqdm(total=len(tokens), unit="sequence", disable=not progress) as bar:
        for rows, counted in zip(tokens.split(batch_size), mask.split(batch_size), strict=True):
            _, cache = model.run_with_cache(
                rows,
                names_filter=lambda name: any(point.reads(name) for point in points),
                return_type=None,
                stop_at_layer=last,
            )
            for number, point in enumerate(points):
                sums.add(number, next(cache[name] for name in cache if point.reads(name))[counted])
            bar.update(len(rows))
    names = [population] * len(points)
    return [
        replace(found, space=point.input_space)
        for found, point in zip(sums.moments(names, None), points, strict=True)
    ]


def population_names(features: FeatureInteractions, index: Int[Tensor, " m"] | None) -> list[str]:
    """What tables call the tokens that count, or those where each of some features is active."""
    if index is None:
        return ["tokens"]
    return [f"tokens where output feature {number} is active" for number in index.tolist()]
