"""Which layer is meant, and where it reads and writes, in the words that results carry along.

No framework is imported where a model has none.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from tl_bilinear.models.modules import is_a

_AFTER = {
    None: "no normalisation",
    "RMS": "after RMSNorm and its weight",
    "RMSPre": "after RMSNorm without a weight",
    "LN": "after LayerNorm, its weight and its bias",
    "LNPre": "after LayerNorm without weight and bias",
}


def require_layer(layer: int | None, n_layers: int) -> int:
    """The layer's number from 0; `layer` may count from the end, and be None in a model of one layer.

    Raises IndexError for a layer that does not exist, ValueError for None where there are several.
    """
    valid = f"0 to {n_layers - 1}, or {-n_layers} to -1 from the end"
    if layer is None:
        if n_layers != 1:
            raise ValueError(f"this model has {n_layers} layers: say which one ({valid})")
        return 0
    number: Any = None if isinstance(layer, bool) else layer
    try:
        index = operator.index(number)
    except TypeError:
        raise TypeError(f"layer must be a number ({valid}), got {layer!r}") from None
    if not -n_layers <= index < n_layers:
        raise IndexError(f"layer {index} does not exist: the model's layers are {valid}")
    return index % n_layers


def is_hooked(model: Any) -> bool:
    """Whether a model is a HookedTransformer or a TransformerBridge, or of a subclass."""
    classes = ("HookedTransformer", "TransformerBridge")
    return any(is_a(model, "transformer_lens", name) for name in classes)


def layer_spaces(model: Any, layer: int) -> tuple[str, str] | None:
    """`input_space` and `output_space` of `from_model(model, layer)`, without reading a weight.

    `layer` counts from 0. None for a model that is neither a HookedTransformer nor a
    TransformerBridge.
    """
    if not is_hooked(model):
        return None
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    cfg, block, name = model.cfg, model.blocks[layer], f"blocks.{layer}"
    # TransformerLens's own MLP has no hook_in.
    reads = f"{name}.mlp.hook_in" if hasattr(block.mlp, "hook_in") else f"input of {name}.mlp"
    post_norm = cfg.original_architecture in POST_NORM_ARCHITECTURES
    reads += f" (input of the MLP, {_AFTER[None if post_norm else _norm_kind(cfg, block)]})"
    if post_norm or norm_follows(model, layer):
        hook = f"{name}.mlp.hook_out" if hasattr(block.mlp, "hook_out") else f"output of {name}.mlp"
        return reads, f"{hook} (before the norm that follows the MLP)"
    return reads, f"{name}.hook_mlp_out"


def llama_spaces(block: Any, layer: int) -> tuple[str, str]:
    """The same for a block of a Hugging Face Llama or its kin, in the words of `from_hf`."""
    # Gemma 2 has a norm before and a norm after the MLP; the others call the one before it this.
    norm = getattr(block, "pre_feedforward_layernorm", None) or block.post_attention_layernorm
    # A weight of ones is none: from_hf folds such a norm. Gemma's weight is added to 1.
    none = 0 if "Gemma" in type(norm).__name__ else 1
    kind = "RMSPre" if (norm.weight == none).all() else "RMS"
    reads = f"blocks.{layer}.mlp.hook_in (input of the MLP, {_AFTER[kind]})"
    if hasattr(block, "post_feedforward_layernorm"):
        return reads, f"blocks.{layer}.mlp.hook_out (before the norm that follows the MLP)"
    return reads, f"blocks.{layer}.hook_mlp_out"


def norm_is_folded(model: Any, layer: int) -> bool:
    """Whether the norm before an MLP multiplies by nothing."""
    return _norm_kind(model.cfg, model.blocks[layer]) in ("RMSPre", "LNPre")


def norm_follows(model: Any, layer: int) -> bool:
    """Whether another norm stands between an MLP and the residual stream (Gemma 2 and 3)."""
    own = getattr(model.cfg, "use_normalization_before_and_after", False)
    return bool(own or hasattr(model.blocks[layer], "ln2_post"))


def norm_weight(cfg: Any, norm: Any) -> Tensor | None:
    """What a norm multiplies by, [d_model]; None for ones or nothing.

    Gemma's norms store it less 1, and a folded norm of a bridge keeps a weight that is none.
    """
    weight: Tensor | None = getattr(norm, "w", None)
    if weight is None:
        return None
    weight = weight.detach() + (1 if getattr(cfg, "rmsnorm_uses_offset", False) else 0)
    return None if bool((weight == 1).all()) else weight


def _norm_kind(cfg: Any, block: Any) -> str | None:
    """The norm before a block's MLP, as HookedTransformer's `normalization_type` names it."""
    kind: str | None = cfg.normalization_type
    if kind in ("RMS", "LN") and is_a(block, "transformer_lens", "GeneralizedComponent"):
        # A bridge keeps its normalization_type when the norm is folded.
        bias = getattr(block.ln2, "b", None)
        if norm_weight(cfg, block.ln2) is None and (bias is None or not bool(bias.any())):
            return f"{kind}Pre"
    return kind
