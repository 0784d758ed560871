"""The whole model's components: output directions that nobody named (Pearce et al. 2025, 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tl_bilinear.paper.image_spectra import as_images, like_nearest
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots import eigenvectors_figure, hosvd_figure
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.tensor import hosvd

_WHERE = {
    PIXEL_SPACE: "in pixel space",
    EMBEDDING_SPACE: "in embedding space, mapped to pixels",
}


@dataclass(frozen=True)
class HOSVDSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the model."""


@register("hosvd", HOSVDSettings)
def hosvd_page(data: ImageData, settings: HOSVDSettings, runs: Runs) -> Page:
    model, plots, held = runs.train(data, [settings.config])[0].model, [], {}
    first = shown = None
    for space, where in _WHERE.items():
        components = hosvd(model.tensor(space))
        form = components.interactions
        assert form is not None
        if first is None:
            first = components
            plots.append(hosvd_figure(components, names=data.classes))
            held["share of the squared norm, first 3"] = float(components.explained[:3][-1])
        # A component and its negative are the same: as in the first space, so that colours agree.
        form = replace(form, weights=like_nearest(components.vectors, first.vectors) * form.weights)
        found = as_images(model, form.eigh(min(settings.config.size, 40)))
        shown = found if shown is None else shown
        found = replace(found, vectors=like_nearest(found.vectors, shown.vectors) * found.vectors)
        names = [f"component {i + 1}" for i in range(len(components.values))]
        plots.append(eigenvectors_figure(found, data.size, names=names, title=where))
    return Page(
        "Components of the whole model",
        "Section 3.3. The higher-order SVD finds output directions, mixtures of classes, without "
        "being told any. Each has an interaction matrix, which is decomposed as a class's is. A "
        "component that weighs all classes alike is one that a softmax does not see.",
        plots,
        summary=held,
    )
