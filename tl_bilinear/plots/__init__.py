"""Plotly figures of results; nothing is computed here. Importing it needs plotly."""

from tl_bilinear.plots.curves import loss_figure
from tl_bilinear.plots.features import (
    correlation_figure,
    geometry_figure,
    scatter_figure,
    statistics_figure,
    submatrix_figure,
)
from tl_bilinear.plots.finetuning import finetune_figure
from tl_bilinear.plots.images import eigenvector_figure, spectra_figure, truncation_figure

__all__ = [
    "correlation_figure",
    "eigenvector_figure",
    "finetune_figure",
    "geometry_figure",
    "loss_figure",
    "scatter_figure",
    "spectra_figure",
    "statistics_figure",
    "submatrix_figure",
    "truncation_figure",
]
