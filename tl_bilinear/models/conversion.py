"""Weights under HookedTransformer's names (TransformerLens 3.9) and under TransformerBridge's.

No framework is imported.

**Rotary embeddings.** A rotation turns pairs of a head's coordinates. HookedTransformer and Hugging
Face's Llama turn (i, i + r/2) for i < r/2 (half-rotation), TransformerLens's native bridge turns
(2i, 2i + 1) (adjacent pairs), by the same angles. Attention scores do not depend on the order of the
coordinates of queries and keys, so permuting W_Q, b_Q, W_K and b_K turns one into the other, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tl_bilinear.models.layouts import weight_pairs

MLP_BIASES = ("mlp.gate.bias", "mlp.in.bias", "mlp.out.bias")
_ROTATED = ("attn.W_Q", "attn.b_Q", "attn.W_K", "attn.b_K")

# Fields that both configs have, with the same meaning.
_CARRIED = frozenset(
    {
        "attention_dir",
        "attn_only",
        "attn_scores_soft_cap",
        "d_head",
        "d_mlp",
        "d_model",
        "d_vocab",
        "d_vocab_out",
        "default_prepend_bos",
        "dtype",
        "eps",
        "final_rms",
        "init_mode",
        "initializer_range",
        "model_name",
        "n_ctx",
        "n_heads",
        "n_key_value_heads",
        "n_layers",
        "normalization_type",
        "output_logits_soft_cap",
        "positional_embedding_type",
        "rotary_base",
        "rotary_dim",
        "seed",
        "tokenizer_name",
    }
)
# Settings of HookedTransformer that TransformerLens's native bridge does not have: their off values.
_OFF = {
    "attn_types": None,
    "clip_qkv": None,
    "parallel_attn_mlp": False,
    "post_embedding_ln": False,
    "rotary_base_local": None,
    "rotary_scaling_factor": 1.0,
    "scale_attn_by_inverse_layer_idx": False,
    "use_NTK_by_parts_rope": False,
    "use_attention_sinks": False,
    "use_dynamic_ntk_rope": False,
    "use_local_attn": False,
    "use_logn_attn": False,
    "use_normalization_before_and_after": False,
    "use_qk_norm": False,
    "use_yarn_rope": False,
}
_POSITIONS = ("standard", "rotary")
_ARCHITECTURES = (
    None,
    "LlamaForCausalLM",
)  # others may change where HookedTransformer has its norms


# ---------------------------------------------------------------------- HookedTransformer to bridge


def bridge_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a TransformerBridgeConfig that describe fields of a HookedTransformerConfig.

    Raises ValueError naming each setting that the native bridge does not compute.
    """
    problems = [
        f"{name}={config[name]!r}"
        for name, off in _OFF.items()
        if name in config and config[name] != off
    ]
    if config["positional_embedding_type"] not in _POSITIONS:
        problems.append(f"positional_embedding_type={config['positional_embedding_type']!r}")
    if config.get("original_architecture") not in _ARCHITECTURES:
        problems.append(f"original_architecture={config['original_architecture']!r}")
    if float(config["rotary_base"]) % 1:
        problems.append(f"rotary_base={config['rotary_base']!r} (only whole numbers)")
    if problems:
        raise ValueError(
            f"TransformerBridge's native model does not compute this one: it has no "
            f"{', '.join(problems)}. Analyse it as a HookedTransformer (TransformerLens 3.9)"
        )
    return {name: config[name] for name in _CARRIED if name in config}


def names_of(config: Mapping[str, Any]) -> set[str]:
    """HookedTransformer's names of the weights that a config asks for, tables aside."""
    return {pair[0] for pair in _pairs(config)}


def to_bridge(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A HookedTransformer's state dict under the native bridge's names and in its layouts.

    `config` has the fields of its config. Masks and rotary tables have no counterpart.
    """
    order = None
    if config["positional_embedding_type"] == "rotary" and not config["rotary_adjacent_pairs"]:
        order = adjacent_order(config["d_head"], config["rotary_dim"])
    # The bridge always divides attention scores by sqrt(d_head).
    divisor = config["attn_scale"] if config["use_attn_scale"] else 1.0
    scale = math.sqrt(config["d_head"]) / divisor
    converted = {}
    for name, bridge_name, layout, bridge_layout in _pairs(config):
        if name not in state:
            continue
        values = state[name]
        if order is not None and _ends_with(name, _ROTATED):
            values = values[..., order.to(values.device)]
        if not math.isclose(scale, 1.0) and name.endswith(("W_Q", "b_Q")):
            values = values * scale
        converted[bridge_name] = rearrange(values, f"{layout} -> {bridge_layout}").contiguous()
    return converted


# ---------------------------------------------------------------------- bridge to HookedTransformer


def hooked_fields(cfg: Any) -> dict[str, Any]:
    """The fields of a BilinearTransformerConfig that describe a TransformerBridgeConfig."""
    fields = {name: getattr(cfg, name) for name in _CARRIED if hasattr(cfg, name)}
    if fields["positional_embedding_type"] == "rotary" and fields["rotary_dim"] is None:
        fields["rotary_dim"] = cfg.d_head
    given = cfg.use_attn_scale and cfg.attn_scale > 0
    return fields | {
        "use_attn_scale": True,
        "attn_scale": cfg.attn_scale if given else math.sqrt(cfg.d_head),
        "act_fn": "identity",
        "gated_mlp": True,
        "bilinear": True,
        "rotary_adjacent_pairs": False,
    }


def from_bridge(
    state: Mapping[str, Tensor], config: Mapping[str, Any], *, adjacent_pairs: bool
) -> dict[str, Tensor]:
    """A bridge's state dict under HookedTransformer's names and in its layouts, half-rotated.

    `config` has the fields of `hooked_fields`; `adjacent_pairs` says how the bridge rotates. Biases
    that the bridge does not have are zero.
    """
    order = None
    if config["positional_embedding_type"] == "rotary" and adjacent_pairs:
        order = adjacent_order(config["d_head"], config["rotary_dim"]).argsort()
    sizes = {
        "h": config["d_head"],
        "d": config["d_model"],
        "m": config["d_mlp"],
        "v": config["d_vocab_out"] if config["d_vocab_out"] > 0 else config["d_vocab"],
    }
    like = state["embed.weight"]
    converted = {}
    for name, bridge_name, layout, bridge_layout in _pairs(config):
        axes = layout.split()
        grouped = name.endswith(("_K", "_V")) and config["n_key_value_heads"] is not None
        sizes["n"] = config["n_key_value_heads"] if grouped else config["n_heads"]
        if bridge_name in state:
            known = {axis: sizes[axis] for axis in axes if axis in "nh"}
            values = rearrange(state[bridge_name], f"{bridge_layout} -> {layout}", **known)
        elif ".b_" in name.replace("._", ".") and f"{bridge_name[:-4]}weight" in state:
            values = torch.zeros([sizes[axis] for axis in axes], dtype=like.dtype)
        else:  # a norm without weights, no learned positions, no MLP
            continue
        if order is not None and _ends_with(name, _ROTATED):
            values = values[..., order.to(values.device)]
        converted[name] = values
    return converted


# ---------------------------------------------------------------------- parts


def adjacent_order(d_head: int, rotary_dim: int) -> Tensor:
    """The order [d_head] that turns half-rotation into adjacent pairs: ``x_adjacent = x_half[order]``.

    Coordinates from `rotary_dim` on are not rotated and stay. ``order.argsort()`` leads back.
    """
    rotated = torch.arange(rotary_dim).reshape(2, -1).T.flatten()
    return torch.cat([rotated, torch.arange(rotary_dim, d_head)])


def _pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    grouped = config["n_key_value_heads"] is not None
    return weight_pairs("bridge", config["n_layers"], grouped=grouped)


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return name.replace("._", ".").endswith(endings)
