"""Pairs of input features on text, counted while it streams by, and ranked in three orders.

The pair (b, c) contributes ``coefficient z_b z_c`` to an output feature. From weights alone only the
coefficient is known, and the largest ones may belong to features that never meet. Its mean contribution
on a text is ``coefficient E[z_b z_c]``, and where the output feature is active the same mean over those
tokens. All three come from one pass that adds up, for every pair of features active on the same token,
how often and ``z_b z_c``: k^2/2 pairs a token for k active features.

>>> counts = features.count_pairs(tokens, [749])        # any length: one batch is held at a time
>>> ranked = features.ranked_pairs(749, counts, k=10)   # the ten first of each order
>>> ranked.to_pandas()
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.labels import Named, kinds
from tl_bilinear.results import Kind, of_kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas

    from tl_bilinear.features.interactions import FeatureInteractions
    from tl_bilinear.features.run import FeatureRun

PairOrder = Literal["weights", "text", "active"]
MAX_PAIRS = 4_000_000
"""Distinct pairs that are held at once."""
_DENSE = 2_000_000  # n^2 up to which a table of all pairs is kept


def active_pairs(
    z: Float[Tensor, "t n"],
) -> tuple[Int[Tensor, " q"], Float[Tensor, " q"], Int[Tensor, " q"]]:
    """Every pair b <= c active on a token: keys ``b n + c``, products ``z_b z_c``, and the token."""
    t, n = z.shape
    width = int((z != 0).sum(1).max()) if t else 0
    found = (z != 0).to(torch.int8).topk(width, dim=1)
    index = found.indices.sort(1).values
    values = z.gather(1, index)
    i, j = torch.triu_indices(width, width, device=z.device)
    keys, products = index[:, i] * n + index[:, j], values[:, i] * values[:, j]
    tokens = torch.arange(t, device=z.device)[:, None].expand_as(keys)
    kept = products != 0
    return keys[kept], products[kept], tokens[kept]


class PairSums:
    """Sums of c columns for each pair of n features, sparse where n^2 is large.

    Beyond `limit` distinct pairs those met least often are dropped (lossy counting): a pair's first
    column is then too small by at most `dropped`, which stays 0 where the limit is not met.
    """

    def __init__(self, n: int, columns: int, limit: int = MAX_PAIRS) -> None:
        self.n, self.limit, self.dropped = n, limit, 0
        self.dense = n * n <= min(_DENSE, limit)
        rows = n * n if self.dense else 0
        self.keys = torch.arange(rows)
        self.values = torch.zeros(rows, columns, dtype=torch.double)

    def add(self, keys: Int[Tensor, " q"], values: Float[Tensor, "q c"]) -> None:
        """Add to some pairs; a key may come many times. The first column counts."""
        keys, values = keys.cpu(), values.cpu().double()
        if self.dense:
            for column in range(values.shape[1]):
                # One column at a time: `index_add_` of rows is slow.
                self.values[:, column] += torch.bincount(
                    keys, values[:, column], minlength=self.n**2
                )
            return
        found, place = torch.cat([self.keys, keys]).unique(return_inverse=True)
        total = torch.zeros(len(found), values.shape[1], dtype=torch.double)
        total.index_add_(0, place, torch.cat([self.values, values]))
        if len(found) > self.limit:
            kept = total[:, 0].topk(self.limit // 2).indices.sort().values
            mask = torch.ones(len(found), dtype=torch.bool)
            mask[kept] = False
            self.dropped += int(total[mask, 0].max())
            found, total = found[kept], total[kept]
        self.keys, self.values = found, total

    def found(self) -> tuple[Tensor, Tensor]:
        """Keys in order and their sums, of the pairs that were met."""
        met = self.values[:, 0] > 0
        return self.keys[met], self.values[met]


@dataclass(frozen=True, eq=False)
class PairCounts(Named):
    """How often pairs of input features are active together, and their mean products.

    Activations are in units of the decoder's rows over the token's norm scale, as in an attribution.

    Attributes
    ----------
    tokens: how many tokens were read
    first, second: [p], pairs that were met, first <= second
    together: [p], on how many tokens; products: [p], sums of ``z_first z_second``; gained: [p], the same
        times what the output dictionary's normalisation multiplies by
    fired: [n], tokens on which each feature was active; sums, squares: [n], of its activations
    outputs: [m], output features; active_tokens: [m], on how many each was active
    active_together, active_gained: [m, p], the counts and sums on those tokens
    dropped: at most so many tokens of a pair are missing, because it was once dropped for memory
    space: what the input features are
    """

    tokens: int
    first: Int[Tensor, " p"]
    second: Int[Tensor, " p"]
    together: Int[Tensor, " p"]
    products: Float[Tensor, " p"]
    gained: Float[Tensor, " p"]
    fired: Int[Tensor, " n"]
    sums: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    outputs: Int[Tensor, " m"]
    active_tokens: Int[Tensor, " m"]
    active_together: Int[Tensor, "m p"]
    active_gained: Float[Tensor, "m p"]
    dropped: int = 0
    space: str | None = None

    @property
    def correlation(self) -> Float[Tensor, " p"]:
        """[p], correlation of the two activations over all tokens; NaN for one that does not vary."""
        n = max(1, self.tokens)
        means, squares = self.sums / n, self.squares / n
        variances = squares - means.square()
        one, other = self.first, self.second
        covariance = self.products / n - means[one] * means[other]
        size = (variances[one] * variances[other]).clamp_min(0).sqrt()
        return torch.where(size > 0, covariance / size, torch.nan).clamp(-1, 1)

    @classmethod
    def merged(cls, parts: Iterable[PairCounts]) -> PairCounts:
        """The counts of several texts, or of several processes' shares, together.

        Raises ValueError for none, and for parts of other dictionaries or output features.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("nothing to merge")
        first = parts[0]
        for part in parts[1:]:
            if len(part.fired) != len(first.fired) or part.space != first.space:
                raise ValueError("these are counts of pairs of other dictionaries")
            if not torch.equal(part.outputs, first.outputs):
                raise ValueError("these are counts for other output features")
        n = len(first.fired)
        sums = PairSums(n, 3 + 2 * len(first.outputs))
        for part in parts:
            columns = [part.together, part.products, part.gained]
            columns += [*part.active_together, *part.active_gained]
            sums.add(part.first * n + part.second, torch.stack([c.double() for c in columns], 1))
        return _counts(
            sums,
            tokens=sum(part.tokens for part in parts),
            outputs=first.outputs,
            active_tokens=torch.stack([part.active_tokens for part in parts]).sum(0),
            fired=torch.stack([part.fired for part in parts]).sum(0),
            sums_of=torch.stack([part.sums for part in parts]).sum(0),
            squares=torch.stack([part.squares for part in parts]).sum(0),
            dropped=sum(part.dropped for part in parts),
            space=first.space,
            like=first,
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: first, second, kind, together, mean_product, correlation, labels."""
        return self.table(
            {
                "first": self.first,
                "second": self.second,
                "kind": kinds(self.first, self.second),
                "together": self.together,
                "mean_product": self.products / max(1, self.tokens),
                "correlation": self.correlation,
            }
        )


def _counts(
    sums: PairSums,
    *,
    tokens: int,
    outputs: Tensor,
    active_tokens: Tensor,
    fired: Tensor,
    sums_of: Tensor,
    squares: Tensor,
    dropped: int,
    space: str | None,
    like: PairCounts | None = None,
) -> PairCounts:
    keys, values = sums.found()
    m = len(outputs)
    return PairCounts(
        tokens=tokens,
        first=keys // sums.n,
        second=keys % sums.n,
        together=values[:, 0].long(),
        products=values[:, 1],
        gained=values[:, 2],
        fired=fired,
        sums=sums_of,
        squares=squares,
        outputs=outputs,
        active_tokens=active_tokens,
        active_together=values[:, 3 : 3 + m].T.long(),
        active_gained=values[:, 3 + m :].T.contiguous(),
        dropped=dropped + sums.dropped,
        space=space,
        input_labels=None if like is None else like.input_labels,
        output_labels=None if like is None else like.output_labels,
    )


class PairCounter:
    """Counts pairs over runs, one after the other; `result` at any time."""

    def __init__(
        self, features: FeatureInteractions, outputs: Int[Tensor, " m"], limit: int = MAX_PAIRS
    ) -> None:
        n, m = features.inputs.n, len(outputs)
        self.features, self.outputs = features, outputs
        self.pairs = PairSums(n, 3 + 2 * m, limit)
        self.tokens = 0
        self.active_tokens = torch.zeros(m, dtype=torch.long)
        self.fired = torch.zeros(n, dtype=torch.long)
        self.sums = torch.zeros(n, dtype=torch.double)
        self.squares = torch.zeros(n, dtype=torch.double)

    @torch.no_grad()
    def add(self, run: FeatureRun) -> None:
        """The tokens of a run that count."""
        for part in run.read():
            z, gain = part.coefficients, part.gain
            on = part.run.activations(self.outputs)[part.run.mask] != 0
            self.tokens += len(z)
            self.active_tokens += on.sum(0).cpu()
            self.fired += (z != 0).sum(0).cpu()
            self.sums += z.double().sum(0).cpu()
            self.squares += z.double().square().sum(0).cpu()
            keys, products, at = active_pairs(z)
            gained = products * gain[at]
            met = on[at].to(products)
            columns = [torch.ones_like(products)[:, None], products[:, None], gained[:, None]]
            self.pairs.add(keys, torch.cat([*columns, met, met * gained[:, None]], 1))

    def result(self) -> PairCounts:
        known = self.features
        return _counts(
            self.pairs,
            tokens=self.tokens,
            outputs=self.outputs.cpu(),
            active_tokens=self.active_tokens.clone(),
            fired=self.fired.clone(),
            sums_of=self.sums.clone(),
            squares=self.squares.clone(),
            dropped=0,
            space=known.passage.hook,
        )


# ---------------------------------------------------------------------- in three orders


@dataclass(frozen=True, eq=False)
class RankedPairs(Named):
    """Pairs of input features that make an output feature, in three orders.

    Attributes
    ----------
    feature: the output feature
    first, second: [m], input features, first <= second
    coefficients: [m], what stands before ``z_first z_second``, from weights alone
    on_text: [m], mean contribution over all tokens; where_active: [m], over the tokens where the output
        feature is active
    together, together_active: [m], on how many of either both are active
    correlation: [m], of the two activations over all tokens
    ranks: [m, 3], from 1, by |coefficient|, |on_text| and |where_active|
    tokens, active_tokens: how many there were
    order: which of the three the pairs are sorted by
    """

    feature: int
    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    coefficients: Float[Tensor, " m"]
    on_text: Float[Tensor, " m"]
    where_active: Float[Tensor, " m"]
    together: Int[Tensor, " m"]
    together_active: Int[Tensor, " m"]
    correlation: Float[Tensor, " m"]
    ranks: Int[Tensor, "m 3"]
    tokens: int
    active_tokens: int
    order: PairOrder = "active"

    def top(self, k: int, *, by: PairOrder | None = None, kind: Kind = "all") -> RankedPairs:
        """The k first by another order (the one they are in), of a kind."""
        order = self.order if by is None else by
        if order not in get_args(PairOrder):
            raise ValueError(f"by must be one of {', '.join(get_args(PairOrder))}, got {by!r}")
        ranks = self.ranks[:, get_args(PairOrder).index(order)]
        chosen = of_kind(self.first, self.second, kind).nonzero()[:, 0]
        chosen = chosen[ranks[chosen].argsort(stable=True)]
        checks.require_count("k", k, len(chosen), "the pairs held")
        names = (
            *("first", "second", "coefficients", "on_text", "where_active", "together"),
            *("together_active", "correlation", "ranks"),
        )
        held = {name: getattr(self, name)[chosen[:k]] for name in names}
        return replace(self, order=order, **held)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair, in its order: the values, counts and ranks, and labels."""
        columns = {"first": self.first, "second": self.second}
        columns |= {"kind": kinds(self.first, self.second)}  # type: ignore[dict-item]
        for name in ("coefficients", "on_text", "where_active", "together", "together_active"):
            columns[name.removesuffix("s") if name == "coefficients" else name] = getattr(
                self, name
            )
        columns["correlation"] = self.correlation
        for place, name in enumerate(get_args(PairOrder)):
            columns[f"rank_{name}"] = self.ranks[:, place]
        return self.table(columns)


@torch.no_grad()
def ranked_pairs(
    features: FeatureInteractions, feature: int, counts: PairCounts, k: int, by: PairOrder
) -> RankedPairs:
    """See `FeatureInteractions.ranked_pairs`."""
    if by not in get_args(PairOrder):
        raise ValueError(f"by must be one of {', '.join(get_args(PairOrder))}, got {by!r}")
    if len(counts.fired) != features.inputs.n or counts.space != features.passage.hook:
        raise ValueError(
            f"these are counts of {len(counts.fired)} features at {counts.space}, not of "
            f"{features.inputs.n} at {features.passage.hook}"
        )
    feature = features.number(feature)
    if feature not in counts.outputs.tolist():
        raise ValueError(
            f"these counts are for the output features {counts.outputs.tolist()[:8]}, not for "
            f"{feature}: count_pairs(text, [{feature}])"
        )
    row = counts.outputs.tolist().index(feature)
    strongest = features.top(feature, k)
    n = features.inputs.n
    met = counts.first * n + counts.second
    also = (strongest.first * n + strongest.second).cpu()
    missing = also[~torch.isin(also, met)]
    keys = torch.cat([met, missing])
    first, second = keys // n, keys % n

    def filled(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(len(missing))])

    coefficients = pair_coefficients(features, feature, first, second).cpu().double()
    text = coefficients * filled(counts.gained) / max(1, counts.tokens)
    active_tokens = int(counts.active_tokens[row])
    active = coefficients * filled(counts.active_gained[row]) / max(1, active_tokens)
    orders = [_ranks(values) for values in (coefficients, text, active)]
    # Coefficients of pairs that were never met are not all here, but the k largest of all pairs are.
    kept = torch.stack(orders).le(k).any(0).nonzero()[:, 0]
    found = RankedPairs(
        feature=feature,
        first=first[kept],
        second=second[kept],
        coefficients=coefficients[kept].to(features.directions.dtype),
        on_text=text[kept].to(features.directions.dtype),
        where_active=active[kept].to(features.directions.dtype),
        together=filled(counts.together)[kept],
        together_active=filled(counts.active_together[row])[kept],
        correlation=filled(counts.correlation)[kept],
        ranks=torch.stack(orders, 1)[kept],
        tokens=counts.tokens,
        active_tokens=active_tokens,
        input_labels=features.inputs.labels_of(torch.cat([first[kept], second[kept]])),
        output_labels=features.outputs.labels_of([feature]),
    )
    return found.top(len(kept), by=by)


def _ranks(values: Tensor) -> Tensor:
    """From 1, the largest absolute value first."""
    order = values.abs().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks


def pair_coefficients(
    features: FeatureInteractions, feature: int, first: Tensor, second: Tensor
) -> Float[Tensor, " m"]:
    """What stands before ``z_first z_second`` in an output feature."""
    rows = features.input_directions
    form = features.interaction(feature, basis="activations")
    through = form.apply(rows)
    parts = zip(
        first.to(rows.device).split(65536), second.to(rows.device).split(65536), strict=True
    )
    entries = [(rows[b] * through[c]).sum(-1) for b, c in parts]
    values = torch.cat(entries) if entries else rows.new_empty(0)
    return values * torch.where(first == second, 1.0, 2.0).to(values)
