"""Figures of training runs of language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_bilinear.plots.style import NEUTRAL, category, sized

if TYPE_CHECKING:
    from tl_bilinear.recipes.language import FinetuneComparison, LanguageRun


def loss_figure(runs: LanguageRun | Mapping[str, LanguageRun], *, title: str = "") -> go.Figure:
    """Training loss (thin) and validation loss (dots) over the steps, one colour for each run.

    `runs`: one, or several by name.
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    figure = go.Figure()
    for number, (name, run) in enumerate(named.items()):
        curve = run.to_pandas()
        for column, mode, label, width in (
            ("loss", "lines", "training", 1.2),
            ("eval_loss", "lines+markers", "validation", 2.4),
        ):
            shown = curve.dropna(subset=[column])  # not every step logs both losses
            figure.add_trace(
                go.Scatter(
                    x=shown["step"],
                    y=shown[column],
                    mode=mode,
                    line={"color": category(number), "width": width},
                    opacity=0.6 if column == "loss" else 1.0,
                    name=f"{name}, {label}" if name else label,
                    hovertemplate=f"{name}<br>step %{{x}}<br>%{{y:.3f}} nats<extra></extra>",
                )
            )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats a token")
    return sized(figure, 760, 400, title=title)


def finetune_figure(result: FinetuneComparison, *, title: str = "") -> go.Figure:
    """Validation loss of each run and of the baseline, and the gap between them (Fig. 22).

    A dotted line in a run's colour marks where its gates have become affine.
    """
    figure = make_subplots(
        cols=2, rows=1, horizontal_spacing=0.14, subplot_titles=["validation loss", "gap"]
    )
    curves = result.curves()
    for number, (name, own) in enumerate(curves.groupby("run", sort=False)):
        # The baseline comes first; it has no gap.
        run = result.runs.get(str(name), result.baseline)
        color = category(number - 1) if number else NEUTRAL
        shown = str(name) if number else "gate as it was"
        for column, values in enumerate(("loss", "gap")[: 1 + (number > 0)], start=1):
            points = own.dropna(subset=[values])
            figure.add_trace(
                go.Scatter(
                    x=points["step"],
                    y=points[values],
                    mode="lines+markers",
                    line={"color": color, "width": 2},
                    marker={"size": 5},
                    name=f"{shown}, {run.loss:.3f}",
                    legendgroup=shown,
                    showlegend=column == 1,
                    hovertemplate=f"{shown}<br>step %{{x}}<br>%{{y:.4f}} nats<extra></extra>",
                ),
                row=1,
                col=column,
            )
        if run.config.anneals:
            end = run.config.anneal * run.steps
            figure.add_vline(end, line={"color": color, "dash": "dot", "width": 1})
    figure.add_hline(0, line={"color": NEUTRAL, "width": 1}, row=1, col=2)
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats a token", row=1, col=1)
    figure.update_yaxes(title="nats a token more", row=1, col=2)
    return sized(
        figure,
        880,
        420,
        title=title or "Loss while the gates become affine, and beside the gate as it was",
        margin_t=75,
        legend={"title": "run, loss at the end", "x": 1.02},
    )
