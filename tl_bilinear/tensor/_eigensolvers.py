"""How eigenpairs of interaction matrices are found; the ways behind `InteractionMatrix.eigh`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.tensor import _checks, _krylov
from tl_bilinear.tensor._krylov import Pairs
from tl_bilinear.tensor.eigen import Eigendecomposition, fix_signs
from tl_bilinear.tensor.interaction import InteractionMatrix, Method, Which

Solver = Callable[[InteractionMatrix, int, Which], Pairs]

# Flops of a dense eigensolver in units of d^3, at the speed of a matrix product: measured on CPUs
# (d = 512 to 2048); more on GPUs, where that only makes "krylov" the better choice.
_DENSE_EIGH_FLOPS = 13
# Basis columns that k pairs of a trained layer's spectrum take, about: k * 4 + 40.
_COLUMNS_PER_PAIR, _COLUMNS_MORE = 4, 40


def choose_method(d: int, hidden: int, k: int, n: int) -> Method:
    """The cheapest way to k pairs of n matrices, by the cost model in `InteractionMatrix.eigh`."""
    if 2 * hidden < d and k <= 2 * hidden:
        return "lowrank"
    if not _krylov.applicable(d, k):
        return "dense"
    columns = _COLUMNS_PER_PAIR * k + _COLUMNS_MORE
    forming = 2 * hidden * d**2
    dense = forming + _DENSE_EIGH_FLOPS * d**3
    implicit = 8 * columns * d * hidden
    formed = forming + 2 * columns * d**2
    # Small steps run below the speed of a large product: the factor two.
    krylov = 2 * (min(implicit, formed) + 8 * columns**2 * d + 20 * columns**3)
    return "krylov" if krylov < dense else "dense"


def eigendecompose(
    matrix: InteractionMatrix,
    k: int | None,
    *,
    which: Which,
    method: Method,
    tol: float | None,
    seed: int,
    max_bytes: int,
    progress: bool,
) -> Eigendecomposition:
    """See :meth:`InteractionMatrix.eigh`."""
    width, hidden = matrix.d, matrix.left.shape[0]
    if which not in ("magnitude", "positive", "negative"):
        raise ValueError(f"which must be 'magnitude', 'positive' or 'negative', got {which!r}")
    if method not in ("auto", "dense", "lowrank", "krylov"):
        raise ValueError(f"method must be 'auto', 'dense', 'lowrank' or 'krylov', got {method!r}")
    count = width if k is None else _checks.require_count("k", k, width, "d, the width of Q")
    rank = min(2 * hidden, width)
    if method == "lowrank" and count > rank:
        raise ValueError(
            f"method='lowrank' finds at most 2 h = {rank} eigenpairs, got k={count}; the others are "
            f"zero, and method='dense' completes them"
        )
    flat = replace(matrix, weights=matrix.flat_weights)
    if method == "auto":
        method = choose_method(width, hidden, count, len(flat))
    elif method == "krylov" and not _krylov.applicable(width, count):
        raise ValueError(
            f"method='krylov' finds few of many eigenpairs: 2 k + {2 * _krylov.BLOCK} must not exceed "
            f"d={width}, got k={count}; use method='dense'"
        )
    if tol is None:
        tol = 1e-5 if matrix.dtype == torch.float32 else 1e-10
    if tol <= 0:
        raise ValueError(f"tol is a relative residual and must be positive, got {tol}")
    krylov = _Krylov(tol, seed, max_bytes)
    solvers: dict[str, Solver] = {"dense": _dense, "lowrank": _lowrank, "krylov": krylov}
    item = matrix.dtype.itemsize
    each = {
        "dense": 4 * width**2 * item,
        "lowrank": 4 * rank**2 * item,
        "krylov": _krylov.bytes_per_direction(width, hidden, count, item),
    }[method]
    parts = [
        solvers[method](batch, count, which)
        for batch in _batches(flat, max(1, max_bytes // max(1, each)), progress)
    ]
    if not parts:
        empty = matrix.left.new_empty
        parts = [Pairs(empty(0, count), empty(0, count, width), empty(0, count), empty(0))]
    values, vectors, residuals, bound = (torch.cat(part) for part in zip(*parts, strict=True))
    batch = matrix.batch_shape
    return Eigendecomposition(
        values.reshape((*batch, count)),
        fix_signs(vectors).reshape((*batch, count, width)),
        residuals.reshape((*batch, count)),
        bound.reshape(batch),
        krylov.description() if krylov.total else method,
        matrix.space,
        tol,
        _krylov.FAILURE_PROBABILITY if krylov.probed else 0.0,
    )


def _batches(matrix: InteractionMatrix, size: int, progress: bool) -> Iterator[InteractionMatrix]:
    with tqdm(total=len(matrix), unit="direction", disable=not progress) as bar:
        for weights in matrix.weights.split(size) if len(matrix) else ():
            yield replace(matrix, weights=weights)
            bar.update(len(weights))


def _dense(matrix: InteractionMatrix, k: int, which: Which) -> Pairs:
    values, vectors = torch.linalg.eigh(matrix.dense(max_bytes=2**62))
    return _select(matrix, values, vectors.mT, k, which)


def _lowrank(matrix: InteractionMatrix, k: int, which: Which) -> Pairs:
    """Exact where 2 h < d: Q lives in the span of the 2 h factor rows, whatever the direction."""
    basis, triangle = torch.linalg.qr(torch.cat([matrix.left, matrix.right]).T)
    through_left, through_right = triangle.chunk(2, 1)  # [r, h] each: the factors in that basis
    half = (through_left * matrix.weights[:, None, :]) @ through_right.T
    values, vectors = torch.linalg.eigh((half + half.mT) / 2)
    return _select(matrix, values, vectors.mT @ basis.T, k, which)


def _select(
    matrix: InteractionMatrix, values: Tensor, vectors: Tensor, k: int, which: Which
) -> Pairs:
    """The k wanted of all the eigenpairs, with residuals and the exact bound on the others."""
    kept = _krylov.select(values, k, which)
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

    def __call__(self, matrix: InteractionMatrix, k: int, which: Which) -> Pairs:
        outcome = _krylov.block_krylov(matrix, k, which, self.tol, self.generator)
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
