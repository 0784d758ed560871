"""What lies between a hook and a bilinear layer.

A layer reads ``x = mlp.hook_in``. An SAE may sit before it:

| hook | the layer's input |
| --- | --- |
| ``blocks.L.mlp.hook_in`` | x itself |
| ``blocks.L.ln2.hook_normalized`` | ``x = n * w + b``: norm weight and (LayerNorm) bias |
| ``blocks.L.hook_resid_mid`` | ``x = ((r C) * w) / s + b``: C centres (LayerNorm), s the norm's scale |

All but s is linear and enters the weights. s > 0 is a number of the token. From weights alone, a
feature's interactions are therefore known up to the factor 1/s^2 (1/s for terms linear in x), which
changes no sign, no ratio and no order; activations and exact attributions take s from the run. With
parallel attention the MLP reads ``hook_resid_pre``, which takes the place of hook_resid_mid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.hooks.points import LayerTensor, require_layer_tensor
from tl_bilinear.models.spaces import norm_follows, norm_weight
from tl_bilinear.tensor import BilinearTensor


@dataclass(frozen=True, eq=False)
class Passage:
    """How activations r at a hook become a layer's input: ``x = (r @ matrix) / s + offset``.

    Attributes
    ----------
    hook: where r is
    layer_hook: where x is
    matrix: [d, d], None for the identity
    offset: [d], None for zero
    scale_hook: hook of s; None where there is no norm in between (s = 1)
    """

    hook: str
    layer_hook: str
    matrix: Float[Tensor, "d d"] | None = None
    offset: Float[Tensor, " d"] | None = None
    scale_hook: str | None = None

    @property
    def needs_scale(self) -> bool:
        """Whether statements about activations need the token's norm scale."""
        return self.scale_hook is not None

    def map(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Rows at the hook as they reach the layer, before the scale and without the offset."""
        return rows if self.matrix is None else rows @ self.matrix.to(rows.dtype)

    def fold(self, tensor: BilinearTensor) -> BilinearTensor:
        """The layer as a function of ``r / s``."""
        if self.matrix is None and self.offset is None:
            return tensor
        matrix = torch.eye(tensor.d_in, dtype=tensor.dtype) if self.matrix is None else self.matrix
        return tensor.fold(matrix.to(tensor.left), self.offset, space=self.hook)


def input_passages(model: Any, layer: int) -> dict[str, Passage]:
    """The hooks that an input dictionary of a layer may sit at, nearest first."""
    block, cfg = model.blocks[layer], model.cfg
    name = f"blocks.{layer}"
    into = f"{name}.mlp.hook_in"
    found = {into: Passage(into, into)}
    before = f"{name}.hook_resid_pre" if cfg.parallel_attn_mlp else f"{name}.hook_resid_mid"
    if cfg.normalization_type is None:
        found[before] = Passage(before, into)
        return found
    bias = getattr(block.ln2, "b", None)
    bias = None if bias is None or not bool(bias.any()) else bias.detach()
    normalized = f"{name}.ln2.hook_normalized"
    weight = norm_weight(cfg, block.ln2)
    scaling = None if weight is None else torch.diag(weight)
    found[normalized] = Passage(normalized, into, scaling, bias)
    matrix = norm_matrix(cfg, block.ln2, model.W_E)
    found[before] = Passage(before, into, matrix, bias, f"{name}.ln2.hook_scale")
    return found


def attention_passages(model: Any, layer: int) -> dict[str, Passage]:
    """The hooks that a dictionary before a layer's attention may sit at, by name.

    Queries and keys are read from the residual stream before the layer (`hook_resid_pre`, of which
    `hook_q_input`, `hook_k_input`, `hook_attn_in` and the `hook_resid_post` of the layer before are
    copies) through the norm, if there is one, or from `ln1.hook_normalized`, before the norm's weight.
    """
    block, cfg = model.blocks[layer], model.cfg
    name = f"blocks.{layer}"
    into, before = f"{name}.attn.hook_in", f"{name}.hook_resid_pre"
    norm = getattr(block, "ln1", None)
    scale, normalized = f"{name}.ln1.hook_scale", f"{name}.ln1.hook_normalized"
    if norm is None or scale not in model.hook_dict or _after(model):
        residual = Passage(before, into)
        found = {}
    else:
        weight = norm_weight(cfg, norm)
        scaling = None if weight is None else torch.diag(weight)
        bias = getattr(norm, "b", None)
        bias = None if bias is None or not bool(bias.any()) else bias.detach()
        found = {normalized: Passage(normalized, into, scaling, bias)}
        matrix = norm_matrix(cfg, norm, next(model.parameters()))
        residual = Passage(before, into, matrix, bias, scale)
    copies = [
        f"{name}.{part}hook_{copy}"
        for part in ("", "attn.")
        for copy in ("q_input", "k_input", "attn_in")
    ]
    earlier = [] if layer == 0 else [f"blocks.{layer - 1}.hook_resid_post"]
    return found | dict.fromkeys([before, *copies, *earlier], residual)


def _after(model: Any) -> bool:
    """Whether the norms of a model's blocks come after what they are named for (OLMo 2)."""
    names = {
        str(getattr(model.cfg, field, None)) for field in ("architecture", "original_architecture")
    }
    return bool(names & {"Olmo2ForCausalLM", "Olmo3ForCausalLM"})


def residual_passage(model: Any, layer: int) -> Passage:
    """The passage from the residual stream before a layer's MLP, which every model has."""
    return list(input_passages(model, layer).values())[-1]


def residual_tensor(
    model: Any, layer: int, layer_tensor: LayerTensor | None = None
) -> BilinearTensor:
    """A layer as a function of the residual stream before its MLP, over the norm's scale.

    layer_tensor: as a function of ``mlp.hook_in``, where it is not read from the model
    """
    if layer_tensor is None:
        tensor = BilinearTensor.from_model(model, layer)
    else:
        tensor = require_layer_tensor(model, layer, layer_tensor, "layer_tensor")
    return residual_passage(model, layer).fold(tensor)


def norm_matrix(cfg: Any, norm: Any, like: Tensor) -> Float[Tensor, "d d"] | None:
    """The linear part of a norm: rows r leave it as ``(r @ matrix) / s + b``; None for the identity."""
    weight = norm_weight(cfg, norm)
    scaling = None if weight is None else torch.diag(weight)
    rms = getattr(norm, "uses_rms_norm", None)  # of a bridge, whose norm knows
    if rms if isinstance(rms, bool) else cfg.normalization_type not in ("LN", "LNPre"):
        return scaling
    centring = torch.eye(cfg.d_model, dtype=like.dtype, device=like.device) - 1 / cfg.d_model
    return centring if scaling is None else centring @ scaling


def output_hooks(model: Any, layer: int) -> list[str]:
    """The hooks that an output dictionary of a layer may sit at: where its own output stands."""
    hooks = [f"blocks.{layer}.mlp.hook_out", f"blocks.{layer}.hook_mlp_out"]
    # Another norm follows the MLP: what hook_mlp_out holds is no longer the layer's output.
    return hooks[:1] if norm_follows(model, layer) else hooks


def fires_as(model: Any, name: str) -> str:
    """The name by which a model runs a hook.

    A TransformerBridge takes HookedTransformer's names for its own, "hook_mlp_out" for "mlp.hook_out".
    SAELens's bridge takes them where SAEs are attached, but not where hooks and caches are asked for.
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
