"""The explorer: one page in which a person reads a bilinear layer.

>>> explore(run)                                   # a FeatureRun: writes explorer.html and opens it
>>> explore(features.run(tokens).labelled(), out="layer3.html", open=False)
>>> explore(circuit.graph(20))                     # a FeatureGraph: pairs across layers
>>> panels = [language_panel(run, title="Layer 3"), image_panel(model, data, title="Digits")]
>>> write_page(panels, "both.html")

The page holds the layer's matrices and computes from them: the exact sum of a feature's value at a
token, spectra, interaction matrices, the logits of a digit that is drawn. It opens from disk, without a
server, and loads nothing from a network. `documents` describes the format of what is in it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_bilinear.explorer.documents import Panel, write_folder, write_page
    from tl_bilinear.explorer.graph_documents import graph_panel
    from tl_bilinear.explorer.image_documents import image_panel
    from tl_bilinear.explorer.language_documents import language_panel
    from tl_bilinear.explorer.opening import (
        PageView,
        explore,
        explore_demo,
        explore_images,
        quickstart_page,
    )
    from tl_bilinear.explorer.server import serving

# The command line reads `explorer.config` for its help, which must not load torch.
_HOMES = {
    "documents": ("Panel", "write_folder", "write_page"),
    "graph_documents": ("graph_panel",),
    "image_documents": ("image_panel",),
    "language_documents": ("language_panel",),
    "opening": ("PageView", "explore", "explore_demo", "explore_images", "quickstart_page"),
    "server": ("serving",),
}

__all__ = [
    "PageView",
    "Panel",
    "explore",
    "explore_demo",
    "explore_images",
    "graph_panel",
    "image_panel",
    "language_panel",
    "quickstart_page",
    "serving",
    "write_folder",
    "write_page",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
