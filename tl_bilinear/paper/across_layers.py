"""A model of several bilinear layers cut down: ODT beside a HOSVD of each layer on its own.

Both keep k directions of every wire between two layers. A layer's own HOSVD keeps what it writes most;
ODT keeps what the whole stack makes most of, in the coordinates of pixels or in the metric of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots.style import line, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearStack, InputMoments, hosvd, odt

if TYPE_CHECKING:
    import pandas

METHODS = ("ODT", "ODT in the images' metric", "HOSVD of each layer")


@dataclass(frozen=True)
class AcrossLayersSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=64, depth=3)
    """Of the model."""
    kept: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Directions kept of each wire."""
    ridge: float = 0.3
    """Of the images' metric."""


@dataclass(frozen=True, eq=False)
class AcrossLayers(Result):
    """What is left of a stack with k directions of each wire, by method (in the order of `METHODS`).

    Attributes
    ----------
    kept: directions of each wire
    tensor_error: [methods, kept], ``||T - T'|| / ||T||`` of the tree's tensor
    output_error: [methods, kept], ``|f(x) - f'(x)| / |f(x)|``, root mean squares over images
    accuracy: [methods, kept], on images
    bound: [kept], what ODT guarantees of its tensor error, every copy of a wire counted
    whole: accuracy of the whole model
    rounding: largest change of a logit by ODT without truncation, over the largest logit
    """

    kept: Sequence[int]
    tensor_error: Float[Tensor, "methods kept"]
    output_error: Float[Tensor, "methods kept"]
    accuracy: Float[Tensor, "methods kept"]
    bound: Float[Tensor, " kept"]
    whole: float
    rounding: float

    def to_pandas(self) -> pandas.DataFrame:
        """One row a method and number kept."""
        import pandas as pd

        rows = [
            (name, k, *(float(each[m, n]) for each in self._measured()))
            for m, name in enumerate(METHODS)
            for n, k in enumerate(self.kept)
        ]
        table = pd.DataFrame(rows, columns=["method", "kept", *_COLUMNS])
        bounds = dict(zip(self.kept, self.bound.tolist(), strict=True))
        return table.assign(bound=table["kept"].map(bounds).where(table["method"] == METHODS[0]))

    def _measured(self) -> tuple[Tensor, ...]:
        return self.tensor_error, self.output_error, self.accuracy


_COLUMNS = ("tensor error", "output error", "accuracy")


@torch.no_grad()
def across_layers(
    model: ImageClassifier, data: ImageData, *, kept: Sequence[int], ridge: float = 0.3
) -> AcrossLayers:
    """Cut a model of two layers or more to k directions of each wire, and measure on the test images.

    Raises ValueError for a model of one layer, and for numbers that no wire has.
    """
    stack = model.stack().to(torch.float64).homogeneous()
    if len(stack) < 2:
        raise ValueError(
            "a model of one bilinear layer has no wire between layers: choose depth >= 2"
        )
    images, train = (
        each.double() if stack.d_in == data.pixels else _with_one(each.double())
        for each in (data.test_images, data.train_images)
    )
    metric = InputMoments.of(train).metric(ridge)
    logits = stack(images)
    plain, measured = odt(stack), odt(stack, metric=metric)
    cuts = [(plain.truncate(k), measured.truncate(k), layer_by_layer(stack, k)) for k in kept]
    errors = [[float(cut.distance(stack)) / plain.norm for cut in each] for each in cuts]
    changed = [[cut(images) for cut in each] for each in cuts]
    outputs = [[float((z - logits).norm() / logits.norm()) for z in each] for each in changed]
    right = [
        [float((z.argmax(1) == data.test_labels).double().mean()) for z in each] for each in changed
    ]
    return AcrossLayers(
        kept=tuple(kept),
        tensor_error=torch.tensor(errors).T,
        output_error=torch.tensor(outputs).T,
        accuracy=torch.tensor(right).T,
        bound=torch.tensor([plain.bound(k) / plain.norm for k in kept]),
        whole=float((logits.argmax(1) == data.test_labels).double().mean()),
        rounding=float((plain.stack(images) - logits).abs().max() / logits.abs().max()),
    )


def _with_one(images: Tensor) -> Tensor:
    """What the stack of a model with biases reads."""
    return torch.cat([images, images.new_ones(len(images), 1)], 1)


def layer_by_layer(stack: BilinearStack, k: int) -> BilinearStack:
    """Each wire cut to the k leading singular directions of the layer that writes it."""
    layers = list(stack.layers)
    for number, layer in enumerate(stack.layers[:-1]):
        directions = hosvd(layer, k).vectors
        layers[number] = layers[number].project(directions)
        layers[number + 1] = layers[number + 1].fold(directions)
    return BilinearStack(tuple(layers))


def across_layers_figure(result: AcrossLayers) -> go.Figure:
    """The error of the logits against the number kept, for each method, on logarithmic axes."""
    figure = go.Figure()
    for number, (name, errors) in enumerate(zip(METHODS, result.output_error, strict=True)):
        figure.add_trace(line(result.kept, errors, number, name))
    figure.update_xaxes(
        title="directions kept of each wire", type="log", tickvals=list(result.kept)
    )
    figure.update_yaxes(title="relative error of the logits", type="log", exponentformat="power")
    return sized(figure, 760, 380)


def bound_figure(result: AcrossLayers) -> go.Figure:
    """The tensor's error against the number kept, and the bound that ODT states."""
    figure = go.Figure()
    for number in (0, 2):
        figure.add_trace(line(result.kept, result.tensor_error[number], number, METHODS[number]))
    bound = line(result.kept, result.bound, 0, "ODT's bound").update(line_dash="dash")
    figure.add_trace(bound)
    figure.update_xaxes(
        title="directions kept of each wire", type="log", tickvals=list(result.kept)
    )
    figure.update_yaxes(title="relative error of the tree's tensor", type="log", dtick=1)
    return sized(figure, 760, 380)


@register("across-layers", AcrossLayersSettings)
def across_layers_page(data: ImageData, settings: AcrossLayersSettings, runs: Runs) -> Page:
    model = runs.train(data, [settings.config])[0].model
    kept = [k for k in settings.kept if k <= settings.config.size]
    result = across_layers(model, data, kept=kept, ridge=settings.ridge)
    table = result.to_pandas()
    return Page(
        "Several layers cut down together",
        f"A model of {settings.config.depth} bilinear layers and nothing else is one polynomial of "
        "the pixels. Its wires are cut to a few directions: those that the whole stack makes most of "
        "(ODT), or those that each layer writes most (its own HOSVD). The whole model reaches "
        f"{result.whole:.3f}; without truncation ODT changes a logit by {result.rounding:.0e} of the "
        "largest.",
        [across_layers_figure(result), bound_figure(result)],
        {"methods": table},
        {
            f"{row.method}, {row.kept}": {"output error": row[4], "accuracy": row.accuracy}
            for row in table.itertuples()
        },
    )
