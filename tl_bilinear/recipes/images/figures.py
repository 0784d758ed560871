"""The paper's image figures by name, and the gallery of them (the command `tl-bilinear images`).

>>> study = Study.of(load_images(), runs=Runs("runs"))
>>> figure = make_figure("target", study)
>>> figure.plots[0], figure.tables["seeds"], figure.summary
>>> write_gallery(study, "images", figures=["eigenvectors", "target"])

A figure function trains what it needs (through `Runs`, so that figures share models), asks the analysis
modules, and describes what it shows. It computes nothing of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_bilinear.io import require_writable, whole_directory
from tl_bilinear.recipes.images.adversarial import adversarial_masks, mask_effect
from tl_bilinear.recipes.images.analysis import class_spectra
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.explain import explain
from tl_bilinear.recipes.images.lowrank import certificates, shared_neurons
from tl_bilinear.recipes.images.model import EMBEDDING_SPACE, PIXEL_SPACE, ImageClassifier
from tl_bilinear.recipes.images.quickstart import config_for
from tl_bilinear.recipes.images.runs import UNKEPT, Runs
from tl_bilinear.recipes.images.similarity import seeds_and_sizes
from tl_bilinear.recipes.images.sweep import noise_and_decay, rare_pixels, regularisers, sweep
from tl_bilinear.recipes.images.target import TARGET_CONFIG, hidden_target
from tl_bilinear.recipes.images.toy import GATES, arithmetic_task, boolean_task, fit_toy
from tl_bilinear.recipes.images.training import TrainingConfig

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

PAGE, SUMMARY = "gallery.html", "summary.json"
KIND = "tl_bilinear image gallery"


@dataclass(frozen=True, eq=False)
class Study:
    """What figures are made from.

    Attributes
    ----------
    data: the images; fashion: a second set for the gallery of eigenvectors
    config: of the models, unless a figure varies it; `Study.of` fits it to the number of images
    sizes: of the comparison between sizes
    seeds: of every comparison between runs
    label: the class that figures of one class show
    """

    data: ImageData
    config: TrainingConfig
    fashion: ImageData | None = None
    sizes: Sequence[int] = (32, 64, 128, 256)
    seeds: int = 3
    label: int = 5
    runs: Runs = UNKEPT

    @classmethod
    def of(cls, data: ImageData, *, size: int = 128, noise: float = 0.4, **given: Any) -> Study:
        """Settings for `data`; others as the fields."""
        return cls(data, config_for(data, size=size, noise=noise), **given)

    def model(self, **changes: Any) -> ImageClassifier:
        """A model of `config` with some settings changed."""
        return self.runs.train(self.data, [replace(self.config, **changes)])[0].model

    def config_for(self, data: ImageData) -> TrainingConfig:
        """`config`, with batches and epochs that fit the number of images of another set."""
        if data is self.data:
            return self.config
        fitting = config_for(data)
        return replace(self.config, batch=fitting.batch, epochs=fitting.epochs)


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure, in the words and numbers that go with it.

    Attributes
    ----------
    title, text: what it shows; text may hold HTML
    plots: plotly figures, in order
    tables: numbers by name, one CSV file each
    summary: the few numbers that answer the figure's question
    """

    title: str
    text: str
    plots: Sequence[go.Figure]
    tables: Mapping[str, pandas.DataFrame] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------- the figures


def eigenvectors(study: Study) -> Figure:
    from tl_bilinear.plots import eigenvector_figure, gallery_figure

    plots, summary = [], {}
    sets = [study.data] + ([study.fashion] if study.fashion else [])
    for data in sets:
        result = study.runs.train(data, [study.config_for(data)])[0]
        spectra = class_spectra(result.model)
        summary[f"accuracy, {data.name}"] = result.accuracy
        for space, where in (
            (PIXEL_SPACE, "in pixel space: unit and orthogonal as images"),
            (EMBEDDING_SPACE, "in embedding space, mapped to pixels: not unit or orthogonal there"),
        ):
            found, images = spectra.of(space), spectra.images(space)
            title = f"{data.name}<br>{where}"
            names = [f"class {name}" for name in data.classes]
            plots.append(gallery_figure(found.values, images, data.size, names, title=title))
            label = min(study.label, len(data.classes) - 1)
            plots.append(
                eigenvector_figure(
                    found.values[label], images[label], data.size, title=f"Class {label} {where}"
                )
            )
    return Figure(
        "Eigenvectors of every class",
        "Fig. 2, 3, 10 to 12. The strongest eigenvectors of each class, positive (they add to its logit) "
        "and negative (they take from it), with their eigenvalues, from the weights alone; and the "
        "spectrum of one class. In pixel space the vectors are unit and orthogonal as images; the "
        "paper's are those of the embedding space, mapped to pixels.",
        plots,
        summary=summary,
    )


def hosvd(study: Study) -> Figure:
    from tl_bilinear.plots import gallery_figure, hosvd_figure

    model, plots = study.model(), []
    for space in (PIXEL_SPACE, EMBEDDING_SPACE):
        components = hosvd(model.tensor(space))
        assert components.interactions is not None
        if space == PIXEL_SPACE:
            plots.append(hosvd_figure(components, study.data.classes))
            explained = components.explained
        found = components.interactions.eigh(min(model.embed.out_features, 40))
        images = found.vectors if space == PIXEL_SPACE else model.to_pixels(found.vectors)
        names = [f"component {i + 1}" for i in range(len(components.values))]
        title = "in pixel space" if space == PIXEL_SPACE else "in embedding space, mapped to pixels"
        plots.append(gallery_figure(found.values, images, study.data.size, names, title=title))
    return Figure(
        "Components of the whole model",
        "Section 3.3. The higher-order SVD finds output directions (mixtures of classes) without being "
        "told any, each with an interaction matrix, decomposed as a class's is. A component that "
        "weighs all classes alike is one that a softmax does not see.",
        plots,
        summary={"share of the squared norm, first 3": float(explained[2])},
    )


def regularisation(study: Study) -> Figure:
    from tl_bilinear.plots import sweep_figure, sweep_numbers_figure

    result = sweep(study.data, regularisers(study.config), label=study.label, runs=study.runs)
    table = result.to_pandas()
    return Figure(
        "Regularisers and augmentations",
        f"Fig. 4, 13, 14, appendix B. The top four positive eigenvectors of class {study.label} under every "
        "setting. Without input noise they look at single pixels at the edge, which hardly any image "
        "uses: the share of the top eigenvector on those pixels measures it. Geometric augmentations "
        "keep the study's noise.",
        [sweep_figure(result, study.data.size), sweep_numbers_figure(result)],
        {"settings": table},
        {name: float(a.mean()) for name, a in zip(result.settings, result.accuracy, strict=True)},
    )


def similarity(study: Study) -> Figure:
    from tl_bilinear.plots import similarity_figure, sizes_truncation_figure

    result = seeds_and_sizes(
        study.data, study.config, study.sizes, seeds=study.seeds, runs=study.runs
    )
    truncation = result.truncation()
    largest = truncation[truncation["size"] == result.sizes[-1]]
    return Figure(
        "The same eigenvectors in other seeds and sizes",
        f"Fig. 5, 18. {study.seeds} seeds of each size; absolute cosine of eigenvectors of equal rank, "
        "positive and negative apart, mean over classes, in pixel space, never a model with itself. "
        "Shaded: the middle 90 % of the pairs, or runs.",
        [similarity_figure(result), sizes_truncation_figure(result)],
        {"similarity": result.to_pandas(), "truncation": truncation},
        {
            "cosine of the first positive eigenvectors": {
                size: float(result.within[i, 0, 0].nanmean()) for i, size in enumerate(result.sizes)
            },
            "accuracy lost by eigenvectors a class, largest size": dict(
                zip(largest["eigenvectors"].tolist(), largest["lost"].tolist(), strict=True)
            ),
        },
    )


def target(study: Study) -> Figure:
    from tl_bilinear.plots import parts_figure, target_figure

    # The task's own settings; only where images are few, the study's smaller batches.
    config = replace(TARGET_CONFIG, batch=study.config.batch)
    result = hidden_target(study.data, config, seeds=study.seeds, runs=study.runs)
    return Figure(
        "The hidden target",
        "Fig. 6, section 4.3. A model with biases learnt whether an image is like a hidden target or "
        "like the target's complement. The first eigenvector of True minus False shows the target; the "
        "cosine is taken over the pixels that images use, with both less their mean. Last column: the linear part of the "
        "biases as an image, above it the constant. Below: what the three parts add on average over "
        "test images, interaction against a learnt threshold.",
        [target_figure(result, study.data.size), parts_figure(result)],
        {"seeds": result.to_pandas()},
        {
            "first eigenvalue over second": result.dominance.tolist(),
            "cosine with the target": result.cosines[:, 0].tolist(),
            "accuracy": result.accuracy.tolist(),
            "share of the more frequent label": result.base_rate,
        },
    )


def adversarial(study: Study) -> Figure:
    from tl_bilinear.plots import mask_effect_figure, masks_figure

    data, label = study.data, 3
    edge = rare_pixels(data)
    noisy, plain = study.model(noise=0.15), study.model(noise=0.0)
    masks = {
        "noise 0.15": adversarial_masks(noisy, label),
        "noise 0.3": adversarial_masks(study.model(noise=0.3), label),
        "no noise": adversarial_masks(plain, label),
        "no noise, edge only": adversarial_masks(plain, label, region=edge),
        "noise 0.15, pixel-space dual": adversarial_masks(noisy, label, space=PIXEL_SPACE),
    }
    models = [noisy, study.model(noise=0.3), plain, plain, noisy]
    effects = {
        name: mask_effect(model, found, data.test_images, data.test_labels)
        for (name, found), model in zip(masks.items(), models, strict=True)
    }
    tables = {name: effect.to_pandas() for name, effect in effects.items()}
    table = _stacked(tables, "model")
    example = data.test_images[int((data.test_labels == 8).nonzero()[0])]
    at = table[(table["strength"] == 0.3) & (table["model"] == "noise 0.15")]
    return Figure(
        "Adversarial masks from the weights",
        f"Fig. 7, 23, section 4.4. Masks towards class {label}, from the pseudo-inverse of the ten top "
        "positive eigenvectors of every class; no image went into them. Accuracy on test images, and "
        "how many images of other classes are taken for the class, means over three masks, beside the "
        "masks' permutations and Gaussian masks of equal strength (root mean square over pixels). The "
        "edge-only masks act on pixels that fewer than 1 % of training images use. The pixel-space dual "
        "moves one eigenvector and no other of the hundred, and is too long to do harm.",
        [masks_figure(masks, example, data.size), mask_effect_figure(effects)],
        {"effects": table},
        {"accuracy at strength 0.3, noise 0.15": at.groupby("kind")["accuracy"].mean().to_dict()},
    )


def explanation(study: Study) -> Figure:
    from tl_bilinear.plots import explanation_figure

    data, model = study.data, study.model()
    spectra = class_spectra(model)
    with torch.no_grad():
        logits = model(data.test_images)
    right = logits.argmax(1) == data.test_labels
    first, second = logits.topk(2, dim=1).values.unbind(1)
    # The narrowest right decision, and the most confident wrong one.
    narrow = int(torch.where(right, first - second, torch.inf).argmin())
    wrong = int(torch.where(right, -torch.inf, first - second).argmax())
    plots, tables, summary = [], {}, {}
    for name, index in (("narrowly right", narrow), ("wrong", wrong)):
        found = explain(
            model, data.test_images[index], space=EMBEDDING_SPACE, spectra=spectra,
            classes=data.classes,
        )  # fmt: skip
        lines, pictures = explanation_figure(found, data.size)
        truth = data.classes[int(data.test_labels[index])]
        lines.update_layout(title=f"Test image {index}, a {truth}: {name}", margin={"t": 70})
        plots += [lines, pictures]
        tables[name] = found.logit_table()
        summary[f"largest gap between logit and sum, {name}"] = found.gap
    return Figure(
        "One prediction, taken apart",
        "Fig. 15, 16, appendix C. Every logit is the sum of its eigenvectors' contributions; shown are the "
        "three classes of largest logit, the eigenvectors that made them most and those that suppressed "
        "them most, with what each adds on this image.",
        plots,
        tables,
        summary,
    )


def toy(study: Study) -> Figure:
    from tl_bilinear.plots import toy_figure

    gates = [fit_toy(boolean_task(gate), bias=bias) for gate in GATES for bias in (False, True)]
    sums = [
        fit_toy(arithmetic_task(kind), bias=bias)
        for kind in ("sum", "product")
        for bias in (False, True)
    ]
    modular = [fit_toy(arithmetic_task("modular sum"))]
    table = _stacked([fit.to_pandas() for fit in gates + sums + modular])
    return Figure(
        "Boolean gates and arithmetic",
        "Appendix J. A bare bilinear layer trained on all inputs of a task, with and without biases (the "
        "last coordinate is then the constant 1): its matrix as the weights have it, symmetrised, what the "
        "inputs see of it (the smallest matrix that computes the same on them: on bits x² = x, so that many "
        "do), what the operation must look like (the smallest that computes it best), and its eigenvectors, a "
        "coordinate a column. The distance is that of the middle two, relative. Without biases NAND, NOR, XNOR and a sum are out of reach: "
        "<code>best_error</code> in the table.",
        [toy_figure(gates), toy_figure(sums), toy_figure(modular)],
        {"outputs": table},
        {
            "largest distance": float(table["distance"].max()),
            "largest error beyond the best possible": float(
                (table["error"] - table["best_error"]).max()
            ),
        },
    )


def sparsity(study: Study) -> Figure:
    from tl_bilinear.plots import sparsity_figure

    noises, decays = (0.0, 0.15, 0.4, 0.8), (0.01, 0.1, 1.0, 3.0)
    grid = noise_and_decay(study.config, noises, decays)
    result = sweep(study.data, grid, label=study.label, runs=study.runs)
    return Figure(
        "Noise makes eigenvectors sparse, weight decay spectra",
        "Fig. 17, appendix D. (L1/L2)² of the eigenvalues, and of the pixels of the five top eigenvectors, "
        "mean over classes.",
        [sparsity_figure(result, noises, decays)],
        {"grid": result.to_pandas()},
    )


def neurons(study: Study) -> Figure:
    from tl_bilinear.plots import neuron_gallery_figure, neurons_figure

    result = shared_neurons(study.model(), study.data)
    table = result.to_pandas()
    return Figure(
        "Neurons that the classes share",
        "A CP decomposition writes the whole model as a few neurons, each a product of two patterns "
        "<code>(l·x)(m·x)</code> that all classes read with their own weights; eigenvectors serve one "
        "class each. Labels: components. Below, the strongest neurons of the fit of 20: the pattern whose "
        "square adds, the one whose square is taken off, and the three classes written most.",
        [neurons_figure(result), neuron_gallery_figure(result, 2, study.data.size, study.data.classes)],
        {"components": table},
        {
            "accuracy with 10 shared neurons": float(result.accuracy[1]),
            "accuracy with 20 shared neurons": float(result.accuracy[2]),
            "accuracy of the model": result.whole,
        },
    )  # fmt: skip


def certified(study: Study) -> Figure:
    from tl_bilinear.plots import certificates_figure

    result = certificates(study.model(), study.data.test_images)
    table = result.to_pandas()
    means = table.groupby("eigenvectors")[["bound", "worst", "mean"]].mean()
    return Figure(
        "What a truncation can cost, certified",
        "Dropping all but k eigenvectors changes a logit by at most <code>|x|² max|λ dropped|</code>, on "
        "every image of that norm, whatever it shows; beside the largest and mean error on test images.",
        [certificates_figure(result)],
        {"classes": table},
        {f"{k} eigenvectors": row.to_dict() for k, row in means.iterrows()},
    )


FIGURES: dict[str, Callable[[Study], Figure]] = {
    "eigenvectors": eigenvectors,
    "hosvd": hosvd,
    "regularisation": regularisation,
    "similarity": similarity,
    "target": target,
    "adversarial": adversarial,
    "explanation": explanation,
    "toy": toy,
    "sparsity": sparsity,
    "neurons": neurons,
    "certificates": certified,
}


# ---------------------------------------------------------------------- the gallery


def make_figure(name: str, study: Study) -> Figure:
    """One figure by name; raises ValueError naming those there are."""
    return FIGURES[_known([name])[0]](study)


def write_gallery(
    study: Study,
    out: str | Path,
    figures: Sequence[str] = (),
    *,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Make figures (all by default) and write them: gallery.html, summary.json, a CSV file each table.

    `out` is made whole or not at all; a previous gallery there is replaced, anything else refused before
    the work. `report` is told of each figure with its time. Returns seconds by figure.
    """
    names = _known(figures) or list(FIGURES)
    require_writable(out, _is_gallery)
    made, seconds = {}, {}
    for name in names:
        start = time.monotonic()
        made[name] = FIGURES[name](study)
        seconds[name] = round(time.monotonic() - start, 1)
        report(f"{name}: {seconds[name]:.1f} s")
    with whole_directory(out, _is_gallery) as folder:
        (folder / PAGE).write_text(_page(study, made, seconds), encoding="utf-8")
        for name, figure in made.items():
            for table, numbers in figure.tables.items():
                numbers.to_csv(folder / f"{name}, {table}.csv", index=False)
        stored = {
            "kind": KIND,
            "data": study.data.name,
            "training_images": len(study.data.train_labels),
            "test_images": len(study.data.test_labels),
            "config": asdict(study.config),
            "seconds": seconds,
            "figures": {name: figure.summary for name, figure in made.items()},
        }
        (folder / SUMMARY).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    return seconds


def _page(study: Study, made: Mapping[str, Figure], seconds: Mapping[str, float]) -> str:
    from tl_bilinear.recipes.images.report import settings_sentence
    from tl_bilinear.recipes.page import embed, page

    data = study.data
    parts = [
        "<h1>What bilinear image models learn, read off their weights</h1>",
        f"<p class=note>{escape(data.name)}: {len(data.train_labels):,} training and "
        f"{len(data.test_labels):,} test images. {settings_sentence(study.config)} "
        f"All figures together: {sum(seconds.values()):.0f} s.</p>",
        "<p><span class=blue>Blue</span> is positive, <span class=red>red</span> negative, white zero; "
        "every image has its own scale. An eigenvector answers to its blue <em>or</em> its red part; the "
        "sign of its eigenvalue says whether it speaks for a class or against it.</p>",
    ]
    for name, figure in made.items():
        parts.append(f'<h2 id="{name}">{escape(figure.title)}</h2><p>{figure.text}</p>')
        parts += [embed(plot) for plot in figure.plots]
        for title, table in figure.tables.items():
            html = table.to_html(index=False, border=0, float_format=lambda v: f"{v:.4g}")
            parts.append(
                f"<details><summary>{escape(title)}, {len(table)} rows</summary>{html}</details>"
            )
        parts.append(f"<p class=note>{seconds[name]:.1f} s</p>")
    return page("tl_bilinear: image models", "".join(parts))


def _known(names: Sequence[str]) -> list[str]:
    if unknown := [name for name in names if name not in FIGURES]:
        raise ValueError(f"no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    return list(dict.fromkeys(names))


def _is_gallery(folder: Path) -> bool:
    try:
        stored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    entries = [entry for entry in folder.iterdir() if entry.name not in (PAGE, SUMMARY)]
    return all(entry.suffix == ".csv" for entry in entries) and stored.get("kind") == KIND


def _stacked(
    tables: Mapping[str, pandas.DataFrame] | Sequence[pandas.DataFrame], key: str = ""
) -> pandas.DataFrame:
    import pandas as pd

    if isinstance(tables, Mapping):
        tables = [table.assign(**{key: name}) for name, table in tables.items()]
    return pd.concat(tables, ignore_index=True)
