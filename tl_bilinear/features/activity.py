"""Features on data: low-rank approximations, active interactions, examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.features.running import Run
from tl_bilinear.features.text import label, pieces, plain, with_labels
from tl_bilinear.tensor import _checks
from tl_bilinear.tensor._top import BLOCK_ELEMENTS
from tl_bilinear.tensor.storage import Storable

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.dictionary import Dictionary
    from tl_bilinear.features.interactions import FeatureInteractions
    from tl_bilinear.tensor.interaction import Kind


@dataclass(frozen=True, eq=False)
class LowRankCorrelation(Storable):
    """How well k eigenvectors of an output feature predict its pre-activation (Fig. 9).

    Attributes
    ----------
    features: [m], output features
    everywhere: [m, K], correlation over all tokens, with 1 to K eigenvectors; NaN where one is constant
    active: [m, K], over the tokens on which the feature is active
    counts: [m], how many those are
    tokens: how many tokens there were
    """

    features: Int[Tensor, " m"]
    everywhere: Float[Tensor, "m K"]
    active: Float[Tensor, "m K"]
    counts: Int[Tensor, " m"]
    tokens: int

    def enough(self, min_active: int) -> Bool[Tensor, " m"]:
        """[m], features active on at least so many tokens, with a correlation."""
        return (self.counts >= min_active) & ~self.active.isnan().any(1)

    def mean_active(self, min_active: int = 10) -> Float[Tensor, " K"]:
        """[K], mean active-only correlation with 1 to K eigenvectors (Fig. 9A)."""
        return self.active[self.enough(min_active)].mean(0)

    def mean_everywhere(self, min_active: int = 10) -> Float[Tensor, " K"]:
        """[K], mean correlation of the same features over all tokens, with 1 to K eigenvectors."""
        return self.everywhere[self.enough(min_active)].nanmean(0)

    def share_above(self, threshold: float = 0.75, *, rank: int = 2, min_active: int = 10) -> float:
        """Share of features whose active-only correlation with `rank` eigenvectors is above `threshold`.

        It depends strongly on `min_active`: with few samples correlations are noisy. Report both.
        """
        _checks.require_count("rank", rank, self.active.shape[1], "the ranks held")
        chosen = self.active[self.enough(min_active), rank - 1]
        return float((chosen > threshold).double().mean()) if len(chosen) else float("nan")

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature: feature, active tokens, active_k and everywhere_k for each rank."""
        import pandas as pd

        columns = {"feature": self.features.tolist(), "active_tokens": self.counts.tolist()}
        for name, values in (("active", self.active), ("everywhere", self.everywhere)):
            for rank in range(values.shape[1]):
                columns[f"{name}_{rank + 1}"] = values[:, rank].tolist()
        return pd.DataFrame(columns)


@dataclass(frozen=True, eq=False)
class ActivationScatter(Storable):
    """An output feature's pre-activation beside its low-rank approximation, token by token (Fig. 9C).

    Attributes
    ----------
    feature, k: the output feature, and how many eigenvectors approximate it
    measured, approximation: [tokens]
    active: [tokens], whether the feature is active
    """

    feature: int
    k: int
    measured: Float[Tensor, " tokens"]
    approximation: Float[Tensor, " tokens"]
    active: Bool[Tensor, " tokens"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a token."""
        import pandas as pd

        return pd.DataFrame(
            {
                "measured": self.measured.cpu().numpy(),
                "approximation": self.approximation.cpu().numpy(),
                "active": self.active.cpu().numpy(),
            }
        )


@dataclass(frozen=True, eq=False)
class ActiveInteractions(Storable):
    """The interactions that made an output feature on the tokens where it was active (section 3.1).

    Attributes
    ----------
    feature: the output feature
    rows, columns: [m], pairs of input features met together, rows <= columns, largest total first
    counts: [m], on how many tokens
    means: [m], contribution of the pair, averaged over all tokens that were looked at
    spread: [m], its root mean square over the tokens where the pair was active
    tokens: how many tokens were looked at
    pairs_per_token: active pairs, on average
    preactivation: the feature's mean pre-activation on these tokens
    """

    feature: int
    rows: Int[Tensor, " m"]
    columns: Int[Tensor, " m"]
    counts: Int[Tensor, " m"]
    means: Float[Tensor, " m"]
    spread: Float[Tensor, " m"]
    tokens: int
    pairs_per_token: float
    preactivation: float

    @property
    def explained(self) -> float:
        """Share of the mean pre-activation that comes from pairs of features."""
        return float(self.means.sum()) / self.preactivation if self.preactivation else float("nan")

    def top(self, k: int, *, kind: Kind = "all") -> ActiveInteractions:
        """The first k pairs, of a kind: "self", "cross" or both."""
        own = self.rows == self.columns
        kinds = {"all": own | ~own, "self": own, "cross": ~own}
        if kind not in kinds:
            raise ValueError(f"kind must be 'all', 'self' or 'cross', got {kind!r}")
        chosen = kinds[kind].nonzero()[:, 0]
        _checks.require_count("k", k, len(chosen), "the pairs held")
        names = ("rows", "columns", "counts", "means", "spread")
        return replace(self, **{name: getattr(self, name)[chosen[:k]] for name in names})

    def to_pandas(self, labels: Sequence[str] | None = None) -> pandas.DataFrame:
        """One row a pair: b, c, kind, tokens, mean and rms contribution.

        `labels`, a name for each input feature, adds the columns label_b and label_c.
        """
        import pandas as pd

        table = pd.DataFrame(
            {
                "b": self.rows.tolist(),
                "c": self.columns.tolist(),
                "kind": ["self" if s else "cross" for s in (self.rows == self.columns).tolist()],
                "tokens": self.counts.tolist(),
                "mean": self.means.tolist(),
                "rms_when_active": self.spread.tolist(),
            }
        )
        return with_labels(table, labels)


@dataclass(frozen=True, eq=False)
class Examples(Storable):
    """Sequences on which a feature is most active, one for each, strongest first.

    Attributes
    ----------
    feature: the feature; side: "input" or "output"
    sequences: [k], rows of the tokens given; positions: [k], where it is strongest
    values: [k], its activation there
    tokens: [k, pos]; strengths: [k, pos], its activation on every token
    """

    feature: int
    side: str
    sequences: Int[Tensor, " k"]
    positions: Int[Tensor, " k"]
    values: Float[Tensor, " k"]
    tokens: Int[Tensor, "k pos"]
    strengths: Float[Tensor, "k pos"]

    def to_pandas(self, tokenizer: Any = None, window: int = 10) -> pandas.DataFrame:
        """One row an example: sequence, position, value, and the text around it, the token in [[ ]]."""
        import pandas as pd

        texts = []
        for row, position in zip(self.tokens.tolist(), self.positions.tolist(), strict=True):
            words = pieces(tokenizer, row)
            space = " " * words[position].startswith(" ")
            words[position] = f"{space}[[{words[position].strip()}]]"
            texts.append("".join(words[max(0, position - window) : position + window + 1]).strip())
        return pd.DataFrame(
            {
                "sequence": self.sequences.tolist(),
                "position": self.positions.tolist(),
                "activation": self.values.tolist(),
                "text": texts,
            }
        )


@dataclass(frozen=True, eq=False)
class PromotedTokens(Storable):
    """Tokens whose logits a direction raises and lowers most, before the last norm's scale.

    Attributes
    ----------
    promoted, suppressed: [k], token ids; raised, lowered: [k], change of their logits
    words: name of each, promoted first
    """

    promoted: Int[Tensor, " k"]
    raised: Float[Tensor, " k"]
    suppressed: Int[Tensor, " k"]
    lowered: Float[Tensor, " k"]
    words: list[str]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a rank."""
        import pandas as pd

        k = len(self.promoted)
        return pd.DataFrame(
            {
                "promoted": self.words[:k],
                "raised": self.raised.tolist(),
                "suppressed": self.words[k:],
                "lowered": self.lowered.tolist(),
            }
        )


# ---------------------------------------------------------------------- computing them


class _Correlation:
    """Running sums of a variable [m] and K approximations of it [m, K], for their correlation."""

    def __init__(self, m: int, ranks: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n, self.p, self.pp = zeros(m, 1), zeros(m, 1), zeros(m, 1)
        self.q, self.qq, self.pq = zeros(m, ranks), zeros(m, ranks), zeros(m, ranks)

    def add(self, p: Tensor, q: Tensor, weight: Tensor) -> None:
        """p [t, m], q [t, m, K], weight [t, m] of zeros and ones."""
        p, q, weight = p.double()[..., None], q.double(), weight.double()[..., None]
        self.n += weight.sum(0)
        self.p += (weight * p).sum(0)
        self.pp += (weight * p * p).sum(0)
        self.q += (weight * q).sum(0)
        self.qq += (weight * q * q).sum(0)
        self.pq += (weight * p * q).sum(0)

    def value(self) -> Tensor:
        covariance = self.n * self.pq - self.p * self.q
        variances = (self.n * self.pp - self.p**2) * (self.n * self.qq - self.q**2)
        found = covariance / variances.clamp_min(0).sqrt()
        return found.where(found.isfinite(), torch.nan).clamp(-1, 1)


@torch.no_grad()
def low_rank(
    self: FeatureInteractions, tokens: Any, features: Tensor, k: int, skip: int, batch: int,
    progress: bool,
) -> LowRankCorrelation:  # fmt: skip
    spectra = self.layer_tensor.interaction(self.directions[features]).eigh(k)
    m = len(features)
    everywhere, active = (_Correlation(m, k, features.device) for _ in range(2))
    total = 0
    for run in _each(self, tokens, batch, progress):
        x, p, on = _flat(self, run, features, skip)
        total += len(x)
        gain = run.output_scale[:, skip:].flatten()
        step = max(1, BLOCK_ELEMENTS // max(1, m * k))
        for part in torch.arange(len(x), device=x.device).split(step):
            approximations = spectra.activations(x[part]).cumsum(-1) * gain[part, None, None]
            everywhere.add(p[part], approximations, torch.ones_like(p[part]))
            active.add(p[part], approximations, on[part])
    return LowRankCorrelation(
        features, everywhere.value(), active.value(), active.n[:, 0].long(), total
    )


@torch.no_grad()
def scatter(
    self: FeatureInteractions, tokens: Any, feature: int, k: int, skip: int, batch: int
) -> ActivationScatter:
    index = torch.as_tensor([int(self._features(feature))], device=self.directions.device)
    spectrum = self.layer_tensor.interaction(self.directions[index[0]]).eigh(k)
    measured, near, active = [], [], []
    for run in _each(self, tokens, batch, False):
        x, p, on = _flat(self, run, index, skip)
        measured.append(p[:, 0])
        near.append(spectrum.quadratic(x) * run.output_scale[:, skip:].flatten())
        active.append(on[:, 0])
    return ActivationScatter(
        int(index[0]), k, torch.cat(measured), torch.cat(near), torch.cat(active)
    )


@torch.no_grad()
def active_interactions(
    self: FeatureInteractions, tokens: Any, feature: int, skip: int, batch: int, limit: int,
    progress: bool,
) -> ActiveInteractions:  # fmt: skip
    index = torch.as_tensor([int(self._features(feature))], device=self.directions.device)
    form = self.interaction(int(index[0]), basis="activations").dense()
    n = self.inputs.n
    keys: list[Tensor] = []
    values: list[Tensor] = []
    sums, seen = 0.0, 0
    for run in _each(self, tokens, batch, progress):
        _, p, on = _flat(self, run, index, skip)
        where = on[:, 0].nonzero()[:, 0][: limit - seen]
        seen += len(where)
        sums += float(p[where, 0].sum())
        chosen = run.activations[:, skip:].flatten(0, 1)[where]
        source = None if run.source is None else run.source[:, skip:].flatten(0, 1)[where]
        z = self.inputs.read(chosen, source).coefficients
        gain = run.output_scale[:, skip:].flatten()[where]
        z = z / run.scale[:, skip:].flatten()[where, None]
        for row, factor in zip(z, gain, strict=True):
            on_here = row.nonzero()[:, 0]
            rows = row[on_here, None] * self.input_directions[on_here].to(row)
            block = factor * (rows @ form.to(row) @ rows.T)
            i, j = torch.triu_indices(len(on_here), len(on_here), device=row.device)
            keys.append(on_here[i] * n + on_here[j])
            values.append(block[i, j] * torch.where(i == j, 1.0, 2.0))
        if seen >= limit:
            break
    joined = torch.cat(keys) if keys else torch.empty(0, dtype=torch.long, device=index.device)
    amounts = (torch.cat(values) if values else form.new_empty(0)).double()
    pairs, place, counts = joined.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(pairs), dtype=torch.float64, device=index.device)
    squares = total.clone()
    total.index_add_(0, place, amounts)
    squares.index_add_(0, place, amounts.square())
    order = total.abs().argsort(descending=True, stable=True)
    pairs, counts, total, squares = (part[order] for part in (pairs, counts, total, squares))
    return ActiveInteractions(
        feature=int(index[0]),
        rows=pairs // n,
        columns=pairs % n,
        counts=counts,
        means=(total / max(1, seen)).to(form.dtype),
        spread=(squares / counts.clamp_min(1)).sqrt().to(form.dtype),
        tokens=seen,
        pairs_per_token=len(joined) / max(1, seen),
        preactivation=sums / max(1, seen),
    )


@torch.no_grad()
def examples(
    self: FeatureInteractions, tokens: Any, feature: int, k: int, side: str, skip: int, batch: int
) -> Examples:
    count = side_of(self, side).n
    if not 0 <= feature < count:
        raise IndexError(f"{side} features are 0 to {count - 1}, got {feature}")
    strengths = []
    rows = []
    for run in _each(self, tokens, batch, False):
        z = _activations(self, run, side, torch.tensor([feature]))[..., 0]
        z[:, :skip] = 0
        strengths.append(z)
        rows.append(run.tokens)
    every, text = torch.cat(strengths), torch.cat(rows)
    largest = every.max(1)
    best = largest.values.topk(min(k, len(every))).indices
    best = best[largest.values[best] > 0]
    return Examples(
        feature,
        side,
        best,
        largest.indices[best],
        largest.values[best],
        text[best],
        every[best],
    )


@torch.no_grad()
def labels(
    self: FeatureInteractions, tokens: Any, side: str, k: int, skip: int, batch: int, progress: bool
) -> list[str]:
    n = side_of(self, side).n
    best: Tensor | None = None  # [k, n], strongest activations so far, and where
    where = torch.empty(0, n, dtype=torch.long)
    rows: list[Tensor] = []
    seen = 0
    for run in _each(self, tokens, batch, progress):
        z = _activations(self, run, side)
        z[:, :skip] = 0
        z = z.flatten(0, 1)
        strongest = z.topk(min(k, len(z)), dim=0)
        values, places = strongest.values, strongest.indices.cpu() + seen
        if best is not None:
            values, places = torch.cat([best, values]), torch.cat([where, places])
        best, order = values.topk(min(k, len(values)), dim=0)
        where = places.gather(0, order.cpu())
        rows.append(run.tokens.cpu())
        seen += len(z)
    text = torch.cat(rows)
    length, flat = text.shape[1], text.flatten().tolist()
    assert best is not None  # there is at least one sequence
    found = []
    for values, places in zip(best.T.tolist(), where.T.tolist(), strict=True):
        at = [place for value, place in zip(values, places, strict=True) if value > 0]
        before = [flat[place - 1] if place % length else None for place in at]
        found.append(label(self.model.tokenizer, [flat[place] for place in at], before))
    return found


def promoted(self: FeatureInteractions, row: Tensor, k: int) -> PromotedTokens:
    weights = self.model.W_U.detach()
    norm = getattr(getattr(self.model, "ln_final", None), "w", None)
    row = row.to(weights)
    logits = (row if norm is None else row * norm.detach()) @ weights
    k = min(k, len(logits))
    up, down = logits.topk(k), logits.topk(k, largest=False)
    tokenizer = self.model.tokenizer
    words = [plain(tokenizer, t) for t in [*up.indices.tolist(), *down.indices.tolist()]]
    return PromotedTokens(up.indices, up.values, down.indices, down.values, words)


def side_of(self: FeatureInteractions, side: str) -> Dictionary:
    """The input or the output dictionary; ValueError for anything else."""
    if side not in ("input", "output"):
        raise ValueError(f"side must be 'input' or 'output', got {side!r}")
    return self.inputs if side == "input" else self.outputs


def _activations(
    self: FeatureInteractions, run: Run, side: str, features: Tensor | None = None
) -> Tensor:
    """Activations of features (all) of either side, [batch, pos, m], to be changed at will."""
    if side == "output":
        return activation(self, run, features).clone()
    z = self.inputs.read(run.activations, run.source).coefficients
    return z.clone() if features is None else z[..., features]


def activation(self: FeatureInteractions, run: Run, features: Tensor | None = None) -> Tensor:
    """Activations of output features (all) [batch, pos, m]; of a plain matrix their positive values."""
    if self.output == "encoder" and self.outputs.encode is not None:
        z = self.outputs.encode(run.output)
        return z if features is None else z[..., features]
    return self.outputs_of(run.output, features).clamp_min(0)


def _each(self: FeatureInteractions, text: Any, batch: int, progress: bool) -> Iterator[Run]:
    """Runs of some sequences at a time: of what is held, or of the model."""
    rows = self.run(text) if isinstance(text, Run) else self.tokens(text)
    with tqdm(total=len(rows), unit="sequence", disable=not progress) as bar:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            yield self.run(part)
            bar.update(len(part))


def _flat(
    self: FeatureInteractions, run: Run, features: Tensor, skip: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [t, d], pre-activations [t, m], whether active [t, m]) without the first tokens."""
    x = run.x[:, skip:].flatten(0, 1)
    p = self.outputs_of(run.output, features)[:, skip:].flatten(0, 1)
    on = activation(self, run, features)[:, skip:].flatten(0, 1) != 0
    return x, p, on
