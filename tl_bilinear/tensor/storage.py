"""Results on disk: one safetensors file, its other fields as JSON in the file's header."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Result = TypeVar("Result", bound="Storable")


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(value) for name, value in metadata.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        safetensors.torch.save_file(contiguous, temporary, metadata=header)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_tensors`.

    Raises FileNotFoundError, or ValueError for a file that is truncated or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(value) for name, value in header.items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is truncated or not a result file of tl_bilinear: {error}"
        ) from error


def digest_of(tensors: dict[str, Tensor | None], settings: dict[str, Any]) -> str:
    """A digest of weights and settings: what a stored result belongs to."""
    from tl_bilinear import __version__

    digest = hashlib.sha256(json.dumps([__version__, settings], sort_keys=True).encode())
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def whole_directory(target: str | os.PathLike[str], ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new directory to write into, which becomes `target` when the block ends without an error.

    Only an empty place, or a directory that `ours` recognises, may be replaced. A directory that is
    half written, by an error, an interrupt or a power cut, never bears the name.

    Raises FileExistsError naming what else is there; OSError where it cannot be written.
    """
    target = Path(target).expanduser().resolve()
    refuse_foreign(target, ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir()
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())  # or a power cut leaves the new name on empty files
        _put_in_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_foreign(target: Path, ours: Callable[[Path], bool]) -> None:
    """Raise FileExistsError or NotADirectoryError where `target` holds what is not ours to replace."""
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(f"cannot write the folder {target}: it is a file")
    names = sorted(entry.name for entry in target.iterdir())
    if names and not ours(target):
        raise FileExistsError(
            f"{target} holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}, and writing "
            f"replaces the whole folder: choose a new or an empty one"
        )


def require_writable(out: str | Path, ours: Callable[[Path], bool]) -> None:
    """Raise now, before the work, what writing a `whole_directory` to `out` would raise after it."""
    target = Path(out).expanduser().resolve()
    refuse_foreign(target, ours)
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    probe = (existing if existing != target else target.parent) / f".{target.name}.probe"
    try:
        probe.touch()
    except OSError as error:
        raise PermissionError(
            f"cannot write into {probe.parent}: {error.strerror}; choose another folder with --out"
        ) from error
    probe.unlink()


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    previous = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        target.rename(previous)
        staging.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


class Storable:
    """`save` and `load` for a frozen dataclass whose fields are tensors and JSON values."""

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, whole or not at all (a temporary file, then a rename)."""
        fields = {name: getattr(self, name) for name in _stored(type(self))}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        metadata = {name: value for name, value in fields.items() if name not in tensors}
        save_tensors(path, tensors, {"kind": type(self).__name__, **metadata})

    @classmethod
    def load(cls: type[Result], path: str | Path, device: str = "cpu") -> Result:
        """Read what `save` wrote.

        Raises FileNotFoundError; ValueError for a truncated or foreign file.
        """
        tensors, metadata = load_tensors(path, device)
        kind = metadata.pop("kind", None)
        if kind != cls.__name__:
            raise ValueError(
                f"{path} holds {kind or 'no result of tl_bilinear'}, not {cls.__name__}"
            )
        if unknown := (tensors.keys() | metadata.keys()) - set(_stored(cls)):
            raise ValueError(
                f"{path} has unknown fields {sorted(unknown)}; written by a newer version?"
            )
        return cls(**tensors, **metadata)


def _stored(cls: type) -> list[str]:
    """Fields that go to disk: all but those whose metadata says ``stored=False``."""
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("stored", True)]
