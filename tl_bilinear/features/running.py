"""One run of the model: the activations around a layer that analyses on tokens need.

Where several look at the same text, one run serves them all:

>>> run = features.run(tokens)
>>> features.examples(run, 1882), features.low_rank_correlation(run), features.attribute(run[3], 1882)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
    read_at: hooks and normalisation that it was made for; it serves no others
    """

    tokens: Tensor
    activations: Float[Tensor, "batch pos d"]
    source: Float[Tensor, "batch pos e"] | None
    x: Float[Tensor, "batch pos d"]
    scale: Float[Tensor, "batch pos 1"]
    output: Float[Tensor, "batch pos d"]
    output_scale: Float[Tensor, "batch pos"]
    read_at: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Run:
        """Some of the sequences: one, a slice, or their numbers; ``run[rows, :stop]`` cuts them."""
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"sequence {rows} of a run of {len(self)}")
            rows = slice(rows, rows + 1 or None)
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: Any = {n: v[rows] for n, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    @staticmethod
    def cat(parts: Sequence[Run]) -> Run:
        """Several runs of equally long sequences as one."""
        held = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Run)}
        tensors: Any = {n: torch.cat(v) for n, v in held.items() if isinstance(v[0], Tensor)}
        return replace(parts[0], **tensors)


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


def read_at(self: FeatureInteractions) -> tuple[str, ...]:
    """What the activations of a run depend on, beside the model and its tokens."""
    sae = self.outputs.sae
    normalised = "none" if sae is None else sae.cfg.normalize_activations
    # A normalisation has constants of its own SAE; without one, any output dictionary reads the same.
    whose = "" if normalised == "none" or self.output != "encoder" else f"{normalised} of {id(sae)}"
    return (self.passage.hook, str(self.inputs.encoder_hook), self.output_hook, whose)


def run(self: FeatureInteractions, text: Any, batch: int) -> Run:
    """See :meth:`FeatureInteractions.run`."""
    if isinstance(text, Run):
        if text.read_at != read_at(self):
            raise ValueError(
                f"this run holds activations at {', '.join(filter(None, text.read_at))}, and "
                f"{', '.join(filter(None, read_at(self)))} are asked for: run the model again"
            )
        return text
    return Run.cat([_forward(self, rows) for rows in self.tokens(text).split(batch)])


@torch.no_grad()
def _forward(self: FeatureInteractions, tokens: Tensor) -> Run:
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
        read_at(self),
    )
