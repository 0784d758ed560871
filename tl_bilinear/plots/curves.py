"""Figures of training runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.colors import qualitative

from tl_bilinear.plots.style import LAYOUT

if TYPE_CHECKING:
    import pandas as pd


def loss_figure(curves: Mapping[str, pd.DataFrame], *, title: str = "") -> go.Figure:
    """Training loss (thin) and validation loss (dots) over the steps, one colour for each run.

    `curves`: by name, tables with columns step, loss and eval_loss, as `LanguageRun.to_pandas()` gives
    them. A row may lack one of the losses.
    """
    figure = go.Figure()
    for index, (name, curve) in enumerate(curves.items()):
        colour = qualitative.D3[index % len(qualitative.D3)]
        for column, mode, label, width in (
            ("loss", "lines", "training", 1.2),
            ("eval_loss", "lines+markers", "validation", 2.4),
        ):
            shown = curve.dropna(subset=[column])
            figure.add_trace(
                go.Scatter(
                    x=shown["step"],
                    y=shown[column],
                    mode=mode,
                    line={"color": colour, "width": width},
                    opacity=0.6 if column == "loss" else 1.0,
                    name=f"{name}, {label}",
                    hovertemplate=f"{name}<br>step %{{x}}<br>%{{y:.3f}} nats<extra></extra>",
                )
            )
    figure.update_layout(**LAYOUT, title=title, width=760, height=400)
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats a token")
    return figure
