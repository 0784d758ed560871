"""The format of a bundle: a manifest and named documents of JSON, in one page or in a folder.

``bundle.schema.json`` beside this file is the whole format; any tool may write it. In short:

**Manifest.** ``{"format": "tl_bilinear.explorer", "version": 1, "title": ..., "panels": [...]}``. A
panel names its kind ("language", "image" or "graph"), its sizes, and the documents it is made of.

**Documents** are JSON objects under a name. The page asks for one when it is needed.

**Arrays** are ``{"dtype": "float32", "shape": [2, 3], "base64": "..."}``: little-endian, row by row.
Numbers outside of arrays are rounded to float32 too.

**Two carriers of the same documents.**

- One page: ``index.html`` holds everything, each document in ``<script type="application/json"
  data-document=NAME>``.
- A folder: ``index.html`` holds the program and the manifest, and ``data/NAME.js`` is
  ``tlBilinear.add("NAME", {...})``, a script because a page opened from disk may load no other file.

Nothing else is loaded: the page's content security policy forbids it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.io import (
    MARKER,
    claim,
    is_ours,
    read_json,
    refuse_foreign,
    whole_file,
    write_json,
)

FORMAT, VERSION = "tl_bilinear.explorer", 1
KIND = "explorer"
PAGE, DATA = "index.html", "data"
_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.uint8: "uint8",
}
_LARGEST = float(np.finfo(np.float32).max)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

Document = dict[str, Any]
Read = Callable[[str], Document]


@dataclass(frozen=True)
class Panel:
    """A part of the page.

    Attributes
    ----------
    manifest: what the page knows of it from the start
    documents: by name, in the order in which they are made; each is given a function that reads those
        before it
    identity: digest of what it shows; a half-written folder of another identity is not continued
    """

    manifest: Mapping[str, Any]
    documents: Mapping[str, Callable[[Read], Document]]
    identity: str


def packed(tensor: Tensor) -> Document:
    """An array of the format. float64 becomes float32, int64 int32; others stay.

    Raises ValueError for integers that 32 bits do not hold.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype not in _DTYPES:
        if not tensor.is_floating_point() and tensor.numel() and int(tensor.abs().max()) >= 2**31:
            raise ValueError("an array of a bundle holds integers of 32 bits")
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32)
    data = tensor.contiguous().numpy().tobytes()
    return {
        "dtype": _DTYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "base64": base64.b64encode(data).decode("ascii"),
    }


def unpacked(array: Document) -> Tensor:
    """The tensor of an array of the format."""
    dtype = next(torch_name for torch_name, name in _DTYPES.items() if name == array["dtype"])
    data = bytearray(base64.b64decode(array["base64"]))
    if not data:
        return torch.empty(array["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(array["shape"])


# ---------------------------------------------------------------------- documents on disk


@dataclass(frozen=True)
class _Store:
    """The documents of a bundle as files of a folder."""

    folder: Path
    names: set[str] = field(default_factory=set)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.js"

    def write(self, name: str, document: Document) -> None:
        with (
            whole_file(self.path(name)) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            file.write(_opening(name))
            file.writelines(_pieces(document))
            file.write(")\n")

    def json(self, name: str) -> str:
        """A document's JSON, as it may stand inside a script element."""
        text = self.path(name).read_text(encoding="utf-8")
        return text.removeprefix(_opening(name)).removesuffix(")\n")

    def read(self, name: str) -> Document:
        found: Document = json.loads(self.json(name))
        return found


def _opening(name: str) -> str:
    return f'tlBilinear.add("{name}",'


def _pieces(document: Document) -> Iterator[str]:
    """The JSON of a document, an entry at a time: a large one is not held a second time."""
    mark = "{"
    for name, value in document.items():
        yield f"{mark}{_script_json(name)}:"
        yield from _array(value) if _is_array(value) else [_script_json(_shortened(value))]
        mark = ","
    yield "}" if document else "{}"


def _shortened(value: Any) -> Any:
    """The same with its numbers as short as float32 takes them: 0.1 for 0.10000000149011612."""
    if isinstance(value, float):
        return float(str(np.float32(value))) if abs(value) < _LARGEST else value
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(each) for each in value]
    return value


def _is_array(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"dtype", "shape", "base64"}


def _array(array: Document) -> Iterator[str]:
    """The JSON of an array, whose digits need no escape and so no copy."""
    yield f'{{"dtype":"{array["dtype"]}","shape":{json.dumps(array["shape"])},"base64":"'
    yield array["base64"]
    yield '"}'


def _script_json(value: Any) -> str:
    """JSON that no HTML parser sees a tag in, and that is valid JavaScript."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark, code in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(mark, code)
    return text


def _fill(store: _Store, panels: list[Panel], progress: bool) -> list[str]:
    """Make every document that is not there yet; the names of all."""
    names = [name for panel in panels for name in panel.documents]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"a document's name is lower-case letters, digits, . _ -, got {name!r}"
            )
    with tqdm(total=len(names), unit="part", desc="explorer", disable=not progress) as bar:
        for panel in panels:
            for name, make in panel.documents.items():
                if not store.path(name).exists():
                    store.write(name, make(store.read))
                bar.update(1)
    return names


# ---------------------------------------------------------------------- page and folder


def _require_panels(panels: list[Panel]) -> None:
    if not panels:
        raise ValueError("a page needs at least one panel, got none")


def write_page(
    panels: list[Panel], out: str | Path, *, title: str = "tl_bilinear", progress: bool = True
) -> Path:
    """One HTML file that holds everything, whole or not at all.

    Parts are made one at a time in a temporary folder, so memory holds one of them.
    Raises ValueError without panels.
    """
    _require_panels(panels)
    out = Path(out).expanduser()
    with whole_file(out) as temporary, tempfile.TemporaryDirectory() as folder:
        store = _Store(Path(folder))
        names = _fill(store, panels, progress)
        with temporary.open("w", encoding="utf-8") as page:
            page.writelines(_page(_manifest(panels, title), store, names))
    return out


def write_folder(
    panels: list[Panel], out: str | Path, *, title: str = "tl_bilinear", progress: bool = True
) -> Path:
    """A folder whose index.html loads parts as they are asked for, from disk too.

    Interrupted and called again it goes on. Parts of another model or of other settings are made anew.
    Returns the path of index.html. Raises FileExistsError for a folder that is not ours.
    """
    _require_panels(panels)
    out = Path(out).expanduser()
    identity = hashlib.sha256(" ".join(panel.identity for panel in panels).encode()).hexdigest()
    if is_ours(out, KIND):
        if read_json(out / MARKER).get("identity") != identity:
            for place in (out / DATA, out / PAGE):
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(True)
    else:
        refuse_foreign(out, KIND)
        claim(out, KIND)
    (out / DATA).mkdir(exist_ok=True)
    write_json(out / MARKER, {"kind": KIND, "identity": identity, "holds": [DATA, PAGE]})
    store = _Store(out / DATA)
    _fill(store, panels, progress)
    with whole_file(out / PAGE) as temporary:
        temporary.write_text("".join(_page(_manifest(panels, title), store, [])), encoding="utf-8")
    return out / PAGE


def told(page: Path, behind: str) -> bytes:
    """A page, told what stands behind it: "server" or "notebook"."""
    mark = b'<div id="explorer">'
    return page.read_bytes().replace(
        mark, f'<div id="explorer" data-served="{behind}">'.encode(), 1
    )


def read_part(page: Path, name: str) -> Document:
    """A document of a folder, by the folder's page.

    Raises ValueError for a name that is none of the folder's.
    """
    store = _Store(page.parent / DATA)
    if not (_NAME.fullmatch(name) and store.path(name).is_file()):
        raise ValueError(f"there is no part {name!r} beside {page}")
    return store.read(name)


def _manifest(panels: list[Panel], title: str) -> Document:
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "panels": [dict(panel.manifest) for panel in panels],
    }


def asset(name: str) -> str:
    """The built front end: "explorer.js" or "explorer.css"."""
    return (resources.files(__package__) / "asset" / name).read_text(encoding="utf-8")


def _page(manifest: Document, store: _Store, names: list[str]) -> Iterator[str]:
    """The pieces of the page, with the documents named inside it."""
    program, style = asset("explorer.js"), asset("explorer.css")
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    # 'self' and file: are for the parts of a folder; connect-src for the server behind --serve.
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}' 'self' file:; "
        "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'"
    )
    yield f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{html.escape(manifest["title"])}</title>
<style>{style}</style>
</head>
<body>
<div id="explorer"><p class="wait">This page needs JavaScript.</p></div>
<script type="application/json" id="manifest">{_script_json(manifest)}</script>
"""
    for name in names:
        yield f'<script type="application/json" data-document="{name}">{store.json(name)}</script>\n'
    yield f"<script>{program}</script>\n</body>\n</html>\n"
