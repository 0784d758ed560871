"""What k eigenpairs for each pair of classes prove, when the rest is known only by two numbers.

The margin of class a over b is ``q(x) = q(c) + g . (x - c) + (x - c)^T A (x - c)`` around any centre c.
In a metric G (``|x|_G^2 = x^T G x``) A has eigenpairs ``A = sum_i lambda_i w_i w_i^T`` with the w_i
orthonormal in the dual metric. Keep the k of largest absolute value; of the others keep only the least
and the largest value, ``-lower`` and ``upper``. Then for every x, with e = x - c,

    ``q(x) >= q(c) + g . e + sum_(i <= k) lambda_i (w_i . e)^2 - lower rest``,
    ``rest = |e|_G^2 - sum_(i <= k) (w_i . e)^2``,

and the same from above. An answer is proved where one class beats every other by these bounds.

>>> known = margin_spectrum(tensor, 32, moment_metric(tensor, InputMoments.of(train_images)))
>>> known.answers(images)             # [n], the class that is certainly the answer, -1 where none is
>>> known.top(8).answers(images)      # from 8 pairs, without another decomposition

**Which metric.** G decides how tight the bound is: the tail is charged ``lambda_(k+1) |rest|_G^2``.
Euclidean, it is charged for directions that inputs have and the layer barely reads; in the metric of
the data (``G = M^-1``) for every direction alike, however little inputs vary in it. ``G = M^-p`` with
p = 1/2 lies between. :func:`proving_metric` minimises the charge itself. All of them measure energy in
the span of the layer's factors only, outside which no input is read.

**What does not help.** Trace and Frobenius norm of the rest say nothing about one input beyond its
extreme eigenvalues: some form with the same numbers reaches those on that input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.moments import InputMoments
from tl_bilinear.tensor.robustness import ROWS, as_classifier, as_labels, model_digest, span

if TYPE_CHECKING:
    import pandas

_ROUNDING = 1e-9
"""Relative slack on everything that a bound adds up: some thousand times the rounding of float64 there,
so that the checker, which bounds its own rounding rigorously, agrees."""


@dataclass(frozen=True, eq=False)
class InputMetric(Result):
    """How the size of an input's deviation is measured: ``|map (x - centre)|``.

    Attributes
    ----------
    map: [r, d], of full rank; its rows span what the layer reads
    centre: [d]
    name: what it is, in a few words
    """

    map: Float[Tensor, "r d"]
    centre: Float[Tensor, " d"]
    name: str

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... r"]:
        """``map (x - centre)``."""
        return (x - self.centre) @ self.map.T


def euclidean_metric(
    tensor: BilinearTensor, centre: Float[Tensor, " d"] | None = None
) -> InputMetric:
    """The plain length, of the part of an input that the layer reads."""
    wide = as_classifier(tensor)
    return InputMetric(span(wide), _centre(wide, centre), "euclidean")


def moment_metric(
    tensor: BilinearTensor,
    moments: InputMoments,
    *,
    power: float = 0.5,
    ridge: float = 0.01,
    centred: bool = True,
) -> InputMetric:
    """``G = S^-power`` with S the inputs' second moment in the layer's span.

    Parameters
    ----------
    moments: of what the tensor reads, for example of the training images
    power: 0 is Euclidean, 1 the data's own metric
    ridge: t in ``(1 - t) S + t tr(S)/r I``
    centred: expand the margins around the inputs' mean, with S their covariance; else around 0

    Raises ValueError for moments of another width or space, a power or ridge outside [0, 1].
    """
    wide = as_classifier(tensor)
    power = checks.require_number("power", power, "lies between 0 and 1")
    ridge = checks.require_number("ridge", ridge, "lies between 0 and 1")
    if power > 1 or ridge > 1:
        raise ValueError(f"power and ridge lie between 0 and 1, got {power} and {ridge}")
    basis = span(wide)
    second, centre = _in_span(wide, basis, moments, ridge, centred)
    around = "covariance" if centred else "second moment"
    return InputMetric(
        _power(second, -power / 2) @ basis,
        centre,
        f"{around} of {moments.population} to the power {power:g}, ridge {ridge:g}",
    )


def proving_metric(
    tensor: BilinearTensor,
    moments: InputMoments,
    k: int,
    *,
    ridge: float = 0.01,
    centred: bool = True,
    steps: int = 40,
    rate: float = 0.02,
    progress: bool = False,
) -> InputMetric:
    """The metric in which k pairs leave the smallest tail on average, found by gradient steps.

    Minimises the mean over pairs of classes of ``|lambda_(k+1)| E |rest|_G^2`` over positive
    definite G in the layer's span, by Adam on its logarithm, from ``G = S^-1/2``. It sees moments and
    weights, no label. A step costs an eigendecomposition a pair of classes, and its gradient as much.

    Parameters as :func:`moment_metric`; steps: 0 for the starting point alone; rate: Adam's.
    """
    wide = as_classifier(tensor)
    basis = span(wide)
    second, centre = _in_span(wide, basis, moments, ridge, centred)
    checks.require_count(
        "k", k, max(1, len(basis) - 1), "fewer than the layer's span has dimensions"
    )
    matrices = _pair_matrices(wide.fold(basis))
    root = _power(second, 0.5)
    white = root @ matrices @ root  # in coordinates where inputs have second moment I
    start = _power(second, -0.25)  # of those coordinates: G = S^-1/2 of the inputs' own
    inverse = torch.linalg.inv(start)
    change = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=rate)
    best, least = start, float("inf")
    if checks.require_int("steps", steps) < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    for step in tqdm(range(steps + 1), unit="step", disable=not progress):
        with torch.enable_grad():
            symmetric = (change + change.T) / 2
            here = start @ torch.matrix_exp(symmetric)
            there = torch.matrix_exp(-symmetric) @ inverse
            charge = _mean_charge(white, here, there, k)
            if charge.item() < least:
                best, least = here.detach(), charge.item()
            if step == steps:
                break
            optimiser.zero_grad()
            charge.backward()
            optimiser.step()
    found = torch.linalg.inv(best) @ _power(second, -0.5) @ basis
    return InputMetric(found, centre, f"proving, k {k}, {steps} steps, ridge {ridge:g}")


def _mean_charge(white: Tensor, here: Tensor, there: Tensor, k: int) -> Tensor:
    """Log of the mean over pairs of the tail's extreme value times the energy it is charged for."""
    values, vectors = _by_magnitude(here.T @ white @ here)
    rest = values[:, k:].abs()
    # A smooth maximum: its gradient does not jump when two values change places.
    largest = rest[:, :1].detach().clamp_min(1e-300)
    tail = (rest / largest).pow(12).mean(-1).pow(1 / 12)
    energy = (there.T @ vectors[..., k:]).square().sum((-2, -1))
    return (tail * largest[:, 0] * energy).mean().log()


# ---------------------------------------------------------------------- what is known


@dataclass(frozen=True, eq=False)
class MarginSpectrum(Result):
    """k eigenpairs of each pair of classes and two bounds on the others: enough to prove answers.

    Pairs (a, b), a < b, in lexicographic order; p of them.

    Attributes
    ----------
    values: [p, k], by falling absolute value
    vectors: [p, k, r], unit and orthogonal, in the metric's coordinates: ``w_i = map^T v_i``
    lower, upper: [p], at least 0: no dropped value lies below -lower or above upper
    linear: [classes, d], constant: [classes], each logit's gradient and value at the metric's centre
    metric: InputMetric
    model: digest of the weights
    dropped: [p, r - k], the other values, for `top`; not part of what is proved from
    """

    values: Float[Tensor, "p k"]
    vectors: Float[Tensor, "p k r"]
    lower: Float[Tensor, " p"]
    upper: Float[Tensor, " p"]
    linear: Float[Tensor, "classes d"]
    constant: Float[Tensor, " classes"]
    metric: InputMetric
    model: str
    dropped: Float[Tensor, "p rest"]

    @property
    def k(self) -> int:
        return self.values.shape[1]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of classes, in the order of the first dimension."""
        return _class_pairs(len(self.constant))

    @property
    def numbers(self) -> int:
        """How many numbers a proof reads from: pairs, bounds, linear parts, metric."""
        d = self.linear.shape[1]
        own_map = 0 if _is_identity(self.metric.map) else self.metric.map.numel()
        own_centre = d if bool(self.metric.centre.any()) else 0
        kept = self.values.numel() + self.vectors.numel() + self.lower.numel() + self.upper.numel()
        affine = self.linear.numel() if bool(self.linear.any()) else 0
        return kept + affine + self.constant.numel() + own_map + own_centre

    def top(self, k: int) -> MarginSpectrum:
        """The first k pairs of each; the bounds then cover the others too."""
        checks.require_count("k", k, self.k, "the pairs held")
        dropped = torch.cat([self.values[:, k:], self.dropped], 1)
        lower, upper = _tails(dropped, self.values[:, 0].abs())
        return replace(
            self,
            values=self.values[:, :k],
            vectors=self.vectors[:, :k],
            lower=lower,
            upper=upper,
            dropped=dropped,
        )

    @torch.no_grad()
    def bounds(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n classes classes"]:
        """Lower bounds on every margin: entry (i, a, b) for logit a less logit b; infinite for a = b."""
        wide = self.constant
        x = checks.require_matrix("x", x, self.linear.shape[1], "d, the inputs", wide)
        checks.require_finite("x", x)
        classes = len(wide)
        result = x.new_full((len(x), classes, classes), torch.inf)
        z, e = self.metric(x), x - self.metric.centre
        energy, length = z.square().sum(1), e.norm(dim=1)
        affine = e @ self.linear.T + wide
        sizes = self.linear.norm(dim=1)
        scale = self.metric.map.norm() * length * energy.sqrt()
        for p, (a, b) in enumerate(self.pairs):
            squares = (z @ self.vectors[p].T).square()
            kept = affine[:, a] - affine[:, b] + squares @ self.values[p]
            rest = (energy - squares.sum(1)).clamp_min(0)
            slack = scale * self.values[p].abs().amax().clamp_min(self.lower[p] + self.upper[p])
            slack = slack + length * (sizes[a] + sizes[b]) + wide[a].abs() + wide[b].abs()
            result[:, a, b] = kept - self.lower[p] * rest - _ROUNDING * slack
            result[:, b, a] = -kept - self.upper[p] * rest - _ROUNDING * slack
        return result

    def answers(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The class whose logit is certainly the largest, -1 where these pairs prove none."""
        x = checks.require_matrix("x", x, self.linear.shape[1], "d, the inputs", self.linear)
        least = torch.cat([self.bounds(rows).amin(2) for rows in x.split(ROWS)])
        best, answer = least.max(1)
        return torch.where(best > 0, answer, -1)


@torch.no_grad()
def margin_spectrum(
    tensor: BilinearTensor, k: int, metric: InputMetric | None = None
) -> MarginSpectrum:
    """The k leading eigenpairs of every pair of classes in a metric, and bounds on the rest.

    Parameters
    ----------
    tensor: the classifier, biases included: they are in the linear part and the constant, exactly
    k: pairs of each, at most r, the dimension of the layer's span
    metric: Euclidean by default

    In float64; one eigendecomposition of size r for each pair of classes.

    Raises ValueError for k out of range, a metric of another width.
    """
    wide = as_classifier(tensor)
    metric = euclidean_metric(tensor) if metric is None else metric
    r, d = metric.map.shape
    if d != wide.d_in:
        raise ValueError(f"the metric is of {d} inputs, the layer of {wide.d_in}")
    checks.require_count("k", k, r, "r, the dimension of the layer's span")
    parts = wide.parts()
    centre = metric.centre
    through = 2 * wide.interaction().apply(centre[None])[:, 0]
    pinv = torch.linalg.pinv(metric.map)
    values, vectors = _by_magnitude(_pair_matrices(wide.fold(pinv.T)))
    lower, upper = _tails(values[:, k:], values[:, 0].abs())
    return MarginSpectrum(
        values[:, :k],
        vectors[..., :k].mT.contiguous(),
        lower,
        upper,
        through + parts.linear,
        wide(centre),
        metric,
        model_digest(tensor),
        values[:, k:],
    )


@dataclass(frozen=True, eq=False)
class ProvedAccuracy(Result):
    """Accuracy that k eigenpairs for each pair of classes prove, by k.

    Attributes
    ----------
    k: [m]
    proved: [m], share of inputs whose label is certainly the answer
    numbers: [m], how many numbers each proof reads from
    accuracy: of the model itself, which no proof can exceed
    metric: the metric's name
    """

    k: Int[Tensor, " m"]
    proved: Float[Tensor, " m"]
    numbers: Int[Tensor, " m"]
    accuracy: float
    metric: str

    def to_pandas(self) -> pandas.DataFrame:
        """One row a k."""
        import pandas as pd

        columns = {name: getattr(self, name).tolist() for name in ("k", "proved", "numbers")}
        return pd.DataFrame(columns)


def proved_accuracy(
    tensor: BilinearTensor,
    inputs: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    k: tuple[int, ...] = (8, 16, 32, 64),
    metric: InputMetric | None = None,
) -> ProvedAccuracy:
    """The accuracy that k eigenpairs prove, for several k in one metric; errors as its parts'."""
    wide = as_classifier(tensor)
    inputs = checks.require_matrix("inputs", inputs, wide.d_in, "d, the inputs", wide.left)
    logits = wide(inputs)
    labels = as_labels(labels, logits)
    whole = margin_spectrum(tensor, max(k), metric)
    shares, numbers = [], []
    for count in sorted(k):
        known = whole.top(count)
        shares.append(float((known.answers(inputs) == labels).double().mean()))
        numbers.append(known.numbers)
    return ProvedAccuracy(
        torch.tensor(sorted(k)),
        torch.tensor(shares, dtype=torch.float64),
        torch.tensor(numbers),
        float((logits.argmax(1) == labels).double().mean()),
        whole.metric.name,
    )


# ---------------------------------------------------------------------- inside


def _class_pairs(classes: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(classes) for b in range(a + 1, classes)]


def _pair_matrices(tensor: BilinearTensor) -> Float[Tensor, "p r r"]:
    matrices = tensor.interaction().dense()
    first, second = zip(*_class_pairs(tensor.d_out), strict=True)
    return matrices[list(first)] - matrices[list(second)]


def _by_magnitude(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [p, r] and eigenvectors [p, r, r] (columns) by falling absolute eigenvalue."""
    values, vectors = torch.linalg.eigh(matrices)
    order = values.abs().argsort(-1, descending=True)
    return values.gather(-1, order), vectors.gather(-1, order[:, None].expand_as(vectors))


def _tails(dropped: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on the dropped values, a little out: eigenvalues are rounded relative to the largest."""
    if not dropped.shape[1]:
        return _ROUNDING * scale, _ROUNDING * scale
    lower, upper = (-dropped.amin(1)).clamp_min(0), dropped.amax(1).clamp_min(0)
    return lower + _ROUNDING * scale, upper + _ROUNDING * scale


def _in_span(
    wide: BilinearTensor, basis: Tensor, moments: InputMoments, ridge: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """The inputs' second moment in the span, with the ridge, and where margins are expanded [d]."""
    if not isinstance(moments, InputMoments):
        raise TypeError(
            f"moments must be InputMoments, as InputMoments.of(images) makes them, got "
            f"{type(moments).__name__}"
        )
    same = moments.space == wide.input_space or None in (moments.space, wide.input_space)
    if moments.d != wide.d_in or not same:
        raise ValueError(
            f"the moments are of {moments.d} inputs ({moments.space or 'of an unnamed space'}), the "
            f"classifier reads {wide.d_in} ({wide.input_space or 'of an unnamed space'})"
        )
    centre = moments.mean.to(wide.left) if centred else wide.left.new_zeros(wide.d_in)
    about = (moments.centred() if centred else moments).second.to(wide.left)
    second = basis @ about @ basis.T
    second = (second + second.T) / 2
    size = second.trace() / len(second)
    if not size > 0:
        raise ValueError("moments must be those of inputs that the layer reads: their trace is 0")
    return (1 - ridge) * second + ridge * size * torch.eye(len(second)).to(second), centre


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-12 * values.max()) ** power) @ vectors.T


def _centre(wide: BilinearTensor, centre: Tensor | None) -> Tensor:
    if centre is None:
        return wide.left.new_zeros(wide.d_in)
    centre = checks.require_rows("centre", centre, wide.d_in, "d, the inputs", wide.left)
    if centre.ndim != 1:
        raise ValueError(f"centre must be one input [d], got {checks.shape(centre)}")
    return centre


def _is_identity(matrix: Tensor) -> bool:
    square = matrix.shape[0] == matrix.shape[1]
    return square and torch.equal(matrix, torch.eye(len(matrix)).to(matrix))
