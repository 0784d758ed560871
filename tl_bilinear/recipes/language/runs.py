"""A run's folder: it belongs to the settings that it was started with, and is finished or goes on.

run.json       settings: what a later start is compared with
result.json    written last: a folder that has it holds a finished run
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_bilinear.io import read_table, refuse_foreign, write_json

SETTINGS, RESULT = "run.json", "result.json"


def enter_run(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    made_from: Mapping[str, Any],
    command: str,
) -> None:
    """Claim the folder for these settings, or see that it is theirs already.

    `kind` tells runs of one command from those of others, `made_from` what a run depends on beside its
    config (data, a model).

    Raises FileExistsError for a folder that holds no run, ValueError for one of other settings.
    """
    refuse_foreign(folder, lambda place: (place / SETTINGS).is_file())
    if not (folder / SETTINGS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"format": kind, "config": dict(config), "data": dict(made_from)}
        write_json(folder / SETTINGS, settings)
        return
    stored = read_table(folder / SETTINGS)
    if stored.get("format") != kind:
        raise ValueError(f"{folder / SETTINGS} does not describe a run of `{command}`")
    before, now = {**stored["config"], **stored["data"]}, {**config, **made_from}
    changed = [f"{k}={now[k]!r} (there: {before.get(k)!r})" for k in now if now[k] != before.get(k)]
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings: {', '.join(changed)}. Choose another folder, or "
            "delete that one"
        )


def require_finished(folder: Path, command: str) -> Mapping[str, Any]:
    """The result of a finished run. Raises FileNotFoundError, saying how far it is."""
    if not (folder / RESULT).is_file():
        state = "is not finished" if (folder / SETTINGS).is_file() else "is not there"
        raise FileNotFoundError(f"the run {folder} {state}: `{command}` makes it")
    return read_table(folder / RESULT)
