"""Where a model's files come from, a folder or the Hugging Face hub, and how they are read.

Every error names the file, what is wrong with it and what to do. No framework is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_bilinear.io import DIGEST, digest_of, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Source:
    """A folder, or a repository of the hub, whose files are downloaded one by one as they are needed.

    location: the folder, or ``owner/name``
    part: a sub-folder of it ("" for none)
    kind: what it should be, for errors
    """

    location: Path | str
    part: str = ""
    kind: str = "saved model"
    force_download: bool = False

    @property
    def on_hub(self) -> bool:
        return isinstance(self.location, str)

    def __str__(self) -> str:
        return f"{self.location}/{self.part}" if self.part else str(self.location)

    def require(self, filename: str) -> Path:
        """The file. Raises FileNotFoundError where there is none, ConnectionError as `download`."""
        if isinstance(self.location, str):
            path = download(self.location, self._within(filename), force=self.force_download)
        else:
            path = self.location / self._within(filename)
        if not path.is_file():
            raise FileNotFoundError(f"{self} is not a {self.kind}: it has no {filename}")
        return path

    def find(self, filename: str) -> Path | None:
        """The file, or None."""
        try:
            return self.require(filename)
        except (FileNotFoundError, ConnectionError):
            return None

    def find_tokenizer(self, folder: str = "") -> Path | None:
        """The folder that holds a tokenizer's files, or None."""
        prefix = f"{folder}/" if folder else ""
        config = self.find(prefix + _TOKENIZER_FILES[0])
        if config is None:
            return None
        for name in _TOKENIZER_FILES[1:]:
            self.find(prefix + name)
        return config.parent

    def _within(self, filename: str) -> str:
        return f"{self.part}/{filename}" if self.part else filename


def is_repository(name: str) -> bool:
    """Whether a string has the form ``owner/name`` of a repository on the hub."""
    return _REPOSITORY.fullmatch(name) is not None


def download(repository: str, filename: str, *, force: bool = False) -> Path:
    """A file of a repository of the hub, in huggingface_hub's own cache.

    Raises FileNotFoundError if the repository or the file does not exist, ConnectionError if the
    hub is out of reach and the file is not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo_id=repository, filename=filename, force_download=force
            )
        )
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hugging Face hub has no repository {repository!r} that you may read (and there is no "
            f"such folder here): {error}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _out_of_reach(repository, filename, error) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repository} on the hub has no file {filename}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _out_of_reach(repository, filename, error) from error


def _out_of_reach(repository: str, filename: str, error: Exception) -> ConnectionError:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    offline = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub does not answer"
    return ConnectionError(
        f"cannot download {filename} of {repository!r} (there is no such folder here): {offline}, and "
        f"the file is not in the cache {HF_HUB_CACHE}. Load it once with a connection, or give the path "
        f"of a folder that holds a copy. The hub's client says: {error}"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises ValueError for one that is not, not whole, or not as we wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get(DIGEST)  # which only our own files have
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, or not a safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error
    if digest is not None and digest != digest_of(tensors, {}):
        raise ValueError(f"{path} is damaged: its weights are not those that were written")
    return tensors


def read_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer in a folder. Raises ValueError, naming the file, for one that cannot be read."""
    from transformers import AutoTokenizer

    try:
        for path in sorted(folder.glob("*token*.json")):
            read_json(path)  # which names a file that is damaged
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # tokenizers raises bare Exceptions for a broken file
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error


def require_sizes(path: Path, stored: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError unless the fields `names` of a config are positive integers."""
    wrong = [
        f"{name} is {stored.get(name)!r}"
        for name in names
        if type(stored.get(name)) is not int or not 0 < stored[name] < 2**31
    ]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)}; expected a positive integer")


def require_numbers(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first, for weights that are integers, NaN or infinite."""
    for name, values in tensors.items():
        if not values.is_floating_point():
            raise ValueError(f"{path}: {name} is {values.dtype}; expected floating-point weights")
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            first = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(
                f"{path}: {name} is {float(values[tuple(first)])} at {first}; expected finite weights"
            )


def require_shapes(
    path: Path | str, tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int | str]]
) -> None:
    """Raise ValueError unless `tensors` are exactly those of `expected`, naming each that is not.

    A size that is not known is a word, and fits nothing.
    """
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is not in the model" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} where the config makes it "
        f"{list(expected[name])}"
        for name in sorted(expected.keys() & tensors.keys())
        if list(tensors[name].shape) != list(expected[name])
    ]
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(problems[:8])}{rest}")
