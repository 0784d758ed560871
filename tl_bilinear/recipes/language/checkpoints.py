"""The checkpoints in a run's folder: written elsewhere, and named only when they are whole.

``checkpoint-N/`` holds all that is needed to go on from step N. Trainer writes into ``.writing/``, and
what is whole is moved out of there. So what has a checkpoint's name is whole, whatever interrupts a run.
"""

from __future__ import annotations

import hashlib
import math
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
_NAME = re.compile(r"checkpoint-([0-9]+)")


def last_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint goes on from; 0 for none."""
    found = _NAME.fullmatch(checkpoint.name) if checkpoint else None
    return int(found[1]) if found else 0


def seconds_of(checkpoint: Path | None) -> float:
    """Seconds of training up to a checkpoint; 0 for none."""
    if checkpoint is None:
        return 0.0
    seconds = read_table(checkpoint / _SECONDS).get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"{checkpoint / _SECONDS} is damaged: it says {seconds!r} seconds")
    return float(seconds)


def require_whole(checkpoint: Path | None) -> None:
    """Raise ValueError, naming the file, where a checkpoint is not as it was written."""
    if checkpoint is None:
        return
    written = (
        read_table(checkpoint / _SECONDS).get("files")
        if (checkpoint / _SECONDS).is_file()
        else f"there is no {_SECONDS}"
    )
    problem = "" if isinstance(written, dict) else f"{written!r} in place of a list of its files"
    for name, digest in written.items() if isinstance(written, dict) else ():
        path = checkpoint / name
        if not path.is_file():
            problem = f"{name} is missing"
        elif _digest(path) != digest:
            problem = f"{name} is not what was written"
    if problem:
        raise ValueError(
            f"the run cannot go on from {checkpoint}: {problem}. Delete this folder, to go on from the "
            "checkpoint before it or from the start"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_checkpoint(folder: Path, step: int, seconds: float) -> None:
    """Give the checkpoint of a step, now written, its name; remove all but the last two."""
    name = f"checkpoint-{step}"
    written = folder / WRITING / name
    files = sorted(path for path in written.rglob("*") if path.is_file())
    digests = {str(path.relative_to(written)): _digest(path) for path in files}
    write_json(written / _SECONDS, {"seconds": seconds, "files": digests})
    for path in [*files, written / _SECONDS]:
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
