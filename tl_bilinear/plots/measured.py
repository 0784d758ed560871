"""Figures of what interventions on a model did, beside what was predicted of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_bilinear.plots.style import NEGATIVE, NEUTRAL, POSITIVE, rounded, short, sized

if TYPE_CHECKING:
    from tl_bilinear.hooks import LossAdded, Verification


def verification_figure(result: Verification) -> go.Figure:
    """Predicted against measured change at every token, and the largest error of each component.

    Every point should lie on the diagonal. The error of random controls stands beside the components':
    a check that they also pass says nothing.
    """
    table = result.to_pandas()
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.14,
        subplot_titles=["change at each token", "largest relative error"],
    )
    largest = max(float(result.predicted.abs().max()), float(result.measured.abs().max()), 1e-30)
    diagonal = go.Scatter(
        x=[-largest, largest],
        y=[-largest, largest],
        mode="lines",
        line={"color": NEUTRAL, "width": 1},
        showlegend=False,
        hoverinfo="skip",
    )
    points = go.Scattergl(
        x=result.predicted.flatten().tolist(),
        y=result.measured.flatten().tolist(),
        mode="markers",
        marker={"size": 4, "color": POSITIVE, "opacity": 0.6},
        name="components",
    )
    figure.add_traces([diagonal, points], rows=1, cols=1)
    places = list(range(len(table)))
    for name, column, color in (
        ("components", "error", POSITIVE),
        ("random controls", "control_error", NEGATIVE),
    ):
        errors = go.Scatter(
            x=places,
            y=table[column].tolist(),
            mode="markers",
            marker={"size": 7, "color": color},
            name=name,
            showlegend=column == "control_error",
        )
        figure.add_trace(errors, row=1, col=2)
    columns = [*result.labels, "read"]  # those that tell the interventions apart
    columns = [name for name in columns if table[name].nunique() > 1] or columns[:1]
    names = [
        ", ".join(f"{name} {row[name]}" for name in columns) for row in table.to_dict("records")
    ]
    figure.update_xaxes(title="predicted", row=1, col=1)
    figure.update_yaxes(title="measured", row=1, col=1)
    figure.update_xaxes(tickvals=places, ticktext=names, automargin=True, row=1, col=2)
    figure.update_yaxes(type="log", exponentformat="power", row=1, col=2)
    margin = {"l": 55, "r": 15, "t": 70, "b": 45}
    return sized(figure, 900, 440, title=f"interventions at the layer's {result.at}", margin=margin)


def loss_added_figure(result: LossAdded) -> go.Figure:
    """The loss that each intervention adds, with its interval."""
    low, high = result.interval.T
    places = list(range(len(result.names)))
    figure = go.Figure(
        go.Scatter(
            x=rounded(result.difference),
            y=places,
            mode="markers",
            marker={"size": 8, "color": POSITIVE},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": rounded(high - result.difference),
                "arrayminus": rounded(result.difference - low),
                "color": NEUTRAL,
            },
        )
    )
    figure.add_vline(0, line={"color": NEUTRAL, "width": 1})
    names = [short(name, 40) for name in result.names]
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", automargin=True)
    clean = float(result.clean.mean())
    figure.update_xaxes(
        title=f"nats a token added to {clean:.3f} ({result.confidence:.0%} interval)"
    )
    return sized(figure, 620, 120 + 30 * len(names), title="Loss that each intervention adds")
