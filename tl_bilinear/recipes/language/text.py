"""Stories from the Hugging Face hub or from files, cleaned, one at a time.

The paper removes two things from TinyStories (appendix F.2): exact duplicates, about a fifth of it, and
stories with strange symbols. Memory holds one story at a time, and 16 bytes for each one seen.

>>> cleaner = Cleaner()
>>> stories = cleaner(read_stories("roneneldan/TinyStories"))
>>> next(stories)
'One day, a little girl named Lily found a needle in her room. ...'
>>> cleaner.report().dropped
{'duplicate': 0, 'corrupt': 0, 'empty': 0}
"""

from __future__ import annotations

import gzip
import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tl_bilinear.recipes.language.config import TINYSTORIES

SEPARATOR = "<|endoftext|>"
REASONS = ("duplicate", "corrupt", "empty")

_SUFFIXES = (".txt", ".txt.gz")
_LONGEST = 64 * 2**20  # characters: a text without separators would fill the memory
_EXAMPLES = 3

_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′´`ʼ", "'"),  # noqa: RUF001
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),  # noqa: RUF001
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    }
)
_FOREIGN = re.compile(r"[^\n -~]")
# How Windows-1252 reads each byte; the five that it does not define stand for themselves.
_BYTES = {bytes([b]).decode("cp1252", "ignore") or chr(b): b for b in range(256)}


# ---------------------------------------------------------------------- sources


def read_stories(
    source: str | PathLike[str] = TINYSTORIES, *, split: str = "train", column: str = "text"
) -> Iterator[str]:
    """The stories of a source, unchanged, one at a time.

    Parameters
    ----------
    source:
        A text file (.txt or .txt.gz) with stories separated by ``<|endoftext|>``, a folder of such
        files, or the name of a data set on the Hugging Face hub, which is streamed.
    split, column:
        Of a data set on the hub.

    Raises FileNotFoundError for a path that is not there, ValueError for a file that cannot be read
    or a data set without that column, ConnectionError where the hub is out of reach.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path)
    looks_like_a_path = isinstance(source, Path) or str(source).startswith((".", "/", "~"))
    if looks_like_a_path or str(source).endswith(_SUFFIXES):
        raise FileNotFoundError(f"no such file or folder of text: {source}")
    return _read_hub(str(source), split, column)


def _read_folder(folder: Path) -> Iterator[str]:
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no text: expected files ending in .txt or .txt.gz")
    return (story for path in paths for story in _read_file(path))


def _read_file(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    story: list[str] = []
    length = 0
    try:
        # Bytes that are not UTF-8 become U+FFFD, and their story is dropped as corrupt.
        with opened(path, "rt", encoding="utf-8", errors="replace") as file:
            for line in file:
                first, *others = line.split(SEPARATOR)
                story.append(first)
                length += len(first)
                for other in others:
                    yield "".join(story)
                    story, length = [other], len(other)
                if length > _LONGEST:
                    raise ValueError(
                        f"{path} has a story of more than {_LONGEST:,} characters: separate "
                        f"the stories by lines {SEPARATOR}"
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated, or not a gzip file: {error}") from error
    if "".join(story).strip():  # after the last separator there is usually only a line break
        yield "".join(story)


def _read_hub(name: str, split: str, column: str) -> Iterator[str]:
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises a dozen kinds where the hub is out of reach
        raise ConnectionError(
            f"the data set {name!r} (split {split!r}) cannot be read from the Hugging Face hub, and "
            f"no file or folder has that name: {error}"
        ) from error
    return _column(rows, name, column)


def _column(rows: Iterable[Any], name: str, column: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(row)}")
        yield row[column]


# ---------------------------------------------------------------------- cleaning


def clean_story(story: str) -> str | None:
    """A story in printable ASCII, or None for one that is corrupt.

    UTF-8 that was once read as Windows-1252 (``â€œ``) is decoded again. Typographic quotes, dashes and
    spaces become plain ones, and accents are removed, as the tokenizer does. A story that still is not
    ASCII is corrupt.
    """
    if not story.isascii():
        story = _read_again(story).translate(_PUNCTUATION)
        decomposed = unicodedata.normalize("NFKD", story)
        story = "".join(c for c in decomposed if not unicodedata.combining(c))
    story = story.replace("\r\n", "\n").replace("\t", " ").strip()
    return None if _FOREIGN.search(story) else story


def _read_again(story: str) -> str:
    try:
        return bytes(_BYTES[c] for c in story).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return story


@dataclass(frozen=True)
class CleaningReport:
    """How many stories were read, kept, repaired and dropped, by reason, with a few examples."""

    read: int
    kept: int
    repaired: int
    characters: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return (
            f"{self.kept:,} of {self.read:,} stories kept ({self.characters:,} characters); dropped: "
            f"{dropped}; {self.repaired:,} repaired"
        )


class Cleaner:
    """Cleans streams of stories and gives each story once, even where a second stream repeats it.

    >>> cleaner = Cleaner()
    >>> list(cleaner(["One day. ", "One day.", "", "caf\u00e9", "\ufffd\ufffd"]))
    ['One day.', 'cafe']
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {reason: [] for reason in REASONS}

    def __call__(self, stories: Iterable[str]) -> Iterator[str]:
        for story in stories:
            self._counts["read"] += 1
            cleaned = clean_story(story)
            if cleaned is None:
                self._drop("corrupt", story)
            elif not cleaned:
                self._drop("empty", story)
            elif (digest := story_digest(cleaned)) in self._seen:
                self._drop("duplicate", cleaned)
            else:
                self._seen.add(digest)
                self._counts["kept"] += 1
                self._counts["characters"] += len(cleaned)
                self._counts["repaired"] += not story.isascii()
                yield cleaned

    def _drop(self, reason: str, story: str) -> None:
        self._counts[reason] += 1
        if len(self._examples[reason]) < _EXAMPLES:
            foreign = _FOREIGN.search(story) if reason == "corrupt" else None
            start = max(0, foreign.start() - 40) if foreign else 0
            self._examples[reason].append(story[start : start + 80])

    def report(self) -> CleaningReport:
        """The counts so far."""
        return CleaningReport(
            read=self._counts["read"],
            kept=self._counts["kept"],
            repaired=self._counts["repaired"],
            characters=self._counts["characters"],
            dropped={reason: self._counts[reason] for reason in REASONS},
            examples={reason: list(found) for reason, found in self._examples.items()},
        )


def story_digest(story: str) -> bytes:
    """A hash of a story, of 16 bytes."""
    return hashlib.blake2b(story.encode(), digest_size=16).digest()
