"""The explorer's folder for a large layer: `python -m tests.benchmarks.explorer_folder [--blocks N]`.

A layer of d = 1024 and h = 4096 between two dictionaries of 8,192 features, with a spectrum like a
trained layer's (`layers`). With `--blocks N` the first N of 128 blocks of each side are made and the
rest is extrapolated from those after the first, which holds what is computed once for all; everything
else is made whole (the table from the blocks that are there, again and again). Then the page is opened.
`--null` measures what the nulls of spectra add to the building. Results: folder-1024.json and null.json
in results/explorer.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
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
from tl_bilinear.explorer.documents import Document, Read
from tl_bilinear.explorer.language_documents import BLOCK, LEADING, norms_along
from tl_bilinear.features.chance import paired_at_random

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


def measure(panel: Panel, blocks: int | None, folder: Path, imported: float) -> dict[str, Any]:
    """Seconds and bytes of each kind of document, measured and for the whole; memory of the process.

    imported: gigabytes that were held when everything had been imported
    """
    name_of = f"{panel.manifest['name']}-"
    whole: dict[str, int] = defaultdict(int)
    kept = {}
    seconds: dict[str, list[float]] = defaultdict(list)  # of each document
    cpu: dict[str, list[float]] = defaultdict(list)

    def kind_of(name: str) -> tuple[str, int]:
        kind, _, number = name.removeprefix(name_of).rpartition("-")
        return (kind, int(number)) if number.isdigit() else (name.removeprefix(name_of), 0)

    def made_before(read: Read, name: str) -> Document:
        """A block that is left out is read as one that was made, so that the table is whole."""
        kind, number = kind_of(name)
        left_out = blocks is not None and kind in ("output", "input")
        return read(f"{name_of}{kind}-{number % blocks}" if left_out else name)

    for name, make in panel.documents.items():
        kind, number = kind_of(name)
        whole[kind] += 1
        if kind in ("output", "input") and blocks is not None and number >= blocks:
            continue

        def timed(read: Read, make: Any = make, kind: str = kind) -> Document:
            start, busy = time.perf_counter(), time.process_time()
            document = make(partial(made_before, read))
            seconds[kind].append(time.perf_counter() - start)
            cpu[kind].append(time.process_time() - busy)
            if kind in ("output", "input"):
                print(f"{kind} {seconds[kind][-1]:.1f} s", flush=True)
            return document

        kept[name] = timed
    start, busy = time.perf_counter(), time.process_time()
    index = write_folder([replace(panel, documents=kept)], folder, progress=False)
    elapsed, worked = time.perf_counter() - start, time.process_time() - busy
    sizes: dict[str, list[int]] = defaultdict(list)
    for path in (folder / "data").iterdir():
        sizes[kind_of(path.stem)[0]].append(path.stat().st_size)
    kinds = {
        kind: {
            "made": len(held),
            "of": whole[kind],
            "seconds": round(sum(seconds[kind]), 2),
            "cpu_seconds": round(sum(cpu[kind]), 2),
            "cpu_seconds_first": round(cpu[kind][0], 2),
            "megabytes": round(sum(held) / 1e6, 2),
        }
        for kind, held in sizes.items()
    }

    def whole_time(taken: dict[str, list[float]]) -> float:
        return sum(
            sum(each) + (whole[kind] - len(each)) * sum(each[1:]) / max(1, len(each) - 1)
            for kind, each in taken.items()
        )

    made = (sum(map(sum, taken.values())) for taken in (seconds, cpu))
    rest, rest_cpu = (all_ - each for all_, each in zip((elapsed, worked), made, strict=True))
    megabytes = sum(each["megabytes"] * each["of"] / each["made"] for each in kinds.values())
    return {
        "kinds": kinds,
        "measured_seconds": round(elapsed, 1),
        "whole_minutes": round((whole_time(seconds) + rest) / 60, 1),
        "whole_cpu_minutes": round((whole_time(cpu) + rest_cpu) / 60, 1),
        "whole_megabytes": round(megabytes, 1),
        "imported_gigabytes": imported,
        "peak_gigabytes": peak_gigabytes(),
        "opens_seconds": opening_seconds(index),
    }


def peak_gigabytes() -> float:
    """Most memory that this process has held so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def opening_seconds(index: Path) -> float | None:
    """From asking for the page to the table on it, in Chromium: the best of three; None without it."""
    # Not before: what only opens the page is not to count in the memory of the building.
    from playwright.sync_api import sync_playwright

    from tests.explorer.conftest import BROWSERS, FLAGS

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        return None
    taken = []
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found, args=FLAGS)
        for _ in range(3):
            tab = browser.new_page()
            start = time.perf_counter()
            tab.goto(index.resolve().as_uri())
            tab.wait_for_selector("tbody tr", timeout=60_000)
            taken.append(time.perf_counter() - start)
            tab.close()
        browser.close()
    return round(min(taken), 2)


def null_seconds(d: int, hidden: int, count: int = BLOCK) -> dict[str, Any]:
    """CPU seconds that a feature's null takes, and the norms of all nulls."""
    layer, rows = layer_like_trained(d, hidden, d), directions(count, d)

    def cpu(of: Any) -> float:
        start = time.process_time()
        of()
        return time.process_time() - start

    null = paired_at_random(layer, torch.Generator().manual_seed(0))
    each = min(cpu(lambda: null.interaction(rows).eigh(LEADING)) for _ in range(3)) / count
    norms = cpu(lambda: norms_along(rows, null))
    return {
        "d": d,
        "hidden": hidden,
        "measured_features": count,
        "cpu_seconds_a_thousand_features": round(1000 * each, 1),
        "cpu_seconds_once": round(norms, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, help="blocks of features of each side to make")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of text")
    parser.add_argument("--out", type=Path, help="keep the folder here")
    parser.add_argument("--result", type=Path, default=RESULTS / "explorer" / "folder-1024.json")
    parser.add_argument("--null", action="store_true", help="what nulls of spectra cost, only")
    given = parser.parse_args()
    if given.blocks == 1:
        parser.error("--blocks 1 leaves nothing to extrapolate from; take 2 or more")
    if given.null:
        found = {"cases": [null_seconds(512, 2048), null_seconds(1024, 4096)]}
        text = json.dumps({**found, "environment": environment()}, indent=1)
        (RESULTS / "explorer" / "null.json").write_text(text + "\n")
        print(text)
        return
    imported = peak_gigabytes()
    panel = whole_panel(D, HIDDEN, FEATURES, given.rows)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(panel, given.blocks, given.out or Path(temporary) / "folder", imported)
    sizes = {"d": D, "hidden": HIDDEN, "features": FEATURES, "tokens": given.rows * CONTEXT}
    result = {"case": sizes, "blocks": given.blocks, **found, "environment": environment()}
    given.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
