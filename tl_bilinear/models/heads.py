"""An attention head as the numbers that make its scores, of any TransformerLens model.

With x the input of attention (after the norm before it, if any), the score of query position i and key
position j is

    ``q = R_i N_q(x_i W_Q + b_Q)``,  ``k = R_j N_k(x_j W_K + b_K)``,
    ``score = cap(scale q.k + position(i, j))``,

N a norm of queries and keys (QK-norm), R_i the rotation of position i (rotary positions), position(i, j)
linear in i and j (ALiBi), cap(s) = c tanh(s / c). Each may be absent. Nothing else makes a score, or the
model is refused by name.

A HookedTransformer has all of these as attributes. A TransformerBridge wraps a model of another library,
which keeps them in a hundred ways, but shows queries and keys before and after the rotation, and scores:
the rotation (half-rotated or adjacent, of any base, partial, scaled for long contexts), the scale and
ALiBi's slopes are solved for in one run on a few tokens. `read_head` checks that they make all scores of
that run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks

_TOKENS = 12  # of the run that a head is read from
_ROWS = 2
_REFUSED_POSITIONS = ("shortformer", "relative_positional_bias")
_OWN_FORMULA = (
    ("clip_qkv", "queries and keys are clipped, which is not linear"),
    ("load_in_4bit", "its weights are held in 4 bits"),
    ("use_logn_attn", "queries are scaled by the logarithm of the length"),
    ("use_dynamic_ntk_rope", "the rotation changes with the length"),
)


class UnreadAttention(ValueError):
    """A model whose attention scores are not made as the module says."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary positions: pairs of coordinates turn by ``position * frequency``.

    Attributes
    ----------
    frequencies: [d / 2], radians a position, of the first d coordinates; the others do not turn
    adjacent: coordinates are paired (0, 1), (2, 3), ...; otherwise (0, d/2), (1, d/2 + 1), ...
    gain: what the rotation multiplies lengths by (1 but for YaRN)
    """

    frequencies: Float[Tensor, " half"]
    adjacent: bool
    gain: float = 1.0

    def turn(
        self,
        rows: Float[Tensor, "... d_head"],
        cos: Float[Tensor, "..."],
        sin: Float[Tensor, "..."],
    ) -> Float[Tensor, "... d_head"]:
        """Rows with their pairs turned: cos, sin [..., d / 2] broadcast against the rows."""
        half = len(self.frequencies)
        turned, rest = rows[..., : 2 * half], rows[..., 2 * half :]
        if self.adjacent:
            one, other = turned[..., ::2], turned[..., 1::2]
        else:
            one, other = turned[..., :half], turned[..., half:]
        pair = (one * cos - other * sin, one * sin + other * cos)
        joined = torch.stack(pair, -1).flatten(-2) if self.adjacent else torch.cat(pair, -1)
        return torch.cat([joined, rest.expand(*joined.shape[:-1], rest.shape[-1])], -1)

    def by(self, rows: Float[Tensor, "... d_head"], offset: float) -> Float[Tensor, "... d_head"]:
        """Rows turned by an offset i - j, as a score at that offset has them."""
        angles = offset * self.frequencies.to(rows)
        # Both sides of a score carry the gain, which only the coordinates that turn have.
        return self.turn(rows, self.gain**2 * angles.cos(), self.gain**2 * angles.sin())


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A norm of queries or keys: ``(q C) * weight / s + bias``, s the root mean square of q C.

    Attributes
    ----------
    weight: [d_head], bias: [d_head]
    centred: whether the mean is taken off (C)
    eps: added to the mean square
    whole: s is of all heads together, not of one
    """

    weight: Float[Tensor, " d_head"]
    bias: Float[Tensor, " d_head"]
    centred: bool
    eps: float
    whole: bool

    def linear(self, rows: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
        """What is linear in it: ``(rows C) * weight``, before the scale and the bias."""
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return rows * self.weight.to(rows)

    def scale(self, every: Float[Tensor, "... heads d_head"], head: int) -> Float[Tensor, "..."]:
        """s of one head, from the queries (or keys) of all."""
        rows = every.flatten(-2) if self.whole else every[..., head, :]
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows.square().mean(-1) + self.eps).sqrt()


@dataclass(frozen=True, eq=False)
class AttentionHead:
    """What makes the scores of one head; everything in float64.

    Attributes
    ----------
    layer, head: which; key_head: whose keys it reads, among the heads that have keys of their own
    W_Q, W_K: [d_model, d_head], b_Q, b_K: [d_head], from the input of attention
    q_norm, k_norm: the norms of queries and keys, or None
    rotary: rotary positions, or None
    scale: what ``q.k`` is multiplied by
    position: (a, b, c), ``a i + b j + c`` is added to the score (ALiBi)
    softcap: c of ``c tanh(score / c)``, or None
    """

    layer: int
    head: int
    key_head: int
    W_Q: Float[Tensor, "d d_head"]
    W_K: Float[Tensor, "d d_head"]
    b_Q: Float[Tensor, " d_head"]
    b_K: Float[Tensor, " d_head"]
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    rotary: Rotary | None
    scale: float
    position: tuple[float, float, float]
    softcap: float | None

    def capped(self, score: float) -> float:
        """A score as the model has it, from the one before its soft cap."""
        return score if self.softcap is None else self.softcap * math.tanh(score / self.softcap)

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.head}"


def through_norm(
    norm: HeadNorm | None, weight: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights and bias of queries (or keys) through their own norm, its scale frozen."""
    if norm is None:
        return weight, bias
    return norm.linear(weight) / scale, norm.linear(bias) / scale + norm.bias


class HeadCache:
    """Activations of one run at a head: queries, keys, rotations and scores of one sequence or more."""

    def __init__(self, model: Any, layer: int, tokens: Tensor, hooks: set[str]) -> None:
        block = f"blocks.{layer}.attn.hook"
        names = ("q", "k", "rot_q", "rot_k", "cos", "sin", "attn_scores", "pattern")
        wanted = {f"{block}_{name}" for name in names} | hooks
        resolve = getattr(model, "_resolve_hook_name", None)
        self._fired = {name: name if resolve is None else str(resolve(name)) for name in wanted}
        fired = set(self._fired.values())
        _, self.cache = model.run_with_cache(
            tokens,
            names_filter=lambda name: name in fired,
            return_type=None,
            stop_at_layer=layer + 1,
        )
        self.block = block

    def __contains__(self, hook: str) -> bool:
        return self._fired.get(hook, hook) in self.cache

    def __getitem__(self, hook: str) -> Tensor:
        return self.cache[self._fired[hook]].double()

    def attention(self, name: str) -> Tensor:
        return self[f"{self.block}_{name}"]

    def has(self, name: str) -> bool:
        return f"{self.block}_{name}" in self


@torch.no_grad()
def read_head(model: Any, layer: int, head: int, tokens: Int[Tensor, "b pos"]) -> AttentionHead:
    """One head of a HookedTransformer or TransformerBridge, read and checked on a run.

    layer, head: from 0; tokens: of the run that positions and scale are taken from, at least 2

    Raises UnreadAttention (a ValueError), naming the architecture and why, for attention whose scores
    are not made as the module says or that does not show them.
    """
    cfg = model.cfg

    def refuse(why: str) -> UnreadAttention:
        return UnreadAttention(
            f"attention scores of {architecture(model)} (layer {layer}) are not read: {why}"
        )

    kind = getattr(cfg, "positional_embedding_type", "standard")
    if kind in _REFUSED_POSITIONS:
        raise refuse(
            f"its positions are {kind!r}, which are neither in the residual stream nor linear"
        )
    for field, why in _OWN_FORMULA:
        if getattr(cfg, field, None) not in (None, False):
            raise refuse(f"{why} ({field})")
    attention = getattr(model.blocks[layer], "attn", None)
    if attention is None:
        raise refuse("the layer has no attention")
    run = HeadCache(model, layer, tokens, set())
    if missing := [name for name in ("q", "k", "attn_scores") if not run.has(name)]:
        raise refuse(f"a run has no {', '.join(f'attn.hook_{name}' for name in missing)}")
    q, k = run.attention("q"), run.attention("k")
    if q.ndim != 4 or k.ndim != 4 or q.shape[-1] != k.shape[-1]:
        raise refuse("its queries and keys are not [batch, pos, head, d_head] of one d_head")
    key_head = head * k.shape[2] // q.shape[2]
    try:
        W_Q, b_Q = _projection(attention, "Q", head, q.shape[2:])
        W_K, b_K = _projection(attention, "K", key_head, k.shape[2:])
        norms = [
            _norm(attention, f"{side}_norm", every, index)
            for side, every, index in (("q", q, head), ("k", k, key_head))
        ]
    except (
        AttributeError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise refuse(str(error).partition("\n")[0]) from error
    one, other = (
        _normed(norm, every, index)
        for norm, every, index in zip(norms, (q, k), (head, key_head), strict=True)
    )
    found = run.attention("attn_scores")
    if run.has("pattern") and torch.equal(found, run.attention("pattern")):
        raise refuse(
            "its attn.hook_attn_scores holds what softmax makes of the scores, not the scores"
        )
    cap = _softcap(attention, cfg)
    scores = Scores.of(found[:, head], cap)
    trials: list[Rotary | None] = [None]
    if kind == "rotary":
        trials = list(_rotations(run, cfg, (one, other), head, key_head))
        if not trials and not getattr(attention, "rope_optional", False):
            raise refuse("a run does not show how its rotary positions turn queries and keys")
        trials = trials or [None]
    solved = [
        (
            *scores.solve(_products(run, trial, one, other, head, key_head), kind == "alibi"),
            trial,
        )
        for trial in trials
    ]
    (scale, *position), off, rotary = min(solved, key=lambda each: each[1])
    if not off < tolerance(model):
        raise refuse(
            f"scale, positions and soft cap do not make its scores from its queries and keys (off by "
            f"{off:.1e})"
        )
    known = getattr(attention, "attn_scale", None)
    scale = scale if known is None else 1 / float(known)
    return AttentionHead(
        layer,
        head,
        key_head,
        W_Q,
        W_K,
        b_Q,
        b_K,
        norms[0],
        norms[1],
        rotary,
        scale,
        (position[0], position[1], position[2]),
        cap,
    )


def sample_tokens(model: Any) -> Int[Tensor, "b pos"]:
    """The tokens that heads are read on: random ones, always the same."""
    length = min(_TOKENS, int(model.cfg.n_ctx))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.cfg.d_vocab, (_ROWS, length), generator=generator)
    return drawn.to(next(model.parameters()).device)


def architecture(model: Any) -> str:
    """A model's name in errors."""
    cfg = model.cfg
    names = (getattr(cfg, name, None) for name in ("architecture", "original_architecture"))
    return next((str(name) for name in names if name), type(model).__name__)


def tolerance(model: Any) -> float:
    """How far scores may be off, relative to the largest: a model's dtype rounds.

    Never less than 1e-5: wrapped models normalise and turn in float32 whatever their dtype.
    """
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return min(0.1, max(1e-5, 2e3 * eps))


# ---------------------------------------------------------------------- weights and norms


def _projection(attention: Any, name: str, head: int, shape: Any) -> tuple[Tensor, Tensor]:
    """W [d_model, d_head] and b [d_head] of one head, in float64."""
    heads, d_head = shape
    weight = getattr(attention, f"W_{name}")
    if weight.ndim != 3 or weight.shape[2] != d_head or weight.shape[0] % heads:
        raise ValueError(
            f"W_{name} has shape {checks.shape(weight)}, not [heads, d_model, {d_head}] for {heads} "
            f"heads"
        )
    # HookedTransformer repeats the keys of grouped queries.
    index = head * (weight.shape[0] // heads)
    bias = getattr(attention, f"b_{name}", None)
    chosen = weight[index].detach().double()
    if bias is None:
        return chosen, chosen.new_zeros(d_head)
    return chosen, bias.detach().double().reshape(-1, d_head)[index]


def _norm(attention: Any, name: str, every: Tensor, head: int) -> HeadNorm | None:
    module = getattr(attention, name, None)
    inner = getattr(module, "original_component", module)
    if module is None or inner is None:
        return None
    heads, d_head = every.shape[-2:]
    weight = getattr(inner, "w", None)
    weight = getattr(inner, "weight", None) if weight is None else weight
    whole = weight is not None and weight.shape == (heads * d_head,) and heads > 1
    flat = every.new_ones(d_head) if weight is None else weight.detach().double().flatten()
    if getattr(getattr(module, "config", None), "rmsnorm_uses_offset", False):
        flat = 1 + flat
    if len(flat) not in (d_head, heads * d_head):
        raise ValueError(
            f"{name} has a weight of {len(flat)} entries for {heads} heads of {d_head}"
        )
    bias = getattr(inner, "bias", None)
    bias = torch.zeros_like(flat) if bias is None else bias.detach().double().flatten()
    rows = [v.reshape(-1, d_head)[head if len(v) > d_head else 0] for v in (flat, bias)]
    fields = ("eps", "variance_epsilon", "norm_eps")
    given = [getattr(inner, field, None) for field in fields]
    numbers = [float(each) for each in given if isinstance(each, (float, int, Tensor))]
    if not numbers:
        raise ValueError(f"{name}, a {type(inner).__name__}, has none of {', '.join(fields)}")
    centred = "LayerNorm" in type(inner).__name__ and "RMS" not in type(inner).__name__
    return HeadNorm(rows[0], rows[1], centred, numbers[0], whole)


def _normed(norm: HeadNorm | None, every: Tensor, head: int) -> Tensor:
    """Queries or keys of one head after their norm: [batch, pos, d_head]."""
    own = every[..., head, :]
    if norm is None:
        return own
    return norm.linear(own) / norm.scale(every, head)[..., None] + norm.bias


# ---------------------------------------------------------------------- positions and scale


def rotation_of(
    rotary: Rotary, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]]:
    """(cos, sin) of each position of a run, from its queries and keys [b, pos, d_head]."""
    half = len(rotary.frequencies)
    rows = torch.cat(before), torch.cat(after)
    if rotary.adjacent:
        (a, b), (c, d) = ((x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]) for x in rows)
    else:
        (a, b), (c, d) = ((x[..., :half], x[..., half : 2 * half]) for x in rows)
    size = (a.square() + b.square()).sum(0).clamp_min(1e-300)
    return (a * c + b * d).sum(0) / size, (a * d - b * c).sum(0) / size


def rotation_tables(
    head: AttentionHead, run: HeadCache
) -> tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]] | None:
    """(cos, sin) of each position of a run, as the model has them; None without rotary positions."""
    return _tables(run, head.rotary, _both_normed(head, run), head.head, head.key_head)


def _both_normed(head: AttentionHead, run: HeadCache) -> tuple[Tensor, Tensor]:
    """Queries and keys of a run after their own norms, before positions."""
    one = _normed(head.q_norm, run.attention("q"), head.head)
    return one, _normed(head.k_norm, run.attention("k"), head.key_head)


def _tables(
    run: HeadCache, rotary: Rotary | None, rows: tuple[Tensor, Tensor], head: int, key_head: int
) -> tuple[Tensor, Tensor] | None:
    if rotary is None:
        return None
    if run.has("rot_q") and run.has("rot_k"):
        after = run.attention("rot_q")[:, :, head], run.attention("rot_k")[:, :, key_head]
        return rotation_of(rotary, rows, after)
    half = len(rotary.frequencies)
    return run.attention("cos")[0, :, :half], run.attention("sin")[0, :, :half]


def _products(
    run: HeadCache, rotary: Rotary | None, one: Tensor, other: Tensor, head: int, key_head: int
) -> Tensor:
    """``q.k`` of every pair of positions [batch, pos, pos], the rotation included."""
    tables = _tables(run, rotary, (one, other), head, key_head)
    if rotary is not None and tables is not None:
        one, other = (rotary.turn(rows, *tables) for rows in (one, other))
    return one @ other.mT


def _rotations(
    run: HeadCache, cfg: Any, rows: tuple[Tensor, Tensor], head: int, key_head: int
) -> Iterator[Rotary]:
    """The rotations that a run may have turned queries and keys by: those that fit what it shows."""
    d_head = rows[0].shape[-1]
    shown = run.has("rot_q") and run.has("rot_k")
    if shown:
        given, share = getattr(cfg, "rotary_dim", None), getattr(cfg, "partial_rotary_factor", None)
        part = None if share is None else int(share * d_head)
        widths = [given, part, d_head, d_head // 2, d_head // 4]
    elif run.has("cos") and run.has("sin"):
        width = run.attention("cos").shape[-1]  # each angle twice, or once
        widths = [width, 2 * width]
    else:
        return
    best = 1e-2
    for width in dict.fromkeys(w for w in widths if w and w % 2 == 0 and w <= d_head):
        for adjacent in (False, True):
            trial = Rotary(rows[0].new_zeros(width // 2), adjacent)
            tables = _tables(run, trial, rows, head, key_head)
            assert tables is not None
            cos, sin = tables
            if shown:
                after = run.attention("rot_q")[:, :, head], run.attention("rot_k")[:, :, key_head]
                error = max(
                    float((trial.turn(b, cos, sin) - a).norm() / a.norm().clamp_min(1e-300))
                    for b, a in zip(rows, after, strict=True)
                )
                if error > 0.5 * best:  # more coordinates that fit no better do not turn
                    continue
                best = max(error, 1e-300)
            gain = float((cos[1].square() + sin[1].square()).sqrt().mean())
            gain = 1.0 if abs(gain - 1) < 1e-6 else gain
            yield Rotary(torch.atan2(sin[1], cos[1]), adjacent, gain)


def position_of(head: AttentionHead, run: HeadCache, row: int = 0) -> tuple[float, float, float]:
    """(a, b, c) of what ALiBi adds in a run: models differ in what they add to all scores of a query.

    Some count from the end of the text, and HookedTransformer from the end of the longest text so far.
    """
    if head.position == (0.0, 0.0, 0.0):
        return head.position
    one, other = _both_normed(head, run)
    made = _products(run, head.rotary, one, other, head.head, head.key_head)
    rest = Scores.of(run.attention("attn_scores")[:, head.head], head.softcap)
    found, _ = rest.solve(head.scale * made, None)
    return found[1], found[2], found[3]


@dataclass(frozen=True)
class Scores:
    """Scores of a head where nothing is masked, before the soft cap: values [n], and which they are."""

    values: Tensor
    seen: Tensor

    @classmethod
    def of(cls, scores: Tensor, cap: float | None) -> Scores:
        length = scores.shape[-1]
        below = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        seen = below & scores.isfinite() & (scores > -1e30)
        values = scores[seen]
        if cap is not None:
            values = cap * torch.atanh((values / cap).clamp(-1 + 1e-15, 1 - 1e-15))
        return cls(values, seen)

    def solve(
        self, products: Tensor, positions: bool | None
    ) -> tuple[tuple[float, float, float, float], float]:
        """((s, a, b, c), error) of ``s products + a i + b j + c``; None holds s at 1."""
        made = products[self.seen]
        columns = [] if positions is None else [made]
        if positions is not False:
            places = self.seen.nonzero()[:, -2:].double()
            columns += [places[:, 0], places[:, 1], torch.ones_like(made)]
        matrix = torch.stack(columns, 1)
        target = self.values - made if positions is None else self.values
        solved = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
        size = self.values.abs().max().clamp_min(1e-300)
        error = float((matrix @ solved - target).abs().max() / size)
        numbers = [float(value) for value in solved]
        numbers = [1.0, *numbers] if positions is None else numbers
        s, a, b, c = numbers + [0.0] * (4 - len(numbers))
        return (s, a, b, c), error


def _softcap(attention: Any, cfg: Any) -> float | None:
    inner = getattr(attention, "original_component", None)
    given = getattr(inner, "attn_logit_softcapping", None) if inner is not None else None
    if inner is None:
        given = getattr(cfg, "attn_scores_soft_cap", None)
    return float(given) if given is not None and float(given) > 0 else None
