"""Figures of decompositions of a layer, and of lists of its strongest parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.plots.mosaic import mosaic_figure
from tl_bilinear.plots.style import (
    DIVERGING,
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    bars,
    heatmap,
    line,
    rounded,
    short,
    sized,
)

if TYPE_CHECKING:
    from tl_bilinear.tensor import (
        CP,
        HOSVD,
        ChangeBounds,
        Eigendecomposition,
        Spectrum,
        TopInteractions,
    )

_SHOWN_EIGENVALUES = 20


def eigenvalues_figure(
    eigen: Eigendecomposition, *, names: Sequence[str] | None = None, title: str = ""
) -> go.Figure:
    """The eigenvalues, largest to most negative, one line for each matrix; `names` are the matrices'."""
    values = eigen.values.detach().reshape(-1, eigen.k)
    names = [f"matrix {i}" for i in range(len(values))] if names is None else names
    figure = go.Figure()
    for number, (row, name) in enumerate(zip(values, names, strict=True)):
        ordered = row.sort(descending=True).values
        trace = line(range(1, eigen.k + 1), ordered, number, name)
        figure.add_trace(trace.update(marker_size=4))
    figure.add_hline(0, line={"color": NEUTRAL, "width": 1})
    figure.update_xaxes(title="rank")
    figure.update_yaxes(title="eigenvalue")
    return sized(figure, 560, 340, title=title, showlegend=len(values) > 1)


def eigenvectors_figure(
    eigen: Eigendecomposition,
    size: Sequence[int] | None = None,
    *,
    k: int = 4,
    names: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """The k top eigenvectors of each sign, with their eigenvalues (Fig. 2, 3 and 10 to 12).

    Parameters
    ----------
    eigen: of one matrix (shown beside its eigenvalues) or of several (one row each)
    size: (height, width) where the coordinates are an image's pixels; otherwise each eigenvector is one
        row of a heatmap of coordinates
    names: of the matrices, or, for a heatmap, of the coordinates

    Each image is blue where positive and red where negative, on its own scale. The overall sign of an
    eigenvector means nothing; that of its eigenvalue does.

    Raises ValueError for a size that does not have d pixels, or several matrices without a size.
    """
    if size is None:
        return _coordinates(eigen, k, names, title)
    if size[0] * size[1] != eigen.d:
        raise ValueError(
            f"images of size {size[0]}x{size[1]} have {size[0] * size[1]} pixels, but the eigenvectors "
            f"have {eigen.d} coordinates"
        )
    if not eigen.batch_shape:
        return _beside_spectrum(eigen, size, k, title)
    values, vectors = eigen.values.reshape(-1, eigen.k), eigen.vectors.reshape(-1, eigen.k, eigen.d)
    ends = [both_ends(row, pictures, k) for row, pictures in zip(values, vectors, strict=True)]
    return mosaic_figure(
        torch.stack([tiles for tiles, _ in ends]),
        size,
        rows=[f"matrix {i}" for i in range(len(ends))] if names is None else names,
        columns=[f"{sign}{i + 1}" for sign in "+-" for i in range(k)],
        captions=[captions for _, captions in ends],
        title=title,
    )


def filters_figure(
    eigen: Eigendecomposition,
    size: Sequence[int],
    *,
    k: int = 2,
    names: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """The k top positive eigenvectors of matrices in a metric: each as a filter and as a pattern.

    A filter is what an image is multiplied with; its pattern is what images that excite it have in
    common (`Eigendecomposition.patterns`). To know what a term answers to, look at the pattern.

    Parameters
    ----------
    eigen: of several matrices, one row each
    size: (height, width) of the images that the coordinates are; names: of the matrices

    Raises ValueError for eigenvectors without a metric, where the two are the same.
    """
    if eigen.metric is None:
        raise ValueError(
            "filters and patterns differ in a metric: eigh(metric=moments.metric(ridge))"
        )
    values = eigen.values.reshape(-1, eigen.k)
    signs = torch.where(
        eigen.patterns.sum(-1, keepdim=True) < 0, -1.0, 1.0
    )  # mostly blue: arbitrary
    pictures = [
        (signs * each).reshape(-1, eigen.k, eigen.d).to(values)
        for each in (eigen.vectors, eigen.patterns)
    ]
    tiles, captions = [], []
    for i, row in enumerate(values):
        ends = [both_ends(row, each[i], k) for each in pictures]
        tiles.append(torch.stack([both[:k] for both, _ in ends], 1).flatten(0, 1))
        captions.append([text for value in ends[0][1][:k] for text in (value, "")])
    return mosaic_figure(
        torch.stack(tiles),
        size,
        rows=[f"matrix {i}" for i in range(len(values))] if names is None else names,
        columns=[f"{kind} {i + 1}" for i in range(k) for kind in ("filter", "pattern")],
        captions=captions,
        title=title,
    )


def both_ends(values: Tensor, images: Tensor, k: int) -> tuple[Tensor, list[str]]:
    """The k largest positive, then the k most negative: images [2 k, pixels] and their values as text.

    `values` [n] belong to `images` [n, pixels]. Where a sign has fewer, tiles are NaN and texts empty.
    """
    tiles = images.new_full((2 * k, images.shape[-1]), torch.nan)
    captions = [""] * (2 * k)
    for start, chosen in ((0, _top_of(values, 1)[:k]), (k, _top_of(values, -1)[:k])):
        for place, index in enumerate(chosen, start=start):
            tiles[place] = images[index]
            captions[place] = f"{float(values[index]):+.2f}"
    return tiles, captions


def _top_of(values: Tensor, sign: int) -> list[int]:
    """Indices of the values of one sign, by falling magnitude."""
    order = (sign * values).argsort(descending=True).tolist()
    return [i for i in order if sign * values[i] > 0]


def _beside_spectrum(
    eigen: Eigendecomposition, size: Sequence[int], k: int, title: str
) -> go.Figure:
    values = eigen.values.detach()
    rows = [_top_of(values, sign)[:k] for sign in (1, -1)]
    names = []
    for chosen in rows:
        names += [f"λ = {float(values[i]):+.3f}" for i in chosen] + [""] * (k - len(chosen))
    figure = make_subplots(
        rows=2,
        cols=k + 1,
        specs=[[{"rowspan": 2}] + [{}] * k, [None] + [{}] * k],
        column_widths=[1.7] + [1.0] * k,
        horizontal_spacing=0.015,
        vertical_spacing=0.11,
        subplot_titles=["", *names],
    )
    _add_spectrum(figure, values)
    for row, chosen in enumerate(rows, start=1):
        for column, index in enumerate(chosen, start=2):
            picture = eigen.vectors[index].detach().reshape(size)
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
    margin = {"l": 50, "r": 10, "t": 62, "b": 42}
    return sized(figure, 250 + 150 * k, 380, title=title, showlegend=False, margin=margin)


def _add_spectrum(figure: go.Figure, values: Tensor) -> None:
    ordered = values.sort(descending=True).values
    shown = min(_SHOWN_EIGENVALUES, len(ordered) // 2)
    for name, part, color in (
        ("positive", ordered[:shown].clamp_min(0), POSITIVE),
        ("negative", ordered.flip(0)[:shown].clamp_max(0), NEGATIVE),
    ):
        figure.add_trace(
            go.Scatter(
                x=list(range(1, shown + 1)),
                y=rounded(part),
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


def _coordinates(
    eigen: Eigendecomposition, k: int, names: Sequence[str] | None, title: str
) -> go.Figure:
    if eigen.batch_shape:
        raise ValueError(
            f"without a size the figure shows one matrix, and these are {list(eigen.batch_shape)}: "
            f"index the eigendecomposition first"
        )
    values = eigen.values.detach()
    chosen = _top_of(values, 1)[:k] + _top_of(values, -1)[:k]
    coordinates = list(map(str, range(eigen.d))) if names is None else [short(n) for n in names]
    rows = [f"λ = {float(values[i]):+.3g}" for i in chosen]
    if len(set(rows)) < len(rows):  # equal eigenvalues are rows of their own
        rows = [f"{row} ({number})" for number, row in enumerate(rows, start=1)]
    figure = go.Figure(heatmap(eigen.vectors[chosen].detach(), coordinates, rows))
    figure.update_xaxes(title=eigen.space or "coordinate", type="category", nticks=20)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return sized(figure, 760, 140 + 26 * len(rows), title=title)


def pairs_figure(
    result: TopInteractions, *, k: int = 20, labels: Sequence[str] | None = None, title: str = ""
) -> go.Figure:
    """The k strongest pairs of inputs of one matrix, as bars of their coefficients.

    `labels` names each input. Raises ValueError for the pairs of several matrices.
    """
    if result.first.ndim != 1:
        raise ValueError(
            f"the figure shows the pairs of one matrix, and these are of "
            f"{list(result.first.shape[:-1])}: index their first dimensions"
        )
    pairs = zip(result.first[:k].tolist(), result.second[:k].tolist(), strict=True)

    def name(index: int) -> str:
        return str(index) if labels is None else short(labels[index])

    names = [f"{name(b)}²" if b == c else f"{name(b)} × {name(c)}" for b, c in pairs]
    places = list(range(len(names)))
    figure = go.Figure(bars(places, result.coefficients[:k].detach()))  # two may have one name
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", automargin=True)
    figure.update_xaxes(title="coefficient", zeroline=True, zerolinecolor=NEUTRAL)
    return sized(figure, 620, 110 + 22 * len(names), title=title)


def spectrum_figure(result: Spectrum, *, title: str = "") -> go.Figure:
    """The head of every direction's spectrum, and the share of its squared norm that it holds."""
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=["eigenvalues", f"share held by {result.values.shape[1]}"],
    )
    places = list(range(1, len(result) + 1))
    hover = [f"direction {i}" for i in result.index.tolist()]
    for rank in range(result.values.shape[1]):
        trace = line(places, result.values[:, rank].detach(), rank, f"λ{rank + 1}")
        figure.add_trace(trace.update(mode="markers", marker_size=4, hovertext=hover), 1, 1)
    held = go.Scatter(
        x=places,
        y=rounded(result.share.detach()),
        mode="markers",
        marker={"size": 4, "color": POSITIVE},
        hovertext=hover,
        showlegend=False,
    )
    figure.add_trace(held, 1, 2)
    figure.update_xaxes(title="directions, by falling |λ1|")
    figure.update_yaxes(range=[0, 1.02], col=2)
    return sized(figure, 900, 360 + 30 * bool(title), title=title, margin_t=40 + 30 * bool(title))


def hosvd_figure(
    result: HOSVD, *, names: Sequence[str] | None = None, title: str = ""
) -> go.Figure:
    """Each component's singular value, and its weights on the coordinates, which `names` names."""
    figure = make_subplots(rows=1, cols=2, column_widths=[0.3, 0.7], horizontal_spacing=0.1)
    ranks = [str(i + 1) for i in range(len(result.values))]
    names = list(map(str, range(result.vectors.shape[1]))) if names is None else list(names)
    figure.add_trace(bars(ranks, result.values.detach()), 1, 1)
    figure.add_trace(heatmap(result.vectors.detach(), names, ranks), 1, 2)
    figure.update_yaxes(autorange="reversed", title="component", col=1)
    figure.update_yaxes(autorange="reversed", col=2)
    figure.update_xaxes(title="singular value", col=1)
    where = result.space or result.mode
    figure.update_xaxes(title=f"weight on each coordinate ({where})", type="category", col=2)
    return sized(figure, 800, 120 + 26 * len(ranks), showlegend=False, title=title)


def cp_figure(
    result: CP,
    size: Sequence[int] | None = None,
    *,
    k: int = 9,
    names: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """The k strongest shared neurons: what they read and what they write.

    With a `size` (height, width) the inputs are an image's pixels: for each neuron the pattern whose
    square adds, the one whose square is taken off, and the three outputs that it changes most. Without,
    its weight and what it writes to every output. `names` are the outputs'.
    """
    k = min(k, result.rank)
    names = list(map(str, range(len(result.out)))) if names is None else list(names)
    if size is None:
        figure = make_subplots(rows=1, cols=2, column_widths=[0.3, 0.7], horizontal_spacing=0.1)
        ranks = [str(i + 1) for i in range(k)]
        figure.add_trace(bars(ranks, result.weights[:k].detach()), 1, 1)
        figure.add_trace(heatmap(result.out.T[:k].detach(), names, ranks), 1, 2)
        figure.update_yaxes(autorange="reversed")
        figure.update_yaxes(title="neuron", col=1)
        figure.update_xaxes(title="weight", col=1)
        figure.update_xaxes(title="what it writes", type="category", col=2)
        return sized(figure, 800, 120 + 26 * k, title=title)
    written = []
    for column in result.out.T[:k]:
        order = column.abs().argsort(descending=True)[:3].tolist()
        lines = [f"{'raises' if column[i] > 0 else 'lowers'} {short(names[i], 8)}" for i in order]
        written.append("<br>".join(lines))
    return mosaic_figure(
        torch.stack([result.plus[:k], result.minus[:k]]),
        size,
        rows=["square adds<br>(l + m)", "square is taken off<br>(l - m)"],
        columns=written,
        title=title or "Shared neurons: what each changes most where it is positive",
    )


def change_bounds_figure(
    result: ChangeBounds, *, names: Sequence[str] | None = None, title: str = ""
) -> go.Figure:
    """Bounds on each output's change over regions of inputs, above what given inputs show.

    `names` are the outputs'. A logarithmic axis: a bound far above the measured change says little.
    """
    count = len(result.typical)
    names = [f"output {i}" for i in range(count)] if names is None else list(names)
    figure = go.Figure()
    rows = [
        (f"bound: {region}", row) for region, row in zip(result.regions, result.bound, strict=True)
    ]
    rows += [("largest measured", result.measured), ("typical (root mean square)", result.typical)]
    for number, (name, values) in enumerate(rows):
        points = line(names, values, number, name).update(mode="markers", marker_size=10)
        figure.add_trace(points)
    figure.update_xaxes(title="output", type="category")
    figure.update_yaxes(title="change of the output", type="log", exponentformat="power", dtick=1)
    return sized(figure, 820, 380, title=title)
