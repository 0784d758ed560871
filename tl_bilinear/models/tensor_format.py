"""The published format of tensor transformers, the second family of bilinear models.

On the hub: ``Elriggs/gpt2-bilinear-sqrd-attn-18l-9h-1152embd`` and ``...-12l-6h-768embd``, by the class
in the repository loganriggs/tensor_language. ``config.json`` holds the fields of `TensorFields`; the
weights are ``pytorch_model.bin`` there, ``model.safetensors`` where this package writes them. With
d = n_embd and h = expansion_factor d:

===============================================  ==========  =======================================
tensor                                           shape       hooked model
===============================================  ==========  =======================================
``transformer.wte.weight``                       [V, d]      embed.W_E
``transformer.h.L.lambdas``                      [2]         blocks.L.lambdas
``transformer.h.L.attn.{c_q,c_k,c_v}.weight``    [d, d]      W_Q, W_K, W_V, each split by head
``transformer.h.L.attn.{c_q2,c_k2}.weight``      [d, d]      W_Q2, W_K2, with two score pairs
``transformer.h.L.attn.c_proj.weight``           [d, d]      W_O
``transformer.h.L.attn.lamb``                    []          attn.lamb
``transformer.h.L.attn.bilinear_lamb``           []          attn.bilinear_lamb, differences only
``transformer.h.L.mlp.{Left,Right}.weight``      [h, d]      mlp.W_gate, mlp.W_in
``transformer.h.L.mlp.Down.weight``              [d, h]      mlp.W_out
``transformer.h.L.mlp.Down_bias``                [d]         mlp.b_out
``lm_head.weight``                               [V, d]      unembed.W_U
===============================================  ==========  =======================================

Without ``bilinear`` an MLP has ``c_fc`` [4 d, d], ``c_proj`` [d, 4 d] and ``bias`` [d] instead.

The forward pass. Norms are RMS without weights, eps that of the dtype: after the embedding, before
attention, MLP and unembedding, and over each head's queries and keys. x0 is the normed embedding, v1 the
first block's values:

    ``x = lambdas[0] x + lambdas[1] x0``, ``x += attn(norm(x))``, ``x += mlp(norm(x))``,
    ``v = (1 - lamb) v + lamb v1``, ``logits = 30 tanh(logits / 30)``.

Queries and keys are rotated by *minus* the position's angles, halves together, base 10000, with cosines
and sines rounded to bfloat16. With D the width of a head, the pattern is, causally,

| attention | config | pattern | polynomial |
| --- | --- | --- | --- |
| product | bilinear_attn, squared_attn | ``(q.k / D) (q2.k2 / D)``, not normalised | yes |
| squared | squared_attn | ``(q.k / D)^2`` over its row's sum | no: a quotient |
| difference | bilinear_attn | ``softmax(q.k / D) - bilinear_lamb softmax(q2.k2 / D)`` | no |
| softmax | neither | ``softmax(q.k / sqrt D)`` | no |

``norm`` and ``n_ctx`` are fields of this package. With ``norm`` false only the embedding is normed and
the logits are not capped: a model of product attention and bilinear MLPs is then one polynomial of the
embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_bilinear.models.files import require_sizes

SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")
_FLAGS = ("squared_mlp", "bilinear", "gated", "squared_attn", "bilinear_attn", "norm")
ROTARY_BASE, LOGIT_CAP = 10000, 30.0


@dataclass(frozen=True)
class TensorFields:
    """What the ``config.json`` of a tensor transformer says.

    Raises ValueError for a width that its heads do not divide evenly.
    """

    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 768
    squared_mlp: bool = False
    bilinear: bool = False
    expansion_factor: int = 4
    gated: bool = False
    squared_attn: bool = False
    bilinear_attn: bool = False
    norm: bool = True
    n_ctx: int = 1024

    def __post_init__(self) -> None:
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd = {self.n_embd} is not n_head = {self.n_head} times an even size of a head"
            )

    @property
    def d_head(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_mlp(self) -> int:
        return self.n_embd * (self.expansion_factor if self.bilinear else 4)

    @property
    def attention(self) -> str:
        """product, squared, difference or softmax."""
        if self.bilinear_attn:
            return "product" if self.squared_attn else "difference"
        return "squared" if self.squared_attn else "softmax"

    @property
    def mlp(self) -> str:
        """bilinear, gated, squared or relu2."""
        if self.bilinear:
            return "gated" if self.gated else "bilinear"
        return "squared" if self.squared_mlp else "relu2"

    @property
    def not_polynomial(self) -> list[str]:
        """What keeps the model from being a polynomial once its norms are held, in words."""
        attention = {
            "squared": "squared attention divides by its row's sum",
            "difference": "attention is a difference of softmaxes",
            "softmax": "attention is a softmax",
        }
        mlp = {"gated": "its MLPs are gated by SiLU", "relu2": "its MLPs square a ReLU"}
        found = (attention.get(self.attention), mlp.get(self.mlp))
        return [reason for reason in found if reason is not None]

    def shapes(self) -> dict[str, list[int]]:
        """The published tensors and their shapes."""
        d, h = self.n_embd, self.d_mlp
        shapes = {
            "transformer.wte.weight": [self.vocab_size, d],
            "lm_head.weight": [self.vocab_size, d],
        }
        maps = ["c_q", "c_k", "c_v", "c_proj", *(["c_q2", "c_k2"] if self.bilinear_attn else [])]
        for layer in range(self.n_layer):
            block = f"transformer.h.{layer}"
            shapes |= {f"{block}.attn.{name}.weight": [d, d] for name in maps}
            shapes |= {f"{block}.lambdas": [2], f"{block}.attn.lamb": []}
            if self.attention == "difference":
                shapes[f"{block}.attn.bilinear_lamb"] = []
            mlp = f"{block}.mlp"
            if self.bilinear:
                shapes |= {f"{mlp}.Left.weight": [h, d], f"{mlp}.Right.weight": [h, d]}
                shapes |= {f"{mlp}.Down.weight": [d, h], f"{mlp}.Down_bias": [d]}
            else:
                shapes |= {
                    f"{mlp}.c_fc.weight": [h, d],
                    f"{mlp}.c_proj.weight": [d, h],
                    f"{mlp}.bias": [d],
                }
        return shapes


FIELD_NAMES = tuple(field.name for field in fields(TensorFields))


def is_tensor_format(stored: Any) -> bool:
    """Whether the content of a config.json is that of a tensor transformer."""
    return isinstance(stored, dict) and {*SIZES, "bilinear_attn"} <= set(stored)


def read_fields(path: Path, stored: Mapping[str, Any]) -> TensorFields:
    """The fields in the content of `path`; others (``step``, transformers' own) are left out.

    Raises ValueError, naming the file, for a config of another format and for fields that no model has.
    """
    if not is_tensor_format(stored):
        missing = [name for name in (*SIZES, "bilinear_attn") if name not in dict(stored)]
        raise ValueError(
            f"{path} is not the config of a tensor transformer: it lacks {', '.join(missing)}"
        )
    known = {name: stored[name] for name in FIELD_NAMES if name in stored}
    sizes = [*SIZES, *(name for name in ("expansion_factor", "n_ctx") if name in known)]
    require_sizes(path, known, sizes)
    wrong = [
        f"{n} is {known[n]!r}" for n in _FLAGS if n in known and not isinstance(known[n], bool)
    ]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)}; expected true or false")
    try:
        return TensorFields(**known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def rotary_tables(n_ctx: int, d_head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n_ctx, d_head / 2], rounded to bfloat16 as in the published code; float32."""
    frequencies = 1.0 / (ROTARY_BASE ** (torch.arange(0, d_head, 2).float() / d_head))
    angles = torch.outer(torch.arange(n_ctx).float(), frequencies)
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()


def rms_normed(x: Tensor) -> Tensor:
    """``x / sqrt(mean x^2 + eps)``, eps that of the dtype."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],))
