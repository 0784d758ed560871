"""A run's folder. It belongs to the settings that started it; the run in it is finished, or goes on.

    run.json       the settings, which a later start is compared with
    result.json    written last: a folder that has it holds a finished run

Of several processes that share a run, one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tl_bilinear.io import alone_in, claim, read_table, write_json

SETTINGS, RESULT = "run.json", "result.json"


@contextmanager
def work_in(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    made_from: Mapping[str, Any],
    command: str,
) -> Iterator[None]:
    """Work in a folder in the block, alone: claim it for these settings, or see that it is theirs.

    `kind` tells the runs of one command from those of others; `made_from` is what a run depends on
    besides its config (data, a model).

    A finished run is only compared: it may be read by many.

    Raises FileExistsError for a folder that holds no run, ValueError for one of other settings,
    BlockingIOError where another process is at work there.
    """
    claim(folder, "run")
    with nullcontext() if (folder / RESULT).is_file() else alone_in(folder):
        _compare(folder, kind, config, made_from, command)
        yield


def _compare(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    made_from: Mapping[str, Any],
    command: str,
) -> None:
    if not (folder / SETTINGS).is_file():
        settings = {"format": kind, "config": dict(config), "data": dict(made_from)}
        write_json(folder / SETTINGS, settings)
        return
    stored = read_table(folder / SETTINGS)
    if stored.get("format") != kind:
        raise ValueError(f"{folder / SETTINGS} does not describe a run of `{command}`")
    if not all(isinstance(stored.get(part), dict) for part in ("config", "data")):
        raise ValueError(f"{folder / SETTINGS} is damaged: it has no tables 'config' and 'data'")
    before, now = {**stored["config"], **stored["data"]}, {**config, **made_from}
    changed = [f"{k}={now[k]!r} (there: {before.get(k)!r})" for k in now if now[k] != before.get(k)]
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings: {', '.join(changed)}. Choose another folder, or "
            "delete that one"
        )


def require_finished(folder: Path, command: str) -> Mapping[str, Any]:
    """The result of a finished run. Raises FileNotFoundError, saying how far the run is."""
    if not (folder / RESULT).is_file():
        state = "is not finished" if (folder / SETTINGS).is_file() else "is not there"
        raise FileNotFoundError(f"the run {folder} {state}: `{command}` makes it")
    return read_table(folder / RESULT)


def is_first_process() -> bool:
    """Whether this is the process, among those of a run, that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Wait for the other processes of the run, if there are any."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
