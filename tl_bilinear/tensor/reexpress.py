"""A layer written through a set of output directions (Pearce et al. 2025, appendix I).

For directions u_1 ... u_n that span the output space and their dual set u+ (the rows of the
pseudo-inverse of the matrix whose columns are the directions),

    ``B = sum_k u+_k (x) Q_k = sum_k sum_i lambda_{k,i}  u+_k (x) v_{k,i} (x) v_{k,i}``,

with the interaction matrix Q_k of direction k and its eigenpairs. Nothing is counted twice, however
similar the directions: what u_k reads is written along the dual u+_k, which the others of an
independent set do not see.

>>> written = reexpress(tensor, directions)       # [n, d_out], of rank d_out
>>> written.tensor                                # B again
>>> written.eigenvector_form(k=4)                 # a layer of 4 n neurons, each an eigenvector
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor import grams
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.factors import Factors
from tl_bilinear.tensor.interaction import InteractionMatrix


@dataclass(frozen=True, eq=False)
class Reexpression(Result):
    """``B = sum_k dual_k (x) Q_k``: the interaction part of a layer through a set of directions.

    Attributes
    ----------
    directions: [n, d_out], as given
    dual: [n, d_out], the pseudo-inverse of ``directions^T``, computed in float64:
        ``directions^T @ dual = I``
    interactions: Q_k, a batch of n implicit interaction matrices
    error: ``||B - tensor||`` (Frobenius), which is rounding: an upper bound
    output_space: what the coordinates of the directions are
    """

    directions: Float[Tensor, "n d_out"]
    dual: Float[Tensor, "n d_out"]
    interactions: InteractionMatrix
    error: float
    output_space: str | None = None

    @property
    def tensor(self) -> BilinearTensor:
        """``sum_k dual_k (x) Q_k``, equal to the layer's interaction part, d_hidden as there."""
        matrices = self.interactions
        return self._layer(matrices.left, matrices.right, self.dual.T @ matrices.weights)

    def eigenvector_form(self, k: int | None = None) -> BilinearTensor:
        """The layer whose n k neurons are the leading eigenvectors of each direction (equation 6).

        ``left = right`` holds the eigenvectors, k of one direction after another, and ``out`` the
        dual directions times the eigenvalues. Equal to the layer's interaction part for ``k = d_in``
        (the default); with fewer, every ``u_k . f(x)`` of an independent set is that of its k pairs.

        Cost of ``interactions.eigh(k)``; memory n k (d_in + d_out).

        Raises ValueError for k below 1 or above d_in.
        """
        found = self.interactions.eigh(k)
        vectors = found.vectors.flatten(0, 1)
        out = (self.dual.T[:, :, None] * found.values).flatten(1)
        return self._layer(vectors, vectors, out)

    def _layer(self, left: Tensor, right: Tensor, out: Tensor) -> BilinearTensor:
        space = self.interactions.space
        return BilinearTensor(left, right, out, input_space=space, output_space=self.output_space)


def reexpress(tensor: BilinearTensor, directions: Float[Tensor, "n d_out"]) -> Reexpression:
    """The layer through a full-rank set of output directions (appendix I): ``sum_k u+_k (x) Q_k``.

    Raises ValueError, naming the rank, for directions that do not span the output space.
    """
    meaning = checks.meaning("d_out", tensor.output_space)
    directions = checks.require_matrix("directions", directions, tensor.d_out, meaning, tensor.out)
    dual, rank = dual_directions(directions)
    if rank < tensor.d_out:
        raise ValueError(
            f"directions must span the output space, but these {len(directions)} have rank {rank} of "
            f"d_out={tensor.d_out}; add directions that complete them, or re-express the layer within "
            f"their span: tensor.project(basis), basis [{rank}, {tensor.d_out}] of orthonormal rows, "
            f"with directions @ basis.T"
        )
    interactions = tensor.interaction(directions)
    error = _error(tensor, dual.T @ interactions.weights)
    return Reexpression(directions, dual, interactions, error, tensor.output_space)


def _error(tensor: BilinearTensor, written: Tensor) -> float:
    """Bound on how far the layer with these output factors is from the layer itself."""
    wide = checks.gram_dtype(tensor.out)
    difference = Factors(tensor.left, tensor.right, written.to(wide) - tensor.out.to(wide))
    lost, power = difference.normalised_together()
    if grams.affordable(lost.left, lost.weights):
        whole, own = tensor.factors.normalised_together()
        size = math.ldexp(grams.size_of(whole.left, whole.right, whole.weights), int(own - power))
        error = grams.norm_bound(lost.left, lost.right, lost.weights, size)
    else:  # each neuron by itself
        left, right = (
            torch.linalg.vector_norm(half, dim=1, dtype=wide) for half in (lost.left, lost.right)
        )
        error = float((torch.linalg.vector_norm(lost.weights, dim=0) * left * right).sum())
    return math.ldexp(error, int(power))


def dual_directions(directions: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], int]:
    """The pseudo-inverse of ``directions^T``, computed in float64, and the rank of the set."""
    precise = directions.to(checks.gram_dtype(directions))
    # What is independent only through the rounding of the given dtype is not.
    rtol = max(directions.shape) * torch.finfo(directions.dtype).eps
    rank = int(torch.linalg.matrix_rank(precise, rtol=rtol)) if directions.numel() else 0
    return torch.linalg.pinv(precise.T, rtol=rtol).to(directions.dtype), rank
