"""One attention head on a prompt: each score as an exact sum over pairs of what the two tokens carry.

With the scales of all norms frozen at the run's, the query token's activation is a sum of rows, active
features ``z_a d_a`` and a named rest (decoder bias, the dictionary's error), and so is the key token's.
Every row becomes a query or a key; the biases of attention and of the norm before it are one more row,
"bias". The score is the sum over all pairs of rows, ALiBi's term added, soft cap applied.

>>> run = AttentionInteractions(model, 1, 4, sae).run(tokens)
>>> found = run.score(7, 3)
>>> found.terms()                                # sums over features, biases, errors: they add up
>>> found.minus(run.score(7, 6)).to_pandas(10)   # why 3 rather than 6: log of a ratio of weights
>>> run.verify(7, 3).to_pandas()                 # predicted, and measured by intervention
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.circuits.paths import Paths
from tl_bilinear.circuits.residual import EMBED
from tl_bilinear.circuits.scores import BIAS, REST, ScoreAttribution, ScoreCheck
from tl_bilinear.circuits.upstream import HEAD, as_tokens
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.passage import Passage, fires_as, refuse_attached
from tl_bilinear.models.heads import HeadCache, position_of, rotation_tables, through_norm

if TYPE_CHECKING:
    from tl_bilinear.circuits.attention import AttentionInteractions

# ---------------------------------------------------------------------- a run


class AttentionRun:
    """A head on one prompt, with its activations.

    Attributes
    ----------
    interactions: AttentionInteractions; tokens: [pos]
    scores, pattern: [pos, pos], the model's own, query x key
    """

    @torch.no_grad()
    def __init__(self, interactions: AttentionInteractions, tokens: Tensor | str) -> None:
        model = interactions.model
        refuse_attached(model)
        self.interactions = interactions
        rows = as_tokens(model, tokens)
        self.tokens = rows[0]
        sides = [
            (interactions.query, interactions.query_passage, interactions.query_direct),
            (interactions.key, interactions.key_passage, interactions.key_direct),
        ]
        hooks: set[str] = set()
        for dictionary, passage, _ in sides:
            hooks |= _needed(dictionary, passage)
        cache = HeadCache(model, interactions.layer, rows, hooks)
        self._activations = [_split(cache, *side, self.tokens) for side in sides]
        self._frame = _Frame(interactions, cache)
        self.scores = cache.attention("attn_scores")[0, interactions.head]
        self.pattern = cache.attention("pattern")[0, interactions.head]

    def __repr__(self) -> str:
        return f"AttentionRun({self.interactions!r}, {len(self.tokens)} tokens)"

    def score(self, query: int = -1, key: int = -1) -> ScoreAttribution:
        """The score of a query position and a key position, as a sum over pairs.

        Negative positions count from the end. Raises IndexError for positions that do not exist,
        ValueError for a key that is masked.
        """
        i, j = self._position(query), self._position(key)
        if not float(self.scores[i, j]) > -1e30:
            raise ValueError(f"query {i} does not see key {j}: the score is masked")
        (one, q), (other, k) = (self._rows(side, at) for side, at in ((0, i), (1, j)))
        head = self.interactions.reading
        return ScoreAttribution(
            self.interactions.layer,
            self.interactions.head,
            i,
            j,
            one.features,
            other.features,
            one.labels,
            other.labels,
            head.scale * (q @ k.T),
            self._frame.position(i, j),
            head.softcap,
            float(self.scores[i, j]),
            float(self.pattern[i, j]),
        )

    def _position(self, position: int) -> int:
        checks.require_int("a position", position)
        length = len(self.tokens)
        if not -length <= position < length:
            raise IndexError(f"position {position} does not exist: the prompt has {length} tokens")
        return position % length

    def _rows(self, side: int, at: int) -> tuple[_Rows, Tensor]:
        """The rows of a token, and what each is as a query (or key), a bias last."""
        rows = self._activations[side].at(at)
        made = self._frame.made(side, rows.vectors, at)
        if not bool(made[-1].any()):
            return rows, made[:-1]
        features = torch.cat([rows.features, rows.features.new_full((1,), REST)])
        return _Rows(rows.vectors, features, [*rows.labels, BIAS]), made

    @torch.no_grad()
    def verify(
        self,
        query: int = -1,
        key: int = -1,
        k: int = 5,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ScoreCheck:
        """Take active features out of the running model and compare with what the sum predicts.

        The k query rows, the k key rows and the k pairs of largest effect, and for each pair, as a
        control, random directions of the same lengths. A row is taken out of the activation at its
        dictionary's hook, at its token, for queries alone or for keys alone; the scales of norms are
        held.

        Raises as `score`.
        """
        found = self.score(query, key)
        i, j = found.query_position, found.key_position
        rows = [self._activations[0].at(i), self._activations[1].at(j)]
        trials: list[tuple[str, str, Tensor | None, Tensor | None]] = []
        pairs = found.pairs[: len(rows[0].vectors), : len(rows[1].vectors)]  # without biases
        for side, name, sums in ((0, "query", pairs.sum(1)), (1, "key", pairs.sum(0))):
            for row in sums.abs().topk(min(k, len(sums))).indices.tolist():
                taken_out = rows[side].vectors[row]
                both = (taken_out, None) if side == 0 else (None, taken_out)
                trials.append((name, rows[side].labels[row], *both))
        generator = checks.generator(seed)
        best = pairs.abs().flatten().topk(min(k, pairs.numel())).indices.tolist()
        for place in best:
            a, b = divmod(place, pairs.shape[1])
            taken = rows[0].vectors[a], rows[1].vectors[b]
            label = f"{rows[0].labels[a]} and {rows[1].labels[b]}"
            trials.append(("pair", label, *taken))
            drawn = [torch.randn(len(v), generator=generator, dtype=v.dtype).to(v) for v in taken]
            control = [r * v.norm() / r.norm() for r, v in zip(drawn, taken, strict=True)]
            trials.append(("random", f"of the length of {label}", *control))
        clean = self._patched(i, j, None, None)
        predicted, measured = [], []
        for _, _, one, other in tqdm(trials, unit="run", disable=not progress):
            predicted.append(self._predicted(found, i, j, one, other))
            measured.append(self._patched(i, j, one, other) - clean)
        return ScoreCheck(
            [kind for kind, *_ in trials],
            [label for _, label, *_ in trials],
            torch.tensor(predicted, dtype=torch.float64),
            torch.tensor(measured, dtype=torch.float64),
        )

    def _predicted(
        self, found: ScoreAttribution, i: int, j: int, one: Tensor | None, other: Tensor | None
    ) -> float:
        """The change of a score when a vector is taken out of the query and one out of the key."""
        (_, q), (_, k) = self._rows(0, i), self._rows(1, j)
        q, k = q.sum(0), k.sum(0)
        if one is not None:
            q = q - self._frame.made(0, one[None], i)[0]
        if other is not None:
            k = k - self._frame.made(1, other[None], j)[0]
        score = float(self.interactions.reading.scale * (q @ k)) + found.position
        return self.interactions.reading.capped(score) - found.total

    def _patched(self, i: int, j: int, one: Tensor | None, other: Tensor | None) -> float:
        """The score in a run whose queries at i, and keys at j, are made without these vectors."""
        interactions = self.interactions
        block = f"blocks.{interactions.layer}"
        held = self._held()
        sides = (
            ("q", interactions.query_passage, i, one),
            ("k", interactions.key_passage, j, other),
        )
        put: list[tuple[str, Callable[..., Any]]] = list(held)
        for name, passage, at, vector in sides:
            if vector is None:
                continue
            caught: list[Tensor] = []

            def take(value: Tensor, hook: Any, at: int = at, vector: Tensor = vector) -> Tensor:
                value = value.clone()
                value[:, at] -= vector.to(value)
                return value

            def catch(value: Tensor, hook: Any, caught: list[Tensor] = caught) -> None:
                caught.append(value.detach().clone())

            self._forward([*held, (passage.hook, take), (f"{block}.attn.hook_{name}", catch)])

            def give(
                value: Tensor, hook: Any, at: int = at, caught: list[Tensor] = caught
            ) -> Tensor:
                value = value.clone()
                value[:, at] = caught[0][:, at]
                return value

            put.append((f"{block}.attn.hook_{name}", give))
        scores: list[Tensor] = []
        put.append((f"{block}.attn.hook_attn_scores", lambda value, hook: scores.append(value)))
        self._forward(put)
        return float(scores[0][0, interactions.head, i, j])

    def _held(self) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks that hold the scales of the norms before attention, and of queries and keys."""
        interactions = self.interactions
        names = {p.scale_hook for p in (interactions.query_passage, interactions.key_passage)}
        for side, norm in (("q", interactions.reading.q_norm), ("k", interactions.reading.k_norm)):
            if norm is not None:
                names.add(f"blocks.{interactions.layer}.attn.{side}_norm.hook_scale")
        hooks = sorted(name for name in names if name is not None)
        if missing := [name for name in hooks if name not in interactions.model.hook_dict]:
            raise ValueError(
                f"a check by intervention holds the scales of norms, and the model has no "
                f"{', '.join(missing)}"
            )
        kept: dict[str, Tensor] = {}
        self._forward(
            [(name, lambda v, hook, name=name: kept.update({name: v.clone()})) for name in hooks]
        )
        return [(name, lambda value, hook, name=name: kept[name]) for name in hooks]

    def _forward(self, hooks: list[tuple[str, Callable[..., Any]]]) -> None:
        model = self.interactions.model
        model.run_with_hooks(
            self.tokens[None],
            fwd_hooks=[(fires_as(model, name), hook) for name, hook in hooks],
            return_type=None,
            stop_at_layer=self.interactions.layer + 1,
        )


def why(
    found: Paths, component: int, heads: Mapping[tuple[int, int], AttentionInteractions]
) -> ScoreAttribution:
    """Why a head attends from where `paths` looks to the source token of one of its components.

    found: of `paths(..., by="sources")`; component: one whose kind is "head"
    heads: (layer, head) to AttentionInteractions of the same model

    What the head then carries is the component itself. Raises ValueError for another component and for a
    head that is not among `heads`, IndexError for a component that there is not.
    """
    if not 0 <= component < len(found.labels):
        raise IndexError(
            f"component {component} does not exist: there are {len(found.labels)}, from 0"
        )
    layer, head, source = found.where[component].tolist()
    if found.kinds[component] != HEAD or source < 0:
        raise ValueError(
            f"component {component} ({found.labels[component]}) is not what a head brings from one "
            f"token: take one of kind 'head' of paths(..., by='sources')"
        )
    if (layer, head) not in heads:
        raise ValueError(
            f"component {component} is of head {layer}.{head}, and the heads given are "
            f"{', '.join(f'{a}.{b}' for a, b in heads)}"
        )
    return heads[layer, head].run(found.tokens).score(found.position, source)


# ---------------------------------------------------------------------- rows of a token


@dataclass(frozen=True)
class _Rows:
    """A token's activation at a hook as rows: vectors [m, d], and names; a bias has no vector."""

    vectors: Tensor
    features: Tensor
    labels: list[str]


@dataclass(frozen=True)
class _Activations:
    """A prompt's activations through a dictionary: coefficients [pos, n], and what is left, by name."""

    dictionary: Dictionary
    coefficients: Tensor
    rest: dict[str, Tensor]

    def at(self, position: int) -> _Rows:
        z = self.coefficients[position]
        active = z.nonzero()[:, 0]
        vectors = z[active, None] * self.dictionary.decoder[active].to(z)
        rest = {
            name: rows[position] for name, rows in self.rest.items() if bool(rows[position].any())
        }
        if rest:
            vectors = torch.cat([vectors, torch.stack(list(rest.values()))])
        features = torch.cat([active, active.new_full((len(rest),), REST)])
        labels = [self.dictionary.label(i) for i in active.tolist()]
        return _Rows(vectors, features, [*labels, *rest])


def _needed(dictionary: Dictionary, passage: Passage) -> set[str]:
    hooks = {passage.hook, passage.scale_hook}
    if dictionary.encode is not None:
        hooks |= {dictionary.hook, dictionary.encoder_hook}
    return {hook for hook in hooks if hook is not None}


def _split(
    cache: HeadCache, dictionary: Dictionary, passage: Passage, direct: bool, tokens: Tensor
) -> _Activations:
    """What lies at the passage's hook, through a dictionary, exactly."""
    x = at_head(cache, passage.hook)
    if dictionary.hook == EMBED and dictionary.encode is None:
        z = x.new_zeros(len(tokens), dictionary.n)
        z[torch.arange(len(tokens)), tokens] = 1
        rest = {"everything else": x - dictionary.decoder[tokens].to(x)}
        return _Activations(dictionary, z, rest)
    if dictionary.encode is None:
        raise ValueError(
            f"{dictionary!r} has directions but no activations, so that a prompt has no sum over its "
            f"features: give an SAE, embedding(model), or Dictionary(..., encode=)"
        )
    own = cache[dictionary.hook][0] if direct and dictionary.hook is not None else x
    source = dictionary.encoder_hook
    dtype = dictionary.decoder.dtype
    reads = own if source is None or source == dictionary.hook or not direct else cache[source][0]
    reading = dictionary.read(own.to(dtype), reads.to(dtype))
    z = reading.coefficients.to(x)
    rest = {name: rows.to(x).expand_as(x) for name, rows in reading.rest.items() if name != "error"}
    # Once more in float64: the error is what the rows leave.
    made = z @ dictionary.decoder.to(x) + sum(rest.values())
    rest["error"] = own - made
    if direct:
        rest["everything else"] = x - own
    return _Activations(dictionary, z, rest)


class _Frame:
    """How rows at both hooks become queries and keys in a run: all scales and positions frozen."""

    def __init__(self, interactions: AttentionInteractions, cache: HeadCache, row: int = 0) -> None:
        head = interactions.reading
        self.head = head
        self.tables = rotation_tables(head, cache)
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.scales: list[Tensor] = []
        self.own: list[Tensor | None] = []
        for side, norm, name, index in (
            ("query", head.q_norm, "q", head.head),
            ("key", head.k_norm, "k", head.key_head),
        ):
            passage = getattr(interactions, f"{side}_passage")
            weight, bias = interactions.side(side)
            every = cache.attention(name)[row]
            s = torch.ones(len(every), 1, dtype=every.dtype, device=every.device)
            if passage.scale_hook is not None:
                s = at_head(cache, passage.scale_hook, row)
            own = None if norm is None else norm.scale(every, index)
            self.weights.append((weight, bias))
            self.scales.append(s)
            self.own.append(own)
        self.norms = (head.q_norm, head.k_norm)
        self.added = position_of(head, cache)

    def made(self, side: int, vectors: Tensor, at: int) -> Tensor:
        """Vectors [m, d] at a hook as queries (0) or keys (1) [m + 1, d_head], the bias last."""
        weight, bias = self.weights[side]
        own = self.own[side]
        scale = 1.0 if own is None else float(own[at])
        rows, bias = through_norm(
            self.norms[side], vectors.to(weight) @ weight / self.scales[side][at], bias, scale
        )
        rows = torch.cat([rows, bias[None]])
        if self.head.rotary is None or self.tables is None:
            return rows
        cos, sin = self.tables
        return self.head.rotary.turn(rows, cos[at], sin[at])

    def position(self, i: int, j: int) -> float:
        """What positions add to a score themselves."""
        a, b, c = self.added
        return a * i + b * j + c


def at_head(cache: HeadCache, hook: str, row: int = 0) -> Float[Tensor, "pos d"]:
    """One sequence at a hook; where it is kept for every head (split inputs), that of the first."""
    found = cache[hook][row]
    return found[:, 0] if found.ndim == 3 else found


@torch.no_grad()
def whole_scores(
    interactions: AttentionInteractions, tokens: Tensor
) -> tuple[Float[Tensor, "pos pos"], Float[Tensor, "pos pos"]]:
    """(made, measured) scores of the first row of tokens, from activations at both hooks."""
    hooks: set[str] = set()
    for passage in (interactions.query_passage, interactions.key_passage):
        hooks |= {name for name in (passage.hook, passage.scale_hook) if name is not None}
    cache = HeadCache(interactions.model, interactions.layer, tokens, hooks)
    frame = _Frame(interactions, cache)
    sides = []
    for side, passage in enumerate((interactions.query_passage, interactions.key_passage)):
        x = at_head(cache, passage.hook)
        sides.append(
            torch.stack([frame.made(side, x[at, None], at).sum(0) for at in range(len(x))])
        )
    head = interactions.reading
    places, (a, b, c) = torch.arange(len(sides[0])).to(sides[0]), frame.added
    scores = head.scale * sides[0] @ sides[1].T + a * places[:, None] + b * places + c
    if head.softcap is not None:
        scores = head.softcap * (scores / head.softcap).tanh()
    return scores, cache.attention("attn_scores")[0, interactions.head]
