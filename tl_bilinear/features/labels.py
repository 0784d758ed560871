"""Names of features: from the tokens that they are active on, and in every result that names a feature.

Labels are set once, on a dictionary (`FeatureInteractions.with_labels`, `FeatureRun.labelled`). A result
holds the labels of the features that it names, and its tables show them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

SHARE = 0.5
"""Share of a feature's strongest tokens that one token must make up to name the feature alone."""

LIFT = 2.0
"""How much more common than everywhere a token must be where a feature is active."""

COMMON = 0.01
"""Share of a text from which a token is too common to name a feature by itself."""

NEAR = 9
"""How far in front of a token words are looked for."""

PRIOR = 10.0
"""Places at the base rate that are added to those seen."""

FEW = 10
"""Places below which a label says how few they were."""

NEVER = "never active on this text"
NOTHING = "no token in particular"

Labels = dict[int, str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Named(Result):
    """A result that names features.

    Attributes
    ----------
    input_labels, output_labels: names of the features held, by number; None where there are none
    """

    input_labels: Labels | None = field(default=None, repr=False)
    output_labels: Labels | None = field(default=None, repr=False)

    def output_name(self, feature: int) -> str:
        """An output feature's number, and its label where it has one."""
        labels = self.output_labels or {}
        return f"{feature} {labels[feature]}" if feature in labels else str(feature)

    def table(
        self,
        columns: dict[str, Any],
        inputs: Sequence[str] = ("first", "second"),
        outputs: Sequence[str] = (),
    ) -> pandas.DataFrame:
        """Columns as a table, with a column of labels for each that numbers features.

        ``label_first`` for the column "first", ``label`` for the column "feature".
        """
        import pandas as pd

        found = {name: _plain_column(values) for name, values in columns.items()}
        for labels, names in ((self.input_labels, inputs), (self.output_labels, outputs)):
            if labels is None:
                continue
            for name in names:
                column = "label" if name == "feature" else f"label_{name}"
                found[column] = [labels[int(i)] for i in found[name]]
        return pd.DataFrame(found)


def _plain_column(values: Any) -> Any:
    return values.detach().flatten().cpu().numpy() if isinstance(values, Tensor) else values


def kinds(first: Tensor, second: Tensor) -> list[str]:
    """ "self" or "cross", of each pair."""
    return ["self" if same else "cross" for same in (first == second).flatten().tolist()]


# ---------------------------------------------------------------------- tokens as text


def pieces(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """The text of each token with the space before it, if any: joined, they read as the text.

    Numbers without a tokenizer. `tokenizer.decode` of a single token loses what marks the beginning or
    the continuation of a word, so each token is decoded behind itself.
    """

    @cache
    def piece(token: int) -> str:
        if tokenizer is None:
            return f" {token}"
        alone = tokenizer.decode([token])
        return str(tokenizer.decode([token, token])[len(alone) :]) or alone

    return [piece(int(token)) for token in tokens]


def special_tokens(tokenizer: Any, left_out: Any) -> set[int]:
    """The tokens that an SAE was not trained on: SAELens says which, or True for the tokenizer's."""
    if left_out is True:
        return set(getattr(tokenizer, "all_special_ids", ()))
    return set(left_out or ())


def plain(tokenizer: Any, token: int) -> str:
    """A token by itself, a continuation of a word marked as the tokenizer does."""
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


# ---------------------------------------------------------------------- naming features


def distinguishing(
    seen: Counter[int], of: int, base: Mapping[int, float], *, least: float, lift: float
) -> list[int]:
    """The tokens that tell some places from others, the one that tells most first.

    Parameters
    ----------
    seen: on how many of the places each token is found
    of: how many places there are
    base: its share everywhere
    least: the smallest share of the places that counts, of at least 2 of them
    lift: how much more common it must be there than everywhere

    By ``p log(p / q)``, with q the share everywhere and p the share on the places, drawn towards q by
    `PRIOR` places more. A token that is everywhere has no lift, one that is rare everywhere and met
    here once or twice has little p.
    """
    scores = {}
    for token, count in seen.items():
        q = max(base.get(token, 0.0), 1e-9)
        p = (count + PRIOR * q) / (of + PRIOR)
        enough = count >= min(2, of) and count >= least * of
        if enough and count / of >= lift * q:
            scores[token] = p * math.log(p / q)
    return sorted(scores, key=lambda token: -scores[token])


def label(
    tokenizer: Any,
    tokens: Sequence[int | None],
    before: Sequence[int | None],
    near: Sequence[Set[int]] = (),
    base: Mapping[int, float] | None = None,
    special: Set[int] = frozenset(),
) -> str:
    """A name for a feature from the places in a text where it is most active.

    Parameters
    ----------
    tokens: the token at each place; before: the one in front of it, None where there is none
    near: of each place, the tokens further in front of it, `NEAR` of them
    base: share of each token in the whole text
    special: tokens that are no text, such as [BOS]; they name nothing unless they are all there is

    The token that is there on at least half of the places and more often than elsewhere, with the one
    before it in parentheses where that is so too: ``happy``, ``(not) happy``. Otherwise up to three
    tokens that are there more often than elsewhere: ``happy | glad``. A token that is common everywhere
    says little by itself: two or three that together stand before it on half of the places are named,
    ``(took | made) a``, or the words that distinguish what stands further in front follow,
    ``. after sad cry``. Few places are counted: ``(seen 3 times)``.
    """
    if not tokens:
        return NEVER
    n, rates = len(tokens), base or {}
    few = {1: " (seen once)", 2: " (seen twice)"}.get(n, f" (seen {n} times)" if n < FEW else "")

    def word(token: int) -> str:
        return plain(tokenizer, token)

    if any(token not in special for token in tokens):
        tokens = [None if token in special else token for token in tokens]
        before = [None if token in special else token for token in before]
        near = [window - special for window in near]
    counted = Counter(token for token in tokens if token is not None)
    found = distinguishing(counted, n, rates, least=0.1, lift=LIFT)[:3]
    single = found[:1] if found and counted[found[0]] >= SHARE * n else []
    name = " | ".join(map(word, single or found))
    if single:
        earlier = Counter(
            b for t, b in zip(tokens, before, strict=True) if t == single[0] and b is not None
        )
        for token in distinguishing(earlier, n, rates, least=SHARE, lift=LIFT)[:1]:
            return f"({word(token)}) {name}{few}"
        often = distinguishing(earlier, n, rates, least=0.15, lift=LIFT)[:3]
        together = sum(earlier[token] for token in often)
        if not few and together >= SHARE * n and rates.get(single[0], 0) >= COMMON:
            return f"({' | '.join(map(word, often))}) {name}"
    if few:  # too few to tell chance from habit: what was seen is said, and how often
        raw = [token for token, _ in counted.most_common(3)]
        return (name or " | ".join(map(word, raw))) + few
    common = [token for token in single or found if rates.get(token, 0) >= COMMON]
    if near and (not found or common):
        windows = Counter(token for window in near for token in window)
        wide = {token: min(1.0, NEAR * rate) for token, rate in rates.items()}
        said = distinguishing(windows, n, wide, least=0.3, lift=LIFT)[:2]
        if said:
            name = f"{name or 'anything'} after {' '.join(map(word, said))}"
    return name or NOTHING


def name_features(
    tokenizer: Any, tokens: Tensor, activations: Iterable[Tensor], k: int, mask: Tensor
) -> list[str]:
    """A label for each of n features, from the tokens of its k strongest activations.

    tokens: [batch, pos]; activations: [some, pos, n] of some rows at a time, 0 where they do not count;
    mask: [batch, pos], the tokens that count, whose shares are the base rates
    """
    best: Tensor | None = None  # [k, n], strongest activations so far, and where
    where = torch.empty(0)
    seen = 0
    for z in activations:
        z = z.flatten(0, 1)
        strongest = z.topk(min(k, len(z)), dim=0)
        values, places = strongest.values, strongest.indices.cpu() + seen
        if best is not None:
            values, places = torch.cat([best, values]), torch.cat([where, places])
        best, order = values.topk(min(k, len(values)), dim=0)
        where = places.gather(0, order.cpu())
        seen += len(z)
    assert best is not None  # there is at least one sequence
    length, flat = tokens.shape[1], tokens.flatten().tolist()
    counted, times = tokens[mask].unique(return_counts=True)
    shares = (times / max(1, int(times.sum()))).tolist()
    base = dict(zip(counted.tolist(), shares, strict=True))
    special = special_tokens(tokenizer, True)
    found = []
    for values, places in zip(best.T.tolist(), where.T.tolist(), strict=True):
        at = [place for value, place in zip(values, places, strict=True) if value > 0]
        before = [flat[place - 1] if place % length else None for place in at]
        near = [set(flat[place - min(NEAR, place % length) : max(0, place - 1)]) for place in at]
        found.append(label(tokenizer, [flat[place] for place in at], before, near, base, special))
    return found
