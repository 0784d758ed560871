"""The paper's studies, and the reports that the command line writes (Pearce et al. 2025).

>>> make_gallery(GallerySettings(studies=("target",)))       # `tl-bilinear images`
>>> run_quickstart(QuickstartConfig())                       # `tl-bilinear quickstart`
>>> certify(CertifyConfig())                                 # `tl-bilinear certify`
>>> make("target", load_images(), TargetSettings(seeds=3))   # one study: figures, tables, a summary

One file a study, which computes, draws and describes: `eigenvectors`, `hosvd_components`,
`regularisation` (with sparsity), `similarity`, `target`, `adversarial`, `explanation`, `toy`, `neurons`,
`certified`, `proofs` (with `nearest`). What they share is in `image_spectra`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tl_bilinear.paper.config import CertifyConfig, GallerySettings, QuickstartConfig

if TYPE_CHECKING:
    from tl_bilinear.paper.certification import Certified, certify
    from tl_bilinear.paper.gallery import make, make_gallery, write_gallery
    from tl_bilinear.paper.image_spectra import ClassSpectra, class_spectra, truncate
    from tl_bilinear.paper.page import SummaryTable
    from tl_bilinear.paper.quickstart import Quickstart, run_quickstart
    from tl_bilinear.paper.registry import Page, Study, register, studies

__all__ = [
    "Certified",
    "CertifyConfig",
    "ClassSpectra",
    "GallerySettings",
    "Page",
    "Quickstart",
    "QuickstartConfig",
    "Study",
    "SummaryTable",
    "certify",
    "class_spectra",
    "make",
    "make_gallery",
    "register",
    "run_quickstart",
    "studies",
    "truncate",
    "write_gallery",
]

# The command line asks for settings only, and should answer at once.
_LAZY = {
    "Certified": "certification",
    "ClassSpectra": "image_spectra",
    "Page": "registry",
    "Quickstart": "quickstart",
    "Study": "registry",
    "SummaryTable": "page",
    "certify": "certification",
    "class_spectra": "image_spectra",
    "make": "gallery",
    "make_gallery": "gallery",
    "register": "registry",
    "run_quickstart": "quickstart",
    "studies": "registry",
    "truncate": "image_spectra",
    "write_gallery": "gallery",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
