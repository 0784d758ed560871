"""The figure of a model made bilinear by finetuning (Pearce et al. 2025, Fig. 22)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from tl_bilinear.plots.style import LAYOUT, NEUTRAL

if TYPE_CHECKING:
    from tl_bilinear.recipes.language import FinetuneComparison, FinetuneRun


def finetune_figure(result: FinetuneComparison) -> go.Figure:
    """Validation loss of each run and of the baseline, and the gap between them, over the steps.

    A dotted line of a run's colour marks where its gates are affine.
    """
    figure = make_subplots(
        cols=2, rows=1, horizontal_spacing=0.12, subplot_titles=["validation loss", "gap"]
    )
    baseline = _validation(result.baseline)
    runs = {"gate as it was": (result.baseline, NEUTRAL)} | {
        name: (run, qualitative.D3[index % len(qualitative.D3)])
        for index, (name, run) in enumerate(result.runs.items())
    }
    for name, (run, colour) in runs.items():
        losses = _validation(run)
        at_start = {0: result.start_loss} if run.config.path != "closed" else {}
        gaps = {step: losses[step] - baseline[step] for step in losses if step in baseline}
        columns = [at_start | losses] if run is result.baseline else [at_start | losses, gaps]
        for column, values in enumerate(columns, start=1):
            figure.add_trace(
                go.Scatter(
                    x=list(values),
                    y=list(values.values()),
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"size": 5},
                    name=f"{name}, {run.loss:.3f}",
                    legendgroup=name,
                    showlegend=column == 1,
                    hovertemplate=f"{name}<br>step %{{x}}<br>%{{y:.4f}} nats<extra></extra>",
                ),
                row=1,
                col=column,
            )
        if run.config.anneals:
            figure.add_vline(
                run.config.anneal * run.steps, line={"color": colour, "dash": "dot", "width": 1}
            )
    figure.add_hline(0, line={"color": NEUTRAL, "width": 1}, row=1, col=2)
    figure.update_layout(
        **LAYOUT, width=960, height=420, legend={"title": "run, loss at the end", "x": 1.02}
    )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats a token", row=1, col=1)
    return figure.update_yaxes(title="nats a token above the baseline", row=1, col=2)


def _validation(run: FinetuneRun) -> dict[int, float]:
    return {int(e["step"]): e["eval_loss"] for e in run.history if "eval_loss" in e}
