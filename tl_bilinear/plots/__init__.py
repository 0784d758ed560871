"""Plotly figures of results; nothing is computed here. Importing it needs plotly."""

from tl_bilinear.plots.curves import loss_figure
from tl_bilinear.plots.images import eigenvector_figure, spectra_figure, truncation_figure

__all__ = ["eigenvector_figure", "loss_figure", "spectra_figure", "truncation_figure"]
