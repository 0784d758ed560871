"""Figures of circuits across layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_bilinear.plots.style import NEUTRAL, bars, by_sign, heatmap, short, sized

if TYPE_CHECKING:
    from tl_bilinear.circuits import FeatureGraph, Paths


_STEP, _NAME = 220, 190  # pixels: from column to column, and for names beside the outer columns


def paths_figure(result: Paths, k: int = 14) -> go.Figure:
    """The k components of largest share: their pairs as a heatmap, and each one's share beside it.

    An entry off the diagonal is half of its pair's contribution. A component's whole row, with the bias
    terms, sums to its bar.
    """
    chosen = result.shares.abs().topk(min(k, len(result.labels))).indices
    chosen = chosen.sort().values  # as they are written, upstream first
    labels = [result.labels[i] for i in chosen.tolist()]
    pairs, shares = result.quadratic[chosen][:, chosen], result.shares[chosen]
    figure = make_subplots(
        cols=2,
        rows=1,
        shared_yaxes=True,
        column_widths=[0.72, 0.28],
        horizontal_spacing=0.03,
        subplot_titles=["pairs", "share of each"],
    )
    entries = heatmap(pairs, labels, labels, colorbar={"title": "entry", "thickness": 12})
    hover = "%{y} x %{x}<br>%{z:.4f}<extra></extra>"
    figure.add_trace(entries.update(hovertemplate=hover), row=1, col=1)
    each = bars(labels, shares, hovertemplate="%{y}<br>%{x:.4f}<extra></extra>")
    figure.add_trace(each, row=1, col=2)
    figure.update_xaxes(type="category", automargin=True, tickangle=-45, row=1, col=1)
    figure.update_yaxes(type="category", automargin=True, autorange="reversed")
    figure.update_xaxes(zeroline=True, zerolinecolor=NEUTRAL, nticks=4, tickangle=0, row=1, col=2)
    side = 190 + 24 * len(labels)
    return sized(
        figure,
        side + 380,
        side + 60,
        margin={"l": 10, "r": 10, "t": 75, "b": 10},
        title=f"what layer {result.layer} writes along the direction at position {result.position}: "
        f"{result.measured:+.3f}",
    )


def graph_figure(result: FeatureGraph) -> go.Figure:
    """Features in columns by dictionary, with lines from both features of a pair to what they make.

    The lines of a pair meet in a diamond. Blue adds, red takes away; the width is the pair's strength.
    """
    depths = result.nodes[:, 0].tolist()
    columns = sorted(set(depths))
    place: dict[int, tuple[float, float]] = {}
    for column, depth in enumerate(columns):
        rows = [i for i, each in enumerate(depths) if each == depth]
        for row, i in enumerate(rows):
            place[i] = (float(column), (row + 0.5) / len(rows))
    strengths = result.strengths.tolist()
    largest = max((abs(value) for value in strengths), default=1.0) or 1.0
    figure = go.Figure()
    spots: list[tuple[float, float]] = []
    for (b, c, a), value in zip(result.pairs.tolist(), strengths, strict=True):
        inputs, end = {place[b], place[c]}, place[a]
        height = (sum(y for _, y in inputs) / len(inputs) + end[1]) / 2
        spots.append((end[0] - 0.4, height))
        lines: dict[str, list[float | None]] = {"x": [], "y": []}
        for x, y in inputs:
            lines["x"] += [x, spots[-1][0], None]
            lines["y"] += [y, spots[-1][1], None]
        lines["x"] += [spots[-1][0], end[0]]
        lines["y"] += [spots[-1][1], end[1]]
        figure.add_trace(
            go.Scatter(
                **lines,
                mode="lines",
                line={
                    "width": 0.6 + 3.4 * abs(value) / largest,
                    "color": by_sign([value])[0],
                },
                opacity=0.55,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    names = [
        f"{result.labels[b]}{'' if b == c else f' x {result.labels[c]}'}<br>{value:+.4g}"
        for (b, c, _), value in zip(result.pairs.tolist(), strengths, strict=True)
    ]
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in spots],
            y=[y for _, y in spots],
            mode="markers",
            marker={
                "symbol": "diamond",
                "size": 7,
                "color": by_sign(strengths),
            },
            hovertext=names,
            hoverinfo="text",
            showlegend=False,
        )
    )
    shown = [short(label.split(": ", 1)[-1], 26) for label in result.labels]
    beside = {columns[0]: "middle left", columns[-1]: "middle right"} if columns else {}
    figure.add_trace(
        go.Scatter(
            x=[place[i][0] for i in range(len(shown))],
            y=[place[i][1] for i in range(len(shown))],
            mode="markers+text",
            marker={"size": 11, "color": "white", "line": {"color": NEUTRAL, "width": 1.5}},
            text=shown,
            textfont={"shadow": ",".join(["0 0 2px white"] * 6)},  # legible over a line
            textposition=[beside.get(depth, "top center") for depth in depths],
            hovertext=result.labels,
            hoverinfo="text",
            showlegend=False,
        )
    )
    where = "" if result.position is None else f" at position {result.position}"
    most = max((depths.count(depth) for depth in columns), default=1)
    return sized(
        figure,
        60 + 2 * _NAME + _STEP * max(len(columns) - 1, 0),
        max(320, 130 + 38 * most),
        margin={"l": 30, "r": 30, "t": 60, "b": 40},
        title=f"{len(result.pairs)} pairs of features{where}",
        xaxis={
            "tickvals": list(range(len(columns))),
            "ticktext": [result.dictionaries[depth] for depth in columns],
            "range": [-_NAME / _STEP, max(len(columns) - 1, 0) + _NAME / _STEP],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"visible": False, "range": [-0.02, 1.06]},
    )
