"""Figures of a layer between two dictionaries (Pearce et al. 2025, Fig. 8, 9 and 24)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.plots.style import (
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    bars,
    category,
    heatmap,
    rounded,
    short,
    sized,
)

if TYPE_CHECKING:
    from tl_bilinear.features import (
        ActivationScatter,
        Attribution,
        EigenGeometry,
        FeatureEffects,
        FeatureSweep,
        InteractionStatistics,
        LowRankCorrelation,
        RankedPairs,
        Submatrix,
    )

_SYMBOLS = ("square", "triangle-up", "triangle-down", "circle", "diamond", "cross", "x", "star")


def _of(result: Any) -> str:
    """The start of a title: which output feature it is, its label cut where it is a sentence."""
    return f"output feature {short(result.output_name(result.feature), 80)}"


def submatrix_figure(result: Submatrix) -> go.Figure:
    """Interactions among the input features of the strongest pairs, as a heatmap (Fig. 8A)."""
    labels = [short(label) for label in result.labels]
    look = {"colorbar": {"title": "entry", "thickness": 12, "exponentformat": "power"}}
    figure = go.Figure(heatmap(result.matrix, labels, labels, **look))
    figure.update_traces(hovertemplate="%{y} x %{x}<br>%{z:.4f}<extra></extra>")
    side = 200 + 26 * len(labels)
    return sized(
        figure,
        side + 120,
        side,
        margin={"l": 10, "r": 10, "t": 45, "b": 10},
        title=_of(result),
        xaxis={"type": "category", "constrain": "domain", "automargin": True},
        yaxis={
            "type": "category",
            "scaleanchor": "x",
            "constrain": "domain",
            "automargin": True,
            "autorange": "reversed",
        },
    )


def statistics_figure(result: InteractionStatistics) -> go.Figure:
    """All interactions as histograms, and the spectrum beside a random matrix's (Fig. 24)."""
    figure = make_subplots(
        cols=2, rows=1, horizontal_spacing=0.12, subplot_titles=["interactions", "eigenvalues"]
    )
    for number, (name, shares) in enumerate(
        (("cross", result.cross_shares), ("self", result.self_shares))
    ):
        steps = go.Scatter(
            x=((result.edges[1:] + result.edges[:-1]) / 2).tolist(),
            y=[share if share > 0 else None for share in shares.tolist()],
            mode="lines",
            line={"shape": "hvh", "color": category(number)},
            name=name,
        )
        figure.add_trace(steps, row=1, col=1)
    ranks = list(range(1, len(result.eigenvalues) + 1))
    own = go.Scatter(
        x=ranks,
        y=result.eigenvalues.tolist(),
        mode="markers",
        marker={"size": 5, "color": POSITIVE},
        name="eigenvalues",
    )
    random = go.Scatter(
        x=ranks,
        y=result.reference.tolist(),
        mode="lines",
        line={"color": NEGATIVE, "dash": "dash"},
        name="random matrix of the same norm",
    )
    figure.add_traces([own, random], rows=1, cols=2)
    figure.update_yaxes(type="log", title="share of entries", exponentformat="power", row=1, col=1)
    figure.update_xaxes(title="entry of the interaction matrix", row=1, col=1)
    figure.update_xaxes(title="rank", row=1, col=2)
    return sized(
        figure,
        900,
        380,
        margin={"l": 60, "r": 15, "t": 70, "b": 45},
        title=_of(result),
        legend={"orientation": "h", "y": -0.2},
    )


def _with_room(values: Tensor) -> list[float]:
    """The range of values, with room for a name above the outermost."""
    low, high = float(values.min()), float(values.max())
    room = 0.15 * (high - low or 1.0)
    return [low - room, high + room]


def geometry_figure(result: EigenGeometry, axes: tuple[int, int] = (0, 1)) -> go.Figure:
    """Directions along two eigenvectors, by cosine; symbols are clusters (Fig. 8B)."""
    across, up = axes
    figure = go.Figure()
    for cluster in sorted(set(result.clusters.tolist())):
        chosen = [i for i, c in enumerate(result.clusters.tolist()) if c == cluster]
        figure.add_trace(
            go.Scatter(
                x=result.cosines[chosen, across].tolist(),
                y=result.cosines[chosen, up].tolist(),
                mode="markers+text",
                text=[short(result.names[i], 14) for i in chosen],
                textposition="top center",
                textfont={"size": 10},
                marker={
                    "size": 9,
                    "symbol": _SYMBOLS[(cluster - 1) % len(_SYMBOLS)],
                    "color": category(cluster - 1),
                },
                name=f"cluster {cluster}",
            )
        )
    figure.update_traces(cliponaxis=False)
    figure.add_hline(y=0, line={"color": "#cccccc", "width": 1})
    figure.add_vline(x=0, line={"color": "#cccccc", "width": 1})

    def name(axis: int) -> str:
        return f"cosine with v{axis + 1} (λ = {float(result.eigenvalues[axis]):+.3g})"

    return sized(
        figure,
        620,
        520,
        title=_of(result),
        xaxis={"title": name(across), "range": _with_room(result.cosines[:, across])},
        yaxis_title=name(up),
    )


def correlation_figure(result: LowRankCorrelation, min_active: int = 10) -> go.Figure:
    """Mean correlation against the number of eigenvectors, and its distribution (Fig. 9A, B)."""
    ranks = list(range(1, result.active.shape[1] + 1))
    kept = result.enough(min_active)
    rank = min(2, len(ranks))
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=["mean correlation", f"with {rank} eigenvectors, active only"],
    )
    for name, means, color in (
        ("active tokens", result.mean_active(min_active), POSITIVE),
        ("all tokens", result.mean_everywhere(min_active), NEUTRAL),
    ):
        curve = go.Scatter(
            x=ranks, y=means.tolist(), mode="lines+markers", line={"color": color}, name=name
        )
        figure.add_trace(curve, row=1, col=1)
    distribution = go.Histogram(
        x=result.active[kept, rank - 1].tolist(),
        xbins={"start": -1, "end": 1, "size": 0.05},
        marker_color=POSITIVE,
        showlegend=False,
    )
    figure.add_trace(distribution, row=1, col=2)
    figure.update_xaxes(
        title="eigenvectors", tickvals=ranks if len(ranks) <= 12 else None, row=1, col=1
    )
    figure.update_yaxes(range=[0, 1.02], row=1, col=1)
    figure.update_xaxes(title="correlation", row=1, col=2)
    figure.update_yaxes(title="features", row=1, col=2)
    return sized(
        figure,
        900,
        380,
        margin={"l": 55, "r": 15, "t": 70, "b": 45},
        title=f"{int(kept.sum())} features active on at least {min_active} of {result.tokens:,} tokens",
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
    return sized(
        figure,
        520,
        460,
        title=_of(result),
        xaxis_title=f"approximation by {result.k} eigenvectors",
        yaxis_title="pre-activation",
    )


def attribution_figure(result: Attribution, k: int = 12) -> go.Figure:
    """What made one activation: the k largest pairs of features, and everything in a few sums."""
    pairs = result.to_pandas(k)
    names = [
        short(row["label_first"])
        + ("²" if row["kind"] == "self" else f" × {short(row['label_second'])}")
        for row in pairs.to_dict("records")
    ]
    terms = {name: value for name, value in result.terms().items() if value}
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.35,
        subplot_titles=["largest pairs of features", f"everything: sum {result.total:+.3f}"],
    )
    for column, (labels, values) in enumerate(
        ((names, pairs["contribution"].tolist()), (list(terms), list(terms.values()))), start=1
    ):
        places = list(range(len(labels)))
        figure.add_trace(bars(places, values), row=1, col=column)
        figure.update_yaxes(
            tickvals=places,
            ticktext=labels,
            autorange="reversed",
            automargin=True,
            row=1,
            col=column,
        )
    figure.update_xaxes(title="contribution", zeroline=True, zerolinecolor=NEUTRAL)
    return sized(
        figure,
        900,
        150 + 22 * max(len(names), len(terms)),
        margin={"l": 10, "r": 15, "t": 80, "b": 45},
        title=f"{_of(result)} at position {result.position}: pre-activation {result.measured:+.3f}",
    )


def _pair_name(row: dict[Any, Any], alone: bool = False) -> str:
    """A pair by numbers and labels (two features may have one label); `alone`: of one feature."""

    def name(which: str) -> str:
        number, label = str(row[which]), str(row.get(f"label_{which}", row[which]))
        return number if label == number else f"{number} {short(label)}"

    if alone:
        return name("first")
    return f"{name('first')}²" if row["kind"] == "self" else f"{name('first')} × {name('second')}"


def effects_figure(result: FeatureEffects, k: int = 12) -> go.Figure:
    """What an output feature is made of on a population: main effects beside interactions, as shares."""
    table = result.to_pandas(k)
    shown, sums = table[: len(table) - 3], table[len(table) - 3 :]
    names = [_pair_name(row, row["kind"] == "main") for row in shown.to_dict("records")]
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.3, subplot_titles=["largest parts", "everything: 1"]
    )
    columns = ((names, shown["share"].tolist()), (sums["kind"].tolist(), sums["share"].tolist()))
    for column, (labels, values) in enumerate(columns, start=1):
        places = list(range(len(labels)))
        figure.add_trace(bars(places, values), row=1, col=column)
        figure.update_yaxes(
            tickvals=places,
            ticktext=labels,
            autorange="reversed",
            automargin=True,
            row=1,
            col=column,
        )
    figure.update_xaxes(title="share of the variance", zeroline=True, zerolinecolor=NEUTRAL)
    return sized(
        figure,
        900,
        150 + 22 * max(len(names), 3),
        margin={"l": 10, "r": 15, "t": 80, "b": 45},
        title=f"{_of(result)}, on {result.tokens:,} tokens",
    )


def ranked_pairs_figure(result: RankedPairs, k: int = 12) -> go.Figure:
    """The k first pairs in their order, by all three measures, each beside its largest."""
    shown = result.top(min(k, len(result.first)))
    table = shown.to_pandas()
    names = [_pair_name(row) for row in table.to_dict("records")]
    titles = ["coefficient", "mean on all tokens", "mean where active"]
    figure = make_subplots(
        rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles
    )
    places = list(range(len(names)))
    measures = (shown.coefficients, shown.on_text, shown.where_active)
    for column, values in enumerate(measures, start=1):
        figure.add_trace(bars(places, values.detach()), row=1, col=column)
    figure.update_yaxes(tickvals=places, ticktext=names, automargin=True)
    figure.update_yaxes(autorange="reversed", col=1, row=1)
    return sized(
        figure,
        900,
        140 + 22 * len(names),
        showlegend=False,
        margin={"l": 10, "r": 15, "t": 80, "b": 40},
        title=f"{_of(result)}, active on {result.active_tokens:,} of {result.tokens:,} tokens",
    )


def feature_sweep_figure(result: FeatureSweep) -> go.Figure:
    """Output features by size and simplicity: ||Q|| against the share that the leading pairs hold.

    Colour is `and_gate`, how much more the strongest pair's features do together than alone.
    """
    figure = go.Figure(
        go.Scattergl(
            x=rounded(result.norms),
            y=rounded(result.share),
            mode="markers",
            marker={
                "size": 5,
                "color": rounded(result.and_gate),
                "colorscale": "Blues",
                "cmin": 0,
                "cmax": 1,
                "colorbar": {"title": "and gate", "thickness": 12},
            },
            hovertext=[f"output feature {result.output_name(i)}" for i in result.features.tolist()],
        )
    )
    figure.update_xaxes(title="norm of the interaction matrix", type="log")
    figure.update_yaxes(
        title=f"share of its square in {result.values.shape[1]} eigenpairs", range=[0, 1.02]
    )
    return sized(figure, 640, 460, title=f"{len(result)} output features")
