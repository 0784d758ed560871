"""What a built site lacks on a disk: `python demos/docs/check_links.py FOLDER`.

Names the links inside the site that lead nowhere, and what a page would load from a network: scripts,
modules, style sheets, pictures and frames.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# By which a script or a style sheet inside a page loads something from elsewhere.
LOADS = re.compile(r"""(?:\bimport\b[^;'"()]*|import\(|url\()\s*['"]?((?:https?:)?//[^'")\s]+)""")
LOADING = {"stylesheet", "preload", "modulepreload", "icon", "manifest"}  # kinds of <link>


class Links(HTMLParser):
    """What a page links to, what it loads or shows, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.reading = ""  # "script" or "style" while inside one
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        self.targets += [given[name] or "" for name in ("href", "src") if given.get(name)]
        if tag == "link" and not LOADING & set((given.get("rel") or "").split()):
            return
        if tag != "a":
            self.loaded += [
                given[name] or "" for name in ("href", "src", "data") if given.get(name)
            ]
        self.reading = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.reading = ""

    def handle_data(self, data: str) -> None:
        if self.reading:
            self.loaded += LOADS.findall(data)


def broken(site: Path) -> list[str]:
    """ "page -> target" for every link inside the site whose file or anchor does not exist."""
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html")}
    found = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            missing = not file.exists() or (
                anchor and file in pages and anchor not in pages[file].anchors
            )
            if missing:
                found.append(f"{page.relative_to(site.resolve())} -> {target}")
    return found


def remote(site: Path) -> list[str]:
    """ "page loads address" for all that a page takes from a network: the site must open from a disk."""
    found = []
    for page in sorted(site.rglob("*.html")):
        away = {each for each in Links(page).loaded if urlsplit(each).netloc}
        found += [f"{page.relative_to(site)} loads {address}" for address in sorted(away)]
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    wrong, away = broken(site), remote(site)
    print(*wrong, f"{len(wrong)} broken of the links inside {site.name}", sep="\n")
    print(*away, f"{len(away)} things that its pages load from a network", sep="\n")
    sys.exit(bool(wrong or away) or not any(site.rglob("*.html")))
