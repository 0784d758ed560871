"""The page that reports share: its style, and pieces of HTML. One file, opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a;
       max-width: 900px; margin: 2rem auto 4rem; padding: 0 1rem; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0 }
p { max-width: 44rem } .note { color: #555; font-size: .92rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .9rem .28rem 0; text-align: right; border-bottom: 1px solid #eee }
th { font-weight: 600; font-size: .88rem; color: #444 }
th:first-child, td:first-child { text-align: left }
.tables { display: flex; gap: 0 2.5rem; flex-wrap: wrap; align-items: flex-start }
.blue { color: #2166ac; font-weight: 600 } .red { color: #b2182b; font-weight: 600 }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem } figure { margin: 0 }
code { background: #f4f4f4; padding: .1em .3em; border-radius: 3px; font-size: .9em }
nav { font-size: .92rem; color: #555; margin-bottom: 1.5rem } a { color: #2166ac }
article + article { margin-top: 4.5rem; border-top: 3px solid #1a1a1a; padding-top: .5rem }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid #ddd; max-width: 44rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; max-width: 52rem } dd { margin: 0 }
dt { font-weight: 600 } .chips { line-height: 2; margin: .5rem 0; max-width: none } .chips > b { display: inline-block; width: 4rem }
.chips > span, .name { background: #f0f2f5; border-radius: 3px; padding: .1em .4em }
.chips > span { margin-right: .2rem; white-space: nowrap } .name { overflow-wrap: anywhere }
.name small { color: #666; font-size: .75em } sup { line-height: 0 }
.examples { max-width: 52rem; line-height: 1.9 } .examples li { margin-bottom: .5rem }
.peak { outline: 2px solid #053061; border-radius: 2px; font-weight: 600; padding: 0 .2em; margin: 0 .1em }
"""


def page(title: str, body: str) -> str:
    """A whole HTML page with its style and plotly.js inside: it opens offline."""
    from plotly.offline import get_plotlyjs

    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{body}</body></html>"
    )


def embed(figure: Any) -> str:
    """A plotly figure as a piece of a :func:`page`."""
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": False},
    )
    return f"<figure>{html}</figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; its cells are HTML already."""
    head = "".join(f"<th>{cell}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def chips(words: Iterable[str]) -> str:
    """Words side by side, each in a box of its own."""
    return " ".join(f"<span>{escape(word)}</span>" for word in words)


def shaded(words: Sequence[str], strengths: Sequence[float], peak: int) -> str:
    """Text in which each word is as blue as it is strong, the one at `peak` framed.

    `words` bring their spaces with them; a strength at or below zero leaves a word as it is.
    """
    largest = max(0.0, *strengths) or 1.0
    spans = []
    for place, (word, strength) in enumerate(zip(words, strengths, strict=True)):
        text = word.lstrip()
        space, html = word[: len(word) - len(text)], escape(text)
        if strength > 0 or place == peak:
            # Half transparent at most, so that the text stays dark on light.
            blue = f"background:rgba(33,102,172,{0.5 * max(0.0, strength) / largest:.2f})"
            html = f'<span{" class=peak" * (place == peak)} style="{blue}">{html}</span>'
        spans.append(space + html)
    return "".join(spans).strip()
