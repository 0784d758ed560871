"""What can be proved about a classifier: exact adversarial distances, answers from a few eigenpairs.

The paper hopes (section 6) that one "could plausibly prove bounds on a layer's outputs". The margin of
one class over another is a quadratic form of the image. So the smallest change that turns an answer is
known exactly (`tl_bilinear.tensor.robustness`), no attack can beat it, and a few eigenpairs prove most
answers (`tl_bilinear.tensor.margins`). The study asks

* how much input noise in training widens the distances: certified accuracy by radius,
* what the nearest adversarial image looks like, and which eigenvectors pay for it,
* how far the paper's adversarial masks and random directions are from the provable minimum,
* how many eigenpairs are enough to prove answers, in the plain metric and in that of the images.

Distances are Euclidean, over pixels in [0, 1] that a change may leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from markupsafe import Markup
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.paper.nearest import (
    Detours,
    NearestImages,
    detours,
    nearest_figure,
    nearest_images,
)
from tl_bilinear.paper.registry import Page, register
from tl_bilinear.plots.style import line, rounded, sized
from tl_bilinear.recipes.images import ImageClassifier, ImageData, Runs, TrainingConfig
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.recipes.images.runs import UNKEPT
from tl_bilinear.results import Result
from tl_bilinear.tensor import (
    AdversarialDistances,
    Attack,
    BilinearTensor,
    InputMoments,
    ProvedAccuracy,
    adversarial_distances,
    certified_accuracy,
    euclidean_metric,
    folded,
    moment_metric,
    projected_gradient_attack,
    proved_accuracy,
)

if TYPE_CHECKING:
    import pandas

ATTACK = Attack(steps=60, restarts=2)
"""What curves are held against."""


@dataclass(frozen=True)
class ProofsSettings:
    """Settings of the study."""

    config: TrainingConfig = TrainingConfig(size=128)
    """Of the models, but for the noise."""
    noises: tuple[float, ...] = (0.0, 0.15, 0.4)
    """Input noises to compare; the last one's model is taken apart."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Radii of the curves, in pixels' units."""
    kept: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Numbers of eigenpairs of each pair of classes to prove from."""
    attacked: int = 200
    """Test images that are attacked, too."""
    examples: int = 5
    """Images shown with their nearest adversarial image, one of each class."""


def classifier(
    model: ImageClassifier,
) -> tuple[BilinearTensor, tuple[Tensor, Tensor | None]]:
    """The layer in the embedding's space, and the embedding, as certificates take them."""
    directions = model.embed.weight.detach().T.contiguous()
    offset = None if model.embed.bias is None else model.embed.bias.detach().clone()
    return model.tensor(EMBEDDING_SPACE), (directions, offset)


def pixel_classifier(model: ImageClassifier) -> BilinearTensor:
    """The whole model from pixels to logits, in float64."""
    return replace(folded(*classifier(model)), input_space=PIXEL_SPACE)


# ---------------------------------------------------------------------- the study


@dataclass(frozen=True, eq=False)
class Proofs(Result):
    """What was proved about models trained with different noise.

    Attributes
    ----------
    noises: [m]; accuracy: [m], on the test images
    radii: [r]; proved: [m, r], certified accuracy, exact
    attacked: [r], share of `attacked_images` test images, evenly spread, that an attack on the last
        model leaves right; proved_attacked: [r], share of the same images proved right
    attack: what the attack was
    between: [classes, classes], median distance of right images of a class to each other class, of the
        last model; NaN on the diagonal
    medians: [m], median distance of right images to another answer
    known: accuracy proved from k eigenpairs a pair of classes, of the last model, by metric
    weights: how many numbers the last model itself has
    nearest: examples; detours: given directions beside the smallest change
    names: of the classes
    """

    noises: Sequence[float]
    accuracy: Float[Tensor, " m"]
    radii: Sequence[float]
    proved: Float[Tensor, "m r"]
    attacked: Float[Tensor, " r"]
    proved_attacked: Float[Tensor, " r"]
    attacked_images: int
    attack: str
    between: Float[Tensor, "classes classes"]
    medians: Float[Tensor, " m"]
    known: dict[str, ProvedAccuracy]
    weights: int
    nearest: NearestImages
    detours: Detours
    names: Sequence[str]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a noise and radius: certified accuracy."""
        import pandas as pd

        rows = [
            (noise, radius, float(self.proved[i, j]))
            for i, noise in enumerate(self.noises)
            for j, radius in enumerate(self.radii)
        ]
        return pd.DataFrame(rows, columns=["noise", "radius", "proved"])


def proofs(
    data: ImageData,
    settings: ProofsSettings = ProofsSettings(),
    *,
    runs: Runs = UNKEPT,
    progress: bool = False,
) -> Proofs:
    """Train models with different noise and prove what can be proved about them.

    Raises ValueError for no noise, counts below 1, or a radius that is none.
    """
    if not settings.noises:
        raise ValueError("noises are the input noises to compare: give at least one")
    if min((settings.attacked, settings.examples, *settings.kept), default=0) < 1:
        raise ValueError("attacked, examples and kept are counts of at least 1")
    configs = [replace(settings.config, noise=noise) for noise in settings.noises]
    models = [result.model for result in runs.train(data, configs)]
    images, labels = data.test_images.to(torch.float64), data.test_labels
    accuracy, proved, medians = [], [], []
    for model in models:
        tensor = pixel_classifier(model)
        found = adversarial_distances(tensor, images, progress=progress)
        right = found.predicted == labels
        accuracy.append(right.double().mean())
        medians.append(found.radius[right].median())
        proved.append(certified_accuracy(found, labels, settings.radii).proved)
    few = torch.linspace(0, len(images) - 1, min(settings.attacked, len(images))).long()
    left = attacked(tensor, images[few], labels[few], settings.radii, progress=progress)
    held = (
        (right[few] & (found.radius[few] > torch.tensor(settings.radii)[:, None])).double().mean(1)
    )
    moments = InputMoments.of(data.train_images, population="training images", space=PIXEL_SPACE)
    plain = euclidean_metric(tensor)
    metrics = {"Euclidean": plain, "of the training images": moment_metric(tensor, moments)}
    rank = len(plain.map)
    kept = tuple(k for k in settings.kept if k <= rank) or (rank,)
    return Proofs(
        settings.noises,
        torch.stack(accuracy),
        settings.radii,
        torch.stack(proved),
        left,
        held,
        len(images[few]),
        str(ATTACK),
        _between(found, labels, len(data.classes)),
        torch.stack(medians),
        {name: proved_accuracy(tensor, images, labels, kept, m) for name, m in metrics.items()},
        sum(each.numel() for each in models[-1].parameters()),
        nearest_images(tensor, images[_one_a_class(labels, right, settings.examples)], data),
        detours(models[-1], tensor, images, found, label=min(3, len(data.classes) - 1)),
        data.classes,
    )


def attacked(
    tensor: BilinearTensor,
    images: Float[Tensor, "n pixels"],
    labels: Int[Tensor, " n"],
    radii: Sequence[float],
    *,
    progress: bool = False,
) -> Float[Tensor, " r"]:
    """The share of images that a projected-gradient attack leaves right, by radius."""
    broken = [
        projected_gradient_attack(tensor, images, labels, radius, ATTACK)
        for radius in tqdm(radii, unit="attack", disable=not progress)
    ]
    return 1 - torch.stack(broken).double().mean(1)


def _one_a_class(labels: Tensor, right: Tensor, most: int) -> Tensor:
    """Rows of the first right image of each class, up to `most`."""
    firsts = [(right & (labels == label)).nonzero()[:1, 0] for label in labels.unique()]
    return torch.cat(firsts)[:most]


def _between(found: AdversarialDistances, labels: Tensor, classes: int) -> Tensor:
    """Median distance from right images of each class to each other."""
    result = found.distance.new_full((classes, classes), torch.nan)
    for label in range(classes):
        rows = (labels == label) & (found.predicted == label)
        if bool(rows.any()):
            result[label] = found.distance[rows].median(0).values
    return result.fill_diagonal_(torch.nan)


# ---------------------------------------------------------------------- figures


def certified_figure(result: Proofs) -> go.Figure:
    """Certified accuracy by radius and noise, and what an attack leaves of the last model's."""
    figure = go.Figure()
    for number, (noise, proved) in enumerate(zip(result.noises, result.proved, strict=True)):
        figure.add_trace(line(result.radii, proved, number, f"noise {noise:g}: proved"))
    last = len(result.noises)
    name = f"noise {result.noises[-1]:g}, {result.attacked_images} images: "
    for offset, (values, what) in enumerate(
        ((result.proved_attacked, "proved"), (result.attacked, "left by the attack"))
    ):
        trace = line(result.radii, values, last + offset, name + what)
        figure.add_trace(trace.update(line_dash=("dot", "dash")[offset]))
    figure.update_xaxes(title="size of the change, Euclidean over pixels in [0, 1]")
    figure.update_yaxes(title="test accuracy", range=[0, 1.02])
    return sized(figure, 820, 400, title="Accuracy that no change of a size can take away")


def between_figure(result: Proofs) -> go.Figure:
    """Median distance from each class to each other."""
    names = list(result.names)
    grid = go.Heatmap(
        z=rounded(result.between),
        x=names,
        y=names,
        colorscale="Blues_r",
        texttemplate="%{z:.2f}",
        hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>",
        colorbar={"title": "distance"},
    )
    figure = go.Figure(grid)
    figure.update_xaxes(title="to", type="category")
    figure.update_yaxes(title="from", type="category", autorange="reversed")
    return sized(figure, 640, 540, title="Median smallest change that turns one class into another")


def known_figure(result: Proofs) -> go.Figure:
    """Accuracy proved from k eigenpairs, against k and against the numbers that the proof reads."""
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=["by eigenpairs of each pair of classes", "by numbers read"],
    )  # fmt: skip
    for number, (name, found) in enumerate(result.known.items()):
        for column, places in enumerate((found.k, found.numbers), start=1):
            trace = line(places.tolist(), found.proved, number, f"metric {name}")
            figure.add_trace(trace.update(showlegend=column == 1), 1, column)
    for column in (1, 2):
        figure.add_hline(
            y=float(result.accuracy[-1]),
            line={"color": "#6b6b6b", "dash": "dash"},
            row=1,
            col=column,
        )
    figure.add_vline(x=result.weights, line={"color": "#6b6b6b", "dash": "dot"}, row=1, col=2)
    ticks = next(iter(result.known.values())).k.tolist()
    figure.update_xaxes(type="log", tickvals=ticks, title="eigenpairs", row=1, col=1)
    figure.update_xaxes(title="numbers (dotted: the model's own)", row=1, col=2)
    figure.update_yaxes(title="test accuracy proved", range=[0, 1.02], row=1, col=1)
    return sized(figure, 880, 420, title="Accuracy proved from a few eigenpairs", margin_t=75)


@register("proofs", ProofsSettings)
def proofs_page(data: ImageData, settings: ProofsSettings, runs: Runs) -> Page:
    return page_of(proofs(data, settings, runs=runs, progress=runs.progress))


def page_of(result: Proofs) -> Page:
    """The page of a result."""
    import pandas as pd

    last = f"noise {result.noises[-1]:g}"
    gap = float((result.attacked - result.proved_attacked).max())
    known = pd.concat(
        [found.to_pandas().assign(metric=name) for name, found in result.known.items()],
        ignore_index=True,
    )
    examples = result.nearest
    ratio = examples.within / examples.distance
    mask = result.detours.to_pandas()
    sentences = [
        "The margin of one class over another is a quadratic form of the image. So the smallest change "
        "(Euclidean, over pixels) that turns an answer is known <em>exactly</em>, and so is certified "
        "accuracy. A projected-gradient attack ({attack}) leaves up to {gap:.1%} more of {n} images "
        "right: changes that exist, and that it does not find.",
        "All that follows is of the model trained with {last}. First the nearest image with another "
        "answer, and the eigenvectors of the margin that pay for the change, each with its share of it; "
        "all shares add up to 100 %. Changes may leave [0, 1]. An attack that keeps inside needs "
        "{inside:.2f} times as much (median of the images shown); the least that is needed there lies "
        "between.",
        "A change along the paper's adversarial mask (section 4.4) must be {mask:.1f} times as long as "
        "the smallest one, a random one {random:.0f} times: medians over the images that it turns.",
        "Last, how many test images are certainly right when only k eigenpairs of each pair of classes "
        "are known and the rest by a bound, in the plain metric and in that of the training images.",
    ]
    inside = ratio[ratio.isfinite()]
    text = Markup("</p><p>".join(sentences)).format(
        n=result.attacked_images,
        gap=gap,
        attack=result.attack,
        last=last,
        inside=float(inside.median()) if len(inside) else float("nan"),
        mask=mask["over the minimum"][1],
        random=mask["over the minimum"][2],
    )
    return Page(
        "What can be proved",
        text,
        [
            certified_figure(result),
            nearest_figure(result.nearest),
            between_figure(result),
            known_figure(result),
        ],
        {"certified accuracy": result.to_pandas(), "from eigenpairs": known, "directions": mask},
        {
            "accuracy": float(result.accuracy[-1]),
            "median distance": {
                f"noise {noise:g}": float(median)
                for noise, median in zip(result.noises, result.medians, strict=True)
            },
            f"certified accuracy, {last}": {
                f"{radius:g}": float(share)
                for radius, share in zip(result.radii, result.proved[-1], strict=True)
            },
            "largest gap to the attack": gap,
            f"accuracy proved from {int(known['k'].max())} pairs": {
                name: float(found.proved[-1]) for name, found in result.known.items()
            },
        },
    )
