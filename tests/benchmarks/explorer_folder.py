"""The explorer's folder for a large layer: `python -m tests.benchmarks.explorer_folder [--blocks N]`.

A layer of d = 1024 and h = 4096 between two dictionaries of 8,192 features, with a spectrum like a
trained layer's (`layers`). With `--blocks N` the first N of 128 blocks of each side are made and the
rest is extrapolated, in proportion; everything else is made whole. Results: results/explorer-1024.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer

import tl_bilinear  # noqa: F401  gives HookedTransformer.from_config
from tests.benchmarks.__main__ import RESULTS, environment
from tests.benchmarks.layers import directions, layer_like_trained
from tl_bilinear import FeatureInteractions
from tl_bilinear.explorer import Panel, language_panel, write_folder

D, HIDDEN, FEATURES, VOCABULARY, CONTEXT, ROWS = 1024, 4096, 8192, 2048, 128, 16


def model(d: int, hidden: int) -> HookedTransformer:
    built = HookedTransformer.from_config(
        bilinear=True, n_layers=1, d_model=d, d_mlp=hidden, d_head=64, n_ctx=CONTEXT,
        d_vocab=VOCABULARY, normalization_type="RMSPre", positional_embedding_type="rotary",
        seed=0, device="cpu",
    )  # fmt: skip
    layer, mlp = layer_like_trained(d, hidden, d), built.blocks[0].mlp
    with torch.no_grad():
        for parameter, values in zip(
            (mlp.W_in, mlp.W_gate, mlp.W_out), (layer.left, layer.right, layer.out), strict=True
        ):
            parameter.copy_(values.T)
    return built.requires_grad_(False)


def dictionary(hook: str, d: int, n: int, seed: int) -> Any:
    cls, config = get_sae_class("topk")
    made = cls(config(d_in=d, d_sae=n, k=30, metadata=SAEMetadata(hook_name=hook)))
    with torch.no_grad():
        rows = directions(n, d, seed)
        made.W_dec.copy_(rows)
        made.W_enc.copy_(rows.T)
    return made.requires_grad_(False)


def whole_panel(d: int, hidden: int, n: int, rows: int) -> Panel:
    built = model(d, hidden)
    into = dictionary("blocks.0.mlp.hook_in", d, n, 1)
    out = dictionary("blocks.0.hook_mlp_out", d, n, 2)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (rows, CONTEXT), generator=generator)
    run = FeatureInteractions(built, 0, into, out).run(tokens, progress=False)
    return language_panel(run, title="a layer of 1,024", name="language")


def measure(panel: Panel, blocks: int | None, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of each kind of document, measured and for the whole."""
    whole: dict[str, int] = defaultdict(int)
    kept, seconds = {}, defaultdict(float)
    table = f"{panel.manifest['name']}-table"
    for name, make in panel.documents.items():
        kind, _, number = name.removeprefix(f"{panel.manifest['name']}-").rpartition("-")
        kind = kind if number.isdigit() else name.removeprefix(f"{panel.manifest['name']}-")
        whole[kind] += 1
        if kind in ("output", "input") and blocks is not None and int(number) >= blocks:
            continue
        if name == table and blocks is not None:
            continue  # it reads every block

        def timed(read, make=make, kind=kind):
            start = time.perf_counter()
            document = make(partial(_read, read) if blocks is not None else read)
            seconds[kind] += time.perf_counter() - start
            if kind in ("output", "input"):
                print(f"{kind} {seconds[kind]:.1f} s", flush=True)
            return document

        kept[name] = timed
    start = time.perf_counter()
    write_folder([replace(panel, documents=kept)], folder, progress=False)
    elapsed = time.perf_counter() - start
    made: dict[str, list[int]] = defaultdict(list)
    for path in (folder / "data").iterdir():
        rest, _, number = path.stem.removeprefix(f"{panel.manifest['name']}-").rpartition("-")
        kind = rest if number.isdigit() else path.stem.removeprefix(f"{panel.manifest['name']}-")
        made[kind].append(path.stat().st_size)
    kinds = {
        kind: {
            "made": len(sizes),
            "of": whole[kind],
            "seconds": round(seconds[kind], 2),
            "megabytes": round(sum(sizes) / 1e6, 2),
        }
        for kind, sizes in made.items()
    }

    def total(of: str) -> float:
        return sum(each[of] * each["of"] / each["made"] for each in kinds.values())

    return {
        "kinds": kinds,
        "measured_seconds": round(elapsed, 1),
        "whole_minutes": round((total("seconds") + elapsed - sum(seconds.values())) / 60, 1),
        "whole_megabytes": round(total("megabytes"), 1),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def _read(read: Any, name: str) -> Any:
    """A block that was left out has no features."""
    try:
        return read(name)
    except FileNotFoundError:
        return {"features": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, help="blocks of features of each side to make")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of text")
    parser.add_argument("--out", type=Path, help="keep the folder here")
    parser.add_argument("--result", type=Path, default=RESULTS / "explorer-1024.json")
    given = parser.parse_args()
    panel = whole_panel(D, HIDDEN, FEATURES, given.rows)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(panel, given.blocks, given.out or Path(temporary) / "folder")
    sizes = {"d": D, "hidden": HIDDEN, "features": FEATURES, "tokens": given.rows * CONTEXT}
    result = {"case": sizes, "blocks": given.blocks, **found, "environment": environment()}
    given.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
