"""Image classifiers with one bilinear layer (Pearce et al. 2025, section 4).

`load_images` and `train_classifier` make a model, `class_spectra` reads it. Each study of the paper has
a module: `sweep` (regularisers, sparsity), `similarity` (seeds and sizes), `target`, `adversarial`,
`explain`, `toy`, `lowrank` (shared neurons, certificates); `figures` draws them, `runs` keeps what was
trained.
"""

from tl_bilinear.recipes.images.adversarial import adversarial_masks, mask_effect
from tl_bilinear.recipes.images.analysis import ClassSpectra, class_spectra, truncation_accuracy
from tl_bilinear.recipes.images.data import ImageData, load_images
from tl_bilinear.recipes.images.explain import explain
from tl_bilinear.recipes.images.lowrank import certificates, shared_neurons
from tl_bilinear.recipes.images.model import ImageClassifier
from tl_bilinear.recipes.images.runs import Runs
from tl_bilinear.recipes.images.similarity import seeds_and_sizes
from tl_bilinear.recipes.images.sweep import sweep
from tl_bilinear.recipes.images.target import hidden_target
from tl_bilinear.recipes.images.toy import arithmetic_task, boolean_task, fit_toy
from tl_bilinear.recipes.images.training import (
    TrainingConfig,
    TrainingResult,
    train_classifier,
    train_classifiers,
)

__all__ = [
    "ClassSpectra",
    "ImageClassifier",
    "ImageData",
    "Runs",
    "TrainingConfig",
    "TrainingResult",
    "adversarial_masks",
    "arithmetic_task",
    "boolean_task",
    "certificates",
    "class_spectra",
    "explain",
    "fit_toy",
    "hidden_target",
    "load_images",
    "mask_effect",
    "seeds_and_sizes",
    "shared_neurons",
    "sweep",
    "train_classifier",
    "train_classifiers",
    "truncation_accuracy",
]
