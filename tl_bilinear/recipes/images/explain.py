"""One prediction, taken apart (Pearce et al. 2025, appendix C, Fig. 15 and 16).

The logit of a class is the sum of what its eigenvectors add, ``lambda_i (v_i . x)^2``, and of the linear
and constant parts of the biases where there are any: the numbers below sum to the model's logits to
rounding, so that what made a class, or suppressed it, can be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.recipes.images.analysis import ClassSpectra, class_spectra
from tl_bilinear.recipes.images.model import PIXEL_SPACE, ImageClassifier
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Explanation(Result):
    """What each eigenvector of each class adds to its logit on one image.

    Attributes
    ----------
    image: [pixels]
    contributions: [classes, k], in the order of falling absolute eigenvalue, all pairs of each class
    linear, constant: [classes], the biases' parts; zero for a model without
    logits: [classes], as the model computes them
    values: [classes, k], eigenvalues; vectors: [classes, k, pixels], eigenvectors as images
    space: whose eigenvectors, "pixels" or "embedding" (then mapped to pixels)
    classes: their names
    """

    image: Float[Tensor, " pixels"]
    contributions: Float[Tensor, "classes k"]
    linear: Float[Tensor, " classes"]
    constant: Float[Tensor, " classes"]
    logits: Float[Tensor, " classes"]
    values: Float[Tensor, "classes k"]
    vectors: Float[Tensor, "classes k pixels"]
    space: str
    classes: Sequence[str]

    @property
    def made(self) -> Float[Tensor, " classes"]:
        """[classes], what eigenvectors of positive eigenvalue add."""
        return self.contributions.clamp_min(0).sum(-1)

    @property
    def suppressed(self) -> Float[Tensor, " classes"]:
        """[classes], what those of negative eigenvalue take off."""
        return self.contributions.clamp_max(0).sum(-1)

    @property
    def gap(self) -> float:
        """Largest absolute difference between a logit and the sum of its parts: rounding."""
        sums = self.contributions.sum(-1) + self.linear + self.constant
        return float((sums - self.logits).abs().max())

    def top(self, k: int) -> pandas.DataFrame:
        """The k largest contributions of each class, in absolute value."""
        table = self.to_pandas()
        order = table["contribution"].abs().sort_values(ascending=False).index
        return table.loc[order].groupby("class", sort=False).head(k).reset_index(drop=True)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a class and eigenvector: rank by absolute eigenvalue, eigenvalue, contribution."""
        import pandas as pd

        classes, k = self.values.shape
        return pd.DataFrame(
            {
                "class": [name for name in self.classes for _ in range(k)],
                "rank": list(range(1, k + 1)) * classes,
                "eigenvalue": self.values.flatten().numpy(),
                "contribution": self.contributions.flatten().numpy(),
            }
        )

    def logit_table(self) -> pandas.DataFrame:
        """One row a class: what made it, what suppressed it, the biases' parts, and the logit."""
        import pandas as pd

        return pd.DataFrame(
            {
                "class": list(self.classes),
                "made": self.made.numpy(),
                "suppressed": self.suppressed.numpy(),
                "linear": self.linear.numpy(),
                "constant": self.constant.numpy(),
                "logit": self.logits.numpy(),
            }
        )


@torch.no_grad()
def explain(
    model: ImageClassifier,
    image: Float[Tensor, " pixels"],
    *,
    space: str = PIXEL_SPACE,
    spectra: ClassSpectra | None = None,
    classes: Sequence[str] | None = None,
) -> Explanation:
    """Split the logits of one image over the eigenvectors of every class, exactly.

    `spectra` are the model's own, where the caller has them (they are computed otherwise).

    Raises ValueError for an image of another size, or `classes` of another number.
    """
    spectra = class_spectra(model) if spectra is None else spectra
    found = spectra.of(space)
    tensor = model.tensor(space)
    if image.shape != (spectra.pixel.d,):
        raise ValueError(
            f"image must be one flat row of {spectra.pixel.d} pixels, got shape {list(image.shape)}"
        )
    names = tuple(map(str, range(tensor.d_out))) if classes is None else tuple(classes)
    if len(names) != tensor.d_out:
        raise ValueError(f"the model has {tensor.d_out} classes, got {len(names)} names")
    inputs = image if space == PIXEL_SPACE else model.embed(image)
    _, linear, constant = tensor.parts()(inputs)
    return Explanation(
        image,
        found.activations(inputs),
        linear,
        constant,
        model(image),
        found.values,
        spectra.images(space),
        space,
        names,
    )
