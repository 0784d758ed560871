"""Lower bounds in the l-infinity norm; none of them claims to be exact.

The l-infinity distance to the boundary of an indefinite form is hard to compute (it contains maximum
cut), so these are bounds: from the exact l2 distance, from gradient and eigenvalues, and, where cvxpy is
installed, by semidefinite programming.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.quadratic import QuadraticForm
from tl_bilinear.tensor.robustness import (
    AdversarialDistances,
    as_classifier,
    as_inputs,
    class_pairs,
    require_model,
    require_radius,
)


@torch.no_grad()
def linf_bound(
    tensor: BilinearTensor, inputs: Float[Tensor, "n d"], distances: AdversarialDistances
) -> Float[Tensor, " n"]:
    """A lower bound [n] on the l-infinity distance to another class; never a claim of exactness.

    The better of two for each rival: the exact l2 distance over ``sqrt(d)``; and, with
    ``|g . e| <= eps |g|_1`` and ``e^T A e >= -eps^2 c``, ``c = min(d |lambda_min|, sum_ij |A-_ij|)``
    (A- the part of A with negative eigenvalues), the positive root of ``m = eps |g|_1 + eps^2 c``.

    Rounding is not accounted for. Raises ValueError for distances of other weights or inputs.
    """
    require_model(tensor, distances.model)
    wide = as_classifier(tensor)
    inputs = as_inputs(wide, inputs)
    if len(inputs) != len(distances):
        raise ValueError(f"{len(inputs)} inputs, but distances of {len(distances)}")
    forms = QuadraticForm.of(wide)
    matrices = forms.interaction.dense()
    result = distances.distance / inputs.shape[1] ** 0.5
    for a, b in class_pairs(wide.d_out, False):
        values, vectors = torch.linalg.eigh(matrices[a] - matrices[b])
        linear = forms.linear[a] - forms.linear[b]
        for sign, y, j in ((1.0, a, b), (-1.0, b, a)):
            falling = (sign * values).clamp_max(0)
            concave = (vectors * falling) @ vectors.T
            c = torch.minimum(-len(values) * falling.min(), concave.abs().sum())
            rows = (distances.predicted == y).nonzero()[:, 0]
            gradient = sign * (2 * inputs[rows] @ (matrices[a] - matrices[b]) + linear)
            slope, m = gradient.abs().sum(1), distances.margin[rows, j].clamp_min(0)
            # The root in a form that does not cancel, and holds for c = 0.
            root = 2 * m / (slope + (slope.square() + 4 * c * m).sqrt()).clamp_min(1e-300)
            result[rows, j] = torch.maximum(result[rows, j], root)
    return result.amin(1)


@torch.no_grad()
def linf_sdp_bound(form: QuadraticForm, x: Float[Tensor, " d"], radius: float) -> float:
    """A lower bound on one form over ``|e|_inf <= radius`` around x, by semidefinite programming.

    The largest ``m - radius^2 sum n - g^T (A + diag n)^-1 g / 4`` over ``n >= 0`` with
    ``A + diag n`` positive definite (Shor's relaxation). The solver only proposes n: the bound is then
    computed from it, so that an inexact solver costs tightness, not truth. Needs cvxpy; about
    ``d^3`` an iteration, for d up to a few hundred.

    Raises ImportError naming cvxpy where it is not installed.
    """
    try:
        import cvxpy
    except ImportError as error:
        raise ImportError(
            "the semidefinite bound needs cvxpy: pip install 'tl-bilinear[proofs]'"
        ) from error
    require_radius(radius)
    wide = form.to(torch.float64)
    row = x.to(torch.float64)[None]
    matrix, gradient = wide.interaction.dense(), wide.gradient(row)[0]
    d, margin = len(matrix), float(wide(row))
    n, gamma = cvxpy.Variable(d, nonneg=True), cvxpy.Variable((1, 1))
    half = gradient.numpy()[:, None] / 2
    corner = margin - radius**2 * cvxpy.sum(n) - gamma
    block = cvxpy.bmat([[matrix.numpy() + cvxpy.diag(n), half], [half.T, corner]])
    cvxpy.Problem(cvxpy.Maximize(gamma[0, 0]), [block >> 0]).solve()
    proposed = torch.zeros(d) if n.value is None else torch.from_numpy(n.value)
    diagonal = proposed.to(torch.float64).clamp_min(0)
    least = torch.linalg.eigvalsh(matrix + torch.diag(diagonal))[0]
    scale = torch.linalg.matrix_norm(matrix, 2).clamp_min(1e-300)
    bounds = []
    for slack in (1e-9, 1e-7, 1e-5, 1e-3):
        raised = diagonal + (slack * scale - least).clamp_min(0)
        inner = torch.linalg.solve(matrix + torch.diag(raised), gradient)
        bounds.append(margin - radius**2 * float(raised.sum()) - float(gradient @ inner) / 4)
    return max(bounds)
