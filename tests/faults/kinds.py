"""What no argument of that kind may be: every argument of a call, by its annotation, one at a time.

A call is given whole and good; each of its arguments in turn becomes each bad value of its kind. The
sentence must name the argument. The other tables hold what a kind does not know: ranges, shapes, other
arguments.
"""

import functools
import inspect
import re

import torch

from tests.faults.building import LAYER, features, layer, run
from tests.faults.campaign import Case
from tests.faults.values import INF, NAN, QUIET
from tests.features.building import TOKENS, D, model
from tl_bilinear.circuits import composed, embedding, paths, source_pairs, virtual_weights
from tl_bilinear.hooks import loss_added, verify
from tl_bilinear.tensor import (
    InputMoments,
    cp,
    functional_similarity,
    hosvd,
    match_eigenvectors,
    moment_metric,
    pairwise_similarity,
    reexpress,
    shapley,
    spectrum,
    tucker,
)


def words(text):
    return text.split()


NOT_INTEGERS = {"a fraction": 1.5, "a word": "3", "NaN": NAN, "a list": [1], "true": True}
NOT_NUMBERS = {"a word": "0.1", "NaN": NAN, "infinite": INF, "a list": [0.1]}
NOT_TENSORS = {"a list": [[1.0]], "a word": "x", "a number": 1.5}
ONE_OF = words(
    "Around Basis Fit Kind Matching MetricName Method Mode PairNull PairOrder Side Site Which"
)
BAD = {
    "int": NOT_INTEGERS,
    "float": NOT_NUMBERS,
    "Float": NOT_TENSORS | {"NaN": torch.tensor([[NAN]], dtype=torch.float64)},
    "Int": {"a word": "x", "fractions": torch.tensor([0.5]), "true": torch.tensor([True])},
    "Bool": {"a word": "x", "numbers": torch.ones(TOKENS.shape)},
} | {kind: {"another word": "bogus", "a number": 3} for kind in ONE_OF}
TAKEN = {"Sequence": "a list", "Tensor": "NaN", "Along": "a word"}
"""What else a kind in a union makes good: ``int | Sequence[int]`` takes a list."""


SAYS = {
    "features": "feature",
    "outputs": "feature",
    "around": "population|mask",
    "baseline": "population|mask",
    "pairs": r"feature|\bk\b",
    "rank": r"\bk\b",
    "second": "layer",
}
"""Words for an argument, where its name does not serve a reader."""


def calls():
    """Name, function, and good arguments."""
    t, f, r, q = layer(), features(), run(), layer().interaction()
    x = torch.linspace(-1, 1, 40 * t.d_in, dtype=torch.float64).reshape(40, t.d_in).sin()
    moments, direction = InputMoments.of(x), torch.ones(D, dtype=torch.float64)
    eigen = q.eigh(2)
    m = model()
    yield "spectrum", spectrum, {"tensor": t, **QUIET}
    yield "hosvd", hosvd, {"tensor": t}
    yield "tucker", tucker, {"tensor": t, "k_out": 2, "k_in": 2}
    yield "cp", cp, {"tensor": t, "rank": 2, "steps": 2}
    yield "reexpress", reexpress, {"tensor": t, "directions": torch.eye(t.d_out, dtype=t.dtype)}
    yield "shapley", shapley, {"tensor": t, "x": x}
    yield "functional_similarity", functional_similarity, {"first": t, "second": t}
    yield "match_eigenvectors", match_eigenvectors, {"first": eigen, "second": eigen}
    yield "pairwise_similarity", pairwise_similarity, {"decompositions": [eigen, eigen]}
    yield "moment_metric", moment_metric, {"tensor": t, "moments": moments}
    yield "InputMoments.of", InputMoments.of, {"x": x}
    for name in ("eigh", "top", "top_of_batch", "entries", "apply", "quadratic", "fold"):
        yield f"InteractionMatrix.{name}", getattr(q, name), {}
    yield "BilinearTensor.fold", t.fold, {"directions": torch.eye(t.d_in, dtype=t.dtype)}
    yield "BilinearTensor.around", t.around, {}
    yield "BilinearTensor.interaction", t.interaction, {}
    for name in words(
        "moments count_pairs interaction top top_overall pair_chance spectrum_chance submatrix "
        "statistics geometry components sweep unembedding promoted raised side number numbers"
    ):
        yield f"FeatureInteractions.{name}", getattr(f, name), {}
    for name in words(
        "preactivations activations mean_input inputs_of moments examples labels attribute "
        "centred effects shapley ranked_pairs active_interactions terms low_rank_correlation "
        "nearest_inputs scatter verify_pairs"
    ):
        yield f"FeatureRun.{name}", getattr(r, name), {}
    yield "FeatureRun.term_names", r.term_names, {"terms": r.terms(1, [0], **QUIET)}
    yield "paths", paths, {"model": m, "tokens": TOKENS[0], "layer": LAYER, "direction": direction}
    yield "virtual_weights", virtual_weights, {"model": m, "layer": LAYER, "direction": direction}
    yield "source_pairs", source_pairs, {"model": m, "layer": LAYER, "direction": direction}
    yield "composed", composed, {"model": m, "first": 0, "second": 1, "direction": direction}
    yield "loss_added", loss_added, {"model": m, "tokens": TOKENS, "edits": {}, **QUIET}
    parts = f.components([0], 2)
    yield "verify", verify, {"model": m, "tokens": TOKENS, "components": parts, **QUIET}


GOOD = {
    "source": embedding(model()),
    "first": embedding(model()),
    "second": embedding(model()),
    "k": 2,
    "feature": 0,
    "features": [0],
    "text": TOKENS,
}
"""Arguments without a default that are the same everywhere."""


def cases():
    made = []
    for name, function, given in calls():
        parameters = inspect.signature(function).parameters
        for argument, parameter in parameters.items():
            annotation = str(parameter.annotation)
            kinds = re.findall(r"\w+", re.sub(r"'[^']*'|\[[^\]]*\]", "", annotation))
            bad = {what: v for kind in kinds if kind in BAD for what, v in BAD[kind].items()}
            for kind in kinds:
                bad.pop(TAKEN.get(kind, ""), None)
            good = {
                other: GOOD[other]
                for other, p in parameters.items()
                if p.default is p.empty and other not in given and other in GOOD
            }
            for what, value in bad.items():
                call = functools.partial(function, **{**good, **given, argument: value})
                sentence = rf"\b{argument}\b|{SAYS.get(argument, argument)}"
                made.append(Case(f"{name}: {argument} is {what}", lambda _, c=call: c(), sentence))
    return made
