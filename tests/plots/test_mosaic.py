"""Many images in one picture."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from tl_bilinear.plots import mosaic_figure
from tl_bilinear.plots.mosaic import _diverging, _grey

SIZE = (6, 5)


def decoded(figure):
    """The pixels of a mosaic: [height, width, 3]."""
    kind, _, data = figure.data[0].source.partition(",")
    assert kind == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data)))))


def test_a_mosaic_shows_each_image_in_its_place():
    images = torch.zeros(2, 3, 30)
    images[0, 0, 0] = 5.0  # upper left corner, positive
    images[1, 2, 29] = -2.0  # lower right corner, negative
    images[0, 1] = torch.nan
    images[1, 0] = 1.0
    grey = torch.zeros(2, 3, dtype=torch.bool)
    grey[1, 0] = True
    pixels = decoded(mosaic_figure(images, SIZE, grey=grey)).int()
    blue = pixels[..., 2] - pixels[..., 0] > 60
    red = pixels[..., 0] - pixels[..., 2] > 60
    black = pixels.sum(-1) == 0
    height, width, _ = pixels.shape
    zoom = 84 // 6
    assert blue.sum() == red.sum() == zoom**2
    assert black.sum() == 30 * zoom**2
    y, x = blue.nonzero().float().mean(0)
    assert (y < height / 6, x < width / 6) == (True, True)
    y, x = red.nonzero().float().mean(0)
    assert (y > height * 5 / 6, x > width * 5 / 6) == (True, True)
    middle = pixels[: height // 2, width // 3 + 12 : 2 * width // 3 - 12]
    assert (middle == 255).all()  # NaN: empty


def test_colours():
    found = _diverging(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert found.tolist() == [[[103, 0, 31], [255, 255, 255], [5, 48, 97]]]
    assert _diverging(torch.zeros(1, 1)).tolist() == [[[255, 255, 255]]]
    assert _grey(torch.tensor([[0.0, 1.0, 2.0]]))[..., 0].tolist() == [[255, 0, 0]]
