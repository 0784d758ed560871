"""All studies on one page: the command `tl-bilinear images`.

>>> make_gallery(GallerySettings(studies=("eigenvectors", "target")))
>>> page = make("target", load_images(), TargetSettings(seeds=3))      # one of them, in a notebook
>>> page.plots[0], page.tables["seeds"], page.summary
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_bilinear.io import require_writable, whole_directory, write_json
from tl_bilinear.paper.config import GallerySettings
from tl_bilinear.paper.page import finite, render
from tl_bilinear.paper.registry import Page, Study, find_study, studies
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig, config_for, load_images
from tl_bilinear.recipes.images.runs import UNKEPT

PAGE, SUMMARY = "gallery.html", "summary.json"
KIND = "gallery"


@dataclass(frozen=True, eq=False)
class Written:
    """One study of a gallery: its settings, what it shows, and how long it took."""

    name: str
    settings: Any
    page: Page
    seconds: float

    @property
    def words(self) -> str:
        """The settings in a sentence."""
        parts = []
        for setting in dataclasses.fields(self.settings):
            value, name = getattr(self.settings, setting.name), setting.name.replace("_", " ")
            if isinstance(value, TrainingConfig):
                parts.append(str(value))
            elif isinstance(value, tuple):
                parts.append(f"{name} {', '.join(map(str, value))}")
            elif value is not None:
                parts.append(f"{name} {value.name if isinstance(value, ImageData) else value}")
        sentence = "; ".join(parts)
        return f"{sentence[:1].upper()}{sentence[1:]}."


def make(name: str, data: ImageData, settings: Any = None, *, runs: Runs = UNKEPT) -> Page:
    """Make one study, with its default settings unless others are given.

    Raises ValueError for an unknown study, TypeError for the settings of another.
    """
    study = find_study(name)
    settings = study.settings() if settings is None else settings
    if not isinstance(settings, study.settings):
        raise TypeError(
            f"the settings of {name} are {study.settings.__name__}, got {type(settings).__name__}"
        )
    return study.write(data, settings, runs)


def make_gallery(
    settings: GallerySettings = GallerySettings(),
    *,
    report: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> list[Written]:
    """Make studies and write them: gallery.html, summary.json, and a CSV file for each table.

    `out` is written whole or not at all. A previous gallery there is replaced; anything else is refused
    before the work. `report` is told of each study and its time.

    Raises ValueError for unknown studies; KeyboardInterrupt naming the folder of trained models.
    """
    names = list(dict.fromkeys(settings.studies)) or list(studies())
    chosen = [find_study(name) for name in names]
    require_writable(settings.out, KIND)
    data = load_images(settings.data, classes=settings.classes)
    fashion = None if settings.fashion is None else load_images(settings.fashion)
    one_class = any("label" in {f.name for f in dataclasses.fields(s.settings)} for s in chosen)
    if one_class and settings.label >= len(data.classes):
        raise ValueError(
            f"label must number one of {len(data.classes)} classes, got {settings.label}"
        )
    runs = Runs(settings.runs_folder, progress=progress)
    made = []
    try:
        for study in chosen:
            start = time.monotonic()
            own = settings_of(study, settings, data, fashion)
            page = study.write(data, own, runs)
            made.append(Written(study.name, own, page, round(time.monotonic() - start, 1)))
            report(f"{study.name}: {made[-1].seconds:.1f} s")
    except KeyboardInterrupt:
        message = f"interrupted; trained models are kept in {settings.runs_folder}"
        raise KeyboardInterrupt(message) from None
    write_gallery(data, made, settings.out)
    return made


def settings_of(
    study: Study, gallery: GallerySettings, data: ImageData, fashion: ImageData | None = None
) -> Any:
    """A study's settings: its defaults, and the gallery's where the names agree."""
    own = {setting.name for setting in dataclasses.fields(study.settings)}
    given = {
        "seeds": gallery.seeds,
        "sizes": gallery.sizes,
        "label": gallery.label,
        "space": gallery.space,
        "fashion": fashion,
    }
    chosen = study.settings(**{name: value for name, value in given.items() if name in own})
    if "config" not in own:
        return chosen
    trained = {"size": gallery.size, "noise": gallery.noise, "epochs": gallery.epochs}
    return dataclasses.replace(chosen, config=config_for(data, chosen.config, **trained))


def write_gallery(data: ImageData, made: list[Written], out: str | Path) -> None:
    """Write studies that were made: one page, their numbers as JSON, their tables as CSV."""
    with whole_directory(out, KIND) as folder:
        page = render("gallery.html", data=data, studies=made)
        (folder / PAGE).write_text(page, encoding="utf-8")
        for study in made:
            for title, table in study.page.tables.items():
                table.to_csv(folder / f"{study.name}, {title}.csv", index=False)
        summary = {
            "data": data.name,
            "training_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "settings": {study.name: as_json(study.settings) for study in made},
            "seconds": {study.name: study.seconds for study in made},
            "studies": {study.name: study.page.summary for study in made},
        }
        write_json(folder / SUMMARY, finite(summary))


def as_json(settings: Any) -> dict[str, Any]:
    """A study's settings for JSON."""
    found = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for name, value in found.items():
        if isinstance(value, TrainingConfig):
            found[name] = dataclasses.asdict(value)
        elif isinstance(value, ImageData):
            found[name] = value.name
    return found
