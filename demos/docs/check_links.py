"""Names the links inside a built site that lead nowhere: `python demos/docs/check_links.py FOLDER`."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Links(HTMLParser):
    """What a page links to or shows, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        self.targets += [given[name] or "" for name in ("href", "src") if given.get(name)]


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


if __name__ == "__main__":
    site = Path(sys.argv[1])
    wrong = broken(site)
    print(*wrong, f"{len(wrong)} broken of the links inside {site.name}", sep="\n")
    sys.exit(bool(wrong) or not any(site.rglob("*.html")))
