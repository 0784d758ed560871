"""Image classifiers with one bilinear layer (Pearce et al. 2025, section 4)."""

from tl_bilinear.recipes.images.analysis import ClassSpectra, class_spectra, truncation_accuracy
from tl_bilinear.recipes.images.data import ImageData, load_images
from tl_bilinear.recipes.images.model import ImageClassifier
from tl_bilinear.recipes.images.training import TrainingConfig, TrainingResult, train_classifier

__all__ = [
    "ClassSpectra",
    "ImageClassifier",
    "ImageData",
    "TrainingConfig",
    "TrainingResult",
    "class_spectra",
    "load_images",
    "train_classifier",
    "truncation_accuracy",
]
