"""How eigenpairs of interaction matrices are found; the ways behind `InteractionMatrix.eigh`."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.tensor import _checks
from tl_bilinear.tensor.eigen import Eigendecomposition
from tl_bilinear.tensor.interaction import InteractionMatrix, Method, Which

_BATCH_ELEMENTS = 2**25  # entries of the dense matrices decomposed at a time: 128 MB in float32


def eigendecompose(
    matrix: InteractionMatrix, k: int | None, *, which: Which, method: Method
) -> Eigendecomposition:
    """See :meth:`InteractionMatrix.eigh`."""
    width, hidden = matrix.d, matrix.left.shape[0]
    if which not in ("magnitude", "positive", "negative"):
        raise ValueError(f"which must be 'magnitude', 'positive' or 'negative', got {which!r}")
    if method not in ("auto", "dense", "lowrank"):
        raise ValueError(f"method must be 'auto', 'dense' or 'lowrank', got {method!r}")
    count = width if k is None else _checks.require_count("k", k, width, "d, the width of Q")
    rank = min(2 * hidden, width)
    if method == "lowrank" and count > rank:
        raise ValueError(
            f"method='lowrank' finds at most 2 h = {rank} eigenpairs, got k={count}; the others are "
            f"zero, and method='dense' completes them"
        )
    if method == "auto":
        method = "lowrank" if 2 * hidden < width and count <= rank else "dense"
    solve = _lowrank if method == "lowrank" else _dense
    flat = matrix.flat_weights
    step = max(1, _BATCH_ELEMENTS // max(1, width**2))
    parts = [solve(replace(matrix, weights=w), count, which) for w in flat.split(step)]
    if not len(flat):
        empty = matrix.left.new_empty
        parts = [(empty(0, count), empty(0, count, width), empty(0, count), empty(0))]
    values, vectors, residuals, bound = (torch.cat(part) for part in zip(*parts, strict=True))
    batch = matrix.batch_shape
    return Eigendecomposition(
        values.reshape(*batch, count),
        vectors.reshape(*batch, count, width),
        residuals.reshape(*batch, count),
        bound.reshape(batch),
        method,
        matrix.space,
    )


_Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


def _dense(matrix: InteractionMatrix, k: int, which: Which) -> _Pairs:
    values, vectors = torch.linalg.eigh(matrix.dense(max_bytes=2**62))
    return _select(matrix, values, vectors.mT, k, which)


def _lowrank(matrix: InteractionMatrix, k: int, which: Which) -> _Pairs:
    """Exact where 2 h < d: Q lives in the span of the 2 h factor rows, whatever the direction."""
    basis, triangle = torch.linalg.qr(torch.cat([matrix.left, matrix.right]).T)
    through_left, through_right = triangle.chunk(
        2, 1
    )  # [r, h] each: basis^T left^T, basis^T right^T
    half = (through_left * matrix.weights[:, None, :]) @ through_right.T
    values, vectors = torch.linalg.eigh((half + half.mT) / 2)
    return _select(matrix, values, vectors.mT @ basis.T, k, which)


def _select(
    matrix: InteractionMatrix, values: Tensor, vectors: Tensor, k: int, which: Which
) -> _Pairs:
    """The k wanted of all the eigenpairs, ordered, with residuals and the bound on the others."""
    key = {"magnitude": values.abs(), "positive": values, "negative": -values}[which]
    order = key.argsort(dim=-1, descending=True, stable=True)
    kept = order[..., :k]
    dropped = values.abs().gather(-1, order[..., k:])
    # A Ritz value of a backward-stable solver is off by at most about eps times the norm.
    rounding = values.abs().amax(-1) * matrix.d * torch.finfo(values.dtype).eps
    bound = rounding if k == values.shape[-1] else dropped.amax(-1) + rounding
    values = values.gather(-1, kept)
    by_size = values.abs().argsort(dim=-1, descending=True, stable=True)
    kept = kept.gather(-1, by_size)
    values = values.gather(-1, by_size)
    vectors = vectors.gather(-2, kept[..., None].expand(*kept.shape, matrix.d))
    vectors = fix_signs(vectors)
    residuals = torch.linalg.vector_norm(
        matrix.apply(vectors) - values[..., None] * vectors, dim=-1
    )
    return values, vectors, residuals, bound


def fix_signs(vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Each row with its largest-magnitude coordinate positive."""
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
