"""Compares what notebooks found with what the site says: `python demos/docs/check_learned.py [--write]`.

Each notebook ends in one printed sentence. notebooks.md shows it, and the executed notebooks, which the
site's build leaves in demos/docs/.executed, must print it again: the same words, and numbers within a
fifth (models are trained again, and processors round differently).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from jupyter_cache import get_cache

HERE = Path(__file__).parent
PAGE, MARK = HERE / "notebooks.md", "<!-- found -->\n"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
ROOM = 0.2


def last_sentences(cache: Path) -> dict[str, str]:
    """The last line that each executed notebook prints, by the notebook's name."""
    found = {}
    store = get_cache(cache)
    for record in sorted(store.list_cache_records(), key=lambda each: each.created):
        cells = [c for c in store.get_cache_bundle(record.pk).nb.cells if c.cell_type == "code"]
        printed = [out.text for out in cells[-1].outputs if out.get("name") == "stdout"]
        found[Path(record.uri).stem] = "".join(printed).strip().split("\n")[-1]
    return {name: found[name] for name in sorted(p.stem for p in HERE.parent.glob("*.ipynb"))}


def stated(page: str) -> dict[str, str]:
    """The same sentences as the page has them."""
    section = page.split(MARK)[1].split("```")[0]
    return dict(re.findall(r"^- \[.*?\]\(notebooks/(\w+)\.ipynb\): (.*)$", section, re.M))


def differs(said: str, got: str) -> bool:
    """Whether two sentences differ by more than rounding and training again leave open."""
    if NUMBER.sub("#", said) != NUMBER.sub("#", got):
        return True
    pairs = zip(NUMBER.findall(said), NUMBER.findall(got), strict=True)
    numbers = [[float(each.replace(",", "")) for each in pair] for pair in pairs]
    return any(abs(a - b) > ROOM * max(abs(a), abs(b)) for a, b in numbers)


def main() -> None:
    page, found = PAGE.read_text(), last_sentences(HERE / ".executed")
    if "--write" in sys.argv:
        titles = dict(re.findall(r"^\| \[(.*?)\]\(notebooks/(\w+)\.ipynb\)", page, re.M))
        named = {name: title for title, name in titles.items()}
        lines = [f"- [{named[n]}](notebooks/{n}.ipynb): {text}" for n, text in found.items()]
        before, after = page.split(MARK)
        PAGE.write_text(
            f"{before}{MARK}\n" + "\n".join(lines) + "\n\n" + after[after.index("```") :]
        )
        return
    said = stated(page)
    wrong = [n for n, text in found.items() if n not in said or differs(said[n], text)]
    for name in wrong:
        print(f"{name}\n  page:     {said.get(name)}\n  notebook: {found[name]}")
    if wrong:
        sys.exit("notebooks.md is not what the notebooks print: check_learned.py --write")


if __name__ == "__main__":
    main()
