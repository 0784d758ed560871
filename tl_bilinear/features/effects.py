"""What makes an output feature: a constant, main effects of input features, and their interactions.

Around the mean activation x0 of a population the pre-activation is, exactly,

    ``f(x) = f(x0) + (2 Q x0 + l) . (x - x0) + (x - x0)^T Q (x - x0)``.

With ``x = sum_b z_b d_b + rest`` the linear term gives each input feature a *main effect*,
``slope_b (z_b - mean_b)``, and the last one centred pairs, *interactions*. What the plain sum over pairs
calls "feature a times the ever-present feature b" is a main effect of a here.

`CentredAttribution` is that sum at one token. `FeatureEffects` says over a population how much of what
varies each part makes: the covariance of the part with f over the variance of f. These shares add up to
1. A share can be negative: such a part works against what the others do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.attribution import relative_error
from tl_bilinear.features.labels import Named, kinds
from tl_bilinear.features.pair_counts import active_pairs

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.run import FeatureRun

Around = Literal["all", "active"]


@dataclass(frozen=True, eq=False)
class CentredAttribution(Named):
    """One pre-activation at one token, taken apart around the mean of a population.

    Attributes
    ----------
    feature: the output feature; position: the token's
    features: [m], the input features active there; labels: their names
    activations, means: [m], over the token's norm scale; means over the population
    rest_names: "absent features", those of the population's mean that are not active here, and "what is
        no feature", the dictionary's error and biases away from their mean
    constant: ``f(x0)``, the pre-activation of the mean, the dictionary's own constants included
    main: [m + r], ``slope . (part - mean)``, of the features and of the rest
    interactions: [m + r, m + r], symmetric; an entry off the diagonal is half of its pair's
    measured: the pre-activation in the model's own run
    population: whose mean, in words
    """

    feature: int
    position: int
    features: Int[Tensor, " m"]
    activations: Float[Tensor, " m"]
    means: Float[Tensor, " m"]
    labels: list[str]
    rest_names: list[str]
    constant: float
    main: Float[Tensor, " rows"]
    interactions: Float[Tensor, "rows rows"]
    measured: float
    population: str

    @property
    def total(self) -> float:
        """The sum of everything."""
        parts = self.main.double().sum() + self.interactions.double().sum()
        return self.constant + float(parts)

    @property
    def error(self) -> float:
        """``|total - measured|`` relative to the largest of the contributions and of the two."""
        held = {"constant": self.constant, "main": float(self.main.abs().max())}
        return relative_error(self.total, self.measured, self.interactions, held)

    def terms(self) -> dict[str, float]:
        """Everything in a few named sums, which add up to `total`."""
        m = len(self.features)
        found = {"constant": self.constant, "main effects": float(self.main[:m].sum())}
        for number, name in enumerate(self.rest_names):
            found[f"main effect of {name}"] = float(self.main[m + number])
        found["interactions of features"] = float(self.interactions[:m, :m].sum())
        found["interactions with the rest"] = float(self.interactions.sum()) - float(
            self.interactions[:m, :m].sum()
        )
        return found

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """The k largest contributions (all): kind ("main", "self", "cross"), labels, contribution."""
        import pandas as pd

        m = len(self.features)
        rows, columns = torch.triu_indices(m, m, device=self.main.device)
        pairs = self.interactions[rows, columns] * torch.where(rows == columns, 1.0, 2.0)
        own = torch.arange(m, device=self.main.device)
        first, second = torch.cat([own, rows]), torch.cat([own, columns])
        values = torch.cat([self.main[:m], pairs])
        kind = ["main"] * m + kinds(rows, columns)
        order = values.abs().argsort(descending=True, stable=True)[:k].tolist()
        numbers = self.features.tolist()
        held = [(kind[i], int(first[i]), int(second[i]), float(values[i])) for i in order]
        return pd.DataFrame(
            {
                "kind": [kind for kind, *_ in held],
                "first": [numbers[b] for _, b, _, _ in held],
                "second": [numbers[c] if kind == "cross" else None for kind, _, c, _ in held],
                "label_first": [self.labels[b] for _, b, _, _ in held],
                "label_second": [
                    self.labels[c] if kind == "cross" else "" for kind, _, c, _ in held
                ],
                "contribution": [value for *_, value in held],
            }
        ).astype({"second": "Int64"})

    def text(self, k: int = 10) -> str:
        """The k largest contributions and the named sums, line by line."""
        lines = [
            f"feature {self.output_name(self.feature)} at position {self.position}: "
            f"{self.measured:+.4f}; on the mean of {self.population} {self.constant:+.4f}"
        ]
        for row in self.to_pandas(k).to_dict("records"):
            name = row["label_first"]
            if row["kind"] == "self":
                name = f"{name} more than a straight line gives"
            elif row["kind"] == "cross":
                name = f"{name} x {row['label_second']}"
            lines.append(f"  {row['contribution']:+.4f}  {row['kind']:5s} {name}")
        return "\n".join(lines + [f"  {v:+.4f}  {name}" for name, v in self.terms().items() if v])


@dataclass(frozen=True, eq=False)
class FeatureEffects(Named):
    """How much of what an output feature does on a population each part makes.

    Attributes
    ----------
    feature: the output feature; tokens: how many the population has; population: in words
    constant: the pre-activation of the mean input; mean, variance: of the pre-activation
    slopes: [n], of all input features: what a unit more of it does at the mean
    means, deviations: [n], mean and standard deviation of activations over the token's norm scale
    active: [n], on how many tokens each is active
    main: [n], shares of the variance that are main effects of input features
    first, second: [p], the pairs of the largest absolute share, first <= second; pairs: [p], shares
    interactions: share of all pairs of features; rest: share of everything else (the dictionary's
        error and constants, with everything). ``main.sum() + interactions + rest == 1``
    """

    feature: int
    tokens: int
    population: str
    constant: float
    mean: float
    variance: float
    slopes: Float[Tensor, " n"]
    means: Float[Tensor, " n"]
    deviations: Float[Tensor, " n"]
    active: Int[Tensor, " n"]
    main: Float[Tensor, " n"]
    first: Int[Tensor, " p"]
    second: Int[Tensor, " p"]
    pairs: Float[Tensor, " p"]
    interactions: float
    rest: float

    def top(self, k: int) -> FeatureEffects:
        """With the first k pairs."""
        checks.require_count("k", k, len(self.pairs), "the pairs held")
        held = {name: getattr(self, name)[:k] for name in ("first", "second", "pairs")}
        return replace(self, **held)

    def to_pandas(self, k: int = 20) -> pandas.DataFrame:
        """The k parts of largest share, main effects and pairs together, then three sums.

        Columns: kind, first, second, share, slope, mean, deviation, active, labels.
        """
        import pandas as pd

        labels = self.input_labels or {}

        def named(number: int) -> str:
            return labels.get(number, str(number))

        rows: list[dict[str, Any]] = [
            {
                "kind": "main",
                "first": b,
                "share": float(self.main[b]),
                "slope": float(self.slopes[b]),
                "mean": float(self.means[b]),
                "deviation": float(self.deviations[b]),
                "active": int(self.active[b]),
                "label_first": named(b),
            }
            for b in self.main.abs().topk(min(k, len(self.main))).indices.tolist()
        ]
        kind = kinds(self.first, self.second)
        for place, (b, c) in enumerate(zip(self.first.tolist(), self.second.tolist(), strict=True)):
            row = {"kind": kind[place], "first": b, "share": float(self.pairs[place])}
            row |= {"label_first": named(b)}
            rows.append(row if b == c else row | {"second": c, "label_second": named(c)})
        rows.sort(key=lambda row: -abs(row["share"]))
        sums = {
            "all main effects": float(self.main.sum()),
            "all interactions": self.interactions,
            "the rest": self.rest,
        }
        columns = ("kind", "first", "label_first", "second", "label_second", "share", "slope")
        table = pd.DataFrame(
            [*rows[:k], *({"kind": name, "share": value} for name, value in sums.items())],
            columns=[*columns, "mean", "deviation", "active"],
        )
        return table.astype(dict.fromkeys(("first", "second", "active"), "Int64"))


@torch.no_grad()
def centred_attribution(
    run: FeatureRun, feature: int, position: int, sequence: int, chosen: Tensor, population: str
) -> CentredAttribution:
    """See `FeatureRun.centred`. chosen: [batch, pos], the population whose mean is the centre."""
    known = run.features
    plain = run.attribute(feature, position, sequence)
    layer = known.hook_tensor.project(known.directions[feature][None])
    dtype, directions = layer.left.dtype, known.input_directions
    n, d = directions.shape
    count = 0
    sums = torch.zeros(n, dtype=torch.double, device=run.x.device)
    rest = torch.zeros(d, dtype=torch.double, device=run.x.device)
    for part in run.read(chosen):
        count += len(part.coefficients)
        sums += part.coefficients.double().sum(0)
        rest += part.rest.double().sum(0)
    if not count:
        raise ValueError(f"there are no {population} in this text: give more text")
    means, mean_rest = (sums / count).to(dtype), (rest / count).to(dtype)
    here = torch.zeros_like(run.mask)
    here[sequence, plain.position] = True
    one = next(part for part in replace(run, mask=here).read() if len(part.coefficients))
    z, active = one.coefficients[0].to(dtype), plain.features
    absent = means.clone()
    absent[active] = 0
    rows = torch.cat(
        [
            (z - means)[active, None] * directions[active],
            -(absent @ directions)[None],
            one.rest.to(dtype) - mean_rest,
        ]
    )
    parts = layer.around(means @ directions + mean_rest).parts()
    gain = float(one.gain[0])
    constant = gain * float(parts.constant[0])
    constant += sum(plain.constants.get(name, 0.0) for name in ("- e . b_dec", "b_enc"))
    return CentredAttribution(
        feature=feature,
        position=plain.position,
        features=active,
        activations=z[active],
        means=means[active],
        labels=plain.labels,
        rest_names=["absent features", "what is no feature"],
        constant=constant,
        main=gain * (rows @ parts.linear[0]),
        interactions=gain * parts.interaction.interaction()[0].fold(rows).dense(),
        measured=plain.measured,
        population=population,
        input_labels=plain.input_labels,
        output_labels=plain.output_labels,
    )


@torch.no_grad()
def feature_effects(
    run: FeatureRun, feature: int, chosen: Tensor, population: str, k: int, max_bytes: int
) -> FeatureEffects:
    """See `FeatureRun.effects`. chosen: [batch, pos], the population."""
    known = run.features
    n, double = known.inputs.n, torch.double
    checks.require_affordable("all pairs", 4 * n * n, double, max_bytes, "use fewer features")
    device = run.x.device
    # Sums over tokens of weights times 1, z and z z^T; the weights are gain and gain times f.
    ones, firsts = torch.zeros(2, dtype=double), torch.zeros(2, n, dtype=double)
    seconds = torch.zeros(n * n, 2, dtype=double)
    count, sums, squares = 0, torch.zeros(n, dtype=double), torch.zeros(n, dtype=double)
    fired = torch.zeros(n, dtype=torch.long)
    rest = torch.zeros(known.input_directions.shape[1], dtype=double)
    values = []
    for part in run.read(chosen):
        z = part.coefficients.double()
        f = part.run._preactivations([feature])[part.run.mask][:, 0].double()
        weights = torch.stack([part.gain.double(), part.gain.double() * f])
        values.append(f.cpu())
        count += len(z)
        sums += z.sum(0).cpu()
        squares += z.square().sum(0).cpu()
        fired += (z != 0).sum(0).cpu()
        rest += part.rest.double().sum(0).cpu()
        ones += weights.sum(1).cpu()
        firsts += (weights @ z).cpu()
        keys, products, at = active_pairs(z)
        for column in range(2):
            amounts = products * weights[column, at]
            seconds[:, column] += torch.bincount(keys, amounts, minlength=n * n).cpu()
    if count < 2:
        raise ValueError(
            f"effects are shares of a variance, and there are {count} of {population}: give more text"
        )
    f = torch.cat(values)
    average, variance = f.mean(), f.var(correction=0)
    means = sums / count
    directions = known.input_directions.double().cpu()
    layer = known.hook_tensor.project(known.directions[feature][None]).to("cpu", double)
    around = layer.around(means @ directions + rest / count)
    parts = around.parts()
    slopes = directions @ parts.linear[0]
    entries = directions @ parts.interaction.interaction()[0].dense() @ directions.T
    # Covariances with f: weights gain (f - average) in place of the two.
    scale = 1 / (count * variance.clamp_min(torch.finfo(double).tiny))
    one, first = ((w[1] - average * w[0]) * scale for w in (ones, firsts))
    second = ((seconds[:, 1] - average * seconds[:, 0]) * scale).reshape(n, n)
    second = second.triu() + second.triu(1).T
    main = slopes * (first - one * means)
    crossed = torch.outer(means, first)
    second = second - crossed - crossed.T + one * torch.outer(means, means)
    pairs = entries * second
    rows, columns = torch.triu_indices(n, n)
    shares = pairs[rows, columns] * torch.where(rows == columns, 1.0, 2.0)
    best = shares.abs().topk(min(k, len(shares))).indices
    constant = float(ones[0] / count * parts.constant[0])
    if known.output == "encoder":
        for offset in (known.outputs.encoder_offset, known.outputs.encoder_bias):
            constant += 0.0 if offset is None else float(offset[feature])
    interactions = float(pairs.sum())
    dtype = known.directions.dtype
    deviations = (squares / count - means.square()).clamp_min(0).sqrt()
    return FeatureEffects(
        feature=feature,
        tokens=count,
        population=population,
        constant=constant,
        mean=float(average),
        variance=float(variance),
        slopes=slopes.to(device, dtype),
        means=means.to(device, dtype),
        deviations=deviations.to(device, dtype),
        active=fired.to(device),
        main=main.to(device, dtype),
        first=rows[best].to(device),
        second=columns[best].to(device),
        pairs=shares[best].to(device, dtype),
        interactions=interactions,
        rest=1 - float(main.sum()) - interactions,
        input_labels=known.inputs.labels_of(range(n)),
        output_labels=known.outputs.labels_of([feature]),
    )
