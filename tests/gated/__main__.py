"""How far gated models can be read as bilinear ones, measured: ``python -m tests.gated``.

    python -m tests.gated model NAME FOLDER DATA [--plant]   # of a Llama and its `tl-bilinear data`
    python -m tests.gated costs                              # seconds and bytes of one layer
    python -m tests.gated table                              # the tables of demos/docs/swiglu.md

Each writes its part of results.json beside this file. Layers are fitted on the first rows of training
text, and all numbers are of the first rows of the validation text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F

from tests.gated.planting import plant
from tests.gated.tables import RESULTS, tables

FIT, SCORE = 120, 40  # rows
STEPS, BATCH = 200, 8  # of the repair
COSTS = (
    (576, 1536, 10_000, "neuron", 0),
    (576, 1536, 10_000, "refit", 0),
    (576, 1536, 10_000, "refit", 1536),
    (4096, 14336, 1_000, "neuron", 0),
)


def store(part, name, value):
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found.setdefault(part, {})[name] = value
    found["environment"] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def rounded(value):
    return round(float(value), 4)


def measure(name, folder, data, planted):
    from transformers import LlamaForCausalLM

    from tl_bilinear.hooks import leave_out, loss_added, with_loss_added
    from tl_bilinear.models.approximation import Replacement, approximate_llama, fidelity_table
    from tl_bilinear.models.repair import repair
    from tl_bilinear.recipes.language import LanguageData

    llama = LlamaForCausalLM.from_pretrained(folder).eval()
    text = LanguageData.load(data)
    rows = torch.tensor(text.train[:FIT]["input_ids"]).long()
    held_out = torch.tensor(text.validation[:SCORE]["input_ids"]).long()
    mask = held_out != text.tokenizer.bos_token_id
    if planted:
        llama = plant(llama, rows)
    n, h = llama.config.num_hidden_layers, llama.config.intermediate_size
    options = {"mask": mask, "progress": False}

    def fit(**how):
        return approximate_llama(llama, rows, warn_below=-1e9, progress=False, **how)

    def repaired(layers):
        return repair(llama, layers, rows, steps=STEPS, batch=BATCH, progress=False).layers

    steps, found, clean = {}, {}, 0.0

    def step(label, make):
        nonlocal clean
        start = time.perf_counter()
        layers = found[label] = make()
        seconds = time.perf_counter() - start
        half = dict(list(layers.items())[: (n + 1) // 2])
        edits = {"one": Replacement({n // 2: layers[n // 2]}), "half": Replacement(half)}
        added = loss_added(llama, held_out, {**edits, "all": Replacement(layers)}, **options)
        clean = float(added.clean.mean())
        steps[label] = dict(zip(added.names, map(rounded, added.difference), strict=True))
        steps[label]["seconds"] = round(seconds, 1)
        print(label, steps[label], flush=True)

    step("neuron", lambda: fit(fit="neuron"))
    step("refit", fit)
    step("in order", lambda: fit(in_order=True))
    step("wider", lambda: fit(extra=h))
    step("three times as wide", lambda: fit(extra=2 * h))
    step("refit, repaired", lambda: repaired(found["refit"]))
    step("wider, repaired", lambda: repaired(found["wider"]))
    table = fidelity_table(with_loss_added(llama, found["refit"], held_out, **options))
    wide = fidelity_table(found["wider"])
    left = leave_out(llama, found["wider"], held_out, at_most=n - 1, mask=mask, progress=False)
    store(
        "models",
        name,
        {
            "parameters": sum(p.numel() for p in llama.parameters()),
            "layers": n,
            "d_model": llama.config.hidden_size,
            "d_mlp": h,
            "clean": rounded(clean),
            "steps": steps,
            "fidelity": [
                {k: v if isinstance(v, (str, int)) else rounded(v) for k, v in row.items()}
                for row in table.to_dict(orient="records")
            ],
            "wider_worst": list(map(rounded, wide["worst"])),
            "left_out": {"order": left.order, "loss": list(map(rounded, left.loss))},
            "fit_rows": FIT,
            "score_rows": SCORE,
        },
    )


def cost(d, h, n, fit, extra, out):
    """One layer in a process of its own, whose peak is that of the fit."""
    from tl_bilinear.tensor import GatedLayer, approximate

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    sizes = ((h, d), (h, d), (d, h))
    layer = GatedLayer(*(torch.randn(s, generator=draw) / s[1] ** 0.5 for s in sizes), F.silu)
    x = torch.randn(n, d, generator=draw)
    before = time.process_time()
    approximate(layer, x, fit=fit, extra=extra, warn_below=-1e9, max_bytes=8 * 10**9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.put({"seconds": round(time.process_time() - before, 1), "bytes": peak})


def costs():
    context = multiprocessing.get_context("spawn")
    for d, h, n, fit, extra in COSTS:
        out = context.Queue()
        process = context.Process(target=cost, args=(d, h, n, fit, extra, out))
        process.start()
        found = out.get()
        process.join()
        name = f"{fit}, {extra} more" if extra else fit
        store("costs", f"{d} x {h}: {name}", {**found, "inputs": n})
        print(d, h, name, found, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    what, *rest = sys.argv[1:]
    if what == "model":
        measure(rest[0], Path(rest[1]), Path(rest[2]), "--plant" in rest)
    elif what == "costs":
        costs()
    else:
        print(tables(json.loads(RESULTS.read_text())))
