"""One look for all figures: blue positive, red negative, centred on zero."""

from __future__ import annotations

POSITIVE, NEGATIVE, NEUTRAL = "#2166ac", "#b2182b", "#6b6b6b"

DIVERGING = [
    [0.0, "#67001f"],
    [0.15, "#b2182b"],
    [0.35, "#f4a582"],
    [0.5, "#ffffff"],
    [0.65, "#92c5de"],
    [0.85, "#2166ac"],
    [1.0, "#053061"],
]

LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
    "margin": {"l": 55, "r": 15, "t": 40, "b": 45},
}

CATEGORICAL = ["#2166ac", "#e08214", "#4d9221", "#7b3294", "#b2182b", "#01665e", "#6b6b6b"]
