"""Higher-order SVD of a bilinear tensor, without the tensor.

The paper's HOSVD (Pearce et al. 2025, section 3.3) is the SVD of B flattened to d_out x d_in^2,

    ``B = sum_i sigma_i  u_i (x) q_i``,

with output directions u_i and interaction matrices q_i of unit Frobenius norm. Its Gram matrix
``out M out^T`` needs only inner products of hidden neurons (grams.py), so that B, of d_out d_in^2
entries, is never formed: h^2 (4 d_in + 2 d_out) flops, in tiles, instead of d_out^2 d_in^2.

>>> components = hosvd(tensor, k=8)
>>> components.values, components.vectors        # [8], [8, d_out]
>>> components.interactions[0].eigh(k=4)         # the first right singular matrix, decomposed

A form of two inputs has three modes, "left", "right" and "output", by the same Grams.

The same for an input mode (``mode="input"``): the left singular vectors of B flattened to
d_in x (d_out d_in), the directions of input space that the layer as a whole reads most.

**Noise.** A Gram squares the condition number. It is taken in float64, so singular values below
`floor` are rounding, whatever the dtype of the factors: about 1e-7 of the layer's neurons, which
where they cancel is more beside the layer itself. Stated errors contain what rounding may do: the
true ones do not exceed them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor import grams
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.eigendecomposition import fix_signs
from tl_bilinear.tensor.factors import Factors, rescaled, times_power
from tl_bilinear.tensor.interaction import InteractionMatrix
from tl_bilinear.tensor.moments import Metric
from tl_bilinear.tensor.pair_matrix import stack
from tl_bilinear.tensor.two_input import TwoInputForm

Mode = Literal["output", "input", "left", "right"]


@dataclass(frozen=True, eq=False)
class HOSVD(Result):
    """Singular values and directions of one mode of a bilinear tensor.

    Attributes
    ----------
    values: [k], singular values, falling
    vectors: [k, d_out] (mode "output") or [k, d_in] (mode "input"; "left", "right" of two inputs), one
        unit direction a row, largest-magnitude coordinate positive
    norm: Frobenius norm of B, the root of the sum of all squared singular values
    floor: singular values below it are rounding
    truncation_error: ``||B - sum_i sigma_i u_i (x) q_i||``, what these k components leave out; an upper
        bound, above the truth by rounding only
    mode: "output", "input", "left" or "right"
    space: what the coordinates of `vectors` are
    interactions: for mode "output" the right singular matrices q_i, a batch of k implicit interaction
        matrices of unit norm (in the metric); not stored by `save` (they are
        ``tensor.interaction(vectors / values)``)
    metric: in which it is a HOSVD; None for the Euclidean one
    """

    _finite = ("values", "vectors")

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]
    norm: float
    floor: float
    truncation_error: float
    mode: Mode = "output"
    space: str | None = None
    interactions: InteractionMatrix | None = field(default=None, metadata={"stored": False})
    metric: Metric | None = None

    @property
    def explained(self) -> Float[Tensor, " k"]:
        """[k], share of the squared norm of B that the first components hold together."""
        shares = (self.values.to(checks.gram_dtype(self.values)) / (self.norm or 1.0)).square()
        return shares.cumsum(0).to(self.values.dtype)


@dataclass(frozen=True, eq=False)
class Tucker(Result):
    """B projected on its leading output and input directions: ``B ~ core x U x V x V``.

    Attributes
    ----------
    core: BilinearTensor of shape [k_out, k_in, k_in]
    output_directions: U [k_out, d_out], input_directions: V [k_in, d_in]; orthonormal rows (in a
        metric V are filters, ``V M V^T = I``)
    error: ``||B - approximation||`` (Frobenius); an upper bound, above the truth by rounding only
    input_space, output_space: what the original coordinates are
    metric: in which it is best; None for the Euclidean one
    """

    _finite = ("output_directions", "input_directions")

    core: BilinearTensor
    output_directions: Float[Tensor, "k_out d_out"]
    input_directions: Float[Tensor, "k_in d_in"]
    error: float
    input_space: str | None = None
    output_space: str | None = None
    metric: Metric | None = None

    @property
    def tensor(self) -> BilinearTensor:
        """The approximation in the original coordinates, [d_out, d_in, d_in], factored."""
        expanded = self.core.fold(self.input_directions.T).project(self.output_directions.T)
        return replace(expanded, input_space=self.input_space, output_space=self.output_space)


def hosvd(
    tensor: BilinearTensor | TwoInputForm,
    k: int | None = None,
    *,
    mode: Mode = "output",
    metric: Metric | None = None,
) -> HOSVD:
    """Singular values and directions of B flattened along one mode (section 3.3).

    Parameters
    ----------
    tensor: BilinearTensor, or a TwoInputForm
    k: int, optional
        How many, the largest first; None for all.
    mode: "output" or "input"; of a form of two inputs "output", "left" or "right"
        Flatten to d_out x d_in^2 (the paper's) or to d_in x (d_out d_in).
    metric: Metric, optional
        Of ``tensor.whiten(metric)``: best under the inputs that the metric is made of. Vectors of mode
        "input" are then filters, ``M^-1/2 y``.

    Flops ``h^2 (4 d_in + 2 d_out)`` in float64 for the output mode, about five times that for the
    input mode; memory a few tiles of the h x h Gram (64 MiB each) beside the factors in float64.

    Raises ValueError for k below 1 or above the mode's size.
    """
    if isinstance(tensor, TwoInputForm):
        return _of_two_inputs(tensor, k, mode, metric)
    checks.require_option("mode", mode, ("output", "input"))
    width = tensor.d_out if mode == "output" else tensor.d_in
    k = width if k is None else checks.require_count("k", k, width, f"the {mode} directions")
    source = tensor if metric is None else tensor.whiten(metric)
    factors, power = source.factors.normalised_together()
    left, right, out = factors.left, factors.right, factors.weights
    gram = grams.congruence(out, left, right) if mode == "output" else input_gram(left, right, out)
    squares, columns = torch.linalg.eigh(gram)
    norm = float(squares.clamp_min(0).sum().sqrt())
    exact = squares.flip(0)[:k].clamp_min(0).sqrt()
    largest = float(exact[0]) if width else 0.0
    size = grams.size_of(left, right, out)
    eps = torch.finfo(gram.dtype).eps
    floor = math.sqrt(eps * (width * largest**2 + 8 * size**2))
    values = exact.to(tensor.dtype)
    directions = fix_signs(columns.T.flip(0)[:k]).to(tensor.dtype)
    scale = torch.where(values > floor, values, 1.0)  # below the floor u_i meets only rounding
    interactions, weights = None, None
    if mode == "output":
        read = directions / scale[:, None]
        weights = read @ out
        own = times_power(read, torch.full((k, 1), -int(power), device=read.device))
        if metric is not None:
            left, right = metric.inverse_root(left), metric.inverse_root(right)
        interactions = InteractionMatrix(
            left, right, weights, tensor.input_space, own, tensor.output_space
        )
    error = _left_out(factors, gram, values, directions, weights, norm, floor)
    if metric is not None and mode == "input":
        directions = fix_signs(metric.inverse_root(directions))
    space = tensor.output_space if mode == "output" else tensor.input_space
    norm, floor, error = (math.ldexp(number, int(power)) for number in (norm, floor, error))
    return HOSVD(
        rescaled("singular values", values, power, tensor.dtype),
        directions,
        norm,
        floor,
        error,
        mode,
        space,
        interactions,
        metric,
    )


def _of_two_inputs(form: TwoInputForm, k: int | None, mode: Mode, metric: Metric | None) -> HOSVD:
    checks.require_option("mode", mode, ("output", "left", "right"))
    if metric is not None:
        raise ValueError(
            "a metric is of one input: fold its root into the side that it is of, "
            "form.fold(left=metric.root(torch.eye(d)))"
        )
    width = {"output": form.d_out, "left": form.d_left, "right": form.d_right}[mode]
    k = width if k is None else checks.require_count("k", k, width, f"the {mode} directions")
    factors, power = [], torch.zeros((), dtype=torch.int32)
    for factor in (form.left, form.right, form.out):
        own = (
            torch.frexp(factor.detach().abs().max().cpu()).exponent if factor.numel() else power * 0
        )
        factors.append(times_power(factor, -own.to(factor.device)))
        power = power + own
    left, right, out = factors
    gram = grams.mode_gram(left, right, out, mode)
    squares, columns = torch.linalg.eigh(gram)
    norm = float(squares.clamp_min(0).sum().sqrt())
    exact = squares.flip(0)[:k].clamp_min(0).sqrt()
    size, eps = grams.size_of(left, right, out), torch.finfo(gram.dtype).eps
    floor = math.sqrt(eps * (width * float(exact[0]) ** 2 + 8 * size**2))
    directions = fix_signs(columns.T.flip(0)[:k]).to(form.dtype)
    sizes = Factors(*stack(left, right), out)
    error = _left_out(sizes, gram, exact, directions, None, norm, floor)
    spaces = {"output": form.output_space, "left": form.left_space, "right": form.right_space}
    norm, floor, error = (math.ldexp(number, int(power)) for number in (norm, floor, error))
    values = rescaled("singular values", exact, power.to(exact.device), form.dtype)
    return HOSVD(values, directions, norm, floor, error, mode, spaces[mode])


def tucker(
    tensor: BilinearTensor, k_out: int, k_in: int, *, metric: Metric | None = None
) -> Tucker:
    """B on its k_out leading output and k_in leading input directions, and what that leaves out.

    The truncated higher-order SVD: within a factor sqrt(3) of the best of these ranks. In a metric, of
    ``tensor.whiten(metric)``: norms and the error are then those of the whitened layer.
    """
    spaces = tensor.input_space, tensor.output_space
    if metric is not None:
        tensor = tensor.whiten(metric)
    checks.require_count("k_out", k_out, tensor.d_out, "the output directions")
    checks.require_count("k_in", k_in, tensor.d_in, "the input directions")
    output = hosvd(tensor, k_out)
    directions = hosvd(tensor, k_in, mode="input").vectors
    core = tensor.parts().interaction.project(output.vectors).fold(directions)
    found = Tucker(core, output.vectors, directions, 0.0, *spaces)
    (one, power), (other, own) = (
        each.factors.normalised_together() for each in (tensor, found.tensor)
    )
    moved = times_power(other.weights, own - power)
    error = grams.distance(
        (one.left, one.right, one.weights),
        (other.left, other.right, moved),
        math.ldexp(output.norm, -int(power)) ** 2,
    )
    if metric is not None:
        found = replace(found, input_directions=metric.inverse_root(directions), metric=metric)
    return replace(found, error=math.ldexp(error, int(power)))


def _left_out(
    factors: Factors,
    gram: Tensor,
    values: Tensor,
    directions: Tensor,
    weights: Tensor | None,
    norm: float,
    floor: float,
) -> float:
    """Bound on ``||B - sum_i sigma_i u_i (x) q_i||``, with the u_i and q_i as they are returned."""
    wide = gram.dtype
    held = directions.to(wide)
    size = max(norm, grams.size_of(factors.left, factors.right, factors.weights))
    if weights is not None and grams.affordable(factors.left, factors.weights):
        written = held.T @ (values.to(wide)[:, None] * weights.to(wide))
        rest = factors.weights.to(wide) - written
        return grams.norm_bound(factors.left, factors.right, rest, size)
    # Through the Gram: ||P B||^2 = tr P G P. The q_i are rounded as the weights are.
    rest = torch.eye(len(gram), dtype=wide, device=gram.device) - held.T @ held
    square = float(((rest @ gram) * rest).sum())
    rounding = 0.0
    if weights is not None:
        noise = int((values <= floor).sum())  # whose q_i are not what they should be
        rounding = 4 * torch.finfo(weights.dtype).eps * size + math.sqrt(noise) * floor
    return math.sqrt(max(0.0, square) + 8 * torch.finfo(wide).eps * size**2) + rounding


def input_gram(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``sum_a B[a]^2`` [d_in, d_in] in float64, in tiles of hidden neurons."""
    dtype = checks.gram_dtype(left)
    left, right, out = (t.to(dtype) for t in (left, right, out))
    hidden, width = left.shape
    step = max(1, grams.TILE_BYTES // (max(1, hidden) * dtype.itemsize))
    gram = left.new_zeros(width, width)
    for start in range(0, hidden, step):
        rows = slice(start, start + step)
        a, b = left[rows], right[rows]
        overlap = out[:, rows].T @ out
        b_left, b_right = overlap * (b @ left.T), overlap * (b @ right.T)
        gram += a.T @ (b_left @ right + b_right @ left)
        a_left, a_right = overlap * (a @ left.T), overlap * (a @ right.T)
        gram += b.T @ (a_left @ right + a_right @ left)
    return (gram + gram.T) / 8
