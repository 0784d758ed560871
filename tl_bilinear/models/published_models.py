"""The language models that the paper's authors published, as bilinear HookedTransformers.

>>> from tl_bilinear import HookedBilinearTransformer
>>> model = HookedBilinearTransformer.from_pretrained("tdooms/ts-medium")  # doctest: +SKIP

Pearce et al. 2025, section 5 and table 2. On the Hugging Face hub: ``tdooms/ts-medium`` (TinyStories,
6 layers, the paper's ts-tiny), ``tdooms/fw-small`` and ``tdooms/fw-medium`` (FineWeb-edu, 12 and 16).
``config.json`` holds n_head, n_layer, n_ctx, d_model, d_hidden, bilinear, gate, bias, normalization and
the name of a tokenizer; ``model.safetensors`` holds, for h hidden neurons and d = d_model:

===============================================  ==========  =======================================
tensor                                           shape       TransformerLens
===============================================  ==========  =======================================
``transformer.wte.weight``                       [V, d]      W_E
``transformer.h.L.attn.qkv.weight``              [3 d, d]    W_Q, W_K, W_V, each split by head
``transformer.h.L.attn.o.weight``                [d, d]      W_O, times the attention scale
``transformer.h.L.attn.rotary.inv_freq``         [d_head/2]  base 10000, first half with second half
``transformer.h.L.mlp.w.weight``                 [2 h, d]    W_gate = left rows, W_in = right rows
``transformer.h.L.mlp.p.weight``                 [d, h]      W_out
``lm_head.weight``                               [V, d]      W_U, not tied to W_E
===============================================  ==========  =======================================

and biases of mlp.w and mlp.p (in some versions of qkv, too) where ``bias``. RMSNorm has no weights.

The attention scale. In the published code a block is ``x + s attn(norm(x))`` with s = 1/sqrt(2 n_layer).
The history of that code says that ts-medium was trained with s = 1; reproductions that load it with
s = 1/sqrt(2 n_layer) report a loss of 2.9 instead of about 1.3. s is folded into W_O, so that
``hook_attn_out`` is what the residual stream receives; `tl_bilinear.models.compare_attention_scales`
measures the loss under both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_bilinear.models import files
from tl_bilinear.models.fields import require_values
from tl_bilinear.models.files import Source, require_numbers, require_shapes, require_sizes

if TYPE_CHECKING:
    from tl_bilinear.models.component import BilinearTransformerConfig

_log = logging.getLogger(__name__)

SIZES = ("n_layer", "n_head", "n_ctx", "d_model", "d_hidden")
EPS, ROTARY_BASE = 1e-8, 10000

# Left over from a norm that some versions of the published code had and never ran.
_STRAY = re.compile(r"(^|\.)norm\.linear(\.|$)")

# As a repository, a folder, or a folder of the hub's cache.
_TS_MEDIUM = re.compile(r"(^|[/\\]|--)ts-medium($|[/\\])")

# The published configs name a tokenizer by a short name of the published code.
_TOKENIZERS = {
    "ts-4096": (
        "tdooms/ts-tokenizer-4096",
        {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[EOS]"},
    ),
    "mistral": ("mistral-community/Mixtral-8x22B-v0.1", {"pad_token": "</s>"}),
    "gpt2": ("openai-community/gpt2", {"pad_token": "<|endoftext|>"}),
}


def is_published(stored: Any) -> bool:
    """Whether the content of a config.json is that of the authors' format."""
    return isinstance(stored, dict) and all(name in stored for name in SIZES)


def attention_scale(stored: Mapping[str, Any], name: str) -> float:
    """The factor on attention's output with which a published model was trained.

    `stored` is its config, `name` what it was loaded as (``tdooms/ts-medium``, or a folder's name):
    ``scale_attn`` decides where the config has it, otherwise 1 for ts-medium and
    1 / sqrt(2 n_layer), which the published code always applies, for the others.
    """
    scaled = stored.get("scale_attn")
    if scaled is None:
        scaled = not any(_TS_MEDIUM.search(n) for n in (name, str(stored.get("repo"))))
    return float((2 * stored["n_layer"]) ** -0.5) if scaled else 1.0


# ---------------------------------------------------------------------- reading


def read_config(path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a BilinearTransformerConfig from the content of `path`, all but vocabulary and dtype.

    Raises ValueError for a model that is not the paper's bilinear transformer, saying why.
    """
    _refuse_other_models(path, stored)
    require_sizes(path, stored, SIZES)
    try:
        require_values({"n_ctx": stored["n_ctx"]})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sizes = {name: stored[name] for name in SIZES}
    d_head, rest = divmod(sizes["d_model"], sizes["n_head"])
    if rest or d_head % 2:
        raise ValueError(
            f"{path}: d_model = {sizes['d_model']} is not n_head = {sizes['n_head']} times an even "
            "size of a head"
        )
    return {
        "n_layers": sizes["n_layer"],
        "n_heads": sizes["n_head"],
        "n_ctx": sizes["n_ctx"],
        "d_model": sizes["d_model"],
        "d_mlp": sizes["d_hidden"],
        "d_head": d_head,
        "normalization_type": "RMSPre" if stored.get("normalization", True) else None,
        "eps": EPS,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_base": ROTARY_BASE,
        "bilinear_bias": bool(stored.get("bias", False)),
    }


def _refuse_other_models(path: Path, stored: Mapping[str, Any]) -> None:
    conflict: str | None = None
    if not stored.get("bilinear", True):
        conflict = "bilinear is false: its MLPs have one input map, not two"
    elif stored.get("gate") not in (None, "linear", "identity", "none"):
        conflict = (
            f"gate is {stored['gate']!r}: a gated MLP with this activation is not bilinear; only a "
            "gate of null, 'linear', 'identity' or 'none' is"
        )
    elif stored.get("attention2"):
        conflict = (
            "attention2 is true: attention without softmax, which TransformerLens does not have"
        )
    elif stored.get("norm_bias"):
        conflict = "norm_bias is true: the published models' RMSNorm has no parameters"
    if conflict is not None:
        raise ValueError(f"{path} is not a bilinear transformer that tl_bilinear reads: {conflict}")


def read_weights(
    path: Path,
    tensors: dict[str, Tensor],
    fields: Mapping[str, Any],
    attn_scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[BilinearTransformerConfig, dict[str, Tensor]]:
    """The config and TransformerLens's parameters, from `read_config`'s fields and the stored tensors.

    `dtype` is the config's too, so that TransformerLens makes its rotary tables as precise.

    Raises ValueError naming each tensor that is missing, misshapen or not of the model.
    """
    from tl_bilinear.models.component import BilinearTransformerConfig

    tensors = {name: t for name, t in tensors.items() if not _STRAY.search(name)}
    head = tensors.get("lm_head.weight")
    vocabulary = len(head) if head is not None and head.ndim == 2 else "vocabulary"
    require_shapes(path, tensors, _shapes(tensors, fields, vocabulary))
    require_numbers(path, tensors)
    _require_rotary(path, tensors, fields)

    dtype = dtype or tensors["lm_head.weight"].dtype
    config = BilinearTransformerConfig(
        **fields, d_vocab=vocabulary, dtype=dtype, original_architecture="tdooms/bilinear"
    )
    state = {
        "embed.W_E": tensors["transformer.wte.weight"],
        "unembed.W_U": tensors["lm_head.weight"].T,
        "unembed.b_U": torch.zeros(len(tensors["lm_head.weight"])),
    }
    for layer in range(fields["n_layers"]):
        block = {
            name.removeprefix(f"transformer.h.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        for name, tensor in (_attention(block, fields, attn_scale) | _mlp(block, fields)).items():
            state[f"blocks.{layer}.{name}"] = tensor
    # Copies: views would keep the stored tensors in memory.
    layout = torch.contiguous_format
    return config, {n: t.to(dtype).clone(memory_format=layout) for n, t in state.items()}


def _shapes(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], vocabulary: Any
) -> dict[str, list[Any]]:
    d, h, bias = fields["d_model"], fields["d_mlp"], fields["bilinear_bias"]
    shapes = {"transformer.wte.weight": [vocabulary, d], "lm_head.weight": [vocabulary, d]}
    for layer in range(fields["n_layers"]):
        block = f"transformer.h.{layer}"
        shapes |= {
            f"{block}.attn.qkv.weight": [3 * d, d],
            f"{block}.attn.o.weight": [d, d],
            f"{block}.attn.rotary.inv_freq": [fields["d_head"] // 2],
            f"{block}.mlp.w.weight": [2 * h, d],
            f"{block}.mlp.p.weight": [d, h],
        }
        if bias:
            shapes |= {f"{block}.mlp.w.bias": [2 * h], f"{block}.mlp.p.bias": [d]}
            # Only later versions of the published code had a bias here.
            if f"{block}.attn.qkv.bias" in tensors:
                shapes[f"{block}.attn.qkv.bias"] = [3 * d]
    return shapes


def _require_rotary(path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    d_head = fields["d_head"]
    expected = ROTARY_BASE ** (-torch.arange(0, d_head, 2).double() / d_head)
    for layer in range(fields["n_layers"]):
        name = f"transformer.h.{layer}.attn.rotary.inv_freq"
        found = tensors[name].double()
        # Wide enough for frequencies that were stored in bfloat16.
        if not torch.allclose(found, expected, rtol=1e-2, atol=0):
            raise ValueError(
                f"{path}: {name} is {found[:3].tolist()}..., expected the frequencies of rotary base "
                f"{ROTARY_BASE}, {expected[:3].tolist()}..."
            )


def _attention(
    block: Mapping[str, Tensor], fields: Mapping[str, Any], scale: float
) -> dict[str, Tensor]:
    d_model, n_heads, d_head = fields["d_model"], fields["n_heads"], fields["d_head"]
    weights = block["attn.qkv.weight"].view(3, n_heads, d_head, d_model).transpose(-1, -2)
    biases = block.get("attn.qkv.bias", torch.zeros(3 * d_model)).view(3, n_heads, d_head)
    out = block["attn.o.weight"]
    folded = scale * out.double()
    return {
        "attn.W_Q": weights[0],
        "attn.W_K": weights[1],
        "attn.W_V": weights[2],
        "attn.b_Q": biases[0],
        "attn.b_K": biases[1],
        "attn.b_V": biases[2],
        "attn.W_O": folded.T.reshape(n_heads, d_head, d_model),
        "attn.b_O": torch.zeros(d_model),
    }


def _mlp(block: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    left, right = block["mlp.w.weight"].chunk(2)
    b_left, b_right = block.get("mlp.w.bias", torch.zeros(2 * fields["d_mlp"])).chunk(2)
    return {
        "mlp.W_gate": left.T,
        "mlp.W_in": right.T,
        "mlp.W_out": block["mlp.p.weight"].T,
        "mlp.b_gate": b_left,
        "mlp.b_in": b_right,
        "mlp.b_out": block.get("mlp.p.bias", torch.zeros(fields["d_model"])),
    }


def read_tokenizer(source: Source, stored: Mapping[str, Any]) -> Any:
    """The tokenizer beside the model or, on the hub, the one that its config names; None without either.

    The authors' tokenizers put the BOS token first and pad with EOS on the right.
    """
    named = stored.get("tokenizer")
    repository, tokens = (
        _TOKENIZERS.get(named, (None, {})) if isinstance(named, str) else (None, {})
    )
    folder = source.find_tokenizer()
    if folder is None and source.on_hub:
        if repository is not None:
            folder = Source(repository).find_tokenizer()
        if folder is None:
            _log.warning(
                "%s is loaded without its tokenizer %r%s. Pass tokenizer=, or tokens instead of text.",
                source,
                named,
                f": {repository} cannot be downloaded" if repository else "",
            )
    if folder is None:
        return None
    return files.read_tokenizer(folder, padding_side="right", **tokens)
