"""The attention and the block of a tensor transformer, hooked; `tensor_format` has the mathematics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.components import Attention, Embed, RMSNormPre, TransformerBlock
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.hook_points import HookPoint

from tl_bilinear.models.component import BilinearMLP
from tl_bilinear.models.tensor_format import TensorFields, rms_normed, rotary_tables

_BIASES = ("b_Q", "b_K", "b_V", "b_O")
_LEAST_SUM = 1e-9  # of a row of squared attention


@dataclass(repr=False)
class TensorTransformerConfig(HookedTransformerConfig):
    """The config of a `TensorTransformer`: HookedTransformerConfig, and the published fields."""

    tensor: TensorFields = field(default_factory=TensorFields)


class Carried:
    """What every block reads beside the stream: x0, the normed embedding, and v1, the first values."""

    def __init__(self) -> None:
        self.x0: Tensor | None = None
        self.v1: Tensor | None = None

    def clear(self) -> None:
        self.x0 = self.v1 = None


class NormedEmbed(Embed):
    """``norm(W_E[token])``: `hook_embed` holds the normed embedding, x0."""

    def forward(self, tokens: Tensor) -> Tensor:
        return rms_normed(self.W_E[tokens, :])


class TensorAttention(Attention):
    """Attention of one or two scores, without softmax where the config says so.

    HookedTransformer's hooks: hook_q, hook_k and hook_v are the projections, hook_rot_q and hook_rot_k
    make the scores, hook_attn_scores is the first score, already divided, hook_pattern multiplies the
    values; hook_z, hook_result. And its own:

    - ``q_norm.hook_scale``, ``hook_normalized``: the norm over a head, and so for k, q2 and k2
    - ``hook_q2``, ``hook_k2``, ``hook_rot_q2``, ``hook_rot_k2``, ``hook_attn_scores2``: the second score
    - ``hook_v_mixed``: ``(1 - lamb) v + lamb v1``, the values that the pattern multiplies

    Masked scores are 0, and -inf where a softmax follows.
    """

    W_Q2: nn.Parameter
    W_K2: nn.Parameter

    def __init__(self, cfg: TensorTransformerConfig, layer: int, carried: Carried) -> None:
        super().__init__(cfg, "global", layer)
        self.fields, self.carried = cfg.tensor, carried
        for name in _BIASES:  # the format has none
            zeros = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, zeros)
        cos, sin = rotary_tables(cfg.n_ctx, cfg.d_head)
        # TransformerLens rotates by plus the angle.
        self.register_buffer("rotary_cos", torch.cat([cos, cos], 1).to(cfg.dtype))
        self.register_buffer("rotary_sin", -torch.cat([sin, sin], 1).to(cfg.dtype))
        self.lamb = nn.Parameter(torch.tensor(0.5, dtype=cfg.dtype))
        scores = ["q", "k", *(["q2", "k2"] if self.fields.bilinear_attn else [])]
        if self.fields.bilinear_attn:
            for name in ("W_Q2", "W_K2"):
                setattr(self, name, nn.Parameter(torch.empty_like(self.W_Q)))
            for hook in ("hook_q2", "hook_k2", "hook_rot_q2", "hook_rot_k2", "hook_attn_scores2"):
                setattr(self, hook, HookPoint())
        if self.fields.attention == "difference":
            self.bilinear_lamb = nn.Parameter(torch.tensor(0.8, dtype=cfg.dtype))
        for name in scores:
            setattr(self, f"{name}_norm", RMSNormPre(cfg) if self.fields.norm else None)
        self.hook_v_mixed = HookPoint()  # [batch, pos, head, d_head]

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        if not (past_kv_cache_entry is additive_attention_mask is position_bias is None):
            raise ValueError(
                "a tensor transformer has no cache of keys, no additive mask and no position bias: pass "
                "use_past_kv_cache=False to generate"
            )
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        q = self.hook_rot_q(self._turned(q, self.q_norm, attention_mask))
        k = self.hook_rot_k(self._turned(k, self.k_norm, attention_mask))
        allowed = _allowed(q.shape[1], attention_mask, q.device)
        scores = self.hook_attn_scores(self._scores(q, k, allowed))
        scores2 = None
        if self.fields.bilinear_attn:
            q2, k2 = (
                self.hook_q2(_heads(query_input, self.W_Q2)),
                self.hook_k2(_heads(key_input, self.W_K2)),
            )
            q2 = self.hook_rot_q2(self._turned(q2, self.q2_norm, attention_mask))
            k2 = self.hook_rot_k2(self._turned(k2, self.k2_norm, attention_mask))
            scores2 = self.hook_attn_scores2(self._scores(q2, k2, allowed))
        pattern = self.hook_pattern(self._pattern(scores, scores2))
        if self.layer_id == 0:
            self.carried.v1 = v
        v1 = self.carried.v1
        assert v1 is not None
        mixed = self.hook_v_mixed((1 - self.lamb) * v + self.lamb * v1)
        z = self.hook_z((pattern @ mixed.transpose(1, 2)).transpose(1, 2))
        if not self.cfg.use_attn_result:
            out: Tensor = z.flatten(2) @ self.W_O.flatten(0, 1) + self.b_O
            return out
        result = self.hook_result((z.transpose(1, 2) @ self.W_O).transpose(1, 2))
        return result.sum(2) + self.b_O

    def _turned(self, rows: Tensor, norm: Any, attention_mask: Tensor | None) -> Tensor:
        rows = rows if norm is None else norm(rows)
        return self.apply_rotary(rows, 0, attention_mask)

    def _scores(self, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        softmax = self.fields.attention in ("softmax", "difference")
        width = (
            self.fields.d_head**0.5 if self.fields.attention == "softmax" else self.fields.d_head
        )
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / width
        return scores.masked_fill(~allowed, -torch.inf if softmax else 0)

    def _pattern(self, scores: Tensor, scores2: Tensor | None) -> Tensor:
        if self.fields.attention == "squared":
            squares = scores.square()
            return squares / squares.sum(-1, keepdim=True).clamp_min(_LEAST_SUM)
        if self.fields.attention == "softmax":
            return _softmax(scores)
        assert scores2 is not None
        if self.fields.attention == "product":
            return scores * scores2
        return _softmax(scores) - self.bilinear_lamb * _softmax(scores2)

    def _extend_rotary_embeddings(self, new_size: int) -> None:
        raise ValueError(
            f"the text is longer than n_ctx = {self.cfg.n_ctx}: load the model with a larger n_ctx"
        )


class TensorBlock(TransformerBlock):
    """``x = lambdas[0] x + lambdas[1] x0``, then attention and MLP as in any block.

    ``hook_resid_pre`` holds the mixed x, so that ``hook_resid_mid`` is it plus ``hook_attn_out`` as in
    any model; what came in is the ``hook_resid_post`` before.
    """

    def __init__(self, cfg: TensorTransformerConfig, layer: int, carried: Carried) -> None:
        super().__init__(cfg, layer)
        self.carried, self.layer = carried, layer
        self.attn = TensorAttention(cfg, layer, carried)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0], dtype=cfg.dtype))
        kind = cfg.tensor.mlp
        if kind in ("bilinear", "squared"):
            self.mlp = BilinearMLP(cfg)
            if kind == "squared":  # one map, twice
                self.mlp.W_gate = self.mlp.W_in
        elif kind == "gated":
            zeros = self.mlp.b_in.detach()
            del self.mlp.b_in
            self.mlp.register_buffer("b_in", zeros)
        elif kind == "relu2":
            self.mlp.act_fn = squared_relu
            zeros = self.mlp.b_in.detach()
            del self.mlp.b_in
            self.mlp.register_buffer("b_in", zeros)
        bias = self.mlp.b_out.detach()
        del self.mlp.b_out
        self.mlp.b_out = nn.Parameter(bias)

    def forward(self, resid_pre: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.layer == 0:
            self.carried.x0 = resid_pre
        x0 = self.carried.x0
        if x0 is None:
            raise ValueError(
                "a block of a tensor transformer reads the first one's input: run the model"
            )
        mixed = self.lambdas[0] * resid_pre + self.lambdas[1] * x0
        out: Tensor = super().forward(mixed, *args, **options)
        return out


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2``."""
    return x.relu().square()


def _heads(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, pos, (head,) d_model] through a weight [head, d_model, d_head], by head."""
    if x.ndim == 4:
        return (x.transpose(1, 2) @ weight).transpose(1, 2)
    return (x[:, None] @ weight).transpose(1, 2)


def _allowed(length: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Which key a query may read: bool [1 or batch, 1, query, key]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    return causal if mask is None else causal & mask.to(device).bool()[:, None, None, :]


def _softmax(scores: Tensor) -> Tensor:
    pattern = scores.softmax(-1)
    return torch.where(torch.isnan(pattern), 0.0, pattern)  # a query that may read nothing
