"""Tokens as people read them, and features named by the tokens they are active on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

SHARE = 0.5
"""Share of a feature's strongest tokens that one token must make up to name the feature alone."""


def pieces(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """The text of each token with the space before it, if any: joined, they read as the text.

    Numbers without a tokenizer. `tokenizer.decode` of one token loses what marks a beginning or a
    continuation of a word: a token is decoded behind itself.
    """

    @cache
    def piece(token: int) -> str:
        if tokenizer is None:
            return f" {token}"
        alone = tokenizer.decode([token])
        return str(tokenizer.decode([token, token])[len(alone) :]) or alone

    return [piece(int(token)) for token in tokens]


def label(tokenizer: Any, tokens: Sequence[int], before: Sequence[int | None]) -> str:
    """A name for a feature from the tokens it is most active on and the token before each.

    The token, where it makes up half of them, with the one before in parentheses where that does so
    as well; otherwise the three most common, parted by a stroke.
    """
    if not tokens:
        return "never active"
    counted = Counter(tokens).most_common(3)
    most, times = counted[0]
    if times < SHARE * len(tokens):
        return " | ".join(plain(tokenizer, token) for token, _ in counted)
    earlier = Counter(b for t, b in zip(tokens, before, strict=True) if t == most and b is not None)
    for token, count in earlier.most_common(1):
        if count >= SHARE * len(tokens):
            return f"({plain(tokenizer, token)}) {plain(tokenizer, most)}"
    return plain(tokenizer, most)


def plain(tokenizer: Any, token: int) -> str:
    """A token by itself, a continuation of a word marked as the tokenizer does."""
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def with_labels(table: pandas.DataFrame, labels: Sequence[str] | None) -> pandas.DataFrame:
    """A table of pairs of features b, c with the columns label_b and label_c, where there are labels."""
    if labels is None:
        return table
    return table.assign(**{f"label_{x}": [labels[i] for i in table[x]] for x in ("b", "c")})
