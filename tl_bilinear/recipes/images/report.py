"""Reports: the quickstart's, and the page and its pieces that others share; one file, opens offline."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE

if TYPE_CHECKING:
    from tl_bilinear.recipes.images.quickstart import Quickstart

_STYLE = """
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a;
       max-width: 900px; margin: 2rem auto 4rem; padding: 0 1rem; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0 }
p { max-width: 44rem } .note { color: #555; font-size: .92rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .9rem .28rem 0; text-align: right; border-bottom: 1px solid #eee }
th { font-weight: 600; font-size: .88rem; color: #444 } th:first-child, td:first-child { text-align: left }
.tables { display: flex; gap: 3.5rem; flex-wrap: wrap; align-items: flex-start }
.blue { color: #2166ac; font-weight: 600 } .red { color: #b2182b; font-weight: 600 }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem } figure { margin: 0 }
code { background: #f4f4f4; padding: .1em .3em; border-radius: 3px; font-size: .9em }
"""

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


def report_html(result: Quickstart) -> str:
    """A self-contained page: tables, accuracy under truncation, every class in both spaces."""
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
    return page("tl_bilinear quickstart", "".join(sections))


def page(title: str, body: str) -> str:
    """A whole HTML page with its style and plotly.js inside: it opens offline."""
    from plotly.offline import get_plotlyjs

    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{body}</body></html>"
    )


def settings_sentence(config: Any) -> str:
    """A TrainingConfig in words."""
    return (
        f"Size {config.size}, input noise of standard deviation {config.noise:g}, weight decay "
        f"{config.weight_decay:g}, {config.epochs} epochs, learning rate {config.learning_rate:g}, batch "
        f"{config.batch}, seed {config.seed}{', with biases' if config.bias else ''}."
    )


def _accuracy_table(result: Quickstart) -> str:
    rows = "".join(
        f"<tr><td>{k} eigenvector{'s' * (k > 1)} a class<td>{accuracy:.3f}"
        for k, accuracy in result.truncation.items()
    )
    return (
        "<table><tr><th>kept<th>test accuracy"
        f"{rows}<tr><td>whole model<td>{result.training.accuracy:.3f}</table>"
    )


def _class_table(result: Quickstart) -> str:
    spectrum = result.spectra.pixel
    rows = "".join(
        f"<tr><td>{escape(name)}<td>{float(values.max()):+.3f}<td>{float(values.min()):+.3f}"
        f"<td>{float(rank):.1f}"
        for name, values, rank in zip(
            result.data.classes, spectrum.values, spectrum.effective_rank(), strict=True
        )
    )
    return (
        "<table><tr><th>class<th>largest λ<th>most negative λ<th>effective rank" + rows + "</table>"
    )


def _class_section(result: Quickstart, space: str, index: int) -> str:
    from tl_bilinear.plots import eigenvector_figure

    name = escape(result.data.classes[index])
    figure = eigenvector_figure(
        result.spectra.of(space).values[index],
        result.spectra.images(space)[index],
        result.data.size,
    )
    return f"<h3>Class {name}</h3>{embed(figure)}"


def embed(figure: Any) -> str:
    """A plotly figure as a piece of a :func:`page`."""
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": False},
    )
    return f"<figure>{html}</figure>"
