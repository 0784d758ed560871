"""One way to load a bilinear transformer: our own format or the authors', a folder or the hub."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_bilinear.io import read_json
from tl_bilinear.models import folders, published_models
from tl_bilinear.models.files import (
    CONFIG,
    WEIGHTS,
    Source,
    is_repository,
    read_tensors,
    read_tokenizer,
    require_shapes,
)

if TYPE_CHECKING:
    from tl_bilinear.models.component import BilinearTransformerConfig


def load(
    cls: type,
    name: str | PathLike[str],
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    tokenizer: Any,
    move_to_device: bool,
    attn_scale: float | None,
) -> Any:
    """See HookedBilinearTransformer.from_pretrained."""
    source = find_source(cls, name)
    path = source.require(CONFIG)
    stored = read_json(path)
    ours = folders.is_ours(stored)
    if ours:
        if attn_scale is not None:
            raise ValueError(
                f"{source} was written by save_pretrained, its attention scale is in its W_O already: "
                "leave attn_scale out"
            )
        config = folders.read_config(path, stored)
        weights = source.require(WEIGHTS)
        tensors = read_tensors(weights)
        folders.require_weights(weights, tensors, vars(config))
        if tokenizer is None:
            tokenizer = stored_tokenizer(source)
    else:
        fields = published_models.read_config(path, require_published(path, stored))
        scale = (
            published_models.attention_scale(stored, fspath(name))
            if attn_scale is None
            else attn_scale
        )
        weights = source.require(WEIGHTS)
        config, tensors = published_models.read_weights(
            weights, read_tensors(weights), fields, scale, dtype
        )
        config.model_name = Path(name).name
        if tokenizer is None:
            tokenizer = published_models.read_tokenizer(source, stored)

    model = _without_weights(cls, config, tokenizer, device)
    expected = folders.stored_state(model)
    if ours:
        tensors = {**folders.tables(expected), **tensors}
        require_shapes(weights, tensors, {name: t.shape for name, t in expected.items()})
    else:
        tensors = {**expected, **tensors}  # the masks and rotary tables are TransformerLens's
    # assign: each tensor keeps the dtype it was stored with.
    model.load_state_dict(tensors, assign=True)
    if dtype is not None:
        model.to(dtype, print_details=False)
    if move_to_device:
        model.move_model_modules_to_device()
    return model


def find_source(cls: type, name: str | PathLike[str]) -> Source:
    """The folder of this name or, where there is none, the repository of the hub."""
    folder = Path(name).expanduser().resolve()
    if folder.is_dir():
        return Source(folder)
    takes = f"{cls.__name__}.from_pretrained takes a directory that save_pretrained wrote"
    if folder.exists():
        raise NotADirectoryError(f"{takes}; {folder} is a file")
    interrupted = sorted(folder.parent.glob(f".{folder.name}.*.old"))
    if interrupted:
        raise FileNotFoundError(
            f"{folder} is missing: replacing it was interrupted. The model that was there before is "
            f"complete in {interrupted[-1]}: rename that back"
        )
    given = fspath(name)
    if is_repository(given):
        return Source(given)
    raise FileNotFoundError(
        f"{takes}, or a name on the hub such as 'tdooms/ts-medium'; {given!r} is not a directory. "
        f"TransformerLens's models are loaded with HookedTransformer.from_pretrained({given!r})"
    )


def require_published(path: Path, stored: Any) -> dict[str, Any]:
    """`stored`, the content of `path`, if it is a config of the authors' format; else ValueError."""
    if published_models.is_published(stored):
        return dict(stored)
    known = stored if isinstance(stored, dict) else {}
    missing = ", ".join(name for name in published_models.SIZES if name not in known)
    raise ValueError(
        f"{path} was not written by save_pretrained (its 'format' should be {folders.FORMAT!r}), and "
        f"is not of the format of the paper's published models either (it lacks {missing})"
    )


def stored_tokenizer(source: Source) -> Any:
    """The tokenizer that `save_pretrained` wrote beside the model; None for a model without one."""
    folder = source.find_tokenizer(folders.TOKENIZER)
    if folder is None:
        return None
    return read_tokenizer(folder)


def _without_weights(
    cls: type, config: BilinearTransformerConfig, tokenizer: Any, device: str | torch.device | None
) -> Any:
    # Loading must not initialise weights, seed the caller's random numbers or fetch a tokenizer by
    # name. The fields that would do so are put back when the model is built.
    as_stored = {name: getattr(config, name) for name in ("seed", "init_weights", "tokenizer_name")}
    config.seed, config.init_weights, config.tokenizer_name = None, False, None
    if device is not None:
        config.device = str(device)
    model = cls(config, tokenizer=tokenizer, move_to_device=False)
    for name, value in as_stored.items():
        setattr(model.cfg, name, value)
    return model
