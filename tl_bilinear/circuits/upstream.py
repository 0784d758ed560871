"""What a layer's MLP reads at one token, as a sum over everything upstream that wrote it.

With the attention patterns A fixed, the residual stream before layer L's MLP at position p is

    ``r = W_E[t_p] + W_pos[p] + sum_{l,h,s} A_lh[p,s] v_lh[s] W_O,lh + sum_l b_attn,l + sum_{l<L} mlp_l``

(Elhage et al. 2021, here with bilinear MLPs, Sharkey 2023), v without its bias. The bias of attention,
``b_O + sum_h (sum_s A_lh[p,s]) b_V,h W_O,h``, and that of an MLP, b_out, are components of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.passage import Passage, refuse_attached, residual_passage

By = Literal["sources", "heads", "layers"]
_KEPT = {"sources": 3, "heads": 2, "layers": 1}
EMBED, POSITION, HEAD, ATTENTION_BIAS, MLP, MLP_BIAS = (
    "embed",
    "position",
    "head",
    "attention bias",
    "mlp",
    "mlp bias",
)
_NOWHERE = -1


@dataclass(frozen=True, eq=False)
class UpstreamComponents:
    """The residual stream at one token as labelled vectors that sum to it.

    Attributes
    ----------
    vectors: [n, d_model]; kinds: what wrote each
    where: [n, 3], layer, head and source position; -1 where there is none, or where they were summed
    """

    vectors: Float[Tensor, "n d"]
    kinds: list[str]
    where: Int[Tensor, "n 3"]

    def group(self, by: By) -> UpstreamComponents:
        """Heads summed over their sources ("heads"), or over heads as well ("layers")."""
        if by not in _KEPT:
            raise ValueError(f"by must be one of {', '.join(map(repr, _KEPT))}, got {by!r}")
        where = self.where.clone()
        where[:, _KEPT[by] :] = _NOWHERE
        order: dict[tuple[Any, ...], int] = {}
        keys = zip(self.kinds, where.tolist(), strict=True)
        index = [order.setdefault((kind, *place), len(order)) for kind, place in keys]
        vectors = self.vectors.new_zeros(len(order), self.vectors.shape[1])
        vectors.index_add_(0, torch.tensor(index, device=vectors.device), self.vectors)
        return UpstreamComponents(
            vectors,
            [key[0] for key in order],
            torch.tensor([key[1:] for key in order], dtype=torch.long),
        )

    def labels(self, words: list[str]) -> list[str]:
        """A name for each; `words` are the tokens'."""
        return [
            _label(kind, place, words)
            for kind, place in zip(self.kinds, self.where.tolist(), strict=True)
        ]


def _label(kind: str, place: list[int], words: list[str]) -> str:
    layer, head, source = place
    if layer == _NOWHERE:
        return kind
    if kind != HEAD:
        return kind.replace("attention", f"attention {layer}").replace("mlp", f"mlp {layer}")
    if head == _NOWHERE:
        return f"attention {layer}"
    where = "" if source == _NOWHERE else f" from {source} {words[source]}"
    return f"head {layer}.{head}{where}"


class Upstream:
    """A run of the model on one sequence, up to the MLP of a layer, seen from one position.

    Raises IndexError for a position or layer that does not exist, ValueError for several sequences and
    for attached SAEs.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: Tensor | str, layer: int, position: int = -1) -> None:
        refuse_attached(model)
        self.model, cfg = model, model.cfg
        self.tokens = as_tokens(model, tokens)
        if not -cfg.n_layers <= layer < cfg.n_layers:
            raise IndexError(
                f"layer {layer} does not exist: the model has {cfg.n_layers} layers (0 to "
                f"{cfg.n_layers - 1})"
            )
        self.layer = layer % cfg.n_layers
        length = self.tokens.shape[1]
        self.position = checks.require_position(position, length)
        self.passage: Passage = residual_passage(model, self.layer)
        # With parallel attention the MLP does not see the attention of its own layer.
        self.attention_layers = range(self.layer + (not cfg.parallel_attn_mlp))
        # A gated MLP of TransformerLens, read through its approximation, has no hook_out.
        own, after = f"blocks.{self.layer}.mlp.hook_out", f"blocks.{self.layer}.hook_mlp_out"
        self.output_hook = own if own in model.hook_dict else after
        wanted = {"hook_embed", "hook_pos_embed", self.passage.hook, self.output_hook}
        if self.passage.scale_hook is not None:
            wanted.add(self.passage.scale_hook)
        for number in self.attention_layers:
            wanted |= {f"blocks.{number}.attn.hook_{name}" for name in ("pattern", "v")}
        wanted |= {f"blocks.{number}.hook_mlp_out" for number in range(self.layer)}
        _, self.cache = model.run_with_cache(
            self.tokens,
            names_filter=lambda name: name in wanted,
            return_type=None,
            stop_at_layer=self.layer + 1,
        )
        self.dtype = checks.gram_dtype(self.cache[self.passage.hook])

    def at(self, hook: str) -> Float[Tensor, " d"]:
        """An activation at the position, in float64."""
        return self.cache[hook][0, self.position].to(self.dtype)

    @property
    def scale(self) -> float:
        """The norm's scale s at the position; 1 without a norm."""
        hook = self.passage.scale_hook
        return 1.0 if hook is None else float(self.cache[hook][0, self.position])

    @property
    def words(self) -> list[str]:
        """The tokens as text, where the model has a tokenizer; their numbers otherwise."""
        ids = self.tokens[0].tolist()
        tokenizer = self.model.tokenizer
        return (
            [str(i) for i in ids]
            if tokenizer is None
            else [repr(tokenizer.decode([i])) for i in ids]
        )

    # ------------------------------------------------------------------ the parts

    def mixed_values(self, layer: int) -> Float[Tensor, "heads sources d_head"]:
        """``A_h[p,s] v_h[s]`` without b_V, for every head and source."""
        pattern, bias, value = self._attention(layer)
        return pattern[:, :, None] * (value - bias[:, None])

    def _attention(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Its pattern [heads, sources], b_V [heads, d_head] and v [heads, sources, d_head]."""
        attention = self.model.blocks[layer].attn
        name = f"blocks.{layer}.attn.hook"
        pattern = self.cache[f"{name}_pattern"][0, :, self.position].to(self.dtype)
        value = self.cache[f"{name}_v"][0].to(self.dtype).transpose(0, 1)
        # Grouped queries: several heads read one value.
        value = value.repeat_interleave(len(pattern) // len(value), 0)
        bias = _or_zeros(attention.b_V, value[:, 0])
        return pattern, bias.repeat_interleave(len(pattern) // len(bias), 0), value

    def attention_bias(self, layer: int) -> Float[Tensor, " d"]:
        """``b_O + sum_h (sum_s A_h[p,s]) b_V,h W_O,h``."""
        attention = self.model.blocks[layer].attn
        pattern, bias, _ = self._attention(layer)
        through = (pattern.sum(1)[:, None] * bias)[:, None] @ attention.W_O.detach().to(self.dtype)
        return _or_zeros(attention.b_O, through[0, 0]) + through.sum((0, 1))

    def mlp_bias(self, layer: int) -> Float[Tensor, " d"]:
        bias = getattr(self.model.blocks[layer].mlp, "b_out", None)
        return _or_zeros(bias, self.at(f"blocks.{layer}.hook_mlp_out"))

    def components(self) -> UpstreamComponents:
        """Every component that is not zero, in the order in which they are written.

        Raises ValueError where they do not sum to the residual stream that the model has: something
        else writes into it, or changes what is written (a norm after the sublayers).
        """
        vectors: list[Tensor] = []
        kinds: list[str] = []
        where: list[list[int]] = []

        def add(
            vector: Tensor, kind: str, layer: int = -1, head: int = -1, source: int = -1
        ) -> None:
            if bool(vector.any()):
                vectors.append(vector)
                kinds.append(kind)
                where.append([layer, head, source])

        add(self.at("hook_embed"), EMBED)
        if self.model.cfg.positional_embedding_type == "standard":
            # Not for shortformer: there positions enter queries and keys only.
            add(self.cache["hook_pos_embed"][-1, self.position].to(self.dtype), POSITION)
        for layer in range(self.layer + 1):
            if layer in self.attention_layers:
                written = self.mixed_values(layer) @ self.model.blocks[layer].attn.W_O.detach().to(
                    self.dtype
                )
                for head, rows in enumerate(written):
                    for source, vector in enumerate(rows):
                        add(vector, HEAD, layer, head, source)
                add(self.attention_bias(layer), ATTENTION_BIAS, layer)
            if layer < self.layer:
                bias = self.mlp_bias(layer)
                add(self.at(f"blocks.{layer}.hook_mlp_out") - bias, MLP, layer)
                add(bias, MLP_BIAS, layer)
        found = UpstreamComponents(torch.stack(vectors), kinds, torch.tensor(where))
        self._require_complete(found.vectors)
        return found

    def _require_complete(self, vectors: Tensor) -> None:
        residual = self.cache[self.passage.hook][0, self.position]
        size = vectors.norm(dim=1).sum()
        missing = (vectors.sum(0) - residual.to(self.dtype)).norm()
        if missing > min(0.1, 1e4 * torch.finfo(residual.dtype).eps) * size:
            raise ValueError(
                f"the residual stream at {self.passage.hook} is not the sum of embedding, attention "
                f"and MLPs (a part of {float(missing / size):.1e} is missing): paths are of models that "
                f"add what their sublayers write as it is, without a norm after them"
            )

    # ------------------------------------------------------------------ interventions

    @torch.no_grad()
    def outputs_without(
        self, removed: Sequence[Sequence[tuple[str, list[int]]]]
    ) -> Float[Tensor, "m d"]:
        """The layer's output at the position, in m runs that have components taken out at source.

        Each run names what it goes without: (kind, [layer, head, source]). Path patching of the direct
        paths: every attention pattern, value and earlier MLP output, and the norm's scale, are held at
        those of the clean run, so that only what a component writes itself reaches the layer. Then no
        other position matters: the m runs are one batch of the single token, with the patterns and
        values of the whole text.
        """
        rows = len(removed)
        taken: dict[str, Tensor] = {}
        mixed: dict[int, Tensor] = {}

        def take(row: int, hook: str, vector: Tensor, *index: int) -> None:
            if hook not in taken:
                heads = [self.model.cfg.n_heads] if index else []
                taken[hook] = vector.new_zeros(rows, 1, *heads, len(vector), dtype=self.dtype)
            taken[hook][(row, 0, *index)] += vector

        for row, components in enumerate(removed):
            for kind, (layer, head, source) in components:
                block = f"blocks.{layer}"
                if kind in (EMBED, POSITION):
                    hook = "hook_embed" if kind == EMBED else "hook_pos_embed"
                    take(row, hook, self.cache[hook][-1, self.position])
                elif kind == HEAD:
                    if layer not in mixed:
                        mixed[layer] = self.mixed_values(layer)
                    values = mixed[layer]
                    for each in range(len(values)) if head == _NOWHERE else [head]:
                        chosen = values[each]
                        vector = chosen.sum(0) if source == _NOWHERE else chosen[source]
                        take(row, f"{block}.attn.hook_z", vector, each)
                elif kind == ATTENTION_BIAS:
                    take(row, f"{block}.hook_attn_out", self.attention_bias(layer))
                else:
                    bias = self.mlp_bias(layer)
                    own = self.at(f"{block}.hook_mlp_out") - bias
                    take(row, f"{block}.hook_mlp_out", own if kind == MLP else bias)

        def hold(value: Tensor, hook: Any) -> Tensor:
            clean = self._held(hook.name)
            return clean.expand(rows, *clean.shape[1:]).to(value)

        def without(value: Tensor, hook: Any) -> Tensor:
            return value - taken[hook.name].to(value)

        held = {
            name
            for name in self.cache
            if name.endswith(("_pattern", "hook_v", "hook_mlp_out", "hook_pos_embed"))
        } - {self.output_hook}
        if self.passage.scale_hook is not None:
            held.add(self.passage.scale_hook)
        output: list[Tensor] = []
        hooks: list[tuple[str, Callable[..., Any]]] = [(name, hold) for name in held]
        hooks += [(name, without) for name in taken]
        hooks.append((self.output_hook, lambda value, hook: output.append(value)))
        token = self.tokens[:, self.position].expand(rows, 1)
        self.model.run_with_hooks(
            token, fwd_hooks=hooks, return_type=None, stop_at_layer=self.layer + 1
        )
        return output[0][:, 0].to(self.dtype)

    def _held(self, hook: str) -> Tensor:
        """What the clean run has at a hook for this position alone: [1, 1, ...]; of sources, all."""
        value = self.cache[hook]
        if hook.endswith("hook_v"):
            return value
        if hook.endswith("_pattern"):
            return value[:, :, self.position, None]
        return value[-1:, self.position, None]


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    """A bias as `like`; a TransformerBridge has None where there is none."""
    return torch.zeros_like(like) if bias is None else bias.detach().to(like)


def as_tokens(model: Any, tokens: Tensor | str) -> Int[Tensor, "1 pos"]:
    """One sequence of token ids; text as the model's own `to_tokens` reads it."""
    if isinstance(tokens, str):
        return model.to_tokens(tokens)
    if tokens.dtype.is_floating_point or tokens.ndim not in (1, 2):
        raise ValueError(
            f"tokens must be ids [pos] or [1, pos], or text, got {list(tokens.shape)} {tokens.dtype}"
        )
    rows = tokens if tokens.ndim == 2 else tokens[None]
    if len(rows) != 1:
        raise ValueError(f"paths are of one sequence, got a batch of {len(rows)}: give one row")
    if not rows.numel():
        raise ValueError(f"there are no tokens in a text of shape {list(tokens.shape)}")
    checks.require_tokens(rows, model.cfg.d_vocab)
    return rows
