"""Names of features: from the tokens that they are active on, and in every result that names a feature.

Labels are set once, on a dictionary (`FeatureInteractions.with_labels`, `FeatureRun.labelled`). A result
holds the labels of the features that it names, and its tables show them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
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

NEVER = "never active on this text"
_TOO_FEW = {1: " (seen once)", 2: " (seen twice)"}

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


def label(tokenizer: Any, tokens: Sequence[int], before: Sequence[int | None]) -> str:
    """A name for a feature from the tokens it is most active on and the token before each.

    The token that makes up half of them, with the one before it in parentheses where that does so too;
    otherwise the three most common, separated by a stroke. A feature that was active on one or two
    tokens only says so: its name means little.
    """
    if not tokens:
        return NEVER
    few = _TOO_FEW.get(len(tokens), "")
    counted = Counter(tokens).most_common(3)
    most, times = counted[0]
    if times < SHARE * len(tokens):
        return " | ".join(plain(tokenizer, token) for token, _ in counted) + few
    earlier = Counter(b for t, b in zip(tokens, before, strict=True) if t == most and b is not None)
    for token, count in earlier.most_common(1):
        if count >= SHARE * len(tokens):
            return f"({plain(tokenizer, token)}) {plain(tokenizer, most)}{few}"
    return plain(tokenizer, most) + few


def name_features(
    tokenizer: Any, tokens: Tensor, activations: Iterable[Tensor], k: int
) -> list[str]:
    """A label for each of n features, from the tokens of its k strongest activations.

    tokens: [batch, pos]; activations: [some, pos, n] of some rows at a time, 0 where they do not count
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
    found = []
    for values, places in zip(best.T.tolist(), where.T.tolist(), strict=True):
        at = [place for value, place in zip(values, places, strict=True) if value > 0]
        before = [flat[place - 1] if place % length else None for place in at]
        found.append(label(tokenizer, [flat[place] for place in at], before))
    return found
