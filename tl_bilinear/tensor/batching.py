"""Long work over many rows: in batches, resumable, and split between the processes of one launch.

A checkpoint folder keeps each batch as it is done, in a file that says to which sweep and which rows it
belongs and what it holds. What is found there is believed only if all of that is right.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.io import alone_in, digest_of, load_tensors, make_folder, save_tensors

Rows = dict[str, Tensor]
"""Named results, one row for each item of the work."""

# A process that has finished waits for the others, for as long as their share may take.
_PATIENCE = timedelta(days=7)


def sweep(
    work: Callable[[slice], Rows],
    count: int,
    batch: int,
    *,
    checkpoint: str | Path | None,
    identity: Callable[[], str],
    progress: bool,
    unit: str,
    describe: str | None = None,
) -> Rows:
    """``work`` on every batch of `count` rows, its results joined in order.

    `checkpoint` names a folder that keeps each batch as it is done, under the digest that `identity`
    returns; batches found there are read instead of done, and a damaged one is done again, with a
    warning. Under torchrun or accelerate launch the processes share the batches out between them and
    each returns the whole result.

    Raises ValueError, naming the file, for a folder with a batch of another sweep; BlockingIOError where
    another run, not launched together with this one, is at work in it.
    """
    batches = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    if not batches:
        return work(slice(0, 0))
    with _processes() as (rank, world, group):
        folder = None if checkpoint is None else _Folder(Path(checkpoint), identity(), batches)
        with _prepared(folder, rank, group):
            mine = {}
            share = range(rank, len(batches), world)
            with tqdm(
                total=sum(batches[i].stop - batches[i].start for i in share),
                unit=unit,
                desc=describe,
                disable=not progress or rank > 0,
            ) as bar:
                for index in share:
                    mine[index] = _one(work, batches[index], index, folder)
                    bar.update(batches[index].stop - batches[index].start)
            done = mine if group is None else _gather(mine, group, world)
    first = done[0]
    return {name: torch.cat([done[i][name] for i in range(len(batches))]) for name in first}


def _one(work: Callable[[slice], Rows], rows: slice, index: int, folder: _Folder | None) -> Rows:
    found = None if folder is None else folder.read(index)
    if found is None:
        found = work(rows)
        if folder is not None:
            found = {name: tensor.cpu() for name, tensor in found.items()}
            folder.write(index, found)
    return found


class _Folder:
    """The stored batches of one sweep."""

    def __init__(self, path: Path, identity: str, batches: list[slice]) -> None:
        self.path, self.identity, self.batches = path, identity, batches

    def require_ours(self) -> None:
        """Raise ValueError for any stored batch that is not of this sweep; clear what writers left."""
        for path in sorted(self.path.glob("batch-*.safetensors")):
            stored = self._stored(path)
            if stored is not None:
                self._require_ours(path, stored[1])
        for path in self.path.glob(".batch-*.tmp"):  # of a writer that was killed
            path.unlink(missing_ok=True)

    def read(self, index: int) -> Rows | None:
        """A stored batch; None where there is none, or none that is whole."""
        path = self._place(index)
        if not path.is_file():
            return None
        stored = self._stored(path)
        if stored is not None:
            rows, says = stored
            if says.get("content") == digest_of(dict(sorted(rows.items())), {}):
                return rows
        warnings.warn(f"{path} is damaged and done again", stacklevel=2)
        return None

    def write(self, index: int, rows: Rows) -> None:
        content = digest_of(dict(sorted(rows.items())), {})
        save_tensors(self._place(index), rows, {**self._label(index), "content": content})

    def _place(self, index: int) -> Path:
        return self.path / f"batch-{index:06d}.safetensors"

    def _label(self, index: int) -> dict[str, Any]:
        rows, count = self.batches[index], self.batches[-1].stop
        return {"sweep": self.identity, "rows": [rows.start, rows.stop], "of": count}

    @staticmethod
    def _stored(path: Path) -> tuple[Rows, dict[str, Any]] | None:
        try:
            return load_tensors(path)
        except ValueError:
            return None

    def _require_ours(self, path: Path, says: dict[str, Any]) -> None:
        index = next((i for i in range(len(self.batches)) if self._place(i) == path), None)
        if index is not None and says.items() >= self._label(index).items():
            return
        if says.get("sweep") == self.identity:
            what = f"it says rows {says.get('rows')} of {says.get('of')}"
        else:
            what = "other weights, directions, settings or version"
        raise ValueError(
            f"{self.path} holds the batches of another sweep: {path.name} is not of this one ({what}); "
            f"give checkpoint= a new folder, or delete this one"
        )


@contextmanager
def _prepared(folder: _Folder | None, rank: int, group: Any) -> Iterator[None]:
    """The folder held for this launch and found to be ours; every process gets the first one's error."""
    if folder is None:
        yield
        return
    with ExitStack() as stack:
        error: Exception | None = None
        if rank == 0:
            try:
                make_folder(folder.path)
                stack.enter_context(alone_in(folder.path))
                folder.require_ours()
            except Exception as raised:
                error = raised
        if group is not None:
            told = [error]
            dist.broadcast_object_list(told, src=0, group=group)
            error = told[0]
        if error is not None:
            raise error
        yield


@contextmanager
def _processes() -> Iterator[tuple[int, int, Any]]:
    """(rank, world size, group to gather over), without a group where there is one process."""
    started = False
    if (
        dist.is_available()
        and not dist.is_initialized()
        and int(os.environ.get("WORLD_SIZE", 1)) > 1
    ):
        dist.init_process_group("gloo", timeout=_PATIENCE)
        started = True
    try:
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield 0, 1, None
        else:
            # Gloo, whatever the training backend is: results are gathered from CPU memory.
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            yield dist.get_rank(), dist.get_world_size(), group
    finally:
        if started:
            dist.destroy_process_group()


def _gather(mine: dict[int, Rows], group: Any, world: int) -> dict[int, Rows]:
    here = {i: {name: t.cpu() for name, t in rows.items()} for i, rows in mine.items()}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, here, group=group)
    return {index: rows for part in everyone for index, rows in part.items()}


def human_bytes(size: float) -> str:
    """12345678 -> '12 MB'."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}"
