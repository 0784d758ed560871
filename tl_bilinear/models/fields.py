"""Fields of a config: names that it does not have or that it lacks, and values that cannot be.

No framework is imported.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_LONGEST = 2**18  # tokens: TransformerLens keeps a mask of n_ctx x n_ctx entries
_SIZES = ("n_layers", "d_model", "d_head", "n_heads", "n_ctx", "d_mlp", "d_vocab", "d_vocab_out")
_NUMBERS = ("eps", "attn_scale", "initializer_range", "rotary_base")
_SWITCHES = ("bilinear_bias", "gated_mlp", "final_rms", "attn_only", "parallel_attn_mlp")
_TO_BE_CHOSEN = (None, -1)  # what TransformerLens fills in


def require_fields(
    owner: str, given: Iterable[str], known: Collection[str], required: Iterable[str]
) -> None:
    """Raise TypeError for a field that `owner` does not have (with the nearest), or that is missing."""
    given = list(given)
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"{owner} has no field {', '.join(_shown(n, known) for n in unknown)}")
    if missing := [name for name in required if name not in given]:
        raise TypeError(f"{owner} needs {', '.join(missing)}, which were not given")


def require_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a size, number or switch of a transformer's config that cannot be one."""
    wrong = []
    for name, value in values.items():
        if name in _SIZES and value not in _TO_BE_CHOSEN:
            # A model without layers is one.
            if type(value) is not int or value < (name != "n_layers"):
                wrong.append(f"{name} is {value!r}; expected a positive integer")
            elif name == "n_ctx" and value > _LONGEST:
                wrong.append(f"n_ctx is {value}; TransformerLens holds masks of n_ctx x n_ctx")
            elif name != "n_ctx" and value > 2**31:
                wrong.append(f"{name} is {value}, which no model has")
        elif name in _NUMBERS and value not in _TO_BE_CHOSEN:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                wrong.append(f"{name} is {value!r}; expected a finite number, not negative")
        elif name in _SWITCHES and not isinstance(value, bool):
            wrong.append(f"{name} is {value!r}; expected true or false")
    if wrong:
        raise ValueError("; ".join(wrong))


def _shown(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name!r} (did you mean {nearest[0]!r}?)" if nearest else repr(name)
