"""Names of fields that a config does not have, or that it lacks. No framework is imported."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def require_fields(
    owner: str, given: Iterable[str], known: Collection[str], required: Iterable[str]
) -> None:
    """Raise TypeError for a field that `owner` does not have (with the nearest), or that is missing."""
    given = list(given)
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"{owner} has no field {', '.join(_shown(n, known) for n in unknown)}")
    if missing := [name for name in required if name not in given]:
        raise TypeError(f"{owner} needs {', '.join(missing)}, which were not given")


def _shown(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name!r} (did you mean {nearest[0]!r}?)" if nearest else repr(name)
