"""Comparing layers and their eigenvectors, from the weights.

Two layers as functions of ``x ~ N(0, I)``: with ``f(x)_o = x^T A_o x + a_o . x + a0_o`` and g likewise,

    ``E[f(x) . g(x)] = sum_o 2 tr(A_o B_o) + a_o . b_o + (tr A_o + a0_o) (tr B_o + b0_o)``,

biases included through the linear and constant parts. The first term is twice the inner product of
the tensors, the last the product of the means; all of it follows from Grams of the factors, so that
layers of different hidden size compare without a sample and without either tensor.

Two sets of eigenvectors (of two models, say) compare by the absolute cosines between them, eigenvectors
of positive and of negative eigenvalue apart: one makes the output, the other takes from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor, require_same_shape
from tl_bilinear.tensor.eigendecomposition import Eigendecomposition
from tl_bilinear.tensor.moments import InputMoments

if TYPE_CHECKING:
    import pandas

Matching = Literal["rank", "assignment"]


# ---------------------------------------------------------------------- layers as functions


def functional_inner(
    first: BilinearTensor,
    second: BilinearTensor,
    *,
    centred: bool = False,
    inputs: InputMoments | None = None,
) -> Float[Tensor, ""]:
    """``E[f(x) . g(x)]`` for Gaussian x, summed over outputs; exact, biases included.

    Parameters
    ----------
    first, second: of the same d_in and d_out; hidden sizes may differ
    centred: bool
        The covariance: both functions less their means.
    inputs: InputMoments, optional
        Whose mean and covariance x has; ``x ~ N(0, I)`` without.

    Cost of `BilinearTensor.inner`, in float64; with input biases ``h d_in d_out`` more for each layer.

    Raises ValueError for layers of different d_in or d_out.
    """
    require_same_shape(first, second, "compared")
    dtype = first.dtype
    first, second = _under(inputs, first), _under(inputs, second)
    total = 2 * first.inner(second)
    if _has_input_biases(first) and _has_input_biases(second):
        total = total + (first.parts().linear * second.parts().linear).sum()
    if not centred:
        total = total + _mean(first) @ _mean(second)
    return checks.narrowed("inner products", total, dtype)


def functional_similarity(
    first: BilinearTensor,
    second: BilinearTensor,
    *,
    centred: bool = False,
    inputs: InputMoments | None = None,
) -> Float[Tensor, ""]:
    """Cosine between two layers as functions of Gaussian x; centred: their correlation.

    ``E[f . g] / sqrt(E[f . f] E[g . g])``; 0 where either function is zero (centred: constant).
    Unlike `BilinearTensor.cosine_similarity` it counts what the layers do to the output's mean and
    their biases. Parameters and errors as :func:`functional_inner`.
    """
    dtype = first.dtype
    first, second = _under(inputs, first), _under(inputs, second)
    norms = [functional_inner(each, each, centred=centred) for each in (first, second)]
    norms = [square.clamp_min(0).sqrt() for square in norms]
    product = functional_inner(first, second, centred=centred)
    nonzero = (norms[0] > 0) & (norms[1] > 0)
    safe = [torch.where(nonzero, norm, 1.0) for norm in norms]
    return torch.where(nonzero, product / safe[0] / safe[1], 0.0).to(dtype)


def _under(inputs: InputMoments | None, layer: BilinearTensor) -> BilinearTensor:
    """The layer as a function of ``z ~ N(0, I)``, in float64."""
    layer = layer.to(checks.gram_dtype(layer.left))
    if inputs is None:
        return layer
    spread = inputs.centred()
    around = layer.around(inputs.mean)
    if not bool(spread.second.any()):  # a single input: the functions are constants
        return around.fold(torch.zeros_like(spread.second))
    return around.whiten(spread.metric(ridge=0.0))


def _has_input_biases(tensor: BilinearTensor) -> bool:
    return tensor.bias_left is not None or tensor.bias_right is not None


def _mean(tensor: BilinearTensor) -> Tensor:
    """``E[f(x)]`` [d_out]: a trace and the constant part for each output."""
    return tensor.out @ (tensor.left * tensor.right).sum(1) + tensor.parts().constant


# ---------------------------------------------------------------------- eigenvectors


@dataclass(frozen=True, eq=False)
class EigenvectorMatch(Result):
    """Eigenvectors of one decomposition paired with those of another, sign by sign.

    Attributes
    ----------
    matrices: [n], which matrix of the flattened batch a pair belongs to
    first, second: [n], index of the eigenpair in each decomposition
    cosines: [n], ``|v . w|``
    by: "rank" or "assignment"
    """

    matrices: Int[Tensor, " n"]
    first: Int[Tensor, " n"]
    second: Int[Tensor, " n"]
    cosines: Float[Tensor, " n"]
    by: Matching

    @property
    def pairs(self) -> Int[Tensor, "n 2"]:
        """[n, 2], index in the first and in the second decomposition."""
        return torch.stack([self.first, self.second], 1)

    @property
    def mean(self) -> float:
        """Mean absolute cosine over all pairs; NaN where nothing was matched."""
        return float(self.cosines.mean())

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: matrix (of a flattened batch), first, second, cosine."""
        import pandas as pd

        return pd.DataFrame(
            {
                "matrix": self.matrices.cpu().numpy(),
                "first": self.first.cpu().numpy(),
                "second": self.second.cpu().numpy(),
                "cosine": self.cosines.detach().cpu().numpy(),
            }
        )


def match_eigenvectors(
    first: Eigendecomposition,
    second: Eigendecomposition,
    *,
    by: Matching = "assignment",
    k: int | None = None,
) -> EigenvectorMatch:
    """Pair the eigenvectors of two decompositions, positive eigenvalues and negative ones apart.

    Parameters
    ----------
    first, second: decompositions of the same width and batch shape; the counts of pairs may differ
    by: "rank" pairs the i-th positive with the i-th positive, and so for negative ones;
        "assignment" the one-to-one pairing of largest total absolute cosine within each sign
    k: int, optional
        Use only the first k pairs of each (by absolute eigenvalue).

    What one side has more of stays unmatched, and so do eigenvalues that are zero to rounding, whose
    vectors are arbitrary. Within a degenerate group vectors are arbitrary too: compare `projectors`.

    Raises ValueError for different widths, batch shapes or spaces.
    """
    checks.require_option("by", by, ("rank", "assignment"))
    _require_comparable(first, second)
    if k is not None:
        first, second = first.top(k), second.top(k)
    batch = first.batch_shape.numel()
    values = [each.values.detach().reshape(batch, each.k).cpu() for each in (first, second)]
    vectors = [
        each.unit_vectors.detach().reshape(batch, each.k, each.d) for each in (first, second)
    ]
    dtype = torch.promote_types(vectors[0].dtype, vectors[1].dtype)
    cosines = (vectors[0].to(dtype) @ vectors[1].to(dtype).mT).abs().clamp_max(1).cpu()
    rows: list[tuple[int, int, int]] = []
    for matrix in range(batch):
        for sign in (1, -1):
            left, right = (_of_sign(each[matrix], sign, first.d) for each in values)
            chosen = _assign(cosines[matrix][left][:, right], by)
            rows += sorted((matrix, int(left[i]), int(right[j])) for i, j in chosen)
    found = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
    matrices, one, other = found.unbind(1)
    return EigenvectorMatch(
        matrices.clone(), one.clone(), other.clone(), cosines[matrices, one, other], by
    )


def pairwise_similarity(
    decompositions: Sequence[Eigendecomposition],
    *,
    by: Matching = "assignment",
    k: int | None = None,
) -> Float[Tensor, "n n"]:
    """Mean absolute cosine of matched eigenvectors for every two of n decompositions.

    Symmetric, in float64, with NaN on the diagonal: nothing is compared with itself, so that
    ``.nanmean()`` is the average over distinct pairs. Parameters and errors as
    :func:`match_eigenvectors`; ValueError for fewer than two.
    """
    count = len(decompositions)
    if count < 2:
        raise ValueError(f"comparing in pairs takes at least two decompositions, got {count}")
    result = torch.full((count, count), torch.nan, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            mean = match_eigenvectors(decompositions[i], decompositions[j], by=by, k=k).mean
            result[i, j] = result[j, i] = mean
    return result


def _require_comparable(first: Eigendecomposition, second: Eigendecomposition) -> None:
    if first.d != second.d:
        raise ValueError(
            f"eigenvectors of width {first.d} and {second.d} cannot be compared; fold the layers into "
            f"a common basis first"
        )
    if first.batch_shape != second.batch_shape:
        raise ValueError(
            f"decompositions of batch shape {list(first.batch_shape)} and {list(second.batch_shape)} "
            f"cannot be matched; index them to the same matrices first"
        )
    if None not in (first.space, second.space) and first.space != second.space:
        raise ValueError(
            f"eigenvectors live in different spaces, {first.space!r} and {second.space!r}; if their "
            f"coordinates do mean the same, give both one space: dataclasses.replace(..., space=None)"
        )


def _of_sign(values: Tensor, sign: int, width: int) -> Tensor:
    """Indices of eigenvalues of one sign, above rounding, by falling absolute value."""
    floor = values.abs().max() * width * torch.finfo(values.dtype).eps if len(values) else 0.0
    signed = sign * values
    order = signed.argsort(descending=True, stable=True)
    return order[signed[order] > floor]


def _assign(cosines: Tensor, by: Matching) -> list[tuple[int, int]]:
    if by == "rank":
        return [(i, i) for i in range(min(cosines.shape))]
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
