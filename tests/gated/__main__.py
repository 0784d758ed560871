"""How far gated models can be read as bilinear ones, measured: ``python -m tests.gated``.

    python -m tests.gated model NAME FOLDER DATA [--plant]   # of a Llama and its `tl-bilinear data`
    python -m tests.gated pieces NAME FOLDER DATA            # several forms by region, and wider ones
    python -m tests.gated costs                              # seconds and bytes of one layer
    python -m tests.gated finetune FOLDER ...                # runs of `tl-bilinear finetune`
    python -m tests.gated table                              # into demos/docs/swiglu.md

Each writes its part of results.json beside this file. Layers are fitted on the first rows of training
text, and all numbers are of the first rows of the validation text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.gated.cost import cost
from tests.gated.pieces import PiecewiseReplacement, pieces
from tests.gated.planting import plant
from tests.gated.tables import PAGE, RESULTS, written

FIT, SCORE = 120, 40  # rows
STEPS, BATCH = 200, 8  # of the repair
COSTS = (
    (576, 1536, 10_000, "neuron", 0),
    (576, 1536, 10_000, "refit", 0),
    (576, 1536, 10_000, "refit", 1536),
    (4096, 14336, 1_000, "neuron", 0),
)


def stored(part):
    return json.loads(RESULTS.read_text()).get(part, {}) if RESULTS.exists() else {}


def store(part, name, value):
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found.setdefault(part, {})[name] = value
    found["environment"] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def rounded(value):
    return round(float(value), 4)


def measure(name, folder, data, planted):
    """Each step is stored when it is done, and a step that is there is not done again."""
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
    found = stored("models").get(name, {})
    found |= {"parameters": sum(p.numel() for p in llama.parameters()), "layers": n, "d_mlp": h}
    found |= {"d_model": llama.config.hidden_size, "fit_rows": FIT, "score_rows": SCORE}
    steps = found.setdefault("steps", {})

    def fit(**how):
        return approximate_llama(llama, rows, warn_below=-1e9, progress=False, **how)

    def repaired(layers):
        return repair(llama, layers, rows, steps=STEPS, batch=BATCH, progress=False).layers

    make = {
        "neuron": lambda: fit(fit="neuron"),
        "refit": fit,
        "wider (extra = h)": lambda: fit(extra=h),
        "wider (extra = 4 h)": lambda: fit(extra=4 * h),
        "refit, repaired": lambda: repaired(fit()),
        "wider (extra = h), repaired": lambda: repaired(fit(extra=h)),
    }
    for label, layers_of in make.items():
        if label in steps:
            continue
        start = time.process_time()
        layers = layers_of()
        seconds = time.process_time() - start
        half = dict(list(layers.items())[: (n + 1) // 2])
        edits = {"one": Replacement({n // 2: layers[n // 2]}), "half": Replacement(half)}
        added = loss_added(llama, held_out, {**edits, "all": Replacement(layers)}, **options)
        found["clean"] = rounded(added.clean.mean())
        steps[label] = dict(zip(added.names, map(rounded, added.difference), strict=True))
        steps[label]["cpu_seconds"] = round(seconds, 1)
        if label == "refit":
            table = fidelity_table(with_loss_added(llama, layers, held_out, **options))
            found["fidelity"] = [
                {k: v if isinstance(v, str) else rounded(v) for k, v in row.items()}
                for row in table.to_dict(orient="records")
            ]
        if label == "wider (extra = h)":
            found["wider_worst"] = list(map(rounded, fidelity_table(layers)["worst"]))
            most = min(2, n - 1)
            left = leave_out(llama, layers, held_out, at_most=most, mask=mask, progress=False)
            found["left_out"] = {"order": left.order, "loss": list(map(rounded, left.loss))}
        store("models", name, found)
        print(label, steps[label], flush=True)


def compare_pieces(name, folder, data):
    from transformers import LlamaForCausalLM

    from tl_bilinear.hooks import loss_added
    from tl_bilinear.models.approximation import mlp_inputs
    from tl_bilinear.recipes.language import LanguageData

    llama = LlamaForCausalLM.from_pretrained(folder).eval()
    text = LanguageData.load(data)
    rows = torch.tensor(text.train[:FIT]["input_ids"]).long()
    held_out = torch.tensor(text.validation[:SCORE]["input_ids"]).long()
    inputs = mlp_inputs(llama, rows, progress=False)
    middle, found = llama.config.num_hidden_layers // 2, {}
    for label, neurons, modules in pieces(llama, inputs, llama.config.intermediate_size):
        one = {middle: modules[middle]}
        edits = {"one": PiecewiseReplacement(one), "all": PiecewiseReplacement(modules)}
        mask = held_out != text.tokenizer.bos_token_id
        added = loss_added(llama, held_out, edits, mask=mask, progress=False)
        found[label] = dict(zip(added.names, map(rounded, added.difference), strict=True))
        found[label]["neurons"] = neurons
        print(label, found[label], flush=True)
    store("pieces", name, found)


def costs():
    context = multiprocessing.get_context("spawn")
    for d, h, n, fit, extra in COSTS:
        name = f"{d} x {h}: {fit}, {extra} more" if extra else f"{d} x {h}: {fit}"
        if name in stored("costs"):
            continue
        out = context.Queue()
        process = context.Process(target=cost, args=(d, h, n, fit, extra, out))
        process.start()
        found = out.get()
        process.join()
        store("costs", name, {**found, "inputs": n})
        print(name, found, flush=True)


def finetuned(folder):
    """The runs that `tl-bilinear finetune` compared, by their learning rate."""
    compared = json.loads((folder / "comparison.json").read_text())
    rate = json.loads((folder / "baseline" / "run.json").read_text())["config"]["learning_rate"]
    found = stored("finetune").get(
        str(rate), {"start": rounded(compared["start_loss"]), "runs": {}}
    )
    for name, run in compared["runs"].items():
        extra = json.loads((folder / name / "run.json").read_text())["config"].get("extra", 0)
        label = f"{name}, extra = {extra}" if extra and name == "closed" else name
        found["runs"][label] = {k: run[k] for k in ("loss", "gap", "tokens")}
    store("finetune", str(rate), found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    what, *rest = sys.argv[1:]
    if what == "model":
        measure(rest[0], Path(rest[1]), Path(rest[2]), "--plant" in rest)
    elif what == "pieces":
        compare_pieces(rest[0], Path(rest[1]), Path(rest[2]))
    elif what == "costs":
        costs()
    elif what == "finetune":
        for folder in rest:
            finetuned(Path(folder))
    else:
        PAGE.write_text(written(PAGE.read_text(), json.loads(RESULTS.read_text())))
