"""A bilinear transformer in a directory: ``model.safetensors``, ``config.json``, ``tokenizer/``.

No pickle: nothing in the directory runs when it is loaded, and nothing is downloaded. It is written
beside its destination and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_bilinear.models.component import BilinearTransformerConfig
from tl_bilinear.tensor.storage import read_json, whole_directory, write_json

FORMAT = "tl_bilinear.HookedBilinearTransformer"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"

# Where the model runs is decided where it is loaded; n_params follows from the shapes.
_NOT_STORED = frozenset({"device", "n_devices", "n_params"})
_ROTARY = ("attn.rotary_sin", "attn.rotary_cos")


# ---------------------------------------------------------------------- save


def save(model: Any, directory: str | PathLike[str]) -> None:
    """See HookedBilinearTransformer.save_pretrained."""
    with whole_directory(directory, _is_ours) as staging:
        write_json(staging / CONFIG, _describe(model))
        save_file(_tensors_to_save(model), staging / WEIGHTS, metadata={"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(staging / TOKENIZER)


def _is_ours(directory: Path) -> bool:
    """Whether a directory holds a model that `save` wrote, and nothing else."""
    if {entry.name for entry in directory.iterdir()} - {CONFIG, WEIGHTS, TOKENIZER}:
        return False
    try:
        return read_json(directory / CONFIG).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _describe(model: Any) -> dict[str, Any]:
    config = {
        field.name: _to_json(getattr(model.cfg, field.name))
        for field in dataclasses.fields(BilinearTransformerConfig)
        if field.name not in _NOT_STORED
    }
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config}


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def _tensors_to_save(model: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _stored_state(model).items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied embeddings.
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors


def _stored_state(model: Any) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith(_ROTARY):
            # TransformerLens lengthens these tables when a longer text comes along.
            attention = model.get_submodule(name.rpartition(".")[0])
            state[name] = tensor[: min(model.cfg.n_ctx, attention.ROTARY_INITIAL_CACHE_SIZE)]
    return state


# ---------------------------------------------------------------------- load


def load(
    cls: type,
    directory: str | PathLike[str],
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    tokenizer: Any,
    move_to_device: bool,
) -> Any:
    """See HookedBilinearTransformer.from_pretrained."""
    source = _require_directory(cls, directory)
    config = _read_config(source / CONFIG)
    tensors = _read_tensors(source / WEIGHTS)
    if tokenizer is None and (source / TOKENIZER).is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source / TOKENIZER, local_files_only=True)

    # Loading neither initialises weights, nor seeds the caller's random numbers, nor fetches a
    # tokenizer by name: those fields are put back when the model stands.
    as_stored = {name: getattr(config, name) for name in ("seed", "init_weights", "tokenizer_name")}
    config.seed, config.init_weights, config.tokenizer_name = None, False, None
    if device is not None:
        config.device = str(device)
    model = cls(config, tokenizer=tokenizer, move_to_device=False)
    for name, value in as_stored.items():
        setattr(model.cfg, name, value)

    _require_same_tensors(source / WEIGHTS, tensors, _stored_state(model))
    # assign: each tensor keeps the dtype it was stored with.
    model.load_state_dict(tensors, assign=True)
    if dtype is not None:
        model.to(dtype, print_details=False)
    if move_to_device:
        model.move_model_modules_to_device()
    return model


def _require_directory(cls: type, directory: str | PathLike[str]) -> Path:
    source = Path(directory).expanduser().resolve()
    if source.is_dir():
        return source
    takes = f"{cls.__name__}.from_pretrained takes a directory that save_pretrained wrote"
    if source.exists():
        raise NotADirectoryError(f"{takes}; {source} is a file")
    interrupted = sorted(source.parent.glob(f".{source.name}.*.old"))
    if interrupted:
        raise FileNotFoundError(
            f"{source} is missing: replacing it was interrupted. The model that was there before is "
            f"whole in {interrupted[-1]}: rename that back"
        )
    raise FileNotFoundError(
        f"{takes}; {str(directory)!r} is not a directory. A pretrained model is loaded by its name "
        f"with HookedTransformer.from_pretrained({str(directory)!r})"
    )


def _read_config(path: Path) -> BilinearTransformerConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a saved model: it has no {path.name}")
    stored = read_json(path)
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by save_pretrained: its 'format' should be {FORMAT!r}"
        )
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {stored.get('format_version')}, this version of tl_bilinear "
            f"reads {FORMAT_VERSION}: upgrade tl-bilinear"
        )
    values = stored.get("config")
    try:
        if not isinstance(values, dict):
            raise TypeError("'config' is not a table of fields")
        dtype = getattr(torch, str(values.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype {values.get('dtype')!r} is not a torch dtype")
        seed = values.get("seed")
        config = BilinearTransformerConfig(**{**values, "dtype": dtype, "seed": None})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{path} does not describe a bilinear transformer: {error}") from error
    config.seed = seed
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a saved model: it has no {path.name}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, or not a safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error
    return tensors


def _require_same_tensors(
    path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is not in the model" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} where the config makes it "
        f"{list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(problems[:8])}{rest}")
