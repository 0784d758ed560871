"""Figures of a layer between two dictionaries (Pearce et al. 2025, Fig. 8, 9 and 24)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_bilinear.plots.style import DIVERGING, LAYOUT, NEGATIVE, NEUTRAL, POSITIVE

if TYPE_CHECKING:
    from tl_bilinear.features import (
        ActivationScatter,
        EigenGeometry,
        InteractionStatistics,
        LowRankCorrelation,
        Submatrix,
    )

_SYMBOLS = ("square", "triangle-up", "triangle-down", "circle", "diamond", "cross", "x", "star")
_COLORS = ("#2166ac", "#1a9850", "#e08214", "#762a83", "#666666", "#b2182b", "#01665e", "#8c510a")


def submatrix_figure(result: Submatrix) -> go.Figure:
    """Interactions among the input features of the strongest pairs, as a heatmap (Fig. 8A)."""
    scale = float(result.matrix.abs().max()) or 1.0
    labels = [_short(label) for label in result.labels]
    figure = go.Figure(
        go.Heatmap(
            z=result.matrix.flip(0).tolist(),
            x=labels,
            y=labels[::-1],
            zmin=-scale,
            zmax=scale,
            colorscale=DIVERGING,
            colorbar={"title": "entry", "thickness": 12},
            hovertemplate="%{y} x %{x}<br>%{z:.4f}<extra></extra>",
        )
    )
    side = 200 + 26 * len(labels)
    return figure.update_layout(
        **LAYOUT | {"margin": {"l": 10, "r": 10, "t": 45, "b": 10}},
        title=f"output feature {result.output_name(result.feature)}",
        xaxis={"type": "category", "constrain": "domain", "automargin": True},
        yaxis={"type": "category", "scaleanchor": "x", "constrain": "domain", "automargin": True},
        width=side + 120,
        height=side,
    )


def statistics_figure(result: InteractionStatistics) -> go.Figure:
    """All interactions as histograms, and the spectrum beside a random matrix's (Fig. 24)."""
    figure = make_subplots(
        cols=2, rows=1, horizontal_spacing=0.12, subplot_titles=["interactions", "eigenvalues"]
    )
    centres = (result.edges[1:] + result.edges[:-1]) / 2
    for name, counts, color in (
        ("cross", result.counts, POSITIVE),
        ("self", result.self_counts, "#e08214"),
    ):
        share = counts / counts.sum().clamp_min(1)
        figure.add_trace(
            go.Scatter(
                x=centres.tolist(),
                y=[v if v > 0 else None for v in share.tolist()],
                mode="lines",
                line={"shape": "hvh", "color": color},
                name=name,
            ),
            row=1,
            col=1,
        )
    ranks = list(range(1, len(result.eigenvalues) + 1))
    figure.add_trace(
        go.Scatter(
            x=ranks,
            y=result.eigenvalues.tolist(),
            mode="markers",
            marker={"size": 5, "color": POSITIVE},
            name="eigenvalues",
        ),
        row=1,
        col=2,
    )
    figure.add_trace(
        go.Scatter(
            x=ranks,
            y=result.reference.tolist(),
            mode="lines",
            line={"color": NEGATIVE, "dash": "dash"},
            name="random matrix of the same norm",
        ),
        row=1,
        col=2,
    )
    figure.update_yaxes(type="log", title="share of entries", exponentformat="power", row=1, col=1)
    figure.update_xaxes(title="entry of the interaction matrix", row=1, col=1)
    figure.update_xaxes(title="rank", row=1, col=2)
    return figure.update_layout(
        **LAYOUT | {"margin": {"l": 60, "r": 15, "t": 70, "b": 45}},
        title=f"output feature {result.output_name(result.feature)}",
        width=900,
        height=380,
        legend={"orientation": "h", "y": -0.2},
    )


def geometry_figure(result: EigenGeometry, axes: tuple[int, int] = (0, 1)) -> go.Figure:
    """Directions along two eigenvectors, by cosine; symbols are clusters (Fig. 8B)."""
    first, second = axes
    figure = go.Figure()
    for cluster in sorted(set(result.clusters.tolist())):
        chosen = [i for i, c in enumerate(result.clusters.tolist()) if c == cluster]
        figure.add_trace(
            go.Scatter(
                x=result.cosines[chosen, first].tolist(),
                y=result.cosines[chosen, second].tolist(),
                mode="markers+text",
                text=[_short(result.names[i], 14) for i in chosen],
                textposition="top center",
                textfont={"size": 10},
                marker={
                    "size": 9,
                    "symbol": _SYMBOLS[(cluster - 1) % len(_SYMBOLS)],
                    "color": _COLORS[(cluster - 1) % len(_COLORS)],
                },
                name=f"cluster {cluster}",
            )
        )
    figure.add_hline(y=0, line={"color": "#cccccc", "width": 1})
    figure.add_vline(x=0, line={"color": "#cccccc", "width": 1})

    def title(axis: int) -> str:
        return f"cosine with v{axis + 1} (λ = {float(result.eigenvalues[axis]):+.3g})"

    return figure.update_layout(
        **LAYOUT,
        title=f"output feature {result.output_name(result.feature)}",
        xaxis_title=title(first),
        yaxis_title=title(second),
        width=620,
        height=520,
    )


def correlation_figure(result: LowRankCorrelation, min_active: int = 10) -> go.Figure:
    """Mean correlation against the number of eigenvectors, and its distribution (Fig. 9A, B)."""
    ranks = list(range(1, result.active.shape[1] + 1))
    kept = result.enough(min_active)
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=["mean correlation", f"with {min(2, len(ranks))} eigenvectors, active only"],
    )
    for name, values, color in (
        ("active tokens", result.active[kept], POSITIVE),
        ("all tokens", result.everywhere[kept], NEUTRAL),
    ):
        figure.add_trace(
            go.Scatter(
                x=ranks,
                y=values.nanmean(0).tolist(),
                mode="lines+markers",
                line={"color": color},
                name=name,
            ),
            row=1,
            col=1,
        )
    chosen = result.active[kept, min(2, len(ranks)) - 1]
    figure.add_trace(
        go.Histogram(
            x=chosen.tolist(),
            xbins={"start": -1, "end": 1, "size": 0.05},
            marker_color=POSITIVE,
            showlegend=False,
        ),
        row=1,
        col=2,
    )
    figure.update_xaxes(
        title="eigenvectors", tickvals=ranks if len(ranks) <= 12 else None, row=1, col=1
    )
    figure.update_yaxes(range=[0, 1.02], row=1, col=1)
    figure.update_xaxes(title="correlation", row=1, col=2)
    figure.update_yaxes(title="features", row=1, col=2)
    return figure.update_layout(
        **LAYOUT | {"margin": {"l": 55, "r": 15, "t": 70, "b": 45}},
        title=f"{int(kept.sum())} features active on at least {min_active} of {result.tokens:,} tokens",
        width=900,
        height=380,
        legend={"orientation": "h", "y": -0.2},
    )


def scatter_figure(result: ActivationScatter) -> go.Figure:
    """A feature's pre-activation against its approximation by k eigenvectors (Fig. 8C, 9C)."""
    figure = go.Figure()
    for name, chosen, color, size in (
        ("not active", ~result.active, "#bbbbbb", 3),
        ("active", result.active, POSITIVE, 6),
    ):
        figure.add_trace(
            go.Scattergl(
                x=result.approximation[chosen].tolist(),
                y=result.measured[chosen].tolist(),
                mode="markers",
                marker={"size": size, "color": color},
                name=name,
            )
        )
    return figure.update_layout(
        **LAYOUT,
        title=f"output feature {result.output_name(result.feature)}",
        xaxis_title=f"approximation by {result.k} eigenvectors",
        yaxis_title="pre-activation",
        width=520,
        height=460,
    )


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
