"""Plotly figures of results; nothing is computed here. Importing it needs plotly."""

from tl_bilinear.plots.curves import loss_figure
from tl_bilinear.plots.features import (
    correlation_figure,
    geometry_figure,
    scatter_figure,
    statistics_figure,
    submatrix_figure,
)
from tl_bilinear.plots.images import eigenvector_figure, spectra_figure, truncation_figure
from tl_bilinear.plots.mosaic import mosaic_figure
from tl_bilinear.plots.studies import (
    certificates_figure,
    explanation_figure,
    gallery_figure,
    hosvd_figure,
    mask_effect_figure,
    masks_figure,
    neuron_gallery_figure,
    neurons_figure,
    parts_figure,
    similarity_figure,
    sizes_truncation_figure,
    sparsity_figure,
    sweep_figure,
    sweep_numbers_figure,
    target_figure,
    toy_figure,
)

__all__ = [
    "certificates_figure",
    "correlation_figure",
    "eigenvector_figure",
    "explanation_figure",
    "gallery_figure",
    "geometry_figure",
    "hosvd_figure",
    "loss_figure",
    "mask_effect_figure",
    "masks_figure",
    "mosaic_figure",
    "neuron_gallery_figure",
    "neurons_figure",
    "parts_figure",
    "scatter_figure",
    "similarity_figure",
    "sizes_truncation_figure",
    "sparsity_figure",
    "spectra_figure",
    "statistics_figure",
    "submatrix_figure",
    "sweep_figure",
    "sweep_numbers_figure",
    "target_figure",
    "toy_figure",
    "truncation_figure",
]
