"""The whole way on real images and on a language model that ships, in one report.

Images: train, decompose every class, measure, compare with what learned nothing (`quickstart_images`).
Language: three features of a layer between two SAEs, read from weights and checked by intervention
(`quickstart_language`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tl_bilinear.io import require_writable, whole_directory, write_json
from tl_bilinear.paper.config import QuickstartConfig
from tl_bilinear.paper.image_controls import shuffled_labels
from tl_bilinear.paper.page import SummaryTable, finite, render
from tl_bilinear.paper.quickstart_images import (
    ImageQuickstart,
    image_quickstart,
)
from tl_bilinear.paper.quickstart_language import LanguageQuickstart, demo_quickstart
from tl_bilinear.paper.report_language import language_sections
from tl_bilinear.recipes.images import config_for, load_images

SUMMARY, REPORT = "summary.json", "report.html"
KIND = "quickstart"


@dataclass(frozen=True, eq=False)
class Quickstart:
    """What the quickstart found; `language` is None where it was left out."""

    images: ImageQuickstart
    language: LanguageQuickstart | None

    def summary(self) -> dict[str, object]:
        """The numbers, for JSON."""
        parts: dict[str, object] = {"images": self.images.summary()}
        if self.language is not None:
            parts["language"] = self.language.summary()
        return parts

    def summary_tables(self) -> list[SummaryTable]:
        """The main numbers, as tables for a terminal or a notebook."""
        language = [] if self.language is None else self.language.summary_tables()
        return [*self.images.summary_tables(), *language]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.summary_tables()))

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
    require_writable(config.out, KIND)
    data = load_images(config.data, classes=config.classes)
    if config.shuffle_labels:
        data = shuffled_labels(data)
    names = ("size", "noise", "weight_decay", "epochs", "batch", "seed")
    training = config_for(data, **{name: getattr(config, name) for name in names})
    images = image_quickstart(data, training, controls=config.controls, progress=progress)
    language = demo_quickstart(progress=progress) if config.language else None
    result = Quickstart(images, language)
    write_results(result, config.out)
    return result


def write_results(result: Quickstart, out: str | Path) -> None:
    """report.html, summary.json, eigenvectors.safetensors and model.safetensors of the image model."""
    with whole_directory(out, KIND) as folder:
        (folder / REPORT).write_text(result.report(), encoding="utf-8")
        write_json(folder / SUMMARY, finite(result.summary()))
        result.images.save(folder)
