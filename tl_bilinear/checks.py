"""Checks of what callers pass in; every error says what was given, what was expected, what to do."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

MAX_DENSE_BYTES = 2 * 2**30
"""Largest array, in bytes, that `dense()` forms unless the caller raises `max_bytes`."""

MAX_SOLVER_BYTES = 2**30
"""Memory, in bytes, that a decomposition may take beside its result unless told otherwise."""


def shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def require_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor(...)"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must have a floating-point dtype, got {value.dtype}; call .float() on it"
        )
    return value


def require_finite(
    name: str, value: Tensor, advice: str = "decompositions need finite weights"
) -> None:
    """Raise ValueError, naming the row, for NaN or infinite entries."""
    # A sum is NaN or infinite if an entry is, and needs no mask of the size of the weights.
    if value.is_meta or value.numel() == 0 or math.isfinite(value.detach().sum().item()):
        return
    bad = ~torch.isfinite(value.detach())
    count = int(bad.sum())
    if count:
        first = tuple(bad.nonzero()[0].tolist())
        index = f"index {first if len(first) > 1 else first[0]}" if first else "its only entry"
        row = f" (row {', '.join(map(str, first[:-1]))})" if len(first) > 1 else ""
        raise ValueError(
            f"{name} has {count} NaN or infinite of {value.numel()} entries, the first at "
            f"{index}{row}; {advice}"
        )


def require_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise ValueError, naming the first, where token ids [..., pos] are not of a vocabulary."""
    bad = (tokens < 0) | (tokens >= vocabulary)
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"token {int(tokens[tuple(first)])} at {'row, position' if len(first) > 1 else 'position'} "
            f"{', '.join(map(str, first))} is not of the model's vocabulary, 0 to {vocabulary - 1}"
        )


def require_same_device(tensors: dict[str, Tensor]) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors lie on different devices: {listed}; move them to one with .to()")


def require_rows(name: str, value: Any, width: int, meaning: str, like: Tensor) -> Tensor:
    """`value` as a tensor of `like`'s dtype whose last dimension has `width` entries."""
    value = require_tensor(name, value)
    if value.ndim == 0 or value.shape[-1] != width:
        raise ValueError(f"{name} must have shape [..., {width}] ({meaning}), got {shape(value)}")
    if value.device != like.device:
        require_same_device({name: value, "the layer": like})
    require_finite(name, value, "leave such rows out")
    return value.to(like.dtype)


def require_vector(name: str, value: Any, width: int, meaning: str, like: Tensor) -> Tensor:
    """`value` as one vector [width] of `like`'s dtype."""
    value = require_rows(name, value, width, meaning, like)
    if value.ndim != 1:
        raise ValueError(f"{name} must be one vector [{width}] ({meaning}), got {shape(value)}")
    return value


def require_matrix(name: str, value: Any, width: int, meaning: str, like: Tensor) -> Tensor:
    """`value` as directions [n, width] of `like`'s dtype, all of them finite."""
    value = require_rows(name, value, width, meaning, like)
    if value.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix [n, {width}], one direction a row, got {shape(value)}; for one "
            f"direction pass u[None]"
        )
    return value


def meaning(what: str, space: str | None) -> str:
    """What a coordinate is, for an error message: "d_in", or "d_in, blocks.3.mlp.hook_in"."""
    return what if space is None else f"{what}, {space}"


def require_count(name: str, value: Any, most: int, meaning: str) -> int:
    require_int(name, value)
    if not 1 <= value <= most:
        raise ValueError(f"{name} must lie between 1 and {most} ({meaning}), got {value}")
    return value


def require_positive(name: str, value: Any) -> int:
    """A number of things, 1 or more; more than there are is all of them."""
    if require_int(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def require_int(name: str, value: Any) -> int:
    """An integer, of numpy and torch too: tables give those."""
    number: Any = None if isinstance(value, bool) else value
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def require_number(
    name: str, value: Any, what: str, *, positive: bool = False, signed: bool = False
) -> float:
    """A finite number: of at least 0, above 0, or any; `what` goes on with the name: "bounds a norm"."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} {what} and must be a finite number, got {value}")
    if not signed and (value < 0 or (positive and value == 0)):
        needed = "be positive" if positive else "not be negative"
        raise ValueError(f"{name} {what} and must {needed}, got {value}")
    return float(value)


def require_position(position: Any, length: int) -> int:
    """A token of a prompt, counted from its start; negative ones count from its end."""
    if not -length <= require_int("position", position) < length:
        raise IndexError(f"position {position} does not exist: the prompt has {length} tokens")
    return int(position) % length


def require_mask(mask: Any, shape: tuple[int, ...], what: str = "token") -> Tensor:
    """A boolean tensor of a shape, true where a token (or an input) counts."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor, got {mask!r:.80}")
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask must be a boolean tensor of shape {list(shape)}, one entry for each {what}, got "
            f"{mask.dtype} {list(mask.shape)}: mask.bool() makes numbers boolean"
        )
    return mask


def generator(seed: Any) -> torch.Generator:
    """Random numbers of a seed, on the CPU: a seed means the same on every device."""
    return torch.Generator().manual_seed(require_int("seed", seed))


def require_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        listed = [repr(option) for option in options]
        raise ValueError(f"{name} must be {', '.join(listed[:-1])} or {listed[-1]}, got {value!r}")


def require_index(name: str, value: Any, size: int, what: str, like: Tensor) -> Tensor:
    """Indices into `size` things, on `like`'s device; negative ones count from the end."""
    try:
        index = torch.as_tensor(value, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must hold integer indices, got {value!r}") from None
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer indices, got {index.dtype}")
    wrong = (index < -size) | (index >= size)
    if bool(wrong.any()):
        place = int(wrong.flatten().nonzero()[0])
        raise IndexError(
            f"{name}[{place}] is {int(index.flatten()[place])}, but there are {size} {what}: indices "
            f"run from 0 to {size - 1}"
        )
    return torch.where(index < 0, index + size, index)


def require_affordable(what: str, count: int, dtype: torch.dtype, limit: int, instead: str) -> None:
    require_int("max_bytes", limit)
    size = count * dtype.itemsize
    if size > limit:
        raise MemoryError(
            f"{what} would take {size:,} bytes, more than max_bytes={limit:,}; {instead}, "
            f"or raise max_bytes"
        )


def narrowed(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in a narrower dtype; raises ValueError where that cannot hold numbers of its size."""
    result = value.to(dtype)
    if result.dtype == value.dtype or result.numel() == 0:
        return result
    largest = float(value.detach().abs().amax())
    if math.isfinite(largest) and largest > 0:
        kept = float(result.detach().abs().amax())
        if not math.isfinite(kept) or kept == 0:
            raise ValueError(
                f"{name} of up to {largest:.1e} cannot be held in "
                f"{str(dtype).removeprefix('torch.')}; use .to(torch.float64), or scale the layer: "
                f"layer * 2.0**n is exact"
            )
    return result


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computation and results: float32 for 16-bit input, the input's own otherwise."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def gram_dtype(tensor: Tensor) -> torch.dtype:
    """Grams square the condition number, hence float64, except where the device has none."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64
