"""The eigenvectors of every class, in both spaces (Pearce et al. 2025, Fig. 2, 3 and 10 to 12)."""

from __future__ import annotations

from dataclasses import dataclass

from tl_bilinear.paper.image_spectra import class_spectra, metric_spectra
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import eigenvectors_figure, filters_figure
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE

_WHERE = {
    PIXEL_SPACE: "in pixel space: unit and orthogonal as images",
    EMBEDDING_SPACE: "in embedding space, mapped to pixels: not unit or orthogonal there",
}


@dataclass(frozen=True)
class EigenvectorsSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the models."""
    label: int = 5
    """The class whose spectrum is shown."""
    fashion: ImageData | None = None
    """A second set of images, for a second model."""


@register("eigenvectors", EigenvectorsSettings)
def eigenvectors_page(data: ImageData, settings: EigenvectorsSettings, runs: Runs) -> Page:
    plots, summary = [], {}
    for images in (data, settings.fashion):
        if images is None:
            continue
        result = runs.train(images, [settings.config])[0]
        spectra = class_spectra(result.model)
        summary[f"accuracy, {images.name}"] = result.accuracy
        weighted = metric_spectra(result.model, images, 10)
        names = [f"class {name}" for name in images.classes]
        title = f"{images.name}<br>in the metric of the training images: filters and patterns"
        plots.append(filters_figure(weighted, images.size, names=names, title=title))
        label = min(settings.label, len(images.classes) - 1)
        for space, where in _WHERE.items():
            found = spectra.images(space)
            title = f"{images.name}<br>{where}"
            plots.append(eigenvectors_figure(found, images.size, names=names, title=title))
            title = f"Class {images.classes[label]} {where}"
            plots.append(eigenvectors_figure(found[label], images.size, title=title))
    return Page(
        "Eigenvectors of every class",
        "Fig. 2, 3, 10 to 12. The strongest eigenvectors of each class with their eigenvalues, from the "
        "weights alone: positive ones add to the class's logit, negative ones take from it. Below them "
        "the spectrum of one class. In pixel space the vectors are unit and orthogonal as images; the "
        "paper's are those of the embedding space, mapped to pixels. In the metric of the training "
        "images each term has a filter, what an image is multiplied with, and a pattern, what images "
        "that excite it have in common: look at the pattern to know what it answers to.",
        plots,
        summary=summary,
    )
