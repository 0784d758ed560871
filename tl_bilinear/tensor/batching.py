"""Long work over many rows: in batches, resumable, and split between the processes of one launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.io import load_tensors, save_tensors

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
    returns; batches found there are read instead of done. Under torchrun or accelerate launch the
    processes share the batches out between them and each returns the whole result.

    Raises ValueError for a folder with the batches of another sweep.
    """
    batches = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    if not batches:
        return work(slice(0, 0))
    folder = None if checkpoint is None else Path(checkpoint)
    digest = "" if folder is None else identity()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_others(folder, digest)
    with _processes() as (rank, world, group):
        mine = {}
        share = range(rank, len(batches), world)
        with tqdm(
            total=sum(batches[i].stop - batches[i].start for i in share),
            unit=unit,
            desc=describe,
            disable=not progress or rank > 0,
        ) as bar:
            for index in share:
                mine[index] = _one(work, batches[index], index, folder, digest)
                bar.update(batches[index].stop - batches[index].start)
        done = mine if group is None else _gather(mine, group, world)
    first = done[0]
    return {name: torch.cat([done[i][name] for i in range(len(batches))]) for name in first}


def _one(
    work: Callable[[slice], Rows], rows: slice, index: int, folder: Path | None, digest: str
) -> Rows:
    if folder is None:
        return work(rows)
    path = folder / f"batch-{index:06d}.safetensors"
    if path.is_file():
        return load_tensors(path)[0]
    found = {name: tensor.cpu() for name, tensor in work(rows).items()}
    save_tensors(path, found, {"sweep": digest})
    return found


def _refuse_others(folder: Path, digest: str) -> None:
    for path in sorted(folder.glob("batch-*.safetensors"))[:1]:
        if load_tensors(path)[1].get("sweep") != digest:
            raise ValueError(
                f"{folder} holds the batches of another sweep (other weights, directions, settings or "
                f"version): give checkpoint= a new folder, or delete this one"
            )


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
