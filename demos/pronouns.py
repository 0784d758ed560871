"""README's picture, from the model that ships: which inputs make layer 3 write "she", and which "he".

`python demos/pronouns.py` writes pronouns.svg, and beside it pronouns.json with the numbers in README.
One minute, no network; matplotlib comes with the extra "vision".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch

import tl_bilinear
from tl_bilinear.demo import load_demo_tokens
from tl_bilinear.hooks import EigenComponents

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LAYER = 3
TEXTS = (
    "once upon a time there was a girl named lily .",
    "once upon a time there was a boy named tom .",
)
SHE, HE, PLAIN = "#2a78b8", "#c8453b", "#8a8a8a"


@torch.no_grad()
def measure(stories: int = 210) -> dict[str, Any]:
    """Eigenvalues of "she" minus "he", what the first two add on text, and what removing them does.

    `stories` rows of the stories that ship, which the model wrote itself.
    """
    model = tl_bilinear.load_demo_model(device="cpu")
    she, he = model.to_single_token("she"), model.to_single_token("he")
    layer = tl_bilinear.BilinearTensor.from_model(model, layer=LAYER)
    eigen = layer.interaction(model.W_U[:, she] - model.W_U[:, he]).eigh()
    parts = EigenComponents(eigen.top(2), layer=LAYER)
    reads = f"blocks.{LAYER}.mlp.hook_in"

    tokens = load_demo_tokens()[:stories]
    following = tokens[:, 1:]
    edits: dict[str, list[Any]] = {
        "whole model": [],
        "without v1": parts.ablate(0).fwd_hooks(model),
        "without v2": parts.ablate(1).fwd_hooks(model),
    }
    differences = {name: [] for name in edits}
    adds = []
    for rows in tokens.split(16):
        for name, hooks in edits.items():
            logits = model.run_with_hooks(rows, fwd_hooks=hooks)[:, :-1]
            differences[name].append(logits[..., she] - logits[..., he])
        _, cache = model.run_with_cache(rows, names_filter=reads)
        adds.append(eigen.top(2).activations(cache[reads])[:, :-1])
    contributions = torch.cat(adds)
    before = {"she": following == she, "he": following == he}

    texts = []
    for text in TEXTS:
        _, cache = model.run_with_cache(text, names_filter=reads)
        added = eigen.top(2).activations(cache[reads])[0]
        words = model.to_str_tokens(text)
        texts.append({"words": words[1:], "v1": rounded(added[1:, 0]), "v2": rounded(added[1:, 1])})
    return {
        "layer": LAYER,
        "direction": "W_U[she] - W_U[he]",
        "stories": len(tokens),
        "eigenvalues": rounded(eigen.values[:40], 4),
        "texts": texts,
        "occurrences": {word: int(where.sum()) for word, where in before.items()},
        "mean_contribution": {
            word: {f"v{i + 1}": rounded(contributions[..., i][where].mean()) for i in (0, 1)}
            for word, where in before.items()
        },
        "mean_logit_difference": {
            name: {word: rounded(torch.cat(found)[where].mean()) for word, where in before.items()}
            for name, found in differences.items()
        },
    }


def rounded(values: torch.Tensor, digits: int = 2) -> Any:
    """A tensor's numbers for JSON."""
    numbers = values.double().tolist()
    return [round(x, digits) for x in numbers] if values.dim() else round(numbers, digits)


def shown(value: float) -> str:
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0"


def draw(found: dict[str, Any], path: Path) -> None:
    """Eigenvalues, the two sentences with what each word's eigenvectors add, and the interventions."""
    plt.rcParams.update(
        {"svg.hashsalt": "tl_bilinear", "font.size": 10, "font.family": "DejaVu Sans"}
    )
    figure = plt.figure(figsize=(11, 5.2), facecolor="white")
    grid = figure.add_gridspec(
        2,
        2,
        height_ratios=(1.25, 1.0),
        hspace=0.55,
        wspace=0.22,
        left=0.07,
        right=0.98,
        top=0.9,
        bottom=0.03,
    )

    values = found["eigenvalues"][:30]
    colors = [SHE, HE] + [PLAIN] * (len(values) - 2)
    axes = figure.add_subplot(grid[0, 0])
    axes.bar(range(1, len(values) + 1), values, color=colors, width=0.75)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title(
        '1. From the weights: two eigenvectors make "she" or "he"', loc="left", fontsize=10.5
    )
    axes.set_xlabel("eigenvector, by falling absolute eigenvalue")
    axes.set_ylabel("eigenvalue")
    axes.annotate("v1", (1, values[0]), (2.0, values[0] * 0.84), color=SHE, weight="bold")
    axes.annotate("v2", (2, values[1]), (3.0, values[1] * 0.92), color=HE, weight="bold")

    axes = figure.add_subplot(grid[0, 1])
    places = {
        "whole model": "whole\nmodel",
        "without v1": "v1\nremoved",
        "without v2": "v2\nremoved",
    }
    width = 0.36
    for shift, word, color in ((-width / 2, "she", SHE), (width / 2, "he", HE)):
        heights = [found["mean_logit_difference"][name][word] for name in places]
        spots = [i + shift for i in range(len(heights))]
        axes.bar(spots, heights, width, color=color, label=f'before "{word}"')
        for x, y in zip(spots, heights, strict=True):
            axes.annotate(
                f"{y:+.1f}",
                (x, y),
                (0, 3 if y > 0 else -12),
                textcoords="offset points",
                ha="center",
            )
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(places)), places.values())
    axes.set_ylim(-8.4, 10.5)
    axes.set_ylabel("logit she - logit he")
    axes.legend(
        frameon=False,
        loc="upper center",
        ncols=2,
        fontsize=8.5,
        columnspacing=1.0,
        handlelength=1.0,
    )
    axes.set_title("2. Checked by intervention: each makes its own word", loc="left", fontsize=10.5)

    axes = figure.add_subplot(grid[1, :])
    axes.set_title(
        "3. On text: what v1 (blue) and v2 (red) add to she - he after each word, before the final norm",
        loc="left",
        fontsize=10.5,
    )
    axes.axis("off")
    most = max(abs(x) for text in found["texts"] for name in ("v1", "v2") for x in text[name])
    for row, text in enumerate(found["texts"]):
        top = 1.9 - 2.2 * row
        for column, word in enumerate(text["words"]):
            axes.text(column + 0.5, top, word, ha="center", va="center", fontsize=11)
            for line, (name, color) in enumerate((("v1", SHE), ("v2", HE))):
                value = text[name][column]
                box = plt.Rectangle(
                    (column + 0.04, top - 0.9 - 0.55 * line),
                    0.92,
                    0.5,
                    facecolor=color,
                    alpha=max(0.04, min(1.0, abs(value) / most)),
                    linewidth=0,
                )
                axes.add_patch(box)
                axes.text(
                    column + 0.5,
                    top - 0.65 - 0.55 * line,
                    shown(value),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if abs(value) > 0.55 * most else "black",
                )
    axes.set_xlim(0, max(len(text["words"]) for text in found["texts"]))
    axes.set_ylim(-2.0, 2.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    found = measure()
    (HERE / "pronouns.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(found, HERE / "pronouns.svg")
