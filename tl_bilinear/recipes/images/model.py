"""The paper's image classifier: an embedding and one bilinear layer, whose output map is the head.

Its layer is read into a BilinearTensor by the same code as a transformer's. With a depth above one there
are bilinear layers in between, and nothing else: one polynomial, read as a BilinearStack.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_bilinear.tensor import BilinearStack, BilinearTensor, register_model_reader

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
    """Pixels -> embedding -> bilinear layers -> logits; in the paper one layer (Table 1).

    Parameters
    ----------
    pixels, classes: int
        Inputs and outputs.
    size: int
        Width of the embedding and of the layer's hidden neurons.
    bias: bool
        Biases in every map; in the paper only the hidden-target task has them (section 4.3).
    generator: torch.Generator, optional
        Draws the initial weights, uniform within 1 / sqrt(inputs) as those of torch.nn.Linear; in a
        deeper model within sqrt(3 / inputs), which keeps the size of what a layer reads and writes.
    depth: int
        Bilinear layers; all but the last one write `size` coordinates.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        size: int,
        bias: bool = False,
        generator: torch.Generator | None = None,
        depth: int = 1,
    ) -> None:
        super().__init__()
        generator = torch.default_generator if generator is None and depth > 1 else generator
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            self.embed = nn.Linear(pixels, size, bias)
            self.layer = BilinearLayer(size, size, classes, bias)
            self.before = nn.ModuleList(
                BilinearLayer(size, size, size, bias) for _ in range(depth - 1)
            )
        if generator is not None:
            gain = 1.0 if depth == 1 else 3**0.5
            for linear in (each for each in self.modules() if isinstance(each, nn.Linear)):
                bound = gain * linear.in_features**-0.5
                for parameter in linear.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, images: Float[Tensor, "... pixels"]) -> Float[Tensor, "... classes"]:
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def layers(self) -> list[BilinearLayer]:
        """The bilinear layers, the first one first."""
        return [*self.before, self.layer]

    def stack(self, space: str = PIXEL_SPACE) -> BilinearStack:
        """The whole model as one stack of bilinear tensors; spaces as `tensor`."""
        return BilinearStack(tuple(self._read(number, space) for number in range(len(self.layers))))

    def tensor(self, space: str = PIXEL_SPACE) -> BilinearTensor:
        """The whole model as one bilinear tensor, from an input space to its logits; exact.

        Parameters
        ----------
        space: "pixels" or "embedding"
            What the input is. With "pixels" the embedding is folded in, and eigenvectors are unit
            and orthogonal as images. With "embedding" the input is the embedded image: eigenvectors
            are unit and orthogonal there, and the images that `to_pixels` makes of them are neither.
        """
        if len(self.layers) > 1:
            raise ValueError(
                f"a model of {len(self.layers)} bilinear layers is no bilinear tensor: take stack(), or "
                "one layer with BilinearTensor.from_model(model, layer)"
            )
        return self._read(0, space)

    def _read(self, number: int, space: str) -> BilinearTensor:
        if space not in (PIXEL_SPACE, EMBEDDING_SPACE):
            raise ValueError(f"space must be '{PIXEL_SPACE}' or '{EMBEDDING_SPACE}', got {space!r}")
        last = len(self.layers) - 1
        tensor = replace(
            BilinearTensor.from_mlp(self.layers[number]),
            input_space=f"layer {number - 1}" if number else EMBEDDING_SPACE,
            output_space="logits" if number == last else f"layer {number}",
        )
        if number or space == EMBEDDING_SPACE:
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
    count = len(model.layers)
    if layer is None and count == 1:
        layer = 0
    if layer is None or not -count <= layer < count:
        names = "one layer, number 0" if count == 1 else f"layers 0 to {count - 1}"
        raise IndexError(f"an ImageClassifier has {names}; got layer={layer}")
    return model._read(layer % count, PIXEL_SPACE)


register_model_reader("image-classifier", _read)
