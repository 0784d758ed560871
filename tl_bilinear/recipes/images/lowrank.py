"""What a few components are worth: shared neurons beside eigenvectors, and certificates.

Per-class eigenvectors give each class components of its own. A CP decomposition gives the classes
neurons that they share (:meth:`~tl_bilinear.BilinearTensor.cp`); both are measured here by the accuracy
they leave and the numbers they store. A certificate bounds how far a truncated logit can be from the
whole one on any image of a given norm, and stands beside the largest error met on real images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.recipes.images.analysis import truncation_accuracy
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import PIXEL_SPACE, ImageClassifier
from tl_bilinear.recipes.images.sweep import pixel_spectra
from tl_bilinear.results import Result
from tl_bilinear.tensor import CP, cp

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class SharedNeurons:
    """A classifier by neurons that all classes share, and by eigenvectors of each class.

    Attributes
    ----------
    fits: one CP decomposition for each rank, in pixel space
    accuracy: [ranks], test accuracy of each
    kept: eigenvectors of each class, eigen_accuracy: [kept], test accuracy with so many
    whole: test accuracy of the model
    """

    fits: Sequence[CP]
    accuracy: Sequence[float]
    kept: Sequence[int]
    eigen_accuracy: Sequence[float]
    whole: float

    def to_pandas(self) -> pandas.DataFrame:
        """One row a method and number of components: numbers stored, accuracy, what it costs."""
        import pandas as pd

        rows = [
            ("shared neurons", fit.rank, fit.left.numel() + fit.right.numel() + fit.out.numel(), a)
            for fit, a in zip(self.fits, self.accuracy, strict=True)
        ]
        classes, pixels = self.fits[0].out.shape[0], self.fits[0].left.shape[1]
        rows += [
            ("eigenvectors of each class", k, k * classes * (pixels + 1), a)
            for k, a in zip(self.kept, self.eigen_accuracy, strict=True)
        ]
        table = pd.DataFrame(rows, columns=["method", "components", "numbers", "accuracy"])
        return table.assign(lost=self.whole - table["accuracy"])


@torch.no_grad()
def shared_neurons(
    model: ImageClassifier,
    data: ImageData,
    *,
    ranks: Sequence[int] = (5, 10, 20, 40),
    kept: Sequence[int] = (1, 2, 3, 5, 10, 20),
    steps: int = 60,
    progress: bool = False,
) -> SharedNeurons:
    """Fit CP decompositions of several ranks, and measure them beside per-class truncation.

    Each rank starts from the eigenvectors of the HOSVD components (one restart). The biases of a model
    that has them are kept whole on both sides.
    """
    tensor = model.tensor(PIXEL_SPACE)
    _, linear, constant = tensor.parts()(data.test_images)
    fits = [cp(tensor, rank, restarts=1, steps=steps, progress=progress) for rank in ranks]
    guesses = [(fit.tensor(data.test_images) + linear + constant).argmax(-1) for fit in fits]
    spectra = pixel_spectra(model)
    truncated = truncation_accuracy(
        model, spectra, data.test_images, data.test_labels, tuple(k for k in kept if k <= spectra.k)
    )
    return SharedNeurons(
        fits,
        [float((g == data.test_labels).float().mean()) for g in guesses],
        list(truncated),
        list(truncated.values()),
        float((model(data.test_images).argmax(-1) == data.test_labels).float().mean()),
    )


@dataclass(frozen=True, eq=False)
class Certificates(Result):
    """Error of truncated logits: what holds for every image of a norm, and what real ones show.

    Attributes
    ----------
    radius: the norm
    kept: eigenvectors of each class
    bound: [classes, kept], for every image of norm at most `radius`, whatever it shows
    worst, mean: [classes, kept], largest and mean absolute error on the test images within the radius
    spread: [classes], standard deviation of the logit over them, the scale to read errors by
    """

    radius: float
    kept: Sequence[int]
    bound: Float[Tensor, "classes kept"]
    worst: Float[Tensor, "classes kept"]
    mean: Float[Tensor, "classes kept"]
    spread: Float[Tensor, " classes"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a class and number of eigenvectors."""
        import pandas as pd

        rows = [
            (label, k, *(float(each[label, j]) for each in (self.bound, self.worst, self.mean)))
            for label in range(len(self.bound))
            for j, k in enumerate(self.kept)
        ]
        return pd.DataFrame(rows, columns=["class", "eigenvectors", "bound", "worst", "mean"])


@torch.no_grad()
def certificates(
    model: ImageClassifier,
    images: Float[Tensor, "n pixels"],
    *,
    kept: Sequence[int] = (1, 2, 3, 5, 10, 20, 40),
    radius: float | None = None,
) -> Certificates:
    """Bound and measure what a truncation to k eigenvectors of each class does to its logit.

    `radius` None takes the largest norm among `images`. Biases are not truncated and play no part.

    Raises ValueError where no image lies within the radius.
    """
    norms = images.norm(dim=1)
    radius = float(norms.max()) if radius is None else radius
    inside = images[norms <= radius]
    if not len(inside):
        raise ValueError(
            f"no image has a norm of at most {radius}; the smallest is {float(norms.min()):.3g}"
        )
    tensor = model.tensor(PIXEL_SPACE)
    spectra = pixel_spectra(model)
    kept = [k for k in kept if k <= spectra.k]
    logits = tensor.interaction().quadratic(inside)
    running = spectra.activations(inside).cumsum(-1)
    errors = [(logits - running[..., k - 1]).abs() for k in kept]
    return Certificates(
        radius,
        kept,
        torch.stack([spectra.certificate(radius, k) for k in kept], 1),
        torch.stack([error.amax(0) for error in errors], 1),
        torch.stack([error.mean(0) for error in errors], 1),
        logits.std(0),
    )
