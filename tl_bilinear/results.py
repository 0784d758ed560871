"""What every result has in common: it is saved, moved to a device, and shown in one glance.

A result is a frozen dataclass of tensors and values. Its repr gives sizes, never entries. In a notebook
it shows as a small table, the head of its `to_pandas()` where it has one.
"""

from __future__ import annotations

import dataclasses
import html
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from tl_bilinear.io import Storable

if TYPE_CHECKING:
    import pandas

Kind = Literal["all", "self", "cross"]
"""Which pairs: all, an input with itself, or two different ones."""

SHOWN_ROWS = 12
"""Rows of a table that a notebook shows."""

AnyResult = TypeVar("AnyResult", bound="Result")


class Result(Storable):
    """The base of every result: `save`, `load`, `to`, a short repr and a table in notebooks."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:
            # A dataclass writes a repr of its own, with every entry of every tensor, unless it has one.
            cls.__repr__ = super(cls, cls).__repr__  # type: ignore[method-assign]

    def to(self: AnyResult, *args: Any, **kwargs: Any) -> AnyResult:
        """Move to a device or dtype, as `torch.Tensor.to`. Integers and booleans keep their dtype."""
        changed = {
            field.name: _moved(getattr(self, field.name), args, kwargs)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.init
        }
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    def __repr__(self) -> str:
        # Never shortened: what comes from an approximate layer says so, and how near it is.
        note = getattr(self, "approximation", None)
        parts = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.repr
            and not (field.name == "approximation" and isinstance(note, str))
            and getattr(self, field.name) is not None
        ]
        said = f"{note}: " if isinstance(note, str) and note else ""
        return f"{type(self).__name__}({said}{', '.join(parts)})"

    def _repr_html_(self) -> str:
        head = f"<code>{html.escape(repr(self))}</code>"
        to_pandas = getattr(self, "to_pandas", None)
        return head if to_pandas is None else head + table_html(to_pandas())


def table_html(table: pandas.DataFrame) -> str:
    """The first rows of a table as HTML, and how many more there are."""
    shown = table.head(SHOWN_ROWS)
    body = str(shown.to_html(index=False, border=0, float_format="{:.4g}".format))
    more = len(table) - len(shown)
    return body + (f"<p>and {more:,} more rows: to_pandas()</p>" if more else "")


def _moved(value: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(value, Tensor):
        moved = value.to(*args, **kwargs)
        return moved if value.is_floating_point() else value.to(moved.device)
    if isinstance(value, Result):
        return value.to(*args, **kwargs)
    if isinstance(value, dict):
        return {name: _moved(item, args, kwargs) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, args, kwargs) for item in value)
    return value


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        # A number says more than its shape.
        return f"{value.item():.4g}" if value.numel() == 1 else f"[{_sizes(value)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    if isinstance(value, (list, tuple, dict)):
        return repr(value) if len(repr(value)) <= 40 else f"{len(value)} of them"
    return repr(value)


def _sizes(tensor: Tensor) -> str:
    return ", ".join(map(str, tensor.shape))


# ---------------------------------------------------------------------- tables of pairs


def of_kind(first: Tensor, second: Tensor, kind: Kind) -> Tensor:
    """Which pairs are of a kind: a boolean mask of their shape.

    Raises ValueError for an unknown kind.
    """
    own = first == second
    masks = {"all": own | ~own, "self": own, "cross": ~own}
    if kind not in masks:
        raise ValueError(f"kind must be 'all', 'self' or 'cross', got {kind!r}")
    return masks[kind]


def kinds(first: Tensor, second: Tensor) -> list[str]:
    """ "self" or "cross", of each pair."""
    return ["self" if same else "cross" for same in (first == second).flatten().tolist()]
