"""Fold a norm's weight and bias into the weights that read it. No framework is imported."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def fold_norm(
    weight: Float[Tensor, "d n"],
    bias: Float[Tensor, " n"] | None,
    norm_weight: Float[Tensor, " d"],
    norm_bias: Float[Tensor, " d"] | None,
    *,
    center: bool,
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that read x itself, where the given ones read ``x * norm_weight + norm_bias``.

    ``(x * w + b) W + c = x (w[:, None] * W) + (b W + c)``. With `center` the columns of the result have
    mean zero; this changes nothing for an x of mean zero (LayerNorm's). Computed in float32 or better,
    returned in the dtypes given.
    """
    wide = widened(weight)
    folded = bias
    if norm_bias is not None:
        added = widened(norm_bias) @ wide
        folded = (added if bias is None else widened(bias) + added).to(
            weight.dtype if bias is None else bias.dtype
        )
    wide = widened(norm_weight)[:, None] * wide
    if center:
        wide = wide - wide.mean(dim=0, keepdim=True)
    return wide.to(weight.dtype), folded


def widened(values: Tensor) -> Tensor:
    """16-bit values in float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
