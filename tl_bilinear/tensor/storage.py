"""Results on disk: one safetensors file, its other fields as JSON in the file's header."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.torch.save_file(contiguous, temporary, metadata=header)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
