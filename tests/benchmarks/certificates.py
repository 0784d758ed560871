"""Measures proofs on MNIST: `python -m tests.benchmarks.certificates FOLDER WORK [--parts ...]`.

FOLDER holds the four IDX files. Two classifiers are trained: "embedding", the paper's (size 256, noise
.4, 20 epochs), and "plain", one bilinear layer on pixels (128 neurons, noise .3, 6 epochs). What is
found goes to tests/benchmarks/results/certificates/NAME.json, part by part, with its environment.
WORK keeps the trained weights, so that parts can be measured one at a time.

Times are minima of the repeats in one run; on a loaded machine they are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.benchmarks.__main__ import RESULTS, environment
from tl_bilinear import BilinearTensor
from tl_bilinear.io import load_tensors, save_tensors
from tl_bilinear.recipes.images import ImageData, TrainingConfig, load_images, train_classifier
from tl_bilinear.tensor.attacks import Attack, box_attack, projected_gradient_attack
from tl_bilinear.tensor.certificates import (
    Embedding,
    folded,
    verify_certificate,
    write_certificate,
)
from tl_bilinear.tensor.linf import linf_bound
from tl_bilinear.tensor.margins import (
    InputMetric,
    euclidean_metric,
    margin_spectrum,
    moment_metric,
    proved_accuracy,
    proving_metric,
)
from tl_bilinear.tensor.moments import InputMoments
from tl_bilinear.tensor.robustness import (
    AdversarialDistances,
    adversarial_distances,
    certified_accuracy,
)

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
KEPT = (8, 16, 32, 64)
ATTACKED = 1000
ATTACK = Attack(steps=100, restarts=4)
STEPS = 60

Found = TypeVar("Found")


def embedding_model(data: ImageData) -> tuple[BilinearTensor, Embedding | None, dict[str, Any]]:
    config = TrainingConfig(size=256, noise=0.4, epochs=20, seed=0)
    model = train_classifier(data, config, progress=False).model
    settings = {"size": 256, "noise": 0.4, "epochs": 20, "weight_decay": 1.0, "seed": 0}
    factors = [each.weight.detach().clone() for each in (model.layer.left, model.layer.right)]
    layer = BilinearTensor(*factors, model.layer.out.weight.detach().clone())
    return layer, (model.embed.weight.detach().T.contiguous(), None), settings


def plain_model(data: ImageData) -> tuple[BilinearTensor, Embedding | None, dict[str, Any]]:
    torch.manual_seed(0)
    d, h, epochs, batch = data.pixels, 128, 6, 256
    left, right = nn.Linear(d, h, False), nn.Linear(d, h, False)
    out = nn.Linear(h, len(data.classes), False)
    with torch.no_grad():
        for linear in (left, right, out):
            linear.weight.normal_(0, linear.in_features**-0.5)
    parameters = [left.weight, right.weight, out.weight]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.3)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / epochs)
        for rows in torch.randperm(len(data.train_images)).split(batch):
            x = data.train_images[rows]
            x = x + 0.3 * torch.randn_like(x)
            loss = nn.functional.cross_entropy(out(left(x) * right(x)), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    settings = {"d_hidden": h, "noise": 0.3, "epochs": epochs, "weight_decay": 0.3, "seed": 0}
    factors = [parameter.detach().clone() for parameter in parameters]
    return BilinearTensor(*factors, input_space="pixels"), None, settings


MODELS = {"embedding": embedding_model, "plain": plain_model}


def timed(work: Callable[[], Found], repeats: int = 1) -> tuple[Found, float]:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - start)
    return found, round(best, 2)


def share(holds: Tensor) -> float:
    return round(float(holds.double().mean()), 4)


def quantiles(values: Tensor) -> dict[str, float]:
    points = (0.05, 0.5, 0.95)
    return {f"{p:g}": round(float(values.quantile(p)), 4) for p in points}


@dataclass(frozen=True)
class Case:
    """A trained classifier and the test set."""

    layer: BilinearTensor
    embedding: Embedding | None
    data: ImageData

    @cached_property
    def tensor(self) -> BilinearTensor:
        return folded(self.layer, self.embedding)

    @cached_property
    def inputs(self) -> Tensor:
        return self.data.test_images.double()

    @property
    def labels(self) -> Tensor:
        return self.data.test_labels

    @cached_property
    def few(self) -> tuple[Tensor, Tensor, AdversarialDistances, Tensor]:
        """The first images: inputs, labels, distances, whether the answer is right."""
        x, labels = self.inputs[:ATTACKED], self.labels[:ATTACKED]
        found = adversarial_distances(self.tensor, x)
        return x, labels, found, found.predicted == labels


def distances(case: Case) -> dict[str, Any]:
    """All test images and nine rivals."""
    x, labels, tensor = case.inputs, case.labels, case.tensor
    found, seconds = timed(lambda: adversarial_distances(tensor, x), 3)
    right, step = found.predicted == labels, found.nearest - x
    curve = certified_accuracy(found, labels, RADII)
    same = {
        str(factor): share(tensor(x + factor * step).argmax(1) == found.predicted)
        for factor in (0.999, 1.001)
    }
    return {
        "seconds": seconds,
        "images": len(x),
        "accuracy": share(right),
        "certified accuracy": dict(zip(map(str, RADII), curve.proved.tolist(), strict=True)),
        "radius of right images": quantiles(found.radius[right]),
        "same answer by share of the radius": same,
    }


def attack(case: Case) -> dict[str, Any]:
    """Projected gradients beside the exact distances."""
    x, labels, found, ok = case.few
    radius = found.radius

    def broken(rows: Tensor, size: Any) -> Tensor:
        return projected_gradient_attack(case.tensor, x[rows], labels[rows], size, ATTACK)

    every = torch.ones_like(ok)
    return {
        "what": str(ATTACK),
        "images": ATTACKED,
        "success by share of the exact radius": {
            str(factor): share(broken(ok, factor * radius[ok]))
            for factor in (0.98, 1.001, 1.01, 1.05)
        },
        "accuracy by radius": {
            str(r): {
                "proved": share(ok & (radius > r)),
                "left by the attack": share(~broken(every, r)),
            }
            for r in (0.5, 1.0)
        },
    }


def box(case: Case) -> dict[str, Any]:
    """The distance within [0, 1]: proved below, attained above."""
    x, _, found, ok = case.few
    bounds, seconds = timed(lambda: box_attack(case.tensor, x, found))
    reached = bounds.upper.isfinite()
    return {
        "seconds": seconds,
        "images": ATTACKED,
        "attack succeeds": share(reached),
        "upper over lower": quantiles((bounds.upper / bounds.lower)[reached & ok]),
    }


def linf(case: Case) -> dict[str, Any]:
    """Lower bounds in l-infinity beside an attack."""
    x, labels, found, ok = case.few
    bound, seconds = timed(lambda: linf_bound(case.tensor, x, found))
    signs = Attack(steps=100, restarts=2, norm="linf")
    return {
        "seconds": seconds,
        "images": ATTACKED,
        "lower bound of right images": quantiles(bound[ok]),
        "from the l2 distance alone": quantiles((found.radius / x.shape[1] ** 0.5)[ok]),
        "attack": str(signs),
        "accuracy by radius": {
            str(r): {
                "proved": share(ok & (bound > r)),
                "left by the attack": share(
                    ~projected_gradient_attack(case.tensor, x, labels, r, signs)
                ),
            }
            for r in (0.02, 0.05, 0.1)
        },
    }


def moments(case: Case) -> InputMoments:
    return InputMoments.of(case.data.train_images, population="training images")


def proofs(case: Case) -> dict[str, Any]:
    """Accuracy proved from k eigenpairs a pair of classes, by metric."""
    tensor, found = case.tensor, moments(case)
    pixels = InputMetric(torch.eye(found.d).double(), torch.zeros_like(found.mean), "pixels")
    metrics: dict[str, Callable[[], InputMetric]] = {
        "euclidean, all pixels": lambda: pixels,
        "euclidean, in the span": lambda: euclidean_metric(tensor),
        "euclidean, in the span, centred": lambda: euclidean_metric(tensor, found.mean),
        "data, ridge .3": lambda: moment_metric(tensor, found, power=1.0, ridge=0.3, centred=False),
        "data to the power 1/2": lambda: moment_metric(tensor, found, centred=False),
        "data to the power 1/2, centred": lambda: moment_metric(tensor, found),
    }
    return {title: proved_in(case, make) for title, make in metrics.items()}


def proofs_16(case: Case) -> dict[str, Any]:
    """The same in the metric that is found for k = 16."""
    return proved_in(case, lambda: proving_metric(case.tensor, moments(case), 16, steps=STEPS))


def proofs_32(case: Case) -> dict[str, Any]:
    """The same in the metric that is found for k = 32."""
    return proved_in(case, lambda: proving_metric(case.tensor, moments(case), 32, steps=STEPS))


def proved_in(case: Case, make: Callable[[], InputMetric]) -> dict[str, Any]:
    metric, seconds = timed(make)
    found = proved_accuracy(case.tensor, case.inputs, case.labels, KEPT, metric)
    return {
        "metric": metric.name,
        "metric found in seconds": seconds,
        "proved": dict(zip(map(str, KEPT), found.proved.tolist(), strict=True)),
        "numbers": dict(zip(map(str, KEPT), found.numbers.tolist(), strict=True)),
    }


def certificate(case: Case) -> dict[str, Any]:
    """A certificate of all of it, for the whole test set, checked by the independent checker."""
    metric = moment_metric(case.tensor, moments(case))
    x, labels = case.data.test_images, case.labels
    found = adversarial_distances(case.tensor, x)
    known = margin_spectrum(case.tensor, 32, metric)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "certificate"
        write_certificate(
            path, case.layer, x, labels, found, known, radii=RADII, embedding=case.embedding
        )
        claims, seconds = timed(
            lambda: verify_certificate(path, case.layer, x, labels, embedding=case.embedding)
        )
        return {
            "bytes": path.stat().st_size,
            "checked in seconds": seconds,
            "images": len(x),
            "certified": claims["certified"],
            "proved from 32 pairs": claims["proved"],
            "gap": claims["gap"],
        }


PARTS = {
    part.__name__: part
    for part in (distances, attack, box, linf, proofs, proofs_16, proofs_32, certificate)
}


TITLES = {
    "embedding": "the paper's model (size 256, noise 0.4, 20 epochs)",
    "plain": "one bilinear layer on pixels (128 neurons, noise 0.3)",
}


def table() -> str:
    """The stored results as Markdown."""
    stored = {
        name: json.loads((RESULTS / "certificates" / f"{name}.json").read_text()) for name in TITLES
    }
    certified = [each["distances"]["certified accuracy"] for each in stored.values()]
    attacks = [each["attack"]["accuracy by radius"]["1.0"] for each in stored.values()]
    best = [
        max(part["proved"]["32"] for part in (*_metrics(each["proofs"]), each["proofs_32"]))
        for each in stored.values()
    ]
    rows = {
        "test accuracy": [f"{each['0.0']:.4f}" for each in certified],
        "certified at radius 0.5": [f"{each['0.5']:.4f}" for each in certified],
        "certified at radius 1": [f"{each['1.0']:.4f}" for each in certified],
        "first 1,000 at radius 1: proved / left by the attack": [
            f"{each['proved']:.3f} / {each['left by the attack']:.3f}" for each in attacks
        ],
        "distances to all rivals, one thread": [
            f"{each['distances']['seconds']:.1f} s" for each in stored.values()
        ],
        "certificate checked in": [
            f"{each['certificate']['checked in seconds']:.0f} s" for each in stored.values()
        ],
        "proved from 32 pairs, Euclidean": [
            f"{each['proofs']['euclidean, all pixels']['proved']['32']:.4f}"
            for each in stored.values()
        ],
        "proved from 32 pairs, best metric": [f"{each:.4f}" for each in best],
    }
    head = ["| | " + " | ".join(TITLES.values()) + " |", "| --- | --- | --- |"]
    return "\n".join(head + [f"| {what} | {' | '.join(values)} |" for what, values in rows.items()])


def _metrics(proofs: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in proofs.values() if "proved" in part]


def trained(name: str, data: ImageData, work: Path) -> tuple[Case, dict[str, Any]]:
    """The classifier, from `work` where it has been trained already."""
    path = work / f"{name}.safetensors"
    if not path.is_file():
        layer, embedding, settings = MODELS[name](data)
        factors = {"left": layer.left, "right": layer.right, "out": layer.out}
        if embedding is not None:
            factors["directions"] = embedding[0]
        work.mkdir(parents=True, exist_ok=True)
        save_tensors(path, factors, {"settings": settings})
    factors, header = load_tensors(path)
    layer = BilinearTensor(factors["left"], factors["right"], factors["out"])
    embedding = (factors["directions"], None) if "directions" in factors else None
    return Case(layer, embedding, data), header["settings"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.certificates", description=__doc__
    )
    parser.add_argument("folder", help="of MNIST's four IDX files")
    parser.add_argument("work", type=Path, help="where the trained weights are kept")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    data = load_images(options.folder)
    for name in options.models:
        case, settings = trained(name, data, options.work)
        path = RESULTS / "certificates" / f"{name}.json"
        result = json.loads(path.read_text()) if path.is_file() else {}
        result |= {"model": name, "settings": settings}
        weights = [case.layer.left, case.layer.right, case.layer.out]
        weights += [] if case.embedding is None else [case.embedding[0]]
        result["numbers in the model"] = sum(each.numel() for each in weights)
        for part in options.parts:
            result[part] = PARTS[part](case) | {"environment": environment()}
            print(f"{name}, {part}: {result[part]}", flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
