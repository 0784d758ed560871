"""An image classifier and its eigenvectors, as documents of a bundle.

The page computes logits from the model's own matrices, and the part of each logit that every eigenvector
makes, for an image that is chosen or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tl_bilinear.explorer.documents import Document, Panel, Read, packed
from tl_bilinear.io import digest_of
from tl_bilinear.paper.image_spectra import pixel_spectra
from tl_bilinear.recipes.images import ImageClassifier, ImageData
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE

VECTORS = 20  # eigenvectors of each class that the page holds, at most
IMAGES = 12  # of each class


def image_panel(
    model: ImageClassifier,
    data: ImageData,
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    name: str = "image",
    choice: Mapping[str, str] | None = None,
) -> Panel:
    """A panel of an image classifier, with the first test images of every class to choose from.

    Parameters
    ----------
    facts: what else is to be said of the model, by name
    name: of the panel, the beginning of its documents' names
    choice: which of several models this is: ``{"trained on": "MNIST", "regulariser": "noise 0"}``
        Panels of one title that have one are shown in one place, with a select for each setting.
    """

    @torch.no_grad()
    def layer(read: Read) -> Document:
        tensor = model.tensor(EMBEDDING_SPACE)
        found = {"embed": packed(model.embed.weight)}
        if model.embed.bias is not None:
            found["embed_bias"] = packed(model.embed.bias)
        for part in ("left", "right", "out", "bias_left", "bias_right", "bias_out"):
            if getattr(tensor, part) is not None:
                found[part] = packed(getattr(tensor, part))
        return found

    def eigen(read: Read) -> Document:
        found = pixel_spectra(model)
        k = min(VECTORS, found.k)
        return {"values": packed(found.values[:, :k]), "vectors": packed(found.vectors[:, :k])}

    def images(read: Read) -> Document:
        chosen = _first_of_each(data.test_labels, len(data.classes))
        return {
            "images": packed((data.test_images[chosen] * 255).round().to(torch.uint8)),
            "labels": packed(data.test_labels[chosen]),
        }

    manifest = {
        "kind": "image",
        "name": name,
        "title": title,
        "facts": dict(facts or {}),
        "size": list(data.size),
        "classes": list(data.classes),
        "hidden": model.layer.left.out_features,
    }
    if choice:
        manifest["choice"] = dict(choice)
    identity = digest_of(model.state_dict(), {"data": data.fingerprint, "manifest": manifest})
    made = {f"{name}-layer": layer, f"{name}-eigen": eigen, f"{name}-images": images}
    return Panel(manifest, made, identity)


def _first_of_each(labels: Tensor, classes: int) -> Tensor:
    return torch.cat([(labels == label).nonzero()[:IMAGES, 0] for label in range(classes)])
