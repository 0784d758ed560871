"""Bad inputs, and what becomes of each: the machinery of the campaign.

A case is a call that must be refused with a sentence. What happens is one of

- clear: an error of the package's own, with that sentence;
- unclear: another error, or one from inside a dependency;
- silent: no error;
- never ends: nothing happens for `PATIENCE` seconds.

``python -m tests.faults`` counts the classes; the tests ask that every case is clear.
"""

from __future__ import annotations

import functools
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tl_bilinear

PACKAGE = Path(tl_bilinear.__file__).parent
PATIENCE = 30  # seconds
OWN = (ValueError, TypeError, IndexError, KeyError, OSError, ImportError, MemoryError)


@dataclass(frozen=True)
class Case:
    """A call, given a folder of its own, and the sentence (a pattern) that it must be refused with."""

    name: str
    call: Callable[[Path], Any]
    sentence: str


class TooLong(BaseException):
    """The patience is at an end."""


@contextmanager
def patience(seconds: float | None = None) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds or PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """The class of what happens, and a line about it."""
    try:
        with patience():
            result = case.call(folder)
    except TooLong:
        return "never ends", f"nothing after {PATIENCE} seconds"
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
        said = type(error).__name__ == "Refused"  # by the command, as one line
        if not said and not (isinstance(error, OWN) and raised_here(error)):
            return "unclear", f"from inside a dependency: {line}"
        if not re.search(case.sentence, str(error)):
            return "unclear", f"without {case.sentence!r}: {line}"
        return "clear", line
    return "silent", f"it gave {result!r:.200}"


def raised_here(error: BaseException) -> bool:
    """Whether the package's own code raised an error, not something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    # A constructor that dataclasses wrote is code of the package's too.
    last = next((f for f in reversed(frames) if not f.filename.startswith("<")), None)
    return last is not None and PACKAGE in Path(last.filename).parents


def each(
    name: str, function: Callable[[Any], Any], values: dict[str, tuple[Any, str]]
) -> list[Case]:
    """A case for every value, by its name, with the sentence for it."""
    return [
        Case(f"{name}: {what}", functools.partial(_call, function, value), sentence)
        for what, (value, sentence) in values.items()
    ]


def _call(function: Callable[[Any], Any], value: Any, folder: Path) -> Any:
    return function(value)
