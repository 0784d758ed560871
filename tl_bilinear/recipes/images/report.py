"""The quickstart's sections on an image model."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE
from tl_bilinear.recipes.page import embed, table

if TYPE_CHECKING:
    from tl_bilinear.recipes.images.quickstart import ImageQuickstart

_SPACES = {
    PIXEL_SPACE: (
        "Eigenvectors of the pixel form",
        "The embedding is folded into the layer, so that a class's logit is <code>xᵀQx</code> of the image "
        "<code>x</code> itself. These eigenvectors are unit vectors, orthogonal to each other <em>as "
        "images</em>, and <code>λ (v·x)²</code> is what each adds to the logit.",
    ),
    EMBEDDING_SPACE: (
        "Eigenvectors of the embedding form, mapped to pixels",
        "The layer is decomposed behind the embedding, as in the paper's figures. These eigenvectors are "
        "unit and orthogonal <em>there</em>. The images below are what they become through the embedding's "
        "weights: what an image is multiplied with, but neither unit vectors nor orthogonal to each other, "
        "and so not eigenvectors of anything in pixel space.",
    ),
}


def image_sections(result: ImageQuickstart) -> str:
    """Tables, accuracy under truncation, and every class in both spaces, as HTML."""
    from tl_bilinear.plots import truncation_figure

    training, data = result.training, result.data
    sections = [
        "<h1>What a bilinear MLP learned about digits, read off its weights</h1>"
        if len(data.classes) == 10
        else "<h1>What a bilinear MLP learned, read off its weights</h1>",
        f"<p class=note>{escape(data.name)}: {len(data.train_labels):,} training and "
        f"{len(data.test_labels):,} test images of {data.size[0]}x{data.size[1]} pixels. "
        f"{settings_sentence(training.config)} Trained and decomposed in {result.seconds:.0f} s.</p>",
        "<p>The model is <code>logits = head((left e) * (right e))</code> with "
        "<code>e = embed(x)</code>: no activation function, so the logit of each class is exactly a "
        "quadratic form of the image, <code>xᵀQx = Σ λᵢ (vᵢ·x)²</code>. Nothing below looked at an image: "
        "the eigenvectors come from the weights alone (Pearce et al. 2025, section 4).</p>",
        "<h2>In numbers</h2><div class=tables>",
        _accuracy_table(result),
        _class_table(result),
        "</div>",
        f"<p class=note>Largest difference between the logits of the model and of its tensor on the test "
        f"images: {result.difference:.1e} (float32). Effective rank: (L1/L2)² of all eigenvalues. "
        f"Largest and most negative eigenvalue: of the pixel form.</p>",
        embed(truncation_figure(result.truncation, training.accuracy)),
        "<h2>How to read the images</h2>",
        "<p><span class=blue>Blue</span> pixels are positive, <span class=red>red</span> ones negative, "
        "white is zero; each image has its own scale. An eigenvector answers to an image that matches its "
        "blue <em>or</em> its red part, but not both: its activation is squared, so its overall sign means "
        "nothing. The sign of the eigenvalue λ does: the upper row adds to the class's logit, the lower "
        "row takes away from it.</p>",
    ]
    for space, (title, text) in _SPACES.items():
        figures = "".join(
            _class_section(result, space, index) for index in range(len(data.classes))
        )
        is_open = " open" if space == PIXEL_SPACE else ""
        sections.append(
            f"<h2>{title}</h2><p>{text}</p><details{is_open}><summary>All classes</summary>{figures}"
            f"</details>"
        )
    return "".join(sections)


def settings_sentence(config: Any) -> str:
    """A TrainingConfig in words."""
    return (
        f"Size {config.size}, input noise of standard deviation {config.noise:g}, weight decay "
        f"{config.weight_decay:g}, {config.epochs} epochs, learning rate {config.learning_rate:g}, batch "
        f"{config.batch}, seed {config.seed}{', with biases' if config.bias else ''}."
    )


def _accuracy_table(result: ImageQuickstart) -> str:
    rows = [
        [f"{k} eigenvector{'s' * (k > 1)} a class", f"{accuracy:.3f}"]
        for k, accuracy in result.truncation.items()
    ]
    whole = ["whole model", f"{result.training.accuracy:.3f}"]
    return table(["kept", "test accuracy"], [*rows, whole])


def _class_table(result: ImageQuickstart) -> str:
    spectrum = result.spectra.pixel
    rows = [
        [
            escape(name),
            f"{float(values.max()):+.3f}",
            f"{float(values.min()):+.3f}",
            f"{float(rank):.1f}",
        ]
        for name, values, rank in zip(
            result.data.classes, spectrum.values, spectrum.effective_rank(), strict=True
        )
    ]
    return table(["class", "largest λ", "most negative λ", "effective rank"], rows)


def _class_section(result: ImageQuickstart, space: str, index: int) -> str:
    from tl_bilinear.plots import eigenvector_figure

    name = escape(result.data.classes[index])
    figure = eigenvector_figure(
        result.spectra.of(space).values[index],
        result.spectra.images(space)[index],
        result.data.size,
    )
    return f"<h3>Class {name}</h3>{embed(figure)}"
