"""Did an image model learn anything? Its numbers beside those of models that could not have.

Eigenvectors look like something whatever a model was trained on. So the quickstart trains the same model
again: from another seed, to see whether the same eigenvectors come back, and twice on labels that were
permuted at random, from which only memory can learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tl_bilinear import checks
from tl_bilinear.paper.certified import certificates
from tl_bilinear.paper.image_spectra import pixel_spectra
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.training import accuracy
from tl_bilinear.results import Result
from tl_bilinear.tensor import Eigendecomposition

if TYPE_CHECKING:
    import pandas

KEPT = 10
"""Eigenvectors of each class whose certificate is shown."""

_SURE = 4.0
"""Standard errors above chance from which a test accuracy is no accident."""

_AGREE = 0.5
"""Cosine from which eigenvectors of two seeds count as the same; random ones of 784 pixels have .03."""


@dataclass(frozen=True)
class ModelFacts(Result):
    """What tells a model that learned from one that did not.

    Attributes
    ----------
    train_accuracy, test_accuracy: on clean images
    effective_rank: mean over classes, of all eigenvalues in pixel space
    certificate: worst over classes, the most that keeping `KEPT` eigenvectors of a class can change its
        logit on any image as long as the longest of the test, over the logit's standard deviation
    agreement: mean over classes, absolute cosine of the first positive eigenvector with that of the same
        training from another seed; NaN where there is none
    """

    train_accuracy: float
    test_accuracy: float
    effective_rank: float
    certificate: float
    agreement: float = math.nan


@dataclass(frozen=True)
class Controls(Result):
    """A model beside the same training on shuffled labels, and beside itself before training.

    Attributes
    ----------
    model, shuffled, untrained: their facts
    chance: share of the test images that are of the most frequent class
    test_images: how many
    """

    model: ModelFacts
    shuffled: ModelFacts
    untrained: ModelFacts
    chance: float
    test_images: int

    @property
    def above_chance(self) -> bool:
        """Whether the test accuracy is 4 standard errors above chance."""
        error = math.sqrt(self.chance * (1 - self.chance) / self.test_images)
        return self.model.test_accuracy > self.chance + _SURE * error

    @property
    def learned(self) -> bool:
        """Whether the test accuracy is above chance, and no accident.

        Where classes are clusters, all images of one may be right by luck. So the model must have at
        least half as much above chance on training images as on test images; and on training images
        twice as much as the same training has on shuffled labels, or on test images more than half of
        what there is.
        """
        train, test = (
            accuracy - self.chance
            for accuracy in (self.model.train_accuracy, self.model.test_accuracy)
        )
        fits = train > 2 * (self.shuffled.train_accuracy - self.chance)
        return self.above_chance and train >= test / 2 and (fits or test > (1 - self.chance) / 2)

    @property
    def verdict(self) -> str:
        """In words."""
        own, other = self.model, self.shuffled
        if not self.learned:
            claim = (
                "It is not clear that this model learned anything about the classes"
                if self.above_chance
                else "This model learned nothing about the classes"
            )
            return (
                f"{claim}: of the test images it gets {own.test_accuracy:.3f} right, the same training "
                f"on shuffled labels {other.test_accuracy:.3f}, and always answering the most frequent "
                f"class {self.chance:.3f}; of the training images it has {own.train_accuracy:.3f} "
                f"right, beside {other.train_accuracy:.3f}. Read nothing into its eigenvectors."
            )
        learned = (
            f"This model learned: of the test images it gets {own.test_accuracy:.3f} right, where "
            f"chance is {self.chance:.3f} and the same training on shuffled labels gets "
            f"{other.test_accuracy:.3f}."
        )
        same = (
            f"two seeds agree in their first eigenvectors (cosine {own.agreement:.2f}; "
            f"{other.agreement:.2f} on shuffled labels)"
        )
        if own.agreement >= _AGREE and own.agreement > other.agreement:
            return f"{learned} Its eigenvectors are the data's, not the seed's: {same}."
        return (
            f"{learned} But its eigenvectors are as much the seed's as the data's: cosine "
            f"{own.agreement:.2f} between two seeds, {other.agreement:.2f} on shuffled labels. Do not "
            f"read single ones."
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a fact, one column a model."""
        import pandas as pd

        rows = {
            "accuracy on training images": "train_accuracy",
            "accuracy on test images": "test_accuracy",
            "effective rank": "effective_rank",
            f"certificate of {KEPT} eigenvectors over logit spread, worst class": "certificate",
            "agreement of two seeds": "agreement",
        }
        models = {
            "this model": self.model,
            "trained on shuffled labels": self.shuffled,
            "untrained": self.untrained,
        }
        columns = {
            name: [getattr(facts, field) for field in rows.values()]
            for name, facts in models.items()
        }
        return pd.DataFrame({"": list(rows), **columns})


def shuffled_labels(data: ImageData, seed: int = 0) -> ImageData:
    """`data` with its training labels permuted: each class keeps its share, and no image its meaning."""
    generator = checks.generator(seed)
    order = torch.randperm(len(data.train_labels), generator=generator)
    name = f"{data.name}, training labels shuffled"
    return replace(data, train_labels=data.train_labels[order], name=name)


def image_controls(
    model: ImageClassifier,
    data: ImageData,
    config: TrainingConfig,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Controls:
    """Train the controls of a model that was trained on `data` with `config`: three more models.

    seed: of the permutation of the labels
    """
    runs = Runs(progress=progress)
    other = replace(config, seed=_next(config.seed))
    (second,) = runs.train(data, [other])
    permuted = shuffled_labels(data, seed)
    first_shuffled, second_shuffled = runs.train(permuted, [config, other])
    drawn = torch.Generator().manual_seed(config.seed)
    untrained = ImageClassifier(data.pixels, len(data.classes), config.size, config.bias, drawn)
    counts = torch.bincount(data.test_labels, minlength=len(data.classes))
    return Controls(
        model=model_facts(model, data, second.model),
        shuffled=model_facts(first_shuffled.model, permuted, second_shuffled.model),
        untrained=model_facts(untrained, data),
        chance=float(counts.max()) / len(data.test_labels),
        test_images=len(data.test_labels),
    )


def model_facts(
    model: ImageClassifier, data: ImageData, other: ImageClassifier | None = None
) -> ModelFacts:
    """The facts of a model; `other` is the same training from another seed."""
    spectra = pixel_spectra(model)
    proved = certificates(model, data, kept=[min(KEPT, spectra.k)])
    worst = (proved.bound[:, 0] / proved.spread).max()
    return ModelFacts(
        train_accuracy=accuracy(model, data.train_images, data.train_labels),
        test_accuracy=accuracy(model, data.test_images, data.test_labels),
        effective_rank=float(spectra.effective_rank().mean()),
        certificate=float(worst),
        agreement=math.nan if other is None else agreement(spectra, pixel_spectra(other)),
    )


def agreement(first: Eigendecomposition, second: Eigendecomposition) -> float:
    """Absolute cosine of the eigenvectors of the largest eigenvalue, mean over matrices [n]."""

    def leading(eigen: Eigendecomposition) -> torch.Tensor:
        return eigen.vectors[torch.arange(len(eigen.values)), eigen.values.argmax(-1)]

    return float((leading(first) * leading(second)).sum(-1).abs().mean())


def _next(seed: int) -> int:
    """Another seed that a generator takes."""
    return seed - 1 if seed == 2**64 - 1 else seed + 1
