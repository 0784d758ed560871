"""One run of the model: the activations around a layer that analyses on tokens need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from tl_bilinear.features.interactions import FeatureInteractions


@dataclass(frozen=True, eq=False)
class Run:
    """Activations [batch, pos, ...] of some tokens around the layer.

    Attributes
    ----------
    tokens: [batch, pos]
    activations: at the input dictionary's hook
    source: at the hook that the input dictionary encodes from, where that is another
    x: the layer's input, ``mlp.hook_in``
    scale: [batch, pos, 1], the token's norm scale between the two (1 where there is none)
    output: the layer's output
    output_scale: [batch, pos], what the output dictionary's normalisation multiplies it by
    """

    tokens: Tensor
    activations: Float[Tensor, "batch pos d"]
    source: Float[Tensor, "batch pos e"] | None
    x: Float[Tensor, "batch pos d"]
    scale: Float[Tensor, "batch pos 1"]
    output: Float[Tensor, "batch pos d"]
    output_scale: Float[Tensor, "batch pos"]


def fires_as(model: Any, name: str) -> str:
    """The name by which a model runs a hook.

    A TransformerBridge takes HookedTransformer's names for its own, "hook_mlp_out" for "mlp.hook_out".
    SAELens's bridge does where SAEs are attached, but no longer where hooks and caches are asked for.
    """
    resolve = getattr(model, "_resolve_hook_name", None)
    return name if resolve is None else str(resolve(name))


def refuse_attached(model: Any) -> None:
    """Raise ValueError for a model that runs with SAEs in place of its own activations."""
    if attached := list(getattr(model, "acts_to_saes", {})):
        raise ValueError(
            f"SAEs are attached to the model at {', '.join(attached)}, so its activations are no longer "
            f"its own: call model.reset_saes() first"
        )


@torch.no_grad()
def run(self: FeatureInteractions, tokens: Tensor) -> Run:
    """See :meth:`FeatureInteractions.run`."""
    refuse_attached(self.model)
    passage = self.passage
    encodes = self.inputs.encoder_hook if self.inputs.encode is not None else None
    source = encodes if encodes not in (None, passage.hook) else None
    wanted = {passage.hook, passage.layer_hook, self.output_hook, source, passage.scale_hook}
    fired = {name: fires_as(self.model, name) for name in wanted if name is not None}
    if missing := sorted(set(fired.values()) - self.model.hook_dict.keys()):
        raise ValueError(
            f"the model has no hook {', '.join(missing)}; a HookedTransformer whose MLPs are "
            f"TransformerLens's own has none at the MLP's input: load it as HookedSAETransformer"
        )
    _, held = self.model.run_with_cache(
        tokens,
        names_filter=lambda name: name in fired.values(),
        return_type=None,
        stop_at_layer=self.layer + 1,
    )
    cache = {name: held[found] for name, found in fired.items()}
    activations, output = cache[passage.hook], cache[self.output_hook]
    ones = torch.ones_like(activations[..., :1])
    scale = ones if passage.scale_hook is None else cache[passage.scale_hook]
    gain = torch.ones_like(output[..., 0])
    if self.output == "encoder":
        gain = self.outputs.input_scale(output)[..., 0]
    return Run(
        tokens,
        activations,
        None if source is None else cache[source],
        cache[passage.layer_hook],
        scale,
        output,
        gain,
    )
