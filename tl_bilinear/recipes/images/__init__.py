"""Training image classifiers with one bilinear layer (Pearce et al. 2025, section 4).

>>> data = load_images()
>>> trained = train_classifier(data, TrainingConfig(size=128))
>>> trained.model.tensor()                     # the whole model as one BilinearTensor

What is read off them is in :mod:`tl_bilinear.paper`.
"""

from tl_bilinear.recipes.images.data import ImageData, load_images
from tl_bilinear.recipes.images.model import ImageClassifier
from tl_bilinear.recipes.images.runs import Runs
from tl_bilinear.recipes.images.training import (
    TrainingConfig,
    TrainingResult,
    config_for,
    train_classifier,
    train_classifiers,
)

__all__ = [
    "ImageClassifier",
    "ImageData",
    "Runs",
    "TrainingConfig",
    "TrainingResult",
    "config_for",
    "load_images",
    "train_classifier",
    "train_classifiers",
]
