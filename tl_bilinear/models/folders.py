"""A bilinear transformer in a directory: ``model.safetensors``, ``config.json``, ``tokenizer/``.

Loading it runs no code: there is no pickle. It is written beside its destination and then renamed, so it
is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_bilinear.io import DIGEST, digest_of, read_json, whole_directory, write_json
from tl_bilinear.models.fields import require_values
from tl_bilinear.models.files import CONFIG, WEIGHTS, require_numbers, require_shapes

if TYPE_CHECKING:
    from tl_bilinear.models.component import BilinearTransformerConfig

FORMAT = "tl_bilinear.HookedBilinearTransformer"
FORMAT_VERSION = 1
KIND = "model"
TOKENIZER = "tokenizer"

# Where the model runs is decided where it is loaded; n_params follows from the shapes.
_NOT_STORED = frozenset({"device", "n_devices", "n_params"})
_ROTARY = ("attn.rotary_sin", "attn.rotary_cos")
_TABLES = (*_ROTARY, "attn.mask", "attn.IGNORE")


# ---------------------------------------------------------------------- save


def save(model: Any, directory: str | PathLike[str]) -> None:
    """See HookedBilinearTransformer.save_pretrained."""
    from tl_bilinear.models.component import BilinearTransformerConfig

    fields = (field.name for field in dataclasses.fields(BilinearTransformerConfig))
    config = {name: getattr(model.cfg, name) for name in fields if name not in _NOT_STORED}
    write(directory, config, stored_state(model), model.tokenizer)


def write(
    directory: str | PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
) -> None:
    """Write such a directory: fields of BilinearTransformerConfig, a state dict, a tokenizer or None."""
    described = {name: _to_json(value) for name, value in config.items()}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": described}
    with whole_directory(directory, KIND) as staging:
        write_json(staging / CONFIG, content)
        held = _separate(tensors)
        metadata = {"format": "pt", DIGEST: digest_of(held, {})}
        save_file(held, staging / WEIGHTS, metadata=metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging / TOKENIZER)


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def _separate(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, none sharing memory with another."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in given.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied embeddings.
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors


def stored_state(model: Any) -> dict[str, Tensor]:
    """The state dict of a HookedTransformer, its rotary tables at their initial length."""
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith(_ROTARY):
            # TransformerLens lengthens these tables when a longer text comes along.
            attention = model.get_submodule(name.rpartition(".")[0])
            state[name] = tensor[: min(model.cfg.n_ctx, attention.ROTARY_INITIAL_CACHE_SIZE)]
    return state


def tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that the config determines, TransformerLens's masks and rotary tables.

    A model saved from a bridge has none.
    """
    return {name: tensor for name, tensor in state.items() if name.endswith(_TABLES)}


# ---------------------------------------------------------------------- load


def is_saved(directory: str | PathLike[str]) -> bool:
    """Whether a directory holds a model of this format, by its config."""
    try:
        return is_ours(read_json(Path(directory).expanduser() / CONFIG))
    except (OSError, ValueError):
        return False


def is_ours(stored: Any) -> bool:
    """Whether the content of a config.json is what `save` writes."""
    return isinstance(stored, dict) and stored.get("format") == FORMAT


def read_fields(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of BilinearTransformerConfig in `stored`, the content of `path`; dtype as torch's."""
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {stored.get('format_version')}, this version of tl_bilinear "
            f"reads {FORMAT_VERSION}: upgrade tl-bilinear"
        )
    values = stored.get("config")
    if not isinstance(values, dict):
        raise _undescribed(path, "'config' is not a table of fields")
    dtype = getattr(torch, str(values.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise _undescribed(path, f"dtype {values.get('dtype')!r} is not a torch dtype")
    if not dtype.is_floating_point:
        raise _undescribed(path, f"dtype {dtype} is not that of weights, which are floating-point")
    if missing := [
        name for name in ("n_layers", "d_model", "d_head", "n_ctx") if name not in values
    ]:
        raise _undescribed(path, f"it lacks {', '.join(missing)}")
    try:
        require_values(values)
    except ValueError as error:
        raise _undescribed(path, error) from error
    return {**values, "dtype": dtype}


def read_config(path: Path, stored: dict[str, Any]) -> BilinearTransformerConfig:
    """The config that `stored`, the content of `path`, describes."""
    from tl_bilinear.models.component import BilinearTransformerConfig

    values = read_fields(path, stored)
    try:
        config = BilinearTransformerConfig(**{**values, "seed": None})
    except Exception as error:  # TransformerLens compares and divides what it is given
        raise _undescribed(path, error) from error
    config.seed = values.get("seed")
    return config


def require_weights(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raise ValueError where stored weights are no numbers, or far fewer than a config says.

    Before a model is made: one of these sizes might not fit into memory.
    """
    require_numbers(path, {n: t for n, t in tensors.items() if not n.endswith(_TABLES)})
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    if len(blocks) < config["n_layers"]:
        raise ValueError(
            f"{path} does not fit its {CONFIG}: it has weights of the layers {sorted(blocks)}, where "
            f"n_layers is {config['n_layers']}"
        )
    d, first = config["d_model"], f"blocks.{min(blocks, default=0)}"
    sizes = {
        "embed.W_E": (config.get("d_vocab"), d),
        "pos_embed.W_pos": (config["n_ctx"], d),
        f"{first}.attn.W_Q": (config.get("n_heads"), d, config["d_head"]),
        f"{first}.mlp.W_in": (d, config.get("d_mlp")),
    }
    for name, size in sizes.items():
        held = tensors.get(name)
        if held is not None and None not in size and math.prod(size) > 16 * held.numel():
            require_shapes(path, {name: held}, {name: size})


def require_known(path: Path, tensors: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Raise ValueError for stored weights that are no part of the model, naming them."""
    unknown = [n for n in sorted(tensors) if n not in known and not n.endswith(_TABLES)]
    if unknown:
        raise ValueError(
            f"{path} does not fit its {CONFIG}: {', '.join(unknown[:8])} is not in the model"
        )


def _undescribed(path: Path, problem: object) -> ValueError:
    return ValueError(f"{path} does not describe a bilinear transformer: {problem}")
