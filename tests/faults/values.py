"""Bad values in calls: directions, counts, numbers of features, tokens, dictionaries, words, images."""

import dataclasses
import math

import torch

from tests.faults.building import (
    IN,
    LAYER,
    OUT,
    VOCABULARY,
    circuit,
    features,
    found_paths,
    images,
    layer,
    run,
    with_entry,
)
from tests.faults.campaign import Case, each
from tests.features.building import TOKENS, D, model, sae
from tl_bilinear import BilinearTensor, Dictionary, FeatureInteractions, load_demo_saes
from tl_bilinear.circuits import FeatureCircuit, check_paths, composed, paths, source_pairs
from tl_bilinear.circuits import virtual_weights as virtual
from tl_bilinear.features import evaluate_saes
from tl_bilinear.hooks import (
    EigenComponents,
    HOSVDComponents,
    ProjectInput,
    ReplaceLayer,
    loss_added,
    verify,
)
from tl_bilinear.recipes.images import TrainingConfig, train_classifier
from tl_bilinear.tensor import (
    approximate,
    functional_similarity,
    hosvd,
    match_eigenvectors,
    pairwise_similarity,
    reexpress,
    shapley,
    spectrum,
    tucker,
)

NAN, INF = math.nan, math.inf
F64 = torch.float64
QUIET = {"progress": False}


def rows(width, n=3):
    return torch.linspace(-1, 1, n * width, dtype=F64).reshape(n, width)


# ---------------------------------------------------------------------- directions


def bad_rows(width):
    """What is no matrix of finite rows of a width, and what has to be said."""
    good = rows(width)
    return {
        "NaN in a row": (
            with_entry(good, (1, 2), NAN),
            r"has 1 NaN or infinite.*\(row 1\)",
        ),
        "infinite in a row": (with_entry(good, (2, 0), INF), r"\(row 2\)"),
        "all NaN": (good * NAN, r"has \d+ NaN or infinite.*\(row 0\)"),
        "another width": (
            rows(width + 1),
            rf"must have shape \[\.\.\., {width}\].*got \[3, {width + 1}\]",
        ),
        "one number": (torch.tensor(1.0), rf"must have shape \[\.\.\., {width}\]"),
        "integers": (
            torch.ones(3, width, dtype=torch.long),
            r"floating-point dtype, got torch\.int64",
        ),
        "a list": ([[1.0] * width] * 3, r"must be a torch\.Tensor, got list"),
    }


def bad_vectors(width):
    row = rows(width)[1]
    return {
        "NaN": (with_entry(row, 2, NAN), r"direction has 1 NaN or infinite"),
        "infinite": (with_entry(row, 0, INF), r"direction has 1 NaN or infinite"),
        "another width": (rows(width + 1)[0], rf"must have shape \[\.\.\., {width}\]"),
        "several": (rows(width), rf"direction must be one vector \[{width}\]"),
        "one number": (torch.tensor(1.0), rf"must have shape \[\.\.\., {width}\]"),
        "integers": (
            torch.ones(width, dtype=torch.long),
            r"floating-point dtype, got torch\.int64",
        ),
        "a list": ([1.0] * width, r"must be a torch\.Tensor, got list"),
    }


def directions():
    t = layer()
    q = t.interaction()
    cases = []
    cases += each("interaction(u)", t.interaction, bad_rows(4))
    cases += each("project(E)", t.project, bad_rows(4))
    cases += each("fold(D)", t.fold, bad_rows(5))
    cases += each("spectrum(directions)", lambda u: spectrum(t, u, **QUIET), bad_rows(4))
    cases += each("reexpress(directions)", lambda u: reexpress(t, u), bad_rows(4))
    cases += each("InteractionMatrix.fold(D)", q.fold, bad_rows(5))
    cases += each("InteractionMatrix.quadratic(x)", q.quadratic, bad_rows(5))
    cases += each("top(directions=)", lambda d: q.top(2, directions=d), bad_rows(5))
    cases += each("shapley(x)", lambda x: shapley(t, x), bad_rows(5))
    m = model()
    cases += each("paths(direction)", lambda u: paths(m, TOKENS[0], LAYER, u), bad_vectors(D))
    cases += each("composed(direction)", lambda u: composed(m, 0, 1, u), bad_vectors(D))
    dictionary = sae("blocks.0.hook_mlp_out")
    cases += each(
        "source_pairs(direction)",
        lambda u: source_pairs(m, LAYER, u, dictionary, dictionary),
        bad_vectors(D),
    )
    cases += each(
        "virtual_weights(direction)", lambda u: virtual(m, dictionary, LAYER, u), bad_vectors(D)
    )
    return cases


# ---------------------------------------------------------------------- how many


def bad_counts(most):
    between = rf"must lie between 1 and {most}"
    return {
        "0": (0, between + r".*got 0"),
        "-1": (-1, between + r".*got -1"),
        "too many": (most + 1, between + rf".*got {most + 1}"),
        "a fraction": (2.5, r"must be an int, got 2\.5"),
        "NaN": (NAN, r"must be an int, got nan"),
        "True": (True, r"must be an int, got True"),
        "a word": ("3", r"must be an int, got '3'"),
    }


def counts():
    t, f, r = layer(), features(), run()
    q = t.interaction()
    eigen = q.eigh(3)
    cases = []
    cases += each("eigh(k)", q.eigh, bad_counts(5))
    cases += each("hosvd(k)", lambda k: hosvd(t, k), bad_counts(4))
    cases += each("tucker(k_out)", lambda k: tucker(t, k, 2), bad_counts(4))
    cases += each("tucker(k_in)", lambda k: tucker(t, 2, k), bad_counts(5))
    cases += each("spectrum(k)", lambda k: spectrum(t, k=k, **QUIET), bad_counts(5))
    cases += each("Eigendecomposition.top(k)", eigen.top, bad_counts(3))
    cases += each("InteractionMatrix.top(k)", q.top, bad_counts(15))
    cases += each("features.top(k)", lambda k: f.top(0, k), bad_counts(820))
    cases += each("features.top_overall(k)", f.top_overall, bad_counts(30 * 820))
    cases += each("features.submatrix(k)", lambda k: f.submatrix(0, k), bad_counts(820))
    cases += each("features.geometry(k)", lambda k: f.geometry(0, k), bad_counts(820))
    cases += each("run.scatter(k)", lambda k: r.scatter(0, k, **QUIET), bad_counts(D))
    cases += each(
        "run.low_rank_correlation(k)", lambda k: r.low_rank_correlation(k, **QUIET), bad_counts(D)
    )
    cases += each(
        "Paths.strongest(k)",
        found_paths().strongest,
        bad_counts(len(found_paths().labels) * (len(found_paths().labels) + 1) // 2),
    )
    many = {k: v for k, v in bad_counts(2**31).items() if k != "too many"}
    cases += each("run.verify_pairs(limit)", lambda n: r.verify_pairs(0, 2, limit=n, **QUIET), many)
    cases += each(
        "run.active_interactions(limit)", lambda n: r.active_interactions(0, limit=n, **QUIET), many
    )
    cases += each("features.run(batch_size)", lambda n: f.run(TOKENS, batch_size=n, **QUIET), many)
    cases += each(
        "check_paths(removed)",
        lambda n: check_paths(model(), TOKENS[0], found_paths(), n, **QUIET),
        {"0": (0, "between 1"), "-1": (-1, "between 1")},
    )
    cases += each(
        "evaluate_saes(batch_size)",
        lambda n: evaluate_saes(model(), {"a": sae(OUT)}, TOKENS, batch_size=n, **QUIET),
        many,
    )
    size = {
        what: (value, r"batch_size must be a number of sequences, 1 or more, got")
        for what, value in {
            "0": 0,
            "-1": -1,
            "a fraction": 1.5,
            "True": True,
            "a word": "2",
        }.items()
    }
    cases += each(
        "loss_added(batch_size)",
        lambda n: loss_added(model(), TOKENS, _ablation(), batch_size=n, **QUIET),
        size,
    )
    return cases


def _components():
    t = BilinearTensor.from_model(model(), LAYER)
    return EigenComponents(t.interaction(rows(D, 2)).eigh(2), LAYER)


def _ablation():
    return _components().ablate(0)


# ---------------------------------------------------------------------- which


def bad_numbers(n):
    return {
        "beyond the last": (n, rf"output features are 0 to {n - 1}, got \[{n}\]"),
        "far below": (-n - 1, rf"output features are 0 to {n - 1}, got \[{-n - 1}\]"),
        "a fraction": (1.5, rf"output features are 0 to {n - 1}, numbers, got torch\.float32"),
        "a word": ("first", rf"output features are 0 to {n - 1}.*'first'"),
    }


def numbers():
    f, r, m = features(), run(), model()
    cases = []
    for name, call in {
        "interaction": f.interaction,
        "top": lambda i: f.top(i, 2),
        "submatrix": lambda i: f.submatrix(i, 2),
        "statistics": lambda i: f.statistics(i, **QUIET),
        "geometry": lambda i: f.geometry(i, 2),
        "components": lambda i: f.components(i, 2),
        "run.examples": lambda i: r.examples(i, 2, **QUIET),
        "run.attribute": lambda i: r.attribute(i, 2),
        "run.verify_pairs": lambda i: r.verify_pairs(i, 2, **QUIET),
        "run.scatter": lambda i: r.scatter(i, 2, **QUIET),
        "run.active_interactions": lambda i: r.active_interactions(i, **QUIET),
    }.items():
        cases += each(f"{name}(feature)", call, bad_numbers(30))
    cases += each(
        "run.attribute(position)",
        lambda p: r.attribute(0, p),
        {"beyond": (6, "position 6"), "below": (-7, "position -7")},
    )
    cases += each(
        "run.attribute(sequence)",
        lambda s: r.attribute(0, 1, sequence=s),
        {"beyond": (2, "sequence 2"), "below": (-3, "sequence -3")},
    )
    cases += each(
        "run[rows]",
        lambda i: r[i],
        {"beyond": (2, "sequence 2 of a run of 2"), "below": (-3, "sequence -3")},
    )
    layers = {
        "beyond": (2, r"layer 2 does not exist"),
        "below": (-3, r"layer -3 does not exist"),
        "a word": ("1", r"layer"),
    }
    cases += each("from_model(layer)", lambda i: BilinearTensor.from_model(m, i), layers)
    cases += each(
        "FeatureInteractions(layer)", lambda i: FeatureInteractions(m, i, sae(IN), sae(OUT)), layers
    )
    direction = torch.ones(D, dtype=F64)
    cases += each("paths(layer)", lambda i: paths(m, TOKENS[0], i, direction), layers)
    cases += each(
        "paths(position)",
        lambda p: paths(m, TOKENS[0], 1, direction, p),
        {"beyond": (6, "position 6 does not exist"), "below": (-7, "position -7")},
    )
    cases += each(
        "Paths.effect(components)",
        lambda i: found_paths().effect([i]),
        {
            "beyond": (999, "component 999 does not exist"),
            "below": (-1, "component -1 does not exist"),
        },
    )
    cases += each(
        "check_paths(removed sets)",
        lambda i: check_paths(m, TOKENS[0], found_paths(), [[i]], **QUIET),
        {"beyond": (999, "component 999"), "below": (-1, "component -1")},
    )
    cases += each(
        "load_demo_saes(layer)",
        load_demo_saes,
        {
            "beyond": (9, "layer 9 of the demo model has no SAEs"),
            "a pattern": ("*", r"layer '\*'"),
            "below": (-1, "layer -1"),
            "a word": ("3", "layer '3'"),
        },
    )
    cases += each(
        "circuit.graph(targets)",
        lambda i: circuit().graph(2, {1: [i]}),
        {"beyond": (40, "40"), "below": (-41, "-41")},
    )
    cases += each(
        "circuit.graph(layer)",
        lambda i: circuit().graph(2, {i: [0]}),
        {"beyond": (7, "no interactions at layer 7")},
    )
    cases += each(
        "components.ablate(which)",
        lambda i: _components().ablate(i),
        {"beyond": (4, "4|out of range|components"), "a fraction": (0.5, "0.5")},
    )
    cases += each(
        "pairs of features",
        lambda p: r.verify_pairs(0, [p], **QUIET),
        {"beyond": ((0, 40), "40"), "below": ((-41, 0), "-41")},
    )
    return cases


# ---------------------------------------------------------------------- tokens


def bad_tokens():
    return {
        "id -1": (
            with_entry(TOKENS, (1, 2), -1),
            r"token -1 at row, position 1, 2 is not of the model's vocabulary, 0 to 22",
        ),
        "id beyond": (
            with_entry(TOKENS, (0, 3), VOCABULARY),
            rf"token {VOCABULARY} at row, position 0, 3",
        ),
        "huge id": (with_entry(TOKENS, (0, 0), 2**40), r"token 1099511627776"),
        "numbers with a fraction": (TOKENS.double(), r"tokens must be"),
        "none": (TOKENS[:, :0], r"no tokens|at least"),
        "three dimensions": (TOKENS[None], r"tokens must"),
    }


def tokens():
    m, f = model(), features()
    one = {
        what: (value[:1] if value.ndim == 2 else value, sentence)
        for what, (value, sentence) in {
            **bad_tokens(),
            "id -1": (with_entry(TOKENS, (0, 2), -1), r"token -1 at row, position 0, 2"),
        }.items()
    }
    direction = torch.ones(D, dtype=F64)
    cases = each("features.run(tokens)", lambda t: f.run(t, **QUIET), bad_tokens())
    cases += each(
        "evaluate_saes(tokens)",
        lambda t: evaluate_saes(m, {"a": sae(OUT)}, t, **QUIET),
        bad_tokens(),
    )
    cases += each(
        "loss_added(tokens)", lambda t: loss_added(m, t, _ablation(), **QUIET), bad_tokens()
    )
    cases += each("verify(tokens)", lambda t: verify(m, t, _components(), **QUIET), bad_tokens())
    cases += each("paths(tokens)", lambda t: paths(m, t, LAYER, direction), one)
    cases += each("circuit.activations(tokens)", lambda t: circuit().activations(t), one)
    cases += each(
        "features.run(text)",
        lambda t: f.run(t, **QUIET),
        {
            "a number": (3, "text is a string"),
            "no texts": ([], "text is a string"),
            "None": (None, "text is a string"),
            "numbers": ([1, 2], "text is a string"),
        },
    )
    cases += each(
        "check_paths(tokens)",
        lambda t: check_paths(m, t, found_paths(), 2, **QUIET),
        {
            "others": (TOKENS[1], "these paths are of the tokens"),
            "fewer": (TOKENS[0, :5], "these paths are of the tokens|position"),
        },
    )
    masks = {
        "another shape": (
            torch.ones(2, 5, dtype=torch.bool),
            r"mask must be a boolean tensor of shape",
        ),
        "numbers": (torch.ones(2, 6), r"mask must be a boolean"),
    }
    cases += each("features.run(mask)", lambda mask: f.run(TOKENS, mask=mask, **QUIET), masks)
    cases += each(
        "run.mean_input(mask)",
        lambda mask: run().mean_input(mask),
        {"nothing chosen": (torch.zeros(2, 6, dtype=torch.bool), "no token was chosen")},
    )
    return cases


# ---------------------------------------------------------------------- dictionaries


def _broken(change, **options):
    made = sae(IN, **options)
    with torch.no_grad():
        change(made)
    return made


def dictionaries():
    m = model()
    out = sae(OUT, n=30)
    good = rows(D, 4)
    cases = []
    sources = {
        "NaN in the decoder": (
            _broken(lambda s: s.W_dec.data.__setitem__((3, 1), NAN)),
            r"decoder.*\(row 3\)",
        ),
        "NaN in the encoder": (
            _broken(lambda s: s.W_enc.data.__setitem__((1, 3), NAN)),
            r"encoder.*\(row 3\)",
        ),
        "infinite b_dec": (
            _broken(lambda s: s.b_dec.data.__setitem__(0, INF)),
            r"decoder_bias.*NaN or infinite|encoder_offset",
        ),
        "a decoder row of zeros": (
            _broken(lambda s: s.W_dec.data.__setitem__(5, 0.0), rescale_acts_by_decoder_norm=True),
            r"feature 5 .* has a decoder row of zeros",
        ),
        "a NaN matrix": (
            with_entry(good, (2, 0), NAN),
            r"the decoder of the dictionary .* \(row 2\)",
        ),
        "an infinite matrix": (with_entry(good, (0, 0), INF), r"\(row 0\)"),
        "another width": (rows(D + 1), r"width 17, but layer 1 of the model has width 16"),
        "one row": (good[0], r"a dictionary is a matrix \[n, d\]"),
        "integers": (torch.ones(3, D, dtype=torch.long), r"floating-point dtype"),
        "no dictionary": ("sae", r"expected a SAELens SAE or transcoder"),
        "None": (None, r"expected a SAELens SAE or transcoder"),
        "a list": ([[1.0] * D], r"expected a SAELens SAE or transcoder"),
        "another layer's SAE": (sae("blocks.0.mlp.hook_in"), r"blocks\.0"),
    }
    cases += each("sae_in", lambda s: FeatureInteractions(m, LAYER, s, out), sources)
    cases += each(
        "sae_out",
        lambda s: FeatureInteractions(m, LAYER, sae(IN), s),
        {
            k: v
            for k, v in sources.items()
            if isinstance(v[0], (torch.Tensor, str, list, type(None)))
        },
    )
    cases += each(
        "circuit sources",
        lambda s: FeatureCircuit(m, {1: out}, {"x": s}),
        {k: sources[k] for k in ("NaN in the decoder", "a NaN matrix", "no dictionary")},
    )
    for field, value, sentence in (
        (
            "encoder",
            rows(D, 3),
            r"encoder must have shape \[4, d_read\] for a decoder of shape \[4, 16\]",
        ),
        (
            "encoder",
            with_entry(good, (1, 1), NAN),
            r"the encoder of the dictionary .*\(row 1\)",
        ),
        ("decoder_bias", torch.ones(3), r"decoder_bias must have shape \[16\]"),
        ("decoder_bias", torch.full((D,), NAN), r"decoder_bias .*NaN or infinite"),
        ("encoder_bias", torch.ones(3), r"encoder_bias must have shape \[4\]"),
        ("encoder_bias", torch.full((4,), INF), r"encoder_bias .*NaN or infinite"),
        ("encoder_offset", torch.ones(5), r"encoder_offset must have shape \[4\]"),
        ("labels", ["a"], r"1 labels for 4 features"),
    ):
        cases.append(
            Case(
                f"Dictionary({field}) {sentence}",
                lambda _, f=field, v=value: Dictionary(good, **{f: v}),
                sentence,
            )
        )
    cases += each(
        "evaluate_saes(saes)",
        lambda s: evaluate_saes(m, s, TOKENS, **QUIET),
        {
            "none": ({}, "no SAE to evaluate"),
            "another hook": (
                {"a": sae("blocks.9.hook_mlp_out")},
                "belongs to 'blocks.9.hook_mlp_out'",
            ),
            "another width": ({"a": sae(OUT, d=8)}, "takes activations of width 8"),
        },
    )
    return cases


# ---------------------------------------------------------------------- words, weights, options


def options():
    t, f, m = layer(), features(), model()
    q = t.interaction()
    eigen = q.eigh(2)
    u = torch.ones(D, dtype=F64)
    cases = [
        Case("eigh(which)", lambda _: q.eigh(2, which="sideways"), "sideways"),
        Case("eigh(method)", lambda _: q.eigh(2, method="guess"), "guess"),
        Case("hosvd(mode)", lambda _: hosvd(t, 2, mode="middle"), "middle"),
        Case("spectrum(which)", lambda _: spectrum(t, which="sideways", **QUIET), "sideways"),
        Case("top(kind)", lambda _: q.top(2, kind="odd"), "'all', 'self' or 'cross'"),
        Case("features.top(kind)", lambda _: f.top(0, 2, kind="odd"), "'all', 'self' or 'cross'"),
        Case(
            "interaction(basis)",
            lambda _: f.interaction(0, basis="odd"),
            "'features' or 'activations'",
        ),
        Case(
            "FeatureInteractions(output)",
            lambda _: FeatureInteractions(m, 1, sae(IN), sae(OUT), output="odd"),
            "'encoder' or 'decoder'",
        ),
        Case("paths(by)", lambda _: paths(m, TOKENS[0], 1, u, by="odd"), "by must be one of"),
        Case(
            "paths(words)", lambda _: paths(m, TOKENS[0], 1, u, words=["a"]), "1 words for 6 tokens"
        ),
        Case(
            "paths(max_bytes)", lambda _: paths(m, TOKENS[0], 1, u, max_bytes=1), "raise max_bytes"
        ),
        Case(
            "verify(at)", lambda _: verify(m, TOKENS, _components(), at="middle", **QUIET), "middle"
        ),
        Case(
            "verify(controls)",
            lambda _: verify(m, TOKENS, _components(), controls=-1, **QUIET),
            "controls must be",
        ),
        Case(
            "verify(confidence)",
            lambda _: verify(m, TOKENS, _components(), confidence=1.0, **QUIET),
            "confidence must lie",
        ),
        Case(
            "verify(confidence NaN)",
            lambda _: verify(m, TOKENS, _components(), confidence=NAN, **QUIET),
            "confidence must lie",
        ),
        Case(
            "verify(positions)",
            lambda _: verify(m, TOKENS, _components(), positions=9, **QUIET),
            "position",
        ),
        Case(
            "loss_added(mask)",
            lambda _: loss_added(m, TOKENS, _ablation(), mask=torch.ones(1, 6), **QUIET),
            "mask must be a boolean tensor of shape",
        ),
        Case(
            "loss_added(confidence)",
            lambda _: loss_added(m, TOKENS, _ablation(), confidence=NAN, **QUIET),
            "confidence must lie",
        ),
        Case("match(by)", lambda _: match_eigenvectors(eigen, eigen, by="luck"), "luck"),
        Case("pairwise(one)", lambda _: pairwise_similarity([]), "decomposition"),
        Case(
            "similarity of other widths",
            lambda _: functional_similarity(t, BilinearTensor(rows(3, 2), rows(3, 2), rows(2, 4))),
            "d_in|shape|width|inputs",
        ),
        Case(
            "components of another layer",
            lambda _: verify(m, TOKENS, dataclasses.replace(_components(), layer=0), **QUIET),
            "does not fit",
        ),
        Case(
            "ReplaceLayer of another width",
            lambda _: loss_added(m, TOKENS, ReplaceLayer(t, layer=1), **QUIET),
            "does not fit",
        ),
        Case(
            "ProjectInput of another width",
            lambda _: loss_added(m, TOKENS, ProjectInput(directions=rows(5), layer=1), **QUIET),
            "5|width|fit",
        ),
        Case(
            "HOSVDComponents of another width",
            lambda _: verify(m, TOKENS, HOSVDComponents(hosvd(t, 2), 1), **QUIET),
            "does not fit",
        ),
        Case(
            "approximate of nothing",
            lambda _: approximate(torch.nn.Linear(3, 3), rows(3, 8)),
            "Linear",
        ),
        Case(
            "prune another circuit's graph",
            lambda _: circuit().prune(
                dataclasses.replace(circuit().graph(2), dictionaries=["x"]), TOKENS[0]
            ),
            "the graph is of x",
        ),
        Case(
            "graphml into no folder",
            lambda p: circuit().graph(2).to_graphml(p / "no" / "x.graphml"),
            "does not exist",
        ),
        Case(
            "save into no folder",
            lambda p: layer().save(p / "no" / "x.safetensors"),
            "does not exist",
        ),
        Case("save over a folder", lambda p: layer().save(p), "it is a folder"),
        Case(
            "a model without hooks",
            lambda _: verify(torch.nn.Linear(2, 2), TOKENS, _components(), **QUIET),
            "hook",
        ),
    ]
    factors = (rows(5, 6), rows(5, 6), rows(6, 4))
    for place, name in enumerate(("left", "right", "out")):
        for what, value, sentence in (
            ("NaN", with_entry(factors[place], (0, 1), NAN), rf"{name} has 1 NaN or infinite"),
            ("integers", factors[place].long(), r"floating-point dtype"),
            ("a list", factors[place].tolist(), r"must be a torch\.Tensor"),
            ("one dimension", factors[place][0], r"shape|matrix|dimension"),
            ("other sizes", torch.ones(2, 3, dtype=F64), r"\[2, 3\]|shape"),
        ):
            given = [*factors]
            given[place] = value
            cases.append(
                Case(
                    f"BilinearTensor({name}): {what}",
                    lambda _, g=given: BilinearTensor(*g),
                    sentence,
                )
            )
    return cases


# ---------------------------------------------------------------------- images


def pictures():
    good = images()
    x, y = good.train_images, good.train_labels
    changes = {
        "NaN pixels": (
            {"train_images": with_entry(x, (2, 1), NAN)},
            r"image 2 of train_images has pixels",
        ),
        "infinite pixels": ({"test_images": with_entry(x, (1, 1), INF)}, r"image 1 of test_images"),
        "pixels above 1": ({"train_images": x * 255}, r"must lie in \[0, 1\]"),
        "negative pixels": ({"train_images": -x}, r"must lie in \[0, 1\]"),
        "labels below 0": (
            {"train_labels": y - 1},
            r"label -1 of image 0 of train_labels is not one of the 2 classes",
        ),
        "labels beyond": ({"test_labels": y + 1}, r"label 2 of image 1 of test_labels"),
        "fractions as labels": ({"train_labels": y.double()}, r"integers, one for each"),
        "too few labels": ({"train_labels": y[:3]}, r"must be 4 integers"),
        "another size": ({"size": (2, 2)}, r"must have shape \[n, 4\]"),
        "pictures, not rows": ({"train_images": x.reshape(4, 2, 3)}, r"must have shape \[n, 6\]"),
        "no images": ({"test_images": x[:0], "test_labels": y[:0]}, r"must have shape"),
        "no classes": ({"classes": ()}, r"has no classes"),
    }
    cases = each("ImageData", lambda change: images(**change), changes)
    cases.append(
        Case(
            "a training that diverges",
            lambda _: train_classifier(
                images(),
                TrainingConfig(size=4, learning_rate=1.0, weight_decay=1e30, epochs=40),
                progress=False,
            ),
            r"training diverged: the loss is (nan|inf) in epoch",
        )
    )
    return cases


def cases():
    return [
        *directions(),
        *counts(),
        *numbers(),
        *tokens(),
        *dictionaries(),
        *options(),
        *pictures(),
    ]
