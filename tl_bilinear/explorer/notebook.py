"""The page as a notebook's widget: Python knows what is selected, and the model answers.

The page stays in a frame, so that neither its styles nor its text touch the notebook. `notebook.js`
passes its questions on as the widget's messages, ``{"tlBilinear": "ask", "id": ..., "question": ...,
"asked": ...}``, and `Answers` answers as it answers the server.
"""

from __future__ import annotations

import functools
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tl_bilinear.explorer.answers import Answers
from tl_bilinear.explorer.documents import Document, read_part, told
from tl_bilinear.features import FeatureRun
from tl_bilinear.features.examples import Side

MISSING = (
    "a page that talks to Python needs anywidget: pip install 'tl-bilinear[notebook]', "
    "then restart the notebook"
)


def available() -> bool:
    """Whether the widget can be made here."""
    return find_spec("anywidget") is not None


def page_widget(page: Path, run: FeatureRun | None, height: int) -> Any:
    """The widget of a page: an ``anywidget.AnyWidget`` whose trait `place` is the page's address.

    Without a run it answers no questions; a folder's parts it gives out all the same.
    Raises ImportError without anywidget.
    """
    if not available():
        raise ImportError(MISSING)
    behind = "notebook" if run is None else "notebook-model"
    made = _kind()(_page=told(page, behind), _height=height)
    answers = None if run is None else Answers(run)
    made.on_msg(functools.partial(_reply, page, answers))
    return made


@functools.cache
def _kind() -> Any:
    """The class of widgets; anywidget is imported where one is made."""
    import anywidget
    import traitlets

    class ExplorerWidget(anywidget.AnyWidget):
        _esm = (resources.files(__package__) / "notebook.js").read_text(encoding="utf-8")
        _page = traitlets.Bytes().tag(sync=True)
        _height = traitlets.Int().tag(sync=True)
        place = traitlets.Unicode().tag(sync=True)

    return ExplorerWidget


def _reply(page: Path, answers: Answers | None, widget: Any, message: Any, buffers: Any) -> None:
    if not isinstance(message, dict) or message.get("tlBilinear") != "ask":
        return
    question, asked = message.get("question"), message.get("asked")
    found: Document | None
    if question == "part":
        try:
            found = read_part(page, str((asked or {}).get("name")))
        except (ValueError, OSError) as error:
            found = {"error": str(error)}
    else:
        found = None if answers is None else answers.answer(str(question), asked)
    if found is None:
        found = {"error": f"nothing here answers {question!r}"}
    widget.send({"tlBilinear": "answer", "id": message.get("id"), "answer": found})


def selected(place: str) -> tuple[Side, int] | None:
    """The feature that an address shows: ("output", 12)."""
    parts = place.partition("?")[0].removeprefix("#/").split("/")
    if len(parts) == 3 and parts[1] in ("input", "output") and parts[2].isdigit():
        side: Literal["input", "output"] = "input" if parts[1] == "input" else "output"
        return side, int(parts[2])
    return None
