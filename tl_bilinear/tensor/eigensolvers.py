"""How eigenpairs of interaction matrices are found; the ways behind `InteractionMatrix.eigh`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.tensor import krylov
from tl_bilinear.tensor.factors import Factors
from tl_bilinear.tensor.krylov import Pairs, Which

Method = Literal["auto", "dense", "lowrank", "krylov"]
Solver = Callable[[Factors, int, Which], Pairs]

# Flops of a dense eigensolver in units of d^3, at the speed of a matrix product: measured on CPUs
# (d = 512 to 2048); more on GPUs, where that only makes "krylov" the better choice.
_DENSE_EIGH_FLOPS = 13
# Basis columns that k pairs of a trained layer's spectrum take, about: k * 4 + 40.
_COLUMNS_PER_PAIR, _COLUMNS_MORE = 4, 40


def choose_method(d: int, hidden: int, k: int) -> Method:
    """The cheapest way to k pairs of a matrix, by the cost model in `InteractionMatrix.eigh`."""
    if 2 * hidden < d and k <= 2 * hidden:
        return "lowrank"
    if not krylov.applicable(d, k):
        return "dense"
    columns = _COLUMNS_PER_PAIR * k + _COLUMNS_MORE
    forming = 2 * hidden * d**2
    dense = forming + _DENSE_EIGH_FLOPS * d**3
    implicit = 8 * columns * d * hidden
    formed = forming + 2 * columns * d**2
    # Small steps run below the speed of a large product: the factor two.
    iterative = 2 * (min(implicit, formed) + 8 * columns**2 * d + 20 * columns**3)
    return "krylov" if iterative < dense else "dense"


class Solution(NamedTuple):
    """Eigenpairs of n matrices, by falling magnitude; fields as in `Eigendecomposition`."""

    values: Tensor  # [n, k]
    vectors: Tensor  # [n, k, d], rows of either sign
    residuals: Tensor  # [n, k]
    bound: Tensor  # [n]
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
    if which not in ("magnitude", "positive", "negative"):
        raise ValueError(f"which must be 'magnitude', 'positive' or 'negative', got {which!r}")
    if method not in ("auto", "dense", "lowrank", "krylov"):
        raise ValueError(f"method must be 'auto', 'dense', 'lowrank' or 'krylov', got {method!r}")
    count = width if k is None else checks.require_count("k", k, width, "d, the width of Q")
    rank = min(2 * hidden, width)
    if method == "lowrank" and count > rank:
        raise ValueError(
            f"method='lowrank' finds at most 2 h = {rank} eigenpairs, got k={count}; the others are "
            f"zero, and method='dense' completes them"
        )
    if method == "auto":
        method = choose_method(width, hidden, count)
    elif method == "krylov" and not krylov.applicable(width, count):
        raise ValueError(
            f"method='krylov' finds few of many eigenpairs: 2 k + {2 * krylov.BLOCK} must not exceed "
            f"d={width}, got k={count}; use method='dense'"
        )
    if tol is None:
        tol = 1e-5 if matrix.dtype == torch.float32 else 1e-10
    if tol <= 0:
        raise ValueError(f"tol is a relative residual and must be positive, got {tol}")
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
        parts = [Pairs(empty(0, count), empty(0, count, width), empty(0, count), empty(0))]
    values, vectors, residuals, bound = (torch.cat(part) for part in zip(*parts, strict=True))
    return Solution(
        values,
        vectors,
        residuals,
        bound,
        iterative.description() if iterative.total else method,
        tol,
        krylov.FAILURE_PROBABILITY if iterative.probed else 0.0,
    )


def _batches(matrix: Factors, size: int, progress: bool) -> Iterator[Factors]:
    with tqdm(total=len(matrix), unit="direction", disable=not progress) as bar:
        for start in range(0, len(matrix), size):
            part = matrix[start : start + size]
            yield part
            bar.update(len(part))


def _dense(matrix: Factors, k: int, which: Which) -> Pairs:
    values, vectors = torch.linalg.eigh(matrix.dense())
    return _select(matrix, values, vectors.mT, k, which)


def _lowrank(matrix: Factors, k: int, which: Which) -> Pairs:
    """Exact where 2 h < d: Q lives in the span of the 2 h factor rows, whatever the direction."""
    basis, triangle = torch.linalg.qr(torch.cat([matrix.left, matrix.right]).T)
    through_left, through_right = triangle.chunk(2, 1)  # [r, h] each: the factors in that basis
    half = (through_left * matrix.weights[:, None, :]) @ through_right.T
    values, vectors = torch.linalg.eigh((half + half.mT) / 2)
    return _select(matrix, values, vectors.mT @ basis.T, k, which)


def _select(matrix: Factors, values: Tensor, vectors: Tensor, k: int, which: Which) -> Pairs:
    """The k wanted of all the eigenpairs, with residuals and the exact bound on the others."""
    kept = krylov.select(values, k, which)
    left_out = values.abs().scatter(-1, kept, 0.0).amax(-1)
    # A value of a backward-stable solver is off by at most about eps times the norm.
    rounding = values.abs().amax(-1) * matrix.d * torch.finfo(values.dtype).eps
    values = values.gather(-1, kept)
    vectors = vectors.gather(-2, kept[..., None].expand(*kept.shape, matrix.d))
    residuals = torch.linalg.vector_norm(
        matrix.apply(vectors) - values[..., None] * vectors, dim=-1
    )
    return Pairs(values, vectors, residuals, left_out + rounding)


class _Krylov:
    """Block Krylov, and for directions that do not converge a dense solver where Q fits."""

    def __init__(self, tol: float, seed: int, max_bytes: int) -> None:
        self.tol, self.max_bytes = tol, max_bytes
        self.generator = torch.Generator().manual_seed(seed)
        self.columns = self.fallen_back = self.unconverged = self.total = 0

    @property
    def probed(self) -> bool:
        return self.total > self.fallen_back + self.unconverged

    def __call__(self, matrix: Factors, k: int, which: Which) -> Pairs:
        outcome = krylov.block_krylov(matrix, k, which, self.tol, self.generator)
        pairs = outcome.pairs
        self.total += len(matrix)
        self.columns = max(self.columns, outcome.columns)
        for index in (~outcome.converged).nonzero()[:, 0].tolist():
            one = matrix[index : index + 1]
            if 4 * matrix.d**2 * matrix.dtype.itemsize <= self.max_bytes:
                self.fallen_back += 1
                solved = _dense(one, k, which)
            else:
                self.unconverged += 1
                solved = Pairs(*(part[index : index + 1] for part in pairs))
                # Of Ritz pairs, converged or not: ||E||_F^2 = ||Q||_F^2 - sum of their squares.
                rest = one.frobenius_norm().square() - solved.values.square().sum(-1)
                solved = solved._replace(bound=rest.clamp_min(0).sqrt())
            for target, source in zip(pairs, solved, strict=True):
                target[index] = source[0]
        return pairs

    def description(self) -> str:
        text = f"krylov, at most {self.columns} columns"
        if self.fallen_back:
            text += f"; dense for {self.fallen_back} of {self.total} with a flat spectrum"
        if self.unconverged:
            text += f"; {self.unconverged} of {self.total} NOT converged"
        return text
