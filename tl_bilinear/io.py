"""What is written to disk, whole or not at all, and what is read back from it.

**Files and folders.** `whole_file` and `whole_directory` give a temporary place to write to, which takes
its final name only when everything is there: an error, an interrupt or a power cut leaves what stood
there before. What a killed process left is removed by the next one that writes to the same place. One
process at a time writes a folder: `alone_in` holds a lock. A folder of ours holds a small file,
``tl_bilinear.json``, that says of which kind it is and what we wrote into it. Only a folder of the same
kind, to which nobody added a thing, is replaced.

**Results.** A :class:`Storable` is a frozen dataclass whose fields are tensors, JSON values, and lists,
dictionaries and other Storables of these. It is one safetensors file: tensors under the path of their
field, the rest as JSON in the header, with a digest of it all: a file that is not as it was written is
refused.

>>> hosvd(tensor, 8).save("hosvd.safetensors")
>>> HOSVD.load("hosvd.safetensors")
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar

import jaxtyping
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MARKER = "tl_bilinear.json"
"""The file that says that a folder is ours, and of which kind."""

LOCK = ".lock"
"""The file of a run's folder that one process at a time holds."""

Stored = TypeVar("Stored", bound="Storable")

DIGEST = "sha256"
"""The entry of a file's header with a digest of its tensors and of the header's other entries."""


# ---------------------------------------------------------------------- files and folders


_HERE = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
_in_use: set[Path] = set()


def _temporary(target: Path, ending: str = "tmp") -> Path:
    """A new name beside `target`, of this machine and process: once that is gone, so may the file be."""
    name = f".{target.name}.{_HERE}-{os.getpid()}-{secrets.token_hex(4)}.{ending}"
    return target.with_name(name)


def _remove_leftovers(target: Path) -> None:
    """Remove what writers of `target` that are no longer alive left beside it."""
    endings = (
        "tmp|probe|old" if target.exists() else "tmp|probe"
    )  # old: all there is, without target
    form = re.compile(rf"\.{re.escape(target.name)}\.{_HERE}-(\d+)-[0-9a-f]{{8}}\.({endings})")
    for path in target.parent.iterdir():
        found = form.fullmatch(path.name)
        if found is None or path in _in_use or _is_alive(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier process of this number: what this one uses is in `_in_use`
    if os.name != "posix":
        return True  # where asking might end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, gone after the block. Raises OSError for a full disk."""
    _remove_leftovers(target)
    temporary = _temporary(target)
    _in_use.add(temporary)
    try:
        yield temporary
    except Exception as error:
        # safetensors, tokenizers and torch each have a kind of their own for what the system says.
        if not isinstance(error, OSError) and _UNWRITTEN.search(str(error)):
            raise OSError(f"cannot write {target}: {error}") from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        _in_use.discard(temporary)


_UNWRITTEN = re.compile(r"os error|No space left|failed writing|PytorchStreamWriter")


@contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to, which becomes `target` when the block ends without an error.

    Raises FileNotFoundError where the folder does not exist, OSError where it cannot be written.
    """
    target = _place_of(target)
    with _written_beside(target) as temporary:
        yield temporary
        temporary.replace(target)


def _place_of(target: str | os.PathLike[str]) -> Path:
    target = Path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write the file {target}: it is a folder")
    return target


@contextmanager
def whole_directory(target: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """A new folder to write into, which becomes `target` when the block ends without an error.

    Parameters
    ----------
    target: the folder's final place; it may not exist yet, be empty, or be a folder of this kind
    kind: what the folder is, in a word ("gallery", "model"); kept in its marker

    Raises FileExistsError naming what else is there, BlockingIOError where another process is writing
    it, OSError where it cannot be written.
    """
    target = Path(target).expanduser().resolve()
    refuse_foreign(target, kind)
    make_folder(target.parent)
    with (
        _locked(target.with_name(f".{target.name}{LOCK}"), target),
        _written_beside(target) as staging,
    ):
        staging.mkdir()
        yield staging
        mark(staging, kind)
        for path in staging.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())  # or a power cut leaves the new name on empty files
        _put_in_place(staging, target)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock in the block, so that no other process works there.

    Raises BlockingIOError, saying who does, where another one holds it.
    """
    with _locked(folder / LOCK, folder):
        yield


@contextmanager
def _locked(lock: Path, folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        if not lock.exists():  # it was not held: it cannot be made there
            _require_a_place(lock, folder)
        raise BlockingIOError(
            f"another run is at work in {folder}{_holder(lock)}: wait for it, or choose another folder"
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        with contextlib.suppress(OSError):
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()


def _require_a_place(lock: Path, folder: Path) -> None:
    try:
        lock.touch()
    except OSError as error:
        raise PermissionError(
            f"cannot write into {folder.parent}: {error.strerror}; choose another folder"
        ) from error


def _holder(lock: Path) -> str:
    try:
        return f" ({lock.read_text()})"
    except (OSError, ValueError):
        return ""


def mark(folder: Path, kind: str) -> None:
    """Say in the folder that it is ours, of which kind, and what is in it."""
    names = sorted(entry.name for entry in folder.iterdir())
    (folder / MARKER).write_text(json.dumps({"kind": kind, "holds": names}) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises NotADirectoryError where one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise NotADirectoryError(f"cannot write into {folder}: {file} is a file") from None


def claim(folder: Path, kind: str) -> None:
    """Make a folder ours to fill little by little, or see that it is already.

    Raises FileExistsError or NotADirectoryError where it is somebody else's.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write into {folder}: it is a file")
    make_folder(folder)
    if is_ours(folder, kind):
        return
    _remove_leftovers(folder / MARKER)
    if names := [entry.name for entry in folder.iterdir()]:
        raise FileExistsError(
            f"{folder} holds {_listed(names)} and is no {kind} of tl_bilinear: choose a new or an empty "
            f"folder"
        )
    write_json(folder / MARKER, {"kind": kind})


def is_ours(folder: Path, kind: str) -> bool:
    """Whether a folder bears our marker of this kind."""
    return _marker(folder).get("kind") == kind


def _marker(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_foreign(target: Path, kind: str) -> None:
    """Raise FileExistsError or NotADirectoryError where `target` holds what is not ours to replace."""
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(f"cannot write the folder {target}: it is a file")
    names = {entry.name for entry in target.iterdir()}
    if is_ours(target, kind):
        ours = _marker(target).get("holds")
        names = names - {MARKER, *ours} if isinstance(ours, list) else set()
    if names:
        raise FileExistsError(
            f"{target} holds {_listed(names)}, and writing replaces the whole folder: choose a new or "
            f"an empty one"
        )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def require_writable(out: str | os.PathLike[str], kind: str) -> None:
    """Raise now, before the work, what writing a `whole_directory` to `out` would raise after it."""
    target = Path(out).expanduser().resolve()
    refuse_foreign(target, kind)
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    probe = _temporary((existing if existing != target else target.parent) / target.name, "probe")
    try:
        probe.touch()
    except OSError as error:
        raise PermissionError(
            f"cannot write into {probe.parent}: {error.strerror}; choose another folder"
        ) from error
    probe.unlink()


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    previous = _temporary(target, "old")
    _in_use.add(previous)
    try:
        target.rename(previous)
        staging.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    finally:
        _in_use.discard(previous)
    shutil.rmtree(previous, ignore_errors=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON. Raises FileNotFoundError; ValueError, naming the file, where it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or not all of it: {error}") from error


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON table of values. Raises as `read_json`, and ValueError for other JSON."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a table of values")
    return content


# ---------------------------------------------------------------------- tensors and digests


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and JSON metadata to one safetensors file, whole or not at all."""
    contiguous: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        # safetensors refuses tensors that share memory.
        shared = tensor.numel() and tensor.untyped_storage().data_ptr() in storages
        contiguous[name] = tensor.clone() if shared else tensor
        storages.add(contiguous[name].untyped_storage().data_ptr())
    header = {name: json.dumps(value) for name, value in metadata.items()}
    header[DIGEST] = digest_of(contiguous, header)
    target = _place_of(path)
    # In a folder: safetensors writes to a file of a name of its own first, which a kill would leave.
    with _written_beside(target) as folder:
        folder.mkdir()
        safetensors.torch.save_file(contiguous, folder / target.name, metadata=header)
        (folder / target.name).replace(target)


def load_tensors(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_tensors`.

    Raises FileNotFoundError, or ValueError for a file that is truncated, not safetensors, or not as it
    was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = header.pop(DIGEST, None)
        if digest != digest_of(tensors, header):
            raise ValueError("its content is not what was written" if digest else "no digest in it")
        return tensors, {name: json.loads(value) for name, value in header.items()}
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a result file of tl_bilinear: {error}"
        ) from error


def digest_of(tensors: Mapping[str, Tensor | None], settings: Mapping[str, Any]) -> str:
    """A digest of weights and JSON settings, in any order: what a stored result belongs to."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor is None:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------- results


class Storable:
    """`save` and `load` for a frozen dataclass; the module says what its fields may be.

    A field whose metadata says ``stored=False`` is left out, and must have a default.
    """

    _kinds: ClassVar[dict[str, type[Storable]]] = {}
    _finite: ClassVar[tuple[str, ...]] = ()
    """Fields whose tensors hold no NaN and nothing infinite, in a file at least."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = Storable._kinds.get(cls.__name__)
        named = (cls.__module__, cls.__qualname__)
        local = "<locals>" in cls.__qualname__
        if known is not None and not local and (known.__module__, known.__qualname__) != named:
            raise TypeError(
                f"two stored classes are named {cls.__name__}: in {known.__module__} and in "
                f"{cls.__module__}; a file names its class, so rename one"
            )
        Storable._kinds[cls.__name__] = cls

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises TypeError, naming the field, for a value that cannot be stored; ValueError for one that
        could not be read back, NaN where the class allows none.
        """
        tensors: dict[str, Tensor] = {}
        packed = _pack(self, "", tensors)
        save_tensors(path, tensors, packed)

    @classmethod
    def load(
        cls: type[Stored], path: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> Stored:
        """Read what `save` wrote.

        Raises FileNotFoundError; ValueError, naming the file and the field, for a file that is
        truncated, of another class, or whose fields are missing, unknown or of the wrong kind.
        """
        tensors, metadata = load_tensors(path, device)
        kind = metadata.get("kind")
        if not isinstance(kind, str) or not issubclass(Storable._kinds.get(kind, type), cls):
            raise ValueError(
                f"{path} holds {kind or 'no result of tl_bilinear'}, not {cls.__name__}"
            )
        try:
            loaded = _unpack(metadata, "", tensors)
        except _Unreadable as error:
            raise ValueError(f"{path}: {error}") from error
        if tensors:
            raise ValueError(
                f"{path} has unknown tensors {sorted(tensors)}; written by a newer version?"
            )
        return typing.cast("Stored", loaded)


class _Unreadable(ValueError):
    """What is wrong with a stored value, and the path of its field."""


def _stored_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init and f.metadata.get("stored", True)]


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; tensors go aside, under the path of their field."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Storable):
        if problem := _not_finite(type(value), vars(value)):
            raise ValueError(f"cannot store this {type(value).__name__}: {problem}")
        fields = {
            field.name: _pack(getattr(value, field.name), _join(place, field.name), tensors)
            for field in _stored_fields(value)
        }
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        pairs = [
            [_pack(key, f"{place}[{key!r}]", tensors), _pack(item, f"{place}[{key!r}]", tensors)]
            for key, item in value.items()
        ]
        return {"mapping": pairs}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{place} is a {type(value).__name__}, which cannot be stored: a result holds tensors, "
        f"numbers, strings, and lists, dictionaries and results of these"
    )


def _unpack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The value again; every tensor that it takes is removed from `tensors`."""
    if isinstance(value, list):
        return [_unpack(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        try:
            return tensors.pop(value["tensor"])
        except (KeyError, TypeError):
            raise _Unreadable(f"the tensor of {place} is missing") from None
    if "tuple" in value:
        return tuple(_unpack(value["tuple"], place, tensors))
    if "mapping" in value:
        return dict(_unpack(value["mapping"], place, tensors))
    kind = Storable._kinds.get(str(value.get("kind")))
    fields = value.get("fields")
    if kind is None or not isinstance(fields, dict):
        raise _Unreadable(f"{place or 'the file'} is not a value of a stored result")
    known = {field.name: field for field in _stored_fields(kind)}
    if unknown := sorted(fields.keys() - known.keys()):
        raise _Unreadable(
            f"{kind.__name__} has unknown fields {unknown}; written by a newer version?"
        )
    required = {
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - fields.keys()):
        raise _Unreadable(f"{kind.__name__} lacks the fields {missing}")
    found = {name: _unpack(item, _join(place, name), tensors) for name, item in fields.items()}
    _check_kinds(kind, found, place)
    if problem := _not_finite(kind, found):
        raise _Unreadable(f"{place or kind.__name__} is not valid: {problem}")
    try:
        return kind(**found)
    except (TypeError, ValueError) as error:
        raise _Unreadable(f"{place or kind.__name__} is not valid: {error}") from error


def _not_finite(kind: type[Storable], values: Mapping[str, Any]) -> str:
    """Which field has a NaN or infinite entry that may not, or ""."""
    for name in kind._finite:
        value = values.get(name)
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            first = (~torch.isfinite(value)).nonzero()[0].tolist()
            return f"{name} is {float(value[tuple(first)])} at {first}"
    return ""


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _check_kinds(cls: type, values: Mapping[str, Any], place: str) -> None:
    """Compare loaded values with the dataclass's annotations: kinds, and tensors' shapes together."""
    hints = typing.get_type_hints(cls)
    options = {name: _options(hints[name]) for name in values}
    # One meaning of each dimension's name in all fields. Functions called in here would start anew.
    with jaxtyping.jaxtyped("context"):
        wrong = [
            name
            for name, value in values.items()
            if not any(
                value in option if isinstance(option, tuple) else isinstance(value, option)
                for option in options[name]
            )
        ]
    for name in wrong:
        where = _join(place, name)
        raise _Unreadable(
            f"{where} must be {_spelled(hints[name])}, got {_described(values[name])}"
        )


def _options(hint: Any) -> list[Any]:
    """The classes, or tuples of allowed values, that an annotation admits."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    if origin is typing.Literal:
        return [typing.get_args(hint)]
    if hint is float:
        return [float, int]
    if hint is Any or hint is None:
        return [object if hint is Any else type(None)]
    base = hint if origin is None else origin
    return [base if isinstance(base, type) else object]


def _spelled(hint: Any) -> str:
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("typing.", "")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}"
    return repr(value)
