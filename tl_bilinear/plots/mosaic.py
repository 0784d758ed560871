"""Many small images in one picture: a PNG in the figure, so that a page with hundreds stays small."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from PIL import Image
from plotly.colors import hex_to_rgb
from torch import Tensor

from tl_bilinear.plots.style import DIVERGING, LAYOUT, TITLE_LINE, headline

_TILE = 84  # pixels of the screen, about
_GAP = 8
_CAPTION = 17
_BORDER = 225


def mosaic_figure(
    images: Float[Tensor, "rows columns pixels"],
    size: Sequence[int],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    grey: Bool[Tensor, "rows columns"] | None = None,
    title: str = "",
) -> go.Figure:
    """Images in a grid, blue where positive and red where negative, each on its own scale.

    Parameters
    ----------
    images: [rows, columns, height * width]; a tile of NaN stays empty
    size: (height, width)
    rows, columns: names on the left of and above the grid
    captions: text above each tile
    grey: [rows, columns], true for tiles that are pictures in [0, 1]; they are shown black on white
    """
    pad = _CAPTION if captions else 0
    pixels, tile = _tiled(images, size, grey, pad)
    height, width = pixels.shape[:2]
    figure = go.Figure(go.Image(source=_png(pixels), hoverinfo="skip"))
    place = {"showarrow": False, "font": {"size": 11}}
    across = [_GAP + (tile[1] + _GAP) * j for j in range(images.shape[1])]
    down = [_GAP + pad + (tile[0] + _GAP + pad) * i for i in range(images.shape[0])]
    for i, line in enumerate(captions or ()):
        for j, text in enumerate(line):
            figure.add_annotation(
                x=across[j] + tile[1] / 2, y=down[i] - 1, text=text, yanchor="bottom", **place
            )
    for i, text in enumerate(rows or ()):
        figure.add_annotation(
            x=0, y=down[i] + tile[0] / 2, text=text, xanchor="right", align="right", **place
        )
    for j, text in enumerate(columns or ()):
        figure.add_annotation(x=across[j] + tile[1] / 2, y=0, text=text, yanchor="bottom", **place)
    left = 12 + 6 * max(len(line) for text in rows or [""] for line in text.split("<br>"))
    heading, more = headline(title, width + left + 10)
    heads = 1 + max(text.count("<br>") for text in columns or [""])
    top = (26 + TITLE_LINE + more if title else 12) + (4 + 14 * heads if columns else 0)
    figure.update_xaxes(visible=False, range=[0, width])
    figure.update_yaxes(visible=False, range=[height, 0])
    return figure.update_layout(
        **LAYOUT | {"margin": {"l": left, "r": 10, "t": top, "b": 8}},
        title=heading,
        width=width + left + 10,
        height=height + top + 8,
    )


def _tiled(
    images: Tensor, size: Sequence[int], grey: Tensor | None, pad: int
) -> tuple[Tensor, tuple[int, int]]:
    """[height, width, 3] bytes, and the size of a tile; tiles are enlarged by a whole number."""
    zoom = max(1, round(_TILE / max(size)))
    tile = (size[0] * zoom, size[1] * zoom)
    n_rows, n_columns = images.shape[:2]
    canvas = torch.full(
        ((tile[0] + _GAP + pad) * n_rows + _GAP, (tile[1] + _GAP) * n_columns + _GAP, 3),
        255,
        dtype=torch.uint8,
    )
    for i in range(n_rows):
        for j in range(n_columns):
            image = images[i, j].detach().float().cpu().reshape(size)
            if bool(image.isnan().any()):
                continue
            is_grey = grey is not None and bool(grey[i, j])
            colours = _grey(image) if is_grey else _diverging(image)
            colours = colours.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
            y, x = _GAP + pad + (tile[0] + _GAP + pad) * i, _GAP + (tile[1] + _GAP) * j
            canvas[y - 1 : y + tile[0] + 1, x - 1 : x + tile[1] + 1] = _BORDER
            canvas[y : y + tile[0], x : x + tile[1]] = colours
    return canvas, tile


def _grey(image: Tensor) -> Tensor:
    return (255 * (1 - image.clamp(0, 1))).byte()[..., None].expand(*image.shape, 3)


def _diverging(image: Tensor) -> Tensor:
    scale = float(image.abs().max()) or 1.0
    stops = torch.tensor([stop for stop, _ in DIVERGING])
    colours = torch.tensor([hex_to_rgb(colour) for _, colour in DIVERGING], dtype=torch.float32)
    where = (image / scale + 1) / 2
    above = torch.searchsorted(stops, where.contiguous()).clamp(1, len(stops) - 1)
    share = ((where - stops[above - 1]) / (stops[above] - stops[above - 1]))[..., None]
    return (colours[above - 1] + share * (colours[above] - colours[above - 1])).round().byte()


def _png(pixels: Tensor) -> str:
    """A data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
