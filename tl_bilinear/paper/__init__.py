"""The paper's studies, and the reports that the command line writes (Pearce et al. 2025).

>>> make_gallery(GallerySettings(studies=("target",)))       # `tl-bilinear images`
>>> run_quickstart(QuickstartConfig())                       # `tl-bilinear quickstart`
>>> make("target", load_images(), TargetSettings(seeds=3))   # one study: figures, tables, a summary

One file a study, which computes, draws and describes: `eigenvectors`, `hosvd_components`,
`regularisation` (with sparsity), `similarity`, `target`, `adversarial`, `explanation`, `toy`, `neurons`,
`certified`. What they share is in `image_spectra`.
"""

from tl_bilinear.paper.gallery import GallerySettings, make, make_gallery, write_gallery
from tl_bilinear.paper.image_spectra import ClassSpectra, class_spectra, truncate
from tl_bilinear.paper.page import SummaryTable
from tl_bilinear.paper.quickstart import Quickstart, QuickstartConfig, run_quickstart
from tl_bilinear.paper.registry import Page, Study, register, studies

__all__ = [
    "ClassSpectra",
    "GallerySettings",
    "Page",
    "Quickstart",
    "QuickstartConfig",
    "Study",
    "SummaryTable",
    "class_spectra",
    "make",
    "make_gallery",
    "register",
    "run_quickstart",
    "studies",
    "truncate",
    "write_gallery",
]
