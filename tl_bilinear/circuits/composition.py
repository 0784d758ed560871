"""Two layers of a model composed: what the first writes for the second to read, as one quartic form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.circuits.residual import require_plain_stream
from tl_bilinear.features.passage import residual_passage, residual_tensor
from tl_bilinear.hooks.points import LayerTensor
from tl_bilinear.tensor import BilinearTensor, QuarticForm, with_residual


def composed(
    model: Any,
    first: int,
    second: int,
    direction: Float[Tensor, " d_model"],
    *,
    residual: bool = False,
    scales: tuple[float, float] = (1.0, 1.0),
    rank: int | None = None,
    layer_tensors: Mapping[int, LayerTensor] = {},
) -> QuarticForm:
    """A direction of the second layer's output through the first layer, as a function of its input.

    Parameters
    ----------
    first, second: layers, the second after the first
    direction: [d_model], read from the second layer's output
    residual: bool
        Let the second layer read what the first one read as well, beside what it wrote. What attention
        and the layers in between write is left out.
    scales: (s_first, s_second)
        The norms' scales, of a prompt say (`Paths.scale`). Without biases and residual the form holds up
        to ``1 / (s_first^4 s_second^2)`` for any.
    rank: as `QuarticForm.of`
    layer_tensors: by layer, what stands for it instead of reading it from the model (an approximation)

    Coordinates are the residual stream before the first MLP, r [d_model]; with biases (of the layers or
    their norms) or a residual connection [r, 1], a form whose `leading` directions may have any last
    coordinate: they are of the terms of degree four and the lower ones together.

    Raises ValueError for layers in another order, or a scale that is not positive.
    """
    require_plain_stream(model)
    count = len(model.blocks)
    checks.require_int("first", first)
    checks.require_int("second", second)
    if not 0 <= first < second < count:
        raise ValueError(
            f"composed layers are two of 0 to {count - 1}, the first before the second, got {first} and "
            f"{second}"
        )
    if not isinstance(scales, (tuple, list)) or len(scales) != 2:
        raise TypeError(f"scales must be two numbers, one for each layer's norm, got {scales!r}")
    for scale in scales:
        checks.require_number("scales", scale, "are scales of norms", positive=True)
    early, late = (
        _before_norm(model, layer, scale, layer_tensors.get(layer))
        for layer, scale in zip((first, second), scales, strict=True)
    )
    direction = checks.require_vector("direction", direction, late.d_out, "d_model", late.out)
    if residual or early.has_biases or late.has_biases:
        early, late = with_residual(early, residual=residual), late.augmented()
    return QuarticForm.of(early, late, direction, rank=rank)


def _before_norm(
    model: Any, layer: int, scale: float, layer_tensor: LayerTensor | None
) -> BilinearTensor:
    """The layer as a function of the residual stream, at a scale of its norm."""
    tensor = residual_tensor(model, layer, layer_tensor)
    shrunk = torch.eye(tensor.d_in, dtype=tensor.dtype, device=tensor.device) / scale
    return tensor.fold(shrunk, space=residual_passage(model, layer).hook)
