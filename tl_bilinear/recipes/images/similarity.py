"""Do models of other seeds and sizes learn the same eigenvectors? (Pearce et al. 2025, Fig. 5 and 18)

Eigenvectors are compared in pixel space, where models of every size meet, by absolute cosine; the i-th
positive one with the i-th positive one and the negative ones likewise, never a model with itself.

The paper compares embedding-space eigenvectors mapped to pixels, which are neither unit nor orthogonal
there; ``space="embedding"`` does that (of unit length after the mapping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.recipes.images.analysis import truncation_accuracy
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import PIXEL_SPACE, ImageClassifier
from tl_bilinear.recipes.images.runs import UNKEPT, Runs
from tl_bilinear.recipes.images.sweep import pixel_spectra
from tl_bilinear.recipes.images.training import TrainingConfig
from tl_bilinear.results import Result
from tl_bilinear.tensor import Eigendecomposition, match_eigenvectors

if TYPE_CHECKING:
    import pandas

SIGNS = ("positive", "negative")


@dataclass(frozen=True, eq=False)
class SeedsAndSizes(Result):
    """Similarity and truncation over seeds and sizes.

    Attributes
    ----------
    sizes: [n]
    within: [n, 2, k, pairs], mean over classes of the absolute cosine of eigenvectors of equal rank, for
        every two seeds of a size; positive eigenvalues, then negative
    between: [n, n, 2, k], the same between sizes, mean over pairs of different models
    kept: numbers of eigenvectors of each class
    truncated: [n, seeds, kept], test accuracy with so many
    accuracy: [n, seeds], of the whole models
    space: where the eigenvectors were taken
    """

    sizes: Sequence[int]
    within: Float[Tensor, "n 2 k pairs"]
    between: Float[Tensor, "n n 2 k"]
    kept: Sequence[int]
    truncated: Float[Tensor, "n seeds kept"]
    accuracy: Float[Tensor, "n seeds"]
    space: str

    def to_pandas(self) -> pandas.DataFrame:
        """One row a size, sign and rank: similarity within the size, with its 90 % interval."""
        import pandas as pd

        mean, low, high = interval(self.within)
        rows = [
            (size, sign, rank + 1, *(float(each[i, j, rank]) for each in (mean, low, high)))
            for i, size in enumerate(self.sizes)
            for j, sign in enumerate(SIGNS)
            for rank in range(mean.shape[-1])
        ]
        return pd.DataFrame(rows, columns=["size", "sign", "rank", "cosine", "low", "high"])

    def truncation(self) -> pandas.DataFrame:
        """One row a size and number of eigenvectors: accuracy, and what is lost, with 90 % intervals."""
        import pandas as pd

        lost = interval((self.accuracy[..., None] - self.truncated).mT)
        reached = self.truncated.mean(1)
        rows = [
            (size, k, float(reached[i, j]), *(float(each[i, j]) for each in lost))
            for i, size in enumerate(self.sizes)
            for j, k in enumerate(self.kept)
        ]
        columns = ["size", "eigenvectors", "accuracy", "lost", "low", "high"]
        return pd.DataFrame(rows, columns=columns)


def seeds_and_sizes(
    data: ImageData,
    base: TrainingConfig,
    sizes: Sequence[int],
    *,
    seeds: int = 5,
    k: int = 8,
    kept: Sequence[int] = (1, 2, 3, 5, 10, 20, 30),
    space: str = PIXEL_SPACE,
    runs: Runs = UNKEPT,
) -> SeedsAndSizes:
    """Train `seeds` models of every size and compare their first k eigenvectors of each sign.

    Raises ValueError for fewer than two seeds (a model is not compared with itself), or k or kept above
    the smallest size.
    """
    sizes, kept = sorted(sizes), sorted(kept)
    if seeds < 2:
        raise ValueError(
            f"similarity compares different runs: seeds must be at least 2, got {seeds}"
        )
    if max(k, *kept) > sizes[0]:
        raise ValueError(
            f"k={k} and kept={kept} must not exceed the smallest size, {sizes[0]}: a model has no more "
            f"eigenvectors than its size"
        )
    configs = [replace(base, size=size, seed=base.seed + s) for size in sizes for s in range(seeds)]
    results = runs.train(data, configs)
    tops, truncated = [], []
    for result in results:
        spectra = _spectra(result.model, space)
        found = truncation_accuracy(
            result.model, spectra, data.test_images, data.test_labels, tuple(kept)
        )
        truncated.append(list(found.values()))
        images = _as_images(result.model, spectra)
        tops.append([_of_sign(images, sign, k) for sign in (1, -1)])
    pairs = {
        (a, b): torch.stack([_by_rank(x, y, k) for x, y in zip(tops[a], tops[b], strict=True)])
        for a, b in combinations(range(len(results)), 2)
    }
    of_size = [range(i * seeds, (i + 1) * seeds) for i in range(len(sizes))]
    within = torch.stack(
        [torch.stack([pairs[p] for p in combinations(rows, 2)], -1) for rows in of_size]
    )
    between = within.new_empty(len(sizes), len(sizes), 2, k)
    for i, j in combinations(range(len(sizes)), 2):
        each = torch.stack([pairs[a, b] for a in of_size[i] for b in of_size[j]])
        between[i, j] = between[j, i] = each.nanmean(0)
    for i in range(len(sizes)):
        between[i, i] = within[i].nanmean(-1)
    shape = (len(sizes), seeds)
    accuracy = torch.tensor([result.accuracy for result in results], dtype=torch.float64)
    return SeedsAndSizes(
        sizes,
        within,
        between,
        kept,
        torch.tensor(truncated, dtype=torch.float64).reshape(*shape, len(kept)),
        accuracy.reshape(shape),
        space,
    )


def interval(values: Float[Tensor, "... n"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and the 5th and 95th percentile, over the last dimension; NaN is left out."""
    low, high = torch.nanquantile(values, torch.tensor([0.05, 0.95]).to(values), dim=-1)
    return values.nanmean(-1), low, high


def _spectra(model: ImageClassifier, space: str) -> Eigendecomposition:
    return (
        pixel_spectra(model) if space == PIXEL_SPACE else model.tensor(space).interaction().eigh()
    )


def _as_images(model: ImageClassifier, spectra: Eigendecomposition) -> Eigendecomposition:
    """Embedding-space eigenvectors mapped to pixels, of unit length; pixel-space ones as they are."""
    if spectra.space == PIXEL_SPACE:
        return spectra
    images = torch.nn.functional.normalize(model.to_pixels(spectra.vectors), dim=-1)
    return replace(spectra, vectors=images, space=f"{spectra.space}, mapped to pixels")


def _of_sign(spectra: Eigendecomposition, sign: int, k: int) -> Eigendecomposition:
    """The k pairs of largest eigenvalue of one sign, for every class."""
    order = (sign * spectra.values).argsort(dim=-1, descending=True, stable=True)[..., :k]
    picked = order[..., None].expand(*order.shape, spectra.d)
    return replace(
        spectra,
        values=spectra.values.gather(-1, order),
        vectors=spectra.vectors.gather(-2, picked),
        residuals=spectra.residuals.gather(-1, order),
    )


def _by_rank(first: Eigendecomposition, second: Eigendecomposition, k: int) -> Tensor:
    """[k], absolute cosine of eigenvectors of equal rank, mean over classes; NaN where none is left."""
    match = match_eigenvectors(first, second, by="rank")
    total = torch.zeros(k, dtype=torch.float64)
    count = torch.zeros_like(total)
    total.index_add_(0, match.first, match.cosines.double())
    count.index_add_(0, match.first, torch.ones_like(match.cosines, dtype=torch.float64))
    return total / count
