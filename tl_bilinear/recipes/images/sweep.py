"""What regularisers and augmentations do to a model (Pearce et al. 2025, Fig. 4, 13, 14 and 17).

A sweep trains the same model under several settings and reads each off its weights: the top
eigenvectors of one class, how many eigenvalues and pixels count, and how much of the top eigenvector
lies on pixels that hardly any training image uses, which is where overfitting shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.recipes.images.augment import Blur, Perlin, Rotation, SaltAndPepper, Translation
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import PIXEL_SPACE, ImageClassifier
from tl_bilinear.recipes.images.runs import UNKEPT, Runs
from tl_bilinear.recipes.images.training import TrainingConfig
from tl_bilinear.results import Result
from tl_bilinear.tensor import Eigendecomposition
from tl_bilinear.tensor.eigendecomposition import participation

if TYPE_CHECKING:
    import pandas

TOP = 5  # eigenvectors of each class whose pixels are counted, as in Fig. 17


@dataclass(frozen=True, eq=False)
class Sweep(Result):
    """One row a setting, one column a seed.

    Attributes
    ----------
    settings: names of the settings, [n]
    label: the class whose eigenvectors are kept
    accuracy: [n, seeds], on clean test images
    effective_rank: [n, seeds], (L1/L2)^2 of the eigenvalues, mean over classes, in pixel space
    effective_pixels: [n, seeds], (L1/L2)^2 of the entries of the top eigenvectors, mean over the five
        of largest absolute eigenvalue of each class
    rare: [n, seeds], share of the top eigenvector's squared norm on rarely used pixels, mean over
        classes
    values: [n, k], vectors: [n, k, pixels], the largest eigenvalues of `label` and their eigenvectors,
        of the first seed
    """

    settings: Sequence[str]
    label: int
    accuracy: Float[Tensor, "n seeds"]
    effective_rank: Float[Tensor, "n seeds"]
    effective_pixels: Float[Tensor, "n seeds"]
    rare: Float[Tensor, "n seeds"]
    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n k pixels"]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a setting and seed."""
        import pandas as pd

        n, seeds = self.accuracy.shape
        return pd.DataFrame(
            {
                "setting": [name for name in self.settings for _ in range(seeds)],
                "seed": list(range(seeds)) * n,
                "accuracy": self.accuracy.flatten().numpy(),
                "effective_rank": self.effective_rank.flatten().numpy(),
                "effective_pixels": self.effective_pixels.flatten().numpy(),
                "rare_pixels": self.rare.flatten().numpy(),
            }
        )


def regularisers(base: TrainingConfig) -> dict[str, TrainingConfig]:
    """The paper's ablations by name, each a change of one setting of `base`.

    Input noise replaces the noise of `base`. Geometric augmentations keep it: on their own they leave
    the overfitting at the edges.
    """
    clean = replace(base, noise=0.0)
    named = {f"noise {std:g}": replace(base, noise=std) for std in (0.0, 0.15, 0.3, 0.6, 1.0)}
    for share in (0.1, 0.3):
        named[f"salt and pepper {share:g}"] = replace(clean, augment=(SaltAndPepper(share),))
    for std in (0.3, 0.6):
        named[f"Perlin {std:g}"] = replace(clean, augment=(Perlin(std),))
    for std in (0.3, 1.0):
        named[f"activation noise {std:g}"] = replace(clean, activation_noise=std)
    for share in (0.2, 0.6):
        named[f"dropout {share:g}"] = replace(clean, dropout=share)
    for decay in (0.0, 0.1, 1.0, 5.0):
        named[f"weight decay {decay:g}"] = replace(base, weight_decay=decay)
    for pixels in (3, 7):
        named[f"translation {pixels}"] = replace(base, augment=(Translation(pixels),))
    for degrees in (15, 45):
        named[f"rotation {degrees}"] = replace(base, augment=(Rotation(degrees),))
    for sigma in (0.7, 1.5):
        named[f"blur {sigma:g}"] = replace(base, augment=(Blur(sigma),))
    return named


def noise_and_decay(
    base: TrainingConfig, noises: Sequence[float], decays: Sequence[float]
) -> dict[str, TrainingConfig]:
    """The grid of Fig. 17: every noise with every weight decay."""
    return {
        f"noise {noise:g}, weight decay {decay:g}": replace(base, noise=noise, weight_decay=decay)
        for noise in noises
        for decay in decays
    }


def sweep(
    data: ImageData,
    settings: Mapping[str, TrainingConfig],
    *,
    label: int = 0,
    seeds: int = 1,
    k: int = 4,
    runs: Runs = UNKEPT,
) -> Sweep:
    """Train every setting with `seeds` seeds (counted from its own) and read the models.

    Raises ValueError for a label that is no class.
    """
    if not 0 <= label < len(data.classes):
        raise ValueError(f"label must number one of {len(data.classes)} classes, got {label}")
    configs = [
        replace(config, seed=config.seed + seed)
        for config in settings.values()
        for seed in range(seeds)
    ]
    results = runs.train(data, configs)
    rarely = rare_pixels(data)
    rows = []
    for result in results:
        spectra = pixel_spectra(result.model)
        top = spectra.top(min(TOP, spectra.k)).vectors
        rows.append(
            (
                result.accuracy,
                float(spectra.effective_rank().mean()),
                float(participation(top).mean()),
                float(spectra.vectors[:, 0, rarely].square().sum(-1).mean()),
            )
        )
    numbers = torch.tensor(rows, dtype=torch.float64).reshape(len(settings), seeds, 4)
    accuracy, rank, pixels, rare = numbers.unbind(-1)
    values, vectors = [], []
    for result in results[::seeds]:
        count = min(k, result.config.size)
        found = result.model.tensor().interaction()[label].eigh(count, which="positive")
        values.append(found.values)
        vectors.append(found.vectors)
    return Sweep(
        tuple(settings), label, accuracy, rank, pixels, rare, torch.stack(values), torch.stack(vectors)
    )  # fmt: skip


def pixel_spectra(model: ImageClassifier) -> Eigendecomposition:
    """The eigenpairs of every class in pixel space that can differ from zero: at most `size` of them."""
    tensor = model.tensor(PIXEL_SPACE)
    return tensor.interaction().eigh(min(tensor.d_in, tensor.d_hidden))


def rare_pixels(data: ImageData, share: float = 0.01) -> Tensor:
    """[pixels], true where fewer than `share` of the training images are not black."""
    return (data.train_images > 0).float().mean(0) < share
