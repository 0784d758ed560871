"""The weights' names and layouts in HookedTransformer, TransformerBridge and Hugging Face's Llama.

The last two hold a linear map as torch.nn.Linear does, [out, in], with all heads in one dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

# Columns: HookedTransformer's name, the bridge's, the Llama's (None where it has no such weight),
# HookedTransformer's layout, the layout of the other two.
# n: heads, h: d_head, d: d_model, m: d_mlp, v: vocabulary, p: positions.
_OUTSIDE = (
    ("embed.W_E", "embed.weight", "model.embed_tokens.weight", "v d", "v d"),
    ("pos_embed.W_pos", "pos_embed.weight", None, "p d", "p d"),
    ("ln_final.w", "ln_final.weight", "model.norm.weight", "d", "d"),
    ("ln_final.b", "ln_final.bias", None, "d", "d"),
    ("unembed.W_U", "unembed.weight", "lm_head.weight", "d v", "v d"),
    ("unembed.b_U", "unembed.bias", None, "v", "v"),
)
_BLOCK = (
    ("ln1.w", "ln1.weight", "input_layernorm.weight", "d", "d"),
    ("ln1.b", "ln1.bias", None, "d", "d"),
    ("attn.W_Q", "attn.q.weight", "self_attn.q_proj.weight", "n d h", "(n h) d"),
    ("attn.b_Q", "attn.q.bias", "self_attn.q_proj.bias", "n h", "(n h)"),
    ("attn.W_K", "attn.k.weight", "self_attn.k_proj.weight", "n d h", "(n h) d"),
    ("attn.b_K", "attn.k.bias", "self_attn.k_proj.bias", "n h", "(n h)"),
    ("attn.W_V", "attn.v.weight", "self_attn.v_proj.weight", "n d h", "(n h) d"),
    ("attn.b_V", "attn.v.bias", "self_attn.v_proj.bias", "n h", "(n h)"),
    ("attn.W_O", "attn.o.weight", "self_attn.o_proj.weight", "n h d", "d (n h)"),
    ("attn.b_O", "attn.o.bias", "self_attn.o_proj.bias", "d", "d"),
    ("ln2.w", "ln2.weight", "post_attention_layernorm.weight", "d", "d"),
    ("ln2.b", "ln2.bias", None, "d", "d"),
    ("mlp.W_gate", "mlp.gate.weight", "mlp.gate_proj.weight", "d m", "m d"),
    ("mlp.b_gate", "mlp.gate.bias", "mlp.gate_proj.bias", "m", "m"),
    ("mlp.W_in", "mlp.in.weight", "mlp.up_proj.weight", "d m", "m d"),
    ("mlp.b_in", "mlp.in.bias", "mlp.up_proj.bias", "m", "m"),
    ("mlp.W_out", "mlp.out.weight", "mlp.down_proj.weight", "m d", "d m"),
    ("mlp.b_out", "mlp.out.bias", "mlp.down_proj.bias", "d", "d"),
)


def weight_pairs(
    other: Literal["bridge", "llama"], n_layers: int, *, grouped: bool
) -> Iterator[tuple[str, str, str, str]]:
    """For every weight: HookedTransformer's name, the other's, HookedTransformer's layout, the other's.

    `grouped` says whether queries share keys and values.
    """
    column: Literal[1, 2] = 1 if other == "bridge" else 2
    for row in _OUTSIDE:
        other_name = row[column]
        if other_name is not None:
            yield row[0], other_name, row[3], row[4]
    prefix = "blocks" if other == "bridge" else "model.layers"
    for layer in range(n_layers):
        for row in _BLOCK:
            other_name = row[column]
            if other_name is None:
                continue
            part, leaf = row[0].split(".")
            # HookedTransformer keeps grouped keys and values under names of their own.
            under = "_" if grouped and leaf[-2:] in ("_K", "_V") else ""
            name = f"blocks.{layer}.{part}.{under}{leaf}"
            yield name, f"{prefix}.{layer}.{other_name}", row[3], row[4]
