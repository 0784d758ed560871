"""The checkpoints in a run's folder: written elsewhere, and named only when they are whole.

``checkpoint-N/`` holds all that is needed to go on from step N. Trainer writes into ``.writing/``, and
what is whole is moved out of there. So what has a checkpoint's name is whole, whatever interrupts a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_bilinear.io import read_table, write_json
from tl_bilinear.recipes.language.run_folder import is_first_process, wait_for_all

WRITING = ".writing"

_SECONDS = "seconds.json"
_KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint goes on from; 0 for none."""
    found = _NAME.fullmatch(checkpoint.name) if checkpoint else None
    return int(found[1]) if found else 0


def seconds_of(checkpoint: Path | None) -> float:
    """Seconds of training up to a checkpoint; 0 for none."""
    return float(read_table(checkpoint / _SECONDS)["seconds"]) if checkpoint else 0.0


def keep_checkpoint(folder: Path, step: int, seconds: float) -> None:
    """Give the checkpoint of a step, now written, its name; remove all but the last two."""
    name = f"checkpoint-{step}"
    written = folder / WRITING / name
    write_json(written / _SECONDS, {"seconds": seconds})
    for path in written.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut leaves the new name on empty files
    written.rename(folder / name)
    for old in _checkpoints(folder)[:-_KEPT]:
        # Renamed first: what has the name of a checkpoint is whole at every moment.
        old.rename(folder / WRITING / old.name)
        shutil.rmtree(folder / WRITING / old.name)


@contextmanager
def place_to_write(folder: Path) -> Iterator[None]:
    """An empty ``.writing/`` inside the block, gone after it, whatever a killed run left there."""
    if is_first_process():
        shutil.rmtree(folder / WRITING, ignore_errors=True)
        (folder / WRITING).mkdir()
    wait_for_all()
    try:
        yield
    finally:
        if is_first_process():
            shutil.rmtree(folder / WRITING, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)
