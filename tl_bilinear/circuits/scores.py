"""Attention scores as sums over pairs of what two tokens carry: what `AttentionRun` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.attribution import error_of, relative_error
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

BIAS = "bias"
REST = -1
"""The number of a row that is no feature."""


@dataclass(frozen=True, eq=False)
class ScoreAttribution(Result):
    """One attention score as a sum over pairs of rows of the query token and of the key token.

    Attributes
    ----------
    layer, head: whose; query_position, key_position: which score
    query_features: [m], key_features: [n], numbers of active features; -1 for the rest and the bias
    query_labels, key_labels: names of the rows; "b_dec", "error", "everything else", "bias" for the rest
    pairs: [m, n], contributions, float64
    position: what ALiBi adds (0 without)
    softcap: c of ``c tanh(s / c)``, None without
    measured: the score in the model's run; pattern: the attention weight there
    """

    _finite = ("pairs",)

    layer: int
    head: int
    query_position: int
    key_position: int
    query_features: Int[Tensor, " m"]
    key_features: Int[Tensor, " n"]
    query_labels: list[str]
    key_labels: list[str]
    pairs: Float[Tensor, "m n"]
    position: float
    softcap: float | None
    measured: float
    pattern: float

    @property
    def sum(self) -> float:
        """The sum of all contributions: the score before the soft cap."""
        return float(self.pairs.sum()) + self.position

    @property
    def total(self) -> float:
        """The score that the sum makes."""
        return self._capped(self.sum)

    def _capped(self, score: float) -> float:
        return score if self.softcap is None else self.softcap * math.tanh(score / self.softcap)

    @property
    def error(self) -> float:
        """``|total - measured|`` relative to the largest of the contributions and of the two."""
        return relative_error(self.total, self.measured, self.pairs, {"position": self.position})

    @property
    def measured_error(self) -> float:
        """``|total - measured| / |measured|``: larger than `error` where contributions cancel."""
        return error_of(self.total, self.measured)

    def effect(self, query: int | None = None, key: int | None = None) -> float:
        """How the score changes without a row of the query token, one of the key token, or both.

        Everything else, and all scales, held. Raises IndexError for a row that there is not.
        """
        for name, row, count in (
            ("query", query, len(self.pairs)),
            ("key", key, len(self.pairs.T)),
        ):
            if row is not None and not 0 <= row < count:
                raise IndexError(f"{name} row {row} does not exist: there are {count}, from 0")
        gone = torch.zeros_like(self.pairs, dtype=torch.bool)
        if query is not None:
            gone[query] = True
        if key is not None:
            gone[:, key] = True
        return self._capped(self.sum - float(self.pairs[gone].sum())) - self.total

    def terms(self) -> dict[str, float]:
        """Sums over kinds of rows, query x key, which add up to `sum`."""
        found: dict[str, float] = {}
        one, other = (_kinds(features, labels) for features, labels in self._rows)
        for kind in dict.fromkeys(one):
            rows = [i for i, each in enumerate(one) if each == kind]
            for against in dict.fromkeys(other):
                columns = [j for j, each in enumerate(other) if each == against]
                found[f"{kind} x {against}"] = float(self.pairs[rows][:, columns].sum())
        return found | ({"position": self.position} if self.position else {})

    @property
    def _rows(self) -> tuple[tuple[Tensor, list[str]], tuple[Tensor, list[str]]]:
        return (self.query_features, self.query_labels), (self.key_features, self.key_labels)

    def minus(self, other: ScoreAttribution) -> ScoreDifference:
        """This score less another one of the same head, pair by pair; see `ScoreDifference`.

        Raises ValueError for one of another head.
        """
        if (self.layer, self.head) != (other.layer, other.head):
            raise ValueError(
                f"scores of one head are compared: these are of {self.layer}.{self.head} and "
                f"{other.layer}.{other.head}"
            )
        queries = list(dict.fromkeys(self.query_labels + other.query_labels))
        keys = list(dict.fromkeys(self.key_labels + other.key_labels))
        pairs = self.pairs.new_zeros(len(queries), len(keys))
        for sign, each in ((1, self), (-1, other)):
            rows = torch.tensor([queries.index(label) for label in each.query_labels])
            columns = torch.tensor([keys.index(label) for label in each.key_labels])
            pairs[rows[:, None], columns] += sign * each.pairs
        return ScoreDifference(
            self.layer,
            self.head,
            (self.query_position, self.key_position),
            (other.query_position, other.key_position),
            queries,
            keys,
            pairs,
            self.position - other.position,
            self.total - other.total - (self.sum - other.sum),
            self.measured - other.measured,
            math.log(self.pattern / other.pattern)
            if self.query_position == other.query_position and min(self.pattern, other.pattern) > 0
            else None,
        )

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """The k pairs (all) of largest contribution: query, key, contribution, share of the score."""
        return _table(self.pairs, self.query_labels, self.key_labels, self.sum, k)

    def text(self, k: int = 10) -> str:
        """The k strongest pairs and the sums over kinds, line by line."""
        lines = [
            f"head {self.layer}.{self.head}, query {self.query_position}, key {self.key_position}: "
            f"score {self.measured:+.4f}, attention {self.pattern:.3f} (contributions sum to "
            f"{self.total:+.4f}, off by {self.measured_error:.1e} of that)"
        ]
        for row in self.to_pandas(min(k, self.pairs.numel())).to_dict("records"):
            lines.append(f"  {row['contribution']:+.4f}  {row['query']} x {row['key']}")
        lines.append("by kind, query x key:")
        lines += [f"  {value:+.4f}  {name}" for name, value in self.terms().items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class ScoreDifference(Result):
    """One score less another of the same head, as a sum over pairs; exact.

    Of two keys of one query it is the logarithm of the ratio of their attention weights, whatever the
    other scores are: what a sum over pairs says of softmax.

    Attributes
    ----------
    layer, head: whose; first, second: (query position, key position) of the two scores
    query_labels, key_labels: names of the rows of either score
    pairs: [m, n], contribution to the first less contribution to the second
    position: ALiBi's part; cap: what soft caps change of it
    measured: the difference in the model's run
    log_ratio: log of the ratio of the two attention weights there; None for two queries, or a weight of
    0
    """

    layer: int
    head: int
    first: tuple[int, int]
    second: tuple[int, int]
    query_labels: list[str]
    key_labels: list[str]
    pairs: Float[Tensor, "m n"]
    position: float
    cap: float
    measured: float
    log_ratio: float | None

    @property
    def total(self) -> float:
        """The difference that the sum makes."""
        return float(self.pairs.sum()) + self.position + self.cap

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """The k pairs (all) of largest contribution to the difference."""
        return _table(self.pairs, self.query_labels, self.key_labels, self.total, k)


@dataclass(frozen=True, eq=False)
class ScoreCheck(Result):
    """Effects of taking rows out of a score, predicted and measured by intervention.

    Attributes
    ----------
    kinds: "query", "key", "pair", or "random" for controls: a random direction of the same length
    labels: what was taken out
    predicted, measured: [m], changes of the score
    """

    kinds: list[str]
    labels: list[str]
    predicted: Float[Tensor, " m"]
    measured: Float[Tensor, " m"]

    @property
    def difference(self) -> float:
        """The largest ``|predicted - measured|`` relative to the largest effect."""
        size = max(float(self.predicted.abs().max()), float(self.measured.abs().max()))
        return float((self.predicted - self.measured).abs().max()) / size if size else 0.0

    @property
    def against_random(self) -> float:
        """Mean size of the features' measured effects over that of the random directions."""
        control = torch.tensor([kind == "random" for kind in self.kinds])
        size = float(self.measured[control].abs().mean())
        return float(self.measured[~control].abs().mean()) / size if size else math.inf

    def to_pandas(self) -> pandas.DataFrame:
        """One row an intervention: kind, what was taken out, predicted, measured."""
        import pandas as pd

        return pd.DataFrame(
            {
                "kind": self.kinds,
                "removed": self.labels,
                "predicted": self.predicted.tolist(),
                "measured": self.measured.tolist(),
            }
        )


# ---------------------------------------------------------------------- tables


def _kinds(features: Tensor, labels: list[str]) -> list[str]:
    return [
        "features" if feature != REST else label
        for feature, label in zip(features.tolist(), labels, strict=True)
    ]


def _table(
    pairs: Tensor, query_labels: list[str], key_labels: list[str], total: float, k: int | None
) -> pandas.DataFrame:
    import pandas as pd

    count = pairs.numel() if k is None else checks.require_count("k", k, pairs.numel(), "the pairs")
    chosen = pairs.abs().flatten().topk(count).indices
    rows, columns = (chosen // pairs.shape[1]).tolist(), (chosen % pairs.shape[1]).tolist()
    values = pairs.flatten()[chosen]
    return pd.DataFrame(
        {
            "query": [query_labels[i] for i in rows],
            "key": [key_labels[j] for j in columns],
            "contribution": values.tolist(),
            "share": (values / (total or math.nan)).tolist(),
        }
    )
