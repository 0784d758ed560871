"""What is proved of a layer: distances, margins, certificates, regions, orthogonal trees."""

import torch

from tests.faults.building import layer, with_entry
from tests.faults.campaign import Case, each
from tests.faults.values import F64, NAN, bad_counts, bad_rows
from tests.tensor.reference import random_tensor
from tl_bilinear.paper import CertifyConfig, certify
from tl_bilinear.tensor import (
    BilinearStack,
    InputMoments,
    adversarial_distances,
    box_attack,
    certified_accuracy,
    euclidean_metric,
    folded,
    linf_bound,
    margin_spectrum,
    moment_metric,
    odt,
    projected_gradient_attack,
    proved_accuracy,
    proving_metric,
    truncation_change,
    verify_certificate,
    write_certificate,
)


def samples(d=5, n=6):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(1), dtype=F64)


def bad_inputs(width):
    """Rows that are no inputs [n, d]."""
    found = bad_rows(width)
    return {what: (value, r"inputs|shape|Tensor|dtype|NaN") for what, (value, _) in found.items()}


def bad_labels(n, classes):
    good = torch.zeros(n, dtype=torch.long)
    return {
        "too few": (good[1:], "labels"),
        "no class": (good + classes, "labels|class"),
        "below": (good - 1, "labels|class"),
        "fractions": (good.double(), "labels"),
        "a list": ([0] * n, "labels"),
    }


RADII = {"NaN": (NAN, "radius|radii"), "negative": (-1.0, "radius|radii")}


def cases():
    t, x = layer(), samples()
    found = adversarial_distances(t, x)
    labels = found.predicted.clone()
    other = random_tensor(5, 6, 4, True, seed=9)
    euclidean_metric(t)
    known = margin_spectrum(t, 3)
    moments = InputMoments.of(samples(n=40))
    inputs = {
        "adversarial_distances": lambda v: adversarial_distances(t, v),
        "proved_accuracy": lambda v: proved_accuracy(t, v, labels, (2,)),
        "projected_gradient_attack": lambda v: projected_gradient_attack(t, v, labels, 0.1),
        "box_attack": lambda v: box_attack(t, v, found),
        "linf_bound": lambda v: linf_bound(t, v, found),
        "margin_spectrum.answers": known.answers,
    }
    table = []
    for name, call in inputs.items():
        table += each(f"{name}(inputs)", call, bad_inputs(5))
    for name, call in {
        "proved_accuracy": lambda v: proved_accuracy(t, x, v, (2,)),
        "projected_gradient_attack": lambda v: projected_gradient_attack(t, x, v, 0.1),
        "certified_accuracy": lambda v: certified_accuracy(found, v, [0.1]),
        "write_certificate": lambda v: write_certificate("/tmp/never", t, x, v, found),
    }.items():
        table += each(f"{name}(labels)", call, bad_labels(6, 4))
    table += each(
        "certified_accuracy(radii)", lambda r: certified_accuracy(found, labels, [r]), RADII
    )
    table += each(
        "projected_gradient_attack(radius)",
        lambda r: projected_gradient_attack(t, x, labels, r),
        RADII,
    )
    table += each(
        "box_attack(box)",
        lambda box: box_attack(t, x, found, box=box),
        {
            "beside the inputs": ((2.0, 3.0), "box"),
            "upside down": ((1.0, 0.0), "box"),
            "NaN": ((NAN, 1.0), "box"),
        },
    )
    for name, call in {
        "box_attack": lambda it: box_attack(it, x, found),
        "linf_bound": lambda it: linf_bound(it, x, found),
        "write_certificate": lambda it: write_certificate("/tmp/never", it, x, labels, found),
    }.items():
        table += each(f"{name}(another layer)", call, {"other weights": (other, "weights|digest")})
    table += each("margin_spectrum(k)", lambda k: margin_spectrum(t, k), bad_counts(5))
    table += each(
        "proving_metric(k)", lambda k: proving_metric(t, moments, k, steps=1), bad_counts(4)
    )
    table += each(
        "proved_accuracy(k)", lambda k: proved_accuracy(t, x, labels, (k,)), bad_counts(5)
    )
    table += each(
        "proving_metric(steps)",
        lambda n: proving_metric(t, moments, 2, steps=n),
        {"-1": (-1, "steps"), "a fraction": (1.5, "steps")},
    )
    for name, call in {
        "moment_metric": lambda m: moment_metric(t, m),
        "proving_metric": lambda m: proving_metric(t, m, 2, steps=1),
    }.items():
        table += each(
            f"{name}(moments)",
            call,
            {
                "of another width": (InputMoments.of(samples(4, 40)), "width|5|4"),
                "of another space": (
                    InputMoments.of(samples(n=40), space="b"),
                    r"\(b\).*\(inputs\)",
                ),
            },
        )
    shares = {"NaN": (NAN, "ridge"), "negative": (-0.1, "ridge"), "2": (2.0, "ridge")}
    table += each("moment_metric(ridge)", lambda r: moment_metric(t, moments, ridge=r), shares)
    table += each(
        "moment_metric(power)",
        lambda r: moment_metric(t, moments, power=r),
        {k: (v, "power") for k, (v, _) in shares.items()},
    )
    table += each(
        "euclidean_metric(centre)",
        lambda c: euclidean_metric(t, c),
        {"NaN": (with_entry(x[0], 1, NAN), "NaN"), "another width": (x[0, 1:], "shape|width")},
    )
    table += each(
        "margin_spectrum(metric)",
        lambda m: margin_spectrum(t, 2, m),
        {"of another width": (euclidean_metric(random_tensor(4, 6, 4, True)), "width|5|4")},
    )
    t.interaction(torch.eye(4, dtype=F64)).eigh(2)
    table += each(
        "truncation_change(eigen)",
        lambda e: truncation_change(t, e),
        {
            "of another width": (random_tensor(4, 6, 4, True).interaction().eigh(2), "width|5|4"),
        },
    )
    table += each("odt(stack)", odt, {"with biases": (BilinearStack((t,)), "bias")})
    bare = random_tensor(5, 6, 4)
    table += each(
        "BilinearStack",
        lambda layers: BilinearStack(layers),
        {
            "nothing": ((), "at least one layer"),
            "widths that differ": ((bare, random_tensor(5, 6, 4)), "writes 4.*reads 5"),
        },
    )
    table += each(
        "folded(embedding)",
        lambda e: folded(t, e),
        {
            "of another width": (
                (torch.rand(9, 4, dtype=F64), torch.rand(4, dtype=F64)),
                "width|shape|5",
            ),
            "NaN": ((torch.rand(9, 5, dtype=F64) * NAN, torch.rand(5, dtype=F64)), "NaN"),
        },
    )
    table += [
        Case("verify_certificate(no folder)", lambda p: verify_certificate(p / "none"), "none"),
        Case(
            "write_certificate(nothing to claim)",
            lambda p: write_certificate(p / "c", t, x, labels),
            "certificate of nothing",
        ),
        Case(
            "write_certificate(radii)",
            lambda p: write_certificate(p / "c", t, x, labels, found, radii=[NAN]),
            "radi",
        ),
        Case(
            "certify(no images)",
            lambda p: certify(CertifyConfig(data=str(p / "none"), out=p / "o"), progress=False),
            "no such folder of images",
        ),
    ]
    return table
