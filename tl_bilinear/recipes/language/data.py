"""Stories as rows of token numbers on disk: what `train_language_model` and SAELens read.

A row has `n_ctx` tokens and starts with ``[BOS]``. Stories follow one another,
``[BOS] story [EOS] [BOS] story [EOS] ...``; one that does not fit goes on in the next row. The
folder holds two data sets of Hugging Face's kind, read through memory maps, so that neither writing
nor training needs the text in memory:

    train/  validation/      column input_ids, n_ctx int32 a row
    tokenizer/               as transformers writes it
    report.json              what was read and dropped, token counts, a fingerprint of the rows
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.io import read_table, refuse_foreign, whole_directory, write_json
from tl_bilinear.recipes.language.text import (
    TINYSTORIES,
    Cleaner,
    CleaningReport,
    read_stories,
    story_digest,
)
from tl_bilinear.recipes.language.tokenizer import load_tokenizer

FORMAT = "tl_bilinear language data"
PARTS = ("train", "validation")
REPORT, TOKENIZER = "report.json", "tokenizer"
_BATCH = 1000  # stories tokenized at once


@dataclass(frozen=True, eq=False)
class LanguageData:
    """A folder of `prepare_text`: `train` and `validation` are `datasets.Dataset`, memory-mapped.

    `stories` and `rows` count each part's; `fingerprint` tells its tokens from any other's.
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

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> LanguageData:
        """Read what `prepare_text` wrote.

        Raises FileNotFoundError, or ValueError for a folder that is damaged or whose tokenizer is
        not the one of its tokens.
        """
        import datasets

        folder = Path(folder).expanduser()
        report = _read_report(folder)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        if len(tokenizer) != report["vocabulary"]:
            raise ValueError(
                f"the tokens in {folder} are numbers of a vocabulary of {report['vocabulary']}, the "
                f"tokenizer there has {len(tokenizer)} entries: prepare the text again"
            )
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
        return cls(
            folder,
            **parts,
            tokenizer=tokenizer,
            n_ctx=report["n_ctx"],
            stories=report["stories"],
            rows=report["rows"],
            cleaning=CleaningReport(**report["cleaning"]),
            fingerprint=report["fingerprint"],
        )


def prepare_text(
    source: str | PathLike[str] = TINYSTORIES,
    *,
    tokenizer: Any,
    folder: str | PathLike[str],
    n_ctx: int = 256,
    validation: float | str | PathLike[str] = 0.01,
    limit: int | None = None,
    split: str = "train",
    column: str = "text",
    progress: bool = True,
) -> LanguageData:
    """Clean a source, tokenize it, pack it into rows and part off a validation set, by story.

    Parameters
    ----------
    source, split, column:
        As for `read_stories`.
    tokenizer:
        A fast tokenizer with [BOS] and [EOS], or a folder with one.
    validation:
        The share of stories to hold out (drawn by a hash of the story: the same story falls on the
        same side in every run), or a source of its own, whose stories are then kept out of training.
    limit:
        Read no more than so many stories.

    The folder appears whole or not at all. Raises ValueError where the text does not fill one row of
    each part, FileExistsError where the folder holds something else.
    """
    if isinstance(tokenizer, str | PathLike):
        tokenizer = load_tokenizer(tokenizer)
    if n_ctx < 2:
        raise ValueError(f"n_ctx must be at least 2, got {n_ctx}")
    if isinstance(validation, float | int) and not 0 < validation < 1:
        raise ValueError(
            f"validation must be a share between 0 and 1, or a source; got {validation}"
        )
    folder = Path(folder).expanduser()
    refuse_foreign(folder, _is_ours)  # before the work, not after it

    cleaner = Cleaner()
    stories = itertools.islice(read_stories(source, split=split, column=column), limit)
    assigned: Iterator[tuple[str, str]]  # part, story
    if isinstance(validation, float | int):
        assigned = ((_part(story, validation), story) for story in cleaner(stories))
    else:
        first = (
            ("validation", story) for story in cleaner(read_stories(validation, column=column))
        )
        assigned = itertools.chain(first, (("train", story) for story in cleaner(stories)))
    with whole_directory(folder, _is_ours) as staging:
        writers = {part: _PartWriter(staging / part, n_ctx, tokenizer) for part in PARTS}
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
                    f"of n_ctx={n_ctx} tokens: more text, a smaller n_ctx, or another validation share"
                )
        tokenizer.save_pretrained(staging / TOKENIZER)
        report = {
            "format": FORMAT,
            "source": str(source),
            "validation": str(validation),
            "n_ctx": n_ctx,
            "vocabulary": len(tokenizer),
            "stories": {part: writer.stories for part, writer in writers.items()},
            "rows": {part: writer.rows for part, writer in writers.items()},
            "tokens_left_over": {part: writer.left_over for part, writer in writers.items()},
            "cleaning": dataclasses.asdict(cleaner.report()),
            "fingerprint": "-".join(writer.fingerprint for writer in writers.values()),
        }
        write_json(staging / REPORT, report)
    return LanguageData.load(folder)


def _part(story: str, share: float) -> str:
    drawn = int.from_bytes(story_digest(story)[:8], "big") / 2**64
    return "validation" if drawn < share else "train"


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


class Packer:
    """Stories end to end in rows of n_ctx tokens, each starting with [BOS]."""

    def __init__(self, bos: int, eos: int, n_ctx: int) -> None:
        self._bos, self._eos, self._n_ctx = bos, eos, n_ctx
        self._row = [bos]

    @property
    def left_over(self) -> int:
        """Tokens of the last, unfilled row, which is never given."""
        return len(self._row) - 1

    def add(self, tokens: list[int]) -> Iterator[list[int]]:
        """The rows that one more story fills."""
        if len(self._row) > 1:
            self._row.append(self._bos)
        tokens = [*tokens, self._eos]
        start = 0
        while True:
            room = self._n_ctx - len(self._row)
            self._row += tokens[start : start + room]
            start += room
            if len(self._row) < self._n_ctx:
                return
            yield self._row
            self._row = [self._bos]
            if start >= len(tokens):
                return


def pack_stories(
    stories: Sequence[str], tokenizer: Any, n_ctx: int = 256
) -> Int[Tensor, "rows n_ctx"]:
    """Stories as the rows that `prepare_text` makes of them, in memory; an unfilled row is left out."""
    import torch

    packer = Packer(tokenizer.bos_token_id, tokenizer.eos_token_id, n_ctx)
    ids = tokenizer(list(stories), add_special_tokens=False).input_ids
    rows = [row for tokens in ids for row in packer.add(tokens)]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, n_ctx)


class _PartWriter:
    """Packs stories into rows and writes them as they fill."""

    def __init__(self, folder: Path, n_ctx: int, tokenizer: Any) -> None:
        import datasets
        from datasets.arrow_writer import ArrowWriter

        self._folder, self._arrow = folder, folder.with_name(f"{folder.name}.arrow")
        self._packer = Packer(tokenizer.bos_token_id, tokenizer.eos_token_id, n_ctx)
        self._n_ctx = n_ctx
        # Fixed-length lists are read back as one array, without a Python object for each token.
        features = {"input_ids": datasets.Sequence(datasets.Value("int32"), length=n_ctx)}
        self._writer = ArrowWriter(path=str(self._arrow), features=datasets.Features(features))
        self._hash = hashlib.blake2b(digest_size=8)
        self._waiting: list[list[int]] = []
        self.stories = self.rows = 0

    @property
    def left_over(self) -> int:
        return self._packer.left_over

    @property
    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    def add(self, tokens: list[int]) -> None:
        self.stories += 1
        for row in self._packer.add(tokens):
            self._waiting.append(row)
            if len(self._waiting) == _BATCH:
                self._flush()

    def _flush(self) -> None:
        import numpy
        import pyarrow

        rows = numpy.asarray(self._waiting, dtype=numpy.int32)
        self._waiting = []
        if not len(rows):
            return
        self.rows += len(rows)
        self._hash.update(rows.tobytes())
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), self._n_ctx)
        self._writer.write_table(pyarrow.table({"input_ids": column}))

    def close(self) -> None:
        """Turn what was written into the folder that `datasets.load_from_disk` reads."""
        import datasets

        self._flush()
        if not self.rows:
            return
        self._writer.finalize()
        with _no_progress_bars():  # a copy of a file, over in a moment
            datasets.Dataset.from_file(str(self._arrow)).save_to_disk(str(self._folder))
        self._arrow.unlink()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is what `prepare_text` wrote, and holds nothing else."""
    if {entry.name for entry in folder.iterdir()} - {*PARTS, TOKENIZER, REPORT}:
        return False
    try:
        return bool(_read_report(folder))
    except (OSError, ValueError):
        return False


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
    return report
