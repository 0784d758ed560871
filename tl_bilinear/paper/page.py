"""Pages from the templates beside this file: one HTML file each, which opens offline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class SummaryTable:
    """Numbers to print: a table with a title above it and a note below it."""

    title: str
    table: pandas.DataFrame
    note: str = ""

    def __str__(self) -> str:
        rows = self.table.to_string(index=False, float_format="{:.3f}".format)
        return "\n".join(filter(None, (self.title, rows, self.note)))


def render(template: str, **values: Any) -> str:
    """A page from a template; what `values` hold is escaped unless it is Markup."""
    return templates().get_template(template).render(values)


@cache
def templates() -> Environment:
    """The templates, with the filters `figure`, `frame` and `shares`, and plotly.js itself."""
    environment = Environment(
        loader=PackageLoader("tl_bilinear.paper"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "frame": _frame, "shares": _shares}
    environment.globals["plotly_js"] = lambda: Markup(get_plotlyjs())
    return environment


def finite(value: Any) -> Any:
    """A value for JSON, with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(figure: go.Figure) -> Markup:
    """A plotly figure as a piece of a page that has plotly.js."""
    shown = {"displayModeBar": False, "responsive": False}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=shown))


def _frame(table: pandas.DataFrame) -> Markup:
    """A DataFrame as an HTML table, numbers to four digits; pandas escapes the text."""
    return Markup(table.to_html(index=False, border=0, float_format=lambda v: f"{v:.4g}"))


def _shares(strengths: Sequence[float]) -> list[float]:
    """Strengths as shares of the largest, 0 where they are not positive: how blue a word is."""
    largest = max(0.0, *strengths) or 1.0
    return [max(0.0, strength) / largest for strength in strengths]
