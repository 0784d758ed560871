"""What is measured: for each case the work by this package, and the dense way beside it where it fits.

A side is a function of nothing that returns a dict of what it found; building the layer is not timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.layers import (
    attention_head,
    directions,
    layer_like_trained,
    trained_dictionary,
)
from tl_bilinear import BilinearTensor
from tl_bilinear.recipes.images import (
    ImageClassifier,
    ImageData,
    TrainingConfig,
    load_images,
    train_classifier,
    train_classifiers,
)
from tl_bilinear.recipes.images.training import accuracy
from tl_bilinear.tensor import cp, hosvd

Side = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    `build` returns the sides by name, "ours" first; `sampled` says of how many directions the dense side
    does only a share, whose time is scaled up (by that factor) because all of it would take minutes.
    """

    name: str
    title: str
    asked: str
    build: Callable[[], dict[str, Side]]
    compare: Callable[[dict[str, Any], dict[str, Any]], dict[str, float]] | None = None
    repeats: int = 3
    scaled: float = 1.0


def dense_eigh(tensor: BilinearTensor, dirs: Tensor, k: int) -> dict[str, Any]:
    """What a notebook does: form Q, symmetrise, torch.linalg.eigh, take the k largest."""
    values = []
    for u in dirs:
        half = (tensor.left.T * (u @ tensor.out)) @ tensor.right
        found, _ = torch.linalg.eigh((half + half.T) / 2)
        values.append(found[found.abs().argsort(descending=True)[:k]])
    return {"values": torch.stack(values)}


def eigen_sides(d: int, h: int, n: int, sample: int | None) -> dict[str, Side]:
    tensor, dirs = layer_like_trained(d, h, d), directions(n, d)

    def ours() -> dict[str, Any]:
        found = tensor.interaction(dirs).eigh(10, method="krylov")
        scale = found.values.abs().amax(-1, keepdim=True)
        return {
            "values": found.values,
            "method": found.method,
            "largest relative residual": float((found.residuals / scale).max()),
            "largest bound / lambda_1": float((found.bound[:, None] / scale).max()),
        }

    sides: dict[str, Side] = {"ours": ours}
    if sample:
        sides["dense"] = lambda: dense_eigh(tensor, dirs[:sample], 10)
    return sides


def eigen_errors(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    exact = dense["values"]
    found = ours["values"][: len(exact)]
    return {"error / lambda_1": float(((found - exact).abs() / exact[:, :1].abs()).max())}


def hosvd_sides(d: int, h: int, k: int | None, dense: bool) -> dict[str, Side]:
    tensor = layer_like_trained(d, h, d)

    def ours() -> dict[str, Any]:
        found = hosvd(tensor, k)
        return {
            "values": found.values,
            "floor": found.floor,
            "explained": float(found.explained[-1]),
        }

    def formed() -> dict[str, Any]:
        one_sided = (tensor.left.T[None] * tensor.out[:, None, :]) @ tensor.right
        flat = ((one_sided + one_sided.mT) / 2).flatten(1)
        return {"values": torch.linalg.svd(flat, full_matrices=False).S}

    return {"ours": ours, "dense": formed} if dense else {"ours": ours}


def hosvd_errors(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    difference = (ours["values"] - dense["values"]).abs()
    return {"error / sigma_1": float(difference.max() / dense["values"].max())}


def cp_sides(d: int, h: int, rank: int) -> dict[str, Side]:
    tensor = layer_like_trained(d, h, d)

    def ours() -> dict[str, Any]:
        found = cp(tensor, rank, restarts=1)
        return {"relative error": found.relative_error, "steps": found.steps}

    def parafac() -> dict[str, Any]:
        import tensorly
        from tensorly.decomposition import parafac as decompose

        tensorly.set_backend("pytorch")
        dense = tensor.dense()
        found = decompose(dense, rank, init="random", random_state=0)
        rest = dense - tensorly.cp_to_tensor(found)
        return {"relative error": float(rest.norm() / dense.norm())}

    return {"ours": ours, "dense": parafac}


def cp_errors(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    return {"relative error": ours["relative error"], "parafac's": dense["relative error"]}


def norm_sides(d: int, h: int, n: int, sample: int) -> dict[str, Side]:
    tensor, dirs = layer_like_trained(d, h, d), directions(n, d)

    def through_eigenvalues() -> dict[str, Any]:
        norms = []
        for u in dirs[:sample]:
            half = (tensor.left.T * (u @ tensor.out)) @ tensor.right
            norms.append(torch.linalg.eigvalsh((half + half.T) / 2).norm())
        return {"values": torch.stack(norms)}

    return {
        "ours": lambda: {"values": tensor.interaction(dirs).frobenius_norm()},
        "dense": through_eigenvalues,
    }


def norm_errors(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    exact = dense["values"]
    return {"relative error": float(((ours["values"][: len(exact)] - exact) / exact).abs().max())}


def training_sides(
    steps: int, precision: str, batch: int, vocabulary: int, **sizes: Any
) -> dict[str, Side]:
    """The recipe for language models beside a plain loop over the same HookedTransformer.

    The text is one batch of rows, so that both see the same rows at every step. The recipe's side is
    all of it: checkpoints, evaluations, the final measurement and a sample.
    """
    from tests.benchmarks.training import plain_loop, random_data
    from tl_bilinear.recipes.language import LanguageConfig, train_language_model

    data = random_data(rows=batch, vocabulary=vocabulary)
    config = LanguageConfig(batch=batch, steps=steps, **sizes)

    def ours() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            run = train_language_model(
                data,
                config,
                folder=f"{folder}/run",
                precision=precision,
                device="cpu",
                progress=False,
            )
        curve = run.to_pandas()["loss"]
        return {"loss": float(curve.iloc[-1]), "tokens a second": run.tokens_per_second}

    return {"ours": ours, "dense": lambda: plain_loop(data, config)}


def training_errors(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    names = ("tokens a second", "loss")
    return {
        **{name: ours[name] for name in names},
        **{f"plain loop's {name}": dense[name] for name in names},
    }


def training_difference(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    return {"loss": abs(ours["loss"] - dense["loss"]) / dense["loss"]}


def pair_sides(k: int) -> dict[str, Side]:
    tensor, decoder = trained_dictionary()
    Q = tensor.interaction(directions(1, tensor.d_out)[0])

    def ours() -> dict[str, Any]:
        found = Q.top(k, directions=decoder)
        return {"values": found.coefficients.abs(), "pairs": found.first * 2**20 + found.second}

    def dense() -> dict[str, Any]:
        # In blocks of rows: the whole product would be 4.3 GB, and topk of it three times that.
        through = decoder @ Q.dense()
        values, pairs = [], []
        for start in range(0, len(decoder), 2048):
            block = (through[start : start + 2048] @ decoder.T).abs_().mul_(2).triu_(start)
            block.diagonal(start).div_(2)
            best = block.flatten().topk(k)
            values.append(best.values)
            row, column = best.indices // len(decoder) + start, best.indices % len(decoder)
            pairs.append(row * 2**20 + column)
        best = torch.cat(values).topk(k)
        return {"values": best.values, "pairs": torch.cat(pairs)[best.indices]}

    return {"ours": ours, "dense": dense}


def pair_errors(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    difference = (ours["values"] - dense["values"]).abs().max() / dense["values"].max()
    same = set(ours["pairs"].tolist()) & set(dense["pairs"].tolist())
    return {"error": float(difference), "pairs in common": len(same)}


def attention_sides(d: int, d_head: int, n: int, k: int, alike: bool) -> dict[str, Side]:
    form, query, key = attention_head(d, d_head, n, alike=alike)
    matrix = form.matrix()

    def ours() -> dict[str, Any]:
        found = matrix.top(k, left=query, right=key)
        return {"values": found.coefficients.abs(), "pairs": found.first * 2**20 + found.second}

    def strongest(rows: Tensor, columns: Tensor) -> dict[str, Any]:
        # In blocks of rows: the whole product would be 1 GB, and topk of it three times that.
        values, pairs = [], []
        for start in range(0, n, 2048):
            best = (rows[start : start + 2048] @ columns.T).abs_().flatten().topk(k)
            values.append(best.values)
            row, column = best.indices // n + start, best.indices % n
            pairs.append(row * 2**20 + column)
        best = torch.cat(values).topk(k)
        return {"values": best.values, "pairs": torch.cat(pairs)[best.indices]}

    return {
        "ours": ours,
        "dense": lambda: strongest(query @ matrix.dense(), key),
        # What a careful notebook does: d_head products a pair, not d_model.
        "queries and keys": lambda: strongest(
            (query @ form.left.T) * matrix.weights, key @ form.right.T
        ),
    }


SHARED = Path(__file__).parents[3] / "shared" / "data"


def image_sides(data: ImageData, config: TrainingConfig) -> dict[str, Side]:
    def ours() -> dict[str, Any]:
        return {"accuracy": train_classifier(data, config, progress=False).accuracy}

    def loop() -> dict[str, Any]:
        """What a notebook does: a DataLoader, fresh noise, torch's AdamW, a test each epoch."""
        torch.manual_seed(config.seed)
        model = ImageClassifier(data.pixels, len(data.classes), config.size)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
        pairs = TensorDataset(data.train_images, data.train_labels)
        loader = DataLoader(pairs, batch_size=config.batch, shuffle=True)
        reached = []
        for _ in range(config.epochs):
            for images, labels in loader:
                logits = model(images + config.noise * torch.randn_like(images))
                loss = torch.nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            reached.append(accuracy(model, data.test_images, data.test_labels))
        return {"accuracy": reached[-1]}

    return {"ours": ours, "dense": loop}


def seeds_sides(data: ImageData, config: TrainingConfig, seeds: int) -> dict[str, Side]:
    configs = [replace(config, seed=seed) for seed in range(seeds)]

    def together() -> dict[str, Any]:
        results = train_classifiers(data, configs, progress=False)
        return {"accuracy": sum(result.accuracy for result in results) / seeds}

    def one_by_one() -> dict[str, Any]:
        results = [train_classifier(data, each, progress=False) for each in configs]
        return {"accuracy": sum(result.accuracy for result in results) / seeds}

    return {"ours": together, "dense": one_by_one}


def image_accuracies(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    return {"accuracy": ours["accuracy"], "the loop's": dense["accuracy"]}


CASES = [
    Case(
        "eigen-1024",
        "top 10 of 64 directions, d=1024, h=4096",
        "4x, error <= 1e-5",
        lambda: eigen_sides(1024, 4096, 64, 64),
        eigen_errors,
    ),
    Case(
        "eigen-2048",
        "top 10 of 16 directions, d=2048, h=8192",
        "6x, error <= 1e-5",
        lambda: eigen_sides(2048, 8192, 16, 16),
        eigen_errors,
        repeats=2,
    ),
    Case(
        "eigen-4096",
        "top 10 of 4 directions, d=4096, h=14336",
        "finishes, under 16 GB",
        lambda: eigen_sides(4096, 14336, 4, None),
        repeats=1,
    ),
    Case(
        "hosvd-512",
        "HOSVD, d=512, h=2048",
        "15x, a fifth of the memory, error <= 1e-5",
        lambda: hosvd_sides(512, 2048, None, dense=True),
        hosvd_errors,
        repeats=2,
    ),
    Case(
        "hosvd-1024",
        "HOSVD, d=1024, h=4096",
        "under 10 s and 2 GB",
        lambda: hosvd_sides(1024, 4096, None, dense=False),
        repeats=2,
    ),
    Case(
        "hosvd-4096",
        "HOSVD top 32, d=4096, h=14336",
        "finishes, under 16 GB",
        lambda: hosvd_sides(4096, 14336, 32, dense=False),
        repeats=1,
    ),
    Case(
        "cp-512",
        "CP rank 32, d=512, h=2048; beside tensorly's parafac",
        "50x, fit no worse",
        lambda: cp_sides(512, 2048, 32),
        cp_errors,
        repeats=1,
    ),
    Case(
        "pairs-512",
        "100 strongest pairs of 32,768 trained features, d=512",
        "5x, the same pairs, under 1 GB",
        lambda: pair_sides(100),
        pair_errors,
    ),
    Case(
        "attention-768",
        "100 strongest of 16,384 x 16,384 feature pairs of a head, d=768, d_head=64",
        "10x, the same pairs, under 1 GB",
        lambda: attention_sides(768, 64, 16384, 100, alike=True),
        pair_errors,
        repeats=2,
    ),
    Case(
        "attention-random",
        "the same of random dictionaries, where no pair can be left out",
        "runs",
        lambda: attention_sides(768, 64, 16384, 100, alike=False),
        pair_errors,
        repeats=2,
    ),
    Case(
        "norms-1024",
        "Frobenius norms of 16,384 directions, d=1024, h=4096",
        "100x",
        lambda: norm_sides(1024, 4096, 16384, 64),
        norm_errors,
        repeats=2,
        scaled=16384 / 64,
    ),
    Case(
        "images-mnist",
        "60,000 MNIST images, size 256, 20 epochs; beside a DataLoader loop",
        "2x",
        lambda: image_sides(load_images(SHARED / "mnist"), TrainingConfig()),
        image_accuracies,
        repeats=2,
    ),
    Case(
        "images-seeds",
        "10 seeds at once, 4,000 images, size 64; beside one by one",
        "faster",
        lambda: seeds_sides(load_images(), TrainingConfig(size=64, batch=256, epochs=10), 10),
        image_accuracies,
    ),
    Case(
        "training-128",
        "training, d=128, 4 layers, V=2048, bf16 products; beside a loop over HookedTransformer",
        "1.8x",
        lambda: training_sides(
            *(100, "auto", 16, 2048), n_layers=4, d_model=128, d_mlp=512, n_heads=4
        ),
        training_errors,
        repeats=2,
    ),
]

QUICK = [
    Case(
        "eigen-256",
        "top 5 of 16 directions, d=256, h=1024",
        "runs",
        lambda: eigen_sides(256, 1024, 16, 16),
        eigen_errors,
        repeats=1,
    ),
    Case(
        "hosvd-64",
        "HOSVD, d=64, h=256",
        "runs",
        lambda: hosvd_sides(64, 256, None, dense=True),
        hosvd_errors,
        repeats=1,
    ),
    Case(
        "norms-128",
        "Frobenius norms of 256 directions, d=128, h=512",
        "runs",
        lambda: norm_sides(128, 512, 256, 16),
        norm_errors,
        repeats=1,
        scaled=16,
    ),
    Case(
        "training-16",
        "training a language model, d=16, 1 layer, V=180",
        "runs",
        lambda: training_sides(*(4, "fp32", 4, 180), n_layers=1, d_model=16, d_mlp=32, n_heads=2),
        training_difference,
        repeats=1,
    ),
]
