"""How eigenpairs of interaction matrices are found; the ways behind `InteractionMatrix.eigh`.

Matrices are normalised first, by powers of two and exactly, so that a layer of any scale gives the same
pairs; results are scaled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.tensor import krylov
from tl_bilinear.tensor.eigendecomposition import Which, signed
from tl_bilinear.tensor.factors import Factors, fits, power_of_two, rescaled, rounding, times_power
from tl_bilinear.tensor.krylov import Pairs
from tl_bilinear.tensor.probes import FAILURE_PROBABILITY

Method = Literal["auto", "dense", "lowrank", "krylov"]
Solver = Callable[[Factors, int, Which], Pairs]

TOL_FLOOR = 32
"""Times eps: relative residuals below it are rounding, and no smaller tolerance is worked for."""

# Flops of a dense eigensolver in units of d^3, at the speed of a matrix product: measured on CPUs
# (d = 512 to 2048); more on GPUs, where that only makes "krylov" the better choice.
_DENSE_EIGH_FLOPS = 13
# Basis columns that k pairs of a trained layer's spectrum take, with the proof that they come first;
# wider blocks take more. A product of few rows waits for the factors to come from memory: as long as
# one of so many rows takes.
_COLUMNS_PER_PAIR, _COLUMNS_MORE, _COLUMNS_PER_BLOCK = 2.6, 42, 8
_ROWS_TO_LOAD = 18


def choose_method(d: int, hidden: int, k: int, n: int) -> Method:
    """The cheapest way to k pairs of n matrices, by the cost model in `InteractionMatrix.eigh`."""
    if 2 * hidden < d and k <= 2 * hidden:
        return "lowrank"
    if not krylov.applicable(d, k) or _columns(k, n) > krylov.DENSE_AT * d:
        return "dense"
    costs = {method: flops(method, d, hidden, k, n) for method in ("krylov", "dense")}
    # Small steps run below the speed of a large product: the factor two.
    return "krylov" if 2 * costs["krylov"] < costs["dense"] else "dense"


def flops(method: Method, d: int, hidden: int, k: int, n: int) -> float:
    """Work for each of n matrices, in flops at the speed of a large matrix product."""
    if method == "auto":
        method = choose_method(d, hidden, k, n)
    if method == "dense":
        return 2 * hidden * d**2 + _DENSE_EIGH_FLOPS * d**3
    if method == "lowrank":
        return 8 * hidden**2 * min(2 * hidden, d) + _DENSE_EIGH_FLOPS * min(2 * hidden, d) ** 3
    columns = _columns(k, n)
    loading = 1 + _ROWS_TO_LOAD / (max(1, n) * krylov.block_size(n))
    return 8 * columns * d * hidden * loading + 8 * columns**2 * d + 20 * columns**3


def _columns(k: int, n: int) -> float:
    """Basis columns of each of n matrices."""
    wider = krylov.block_size(n) - 1
    return _COLUMNS_PER_PAIR * k + _COLUMNS_MORE + _COLUMNS_PER_BLOCK * wider


class Solution(NamedTuple):
    """Eigenpairs of n matrices, in the order asked for; fields as in `Eigendecomposition`."""

    values: Tensor  # [n, k]
    vectors: Tensor  # [n, k, d], rows of either sign
    residuals: Tensor  # [n, k]
    bound: Tensor  # [n]
    rest: Tensor  # [n]
    norm: Tensor  # [n]
    rounding: Tensor  # [n]
    method: str
    tol: float
    bound_failure: float


def eigenpairs(
    matrix: Factors,
    k: int | None = None,
    *,
    which: Which = "magnitude",
    method: Method = "auto",
    tol: float | None = None,
    seed: int = 0,
    max_bytes: int = checks.MAX_SOLVER_BYTES,
    progress: bool = False,
) -> Solution:
    """The k wanted eigenpairs of each matrix; options as `InteractionMatrix.eigh`."""
    width, hidden = matrix.d, matrix.d_hidden
    checks.require_option("which", which, ("magnitude", "positive", "negative"))
    checks.require_option("method", method, ("auto", "dense", "lowrank", "krylov"))
    count = width if k is None else checks.require_count("k", k, width, "d, the width of Q")
    rank = min(2 * hidden, width)
    if method == "lowrank" and count > rank:
        raise ValueError(
            f"method='lowrank' finds at most 2 h = {rank} eigenpairs, got k={count}; the others are "
            f"zero, and method='dense' completes them"
        )
    if method == "auto":
        method = choose_method(width, hidden, count, len(matrix))
    elif method == "krylov" and not krylov.applicable(width, count):
        raise ValueError(
            f"method='krylov' finds few of many eigenpairs: 2 k + {2 * krylov.BLOCK} must not exceed "
            f"d={width}, got k={count}; use method='dense'"
        )
    if tol is None:
        tol = 1e-5 if matrix.dtype == torch.float32 else 1e-10
    tol = checks.require_number("tol", tol, "is a relative residual", positive=True)
    tol = max(tol, TOL_FLOOR * torch.finfo(matrix.dtype).eps)
    checks.require_int("seed", seed)
    checks.require_int("max_bytes", max_bytes)
    matrix, exponents = matrix.normalised()
    if method == "krylov":  # a basis that is grown in place has no gradient
        matrix = Factors(matrix.left.detach(), matrix.right.detach(), matrix.weights.detach())
    iterative = _Krylov(tol, seed, max_bytes)
    solvers: dict[str, Solver] = {"dense": _dense, "lowrank": _lowrank, "krylov": iterative}
    item = matrix.dtype.itemsize
    each = {
        "dense": 4 * width**2 * item,
        "lowrank": 4 * rank**2 * item,
        "krylov": krylov.bytes_per_direction(width, hidden, count, item),
    }[method]
    size = max(1, max_bytes // max(1, each))
    parts = [solvers[method](part, count, which) for part in _batches(matrix, size, progress)]
    if not parts:
        empty = matrix.left.new_empty
        vectors = empty(0, count, width)
        one = empty(0)
        parts = [Pairs(empty(0, count), vectors, empty(0, count), one, one, one, one)]
    found = Pairs(
        *(torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    )
    return _scaled_back(
        found,
        rounding(matrix.neurons(), found.norm) + found.dropped,
        exponents,
        iterative.description() if iterative.total else method,
        tol,
        FAILURE_PROBABILITY if iterative.probed else 0.0,
    )


def _scaled_back(
    found: Pairs,
    uncertain: Tensor,
    exponents: Tensor,
    method: str,
    tol: float,
    failure: float,
) -> Solution:
    """The pairs of normalised matrices in the scale of the given ones."""
    if not bool(exponents.any()):
        bound, rest = found.bound + uncertain, found.rest + uncertain
        found = found._replace(bound=bound, rest=rest)
        return Solution(*found[:-1], uncertain, method, tol, failure)
    dtype = found.values.dtype
    small = fits(exponents, dtype)
    factor = power_of_two(exponents, dtype) if small else exponents
    if not small:
        rescaled("eigenvalues", found.norm, exponents, dtype)  # refuses what the dtype cannot hold

    def scaled(values: Tensor) -> Tensor:
        shaped = factor.reshape(factor.shape + (1,) * (values.ndim - 1))
        return values * shaped if small else times_power(values, shaped)

    return Solution(
        scaled(found.values),
        found.vectors,
        scaled(found.residuals),
        scaled(found.bound + uncertain),
        scaled(found.rest + uncertain),
        scaled(found.norm),
        scaled(uncertain),
        method,
        tol,
        failure,
    )


def _batches(matrix: Factors, size: int, progress: bool) -> Iterator[Factors]:
    if len(matrix) <= size and not progress:
        yield from [matrix] if len(matrix) else []
        return
    with tqdm(total=len(matrix), unit="direction", disable=not progress) as bar:
        for start in range(0, len(matrix), size):
            part = matrix[start : start + size]
            yield part
            bar.update(len(part))


def _dense(matrix: Factors, k: int, which: Which) -> Pairs:
    dense = matrix.dense()
    values, columns = torch.linalg.eigh(dense)
    return _select(dense, values, columns, k, which)


def _lowrank(matrix: Factors, k: int, which: Which) -> Pairs:
    """Exact where 2 h < d: Q lives in the span of the 2 h factor rows, whatever the direction."""
    factors = torch.cat([matrix.left, matrix.right])
    rank = len(factors)
    if which != "magnitude":
        # Outside the span are zeros, which may come before the other end of the spectrum. Half of the
        # span's own eigenvalues at least have the sign asked for or are zero: k zeros more are enough.
        more = max(0, min(k, matrix.d - rank))
        filling = torch.Generator().manual_seed(0)
        drawn = torch.randn(more, matrix.d, generator=filling, dtype=matrix.dtype)
        factors = torch.cat([factors, drawn.to(factors)])
    basis, triangle = torch.linalg.qr(factors.T)
    through_left, through_right = triangle[:, :rank].chunk(
        2, 1
    )  # [r, h]: the factors in that basis
    half = (through_left * matrix.weights[:, None, :]) @ through_right.T
    inside = (half + half.mT) / 2
    values, columns = torch.linalg.eigh(inside)
    found = _select(inside, values, columns, k, which)
    return found._replace(vectors=found.vectors @ basis.T)


def _select(dense: Tensor, values: Tensor, columns: Tensor, k: int, which: Which) -> Pairs:
    """The k wanted of all eigenpairs of the matrices, with residuals and the bounds on the others."""
    n, width = values.shape
    key, order = signed(values, which).sort(dim=-1, descending=True, stable=True)
    kept = order[:, :k]
    # LAPACK's columns lie one after the other: its rows, here, are copied whole.
    place = (
        kept if n == 1 else kept + torch.arange(0, n * width, width, device=kept.device)[:, None]
    )
    vectors = columns.mT.reshape(n * width, width).index_select(0, place.flatten())
    vectors = vectors.view(n, k, width)
    norm = key[:, 0] if which == "magnitude" else torch.maximum(key[:, 0].abs(), key[:, -1].abs())
    if k == width:
        rest = key[:, -1]
        bound = torch.zeros_like(norm)
    else:
        rest = bound = key[:, k]
        if which != "magnitude":
            bound = torch.maximum(rest.abs(), key[:, -1].abs())
    # A value of a backward-stable solver is off by some eps times the norm.
    slack = norm * (4 * width**0.5 * torch.finfo(values.dtype).eps)
    values = values.gather(-1, kept)
    gaps = torch.baddbmm(vectors * values[..., None], vectors, dense, beta=-1)
    residuals = torch.linalg.vector_norm(gaps, dim=-1)
    none = torch.zeros_like(norm)
    return Pairs(values, vectors, residuals, bound + slack, rest + slack, norm, none)


class _Krylov:
    """Block Krylov, and for directions that are not finished a dense solver where Q fits."""

    def __init__(self, tol: float, seed: int, max_bytes: int) -> None:
        self.tol, self.max_bytes = tol, max_bytes
        self.generator = torch.Generator().manual_seed(seed)
        self.columns = self.fallen_back = self.unfinished = self.total = 0

    @property
    def probed(self) -> bool:
        return self.total > self.fallen_back + self.unfinished

    def __call__(self, matrix: Factors, k: int, which: Which) -> Pairs:
        outcome = krylov.block_krylov(matrix, k, which, self.tol, self.generator)
        pairs = outcome.pairs
        self.total += len(matrix)
        self.columns = max(self.columns, outcome.columns)
        for index in (~outcome.finished).nonzero()[:, 0].tolist():
            one = matrix[index : index + 1]
            if 4 * matrix.d**2 * matrix.dtype.itemsize <= self.max_bytes:
                self.fallen_back += 1
                solved = _dense(one, k, which)
            else:
                self.unfinished += 1
                solved = Pairs(*(part[index : index + 1] for part in pairs))
                # Of Ritz pairs, converged or not: ||E||_F^2 = ||Q||_F^2 - sum of their squares, which
                # leaves rounding of the squares where they cancel.
                whole = one.frobenius_norm().square()
                values = solved.values.abs().to(whole.dtype)
                hidden = rounding(one.neurons(), solved.norm).to(whole.dtype)  # in each value
                lost = 8 * torch.finfo(whole.dtype).eps * whole
                lost = lost + (2 * values + hidden[:, None]).sum(-1) * hidden
                rest = (whole - values.square().sum(-1)).clamp_min(0)
                bound = (rest + lost).sqrt().to(solved.bound.dtype)
                solved = solved._replace(bound=bound, rest=bound)
            for target, source in zip(pairs, solved, strict=True):
                target[index] = source[0]
        return pairs

    def description(self) -> str:
        text = f"krylov, at most {self.columns} columns"
        if self.fallen_back:
            text += f"; dense for {self.fallen_back} of {self.total} with a flat spectrum"
        if self.unfinished:
            text += f"; {self.unfinished} of {self.total} NOT converged"
        return text
