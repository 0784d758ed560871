"""The run-time checker behind the jaxtyping annotations: beartype, with int accepted for float."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(it: Callable[..., Any]) -> Callable[..., Any]:
    """The same with its annotations checked; of a function inside a function, as it is.

    Such a one is no interface, and is made anew, and would be checked anew, by every call of the outer.
    """
    return it if "<locals>" in it.__qualname__ else _checked(it)
