"""The paper's image classifier: an embedding and one bilinear layer, whose output map is the head.

Its layer is read into a BilinearTensor by the same code as a transformer's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_bilinear.tensor import BilinearTensor, register_model_reader

PIXEL_SPACE = "pixels"
EMBEDDING_SPACE = "embedding"


class BilinearLayer(nn.Module):
    """``out ((left x) * (right x))``, three linear maps; biases as in nn.Linear."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, bias: bool = False) -> None:
        super().__init__()
        self.left = nn.Linear(d_in, d_hidden, bias)
        self.right = nn.Linear(d_in, d_hidden, bias)
        self.out = nn.Linear(d_hidden, d_out, bias)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return self.out(self.left(x) * self.right(x))


class ImageClassifier(nn.Module):
    """Pixels -> embedding -> bilinear layer -> logits (Pearce et al. 2025, Table 1).

    Parameters
    ----------
    pixels, classes: int
        Inputs and outputs.
    size: int
        Width of the embedding and of the layer's hidden neurons.
    bias: bool
        Biases in every map; in the paper only the hidden-target task has them (section 4.3).
    generator: torch.Generator, optional
        Draws the initial weights, uniform within 1 / sqrt(inputs) as those of torch.nn.Linear.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        size: int,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            self.embed = nn.Linear(pixels, size, bias)
            self.layer = BilinearLayer(size, size, classes, bias)
        if generator is not None:
            for linear in (self.embed, self.layer.left, self.layer.right, self.layer.out):
                bound = linear.in_features**-0.5
                for parameter in linear.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, images: Float[Tensor, "... pixels"]) -> Float[Tensor, "... classes"]:
        return self.layer(self.embed(images))

    def tensor(self, space: str = PIXEL_SPACE) -> BilinearTensor:
        """The whole model as one bilinear tensor, from an input space to its logits; exact.

        Parameters
        ----------
        space: "pixels" or "embedding"
            What the input is. With "pixels" the embedding is folded in, and eigenvectors are unit
            and orthogonal as images. With "embedding" the input is the embedded image: eigenvectors
            are unit and orthogonal there, and the images that `to_pixels` makes of them are neither.
        """
        if space not in (PIXEL_SPACE, EMBEDDING_SPACE):
            raise ValueError(f"space must be '{PIXEL_SPACE}' or '{EMBEDDING_SPACE}', got {space!r}")
        tensor = BilinearTensor.from_mlp(self.layer)
        tensor = replace(tensor, input_space=EMBEDDING_SPACE, output_space="logits")
        if space == EMBEDDING_SPACE:
            return tensor
        bias = self.embed.bias
        offset = None if bias is None else bias.detach().clone()
        return tensor.fold(self.embed.weight.detach().T, offset, space=PIXEL_SPACE)

    def to_pixels(self, vectors: Float[Tensor, "... size"]) -> Float[Tensor, "... pixels"]:
        """Embedding-space directions as images: what an image is multiplied with, ``v W_embed``."""
        return vectors @ self.embed.weight.detach()


def _read(model: object, layer: int | None) -> BilinearTensor | None:
    if not isinstance(model, ImageClassifier):
        return None
    if layer not in (None, 0, -1):
        raise IndexError(f"an ImageClassifier has one layer, number 0; got layer={layer}")
    return model.tensor()


register_model_reader("image-classifier", _read)
