"""Is it more than chance? Nulls for pairs and spectra, and discoveries at a stated rate.

An interaction matrix is a sum over the layer's hidden neurons, ``Q_u = sum_h p_h l_h r_h^T`` with
``p = W_out u``. A finding is one that a null does not show:

- **"neurons"**: what each neuron writes is paired at random with what it reads, ``p`` permuted. It keeps
  every neuron's input factors, the size of what is written, and the dictionary; what is tested is that
  the layer's output knows which products it takes.
- **"dictionary"**: the input features are rotated together by a random rotation. It keeps the layer, the
  spectrum, and the angles between features; what is tested is that *these* directions matter to the
  layer. (A spectrum does not change, so this is a null of pairs only.)

A pair's coefficient under the first null has a mean and a variance known in closed form: with
``a_h = l_h.d_b r_h.d_c + l_h.d_c r_h.d_b`` (half of it for b = c) and H neurons, ``H mean(p) mean(a)``
and ``H^2/(H-1) var(p) var(a)``. Its z-score is compared with the z-scores of *all* pairs under a few
permutations, because the tails are heavier than a normal distribution's. Discoveries are those of
Benjamini and Hochberg (1995) over all pairs; a pair's p-value is at least 1 / (draws x pairs), so that
at least 1 / rate draws are needed.

A null can be too strict. Where every hidden neuron is an AND of two features, pairing at random makes
pairs as strong as the true ones, and "neurons" finds nothing (tests/truth has the numbers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.labels import Named, kinds
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearTensor

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.interactions import FeatureInteractions

PairNull = Literal["neurons", "dictionary"]
PAIRED_AT_RANDOM = "what each hidden neuron writes paired at random with what it reads"
_WORDS = {
    "neurons": PAIRED_AT_RANDOM,
    "dictionary": "the input features rotated together at random",
}


def discoveries(p: Float[Tensor, " n"], rate: float = 0.05) -> Bool[Tensor, " n"]:
    """Which p-values are discoveries at a false-discovery rate (Benjamini and Hochberg 1995).

    NaN is none. Raises ValueError for a rate outside (0, 1) and p outside [0, 1].
    """
    _require_rate(rate)
    p = checks.require_tensor("p", p)
    known = p.flatten()[~p.flatten().isnan()].double()
    if not len(known):
        return torch.zeros_like(p, dtype=torch.bool)
    if float(known.min()) < 0 or float(known.max()) > 1:
        raise ValueError(f"p-values lie from 0 to 1, got {known.min():g} to {known.max():g}")
    ordered = known.sort().values
    steps = rate * torch.arange(1, len(known) + 1, device=p.device) / len(known)
    passing = ordered[ordered <= steps]
    return p <= passing[-1] if len(passing) else torch.zeros_like(p, dtype=torch.bool)


def random_rotation(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A rotation (or reflection), uniform."""
    basis, upper = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double))
    return basis * upper.diagonal().sign()


@dataclass(frozen=True, eq=False)
class PairChance(Named):
    """Pairs of input features of one output feature, beside a null.

    Attributes
    ----------
    feature: the output feature
    first, second: [m], the pairs of the smallest p-values, first <= second
    coefficients: [m]; z: [m], in standard deviations of the null; p: [m], two-sided
    found: [m], whether the pair is a discovery at `rate` among all `tested` pairs
    rate: false-discovery rate; tested: how many pairs; discoveries: how many are found
    null: in words; draws: how many times it was drawn
    """

    feature: int
    first: Int[Tensor, " m"]
    second: Int[Tensor, " m"]
    coefficients: Float[Tensor, " m"]
    z: Float[Tensor, " m"]
    p: Float[Tensor, " m"]
    found: Bool[Tensor, " m"]
    rate: float
    tested: int
    discoveries: int
    null: str
    draws: int

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.discoveries:
            return (
                f"No pair is better than its null ({self.null}): of {self.tested:,} pairs none is a "
                f"discovery at a false-discovery rate of {self.rate:g}."
            )
        are = "is a discovery" if self.discoveries == 1 else "are discoveries"
        return (
            f"{self.discoveries:,} of {self.tested:,} pairs {are} at a false-discovery rate "
            f"of {self.rate:g} (null: {self.null})."
        )

    def top(self, k: int) -> PairChance:
        """The first k pairs."""
        checks.require_count("k", k, len(self.first), "the pairs held")
        names = ("first", "second", "coefficients", "z", "p", "found")
        return replace(self, **{name: getattr(self, name)[:k] for name in names})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair, the least probable first."""
        return self.table(
            {
                "first": self.first,
                "second": self.second,
                "kind": kinds(self.first, self.second),
                "coefficient": self.coefficients,
                "z": self.z,
                "p": self.p,
                "found": self.found,
            }
        )


@dataclass(frozen=True, eq=False)
class SpectrumChance(Named):
    """How concentrated the spectra of output features are, beside those of a null.

    Attributes
    ----------
    features: [m], output features
    concentration: [m], ``|lambda_1| / ||Q||_F``: 1 for a form of one direction
    null_concentration: [m], its mean under the null
    p: [m], share of the null's draws that are as concentrated, from 1 / (draws + 1)
    found: [m], discoveries at `rate`
    rate, null, draws: as in `PairChance`
    """

    features: Int[Tensor, " m"]
    concentration: Float[Tensor, " m"]
    null_concentration: Float[Tensor, " m"]
    p: Float[Tensor, " m"]
    found: Bool[Tensor, " m"]
    rate: float
    null: str
    draws: int

    @property
    def verdict(self) -> str:
        """In words."""
        count, m = int(self.found.sum()), len(self.features)
        if not count:
            return (
                f"No spectrum is better than its null ({self.null}): of {m} features none is a "
                f"discovery at a false-discovery rate of {self.rate:g}."
            )
        return (
            f"The spectra of {count} of {m} features are more concentrated than their null's at a "
            f"false-discovery rate of {self.rate:g} (null: {self.null})."
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature."""
        names = ("concentration", "null_concentration", "p", "found")
        columns = {"feature": self.features} | {name: getattr(self, name) for name in names}
        return self.table(columns, inputs=(), outputs=("feature",))


# ---------------------------------------------------------------------- pairs, one after the other


@torch.no_grad()
def pursue_pairs(
    form: Float[Tensor, "d d"],
    directions: Float[Tensor, "n d"],
    k: int = 10,
    *,
    rate: float = 0.05,
    draws: int = 100,
    seed: int = 0,
) -> tuple[Int[Tensor, "m 2"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """The few pairs of input features that a form is made of: pairs, weights, and p-values of each.

    Where input features resemble each other, one product ``(d_b . x)(d_c . x)`` gives large coefficients
    to all pairs that resemble (b, c). Orthogonal matching pursuit asks instead which few products sum to
    the form: the pair that resembles what is left most is taken, all weights are solved again by least
    squares, and so on. It stops after k pairs, or before the first that is no better than the best pair
    of a randomly rotated dictionary in more than `rate` of the draws (the largest of all pairs, so that
    the chance of any false pair at all is held, pair by pair).

    ``2 n^2 d`` flops a draw and pair. Raises ValueError for fewer draws than 1 / rate.
    """
    _require_draws(draws, rate)
    generator = checks.generator(seed)
    form, rows = form.double(), directions.double()
    n, d = rows.shape
    lengths = rows.square().sum(1)
    cosines = rows @ rows.T
    sizes = ((torch.outer(lengths, lengths) + cosines.square()) / 2).sqrt().clamp_min(1e-12)

    def products(pairs: Tensor) -> Tensor:
        made = rows[pairs[:, 0], :, None] * rows[pairs[:, 1], None, :]
        return (made + made.mT) / 2

    rotations = [random_rotation(d, generator) for _ in range(draws)]
    pairs, weights = torch.empty(0, 2, dtype=torch.long), form.new_empty(0)
    p: list[float] = []
    left = form
    for _ in range(k):
        match = ((rows @ left) @ rows.T / sizes).abs()
        if float(match.max()) < 1e-10 * float(form.norm()) or not float(form.norm()):
            break
        larger = 0
        for rotation in rotations:
            turned = rows @ rotation
            larger += int(((turned @ left) @ turned.T / sizes).abs().max() >= match.max())
            if larger + 1 > rate * (draws + 1):
                break  # whatever the other draws are
        chance = (larger + 1) / (draws + 1)
        if chance > rate:
            break
        best = int(match.argmax())
        pair = torch.tensor([[min(best // n, best % n), max(best // n, best % n)]])
        if len(pairs) and bool((pairs == pair).all(1).any()):
            break
        pairs, p = torch.cat([pairs, pair]), [*p, chance]
        parts = products(pairs).flatten(1)
        weights = torch.linalg.lstsq(parts.T, form.flatten()[:, None]).solution[:, 0]
        left = form - (weights[:, None] * parts).sum(0).reshape(d, d)
    return pairs, weights, torch.tensor(p, dtype=torch.double)


def _require_rate(rate: float) -> None:
    if not 0 < checks.require_number("rate", rate, "is of false discoveries", signed=True) < 1:
        raise ValueError(f"rate, of false discoveries, lies between 0 and 1, got {rate}")


def _require_draws(draws: int, rate: float) -> None:
    _require_rate(rate)
    checks.require_positive("draws", draws)
    if draws * rate < 1:
        raise ValueError(
            f"{draws} draws of the null cannot show anything at a rate of {rate:g}: p-values would be "
            f"too large; take at least {math.ceil(1 / rate)}"
        )


# ---------------------------------------------------------------------- all pairs


@dataclass(frozen=True)
class PairScores(Result):
    """Coefficients and z-scores of all pairs of n inputs [n, n], and sorted |z| of the null."""

    coefficients: Float[Tensor, "n n"]
    z: Float[Tensor, "n n"]
    null: Float[Tensor, " draws"]


@torch.no_grad()
def pair_scores(
    layer: BilinearTensor,
    directions: Float[Tensor, "n d"],
    null: PairNull = "neurons",
    *,
    draws: int = 10,
    seed: int = 0,
) -> PairScores:
    """All pairs of a layer of one output, beside a null.

    Parameters
    ----------
    layer: BilinearTensor of one output; its biases do not enter
    directions: the input features

    About ``4 n^2 d_hidden`` flops, and as many for each draw; five tables [n, n] of float32.
    """
    if null not in get_args(PairNull):
        raise ValueError(f"null must be one of {', '.join(get_args(PairNull))}, got {null!r}")
    if layer.d_out != 1:
        raise ValueError(f"a null is of one output at a time, the layer has {layer.d_out}")
    generator = checks.generator(seed)
    left, right = directions @ layer.left.T, directions @ layer.right.T
    p = layer.out[0]
    n, hidden = left.shape
    rows, columns = torch.triu_indices(n, n)
    twice = 2 - torch.eye(n, dtype=left.dtype)

    def coefficients(left: Tensor, right: Tensor, p: Tensor) -> Tensor:
        made = (left * p) @ right.T
        return (made + made.T) / 2 * twice

    own = coefficients(left, right, p)
    if null == "dictionary":
        # Under rotation the size of a pair goes with |d_b| |d_c|.
        lengths = directions.norm(dim=-1)
        scale = torch.outer(lengths, lengths) * twice
        zero = torch.zeros_like(own)
        turned = []
        for _ in range(draws):
            rotation = random_rotation(directions.shape[1], generator).to(directions)
            turn = directions @ rotation
            turned.append(coefficients(turn @ layer.left.T, turn @ layer.right.T, p) / scale)
        flat = torch.cat([made[rows, columns] for made in turned])
        size = flat.square().mean().sqrt().clamp_min(torch.finfo(flat.dtype).tiny)
        return PairScores(own, (own - zero) / scale / size, (flat / size).abs().sort().values)
    mean = coefficients(left, right, p.mean().expand(hidden))
    # sum_h a_h^2 with a_h the coefficient that neuron h alone would make at p = 1.
    squares = left.square() @ right.square().T
    both = left * right
    sums = (squares + squares.T + 2 * both @ both.T) / 4 * twice.square()
    ones = coefficients(left, right, torch.ones_like(p))
    spread = (sums - ones.square() / hidden).clamp_min(0) * p.var()  # unbiased: 1 / (H - 1)
    size = spread.sqrt()
    floor = size.max() * 1e-6
    size = torch.where(size > floor, size, torch.inf)
    drawn = []
    for _ in range(draws):
        order = torch.randperm(hidden, generator=generator)
        made = (coefficients(left, right, p[order]) - mean) / size
        drawn.append(made[rows, columns].abs())
    return PairScores(own, (own - mean) / size, torch.cat(drawn).sort().values)


def p_values(z: Float[Tensor, "..."], null: Float[Tensor, " draws"]) -> Float[Tensor, "..."]:
    """Share of the null's sorted |z| that are as large, from 1 / (draws + 1)."""
    larger = len(null) - torch.searchsorted(null, z.abs().contiguous())
    return (larger + 1).double() / (len(null) + 1)


@torch.no_grad()
def pair_chance(
    features: FeatureInteractions,
    feature: int,
    k: int,
    null: PairNull,
    *,
    rate: float,
    draws: int,
    seed: int,
    max_bytes: int,
) -> PairChance:
    """See `FeatureInteractions.pair_chance`."""
    checks.require_positive("k", k)
    _require_draws(draws, rate)
    known = features
    index = known.number(feature)
    n = known.inputs.n
    dtype = known.directions.dtype
    checks.require_affordable(
        "a null of all pairs", (6 + draws) * n * n, dtype, max_bytes, "use fewer draws"
    )
    layer = known.hook_tensor.project(known.directions[index][None])
    scores = pair_scores(layer, known.input_directions, null, draws=draws, seed=seed)
    rows, columns = torch.triu_indices(n, n)
    z, coefficients = scores.z[rows, columns], scores.coefficients[rows, columns]
    p = p_values(z, scores.null)
    found = discoveries(p, rate)
    order = z.abs().argsort(descending=True, stable=True)[:k]
    first, second = rows[order], columns[order]
    return PairChance(
        feature=index,
        first=first,
        second=second,
        coefficients=coefficients[order],
        z=z[order],
        p=p[order],
        found=found[order],
        rate=rate,
        tested=len(z),
        discoveries=int(found.sum()),
        null=_WORDS[null],
        draws=draws,
        input_labels=known.inputs.labels_of(torch.cat([first, second])),
        output_labels=known.outputs.labels_of([index]),
    )


# ---------------------------------------------------------------------- spectra


def paired_at_random(layer: BilinearTensor, generator: torch.Generator) -> BilinearTensor:
    """A draw of the null "neurons": what each neuron writes paired at random with what it reads."""
    return replace(layer, out=layer.out[:, torch.randperm(layer.d_hidden, generator=generator)])


@torch.no_grad()
def concentration(layer: BilinearTensor) -> Float[Tensor, " d_out"]:
    """``|lambda_1| / ||Q||_F`` of every output; 0 for a form that is zero."""
    dense = layer.interaction().dense()
    size = dense.square().sum((-1, -2)).sqrt()
    leading = torch.linalg.eigvalsh(dense).abs().amax(-1)
    return torch.where(size > 0, leading / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)


@torch.no_grad()
def spectrum_chance(
    features: FeatureInteractions,
    index: Int[Tensor, " m"],
    *,
    rate: float,
    draws: int,
    seed: int,
    progress: bool,
) -> SpectrumChance:
    """See `FeatureInteractions.spectrum_chance`."""
    checks.require_positive("draws", draws)
    _require_rate(rate)
    layer = features.layer_tensor
    generator = checks.generator(seed)
    rows = []
    for some in tqdm(index.split(16), unit="batch", disable=not progress):
        read = layer.project(features.directions[some])
        own = concentration(read)
        null = torch.stack([concentration(paired_at_random(read, generator)) for _ in range(draws)])
        p = ((null >= own).sum(0) + 1) / (draws + 1)
        rows.append(torch.stack([own.double(), null.double().mean(0), p.double()]))
    own, mean, p = torch.cat(rows, 1) if rows else torch.empty(3, 0, dtype=torch.double)
    held: dict[str, Any] = {"rate": rate, "null": _WORDS["neurons"], "draws": draws}
    return SpectrumChance(
        index,
        own,
        mean,
        p,
        discoveries(p, rate),
        output_labels=features.outputs.labels_of(index),
        **held,
    )
