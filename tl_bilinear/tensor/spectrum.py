"""A whole dictionary of output directions, each with the head of its spectrum.

Which features of a layer have a strong, simple interaction matrix? Norm and trace of every one come
first, exactly and without an eigendecomposition,

    ``||Q_u||_F^2 = u^T G u``,  ``G = out M out^T``,  ``tr Q_u = u . out rowsum(left * right)``

(G the output Gram of ``hosvd``), and can screen a shortlist. Then eigenpairs, batch by batch:

>>> sweep = spectrum(tensor, sae.W_enc.T, k=3, screen=1000, checkpoint="sweep/")
>>> sweep.to_pandas().sort_values("share")          # one row a direction
>>> tensor.interaction(sae.W_enc.T[sweep.top(8).index]).eigh(3)    # their eigenvectors
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.io import digest_of
from tl_bilinear.results import Result
from tl_bilinear.tensor import eigensolvers, grams, krylov
from tl_bilinear.tensor.batching import Rows, human_bytes, sweep
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.eigendecomposition import Which, participation
from tl_bilinear.tensor.eigensolvers import Method
from tl_bilinear.tensor.estimates import worth_saying
from tl_bilinear.tensor.factors import rescaled
from tl_bilinear.tensor.moments import Metric

if TYPE_CHECKING:
    import pandas

_MOST_PER_BATCH = 256
"""Directions a batch: more do not make the products faster, and less is lost when interrupted."""


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """Heads of the spectra of m of n interaction matrices, ordered by falling |lambda_1|.

    Attributes
    ----------
    index: [m], which rows of the directions given were decomposed
    values: [m, k], eigenvalues of largest magnitude (or of the end asked for), falling
    residuals: [m, k], ``||Q v - lambda v||``
    bound: [m], upper bound on the spectral norm of what the k pairs leave out
    converged: [m], whether every residual is within the tolerance
    norms, traces: [n], of *all* directions given: ``||Q||_F`` and ``tr Q``, exact
    effective_rank: [m], ``(L1 / L2)^2`` of all d eigenvalues (appendix D), where it was asked for
    bound_failure: probability that `bound` of one direction does not hold
    space: what the inputs of the matrices are
    metric: in which all these numbers are meant; None for the Euclidean one
    """

    _finite = ("values",)

    index: Int[Tensor, " m"]
    values: Float[Tensor, "m k"]
    residuals: Float[Tensor, "m k"]
    bound: Float[Tensor, " m"]
    converged: Bool[Tensor, " m"]
    norms: Float[Tensor, " n"]
    traces: Float[Tensor, " n"]
    effective_rank: Float[Tensor, " m"] | None = None
    bound_failure: float = 0.0
    space: str | None = None
    metric: Metric | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def share(self) -> Float[Tensor, " m"]:
        """[m], part of ``||Q||_F^2`` that the k pairs hold: 1 for a matrix of rank k."""
        norms = self.norms[self.index]
        parts = self.values / torch.where(norms > 0, norms, 1.0)[:, None]
        return parts.square().sum(-1)

    def __getitem__(self, rows: slice | Tensor) -> Spectrum:
        """Some of the directions; `norms` and `traces` stay those of all."""
        chosen = {
            name: getattr(self, name)[rows]
            for name in ("index", "values", "residuals", "bound", "converged")
        }
        rank = self.effective_rank
        return replace(self, **chosen, effective_rank=None if rank is None else rank[rows])

    def top(self, k: int) -> Spectrum:
        """The first k directions."""
        checks.require_count("k", k, len(self), "the directions held")
        return self[:k]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a direction: direction, norm, trace, value_1 ... value_k, share, bound, converged."""
        import pandas as pd

        def column(values: Tensor) -> object:
            return values.detach().cpu().numpy()

        columns = {
            "direction": column(self.index),
            "norm": column(self.norms[self.index]),
            "trace": column(self.traces[self.index]),
        }
        for rank in range(self.values.shape[1]):
            columns[f"value_{rank + 1}"] = column(self.values[:, rank])
        columns["share"] = column(self.share)
        if self.effective_rank is not None:
            columns["effective_rank"] = column(self.effective_rank)
        columns["bound"] = column(self.bound)
        columns["converged"] = column(self.converged)
        return pd.DataFrame(columns)


@torch.no_grad()
def spectrum(
    tensor: BilinearTensor,
    directions: Float[Tensor, "n d_out"] | None = None,
    k: int = 5,
    *,
    which: Which = "magnitude",
    screen: int | None = None,
    effective_rank: bool = False,
    method: Method = "auto",
    tol: float | None = None,
    seed: int = 0,
    max_bytes: int = checks.MAX_SOLVER_BYTES,
    metric: Metric | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Spectrum:
    """The heads of the spectra of a whole dictionary of output directions, norms first.

    Parameters
    ----------
    tensor: BilinearTensor
    directions: [n, d_out], optional
        One a row; None for every output.
    k: int
        Eigenvalues of each direction.
    screen: int, optional
        Decompose only so many directions, those of largest ``||Q||_F`` (exact and cheap).
    effective_rank: bool
        Also ``(L1 / L2)^2`` of all eigenvalues (appendix D): a full spectrum for each direction.
    which, method, tol, seed, max_bytes
        As `InteractionMatrix.eigh`. The progress bar says first how much memory a batch takes and, where
        it is more than a minute, about how long the whole takes on this machine.
    metric: Metric, optional
        As `InteractionMatrix.eigh`. Norms are then those of ``M^1/2 Q M^1/2``, and traces
        ``tr(M Q) = E[x^T Q x]``, the mean of what each direction reads.
    checkpoint: str or Path, optional
        A folder that keeps each batch as it is done. The same call with the same weights goes on
        where an interrupted one stopped, to the same result; another sweep's folder is refused.
    progress: bool
        Show a progress bar.

    Under torchrun or `accelerate launch` the processes share the directions out between them and
    each returns the whole result. Eigenvectors are not kept: ``tensor.interaction(u).eigh(k)`` gives
    those of the directions you choose.

    Raises ValueError for directions of another width, k or screen out of range, or a foreign
    checkpoint.
    """
    tensor, space = tensor.detach(), tensor.input_space
    if metric is not None:
        tensor = tensor.whiten(metric)
    if directions is not None:
        meaning = checks.meaning("d_out", tensor.output_space)
        directions = checks.require_matrix(
            "directions",
            checks.require_tensor("directions", directions).detach(),
            tensor.d_out,
            meaning,
            tensor.out,
        )
    checks.require_count("k", k, tensor.d_in, "d_in, the width of the interaction matrices")
    checks.require_positive("max_bytes", max_bytes)
    norms, traces = _norms_and_traces(tensor, directions)
    index = torch.arange(len(norms), device=tensor.device)
    if screen is not None:
        checks.require_count("screen", screen, max(1, len(norms)), "the directions given")
        index = norms.topk(min(screen, len(norms))).indices.sort().values

    each = krylov.bytes_per_direction(tensor.d_in, tensor.d_hidden, k, tensor.dtype.itemsize)
    if effective_rank or method == "dense":
        each = max(each, 4 * tensor.d_in**2 * tensor.dtype.itemsize)
    batch = min(_MOST_PER_BATCH, max(1, max_bytes // each))

    def work(rows: slice) -> Rows:
        wanted = index[rows]
        if directions is None:
            matrices = tensor.interaction()[wanted]
        else:
            matrices = tensor.interaction(directions[wanted])
        pairs = matrices.eigh(
            k, which=which, method=method, tol=tol, seed=seed, max_bytes=max_bytes
        )
        found = {
            "values": pairs.values,
            "residuals": pairs.residuals,
            "bound": pairs.bound,
            "converged": pairs.converged,
            "failure": torch.full_like(pairs.bound, pairs.bound_failure),
        }
        if effective_rank:
            every = torch.linalg.eigvalsh(matrices.factors.normalised()[0].dense())
            found["effective_rank"] = participation(every)
        return found

    settings = {
        "k": k,
        "which": which,
        "screen": screen,
        "effective_rank": effective_rank,
        "method": method,
        "tol": tol,
        "seed": seed,
        "batch": batch,
        "device": tensor.device.type,
    }
    weights = {
        "left": tensor.left,
        "right": tensor.right,
        "out": tensor.out,
        "directions": directions,
    }
    describe = f"spectra, about {human_bytes(batch * each)}"
    if progress:
        one = eigensolvers.flops(method, tensor.d_in, tensor.d_hidden, k, batch)
        if effective_rank and method != "dense":
            one += eigensolvers.flops("dense", tensor.d_in, tensor.d_hidden, k, batch)
        if said := worth_saying(len(index) * one, tensor.device, tensor.dtype):
            describe += f", {said}"
    found = sweep(
        work,
        len(index),
        batch,
        checkpoint=checkpoint,
        identity=lambda: digest_of(weights, settings),
        progress=progress,
        unit="direction",
        describe=describe,
    )
    found = {name: values.to(tensor.device) for name, values in found.items()}
    failure = found.pop("failure")
    result = Spectrum(
        index,
        **found,
        norms=norms,
        traces=traces,
        bound_failure=float(failure.max()) if len(failure) else 0.0,
        space=space,
        metric=metric,
    )
    return result[result.values.abs().amax(-1).argsort(descending=True, stable=True)]


def _norms_and_traces(tensor: BilinearTensor, directions: Tensor | None) -> tuple[Tensor, Tensor]:
    """``||Q_u||_F`` and ``tr Q_u`` [n]; of many directions through the Gram of the outputs."""
    if directions is None or len(directions) < tensor.d_out or tensor.d_out > tensor.d_hidden:
        matrices = tensor.interaction(directions)
        return matrices.frobenius_norm(), matrices.trace()
    factors, power = tensor.factors.normalised_together()
    gram = grams.congruence(factors.weights, factors.left, factors.right)
    diagonals = (factors.left * factors.right).sum(1)
    each = factors.weights.to(gram.dtype) @ diagonals.to(gram.dtype)  # the trace of every output
    step = max(1, grams.TILE_BYTES // (tensor.d_out * gram.dtype.itemsize))
    squares, traces = [], []
    for part in directions.split(step):
        rows = part.to(gram.dtype)
        squares.append((rows @ gram).mul_(rows).sum(1))
        traces.append(rows @ each)
    norms = torch.cat(squares).clamp_min(0).sqrt()
    return (
        rescaled("Frobenius norms", norms, power, tensor.dtype),
        rescaled("traces", torch.cat(traces), power, tensor.dtype),
    )
