"""Certificates: proofs about a classifier that stand in a file and are checked without the prover.

A certificate holds the weights, the inputs, the claims and what proves them: a multiplier for every
input and rival (a proof that no nearer input changes the answer), a change that does, and, where asked
for, k eigenpairs for each pair of classes with bounds on the rest. `certificate_checker` is one file
that needs numpy only and rounds outward:

>>> write_certificate("mnist.certificate", tensor, images, labels, distances, radii=[0.5, 1.0])
>>> verify_certificate("mnist.certificate", tensor, images, labels)
$ python certificate_checker.py mnist.certificate

The statements are about exact arithmetic on the stored weights. The float64 numbers of
`AdversarialDistances` are claims until a checker has accepted them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.io import save_tensors
from tl_bilinear.tensor import certificate_checker
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.margins import MarginSpectrum
from tl_bilinear.tensor.quadratic import QuadraticForm
from tl_bilinear.tensor.robustness import (
    AdversarialDistances,
    as_classifier,
    as_inputs,
    as_labels,
    certified_accuracy,
    require_model,
)

GAP = 1e-4
"""How far apart, relatively, the proved lower and upper bound of a distance may lie."""

_INSIDE, _BEYOND = 1 - 1e-6, 1 + 1e-5

_NEAR = 1e-10
"""Absolute slack of a claimed distance, relative to 1 + |x|: what rounding of the margin may hide. It
matters for inputs that all but lie on a boundary."""

Embedding = tuple[Tensor, Tensor | None]
"""Directions [d, e] and offset [e] of what comes before a layer, as `BilinearTensor.fold` takes them."""


def folded(tensor: BilinearTensor, embedding: Embedding | None) -> BilinearTensor:
    """The classifier from the inputs: a layer with what comes before it folded in, in float64."""
    if embedding is None:
        return tensor
    directions, offset = embedding
    wide = tensor.to(torch.float64)
    offset = None if offset is None else offset.to(torch.float64)
    return wide.fold(directions.to(torch.float64), offset)


def write_certificate(
    path: str | os.PathLike[str],
    tensor: BilinearTensor,
    inputs: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    distances: AdversarialDistances | None = None,
    known: MarginSpectrum | None = None,
    *,
    radii: Sequence[float] = (0.0, 0.5, 1.0),
    embedding: Embedding | None = None,
) -> None:
    """Write what proves distances, answers from k eigenpairs, or both.

    Parameters
    ----------
    tensor: the classifier, in the dtype that the statement is about
    distances: of ``folded(tensor, embedding)`` and these inputs
    known: the eigenpairs from which answers are proved
    radii: at which the certified accuracy is claimed
    embedding: where the weights are a layer and what comes before it: both are stored as they are, and
        the rounding of their product is the checker's to bound

    Raises ValueError where there is nothing to claim, or for results of other weights.
    """
    whole = folded(tensor, embedding)
    wide = as_classifier(whole)
    x = as_inputs(wide, inputs)
    labels = as_labels(labels, x.new_empty(len(x), wide.d_out))
    if distances is None and known is None:
        raise ValueError("a certificate of nothing: give distances, known, or both")
    arrays: dict[str, Tensor | None] = _weights(tensor, embedding)
    arrays |= {"inputs": inputs, "labels": labels}
    claims: dict[str, Any] = {"gap": GAP}
    if distances is not None:
        require_model(whole, distances.model)
        if len(distances) != len(x):
            raise ValueError(f"{len(x)} inputs, but distances of {len(distances)}")
        arrays |= _proofs_of_distances(whole, x, distances)
        lower = arrays["lower"]
        assert lower is not None
        right = distances.predicted == labels
        certified_accuracy(distances, labels, radii)  # refuses radii that are none
        claims["certified"] = [[float(r), int((right & (lower > r)).sum())] for r in radii]
    if known is not None:
        require_model(whole, known.model)
        answers = known.answers(x)
        claims["proved"] = int((answers == labels).sum())
        arrays |= {
            "map": known.metric.map,
            "centre": known.metric.centre,
            "values": known.values,
            "vectors": known.vectors,
            "tail_lower": known.lower,
            "tail_upper": known.upper,
            "answers": answers,
        }
    stored = {name: array.detach().cpu() for name, array in arrays.items() if array is not None}
    claims |= _digests(stored)
    save_tensors(path, stored, {"claims": claims})


def verify_certificate(
    path: str | os.PathLike[str],
    tensor: BilinearTensor | None = None,
    inputs: Float[Tensor, "n d"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    *,
    embedding: Embedding | None = None,
) -> dict[str, Any]:
    """Check a certificate with `certificate_checker`, and that it is about these weights and inputs.

    Returns what is proved: "certified" [radius, count] pairs, "proved" answers. Raises
    `certificate_checker.Refused`, a ValueError that says what fails.
    """
    given: dict[str, str] = {}
    if tensor is not None:
        given["model"] = _digests(_weights(tensor, embedding))["model"]
    if (inputs is None) != (labels is None):
        raise ValueError("give inputs and labels, or neither: a certificate is about both")
    if inputs is not None and labels is not None:
        given["data"] = _digests({"inputs": inputs, "labels": labels.long()})["data"]
    claims: dict[str, Any] = certificate_checker.check(path, **given)
    return claims


def _weights(tensor: BilinearTensor, embedding: Embedding | None) -> dict[str, Tensor | None]:
    names = ("left", "right", "out", "bias_left", "bias_right", "bias_out")
    arrays: dict[str, Tensor | None] = {name: getattr(tensor, name) for name in names}
    if embedding is not None:
        arrays |= {"directions": embedding[0].detach(), "offset": embedding[1]}
    return arrays


def _digests(arrays: dict[str, Any]) -> dict[str, str]:
    """Digests of weights, of data and of everything, as the checker takes them from a file."""
    numbers: dict[str, np.ndarray] = {
        name: array.detach().cpu().numpy() for name, array in arrays.items() if array is not None
    }
    return {
        "model": certificate_checker.digest(numbers, certificate_checker.WEIGHTS),
        "data": certificate_checker.digest(numbers, certificate_checker.DATA),
        "content": certificate_checker.digest(numbers, sorted(numbers)),
    }


@torch.no_grad()
def _proofs_of_distances(
    tensor: BilinearTensor, x: Tensor, distances: AdversarialDistances
) -> dict[str, Tensor | None]:
    radius = distances.radius
    multiplier = distances.multiplier.clone()
    target = torch.where(radius.isfinite(), radius, 1e3 * (1 + x.norm(dim=1)))
    # A rival that no input reaches has no multiplier of its own; a finite one proves any distance.
    for row, j in distances.multiplier.isinf().nonzero().tolist():
        multiplier[row, j] = _finite(tensor, x[row], int(distances.predicted[row]), j, target[row])
    lower = (_INSIDE * target - _NEAR * (1 + x.norm(dim=1))).clamp_min(0)
    upper = (_BEYOND + 1e-6) * radius
    # Nearer than rounding can tell both bounds apart, the lower one is claimed alone.
    reached = radius.isfinite() & (radius > 0) & (upper <= lower * (1 + GAP / 2))
    change = torch.where(reached[:, None], _BEYOND * (distances.nearest - x), 0.0)
    return {
        "predicted": distances.predicted,
        "rival": distances.rival,
        "multiplier": multiplier,
        "lower": lower,
        "upper": torch.where(reached, upper, torch.inf),
        "change": change.float(),
    }


def _finite(tensor: BilinearTensor, x: Tensor, own: int, rival: int, target: Tensor) -> float:
    """A multiplier whose dual value reaches the squared distance `target`."""
    u = x.new_zeros(tensor.d_out)
    u[own], u[rival] = 1, -1
    form = QuadraticForm.of(tensor.to(torch.float64), u)
    values, vectors = torch.linalg.eigh(form.interaction.dense())
    gradient, margin = form.gradient(x[None])[0] @ vectors, form(x)
    nu = 1.0
    for _ in range(200):
        steps = nu * gradient / (2 * (1 + nu * values.clamp_min(0)))
        if nu * margin - (steps * gradient).sum() * nu / 2 >= target**2:
            break
        nu *= 1.5
    return nu
