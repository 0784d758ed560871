"""The explorer: one page in which a person reads a bilinear layer.

>>> explore(run)                                   # a FeatureRun: writes explorer.html and opens it
>>> explore(features.run(tokens).labelled(), out="layer3.html", open=False)
>>> panels = [language_panel(run, title="Layer 3"), image_panel(model, data, title="Digits")]
>>> write_page(panels, "both.html")

The page holds the layer's matrices and computes from them: the exact sum of a feature's value at a
The page holds the layer's matrices and computes from them: the exact sum of a feature's value at a
token, and loads nothing from a network. `documents` describes the format of what is in it.
"""

from tl_bilinear.explorer.documents import Panel, write_folder, write_page
from tl_bilinear.explorer.image_panel import image_panel
from tl_bilinear.explorer.language_panel import language_panel
from tl_bilinear.explorer.opening import PageView, explore, explore_demo, quickstart_page
from tl_bilinear.explorer.server import serving

__all__ = [
    "PageView",
    "Panel",
    "explore",
    "explore_demo",
    "image_panel",
    "language_panel",
    "quickstart_page",
    "serving",
    "write_folder",
    "write_page",
]
