"""Where a layer reads and writes: its hook points, found by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_bilinear import checks
from tl_bilinear.models.modules import is_a
from tl_bilinear.models.spaces import layer_spaces, require_layer
from tl_bilinear.tensor import Approximation, BilinearTensor
from tl_bilinear.tensor.gated import without_note

Positions = int | slice | Sequence[int] | Tensor | None
LayerTensor = BilinearTensor | Approximation
"""What may stand for a layer: its tensor, or an approximation as `approximate_llama` gives it."""


@dataclass(frozen=True)
class HookName:
    """The name of a hook point; where SAELens has put an SAE there, it means the SAE's output.

    Called with a name, it says whether that is the one meant. TransformerLens takes such a predicate
    in place of a name, so the same hooks fit a model with and without SAEs.
    """

    name: str

    def __call__(self, name: str) -> bool:
        return name in (self.name, f"{self.name}.hook_sae_output")

    def __str__(self) -> str:
        return self.name

    def find(self, model: Any) -> nn.Module:
        """The hook point that has the name now."""
        return next(point for name, point in model.hook_dict.items() if self(name))


@dataclass(frozen=True)
class LayerPoints:
    """Where the MLP of a block reads (`mlp.hook_in`) and writes (`mlp.hook_out`).

    A gated MLP of TransformerLens has no `mlp.hook_in`: behind a norm without weight, folded, it reads
    `ln2.hook_normalized`.
    """

    layer: int
    reads: HookName
    writes: HookName
    input_space: str | None
    output_space: str | None

    @classmethod
    def of(cls, model: Any, layer: int, *, hooked: bool = True) -> LayerPoints:
        """The points of a layer of a model; `layer` counts from 0, negative from the end.

        hooked: False where only spaces are compared: the points need not be there

        Raises TypeError for a model without hook points, IndexError for a layer that it does not
        have, ValueError where the layer has no hook on its input or output.
        """
        names = getattr(model, "hook_dict", None)
        if names is None:
            raise TypeError(
                f"expected a model with TransformerLens hooks (it has hook_dict), got "
                f"{type(model).__name__}"
            )
        numbers = [int(n.split(".")[1]) for n in names if re.match(r"blocks\.\d+\.", n)]
        layer = require_layer(layer, max(numbers, default=-1) + 1)
        block = f"blocks.{layer}"
        reads = f"{block}.mlp.hook_in"
        if not _has(names, reads) and _folded(model, layer):
            reads = f"{block}.ln2.hook_normalized"
        known = _has(names, reads) or not hooked
        spaces = layer_spaces(model, layer) if known else None
        input_space, output_space = spaces or (None, None)
        writes = f"{block}.mlp.hook_out"
        # TransformerLens's own MLPs have no hook_out; a norm may lie between them and hook_mlp_out.
        if not _has(names, writes) and output_space in (None, f"{block}.hook_mlp_out"):
            writes = f"{block}.hook_mlp_out"
        points = cls(layer, HookName(reads), HookName(writes), input_space, output_space)
        for needed in (points.reads, points.writes):
            if hooked and not _has(names, str(needed)):
                raise ValueError(
                    f"{block} has no hook point {needed}: reading or editing a bilinear layer needs one "
                    f"on its input and one on its output. HookedTransformer.from_config("
                    f"bilinear=True, ...) and TransformerBridge have both; a gated HookedTransformer "
                    f"has both once its norm is folded: model.process_weights_()"
                )
        return points

    def require_fit(
        self,
        model: Any,
        what: str,
        *,
        width: int,
        space: str | None,
        output: bool = False,
        field: str = "space",
    ) -> None:
        """Raise ValueError, naming both sides, where `what` is not of this layer's input (or output).

        `field` is where `what` keeps its space.
        """
        point = self.writes if output else self.reads
        expected = (self.output_space if output else self.input_space) or f"{point}"
        d_model = getattr(getattr(model, "cfg", None), "d_model", None)
        if d_model in (None, width) and self._same(space, expected):
            return
        there = "?" if d_model is None else d_model
        raise ValueError(
            f"{what} does not fit blocks.{self.layer}.mlp: it has width {width} in "
            f"{space or 'a space without a name'!r}, the layer {'writes' if output else 'reads'} "
            f"width {there} in {expected!r}. Take it from BilinearTensor.from_model(model, "
            f"{self.layer}) of this model as it is now; if the coordinates do mean the same, pass "
            f"dataclasses.replace(..., {field}=None)"
        )

    def _same(self, space: str | None, expected: str) -> bool:
        space = without_note(space)
        if space is None or _where(space) == _where(expected):
            return True
        if self.input_space is not None:
            return False
        # The model's reader gives no spaces. Another layer or another basis is then refused by name.
        found = re.match(r"(?:(?:input|output) of )?blocks\.(\d+)\.", space)
        return found is not None and int(found[1]) == self.layer


def as_tensor(tensor: LayerTensor) -> BilinearTensor:
    """The tensor itself, or an approximation's."""
    return tensor.tensor if isinstance(tensor, Approximation) else tensor


def require_layer_tensor(
    model: Any, layer: int, tensor: LayerTensor, what: str = "the tensor"
) -> BilinearTensor:
    """The tensor, or that of an approximation, if it is of a layer's input and output.

    An approximation of the layer fits like the layer itself. Raises ValueError, naming both sides, for
    one of another layer or another basis, TypeError for anything else.
    """
    tensor = as_tensor(tensor)
    if not isinstance(tensor, BilinearTensor):
        raise TypeError(
            f"{what} must be a BilinearTensor or an Approximation, got {type(tensor).__name__}"
        )
    points = LayerPoints.of(model, layer, hooked=False)
    points.require_fit(
        model, what, width=tensor.d_in, space=tensor.input_space, field="input_space"
    )
    points.require_fit(
        model,
        what,
        width=tensor.d_out,
        space=tensor.output_space,
        output=True,
        field="output_space",
    )
    return tensor


def _folded(model: Any, layer: int) -> bool:
    """Whether the norm before a HookedTransformer's MLP writes what it normalises, nothing more."""
    cfg = model.cfg
    return (
        getattr(cfg, "normalization_type", None) in ("RMSPre", "LNPre")
        and not getattr(cfg, "parallel_attn_mlp", False)
        and is_a(model, "transformer_lens", "HookedTransformer")
    )


def _where(space: str) -> str:
    """A space by the hook where HookedTransformer's own MLPs have one, which others lack."""
    return re.sub(
        r"^(?:input of (blocks\.\d+)\.mlp|(blocks\.\d+)\.mlp\.hook_in) ", r"\1\2: ", space
    )


def _has(names: Any, name: str) -> bool:
    return any(map(HookName(name), names))


def position_mask(positions: Positions, shape: torch.Size, device: torch.device) -> Tensor | None:
    """A mask [..., pos], true at the positions chosen; None for all.

    Raises IndexError for a position that this forward does not have, ValueError for a mask of
    another shape, TypeError for anything else.
    """
    if positions is None:
        return None
    count = shape[-1]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape not in (shape, shape[-1:]):
            raise ValueError(
                f"a mask of positions must have shape [{count}] or {list(shape)}, that of this "
                f"forward, got {checks.shape(positions)}"
            )
        return positions.to(device).expand(shape)
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    if isinstance(positions, slice):
        mask[positions] = True
        return mask.expand(shape)
    chosen = torch.as_tensor(positions)
    if chosen.numel() and (chosen.is_floating_point() or chosen.dtype == torch.bool):
        raise TypeError(
            f"positions are None for all, an int, a slice, ints, or a boolean tensor, got {positions!r}"
        )
    if not bool(((chosen >= -count) & (chosen < count)).all()):
        raise IndexError(f"position {positions} does not exist: this forward has {count} positions")
    mask[chosen.long().to(device)] = True
    return mask.expand(shape)
