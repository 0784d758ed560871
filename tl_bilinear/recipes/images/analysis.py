"""What an image classifier computes, read off its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE, ImageClassifier
from tl_bilinear.tensor import Eigendecomposition


@dataclass(frozen=True, eq=False)
class ClassSpectra:
    """Eigenpairs of every class's interaction matrix, in the two spaces an image has.

    Attributes
    ----------
    pixel: of the pixel-space form, [classes, pixels, pixels] vectors; unit and orthogonal as images
    embedding: of the embedding-space form, [classes, size, size] vectors; unit and orthogonal there
    embedding_images: [classes, size, pixels], the embedding-space vectors mapped to pixels through the
        embedding: what an image is multiplied with, neither unit nor orthogonal
    """

    pixel: Eigendecomposition
    embedding: Eigendecomposition
    embedding_images: Float[Tensor, "classes k pixels"]

    def images(self, space: str) -> Float[Tensor, "classes k pixels"]:
        """The eigenvectors of one space as images."""
        return self.pixel.vectors if space == PIXEL_SPACE else self.embedding_images

    def of(self, space: str) -> Eigendecomposition:
        return self.pixel if space == PIXEL_SPACE else self.embedding


def class_spectra(model: ImageClassifier) -> ClassSpectra:
    """All eigenpairs of every class, from the weights alone (section 3.2).

    A layer with biases is decomposed in its interaction part; `model.tensor().parts()` has the rest.
    """
    embedding = model.tensor(EMBEDDING_SPACE).interaction().eigh()
    pixel = model.tensor(PIXEL_SPACE).interaction().eigh()
    return ClassSpectra(pixel, embedding, model.to_pixels(embedding.vectors))


@torch.no_grad()
def truncation_accuracy(
    model: ImageClassifier,
    spectra: Eigendecomposition,
    images: Float[Tensor, "n pixels"],
    labels: Tensor,
    counts: tuple[int, ...],
) -> dict[int, float]:
    """Accuracy with only the k eigenpairs of largest absolute eigenvalue of each class (Fig. 5B).

    `spectra` are in pixel or embedding space, one batch entry a class; biases are kept whole.
    """
    in_pixels = spectra.space == PIXEL_SPACE
    inputs = images if in_pixels else model.embed(images)
    parts = model.tensor(spectra.space or PIXEL_SPACE).parts()
    _, linear, constant = parts(inputs)
    running = spectra.activations(inputs).cumsum(-1)
    result = {}
    for k in counts:
        if not 1 <= k <= spectra.k:
            raise ValueError(f"counts must lie between 1 and {spectra.k}, the pairs held, got {k}")
        guesses = (running[..., k - 1] + linear + constant).argmax(-1)
        result[k] = float((guesses == labels).float().mean())
    return result
