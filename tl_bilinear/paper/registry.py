"""The studies of the paper by name.

A study is one file: a settings dataclass, a computation, its result, figures of it, and the words of its
page. It registers the function that writes the page, and the gallery asks here:

>>> @register("target", TargetSettings)
... def target_page(data: ImageData, settings: TargetSettings, runs: Runs) -> Page: ...

Every setting has a default. The gallery fills in those that carry the name of one of its own options
(``config``, ``seeds``, ``sizes``, ``label``, ``space``, ``fashion``).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tl_bilinear.recipes.images import ImageData, Runs

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

_FILES = {  # which file registers which study, in the order of the gallery
    "eigenvectors": "eigenvectors",
    "hosvd": "hosvd_components",
    "regularisation": "regularisation",
    "similarity": "similarity",
    "target": "target",
    "adversarial": "adversarial",
    "explanation": "explanation",
    "toy": "toy",
    "sparsity": "regularisation",
    "neurons": "neurons",
    "certificates": "certified",
    "proofs": "proofs",
    "across-layers": "across_layers",
}


@dataclass(frozen=True, eq=False)
class Page:
    """What a study has to show.

    Attributes
    ----------
    title, text: what it shows; a text with HTML is a `markupsafe.Markup`
    plots: figures, in order
    tables: numbers by name, one CSV file each
    summary: the few numbers that answer the study's question
    """

    title: str
    text: str
    plots: Sequence[go.Figure]
    tables: Mapping[str, pandas.DataFrame] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


Writer = Callable[[ImageData, Any, Runs], Page]


@dataclass(frozen=True)
class Study:
    """A registered study: the class of its settings, and the function that writes its page."""

    name: str
    settings: type
    write: Writer


_STUDIES: dict[str, Study] = {}


def register(name: str, settings: type) -> Callable[[Writer], Writer]:
    """Decorate the function that writes a study's page.

    Raises ValueError for a name that is taken, or a setting without a default.
    """
    if name in _STUDIES:
        raise ValueError(f"there is a study named {name!r} already: {_STUDIES[name]}")
    for setting in dataclasses.fields(settings):
        if setting.default is setting.default_factory is dataclasses.MISSING:
            raise ValueError(f"{settings.__name__}.{setting.name} needs a default")

    def registered(write: Writer) -> Writer:
        _STUDIES[name] = Study(name, settings, write)
        return write

    return registered


def studies() -> dict[str, Study]:
    """All studies by name: those of the paper in the gallery's order, then others."""
    for file in _FILES.values():  # each registers itself
        importlib.import_module(f"tl_bilinear.paper.{file}")
    return {name: _STUDIES[name] for name in _FILES} | _STUDIES


def find_study(name: str) -> Study:
    """A study by name; raises ValueError naming those there are."""
    known = studies()
    if name not in known:
        raise ValueError(f"no study {name}; there are {', '.join(known)}")
    return known[name]
