"""Stories as rows of token numbers on disk, which `train_language_model` and SAELens read.

A row has `n_ctx` tokens and starts with ``[BOS]``. Stories follow one another,
``[BOS] story [EOS] [BOS] story [EOS] ...``; one that does not fit goes on in the next row. The
folder holds two data sets of Hugging Face's kind. They are read through memory maps, so neither writing
nor training needs the text in memory:

    train/  validation/      column input_ids, n_ctx int32 a row
    tokenizer/               as transformers writes it
    report.json              what was read and dropped, token counts, a fingerprint of the rows
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_bilinear.io import read_table, refuse_foreign, whole_directory, write_json
from tl_bilinear.recipes.language.config import TINYSTORIES, TextConfig
from tl_bilinear.recipes.language.packing import RowWriter
from tl_bilinear.recipes.language.text import Cleaner, CleaningReport, read_stories, story_digest
from tl_bilinear.recipes.language.tokenizer import load_tokenizer, tokenizer_digest

FORMAT = "tl_bilinear language data"
PARTS = ("train", "validation")
REPORT, TOKENIZER = "report.json", "tokenizer"
_BATCH = 1000  # stories tokenized at once


@dataclass(frozen=True, eq=False)
class LanguageData:
    """A folder of `prepare_text`: `train` and `validation` are `datasets.Dataset`, memory-mapped.

    `stories` and `rows` count those of each part; `fingerprint` is a hash of the tokens.
    """

    folder: Path
    train: Any
    validation: Any
    tokenizer: Any
    n_ctx: int
    stories: dict[str, int]
    rows: dict[str, int]
    cleaning: CleaningReport
    fingerprint: str

    def __str__(self) -> str:
        parts = [
            f"{part}: {self.stories[part]:,} stories, {rows * self.n_ctx:,} tokens"
            for part, rows in self.rows.items()
        ]
        return "\n".join([str(self.cleaning), *parts])

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> LanguageData:
        """Read what `prepare_text` wrote.

        Raises FileNotFoundError, or ValueError for a folder that is damaged or whose tokenizer is
        not the one that its tokens were made with.
        """
        import datasets

        folder = Path(folder).expanduser()
        report = _read_report(folder)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        if len(tokenizer) != report["vocabulary"]:
            raise ValueError(
                f"the tokens in {folder} are of a vocabulary of {report['vocabulary']}, the tokenizer "
                f"there has {len(tokenizer)} entries: prepare the text again"
            )
        if tokenizer_digest(tokenizer) != report["tokenizer"]:
            raise ValueError(
                f"the tokenizer in {folder / TOKENIZER} is not the one that the tokens there were made "
                "with: prepare the text again"
            )
        try:
            cleaning = CleaningReport(**report["cleaning"])
        except TypeError as error:
            raise ValueError(f"{folder / REPORT} is damaged: {error}") from error
        parts = {}
        for part in PARTS:
            try:
                parts[part] = datasets.load_from_disk(str(folder / part))
            except Exception as error:  # pyarrow has its own kinds for a truncated file
                raise ValueError(f"{folder / part} cannot be read: {error}") from error
            if len(parts[part]) != report["rows"][part]:
                raise ValueError(
                    f"{folder / part} has {len(parts[part])} rows, {REPORT} says "
                    f"{report['rows'][part]}: prepare the text again"
                )
        found = "-".join(_fingerprint(part, report["n_ctx"], folder) for part in parts.values())
        if found != report["fingerprint"]:
            raise ValueError(
                f"the tokens in {folder} are not those that were written (their fingerprint is {found}, "
                f"{REPORT} says {report['fingerprint']}): prepare the text again"
            )
        return cls(
            folder,
            **parts,
            tokenizer=tokenizer,
            n_ctx=report["n_ctx"],
            stories=report["stories"],
            rows=report["rows"],
            cleaning=cleaning,
            fingerprint=report["fingerprint"],
        )


def prepare_text(
    source: str | PathLike[str] = TINYSTORIES,
    config: TextConfig = TextConfig(),
    *,
    tokenizer: Any,
    out: str | PathLike[str],
    progress: bool = True,
) -> LanguageData:
    """Clean a source, tokenize it, pack it into rows and hold out some stories for validation.

    Parameters
    ----------
    source:
        As for `read_stories`.
    tokenizer:
        A fast tokenizer with [BOS] and [EOS], or a folder with one.
    out:
        The folder to write. It appears whole or not at all.

    Raises ValueError where the text does not fill one row of each part, FileExistsError where the
    folder holds something else.
    """
    if isinstance(tokenizer, str | PathLike):
        tokenizer = load_tokenizer(tokenizer)
    out = Path(out).expanduser()
    refuse_foreign(out, "data")  # before the work, not after it

    cleaner = Cleaner()
    assigned = _assigned(source, config, cleaner)
    with whole_directory(out, "data") as staging:
        writers = {part: RowWriter(staging / part, config.n_ctx, tokenizer) for part in PARTS}
        bar = tqdm(assigned, unit=" stories", disable=not progress, desc="tokenizing")
        for batch in _batched(bar, _BATCH):
            ids = tokenizer([s for _, s in batch], add_special_tokens=False).input_ids
            for (part, _), tokens in zip(batch, ids, strict=True):
                writers[part].add(tokens)
        for part, writer in writers.items():
            writer.close()
            if not writer.rows:
                raise ValueError(
                    f"the text gives {writer.stories} stories for {part}, which do not fill one row "
                    f"of n_ctx={config.n_ctx} tokens: more text, a smaller n_ctx, or another validation "
                    "share"
                )
        tokenizer.save_pretrained(staging / TOKENIZER)
        report = {
            "format": FORMAT,
            "source": str(source),
            "validation": str(config.validation),
            "n_ctx": config.n_ctx,
            "vocabulary": len(tokenizer),
            "tokenizer": tokenizer_digest(tokenizer),
            "stories": {part: writer.stories for part, writer in writers.items()},
            "rows": {part: writer.rows for part, writer in writers.items()},
            "tokens_left_over": {part: writer.left_over for part, writer in writers.items()},
            "cleaning": dataclasses.asdict(cleaner.report()),
            "fingerprint": "-".join(writer.fingerprint for writer in writers.values()),
        }
        write_json(staging / REPORT, report)
    return LanguageData.load(out)


def _assigned(
    source: str | PathLike[str], config: TextConfig, cleaner: Cleaner
) -> Iterator[tuple[str, str]]:
    """Each cleaned story with the part that it belongs to."""
    share = config.validation
    stories = read_stories(source, split=config.split, column=config.column)
    stories = itertools.islice(stories, config.limit)
    if isinstance(share, float | int):
        return ((_part(story, share), story) for story in cleaner(stories))
    held_out = read_stories(share, column=config.column)
    return itertools.chain(
        (("validation", story) for story in cleaner(held_out)),
        (("train", story) for story in cleaner(stories)),
    )


def _part(story: str, share: float) -> str:
    drawn = int.from_bytes(story_digest(story)[:8], "big") / 2**64
    return "validation" if drawn < share else "train"


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not prepared text (it has no {REPORT}): make it with `tl-bilinear data`"
        )
    report = read_table(path)
    if report.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by `tl-bilinear data`: its 'format' is not {FORMAT!r}"
        )
    for name, kind in _REPORTED.items():
        value: Any = report.get(name)
        counts = name in ("stories", "rows")
        if not isinstance(value, kind) or (counts and value.keys() != {*PARTS}):
            raise ValueError(
                f"{path} is damaged, or of another version: its {name!r} is {value!r:.80}. Prepare the "
                "text again"
            )
    return report


_REPORTED: dict[str, Any] = {
    "n_ctx": int,
    "vocabulary": int,
    "tokenizer": str,
    "stories": dict,
    "rows": dict,
    "cleaning": dict,
    "fingerprint": str,
}


def _fingerprint(part: Any, n_ctx: int, folder: Path) -> str:
    """The hash of a part's rows, as `RowWriter` makes it."""
    import pyarrow

    made = hashlib.blake2b(digest_size=8)
    try:
        for chunk in part.data.column("input_ids").chunks:
            if chunk.type.list_size != n_ctx or chunk.type.value_type != pyarrow.int32():
                raise ValueError(f"its column is {chunk.type}")
            made.update(chunk.flatten().to_numpy().tobytes())
    except (KeyError, AttributeError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder} does not hold rows of {n_ctx} tokens: {error}") from error
    return made.hexdigest()
