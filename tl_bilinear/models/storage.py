"""A bilinear transformer in a directory: ``model.safetensors``, ``config.json``, ``tokenizer/``.

No pickle: nothing in the directory runs when it is loaded. It is written beside its destination and
renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_bilinear.models.component import BilinearTransformerConfig
from tl_bilinear.models.files import CONFIG, WEIGHTS
from tl_bilinear.tensor.storage import whole_directory

FORMAT = "tl_bilinear.HookedBilinearTransformer"
FORMAT_VERSION = 1
TOKENIZER = "tokenizer"

# Where the model runs is decided where it is loaded; n_params follows from the shapes.
_NOT_STORED = frozenset({"device", "n_devices", "n_params"})
_ROTARY = ("attn.rotary_sin", "attn.rotary_cos")


# ---------------------------------------------------------------------- save


def save(model: Any, directory: str | PathLike[str]) -> None:
    """See HookedBilinearTransformer.save_pretrained."""
    with whole_directory(directory, _is_ours) as staging:
        _write_json(staging / CONFIG, _describe(model))
        save_file(_tensors_to_save(model), staging / WEIGHTS, metadata={"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(staging / TOKENIZER)


def _is_ours(directory: Path) -> bool:
    """Whether a directory holds a model that `save` wrote, and nothing else."""
    if {entry.name for entry in directory.iterdir()} - {CONFIG, WEIGHTS, TOKENIZER}:
        return False
    try:
        stored = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_ours(stored)


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors_to_save(model: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in stored_state(model).items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied embeddings.
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors


def stored_state(model: Any) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith(_ROTARY):
            # TransformerLens lengthens these tables when a longer text comes along.
            attention = model.get_submodule(name.rpartition(".")[0])
            state[name] = tensor[: min(model.cfg.n_ctx, attention.ROTARY_INITIAL_CACHE_SIZE)]
    return state


# ---------------------------------------------------------------------- load


def is_ours(stored: Any) -> bool:
    """Whether the content of a config.json is what `save` writes."""
    return isinstance(stored, dict) and stored.get("format") == FORMAT


def read_config(path: Path, stored: dict[str, Any]) -> BilinearTransformerConfig:
    """The config that `stored`, the content of `path`, describes."""
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
