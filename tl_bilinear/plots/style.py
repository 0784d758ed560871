"""One look for all figures, and the pieces they are built from.

Blue is positive, red negative, white zero.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

POSITIVE, NEGATIVE, NEUTRAL = "#2166ac", "#b2182b", "#6b6b6b"

DIVERGING = [
    [0.0, "#67001f"],
    [0.15, "#b2182b"],
    [0.35, "#f4a582"],
    [0.5, "#ffffff"],
    [0.65, "#92c5de"],
    [0.85, "#2166ac"],
    [1.0, "#053061"],
]

LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
    "margin": {"l": 55, "r": 15, "t": 40, "b": 45},
    # Its buttons lie on titles and column heads; dragging still zooms, a double click goes back.
    "modebar": {
        "remove": [
            "toImage",
            "zoom",
            "pan",
            "select",
            "lasso",
            "zoomIn",
            "zoomOut",
            "autoScale",
            "resetScale",
        ]
    },
}

TITLE_SIZE, TITLE_LINE = 15, 20  # pixels: letters, and from line to line
_LETTER = 0.54 * TITLE_SIZE  # mean width of a letter, in a wide font
_TITLE_MARGIN = 14

CATEGORICAL = ["#2166ac", "#e08214", "#4d9221", "#7b3294", "#b2182b", "#01665e", "#6b6b6b"]


def category(number: int) -> str:
    """The colour of the number-th of several things; the colours repeat."""
    return CATEGORICAL[number % len(CATEGORICAL)]


def by_sign(values: Iterable[float]) -> list[str]:
    """Blue for each value that is not negative, red for the others."""
    return [POSITIVE if value >= 0 else NEGATIVE for value in values]


def rounded(values: Any) -> Any:
    """Numbers as nested lists, to seven significant digits: a page's reader downloads every digit."""
    numbers = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    short_ones = [float(f"{number:.7g}") for number in numbers.flatten().tolist()]
    return np.reshape(short_ones, numbers.shape).tolist()


def short(text: str, most: int = 22) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def headline(text: str, width: float) -> tuple[dict[str, Any], int]:
    """A title that fits a figure of `width` pixels: plotly's title, and the pixels that it needs more.

    Plotly breaks no line itself, and cuts a long title off at the figure's edge. `<br>` stays a break.
    """
    most = max(int((width - 2 * _TITLE_MARGIN) / _LETTER), 10)
    lines: list[str] = []
    for given in text.split("<br>"):
        lines += textwrap.wrap(given, most, break_on_hyphens=False) or [""]
    title = {
        "text": "<br>".join(lines),
        "font": {"size": TITLE_SIZE},
        "x": 0,
        "y": 1,
        "xref": "container",
        "yref": "container",
        "xanchor": "left",
        "yanchor": "top",
        "pad": {"l": _TITLE_MARGIN, "t": 12},
    }
    return title, TITLE_LINE * (len(lines) - 1)


def line(x: Sequence[Any], y: Any, number: int, name: str) -> go.Scatter:
    """Points joined by a line, in the colour of `number`."""
    style = {"color": category(number), "width": 1.8}
    return go.Scatter(x=list(x), y=rounded(y), mode="lines+markers", name=name, line=style)


def band(x: Sequence[Any], low: Any, high: Any, number: int) -> go.Scatter:
    """The area between two lines, in the pale colour of `number`."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*rounded(high), *reversed(rounded(low))],
        fill="toself",
        fillcolor=category(number),
        opacity=0.15,
        mode="none",
        showlegend=False,
        hoverinfo="skip",
    )


def heatmap(values: Tensor, x: Sequence[str], y: Sequence[str], **options: Any) -> go.Heatmap:
    """A matrix in blue and red, white at zero; `options` are plotly's."""
    scale = float(values.abs().max()) or 1.0
    look = {"zmin": -scale, "zmax": scale, "colorscale": DIVERGING}
    return go.Heatmap(z=rounded(values), x=list(x), y=list(y), **look | options)


def bars(places: Sequence[Any], values: Any, **options: Any) -> go.Bar:
    """Horizontal bars at places or names, blue or red by sign; `options` are plotly's."""
    numbers = rounded(values)
    look = {"orientation": "h", "marker_color": by_sign(numbers), "showlegend": False}
    return go.Bar(x=numbers, y=list(places), **look | options)


def sized(
    figure: go.Figure, width: int, height: int, *, title: str = "", **layout: Any
) -> go.Figure:
    """The figure with the common layout at a size; `layout` adds to it.

    A title that takes several lines makes the figure higher; what is drawn keeps its size.
    """
    heading, more = headline(title, width)
    look = LAYOUT | layout
    look["margin"] = look["margin"] | {"t": look["margin"]["t"] + more}
    figure.update_yaxes(ticklabelstandoff=4)
    return figure.update_layout(**look, title=heading, width=width, height=height + more)
