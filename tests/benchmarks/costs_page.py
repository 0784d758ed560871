"""The tables and the plot of demos/docs/costs.md, from tests/benchmarks/results/costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.benchmarks.costs import PAGE, PICTURE, Row, exponent, stored

_NAMES = {
    "auto": 'eigh(10), method="auto"',
    "krylov": "krylov",
    "dense": "dense",
    "formed": "torch.linalg.eigh, formed by hand",
    "eigsh": "scipy eigsh, LinearOperator",
    "lobpcg": "torch.lobpcg (largest only), Q formed",
}


def write() -> None:
    """Put the tables into the page, and draw its plot."""
    PAGE.write_text(filled(PAGE.read_text()))
    draw()


def filled(page: str) -> str:
    """The page with every table between its marks as the stored results say."""
    for name, table in TABLES.items():
        page = between_marks(page, name, table())
    return page


def between_marks(page: str, name: str, text: str) -> str:
    """A page with a text between the marks ``<!-- name -->`` and ``<!-- end -->``."""
    marks = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
    page, count = re.subn(marks, lambda m: m[1] + text + m[2], page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places for the table {name}, not 1")
    return page


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(part: str) -> Callable[[], str]:
    return lambda: _table(stored(part)["rows"])


def _whole() -> str:
    rows = [dict(row) for row in stored("whole")["rows"]]
    for row in rows:
        ms = row.pop("ms")
        row |= {f"{name}, ms": value for name, value in ms.items()}
    order = ["setting", "k", "tol", "eigh, ms", "norms, ms", "spectrum, ms"]
    order += [name for name in rows[0] if name not in order]
    return _table([{name: row[name] for name in order} for row in rows])


def _few() -> str:
    rows = stored("few")["rows"]
    widths = [row["d"] for row in rows]
    table = []
    for name, title in _NAMES.items():
        cells = [row["ms"].get(name) for row in rows]
        known = [(d, c) for d, c in zip(widths, cells, strict=True) if c is not None]
        line: Row = {"ms a direction": title}
        line |= {f"d={d}": cell for d, cell in zip(widths, cells, strict=True)}
        table.append(line | {"grows as": f"d^{exponent(*map(list, zip(*known, strict=True))):.1f}"})
    return _table(table)


def _growth() -> str:
    rows = stored("growth")["rows"]
    widths = [row["d"] for row in rows]
    table = []
    for name in rows[0]["seconds"]:
        seconds = [row["seconds"][name] for row in rows]
        line: Row = {"seconds": name, **{f"d={d}": s for d, s in zip(widths, seconds, strict=True)}}
        table.append(line | {"grows as": f"d^{exponent(widths, seconds):.1f}"})
    return _table(table)


TABLES: dict[str, Callable[[], str]] = {
    "small": _plain("small"),
    "few": _few,
    "whole": _whole,
    "sweep": _plain("sweep"),
    "interventions": _plain("interventions"),
    "start": _plain("start"),
    "processing": _plain("processing"),
    "training": _plain("training"),
    "growth": _growth,
}


def draw() -> None:
    """Both plots, on logarithmic axes: where methods cross, and how costs grow."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tl_bilinear"  # the same results make the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    rows = stored("few")["rows"]
    for name, title in _NAMES.items():
        if name == "auto":
            continue
        points = [(row["d"], row["ms"][name]) for row in rows if name in row["ms"]]
        d, ms = map(list, zip(*points, strict=True))
        left.plot(d, ms, "o-", markersize=3.5, label=f"{title}: d^{exponent(d, ms):.1f}")
    left.set_title("top 10 of 64 directions, ms a direction", fontsize=9.5)
    rows = stored("growth")["rows"]
    widths = [row["d"] for row in rows]
    for name in rows[0]["seconds"]:
        seconds = [row["seconds"][name] for row in rows]
        label = f"{name}: d^{exponent(widths, seconds):.1f}"
        right.plot(widths, seconds, "o-", markersize=3.5, label=label)
    right.set_title("other methods, seconds", fontsize=9.5)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="d, with h = 4 d")
        axes.set_xticks([row["d"] for row in stored("few" if axes is left else "growth")["rows"]])
        axes.set_xticklabels([str(int(tick)) for tick in axes.get_xticks()])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
