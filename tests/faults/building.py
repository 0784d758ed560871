"""Small models, dictionaries and results for the campaign, each made once."""

import functools

import torch

from tests.features.building import TOKENS, D, model, sae
from tests.tensor.reference import random_tensor
from tl_bilinear import FeatureInteractions
from tl_bilinear.circuits import FeatureCircuit, paths
from tl_bilinear.recipes.images import ImageData

LAYER = 1
IN, OUT = f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out"
VOCABULARY = 23


@functools.cache
def layer(biases=True):
    """d_in = 5, d_hidden = 6, d_out = 4."""
    return random_tensor(5, 6, 4, biases)


@functools.cache
def features():
    return FeatureInteractions(model(), LAYER, sae(IN), sae(OUT, n=30, seed=1))


@functools.cache
def run():
    return features().run(TOKENS, progress=False)


@functools.cache
def found_paths():
    return paths(model(), TOKENS[0], LAYER, torch.ones(D, dtype=torch.float64))


@functools.cache
def circuit():
    return FeatureCircuit(model(), {0: sae("blocks.0.hook_mlp_out"), 1: sae(OUT, seed=1)})


def images(**changes):
    """Four images of 2 x 3 pixels in two classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 6, generator=generator)
    labels = torch.tensor([0, 1, 0, 1])
    fields = {
        "train_images": pixels,
        "train_labels": labels,
        "test_images": pixels.clone(),
        "test_labels": labels.clone(),
        "size": (2, 3),
        "classes": ("a", "b"),
        "name": "four",
    }
    return ImageData(**{**fields, **changes})


def with_entry(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed
