"""What the other tables do not reach: moments, metrics, chance, populations, losses, pages."""

import dataclasses

import torch
from torch import nn

from tests.faults.building import VOCABULARY, features, images, layer, run, with_entry
from tests.faults.campaign import Case, each
from tests.faults.values import F64, INF, NAN, QUIET, bad_counts, bad_rows, bad_vectors, rows
from tests.features.building import TOKENS, D, model, sae
from tests.models.building import bilinear_model
from tl_bilinear import BilinearTensor, functional_inner
from tl_bilinear.circuits import direct_path, through_head
from tl_bilinear.demo import load_demo_moments
from tl_bilinear.explorer import explore, write_folder, write_page
from tl_bilinear.features import PairCounts, discoveries
from tl_bilinear.hooks import (
    Chain,
    logit_difference,
    next_token_loss,
    token_losses,
)
from tl_bilinear.models import compare_attention_scales, save_bridge
from tl_bilinear.paper import class_spectra, truncate
from tl_bilinear.recipes.images import (
    TrainingConfig,
    config_for,
    train_classifier,
    train_classifiers,
)
from tl_bilinear.recipes.language import compare_activations
from tl_bilinear.tensor import InputMoments, Metric, register_model_reader, with_residual


def samples(n=40, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=F64)


def moments(d=5, **changes):
    return InputMoments.of(samples(d=d), **changes)


def metric(d=5, **changes):
    return Metric.of_samples(samples(d=d), 0.1, **changes)


def other_features(counts):
    """Counts of a layer with fewer input features."""
    return dataclasses.replace(counts)


def bad_ridges():
    return {
        "NaN": (NAN, "ridge"),
        "negative": (-0.5, "ridge"),
        "infinite": (INF, "ridge"),
        "a word": ("0.1", "ridge"),
    }


def of_inputs():
    """Moments of inputs, metrics, and what is measured in them."""
    t, given = layer(), samples()
    cases = each(
        "InputMoments.of(x)",
        InputMoments.of,
        {
            "NaN": (with_entry(given, (3, 1), NAN), "NaN or infinite"),
            "integers": (given.long(), "floating-point"),
            "a list": ([[1.0, 2.0]], "torch.Tensor"),
            "one number": (torch.tensor(1.0), "shape"),
            "none": (given[:0], "no|none|empty|at least"),
        },
    )
    mask = torch.ones(40, dtype=torch.bool)
    cases += each(
        "InputMoments.of(mask)",
        lambda m: InputMoments.of(given, mask=m),
        {
            "another shape": (mask[:9], "mask"),
            "nothing": (~mask, "no|none|empty|at least"),
            "numbers": (mask.float(), "mask|boolean"),
        },
    )
    cases += each("InputMoments.metric(ridge)", moments().metric, bad_ridges())
    cases += each("Metric.of_samples(ridge)", lambda r: Metric.of_samples(given, r), bad_ridges())
    cases += each(
        "Metric.of_samples(x)",
        lambda x: Metric.of_samples(x, 0.1),
        {
            "NaN": (with_entry(given, (3, 1), NAN), "NaN or infinite"),
            "none": (given[:0], "no|none|empty|at least"),
            "all zero": (given * 0, "zero"),
        },
    )
    cases += each(
        "InputMoments.merged",
        InputMoments.merged,
        {
            "nothing": ([], "no|none|empty|at least"),
            "other widths": ([moments(), moments(4)], "5.*4|4.*5|width|shape"),
            "other spaces": ([moments(space="a"), moments(space="b")], "space"),
        },
    )
    m = metric()
    for name in ("inverse_root", "apply", "squared_length"):
        cases += each(f"Metric.{name}", getattr(m, name), bad_rows(5))
    for name, call in {
        "whiten": t.whiten,
        "restore": t.restore,
        "eigh(metric=)": lambda it: t.interaction().eigh(2, metric=it),
    }.items():
        cases += each(
            name,
            call,
            {"of another width": (metric(4), "the metric is of 4 coordinates")},
        )
    point = {
        what: (value, sentence.replace("direction ", "point "))
        for what, (value, sentence) in bad_vectors(5).items()
    }
    cases += each("around(point)", t.around, point)
    cases += each(
        "functional_inner",
        lambda other: functional_inner(t, other),
        {
            "another input width": (
                BilinearTensor(t.left[:, 1:], t.right[:, 1:], t.out),
                "d_in|width|input",
            ),
            "another output width": (
                BilinearTensor(t.left, t.right, t.out[1:]),
                "d_out|width|output",
            ),
        },
    )
    cases += each(
        "functional_inner(inputs)",
        lambda it: functional_inner(t, t, inputs=it),
        {"of another width": (moments(4), "width|5|4")},
    )
    cases += each(
        "cosine_similarity",
        t.cosine_similarity,
        {
            "of another layer": (
                BilinearTensor(t.left[:, 1:], t.right[:, 1:], t.out),
                "d_in|width|shape",
            )
        },
    )
    cases += each(
        "from_mlp(module)",
        BilinearTensor.from_mlp,
        {"a linear map": (nn.Linear(3, 3), "Linear"), "a word": ("mlp", "str")},
    )

    def register_twice(name):
        for _ in range(2):
            register_model_reader(name, lambda model, layer: None)

    cases += each("register_model_reader", register_twice, {"twice": ("faults", "faults")})
    cases += each("with_residual", with_residual, {"of other widths": (layer(), "d_in|width|4|5")})
    return cases


def of_pairs():
    """Eigendecompositions, matrices and the quartic form."""
    q = layer().interaction()
    eigen = q.eigh(3)
    cases = each(
        "certificate(radius)",
        eigen.certificate,
        {"NaN": (NAN, "radius"), "negative": (-1.0, "radius"), "infinite": (INF, "radius")},
    )
    cases += each("certificate(k)", lambda k: eigen.certificate(1.0, k), bad_counts(3))
    cases += each("error_bound(x)", eigen.error_bound, bad_rows(5))
    cases += each("error_bound(k)", lambda k: eigen.error_bound(rows(5), k), bad_counts(3))
    cases += each(
        "ordered(by)",
        lambda by: eigen.ordered(by),
        {"an unknown order": ("size", "size"), "of samples, without": ("variance", "x")},
    )
    cases += each(
        "projectors(rtol)",
        lambda r: eigen[0].projectors(r),
        {"NaN": (NAN, "rtol"), "negative": (-1.0, "rtol"), "a word": ("x", "rtol")},
    )
    cases += each("InteractionMatrix.apply(rows)", q.apply, bad_rows(5))
    cases += each(
        "top_of_batch(k)",
        q.top_of_batch,
        {"0": (0, "k"), "-1": (-1, "k"), "a fraction": (1.5, "k")},
    )
    cases += each(
        "top_of_batch(kind)", lambda kind: q.top_of_batch(2, kind=kind), {"odd": ("odd", "odd")}
    )
    form = layer().self_composition() if hasattr(layer(), "self_composition") else None
    if form is not None:
        cases += each("QuarticForm.contract(x)", form.contract, bad_rows(5))
    return cases


def of_features():
    """Labels, chance, populations, orders of pairs."""
    f, r = features(), run()
    many = f.inputs.n
    number = {
        "beyond": (999, "999"),
        "below": (-1, "-1"),
        "a fraction": (1.5, r"1\.5|numbers, got torch\.float32"),
        "a word": ("3", "3"),
    }
    cases = []
    for name, call in {
        "pair_chance": lambda i: f.pair_chance(i),
        "promoted": lambda i: f.promoted(i),
        "run.ranked_pairs": lambda i: r.ranked_pairs(i),
        "run.effects": lambda i: r.effects(i),
        "run.population": lambda i: r.population("active", i),
    }.items():
        cases += each(f"{name}(feature)", call, number)
    for name, call in {
        "spectrum_chance": lambda i: f.spectrum_chance([i], **QUIET),
        "run.moments": lambda i: r.moments([i], **QUIET),
        "features.moments": lambda i: f.moments(TOKENS, [i], **QUIET),
        "count_pairs": lambda i: f.count_pairs(TOKENS, [i], **QUIET),
        "run.inputs_of": lambda i: r.inputs_of([i]),
    }.items():
        cases += each(f"{name}(features)", call, number)
    counted = f.count_pairs(TOKENS, [2], **QUIET)
    for name, call in {
        "pair_chance(k)": lambda k: f.pair_chance(2, k),
        "promoted(k)": lambda k: f.promoted(2, k),
        "ranked_pairs(k)": lambda k: f.ranked_pairs(2, counted, k),
        "run.ranked_pairs(k)": lambda k: r.ranked_pairs(2, k),
        "run.effects(k)": lambda k: r.effects(2, k=k),
        "run.labelled(k)": lambda k: r.labelled(k=k, **QUIET),
    }.items():
        cases += each(
            name,
            call,
            {"0": (0, "k"), "-1": (-1, "k"), "a fraction": (1.5, "k"), "a word": ("x", "k")},
        )
    shares = {"NaN": (NAN, "rate"), "0": (0.0, "rate"), "2": (2.0, "rate"), "a word": ("x", "rate")}
    cases += each("pair_chance(rate)", lambda p: f.pair_chance(2, rate=p), shares)
    cases += each(
        "spectrum_chance(rate)", lambda p: f.spectrum_chance([2], rate=p, **QUIET), shares
    )
    cases += each("discoveries(rate)", lambda p: discoveries(torch.rand(4), p), shares)
    cases += each(
        "discoveries(p)",
        discoveries,
        {
            "above 1": (torch.tensor([0.1, 2.0]), "p"),
            "a list": ([0.1], "torch.Tensor"),
        },
    )
    draws = {"0": (0, "draws"), "-1": (-1, "draws"), "a fraction": (1.5, "draws")}
    cases += each("pair_chance(draws)", lambda n: f.pair_chance(2, draws=n), draws)
    cases += each(
        "spectrum_chance(draws)", lambda n: f.spectrum_chance([2], draws=n, **QUIET), draws
    )
    odd = {"odd": ("odd", "odd")}
    cases += each("pair_chance(null)", lambda n: f.pair_chance(2, null=n), odd)
    cases += each("promoted(side)", lambda n: f.promoted(2, side=n), odd)
    cases += each("ranked_pairs(by)", lambda n: f.ranked_pairs(2, counted, by=n), odd)
    cases += each("run.ranked_pairs(by)", lambda n: r.ranked_pairs(2, by=n), odd)
    cases += each("run.effects(around)", lambda n: r.effects(2, around=n), odd)
    cases += each(
        "run.population(around)",
        lambda m: r.population(m, 2),
        {
            **odd,
            "another shape": (torch.ones(3, dtype=torch.bool), "shape|mask"),
            "numbers": (torch.ones(TOKENS.shape), "mask|bool"),
        },
    )
    cases += each(
        "with_labels",
        lambda names: f.with_labels(input=names),
        {"too few": (["a"], f"1.*{many}|{many}.*1"), "numbers": ([1] * many, "str|label")},
    )
    cases += each(
        "unembedding(token)",
        f.unembedding,
        {"beyond": (VOCABULARY, f"{VOCABULARY}"), "below": (-1, "-1"), "a word": ("a", "a")},
    )
    named = dataclasses.replace(f.inputs, labels=[f"name {i}" for i in range(f.inputs.n)])
    cases += each(
        "Dictionary.labels_of(features)",
        named.labels_of,
        {
            "out of range": ([f.inputs.n], f"features\\[0\\] is {f.inputs.n}, but there are"),
            "a fraction": ([0, 1.5], "integer indices"),
            "a word": (["3"], "integer indices"),
            "NaN": (torch.tensor([NAN]), "integer indices"),
        },
    )
    cases += each("Dictionary.preactivation(x)", f.inputs.preactivation, bad_rows(D))
    cases += each("Dictionary.scale_of(x)", f.inputs.scale_of, bad_rows(D))
    cases += each(
        "count_pairs(max_pairs)",
        lambda n: f.count_pairs(TOKENS, max_pairs=n, **QUIET),
        {"0": (0, "max_pairs"), "-1": (-1, "max_pairs"), "a word": ("x", "max_pairs")},
    )
    cases += each(
        "PairCounts.merged", PairCounts.merged, {"nothing": ([], "no|none|empty|at least")}
    )
    found = r.low_rank_correlation(2, [2, 3], **QUIET)
    cases += each(
        "share_above(threshold)",
        found.share_above,
        {"NaN": (NAN, "threshold"), "a word": ("x", "threshold")},
    )
    cases += each(
        "share_above(rank)",
        lambda k: found.share_above(0.5, rank=k),
        {"0": (0, "rank"), "9": (9, "rank")},
    )
    return cases


def of_models():
    """Circuits, losses and interventions."""
    m = model()
    dictionary = sae("blocks.0.hook_mlp_out")
    heads = {"beyond": (99, "99"), "below": (-99, "-99"), "a fraction": (0.5, r"0\.5")}
    cases = each("direct_path(layer)", lambda n: direct_path(m, n, dictionary), heads)
    cases += each("through_head(layer)", lambda n: through_head(m, dictionary, n, 0), heads)
    cases += each("through_head(head)", lambda n: through_head(m, dictionary, 1, n), heads)
    logits = torch.randn(2, 6, VOCABULARY)
    for name, call in {"next_token_loss": next_token_loss, "token_losses": token_losses}.items():
        cases += each(
            f"{name}(tokens)",
            lambda t, call=call: call(logits, t),
            {
                "another shape": (TOKENS[:, :4], "shape|tokens"),
                "beyond": (TOKENS + VOCABULARY, "token"),
                "below": (TOKENS - 10, "token"),
                "numbers": (TOKENS.float(), "token"),
            },
        )
    cases += each(
        "next_token_loss(mask)",
        lambda mask: next_token_loss(logits, TOKENS, mask),
        {
            "another shape": (torch.ones(2, 3, dtype=torch.bool), "mask"),
            "numbers": (torch.ones(2, 6), "mask"),
        },
    )
    cases += each(
        "logit_difference",
        lambda t: logit_difference(t, 1)(logits, TOKENS),
        {"beyond": (VOCABULARY, f"{VOCABULARY}"), "below": (-1, "-1"), "a word": ("a", "a")},
    )
    cases += each(
        "logit_difference(position)",
        lambda p: logit_difference(2, 1, p)(logits, TOKENS),
        {"beyond": (6, "6"), "below": (-7, "-7"), "a fraction": (0.5, r"0\.5")},
    )
    cases += each(
        "Chain",
        lambda it: Chain(it),
        {"a word": ("x", "str|[Ii]ntervention"), "a number": (1, "int|[Ii]ntervention")},
    )
    return cases


def of_recipes():
    """Training several, and pages."""
    data = images()
    cases = each(
        "train_classifiers(configs)",
        lambda c: train_classifiers(data, c, **QUIET),
        {
            "other sizes": ([TrainingConfig(size=4), TrainingConfig(size=5)], "must agree in"),
        },
    )
    cases += each(
        "config_for",
        lambda v: config_for(data, **v),
        {
            "a bad one": ({"size": 0}, "size must be at least 1"),
        },
    )
    classifier = train_classifier(data, TrainingConfig(size=4, epochs=1), progress=False).model
    spectra = class_spectra(classifier).pixel
    cases += each(
        "truncate(kept)",
        lambda k: truncate(classifier, spectra, data.test_images, data.test_labels, [k]),
        {"0": (0, "kept must lie between 1 and"), "too many": (99, "kept must lie between 1 and")},
    )
    cases += [
        Case("write_page(nothing)", lambda p: write_page([], p / "x.html", **QUIET), "panel"),
        Case("write_folder(nothing)", lambda p: write_folder([], p / "x", **QUIET), "panel"),
        Case("explore(nothing)", lambda p: explore([], p / "x.html", open=False, **QUIET), "panel"),
        Case("save_bridge(no bridge)", lambda p: save_bridge("x", p / "x"), "str|bridge"),
        Case(
            "save_bridge(another model)",
            lambda p: save_bridge(bilinear_model(), p / "x"),
            "bridge|Bridge",
        ),
        Case("load_demo_moments(beyond)", lambda p: load_demo_moments(9), "layer 9"),
        Case(
            "compare_attention_scales(no model)",
            lambda p: compare_attention_scales(p, TOKENS, **QUIET),
            "config.json",
        ),
        Case(
            "compare_activations(no data)",
            lambda p: compare_activations(p, folder=p / "x", **QUIET),
            "prepared text",
        ),
    ]
    return cases


def cases():
    return of_inputs() + of_pairs() + of_features() + of_models() + of_recipes()
