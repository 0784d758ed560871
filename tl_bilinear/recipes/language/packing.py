"""Stories end to end in rows of tokens, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

_BATCH = 1000  # rows written at once


class Packer:
    """Packs stories into rows of n_ctx tokens, each starting with [BOS].

    Raises ValueError for rows with no room for a token of the text.
    """

    def __init__(self, bos: int, eos: int, n_ctx: int) -> None:
        if n_ctx < 2:
            raise ValueError(f"n_ctx must be at least 2, got {n_ctx}")
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
    """The rows that `prepare_text` makes of stories, in memory; an unfilled row is left out."""
    import torch

    packer = Packer(tokenizer.bos_token_id, tokenizer.eos_token_id, n_ctx)
    ids = tokenizer(list(stories), add_special_tokens=False).input_ids
    rows = [row for tokens in ids for row in packer.add(tokens)]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, n_ctx)


class RowWriter:
    """Packs stories into rows and writes them as they fill, as a data set of Hugging Face's kind."""

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
        """Tokens that fill no row."""
        return self._packer.left_over

    @property
    def fingerprint(self) -> str:
        """A hash of the rows so far."""
        return self._hash.hexdigest()

    def add(self, tokens: list[int]) -> None:
        """Add a story."""
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
        with _no_copy_bar():
            datasets.Dataset.from_file(str(self._arrow)).save_to_disk(str(self._folder))
        self._arrow.unlink()


@contextmanager
def _no_copy_bar() -> Iterator[None]:
    """Leave out the progress bar of a copy that takes a moment."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
