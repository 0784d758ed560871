"""How near an approximate layer comes, for every kind of token and not only for a few large ones.

Some layers write *massive activations*: at a few tokens, often the first, the output is hundreds of
times larger than at the others (Sun et al. 2024, arXiv:2402.17762). Those few then carry most of the
variance, and the variance explained says how they are met, and nothing about the rest. So they are
found and kept apart, and the score is given in several ways, of which the worst decides.

A token is massive where its output lies more than twenty times as far from the median output as the
median token's does, if at most one token in a hundred does and these carry a tenth of the variance or
more. Where more tokens do, the layer is heavy-tailed: none is left out, and the median token and the
groups say what the overall number hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas as pd

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles over tokens that a `Fidelity` holds."""

_BEYOND = 20.0  # times the median distance: a massive token
_AT_LEAST = 0.1  # of the variance: with less they decide nothing
_AT_MOST = 0.01  # of the tokens: more are no exception
_CENTRE_ROWS = 4096  # that the median output is taken over
_BLOCK = 4096  # inputs a product


@dataclass(frozen=True, eq=False)
class Massive(Result):
    """The massive tokens among some inputs.

    Attributes
    ----------
    rows: [m], which of the inputs (all of them, in the order given)
    places: [m, 2], their sequence and position, where the inputs come from a model's run on tokens
    share: of the outputs' sum of squares around their median, carried by these tokens
    centre: [d_out], the median output
    limit: distance from the centre beyond which an output is massive
    largest, median: of the distances
    n: number of inputs
    """

    rows: Int[Tensor, " m"]
    share: float
    centre: Float[Tensor, " d_out"]
    limit: float
    largest: float
    median: float
    n: int
    places: Int[Tensor, "m 2"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not len(self):
            return f"no massive tokens among {self.n:,}"
        named = (
            self.rows.tolist() if self.places is None else list(map(tuple, self.places.tolist()))
        )
        what = "inputs" if self.places is None else "(sequence, position)"
        more = ", ..." if len(self) > 4 else ""
        return (
            f"{len(self):,} massive of {self.n:,} tokens carry {self.share:.0%} of the variance "
            f"(norm up to {self.largest:.4g}, median {self.median:.4g}): {what} "
            f"{', '.join(map(str, named[:4]))}{more}"
        )

    def beyond(self, y: Float[Tensor, "... d_out"]) -> Tensor:
        """[...], which outputs lie beyond the limit."""
        return (y - self.centre.to(y)).norm(dim=-1) > self.limit


@dataclass(frozen=True, eq=False)
class Fidelity(Result):
    """The share of the output's variance explained, ``1 - E|f - f'|^2 / E|f - E f|^2``, in several ways.

    Attributes
    ----------
    overall: over all tokens
    ordinary: without the massive ones
    quantiles: [5], over ordinary tokens at `LEVELS`, of each token's
        ``1 - |f - f'|^2 / |f - E f|^2``; the one in the middle is the median token
    groups: by group of text, its ordinary tokens around their own mean
    massive: the tokens kept apart
    loss_added: nats a token when the model runs with this layer replaced alone; None if not asked for
    """

    overall: float
    ordinary: float
    quantiles: Float[Tensor, " 5"]
    groups: dict[str, float]
    massive: Massive
    loss_added: float | None = None

    @property
    def median(self) -> float:
        """What is explained of the median token."""
        return float(self.quantiles[LEVELS.index(0.5)])

    def scores(self) -> dict[str, float]:
        """Every score by the words for what it is a score of."""
        apart = {"the ordinary tokens": self.ordinary} if len(self.massive) else {}
        return {
            "all tokens": self.overall,
            **apart,
            "the median token": self.median,
            **{f"the group {name!r}": value for name, value in self.groups.items()},
        }

    @property
    def worst(self) -> tuple[str, float]:
        """What is explained worst, and how much of it."""
        # NaN counts as the worst of all.
        return min(
            self.scores().items(), key=lambda one: -math.inf if math.isnan(one[1]) else one[1]
        )

    def __str__(self) -> str:
        listed = ", ".join(f"{value:.1%} of {name}" for name, value in self.scores().items())
        found = f"; {self.massive}" if len(self.massive) else ""
        loss = "" if self.loss_added is None else f"; loss {self.loss_added:+.4f} nats a token"
        return f"explains {listed}{found}{loss}"

    def to_pandas(self) -> pd.DataFrame:
        """One row a score: of, explained. The quantiles come last."""
        import pandas as pd

        rows = list(self.scores().items())
        rows += [
            (f"token at {level:.0%}", float(value))
            for level, value in zip(LEVELS, self.quantiles, strict=True)
        ]
        return pd.DataFrame(rows, columns=["of", "explained"])


def find_massive(
    layer: Callable[[Tensor], Tensor], x: Float[Tensor, "n d_in"], *, find: bool = True
) -> tuple[Massive, Float[Tensor, " n"]]:
    """The massive tokens among inputs, and every output's distance from the median output.

    find: False where no token can be massive; the distances are measured all the same
    """
    some = x[:: math.ceil(len(x) / _CENTRE_ROWS)]
    centre = layer(some).median(0).values
    far = torch.cat([(layer(block) - centre).norm(dim=-1) for block in x.split(_BLOCK)])
    typical = far.median()
    rows = (far > _BEYOND * typical).nonzero()[:, 0]
    total = far.square().sum()
    share = float(far[rows].square().sum() / total) if total > 0 else 0.0
    few = len(rows) <= max(1, _AT_MOST * len(x))
    if not (find and few and typical > 0 and share >= _AT_LEAST):
        rows, share = rows[:0], 0.0
    found = Massive(
        rows, share, centre, _BEYOND * float(typical), float(far.amax()), float(typical), len(x)
    )
    return found, far


def fidelity(
    layer: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n d_in"],
    massive: Massive,
    groups: Sequence[tuple[str, int]] = (),
) -> Fidelity:
    """How much of `layer` the `other` explains on inputs.

    groups: (name, how many inputs), in their order; they add up to n. A single one is no group.
    """
    y = torch.cat([layer(block) for block in x.split(_BLOCK)])
    wrong = torch.cat(
        [
            (one - other(block)).square().sum(-1)
            for one, block in zip(y.split(_BLOCK), x.split(_BLOCK), strict=True)
        ]
    )
    kept = torch.ones(len(y), dtype=torch.bool, device=y.device)
    if len(massive) and not massive.beyond(y).all():
        kept = ~massive.beyond(y)
    centred = (y - y[kept].mean(0)).square().sum(-1)[kept]
    ratio = wrong[kept] / centred
    # A token whose output is the mean, reproduced, is explained.
    each = 1 - torch.where(wrong[kept] == 0, torch.zeros_like(ratio), ratio)
    by_group = {}
    if len(groups) > 1:
        parts = zip(*(one.split([n for _, n in groups]) for one in (y, wrong, kept)), strict=True)
        for (name, _), (some, errors, use) in zip(groups, parts, strict=True):
            by_group[name] = _explained(some[use], errors[use]) if use.any() else math.nan
    return Fidelity(
        overall=_explained(y, wrong),
        ordinary=_explained(y[kept], wrong[kept]),
        quantiles=torch.quantile(
            each.double(), torch.tensor(LEVELS).to(each.device, torch.float64)
        ),
        groups=by_group,
        massive=massive,
    )


def _explained(y: Float[Tensor, "n d_out"], wrong: Float[Tensor, " n"]) -> float:
    variance = (y - y.mean(0)).square().sum()
    if variance <= 0:
        return 1.0 if wrong.sum() == 0 else -math.inf
    return float(1 - wrong.sum() / variance)
