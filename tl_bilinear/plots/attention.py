"""Figures of attention scores read as pairs of features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from tl_bilinear.plots.style import NEGATIVE, NEUTRAL, POSITIVE, bars, heatmap, line, short, sized

if TYPE_CHECKING:
    from tl_bilinear.circuits import (
        AttentionPairs,
        OffsetProfile,
        ScoreAttribution,
        ScoreCheck,
    )


def attention_pairs_figure(result: AttentionPairs) -> go.Figure:
    """The strongest pairs of a head: blue pairs attract the query to the key, red ones keep it away."""
    names = [
        f"{short(query)} looks at {short(key)}"
        for query, key in zip(result.query_labels, result.key_labels, strict=True)
    ]
    places = list(range(len(names)))
    figure = go.Figure(bars(places, result.coefficients))
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", automargin=True)
    figure.update_xaxes(title="coefficient")
    back = "1 position back" if result.offset == 1 else f"{result.offset} positions back"
    title = f"head {result.layer}.{result.head}, {back}"
    return sized(figure, 760, 130 + 24 * len(names), title=title)


def _pair(label: str) -> str:
    """A pair's label, "query x key", with each of the two cut: so that both stay."""
    return " x ".join(short(part, 20) for part in label.split(" x "))


def offset_figure(result: OffsetProfile) -> go.Figure:
    """The coefficient of each pair at each offset between query and key."""
    figure = go.Figure(
        [
            line(result.offsets.tolist(), values, i, _pair(label))
            for i, (label, values) in enumerate(
                zip(result.labels, result.coefficients, strict=True)
            )
        ]
    )
    figure.update_xaxes(title="positions between query and key")
    figure.update_yaxes(title="coefficient", zerolinecolor=NEUTRAL)
    return sized(figure, 860, 420, title=f"head {result.layer}.{result.head}")


def score_figure(result: ScoreAttribution, k: int = 12) -> go.Figure:
    """One score: contributions of the k query rows and k key rows that contribute most."""
    pairs = result.pairs
    chosen = [
        sizes.topk(min(k, len(sizes))).indices.sort().values
        for sizes in (pairs.abs().sum(1), pairs.abs().sum(0))
    ]
    rows, columns = (
        [short(names[i]) for i in index.tolist()]
        for names, index in zip((result.query_labels, result.key_labels), chosen, strict=True)
    )
    table = pairs[chosen[0]][:, chosen[1]]
    shown = heatmap(table, columns, rows, colorbar={"title": "contribution"})
    figure = go.Figure(shown)
    figure.update_xaxes(title=f"key, position {result.key_position}", type="category")
    figure.update_yaxes(
        title=f"query, position {result.query_position}", autorange="reversed", type="category"
    )
    title = (
        f"head {result.layer}.{result.head}: score {result.measured:+.2f}, "
        f"attention {result.pattern:.2f}; shown: {float(table.sum()):+.2f}"
    )
    return sized(figure, 760, 560, title=title)


def score_check_figure(result: ScoreCheck) -> go.Figure:
    """Predicted against measured change of a score; every point should lie on the diagonal.

    Random directions of the same length are the control: how much anything taken out would change.
    """
    largest = max(float(result.predicted.abs().max()), float(result.measured.abs().max()), 1e-30)
    figure = go.Figure(
        go.Scatter(
            x=[-largest, largest],
            y=[-largest, largest],
            mode="lines",
            line={"color": NEUTRAL, "width": 1},
            showlegend=False,
            hoverinfo="skip",
        )
    )
    for name, color, random in (
        ("features", POSITIVE, False),
        ("random directions", NEGATIVE, True),
    ):
        chosen = [i for i, kind in enumerate(result.kinds) if (kind == "random") == random]
        figure.add_scatter(
            x=result.predicted[chosen].tolist(),
            y=result.measured[chosen].tolist(),
            text=[result.labels[i] for i in chosen],
            mode="markers",
            marker={"size": 8, "color": color},
            name=name,
        )
    figure.update_xaxes(title="predicted change of the score")
    figure.update_yaxes(title="measured")
    return sized(figure, 520, 440, title="What taking parts out does to a score")
