"""Figures of an image classifier's eigenvectors (Pearce et al. 2025, Fig. 2, 3 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.plots.style import DIVERGING, LAYOUT, NEGATIVE, NEUTRAL, POSITIVE

SHOWN_EIGENVALUES = 20


def eigenvector_figure(
    values: Float[Tensor, " k"],
    images: Float[Tensor, "k pixels"],
    size: tuple[int, int],
    *,
    count: int = 4,
    title: str = "",
) -> go.Figure:
    """One class: its spectrum, and its top positive and negative eigenvectors as images (Fig. 3).

    Parameters
    ----------
    values: [k], eigenvalues, and images: [k, height * width], eigenvectors as images
    size: (height, width)
    count: how many of each sign

    An image is blue where positive and red where negative, centred on zero, each on its own scale: an
    eigenvector's overall sign means nothing, its eigenvalue's does.
    """
    order = values.argsort(descending=True).tolist()
    top = {
        "positive": [i for i in order if values[i] > 0][:count],
        "negative": [i for i in reversed(order) if values[i] < 0][:count],
    }
    height, width = size
    names = []
    for indices in top.values():
        names += [f"λ = {float(values[i]):+.3f}" for i in indices] + [""] * (count - len(indices))
    figure = make_subplots(
        rows=2,
        cols=count + 1,
        specs=[[{"rowspan": 2}] + [{}] * count, [None] + [{}] * count],
        column_widths=[1.7] + [1.0] * count,
        horizontal_spacing=0.015,
        vertical_spacing=0.11,
        subplot_titles=["", *names],
    )
    _add_spectrum(figure, values)
    for row, indices in enumerate(top.values(), start=1):
        for column, index in enumerate(indices, start=2):
            picture = images[index].reshape(height, width)
            scale = float(picture.abs().max()) or 1.0
            figure.add_trace(
                go.Heatmap(
                    z=(picture / scale).flip(0).mul(100).round().div(100).tolist(),
                    zmin=-1,
                    zmax=1,
                    colorscale=DIVERGING,
                    showscale=False,
                    hoverinfo="skip",
                ),
                row=row,
                col=column,
            )
            figure.update_xaxes(visible=False, row=row, col=column, constrain="domain")
            figure.update_yaxes(
                visible=False, row=row, col=column, scaleanchor="x", constrain="domain"
            )
    # An image keeps its proportions by an axis tied to its own, not to the first one's.
    for axis in figure.select_yaxes(lambda axis: axis.scaleanchor == "x"):
        axis.scaleanchor = axis.anchor
    figure.update_layout(
        **LAYOUT | {"margin": {"l": 50, "r": 10, "t": 62, "b": 42}},
        title=title,
        width=250 + 150 * count,
        height=380,
        showlegend=False,
    )
    return figure


def _add_spectrum(figure: go.Figure, values: Tensor) -> None:
    ordered = values.sort(descending=True).values
    shown = min(SHOWN_EIGENVALUES, len(ordered) // 2)
    for name, part, color in (
        ("positive", ordered[:shown].clamp_min(0), POSITIVE),
        ("negative", ordered.flip(0)[:shown].clamp_max(0), NEGATIVE),
    ):
        figure.add_trace(
            go.Scatter(
                x=list(range(1, shown + 1)),
                y=[round(v, 5) for v in part.tolist()],
                mode="lines+markers",
                marker={"size": 5},
                line={"color": color, "width": 1.5},
                name=name,
                hovertemplate="rank %{x}<br>λ = %{y:.4f}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    figure.update_xaxes(title="rank", row=1, col=1)
    figure.update_yaxes(title="eigenvalue", title_standoff=4, row=1, col=1)


def spectra_figure(values: Float[Tensor, "classes k"], classes: Sequence[str]) -> go.Figure:
    """Eigenvalues of all classes, largest to most negative, one line a class."""
    figure = go.Figure()
    for row, name in zip(values, classes, strict=True):
        ordered = row.sort(descending=True).values
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(ordered) + 1)),
                y=[round(v, 5) for v in ordered.tolist()],
                mode="lines",
                name=name,
            )
        )
    return figure.update_layout(
        **LAYOUT, xaxis_title="rank", yaxis_title="eigenvalue", width=560, height=340
    )


def truncation_figure(accuracies: Mapping[int, float], full: float) -> go.Figure:
    """Accuracy against the number of eigenvectors kept for each class (Fig. 5B)."""
    figure = go.Figure(
        go.Scatter(
            x=list(accuracies),
            y=list(accuracies.values()),
            mode="lines+markers",
            line={"color": POSITIVE},
            name="truncated",
            hovertemplate="%{x} eigenvectors<br>accuracy %{y:.3f}<extra></extra>",
        )
    )
    figure.add_hline(
        y=full,
        line={"color": NEUTRAL, "dash": "dash"},
        annotation_text=f"whole model {full:.3f}",
        annotation_position="bottom right",
    )
    return figure.update_layout(
        **LAYOUT,
        xaxis={"title": "eigenvectors kept for each class", "tickvals": list(accuracies)},
        yaxis={"title": "test accuracy", "range": [0, 1.02]},
        width=560,
        height=340,
        showlegend=False,
    )
