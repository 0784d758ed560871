"""What the studies share: the eigenpairs of an image classifier, and what a few of them are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_bilinear.plots.style import NEUTRAL, line, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.recipes.images.training import accuracy
from tl_bilinear.results import Result
from tl_bilinear.tensor import Eigendecomposition, InputMoments

if TYPE_CHECKING:
    import pandas


RIDGE = 0.05
"""Of the metric of images: as much as lets border pixels, which hardly vary, not decide."""


@dataclass(frozen=True, eq=False)
class ClassSpectra:
    """Eigenpairs of every class's interaction matrix, in the two spaces that an image has.

    Attributes
    ----------
    pixel: of the pixel-space form, vectors [classes, pixels, pixels]; unit and orthogonal as images
    embedding: of the embedding-space form, vectors [classes, size, size]; unit and orthogonal there
    mapped: the embedding-space pairs with vectors [classes, size, pixels], mapped to pixels through the
        embedding: what an image is multiplied with, neither unit nor orthogonal

    Signs are arbitrary; those of the embedding are chosen so that each of its images looks like the
    pixel-space eigenvector nearest to it, and not like its negative.
    """

    pixel: Eigendecomposition
    embedding: Eigendecomposition
    mapped: Eigendecomposition

    def of(self, space: str) -> Eigendecomposition:
        """The eigenpairs in a space, "pixels" or "embedding"."""
        return self.pixel if space == PIXEL_SPACE else self.embedding

    def images(self, space: str) -> Eigendecomposition:
        """The same pairs, with vectors that are images."""
        return self.pixel if space == PIXEL_SPACE else self.mapped


def class_spectra(model: ImageClassifier) -> ClassSpectra:
    """All eigenpairs of every class, from the weights alone (section 3.2).

    A layer with biases is decomposed in its interaction part; `model.tensor().parts()` has the rest.
    """
    embedding = model.tensor(EMBEDDING_SPACE).interaction().eigh()
    pixel = model.tensor(PIXEL_SPACE).interaction().eigh()
    mapped = as_images(model, embedding)
    signs = like_nearest(mapped.vectors, pixel.vectors)
    return ClassSpectra(
        pixel,
        replace(embedding, vectors=signs * embedding.vectors),
        replace(mapped, vectors=signs * mapped.vectors),
    )


def like_nearest(
    rows: Float[Tensor, "*n k d"], others: Float[Tensor, "*n m d"]
) -> Float[Tensor, "*n k 1"]:
    """Signs that turn rows towards the other row that they are nearest to, up to its sign."""
    cosines = rows @ others.mT
    nearest = cosines.gather(-1, cosines.abs().argmax(-1, keepdim=True))
    return torch.where(nearest < 0, -1.0, 1.0).to(nearest)


def pixel_spectra(model: ImageClassifier) -> Eigendecomposition:
    """The eigenpairs of every class in pixel space that can differ from zero: at most `size` of them."""
    tensor = model.tensor(PIXEL_SPACE)
    return tensor.interaction().eigh(min(tensor.d_in, tensor.d_hidden))


def metric_spectra(
    model: ImageClassifier, data: ImageData, k: int, ridge: float = RIDGE
) -> Eigendecomposition:
    """The k largest eigenpairs of every class in the metric of the training images, in pixel space.

    Its vectors are filters, its `patterns` what images that excite them have in common.
    """
    moments = InputMoments.of(data.train_images, population="training images", space=PIXEL_SPACE)
    form = model.tensor(PIXEL_SPACE).interaction()
    return form.eigh(min(k, form.d), metric=moments.metric(ridge))


def as_images(model: ImageClassifier, eigen: Eigendecomposition) -> Eigendecomposition:
    """Embedding-space eigenvectors mapped to pixels; pixel-space ones as they are."""
    if eigen.space == PIXEL_SPACE:
        return eigen
    return replace(eigen, vectors=model.to_pixels(eigen.vectors), space=f"{eigen.space}, mapped")


def rare_pixels(data: ImageData, share: float = 0.01) -> Bool[Tensor, " pixels"]:
    """[pixels], true where fewer than `share` of the training images are not black."""
    return (data.train_images > 0).float().mean(0) < share


# ---------------------------------------------------------------------- truncation


@dataclass(frozen=True, eq=False)
class Truncation(Result):
    """Accuracy with only a few eigenpairs of each class.

    Attributes
    ----------
    kept: numbers of eigenpairs of each class
    accuracy: [kept], with so many
    whole: of the whole model
    """

    kept: Sequence[int]
    accuracy: Sequence[float]
    whole: float

    def to_pandas(self) -> pandas.DataFrame:
        """One row a number of eigenpairs: its accuracy, and what is lost."""
        import pandas as pd

        table = pd.DataFrame({"eigenvectors": list(self.kept), "accuracy": list(self.accuracy)})
        return table.assign(lost=self.whole - table["accuracy"])


@torch.no_grad()
def truncate(
    model: ImageClassifier,
    spectra: Eigendecomposition,
    images: Float[Tensor, "n pixels"],
    labels: Tensor,
    kept: Sequence[int],
) -> Truncation:
    """Classify with only the k eigenpairs of largest absolute eigenvalue of each class (Fig. 5B).

    `spectra` are in pixel or embedding space, one batch entry a class; biases are kept whole.

    Raises ValueError for numbers of pairs below 1 or above those held.
    """
    space = spectra.space or PIXEL_SPACE
    inputs = images if space == PIXEL_SPACE else model.embed(images)
    _, linear, constant = model.tensor(space).parts()(inputs)
    running = spectra.activations(inputs).cumsum(-1)
    reached = []
    for k in kept:
        if not 1 <= k <= spectra.k:
            raise ValueError(f"kept must lie between 1 and {spectra.k}, the pairs held, got {k}")
        guesses = (running[..., k - 1] + linear + constant).argmax(-1)
        reached.append(float((guesses == labels).float().mean()))
    return Truncation(tuple(kept), tuple(reached), accuracy(model, images, labels))


def truncation_figure(result: Truncation) -> go.Figure:
    """Accuracy against the number of eigenvectors kept for each class (Fig. 5B)."""
    figure = go.Figure(line(result.kept, result.accuracy, 0, "truncated"))
    figure.update_traces(hovertemplate="%{x} eigenvectors<br>accuracy %{y:.3f}<extra></extra>")
    figure.add_hline(
        y=result.whole,
        line={"color": NEUTRAL, "dash": "dash"},
        annotation_text=f"whole model {result.whole:.3f}",
        annotation_position="bottom right",
    )
    figure.update_xaxes(title="eigenvectors kept for each class", tickvals=list(result.kept))
    figure.update_yaxes(title="test accuracy", range=[0, 1.02])
    return sized(figure, 560, 340, title="Few eigenvectors are the whole model", showlegend=False)
