"""Measures what methods cost: `python -m tests.benchmarks.costs [PART ...] [--page]`.

Each part goes to tests/benchmarks/results/costs/PART.json with its environment; `--page` writes the
tables of demos/docs/costs.md and its plot from what is stored. One thread. All sides of a row run in
turn in this process and the minimum of the repeats counts, in CPU seconds, which a busy machine
lengthens less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.__main__ import RESULTS, environment
from tests.benchmarks.layers import directions, layer_like_trained
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor import eigensolvers, hosvd, spectrum
from tl_bilinear.tensor.estimates import expected_seconds, flops_per_second

FOLDER = RESULTS / "costs"
PAGE = Path(__file__).parents[2] / "demos" / "docs" / "costs.md"
PICTURE = PAGE.parent / "pictures" / "costs.svg"

Side = Callable[[], Any]
Row = dict[str, Any]


def timed(sides: dict[str, Side], repeats: int, patience: float = 20.0) -> dict[str, float]:
    """CPU seconds of each side: the least of the repeats, which end when patience does."""
    best = dict.fromkeys(sides, math.inf)
    begin = time.perf_counter()
    for repeat in range(repeats):
        for name, side in sides.items():
            start = time.process_time()
            side()
            best[name] = min(best[name], time.process_time() - start)
        if repeat and time.perf_counter() - begin > patience:
            break
    return best


def formed(tensor: BilinearTensor, dirs: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """What one writes without this package: form Q, torch.linalg.eigh, take the k largest."""
    half = (tensor.left.T * (dirs @ tensor.out)[:, None, :]) @ tensor.right
    values, vectors = torch.linalg.eigh((half + half.mT) / 2)
    order = values.abs().argsort(-1, descending=True)[:, :k]
    rows = order[..., None].expand(-1, -1, tensor.d_in)
    return values.gather(-1, order), vectors.mT.gather(1, rows)


# ---------------------------------------------------------------------- parts


def small() -> Iterator[Row]:
    """Small matrices, beside torch.linalg.eigh on the formed matrix."""
    for d in (16, 64, 128, 256):
        tensor = layer_like_trained(d, 4 * d, d)
        for n in (1, 10, 100):
            dirs = directions(n, d)
            for k in (10, None):
                sides: dict[str, Side] = {
                    "ours": lambda t=tensor, u=dirs, k=k: t.interaction(u).eigh(k),
                    "formed": lambda t=tensor, u=dirs, k=k: formed(t, u, k),
                }
                best = timed(sides, 300, 1.5)
                ratio = round(best["ours"] / best["formed"], 2)
                method = tensor.interaction(dirs).eigh(k).method.split(",")[0]
                yield {"d": d, "n": n, "k": k or d, "method": method, **_ms(best), "ratio": ratio}


def few() -> Iterator[Row]:
    """Top 10, milliseconds a direction by width, and what else there is for it."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    for d in (128, 256, 512, 1024):
        tensor, n, k = layer_like_trained(d, 4 * d, d), 64, 10
        dirs = directions(n, d)
        Q = tensor.interaction(dirs)
        left, right, weights = (part.numpy() for part in (Q.left, Q.right, Q.weights))

        def scipys(left: Any = left, right: Any = right, p: Any = weights[0], d: int = d) -> None:
            def apply(x: Any) -> Any:
                return (left.T @ (p * (right @ x)) + right.T @ (p * (left @ x))) / 2

            operator = LinearOperator((d, d), matvec=apply, dtype=np.float32)
            eigsh(operator, k=10, which="LM", tol=1e-5)

        def lobpcg(Q: Any = Q[0], d: int = d) -> None:
            # Of one end only: the positive eigenvalues.
            torch.manual_seed(0)
            torch.lobpcg(Q.dense(), k=10, niter=100, tol=1e-5)

        sides: dict[str, tuple[Side, int]] = {
            "auto": (lambda Q=Q: Q.eigh(10), n),
            "krylov": (lambda Q=Q: Q.eigh(10, method="krylov"), n),
            "dense": (lambda Q=Q: Q[:4].eigh(10, method="dense"), 4),
            "formed": (lambda t=tensor, u=dirs: formed(t, u[:4], 10), 4),
            "eigsh": (scipys, 1),
            "lobpcg": (lobpcg, 1),
        }
        if d < 256:
            del sides["krylov"]
        best = timed({name: side for name, (side, _) in sides.items()}, 3, 30.0)
        each = {name: round(1e3 * best[name] / count, 3) for name, (_, count) in sides.items()}
        flops = {
            name: eigensolvers.flops(name, d, 4 * d, k, n)  # type: ignore[arg-type]
            for name in ("krylov", "dense")
        }
        yield {"d": d, "h": 4 * d, "k": k, "n": n, "ms": each, "flops": flops}


def whole() -> Iterator[Row]:
    """A slice of a model's dictionary: 256 directions of one layer, d=1024, h=4096."""
    d, h, n = 1024, 4096, 256
    for setting in ("random directions", "families of directions"):
        for k, tol in ((10, None), (3, None), (3, 1e-2)):
            tensor = layer_like_trained(d, h, d)
            dirs = directions(n, d) if setting.startswith("random") else families(n, d)
            Q = tensor.interaction(dirs)
            flops_per_second.cache_clear()
            best = timed(
                {
                    "eigh": lambda Q=Q, k=k, tol=tol: Q.eigh(k, tol=tol),
                    "spectrum": lambda t=tensor, u=dirs, k=k, tol=tol: spectrum(
                        t, u, k, tol=tol, progress=False
                    ),
                    "norms": lambda Q=Q: (Q.frobenius_norm(), Q.trace()),
                },
                1,
            )
            ms = {name: round(1e3 * seconds / n, 2) for name, seconds in best.items()}
            flops = n * eigensolvers.flops("auto", d, h, k, n)
            foreseen = expected_seconds(flops, tensor.device)
            # Norms cost one Gram a layer, whatever the number of its directions (8,192 of them).
            one = ms["spectrum"] - ms["norms"] * (1 - n / 8192)
            yield {
                "setting": setting,
                "k": k,
                "tol": tol or 1e-5,
                "ms": ms,
                "ms of 8,192 a layer": round(one, 2),
                "minutes of two cores for 131,072": round(131_072 * one / 1e3 / 60 / 2, 1),
                "GFLOP/s of a product": round(flops_per_second(tensor.device) / 1e9, 1),
                "expected over taken": round(foreseen / best["eigh"], 2),
            }


def families(n: int, d: int, seed: int = 5) -> Tensor:
    """Unit rows that come in families, as an SAE's do: eight around each of n / 8 directions."""
    rows = directions(n // 8, d, seed=seed).repeat_interleave(8, 0)
    rows = rows + 0.8 * directions(n, d, seed=seed + 1)
    return rows / rows.norm(dim=1, keepdim=True)


def sweep() -> Iterator[Row]:
    """A slice of features.sweep(k=2): 16 of 8,192 features, d=1024, h=4096; its pairs alone."""
    from tl_bilinear.features import feature_sweep

    d, h, features, m = 1024, 4096, 8192, 16
    index = torch.arange(m)
    for setting in ("random", "trained"):
        if setting == "random":
            drawn = torch.Generator().manual_seed(0)
            shapes = ((h, d), (h, d), (d, h))
            tensor = BilinearTensor(*(torch.randn(*s, generator=drawn) / 32 for s in shapes))
            inputs = directions(features, d, seed=3)
        else:  # a dictionary of the layer's inputs: families, and their scale
            tensor = layer_like_trained(d, h, d)
            _, scale, basis = torch.linalg.svd(tensor.left, full_matrices=False)
            inputs = families(features, d) * scale @ basis
            inputs = inputs / inputs.norm(dim=1, keepdim=True)
        outputs = directions(features, d, seed=7)
        one = tensor.interaction(outputs[0])

        def dense(one: Any = one, inputs: Tensor = inputs) -> Tensor:
            through = inputs @ one.dense()
            found = []
            for start in range(0, len(inputs), 1024):
                block = (through[start : start + 1024] @ inputs[start:].T).abs_().triu_(1)
                found.append(block.amax())
            return torch.stack(found).amax()

        best = timed(
            {
                "sweep": lambda t=tensor, u=outputs, x=inputs: feature_sweep.feature_sweep(
                    *(t, u, x, x, index, 2),
                    screen=None,
                    checkpoint=None,
                    max_bytes=2**30,
                    progress=False,
                ),
                "spectra": lambda t=tensor, u=outputs: t.interaction(u[:m]).eigh(2),
                "a batch of spectra": lambda t=tensor, u=outputs: t.interaction(u[:64]).eigh(2),
                "norms": lambda t=tensor, u=outputs: t.interaction(u[:m]).frobenius_norm(),
            },
            1,
        )
        best |= timed(
            {
                "pair": lambda one=one, x=inputs: one.top(1, kind="cross", directions=x),
                "dense pair": dense,
            },
            5,
            60.0,
        )
        # Norms are one Gram for all 8,192, and spectra share their products in batches, of 256 there.
        each = (best["sweep"] - best["norms"] - best["spectra"]) / m
        each += best["a batch of spectra"] / 64
        yield {
            "setting": setting,
            "seconds a feature": round(each, 3),
            "hours of one core for 8,192": round(8192 * each / 3600, 2),
            "share of strongest pairs": round(m * best["pair"] / (each * m), 2),
            "pair over dense": round(best["pair"] / best["dense pair"], 2),
        }


def interventions() -> Iterator[Row]:
    """Calls that run the model, on the model that ships, beside runs from the first block on."""
    from tl_bilinear import FeatureInteractions
    from tl_bilinear.circuits import check_paths, paths
    from tl_bilinear.demo import load_demo_model, load_demo_saes, load_demo_tokens
    from tl_bilinear.features import verification
    from tl_bilinear.hooks import EigenComponents, effects, verify

    model, tokens = load_demo_model(), load_demo_tokens()[:16]
    text = tokens[0]
    found = paths(model, text, -1, torch.randn(192, generator=torch.Generator().manual_seed(0)))
    every = timed(
        {"ours": lambda: check_paths(model, text, found, len(found.labels), progress=False)}, 2
    )
    yield {
        "call": f"check_paths, all {len(found.labels):,} components of {len(text)} tokens",
        "seconds": round(every["ours"], 2),
    }

    @contextmanager
    def from_the_start() -> Iterator[None]:
        kept = effects.starts_at_blocks, verification.starts_at_blocks
        effects.starts_at_blocks = verification.starts_at_blocks = lambda model: False
        try:
            yield
        finally:
            effects.starts_at_blocks, verification.starts_at_blocks = kept

    def both(call: Side) -> dict[str, float]:
        def before() -> None:
            with from_the_start():
                call()

        return timed({"ours": call, "from the start": before}, 3)

    for layer in (2, 3):
        u = torch.randn(192, generator=torch.Generator().manual_seed(1))
        eigen = BilinearTensor.from_model(model, layer).interaction(u).eigh(5)
        parts = EigenComponents(eigen, layer=layer)
        best = both(lambda parts=parts: verify(model, tokens, parts, progress=False))
        yield {"call": f"verify, 5 eigenvectors of layer {layer} of 4", **_ratio(best)}
    saes = load_demo_saes(3)
    features = FeatureInteractions(model, 3, saes["resid_mid"], saes["mlp_out"])
    run = features.run(tokens, progress=False)
    busiest = int((run.activations()[run.mask] > 0).sum(0).argmax())
    best = both(lambda: run.verify_pairs(busiest, 5, progress=False))
    yield {"call": "verify_pairs, 5 pairs", **_ratio(best)}


def start() -> Iterator[Row]:
    """Fresh processes: importing, the command's help, the first model."""
    model = "n_layers=2, d_model=64, n_ctx=64, d_head=16, d_vocab=100"
    programs = {
        "import tl_bilinear, torch imported": ("import torch", "import tl_bilinear"),
        "`tl-bilinear --help`": ("", "import tl_bilinear.cli as c; c.main(['--help'])"),
        "first from_config": (
            "import torch",
            "from tl_bilinear import HookedTransformer as H; "
            f"H.from_config(bilinear=True, {model})",
        ),
        "TransformerLens's first model": (
            "import torch",
            "from transformer_lens import HookedTransformer as H, HookedTransformerConfig as C; "
            f"H(C({model}, act_fn='relu'))",
        ),
    }
    best = dict.fromkeys(programs, math.inf)
    for _ in range(3):
        for name, (before, program) in programs.items():
            code = (
                f"import time\n{before}\ns = time.process_time()\n{program}\n"
                "print('\\nCPU', time.process_time() - s)"
            )
            output = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
            best[name] = min(best[name], float(output.split()[-1]))
    for name, seconds in best.items():
        yield {"what": name, "seconds": round(seconds, 2)}


def processing() -> Iterator[Row]:
    """process_weights_ of a model of 16 layers, d = 1024, in fresh processes: peak memory."""
    program = """
import json, sys, time, torch, tl_bilinear
from tests.benchmarks.__main__ import peak_memory
from transformer_lens import HookedTransformer

torch.set_num_threads(1)
model = HookedTransformer.from_config(
    bilinear=True, n_layers=16, d_model=1024, d_head=64, d_mlp=4096, n_ctx=256, d_vocab=32000,
    normalization_type="LN", device="cpu", init_weights=False)
for parameter in model.parameters():
    parameter.data.normal_(0, 0.02)
size = sum(p.numel() * p.element_size() for p in model.parameters())
whose = {"ours": type(model), "TransformerLens": HookedTransformer}[sys.argv[1]]
start = time.process_time()
whose.load_and_process_state_dict(model, model.state_dict())
print(json.dumps([size, peak_memory(), time.process_time() - start]))
"""
    for name in ("ours", "TransformerLens"):
        command = [sys.executable, "-c", program, name]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        size, peak, seconds = json.loads(found.splitlines()[-1])
        yield {
            "by": name,
            "model, GB": round(size / 1e9, 2),
            "peak of the process, GB": round(peak / 1e9, 2),
            "times the model": round(peak / size, 2),
            "seconds": round(seconds, 1),
        }


_KINDS = {
    "products": ("mm", "bmm", "addmm", "baddbmm"),
    "attention": ("scaled_dot_product",),
    "softmax and loss": ("log_softmax", "nll_loss", "exp_", "amax", "sub"),
    "random numbers": ("normal_", "randperm", "bernoulli_", "exponential_", "uniform_"),
    "copies": ("index_select", "copy_", "cat", "fill_", "embedding"),
    "optimiser": ("fused_adam", "Optimizer", "foreach"),
}


def training() -> Iterator[Row]:
    """Shares of CPU time while recipes train, by torch.profiler, one thread, in percent."""
    from torch.profiler import ProfilerActivity, profile

    from tests.benchmarks.training import random_data
    from tl_bilinear.recipes.images import ImageData
    from tl_bilinear.recipes.images.training import TrainingConfig, train_classifier
    from tl_bilinear.recipes.language import CONFIGS, train_language_model

    drawn = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (20_000,), generator=drawn)
    pictures = torch.rand(20_000, 784, generator=drawn)
    test, names = (pictures[:2000], labels[:2000]), tuple("0123456789")
    images = ImageData(pictures, labels, *test, (28, 28), names, "random pixels")
    rows = random_data(rows=64, vocabulary=4096)

    def language(name: str) -> Side:
        config = replace(CONFIGS[name], steps=20, batch=8)

        def train() -> None:
            with tempfile.TemporaryDirectory() as folder:
                train_language_model(
                    rows, config, folder=f"{folder}/run", device="cpu", progress=False
                )

        return train

    recipes: dict[str, Side] = {
        "images, size 256, batch 2,048": lambda: train_classifier(
            images, TrainingConfig(epochs=3), progress=False
        ),
        **{f"train lm {name}, 4,096 tokens": language(name) for name in ("nano", "small")},
    }
    for name, train in recipes.items():
        train()
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            train()
        spent = dict.fromkeys([*_KINDS, "the rest"], 0.0)
        for event in watched.key_averages():
            found = event.key.removeprefix("aten::").lstrip("_")
            kinds = (k for k, names in _KINDS.items() if found.startswith(names))
            spent[next(kinds, "the rest")] += event.self_cpu_time_total
        whole = sum(spent.values())
        shares = {kind: round(100 * t / whole, 1) for kind, t in spent.items()}
        size = name.split()[2].rstrip(",") if name.startswith("train lm") else None
        yield {"recipe": name, **shares, **(_compiled(rows, size) if size else {})}


def _compiled(rows: Any, size: str) -> Row:
    """What torch.compile gains in a step of a language model, and what compiling takes."""
    from torch._inductor import config as inductor

    from tl_bilinear.recipes.language import CONFIGS
    from tl_bilinear.recipes.language.train import build_language_model

    model = build_language_model(CONFIGS[size], rows.tokenizer, rows.n_ctx)
    tokens = torch.tensor(rows.train["input_ids"][:8])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(forward: Any) -> None:
        forward(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(model)
    start = time.perf_counter()
    with inductor.patch(force_disable_caches=True):  # an earlier run's would be found on the disk
        step(compiled)
    seconds = time.perf_counter() - start
    best = timed({"eager": lambda: step(model), "compiled": lambda: step(compiled)}, 5, 60.0)
    gain = round(best["eager"] / best["compiled"], 2)
    return {"eager over compiled": gain, "compiling, s": round(seconds)}


def growth() -> Iterator[Row]:
    """Seconds of other methods by width, h = 4 d."""
    for d in (64, 128, 256, 512):
        tensor = layer_like_trained(d, 4 * d, d)
        dirs = directions(256, d)
        inputs = directions(4096, d, seed=2)
        sides: dict[str, Side] = {
            "norms of 256 directions": lambda t=tensor, u=dirs: t.interaction(u).frobenius_norm(),
            "HOSVD, top 16": lambda t=tensor: hosvd(t, 16),
            "all eigenpairs of 1 direction": lambda t=tensor, u=dirs: t.interaction(u[0]).eigh(),
            "strongest pair of 4,096 inputs": lambda t=tensor, u=dirs, x=inputs: t.interaction(
                u[0]
            ).top(1, kind="cross", directions=x),
        }
        best = timed(sides, 5, 8.0)
        yield {"d": d, "seconds": {name: float(f"{s:.3g}") for name, s in best.items()}}


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    part.__name__: part
    for part in (small, few, whole, sweep, interventions, start, processing, training, growth)
}


def _ms(best: dict[str, float]) -> dict[str, float]:
    return {f"{name} ms": float(f"{1e3 * seconds:.3g}") for name, seconds in best.items()}


def _ratio(best: dict[str, float]) -> Row:
    ratio = best["from the start"] / best["ours"]
    return {"seconds": round(best["ours"], 2), "times faster": float(f"{ratio:.2g}")}


def exponent(widths: list[int], values: list[float]) -> float:
    """The power of the width with which a cost grows: the slope of its logarithms."""
    x, y = torch.tensor(widths).double().log(), torch.tensor(values).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def stored(part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{part}.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.costs", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--page", action="store_true", help="tables and plot from what is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in options.parts:
        rows = []
        for row in PARTS[name]():
            print(row, flush=True)
            rows.append(row)
        result = {"part": name, "title": PARTS[name].__doc__, "rows": rows}
        result["environment"] = {**environment(), "load": _load()}
        (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        from tests.benchmarks import costs_page

        costs_page.write()


def _load() -> str:
    load = Path("/proc/loadavg")
    return load.read_text().split()[0] if load.is_file() else "unknown"


if __name__ == "__main__":
    main()
