"""Run the benchmarks: `python -m tests.benchmarks [--only NAME ...] [--quick] [--table]`.

For each case both sides run in turn in this process and the minimum of the repeats counts; peak memory
is that of a fresh process that runs one side once, beside one that only builds the layer. Results go to
tests/benchmarks/results/, one JSON file a case, each with the environment it was measured in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cases import CASES, QUICK, Case
from tests.benchmarks.layers import decay

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    processor = platform.processor() or "unknown"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            (s.split(":")[1].strip() for s in lines if s.startswith("model name")), processor
        )
    return {
        "date": date.today().isoformat(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def measure(case: Case) -> dict[str, Any]:
    sides = case.build()
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, dict[str, Any]] = {}
    for repeat in range(case.repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            found[name] = side()
            times[name].append(time.perf_counter() - start)
            print(f"  {name} {repeat + 1}/{case.repeats}: {times[name][-1]:.2f} s", flush=True)
    scale = {name: case.scaled if name == "dense" else 1.0 for name in sides}
    result: dict[str, Any] = {
        "case": case.name,
        "title": case.title,
        "asked": case.asked,
        "seconds": {name: round(min(t) * scale[name], 4) for name, t in times.items()},
        "all_seconds": {name: [round(t, 4) for t in ts] for name, ts in times.items()},
        "dense_scaled_by": case.scaled,
        "found": {
            name: {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
            for name, values in found.items()
        },
        "layer": {"input scale": "(i + offset)^-power", **decay()},
        "environment": environment(),
    }
    if "dense" in sides:
        result["speedup"] = round(result["seconds"]["dense"] / result["seconds"]["ours"], 2)
        if case.compare:
            result["error"] = case.compare(found["ours"], found["dense"])
    del sides, found
    base = memory_of(case, "nothing")
    result["peak_memory_bytes"] = {name: memory_of(case, name) for name in times}
    result["memory_before_bytes"] = base
    return result


def memory_of(case: Case, side: str) -> int:
    """Peak resident memory of a fresh process that builds the layer and runs one side once."""
    output = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--memory-of", case.name, side],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return int(output.split()[-1])


def run_one_side(name: str, side: str) -> None:
    case = next(case for case in CASES + QUICK if case.name == name)
    sides = case.build()
    if side != "nothing":
        sides[side]()
    print(peak_memory())


def peak_memory() -> int:
    """Of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss would count the process that started this one: it survives the exec.
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def table() -> str:
    """The stored results as Markdown."""
    rows = [
        "| work | asked | measured | time | dense way | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    order = [case.name for case in CASES]
    for name in order:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            rows.append(_row(json.loads(path.read_text())))
    return "\n".join(rows)


def plot() -> Path:
    """The stored results as a picture: seconds of both ways, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tl_bilinear"  # the same results make the same file
    from matplotlib import pyplot

    paths = [RESULTS / f"{case.name}.json" for case in reversed(CASES)]
    results = [json.loads(path.read_text()) for path in paths if path.is_file()]
    figure, axes = pyplot.subplots(figsize=(8.5, 0.62 * len(results) + 1.2))
    for row, result in enumerate(results):
        seconds = result["seconds"]
        axes.barh(row + 0.19, seconds["ours"], 0.36, color="#2166ac", label="tl_bilinear")
        text = f" {_number(seconds['ours'])} s"
        if "dense" in seconds:
            axes.barh(row - 0.19, seconds["dense"], 0.36, color="#bbbbbb", label="dense")
            axes.text(
                seconds["dense"],
                row - 0.19,
                f" {_number(seconds['dense'])} s",
                va="center",
                fontsize=8,
            )
            text += f"  ({_number(result['speedup'])}x)"
        axes.text(seconds["ours"], row + 0.19, text, va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [result["title"] for result in results], fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlabel("seconds, two CPU cores, float32")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.25)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=8.5, loc="upper right")
    path = RESULTS / "benchmarks.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return path


def _number(value: float, digits: int = 3) -> str:
    """To so many digits, and in full from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def _row(result: dict[str, Any]) -> str:
    seconds, memory = result["seconds"], result["peak_memory_bytes"]
    measured = []
    if "speedup" in result:
        measured.append(f"{result['speedup']:.1f}x")
    measured += [f"{name} {_number(value, 2)}" for name, value in result.get("error", {}).items()]
    ours = result["found"]["ours"]
    if "speedup" not in result and "largest relative residual" in ours:
        measured.append(f"residual {ours['largest relative residual']:.0e}")
    dense = f"{_number(seconds['dense'])} s" if "dense" in seconds else "-"
    if result["dense_scaled_by"] != 1:
        dense += f" (scaled from 1/{result['dense_scaled_by']:g})"
    peak = " / ".join(f"{memory[name] / 1e9:.2f} GB" for name in memory)
    return (
        f"| {result['title']} | {result['asked']} | {', '.join(measured) or 'done'} | "
        f"{_number(seconds['ours'])} s | {dense} | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing stored")
    parser.add_argument(
        "--table", action="store_true", help="the stored results as Markdown, and a plot"
    )
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        run_one_side(*options.memory_of)
        return
    if options.table:
        print(table())
        print(f"\nplotted in {plot()}", file=sys.stderr)
        return
    cases = QUICK if options.quick else CASES
    names = [case.name for case in cases]
    if unknown := set(options.only or []) - set(names):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for case in cases:
        if options.only and case.name not in options.only:
            continue
        print(f"{case.name}: {case.title}", flush=True)
        result = measure(case)
        print(f"  {_row(result)}", flush=True)
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{case.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
