"""CP decomposition of a bilinear tensor: the neurons that all outputs share, without the tensor.

    ``B ~ sum_r o_r (x) sym(l_r m_r^T)``,  ``sym(A) = (A + A^T) / 2``,

is a bilinear layer of `rank` hidden neurons. It asks less of its components than HOSVD (whose output
directions are orthogonal, each with a full interaction matrix) and less than the eigenvectors of one
output: directions may overlap, and each neuron serves all outputs (Pearce et al. 2025, sections 3.3
and 6 ask for such a relaxation). With ``|l| = |m|`` a neuron is two patterns, the eigenvectors of its
matrix, one that drives the output and one that holds it back:

    ``f(x) = sum_r o_r (1/4 [(l_r + m_r) . x]^2 - 1/4 [(l_r - m_r) . x]^2)``.

>>> shared = cp(tensor, rank=32)
>>> shared.relative_error, shared.weights        # |B - B_hat| / |B|, [32]
>>> shared.plus[0], shared.out[:, 0]             # strongest pattern, and what it writes
>>> shared.tensor.interaction(u).eigh(k=4)       # B_hat is a layer like any other

**How.** Given the input factors, ``out`` is a linear least-squares problem of size rank. It is
eliminated, and the input factors follow by damped Gauss-Newton steps (variable projection). The
matrix of a step is applied from rank x rank Grams and solved by preconditioned conjugate gradients;
the layer itself is met only in the gradient: two products of the 2 rank x d_in and 2 h x d_in
factors and two of out, ``8 rank h (2 d_in + d_out)`` flops or so a step. It converges in tens of steps
where alternating least squares takes hundreds.

A CP fit is not convex: several restarts are made, and `errors` shows how far they agree.

**Degeneracy.** A best CP of given rank need not exist: without a penalty, pairs of neurons of a dense
layer grow without end while they cancel (weights of 100 times the norm of B for a gain of 3 % in
error, measured). `ridge` adds ``ridge * sum_r weight_r^2``, counted for unit l and m, to the squared
error, which keeps the weights below the norm. ``ridge=0`` is for tensors that are of low rank exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor import grams
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.eigendecomposition import fix_signs
from tl_bilinear.tensor.factors import Factors, rescaled
from tl_bilinear.tensor.hosvd import hosvd
from tl_bilinear.tensor.moments import Metric

if TYPE_CHECKING:
    import pandas

Init = Literal["eigen", "random"]

_INNER_STEPS = 10  # conjugate-gradient steps within one Gauss-Newton step, at most
_INNER_TOL = 0.3
_SPARSE_STEPS = 10  # proximal steps on one factor between two products with the layer
_FLOAT32_FLOOR = 1e-4  # squared relative error below which float32 sums are too coarse to go on


@dataclass(frozen=True, eq=False)
class CP(Result):
    """Shared neurons of a bilinear tensor, ordered by falling weight.

    Attributes
    ----------
    left, right: [rank, d_in], of equal norm in each row, with ``||sym(l m^T)|| = 1`` (Frobenius) and
        ``l . m >= 0``; zero rows for neurons that carry nothing
    out: [d_out, rank], what each neuron writes; its column norms are the weights
    norm: Frobenius norm of B
    error: ``||B - B_hat||`` of these factors in float64, whatever the dtype of the fit; an upper bound,
        above the truth by rounding only: 1e-14 of the neurons for small layers, 1e-7 for large ones
    errors: [restarts], the same of each restart, before any sparsity
    dense_error: the error of the best restart before sparsity; `error` where none was asked for:
        the difference is what the zeros cost
    steps: Gauss-Newton steps of the best restart, rejected ones included
    converged: whether the best restart stopped by `tol` rather than by `steps`
    ridge: weight of the penalty on `weights`
    sparsity: weight of the L1 penalty
    input_space, output_space: what the coordinates are
    metric: in which it is fitted; None for the Euclidean one. Left and right are then filters, and
        their norms and products are to be read as ``l M m``
    """

    _finite = ("left", "right", "out")

    left: Float[Tensor, "rank d_in"]
    right: Float[Tensor, "rank d_in"]
    out: Float[Tensor, "d_out rank"]
    norm: float
    error: float
    errors: Float[Tensor, " restarts"]
    dense_error: float
    steps: int
    converged: bool
    ridge: float = 1e-3
    sparsity: float = 0.0
    input_space: str | None = None
    output_space: str | None = None
    metric: Metric | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[0]

    @property
    def weights(self) -> Float[Tensor, " rank"]:
        """[rank], the Frobenius norm of each neuron's part of B_hat, falling."""
        return torch.linalg.vector_norm(self.out, dim=0)

    @property
    def plus(self) -> Float[Tensor, "rank d_in"]:
        """``l + m``: the pattern whose square adds; the eigenvector of positive eigenvalue."""
        return self.left + self.right

    @property
    def minus(self) -> Float[Tensor, "rank d_in"]:
        """``l - m``: the pattern whose square is taken off; orthogonal to `plus`, never longer."""
        return self.left - self.right

    @property
    def relative_error(self) -> float:
        """``||B - B_hat|| / ||B||``; 0 for a zero tensor."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def zeros(self) -> float:
        """Share of the entries of left and right that are exactly zero."""
        return float(torch.cat([self.left, self.right]).eq(0).double().mean())

    @property
    def tensor(self) -> BilinearTensor:
        """B_hat as a layer with d_hidden = rank, in the coordinates of the original."""
        return BilinearTensor(
            self.left,
            self.right,
            self.out,
            input_space=self.input_space,
            output_space=self.output_space,
        )

    def top(self, k: int) -> CP:
        """The k neurons of largest weight; a fit of rank k is better than these.

        `error` is then an upper bound: that of all neurons, and the norm of those left out.
        """
        checks.require_count("k", k, self.rank, "the neurons held")
        left, right = self._whitened(self.left[k:]), self._whitened(self.right[k:])
        factors, power = Factors(left, right, self.out[:, k:]).normalised_together()
        left_out = grams.norm_bound(factors.left, factors.right, factors.weights)
        error = self.error + math.ldexp(left_out, int(power))
        left, right, out = self.left[:k], self.right[:k], self.out[:, :k]
        return replace(self, left=left, right=right, out=out, error=error)

    def _whitened(self, rows: Tensor) -> Tensor:
        return rows if self.metric is None else self.metric.root(rows)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a neuron: rank, weight, its two eigenvalues, the output it writes most."""
        import pandas as pd

        strongest = self.out.abs().argmax(0)
        return pd.DataFrame(
            {
                "rank": range(1, self.rank + 1),
                "weight": self.weights.cpu().numpy(),
                "plus": (self._whitened(self.plus).square().sum(1) / 4).cpu().numpy(),
                "minus": (-self._whitened(self.minus).square().sum(1) / 4).cpu().numpy(),
                "output": strongest.cpu().numpy(),
                "written": self.out.gather(0, strongest[None])[0].cpu().numpy(),
            }
        )


@torch.no_grad()
def cp(
    tensor: BilinearTensor,
    rank: int,
    *,
    restarts: int = 3,
    steps: int = 100,
    tol: float = 1e-3,
    seed: int = 0,
    ridge: float = 1e-3,
    sparsity: float = 0.0,
    init: Init | BilinearTensor = "eigen",
    metric: Metric | None = None,
    progress: bool = True,
) -> CP:
    """Neurons that all outputs share: ``B ~ sum_r o_r (x) sym(l_r m_r^T)``, from the factors.

    Parameters
    ----------
    tensor: BilinearTensor
    rank: int
        How many neurons.
    restarts, steps: int
        Starts (`init`, then random ones), and Gauss-Newton steps of each, at most.
    tol: float
        Relative decrease of the squared error, over a few steps, at which a start has converged.
    seed: int
        Of the random starts.
    ridge: float
        Weight of the squared neuron weights beside the squared error, both relative to ``|B|^2``.
        Without it a dense layer's best fit is made of large neurons that cancel; a planted one is
        recovered exactly with 0.
    sparsity: float
        Weight of an L1 penalty on the input factors, 1e-5 to 1e-3; the result's `dense_error` is
        the error without it.
    init: "eigen", "random" or a BilinearTensor
        Where the first start begins: leading eigenpairs of the HOSVD components, a mixture of
        hidden neurons, or a layer of yours.
    metric: Metric, optional
        The fit is that of ``tensor.whiten(metric)``, best under the inputs that the metric is made of.
        Norms, weights and errors are then the whitened layer's.

    About ``8 rank h (2 d_in + d_out)`` flops a step. Raises ValueError for settings out of range.
    """
    rank = _positive("rank", rank)
    restarts, steps = _positive("restarts", restarts), _positive("steps", steps)
    tol = checks.require_number(
        "tol", tol, "is a relative decrease of the squared error", positive=True
    )
    ridge = checks.require_number("ridge", ridge, "weighs a penalty on the weights")
    sparsity = checks.require_number("sparsity", sparsity, "weighs an L1 penalty")
    source = tensor
    if metric is not None:
        source = tensor.whiten(metric)
        init = init if isinstance(init, str) else init.whiten(metric)
    factors, power = source.factors.normalised_together()
    layer = BilinearTensor(factors.left, factors.right, factors.weights)
    generator = checks.generator(seed)
    start, norm = _first_start(layer, rank, init, generator)
    target = _Target.of(layer, norm)
    fits = []
    with tqdm(total=restarts * steps, unit="step", disable=not progress) as bar:
        for restart in range(restarts):
            if restart:
                start = _random_start(layer, rank, generator)
            fits.append(_fit(target, start, ridge, steps, tol, bar))
    # Errors are taken from the factors as they are returned, in the layer's own dtype.
    fitted = [_normalise(fit.inputs, fit.out, layer) for fit in fits]
    errors = [_error(layer, norm, *each) for each in fitted]
    best = min(range(restarts), key=errors.__getitem__)
    error = errors[best]
    if sparsity > 0:
        sparse = _sparsify(target, fits[best], ridge, sparsity, steps, tol)
        fitted[best] = _normalise(sparse.inputs, sparse.out, layer)
        error = _error(layer, norm, *fitted[best])
    left, right, out = fitted[best]
    if metric is not None:
        left, right = metric.inverse_root(left), metric.inverse_root(right)

    def scaled(number: float) -> float:
        return math.ldexp(number, int(power))

    return CP(
        left,
        right,
        rescaled("what neurons write", out, power, layer.dtype),
        scaled(norm),
        scaled(error),
        torch.tensor([scaled(each) for each in errors], dtype=checks.gram_dtype(layer.left)),
        scaled(errors[best]),
        fits[best].steps,
        fits[best].converged,
        ridge,
        sparsity,
        tensor.input_space,
        tensor.output_space,
        metric,
    )


# ---------------------------------------------------------------------- where a fit starts


def _first_start(
    layer: BilinearTensor, rank: int, init: Init | BilinearTensor, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Input factors [2 rank, d_in] of the first restart, and the norm of B."""
    if isinstance(init, str) and init not in ("eigen", "random"):
        raise ValueError(f"init must be 'eigen', 'random' or a BilinearTensor, got {init!r}")
    if not isinstance(init, (str, BilinearTensor)):
        raise TypeError(f"init must be 'eigen', 'random' or a BilinearTensor, got {init!r}")
    if not isinstance(init, str) and (init.d_in != layer.d_in or init.d_hidden > rank):
        raise ValueError(
            f"init must have d_in={layer.d_in} and at most rank={rank} hidden neurons, got "
            f"d_in={init.d_in} and d_hidden={init.d_hidden}"
        )
    if init == "eigen" and rank < layer.d_hidden:
        return _eigen_start(layer, rank, generator)
    squares = grams.squared_norms(layer.out, layer.left, layer.right)
    norm = math.sqrt(max(0.0, float(squares.sum())))
    if init == "random":
        return _random_start(layer, rank, generator), norm
    if init == "eigen":  # with as many neurons as the layer has, it is its own decomposition
        missing = (0, 0, 0, rank - layer.d_hidden)
        own = [torch.nn.functional.pad(half, missing) for half in (layer.left, layer.right)]
        return torch.cat(own).to(checks.gram_dtype(layer.left)), norm
    assert not isinstance(init, str)
    return _filled(init.left, init.right, rank, layer, generator), norm


def _eigen_start(
    layer: BilinearTensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Neurons made of the leading eigenpairs of the leading HOSVD components.

    For eigenpairs (a, v) and (-b, w) with a, b > 0: ``a v v^T - b w w^T = sym(l m^T)`` with
    ``l, m = sqrt(a) v +- sqrt(b) w``, so that one neuron takes a pair from each end.
    """
    components = hosvd(layer, min(rank, layer.d_out))
    matrices = components.interactions
    assert matrices is not None
    matrices = replace(matrices, weights=matrices.weights * components.values[:, None])
    pairs = min(layer.d_in, 2 * math.ceil(rank / len(matrices)) + 2)
    found = matrices.eigh(pairs, tol=0.1)
    ends = []
    for sign in (1, -1):
        values, order = (sign * found.values).clamp_min(0).sort(descending=True, stable=True)
        vectors = found.vectors.gather(1, order[..., None].expand_as(found.vectors))
        ends.append((values.sqrt()[..., None] * vectors).flatten(0, 1))
    positive, negative = ends
    strength = positive.square().sum(1).square() + negative.square().sum(1).square()
    kept = strength.argsort(descending=True, stable=True)[:rank]
    kept = kept[strength[kept] > 1e-12 * components.norm**2]
    left, right = positive[kept] + negative[kept], positive[kept] - negative[kept]
    # Where one end is missing left = right, and symmetric steps would keep it so.
    noise = torch.randn(right.shape, generator=generator, dtype=torch.float64).to(right)
    length = torch.linalg.vector_norm(right, dim=1, keepdim=True)
    right = right + 1e-2 * length * torch.nn.functional.normalize(noise, dim=1)
    return _filled(left, right, rank, layer, generator), components.norm


def _random_start(layer: BilinearTensor, rank: int, generator: torch.Generator) -> Tensor:
    """Random mixtures of hidden neurons: directions that the layer reads, unlike random ones."""
    mix = torch.randn(2, rank, layer.d_hidden, generator=generator, dtype=torch.float64)
    mix = mix.to(layer.left)
    inputs = torch.cat([mix[0] @ layer.left, mix[1] @ layer.right])
    return inputs.to(checks.gram_dtype(layer.left))


def _filled(
    left: Tensor, right: Tensor, rank: int, layer: BilinearTensor, generator: torch.Generator
) -> Tensor:
    """Input factors [2 rank, d_in], the neurons that are missing taken from a random start."""
    rest = _random_start(layer, rank - len(left), generator).chunk(2)
    return torch.cat([left.to(rest[0]), rest[0], right.to(rest[0]), rest[1]])


# ---------------------------------------------------------------------- the layer, as a fit meets it


class _Target(NamedTuple):
    """The layer's factors. What a fit asks of them is in their dtype, all else in float64."""

    inputs: Tensor  # [2 h, d_in], left over right
    out: Tensor
    square: float  # of the norm of B
    gram_dtype: torch.dtype

    @classmethod
    def of(cls, layer: BilinearTensor, norm: float) -> _Target:
        inputs = torch.cat([layer.left, layer.right])
        return cls(inputs, layer.out, norm**2, checks.gram_dtype(layer.left))

    def precise(self) -> _Target:
        return self._replace(
            inputs=self.inputs.to(self.gram_dtype), out=self.out.to(self.gram_dtype)
        )

    def overlaps(self, inputs: Tensor) -> Tensor:
        """[2 rank, 2 h], inner products of input factors."""
        return inputs.to(self.inputs.dtype) @ self.inputs.T

    def out_product(self, overlaps: Tensor) -> Tensor:
        """[d_out, rank], B contracted with each neuron's matrix."""
        return (self.out @ _neuron_gram(overlaps).T).to(self.gram_dtype)

    def half_product(self, other: Tensor, out: Tensor) -> Tensor:
        """[rank, d_in], the same for left alone (`other` is right) or for right alone."""
        through_left, through_right = self.overlaps(other).chunk(2, 1)
        weights = out.to(self.out.dtype).T @ self.out
        crossed = torch.cat([weights * through_right, weights * through_left], 1)
        return (crossed @ self.inputs).to(self.gram_dtype) / 2

    def input_product(self, overlaps: Tensor, out: Tensor) -> Tensor:
        """[2 rank, d_in], gradient of ``<B, B_hat>`` with respect to the input factors."""
        weights = _tile(out.to(self.out.dtype).T @ self.out)
        return ((weights * _swap(overlaps)) @ self.inputs).to(self.gram_dtype) / 2


def _halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (a, b), (c, d) = (half.chunk(2, 1) for half in x.chunk(2, 0))
    return a, b, c, d


def _swap(x: Tensor) -> Tensor:
    """The four quarters, each in the place of the opposite one."""
    a, b, c, d = _halves(x)
    return torch.cat([torch.cat([d, c], 1), torch.cat([b, a], 1)])


def _tile(x: Tensor) -> Tensor:
    return x.repeat(2, 2)


def _neuron_gram(overlaps: Tensor) -> Tensor:
    """Inner products of ``sym(l m^T)`` from those of the stacked l and m."""
    a, b, c, d = _halves(overlaps)
    return (a * d + b * c) / 2


class _Point(NamedTuple):
    """Input factors, with the out that fits them best."""

    inputs: Tensor  # [2 rank, d_in], left over right; rows of unit norm
    out: Tensor  # [d_out, rank]
    loss: float  # (||B - B_hat||^2 + ridge ||out||^2) / 2
    overlaps: Tensor  # with the layer's, [2 rank, 2 h]
    gram: Tensor  # [2 rank, 2 rank]
    neuron_factor: Tensor  # Cholesky factor of the rank x rank Gram of the neurons, plus ridge


class _Fit(NamedTuple):
    inputs: Tensor
    out: Tensor
    steps: int
    converged: bool


def _positive(name: str, value: int) -> int:
    return checks.require_count(name, value, 2**31, "a count")


def _cholesky(matrix: Tensor) -> Tensor:
    """Of a positive semi-definite matrix, its diagonal raised until it is definite."""
    size = float(matrix.diagonal().amax().clamp_min(torch.finfo(matrix.dtype).tiny))
    raised = 10 * len(matrix) * torch.finfo(matrix.dtype).eps
    while True:
        shifted = matrix + raised * size * torch.eye(len(matrix)).to(matrix)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not int(info):
            return factor
        raised *= 10


def _point(target: _Target, inputs: Tensor, ridge: float) -> _Point:
    inputs = torch.nn.functional.normalize(inputs, dim=1)
    gram = inputs @ inputs.T
    neurons = _neuron_gram(gram) + ridge * torch.eye(len(gram) // 2).to(gram)
    factor = _cholesky(neurons)
    overlaps = target.overlaps(inputs)
    product = target.out_product(overlaps)
    out = torch.cholesky_solve(product.T, factor).T
    fitted = (out * (2 * product - out @ neurons)).sum()
    return _Point(inputs, out, (target.square - float(fitted)) / 2, overlaps, gram, factor)


# ---------------------------------------------------------------------- damped Gauss-Newton


def _fit(target: _Target, start: Tensor, ridge: float, steps: int, tol: float, bar: tqdm) -> _Fit:
    point = _point(target, start, ridge)
    damping, growth, quiet, taken = 1e-2, 2.0, 0, 0
    converged = False
    scale = max(target.square / 2, torch.finfo(target.gram_dtype).tiny)
    while taken < steps:
        taken += 1
        bar.update()
        if point.loss < _FLOAT32_FLOOR * scale and target.inputs.dtype != target.gram_dtype:
            target = target.precise()
            point = _point(target, point.inputs, ridge)
        if point.loss <= 1e-15 * scale:
            converged = True
            break
        change, predicted = _gauss_newton(target, point, damping)
        candidate = _point(target, point.inputs + change, ridge)
        decrease = point.loss - candidate.loss
        ratio = decrease / predicted if predicted > 0 else 0.0
        if decrease > 0:
            quiet = quiet + 1 if decrease <= tol * point.loss else 0
            point = candidate
            damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
            growth = 2.0
        else:
            # No step however short gains more than rounding.
            quiet = quiet + 1 if predicted <= tol * point.loss else 0
            damping, growth = damping * growth, growth * 2
        damping = min(max(damping, 1e-12), 1e12)
        bar.set_postfix_str(f"relative error {math.sqrt(max(0.0, point.loss / scale)):.4f}")
        if quiet == 2:
            converged = True
            break
    bar.update(steps - taken)
    return _Fit(point.inputs, point.out, taken, converged)


def _gauss_newton(target: _Target, point: _Point, damping: float) -> tuple[Tensor, float]:
    """A step of the input factors and the decrease of the loss that its model predicts.

    The Gauss-Newton matrix of all three factors with that of out eliminated (a Schur complement):
    out itself never enters, only its rank x rank Gram.
    """
    inputs, gram = point.inputs, point.gram
    out_gram = point.out.T @ point.out
    swapped, tiled = _swap(gram), _tile(out_gram)
    direct = tiled * swapped / 2

    def tangent(change: Tensor) -> Tensor:  # the length of a row is no matter of the fit
        return change - (change * inputs).sum(1, keepdim=True) * inputs

    gradient = tangent(direct @ inputs - target.input_product(point.overlaps, point.out))
    diagonal = direct.diagonal()
    shift = damping * diagonal.clamp_min(1e-8 * float(diagonal.amax()))
    preconditioner = _cholesky(direct + shift.diag())

    def apply(step: Tensor) -> Tensor:
        overlaps = inputs @ step.T
        a, b, c, d = _halves(overlaps * swapped)
        moved = (a + b + c + d) / 2  # how the neurons' Gram changes on one side
        out_answer = -out_gram @ torch.cholesky_solve(moved, point.neuron_factor).T
        mixed = _tile(out_answer) * swapped + tiled * _swap(overlaps)
        return tangent(mixed @ inputs / 2 + direct @ step)

    step = torch.zeros_like(inputs)
    residual = -gradient
    direction = better = tangent(torch.cholesky_solve(residual, preconditioner))
    slope = (residual * better).sum()
    first = float(slope)
    for _ in range(_INNER_STEPS):
        if not float(slope) > _INNER_TOL**2 * first:
            break
        product = apply(direction) + shift[:, None] * direction
        curvature = (direction * product).sum()
        if not float(curvature) > 0:
            break
        length = slope / curvature
        step = step + length * direction
        residual = residual - length * product
        better = tangent(torch.cholesky_solve(residual, preconditioner))
        last, slope = slope, (residual * better).sum()
        direction = better + (slope / last) * direction
    predicted = -(gradient * step).sum() - (step * apply(step)).sum() / 2
    return step, float(predicted)


# ---------------------------------------------------------------------- sparsity


def _sparsify(
    target: _Target, fit: _Fit, ridge: float, sparsity: float, steps: int, tol: float
) -> _Fit:
    """Block proximal descent on ``||B - B_hat||^2 / (2 |B|^2) + sparsity * (|left|_1 + |right|_1)``.

    B is scaled to norm 1 and out to columns of norm at most 1, so that the penalty cannot be
    escaped by moving scale from the input factors to out. Soft thresholds make exact zeros; out is
    refitted at the end, which undoes the shrinkage that the penalty causes and keeps the zeros.
    """
    scale = math.sqrt(target.square) or 1.0
    weights = torch.linalg.vector_norm(fit.out, dim=0)
    out = torch.nn.functional.normalize(fit.out, dim=0)
    halves = list((fit.inputs * (weights / scale).sqrt().repeat(2)[:, None]).chunk(2))
    last, quiet, taken = math.inf, 0, 0
    while taken < steps and quiet < 2:
        taken += 1
        for index in (0, 1):
            other = halves[1 - index]
            out_gram = out.T @ out
            direct = out_gram * (other @ other.T)
            wanted = target.half_product(other, out) / scale
            halves[index] = _proximal(
                halves[index],
                partial(_half_slope, other=other, out_gram=out_gram, direct=direct, wanted=wanted),
                float(torch.linalg.eigvalsh(direct)[-1]),
                lambda x, step: torch.nn.functional.softshrink(x, sparsity * step),
            )
        inputs = torch.cat(halves)
        neurons = _neuron_gram(inputs @ inputs.T)
        product = target.out_product(target.overlaps(inputs)) / scale
        out = _proximal(
            out,
            partial(_out_slope, neurons=neurons, product=product),
            float(torch.linalg.eigvalsh(neurons)[-1]),
            lambda x, step: x / torch.linalg.vector_norm(x, dim=0).clamp_min(1),
        )
        loss = (1 - float((out * (2 * product - out @ neurons)).sum())) / 2
        objective = loss + sparsity * float(inputs.abs().sum())
        quiet = quiet + 1 if abs(last - objective) <= tol * objective else 0
        last = objective
    point = _point(target, torch.cat(halves), ridge)
    return _Fit(point.inputs, point.out, taken, quiet == 2)


def _half_slope(
    x: Tensor, other: Tensor, out_gram: Tensor, direct: Tensor, wanted: Tensor
) -> Tensor:
    return (direct @ x + (out_gram * (other @ x.T)) @ other) / 2 - wanted


def _out_slope(out: Tensor, neurons: Tensor, product: Tensor) -> Tensor:
    return out @ neurons - product


def _proximal(
    x: Tensor,
    slope: Callable[[Tensor], Tensor],
    curvature: float,
    shrink: Callable[[Tensor, float], Tensor],
) -> Tensor:
    """Accelerated proximal steps (FISTA) on a quadratic of at most this curvature."""
    if not curvature > 0:
        return x
    ahead, momentum = x, 1.0
    for _ in range(_SPARSE_STEPS):
        moved = shrink(ahead - slope(ahead) / curvature, 1 / curvature)
        faster = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / faster * (moved - x)
        x, momentum = moved, faster
    return x


# ---------------------------------------------------------------------- the result


def _normalise(inputs: Tensor, out: Tensor, layer: BilinearTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left, right and out in the form that :class:`CP` promises, in the layer's dtype."""
    left, right = inputs.chunk(2)
    left_length, right_length = (
        torch.linalg.vector_norm(half, dim=1, keepdim=True) for half in (left, right)
    )
    alive = (left_length > 0) & (right_length > 0)
    left = torch.where(alive, left / left_length, 0.0)
    right = torch.where(alive, right / right_length, 0.0)
    cosine = (left * right).sum(1, keepdim=True)
    flip = torch.where(cosine < 0, -1.0, 1.0).to(left)
    right = right * flip
    plus = left + right
    sign = torch.where((fix_signs(plus) == plus).all(1, keepdim=True), 1.0, -1.0).to(left)
    norm = ((1 + cosine.square()) / 2).sqrt()  # of sym(l m^T) for unit l and m
    out = out * (flip * norm * left_length * right_length).T
    order = torch.linalg.vector_norm(out, dim=0).argsort(descending=True, stable=True)
    scale = (sign / norm.sqrt())[order]
    left, right, out = scale * left[order], scale * right[order], out[:, order]
    return left.to(layer.dtype), right.to(layer.dtype), out.to(layer.dtype).contiguous()


def _error(layer: BilinearTensor, norm: float, left: Tensor, right: Tensor, out: Tensor) -> float:
    """``||B - B_hat||``, from above."""
    return grams.distance((layer.left, layer.right, layer.out), (left, right, out), norm**2)
