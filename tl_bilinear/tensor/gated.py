"""Gated MLPs that are not bilinear, and the bilinear layer that comes nearest to each.

A gated layer is

    ``f(x) = out (act(g) * u) + bias_out``,  ``g = gate x + bias_gate``,  ``u = up x + bias_up``.

With an affine function ``a + b g`` of each hidden neuron in place of ``act(g)`` it is bilinear, with
biases: ``left = b gate``, ``bias_left = a + b bias_gate``. Its error ``out ((act(g) - a - b g) * u)`` is
linear in a and b, so the best of them under the layer's inputs are a least-squares problem, whose
normal equations need only second moments of the features ``[u, g u]`` and the target ``act(g) u``:

- ``fit="neuron"`` weighs each neuron's error by its own up branch, ``E[u^2 (act(g) - a - b g)^2]``;
- ``fit="output"`` minimises the error of the layer's output, all neurons jointly, so that their errors
  may cancel;
- ``fit="refit"`` fits the output map and its bias as well, in turn with a and b.

**Which tokens count.** A few massive tokens can carry most of the variance
(`tl_bilinear.tensor.fidelity`): least squares then fits them and nothing else. By default they are
left out of the fit and scored apart.

The moments are those of sample inputs, or of Gaussian inputs of a given mean and covariance. Given one
pre-activation the others are then Gaussian too, which leaves one-dimensional integrals
``E[act(g) z^k]``, done by Gauss-Hermite quadrature.

>>> import torch
>>> from tl_bilinear import approximate
>>> approximation = approximate(llama.model.layers[0].mlp, inputs)  # [n, d_model]
>>> approximation.tensor, approximation.variance_explained
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.fidelity import Fidelity, Massive, fidelity, find_massive
from tl_bilinear.tensor.registry import read_gated
from tl_bilinear.tensor.widened import widened

if TYPE_CHECKING:
    import pandas as pd

Fit = Literal["neuron", "output", "refit"]
Weights = Literal["ordinary", "token", "equal"]
Inputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, Tensor]

WARN_BELOW = 0.9
"""Variance explained below which an approximation warns."""

_NODES = 64  # of the quadrature; exact for polynomials of degree 127
_DRAWN = 4096  # Gaussian inputs that the fidelity is measured on
_BLOCK = 4096  # inputs a product
_ROUNDS = 8  # of fit="refit"; the error falls with each, the last ones by little
_RIDGE = 1e-6  # relative, towards the fit before: decides where the inputs do not
_UNNAMED = "output"  # the space of an output that nobody has named
_NOTE = " (approximation of a "  # how the space of an approximate layer's output goes on


@dataclass(frozen=True, eq=False)
class GatedLayer:
    """A gated MLP in factored form: ``out (act(gate x + bias_gate) * (up x + bias_up)) + bias_out``.

    gate, up: [d_hidden, d_in]; out: [d_out, d_hidden]; `activation` acts on each number by itself.
    """

    gate: Float[Tensor, "d_hidden d_in"]
    up: Float[Tensor, "d_hidden d_in"]
    out: Float[Tensor, "d_out d_hidden"]
    activation: Callable[[Tensor], Tensor]
    bias_gate: Float[Tensor, " d_hidden"] | None = None
    bias_up: Float[Tensor, " d_hidden"] | None = None
    bias_out: Float[Tensor, " d_out"] | None = None

    @property
    def d_in(self) -> int:
        return self.gate.shape[1]

    @property
    def d_hidden(self) -> int:
        return self.gate.shape[0]

    @property
    def activation_name(self) -> str:
        return getattr(self.activation, "__name__", None) or type(self.activation).__name__

    def branches(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_hidden"], Float[Tensor, "... d_hidden"]]:
        """The gate's pre-activations g and the up branch u."""
        return linear(x, self.gate, self.bias_gate), linear(x, self.up, self.bias_up)

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        g, u = self.branches(x)
        return linear(self.activation(g) * u, self.out, self.bias_out)

    def to(self, dtype: torch.dtype) -> GatedLayer:
        """The same layer with weights of another dtype."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "activation"}
        moved: dict[str, Any] = {n: None if t is None else t.to(dtype) for n, t in tensors.items()}
        return replace(self, **moved)

    def with_gate(
        self,
        intercept: Float[Tensor, " d_hidden"],
        slope: Float[Tensor, " d_hidden"],
    ) -> BilinearTensor:
        """The bilinear layer with ``intercept + slope * g`` in place of ``activation(g)``."""
        bias = intercept if self.bias_gate is None else intercept + slope * self.bias_gate
        return BilinearTensor(
            slope[:, None] * self.gate, self.up, self.out, bias, self.bias_up, self.bias_out
        )


@dataclass(frozen=True, eq=False)
class Approximation(Result):
    """A bilinear layer in place of a gated one, and how near it comes.

    Attributes
    ----------
    tensor: BilinearTensor
        The layer, with biases. Its spaces say that it is an approximation. Neurons that were added
        (`extra`) come after the layer's own.
    intercept, slope: [d_hidden]
        a and b: the affine function that stands for each neuron's activation.
    errors: [d_hidden]
        Mean square of what each neuron alone writes wrongly, relative to the variance of the layer's
        output. They do not add up to the layer's error: neurons cancel.
    fidelity: Fidelity
        How much of the output's variance it explains on inputs that the fit has not seen: overall,
        without massive tokens, of the median token, in each group of text.
    measured_on: str
        Which inputs those are.
    """

    tensor: BilinearTensor
    intercept: Float[Tensor, " d_hidden"]
    slope: Float[Tensor, " d_hidden"]
    errors: Float[Tensor, " d_hidden"]
    fidelity: Fidelity
    activation: str
    fit: str
    weights: str
    measured_on: str

    @property
    def variance_explained(self) -> float:
        """Of all tokens, massive ones included: ``1 - E|f - f'|^2 / E|f - E f|^2``."""
        return self.fidelity.overall

    @property
    def worst(self) -> tuple[str, float]:
        """What is explained worst (all tokens, the ordinary, the median one, a group), and how much."""
        return self.fidelity.worst

    def __str__(self) -> str:
        name, worst = self.worst
        low = "" if name == "all tokens" else f", {worst:.1%} of {name}"
        below = " (worse than the mean)" if worst < 0 else ""
        return (
            f"bilinear in place of {self.activation}: {self.variance_explained:.1%} of the output's "
            f"variance{low}{below}, on {self.measured_on} (fit={self.fit!r})"
        )

    def __repr__(self) -> str:
        sizes = f"{self.tensor.d_in} -> {self.tensor.d_hidden} -> {self.tensor.d_out}"
        return f"Approximation({sizes}: {self})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a hidden neuron: neuron, intercept, slope, errors; those least affine first."""
        import pandas as pd

        columns = {name: getattr(self, name).tolist() for name in ("intercept", "slope", "errors")}
        table = pd.DataFrame({"neuron": range(len(self.errors)), **columns})
        return table.sort_values("errors", ascending=False, kind="stable", ignore_index=True)


def approximate(
    mlp: nn.Module | GatedLayer,
    inputs: Inputs,
    *,
    fit: Fit = "refit",
    weights: Weights | Float[Tensor, " n"] = "ordinary",
    extra: int = 0,
    held_out: float = 0.2,
    warn_below: float = WARN_BELOW,
    max_bytes: int = checks.MAX_DENSE_BYTES,
    input_space: str | None = None,
    output_space: str | None = None,
) -> Approximation:
    """The bilinear layer nearest to a gated MLP that is not bilinear, and how near it is.

    The activation of each hidden neuron becomes the affine function ``a + b g`` of its pre-activation
    that is best under the layer's inputs, so the result is an exact BilinearTensor with biases.

    Parameters
    ----------
    mlp: nn.Module or GatedLayer
        A gated MLP of Hugging Face (``gate_proj``, ``up_proj``, ``down_proj``) or of TransformerLens,
        with any activation that acts on each number by itself.
    inputs: [..., d_in], {group: [..., d_in]}, or (mean [d_in], covariance [d_in, d_in])
        Activations at the MLP's input, some tens for each hidden neuron, the last `held_out` share of
        which the fidelity is measured on; the same by group of text (of each the last share), so that
        the fidelity is given for each; or their first two moments, taken as Gaussian. Real inputs are
        not: samples fit better.
    fit: "neuron", "output" or "refit"
        Each neuron by itself (cheap at any size); all jointly, for the least error of the layer's
        output; or together with the output map and its bias.
    weights: "ordinary", "token", "equal" or [n]
        How much each input counts in the fit: all but the massive ones the same; each by the inverse of
        its squared distance from the median output (relative errors), massive ones left out; all
        the same, massive ones too; or numbers of your own, one for each input in the order given.
    extra: int
        Hidden neurons to add, squares of directions along which the fit leaves most
        (`tl_bilinear.tensor.widened`), and with them d_in linear ones: a larger layer that is nearer.
        As many as there are already took a third of what was left. At most d_out d_in.
    warn_below: float
        A warning is given where the worst of the fidelity's scores lies below; it says which.
    max_bytes: int
        Of the moments that "output" and "refit" take, 80 d_hidden^2.

    Raises TypeError for a module that no reader recognises; ValueError for inputs of another width or
    too few, or an unknown fit; MemoryError above `max_bytes`, naming the way around.
    """
    layer = mlp if isinstance(mlp, GatedLayer) else read_gated(mlp)
    if fit not in get_args(Fit):
        raise ValueError(f"unknown fit {fit!r}; there are {', '.join(get_args(Fit))}")
    checks.require_number("held_out", held_out, "is a share of the inputs")
    if warn_below != -math.inf:  # never
        checks.require_number("warn_below", warn_below, "is a share of the variance", signed=True)
    dtype = checks.compute_dtype(layer.gate.dtype)
    exact = layer.to(checks.gram_dtype(layer.gate))
    fitted_on, test, kept_out, groups, measured_on = _parted(inputs, exact, held_out)
    massive, weight = _weigh(exact, fitted_on, test, kept_out, weights)
    if extra:
        checks.require_count("extra", extra, len(layer.out) * layer.d_in, "neurons to add")
        if not isinstance(fitted_on, Tensor):
            raise ValueError("extra neurons are found on samples: pass activations [n, d_in]")
        checks.require_affordable(
            f"the Gram matrix of {exact.d_hidden + extra + exact.d_in} neurons",
            (exact.d_hidden + extra + exact.d_in) ** 2,
            exact.gate.dtype,
            max_bytes,
            "add fewer",
        )
    if fit == "neuron" and isinstance(fitted_on, Tensor):
        intercept, slope = _fit_neurons(*_sample_weights(exact, fitted_on, weight))
        tensor = exact.with_gate(intercept, slope)
    else:
        checks.require_affordable(
            f"the moments of {exact.d_hidden} neurons",
            10 * exact.d_hidden**2,
            exact.gate.dtype,
            max_bytes,
            "use fit='neuron' with sample inputs" if fit != "neuron" else "pass sample inputs",
        )
        if isinstance(fitted_on, Tensor):
            moments = _sample_moments(exact, fitted_on, weight)
        else:
            moments = _gaussian_moments(exact, *fitted_on)
        intercept, slope, tensor = _solve(exact, moments, fit)
    if extra:
        assert isinstance(fitted_on, Tensor)  # refused above
        even = fitted_on.new_ones(len(fitted_on)) if weight is None else weight
        tensor = widened(exact, tensor, fitted_on, even, extra)
    score = fidelity(exact, tensor, test, massive, groups)
    errors = _neuron_errors(exact, intercept, slope, test)
    result = Approximation(
        replace(
            tensor.to(dtype),
            input_space=input_space,
            output_space=f"{output_space or _UNNAMED}{_NOTE}{_described(layer, score)})",
        ),
        intercept.to(dtype),
        slope.to(dtype),
        errors.to(dtype),
        score.to(dtype),
        layer.activation_name,
        fit,
        weights if isinstance(weights, str) else "given",
        measured_on,
    )
    if not score.worst[1] >= warn_below:
        warnings.warn(_warning(result, warn_below), stacklevel=2)
    return result


@torch.no_grad()
def rescored(
    before: Approximation,
    layer: GatedLayer,
    tensor: BilinearTensor,
    inputs: Float[Tensor, "n d_in"],
    fit: str,
) -> Approximation:
    """An approximation with another tensor (trained further, say), its fidelity measured on inputs.

    The massive tokens, the affine gates and the neurons' own errors are those of `before`.
    """
    exact = layer.to(checks.gram_dtype(layer.gate))
    x = inputs.reshape(-1, layer.d_in).to(exact.gate)
    massive = before.fidelity.massive.to(exact.gate.dtype)
    score = fidelity(exact, tensor.to(exact.gate.dtype), x, massive).to(tensor.dtype)
    written = without_note(before.tensor.output_space) or _UNNAMED
    return replace(
        before,
        tensor=replace(
            tensor,
            input_space=before.tensor.input_space,
            output_space=f"{written}{_NOTE}{_described(layer, score)})",
        ),
        fidelity=score,
        fit=f"{before.fit}, {fit}",
        measured_on=f"{len(x):,} inputs",
    )


def approximation_note(tensor: BilinearTensor) -> str | None:
    """What an approximate layer stands for, and how well; None for an exact one."""
    note = (tensor.output_space or "").partition(_NOTE)[2]
    return f"approximation of a {note.removesuffix(')')}" if note else None


def without_note(space: str | None) -> str | None:
    """A space without the words that it is that of an approximation; None for one without a name."""
    named = (space or "").partition(_NOTE)[0]
    return None if named in ("", _UNNAMED) else named


def _described(layer: GatedLayer, score: Fidelity) -> str:
    name, worst = score.worst
    low = "" if name == "all tokens" else f", {worst:.1%} of {name}"
    return f"{layer.activation_name} layer, {score.overall:.1%} of its variance{low}"


def _warning(result: Approximation, level: float) -> str:
    score = result.fidelity
    name, worst = score.worst
    mean = " It is worse than the layer's mean, a constant." if worst < 0 else ""
    if worst < 0 and result.fit != "refit":
        mean += f" fit={result.fit!r} does that: take fit='refit'."
    apart = f" {str(score.massive).capitalize()}." if len(score.massive) else ""
    others = {n: v for n, v in score.scores().items() if n != name}
    listed = ", ".join(f"{v:.1%} of {n}" for n, v in others.items())
    return (
        f"this bilinear layer explains {worst:.1%} of the variance of the {result.activation} layer "
        f"that it stands for in {name} ({listed}), less than {level:.0%}: what is read from it may "
        f"not hold for the layer there.{mean}{apart} Measure the loss added, or finetune the model "
        "(`tl-bilinear finetune`)"
    )


# ---------------------------------------------------------------------- inputs


class _Parted(NamedTuple):
    fitted_on: Tensor | tuple[Tensor, Tensor]  # rows, or mean and covariance
    test: Float[Tensor, "n d_in"]
    kept_out: Tensor | None  # [n], whether an input, in the order given, is one of the test
    groups: list[tuple[str, int]]  # of the test
    measured_on: str


def _parted(inputs: Inputs, layer: GatedLayer, held_out: float) -> _Parted:
    """What to fit on, what to measure on, and what to call the latter."""
    if not isinstance(inputs, tuple):
        groups = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if not groups:
            raise ValueError(
                "inputs has no group: pass {name: activations [n, d_in]}, or activations"
            )
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}")
        fitted, test, kept_out = [], [], []
        for name, some in groups.items():
            called = f"inputs[{name!r}]" if name else "inputs"
            rows = checks.require_rows(called, some, layer.d_in, "d_in", layer.gate)
            rows = rows.reshape(-1, layer.d_in)
            checks.require_finite(called, rows)
            # The last ones: neighbouring tokens of one text are not independent.
            count = math.ceil(held_out * len(rows))
            if len(rows) - count < 2:
                raise ValueError(
                    f"{len(rows)} {called} are too few to fit and to measure on: pass at least some "
                    f"thousands of activations [n, {layer.d_in}], or their mean and covariance"
                )
            fitted.append(rows[:-count])
            test.append(rows[-count:])
            kept_out.append(torch.arange(len(rows), device=rows.device) >= len(rows) - count)
        measured = torch.cat(test)
        return _Parted(
            torch.cat(fitted),
            measured,
            torch.cat(kept_out),
            [(name, len(one)) for name, one in zip(groups, test, strict=True)],
            f"{len(measured):,} held-out inputs",
        )
    mean, covariance = inputs
    mean = checks.require_rows("mean", mean, layer.d_in, "d_in", layer.gate)
    covariance = checks.require_rows("covariance", covariance, layer.d_in, "d_in", layer.gate)
    if mean.ndim != 1 or covariance.shape != (layer.d_in, layer.d_in):
        raise ValueError(
            f"expected a mean [{layer.d_in}] and a covariance [{layer.d_in}, {layer.d_in}], got "
            f"{checks.shape(mean)} and {checks.shape(covariance)}"
        )
    checks.require_finite("mean", mean)
    checks.require_finite("covariance", covariance)
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(f"the covariance has a negative eigenvalue, {values[0].item():.3g}")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_DRAWN, layer.d_in, generator=generator, dtype=torch.float64).to(mean)
    drawn = mean + (noise * values.clamp_min(0).sqrt()) @ vectors.mT
    called = f"{_DRAWN:,} Gaussian inputs of that mean and covariance"
    return _Parted((mean, covariance), drawn, None, [], called)


def _weigh(
    layer: GatedLayer,
    fitted_on: Tensor | tuple[Tensor, Tensor],
    test: Tensor,
    kept_out: Tensor | None,
    weights: Weights | Tensor,
) -> tuple[Massive, Tensor | None]:
    """The massive tokens, and what each input of the fit weighs; None for all the same."""
    if isinstance(weights, str) and weights not in get_args(Weights):
        raise ValueError(
            f"unknown weights {weights!r}; there are {', '.join(get_args(Weights))}, or a tensor [n]"
        )
    if kept_out is None or not isinstance(fitted_on, Tensor):
        if not isinstance(weights, str):
            raise ValueError(
                "weights of inputs go with inputs, and these are a mean and a covariance"
            )
        return find_massive(layer, test, find=False)[0], None
    rows = test.new_empty(len(kept_out), layer.d_in)
    rows[kept_out], rows[~kept_out] = test, fitted_on
    massive, far = find_massive(layer, rows)
    if isinstance(weights, str):
        if weights == "equal":
            return massive, None
        weight = torch.ones_like(far)
        if weights == "token":
            # A token near the centre has no more than a hundred times the median token's weight.
            weight = 1 / far.square().clamp_min(
                far.median().square() / 100 + torch.finfo(far.dtype).tiny
            )
        weight[massive.rows] = 0
    else:
        weight = checks.require_tensor("weights", weights).to(far)
        checks.require_finite("weights", weight)
        if weight.shape != far.shape or bool((weight < 0).any()):
            raise ValueError(
                f"weights must be {len(far)} numbers of at least 0, one for each input, got "
                f"{checks.shape(weights)}"
            )
    used = weight[~kept_out]
    if not bool(used.any()):
        raise ValueError("weights leave no input to fit on: all of them are 0")
    return massive, used


class _Moments(NamedTuple):
    """Of the features phi = [u, g u], f = 2 h of them, and the targets t = act(g) u."""

    features: Float[Tensor, " f"]  # E[phi]
    target: Float[Tensor, " h"]  # E[t]
    gram: Float[Tensor, "f f"]  # E[phi phi^T]
    cross: Float[Tensor, "f h"]  # E[phi t^T]


def _features(
    layer: GatedLayer, x: Float[Tensor, "n d_in"], weight: Float[Tensor, " n"] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What each input weighs (they add up to 1), its features and its target, block by block."""
    if weight is None:
        weight = x.new_ones(len(x))
    x, weight = x[weight > 0], weight[weight > 0] / weight.sum()
    for block, w in zip(x.split(_BLOCK), weight.split(_BLOCK), strict=True):
        g, u = layer.branches(block)
        yield w, torch.cat([u, g * u], -1), layer.activation(g) * u


def _sample_moments(
    layer: GatedLayer, x: Float[Tensor, "n d_in"], weight: Float[Tensor, " n"] | None = None
) -> _Moments:
    h = layer.d_hidden
    sums = _Moments(*(x.new_zeros(size) for size in (2 * h, h, (2 * h, 2 * h), (2 * h, h))))
    for w, phi, t in _features(layer, x, weight):
        weighed = w[:, None] * phi
        for old, new in zip(sums, (w @ phi, w @ t, weighed.mT @ phi, weighed.mT @ t), strict=True):
            old += new
    return sums


def _sample_weights(
    layer: GatedLayer, x: Float[Tensor, "n d_in"], weight: Float[Tensor, " n"] | None = None
) -> tuple[Tensor, ...]:
    """E of u^2 times 1, g, g^2, act(g), g act(g), each [h]: the diagonals of the moments."""
    sums = torch.zeros(5, layer.d_hidden).to(layer.gate)
    for w, phi, t in _features(layer, x, weight):
        u, gu = phi.chunk(2, -1)
        sums += torch.stack([w @ (p * q) for p, q in ((u, u), (u, gu), (gu, gu), (u, t), (gu, t))])
    return tuple(sums)


def _gaussian_moments(
    layer: GatedLayer, mean: Float[Tensor, " d_in"], covariance: Float[Tensor, "d_in d_in"]
) -> _Moments:
    """Under ``x ~ N(mean, covariance)``, exact but for the quadrature.

    For any function s of g_j, with z the standardised g_j, every other branch is
    ``y = m_y + c_y z + r_y`` with r independent of z; so E[u_i s(g_j) u_j] and E[g_i u_i s(g_j) u_j]
    are polynomials in m, c, Cov(r) and S_k = E[s z^k]. The gram is the same with s = 1 and s = g.
    """
    m_g, m_u = layer.branches(mean)
    C_gg = layer.gate @ covariance @ layer.gate.mT
    C_gu = layer.gate @ covariance @ layer.up.mT
    C_uu = layer.up @ covariance @ layer.up.mT
    std = C_gg.diagonal().clamp_min(0).sqrt()
    safe = std.clamp_min(torch.finfo(std.dtype).tiny)
    c_g, c_u = C_gg / safe, C_gu.mT / safe  # [i, j]: how branch i moves with z_j
    own = c_u.diagonal()
    R_uu, R_gu = C_uu - c_u * own, C_gu - c_g * own  # with u_j, given z_j
    R_ii = C_gu.diagonal()[:, None] - c_g * c_u  # g_i with u_i, given z_j

    def cross(S: Float[Tensor, "4 h"]) -> tuple[Tensor, Tensor]:
        u_u = _product((m_u[:, None], c_u), (m_u, own))
        first = _expect(u_u, S) + R_uu * S[0]
        g, u, v = (m_g[:, None], c_g), (m_u[:, None], c_u), (m_u, own)
        second = _expect(_product(g, u, v), S)
        second = second + R_ii * _expect(v, S) + R_gu * _expect(u, S) + R_uu * _expect(g, S)
        return first, second

    nodes, weights = _hermite(m_g)
    g = m_g + std * nodes[:, None]

    def integrals(s: Tensor) -> Float[Tensor, "4 h"]:
        return torch.stack([((weights * nodes**k)[:, None] * s).sum(0) for k in range(4)])

    one, identity, target = (integrals(s) for s in (torch.ones_like(g), g, layer.activation(g)))
    (uu, _), (u_gu, gu_gu), t = cross(one), cross(identity), cross(target)
    return _Moments(
        torch.cat([m_u, _expect((m_u, own), identity)]),
        _expect((m_u, own), target),
        torch.cat([torch.cat([uu, u_gu], 1), torch.cat([u_gu.mT, gu_gu], 1)]),
        torch.cat(t),
    )


def _hermite(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal distribution."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / weights.sum()
    return torch.from_numpy(nodes).to(like), torch.from_numpy(weights).to(like)


def _product(*factors: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Coefficients, by power of z, of a product of linear functions m + c z."""
    powers = [torch.ones_like(factors[0][0])]
    for m, c in factors:
        lower = [p * m for p in powers] + [torch.zeros_like(m)]
        upper = [torch.zeros_like(m)] + [p * c for p in powers]
        powers = [x + y for x, y in zip(lower, upper, strict=True)]
    return tuple(powers)


def _expect(coefficients: tuple[Tensor, ...], S: Float[Tensor, "4 h"]) -> Tensor:
    return torch.stack([c * S[k] for k, c in enumerate(coefficients)]).sum(0)


# ---------------------------------------------------------------------- fits


def _fit_neurons(
    uu: Tensor, gu: Tensor, ggu: Tensor, su: Tensor, sgu: Tensor
) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"]]:
    """Weighted regression of act(g) on g, each neuron by itself: intercept and slope."""
    weight = uu.clamp_min(torch.finfo(uu.dtype).tiny)
    mean_g, mean_s = gu / weight, su / weight
    variance = ggu / weight - mean_g**2
    # A gate that does not move is a constant.
    moves = variance > 1e-12 * (ggu / weight).clamp_min(torch.finfo(uu.dtype).tiny)
    covariance = sgu / weight - mean_g * mean_s
    slope = torch.where(moves, covariance / torch.where(moves, variance, 1.0), 0.0)
    return mean_s - slope * mean_g, slope


def _solve(
    layer: GatedLayer, moments: _Moments, fit: Fit
) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"], BilinearTensor]:
    h = layer.d_hidden
    gram, cross = moments.gram, moments.cross
    theta = torch.cat(
        _fit_neurons(
            gram.diagonal()[:h],
            gram.diagonal(h),
            gram.diagonal()[h:],
            cross[:h].diagonal(),
            cross[h:].diagonal(),
        )
    )
    out, bias_out = layer.out, layer.bias_out
    if fit != "neuron":
        theta = _fit_output(theta, out, out, gram, cross)
    if fit == "refit":
        bias = torch.zeros_like(out[:, 0]) if bias_out is None else bias_out
        features, target = moments.features, moments.target
        gram = gram - torch.outer(features, features)  # a bias of the output takes the means
        cross = cross - torch.outer(features, target)
        for _ in range(_ROUNDS):
            out = _fit_map(theta, layer.out, out, gram, cross)
            theta = _fit_output(theta, out, layer.out, gram, cross)
        bias_out = bias + layer.out @ target - out @ _combined(theta, features)
    fitted = replace(layer, out=out, bias_out=bias_out)
    return theta[:h], theta[h:], fitted.with_gate(theta[:h], theta[h:])


def _fit_output(
    theta: Float[Tensor, " f"],
    out: Float[Tensor, "d_out h"],
    true_out: Float[Tensor, "d_out h"],
    gram: Float[Tensor, "f f"],
    cross: Float[Tensor, "f h"],
) -> Float[Tensor, " f"]:
    """The intercepts and slopes that minimise ``E|true_out t - out (a u + b g u)|^2``."""
    K = out.mT @ out
    normal = gram * K.repeat(2, 2)
    right = (cross * (out.mT @ true_out).repeat(2, 1)).sum(1)
    return theta + _ridge(normal, right - normal @ theta)


def _fit_map(
    theta: Float[Tensor, " f"],
    true_out: Float[Tensor, "d_out h"],
    out: Float[Tensor, "d_out h"],
    gram: Float[Tensor, "f f"],
    cross: Float[Tensor, "f h"],
) -> Float[Tensor, "d_out h"]:
    """The output map that minimises the same error."""
    hidden = _combined(theta, _combined(theta, gram).mT)
    right = _combined(theta, cross) @ true_out.mT
    return out + _ridge(hidden, right - hidden @ out.mT).mT


def _combined(theta: Float[Tensor, " f"], features: Float[Tensor, "f ..."]) -> Tensor:
    """``a u + b g u`` along the first dimension."""
    shape = (-1,) + (1,) * (features.ndim - 1)
    a, b = theta.chunk(2)
    first, second = features.chunk(2)
    return a.reshape(shape) * first + b.reshape(shape) * second


def _ridge(normal: Float[Tensor, "n n"], right: Float[Tensor, "n ..."]) -> Tensor:
    """The step that solves the normal equations, held back where they decide nothing."""
    scale = normal.diagonal().clamp_min(torch.finfo(normal.dtype).tiny).rsqrt()
    scaled = normal * scale * scale[:, None]
    scaled.diagonal().add_(_RIDGE)
    columns = right[:, None] if right.ndim == 1 else right
    solved = torch.linalg.solve(scaled, scale[:, None] * columns) * scale[:, None]
    return solved.reshape(right.shape)


# ---------------------------------------------------------------------- fidelity


def _neuron_errors(
    layer: GatedLayer, intercept: Tensor, slope: Tensor, x: Tensor
) -> Float[Tensor, " h"]:
    """Each neuron's own error relative to the variance of the output."""
    squares = torch.zeros_like(x[0, 0])
    total, neurons = torch.zeros_like(layer.out[:, 0]), torch.zeros_like(intercept)
    for block in x.split(_BLOCK):
        g, u = layer.branches(block)
        s = layer.activation(g)
        y = linear(s * u, layer.out, layer.bias_out)
        total += y.sum(0)
        squares += y.square().sum()
        neurons += ((s - intercept - slope * g) * u).square().sum(0)
    variance = squares - total.square().sum() / len(x)
    return neurons * layer.out.square().sum(0) / variance if variance > 0 else neurons
