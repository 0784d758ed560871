"""Plotly figures. Each is a function of one result, and computes nothing. Importing it needs plotly.

Figures of the paper's studies are in the studies' own files, :mod:`tl_bilinear.paper`, built from
`style` and `mosaic_figure`.
"""

from tl_bilinear.plots.attention import (
    attention_pairs_figure,
    offset_figure,
    score_check_figure,
    score_figure,
)
from tl_bilinear.plots.decompositions import (
    change_bounds_figure,
    cp_figure,
    eigenvalues_figure,
    eigenvectors_figure,
    filters_figure,
    hosvd_figure,
    pairs_figure,
    spectrum_figure,
)
from tl_bilinear.plots.dictionaries import (
    attribution_figure,
    correlation_figure,
    effects_figure,
    feature_sweep_figure,
    geometry_figure,
    ranked_pairs_figure,
    scatter_figure,
    statistics_figure,
    submatrix_figure,
)
from tl_bilinear.plots.measured import loss_added_figure, verification_figure
from tl_bilinear.plots.mosaic import mosaic_figure
from tl_bilinear.plots.networks import graph_figure, paths_figure
from tl_bilinear.plots.training_curves import finetune_figure, loss_figure

__all__ = [
    "attention_pairs_figure",
    "attribution_figure",
    "change_bounds_figure",
    "correlation_figure",
    "cp_figure",
    "effects_figure",
    "eigenvalues_figure",
    "eigenvectors_figure",
    "feature_sweep_figure",
    "filters_figure",
    "finetune_figure",
    "geometry_figure",
    "graph_figure",
    "hosvd_figure",
    "loss_added_figure",
    "loss_figure",
    "mosaic_figure",
    "offset_figure",
    "pairs_figure",
    "paths_figure",
    "ranked_pairs_figure",
    "scatter_figure",
    "score_check_figure",
    "score_figure",
    "spectrum_figure",
    "statistics_figure",
    "submatrix_figure",
    "verification_figure",
]
