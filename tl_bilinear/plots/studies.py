"""Figures of the image studies (Pearce et al. 2025, section 4 and appendices A to F, J, K)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_bilinear.plots.mosaic import mosaic_figure
from tl_bilinear.plots.style import CATEGORICAL, DIVERGING, LAYOUT, NEGATIVE, NEUTRAL, POSITIVE

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.recipes.images.adversarial import AdversarialMasks, MaskEffect
    from tl_bilinear.recipes.images.explain import Explanation
    from tl_bilinear.recipes.images.lowrank import Certificates, SharedNeurons
    from tl_bilinear.recipes.images.similarity import SeedsAndSizes
    from tl_bilinear.recipes.images.sweep import Sweep
    from tl_bilinear.recipes.images.target import HiddenTarget
    from tl_bilinear.recipes.images.toy import FittedToy
    from tl_bilinear.tensor import HOSVD

Size = tuple[int, int]

_ROUNDING = 1e-5


# ---------------------------------------------------------------------- eigenvectors


def gallery_figure(
    values: Float[Tensor, "rows k"],
    images: Float[Tensor, "rows k pixels"],
    size: Size,
    names: Sequence[str],
    *,
    count: int = 4,
    title: str = "",
) -> go.Figure:
    """A row a class (or component): its top positive and negative eigenvectors (Fig. 2, 10-12)."""
    tiles, captions = [], []
    for row, pictures in zip(values, images, strict=True):
        shown, text = _both_ends(row, pictures, count)
        tiles.append(shown)
        captions.append(text)
    columns = [f"{sign}{i + 1}" for sign in "+-" for i in range(count)]
    return mosaic_figure(
        torch.stack(tiles), size, rows=names, columns=columns, captions=captions, title=title
    )


def _both_ends(values: Tensor, images: Tensor, count: int) -> tuple[Tensor, list[str]]:
    """The top of each sign, missing ones empty, and their eigenvalues."""
    tiles = images.new_full((2 * count, images.shape[-1]), torch.nan)
    captions = [""] * (2 * count)
    order = values.argsort(descending=True).tolist()
    for end, indices in enumerate((order, order[::-1])):
        kept = [i for i in indices if (values[i] > 0) == (end == 0) and values[i] != 0][:count]
        for place, index in enumerate(kept, start=end * count):
            tiles[place] = images[index]
            captions[place] = f"{float(values[index]):+.2f}"
    return tiles, captions


def hosvd_figure(components: HOSVD, classes: Sequence[str]) -> go.Figure:
    """What each HOSVD component writes: its singular value, and its weights on the classes."""
    figure = make_subplots(rows=1, cols=2, column_widths=[0.3, 0.7], horizontal_spacing=0.1)
    ranks = [str(i + 1) for i in range(len(components.values))]
    figure.add_trace(
        go.Bar(y=ranks, x=_round(components.values), orientation="h", marker_color=POSITIVE), 1, 1
    )
    figure.add_trace(_heatmap(components.vectors, list(classes), ranks), 1, 2)
    figure.update_yaxes(autorange="reversed", title="component", col=1)
    figure.update_yaxes(autorange="reversed", col=2)
    figure.update_xaxes(title="singular value", col=1)
    figure.update_xaxes(title="weight on each class", type="category", col=2)
    return _sized(figure, 760, 120 + 26 * len(ranks), showlegend=False)


# ---------------------------------------------------------------------- sweeps


def sweep_figure(result: Sweep, size: Size, *, title: str = "") -> go.Figure:
    """The top eigenvectors of one class under every setting, with the accuracy (Fig. 4, 13, 14)."""
    k = result.vectors.shape[1]
    half = -(-len(result.settings) // 2)
    tiles = result.vectors.new_full((half, 2 * k + 1, result.vectors.shape[-1]), torch.nan)
    captions = [[""] * (2 * k + 1) for _ in range(half)]
    for index, name in enumerate(result.settings):
        row, start = index % half, (index // half) * (k + 1)
        tiles[row, start : start + k] = result.vectors[index]
        middle = start + (k - 1) // 2
        accuracy = float(result.accuracy[index].mean())
        captions[row][middle] = f"<b>{name}</b>, accuracy {accuracy:.3f}"
    return mosaic_figure(tiles, size, captions=captions, title=title)


def sweep_numbers_figure(result: Sweep) -> go.Figure:
    """Accuracy, effective rank, effective pixels and rarely used pixels of every setting."""
    panels = {
        "accuracy": result.accuracy,
        "effective rank": result.effective_rank,
        "effective pixels": result.effective_pixels,
        "share on rare pixels": result.rare,
    }
    figure = make_subplots(
        rows=1, cols=4, shared_yaxes=True, subplot_titles=list(panels), horizontal_spacing=0.03
    )
    for column, numbers in enumerate(panels.values(), start=1):
        for seed in range(numbers.shape[1]):
            figure.add_trace(
                go.Scatter(
                    x=_round(numbers[:, seed]),
                    y=list(result.settings),
                    mode="markers",
                    marker={"color": POSITIVE, "size": 7, "opacity": 0.7},
                ),
                1,
                column,
            )
    figure.update_yaxes(autorange="reversed")
    return _sized(figure, 880, 110 + 21 * len(result.settings), showlegend=False)


def sparsity_figure(result: Sweep, noises: Sequence[float], decays: Sequence[float]) -> go.Figure:
    """(L1/L2)^2 of eigenvalues and of top eigenvectors over noise and weight decay (Fig. 17)."""
    panels = {
        "eigenvalues that count": result.effective_rank,
        "pixels that count": result.effective_pixels,
        "accuracy": result.accuracy,
    }
    figure = make_subplots(rows=1, cols=3, subplot_titles=list(panels), horizontal_spacing=0.07)
    for column, (name, numbers) in enumerate(panels.items(), start=1):
        grid = numbers.mean(1).reshape(len(noises), len(decays))
        figure.add_trace(
            go.Heatmap(
                z=_round(grid),
                x=[f"{decay:g}" for decay in decays],
                y=[f"{noise:g}" for noise in noises],
                colorscale="Blues",
                showscale=False,
                texttemplate="%{z:.3f}" if name == "accuracy" else "%{z:.1f}",
            ),
            1,
            column,
        )
    figure.update_xaxes(title="weight decay", type="category")
    figure.update_yaxes(type="category")
    figure.update_yaxes(title="input noise", col=1)
    return _sized(figure, 880, 340)


# ---------------------------------------------------------------------- seeds and sizes


def similarity_figure(result: SeedsAndSizes) -> go.Figure:
    """Similarity within sizes, to the largest size, and between all sizes (Fig. 5A, 18B, 18C)."""
    from tl_bilinear.recipes.images.similarity import SIGNS, interval

    titles = [f"within a size, {sign}" for sign in SIGNS] + [
        f"to size {result.sizes[-1]}, positive",
        "between sizes, first positive",
    ]
    figure = make_subplots(
        rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.16
    )
    ranks = list(range(1, result.within.shape[2] + 1))
    mean, low, high = interval(result.within)
    for i, size in enumerate(result.sizes):
        for sign in range(2):
            bands = (mean[i, sign], low[i, sign], high[i, sign])
            _band(figure, ranks, bands, i, f"size {size}", 1, sign + 1, sign == 0)
        if i < len(result.sizes) - 1:
            line = _line(ranks, result.between[i, -1, 0], i, f"size {size}")
            figure.add_trace(line.update(showlegend=False), 2, 1)
    names = [str(size) for size in result.sizes]
    grid = result.between[:, :, 0, 0]
    figure.add_trace(
        go.Heatmap(
            z=_round(grid), x=names, y=names, colorscale="Blues", showscale=False,
            texttemplate="%{z:.2f}", zmin=0, zmax=1,
        ),
        2, 2,
    )  # fmt: skip
    for row, column in ((1, 1), (1, 2), (2, 1)):
        figure.update_yaxes(range=[0, 1.02], row=row, col=column)
        figure.update_xaxes(title="rank", row=row, col=column)
    figure.update_yaxes(title="absolute cosine", col=1)
    figure.update_xaxes(type="category", title="size", row=2, col=2)
    figure.update_yaxes(type="category", row=2, col=2)
    return _sized(figure, 880, 640)


def sizes_truncation_figure(result: SeedsAndSizes) -> go.Figure:
    """Accuracy, and accuracy lost, against the eigenvectors kept for each class (Fig. 5B, 18A)."""
    table = result.truncation()
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=["test accuracy", "accuracy lost"], horizontal_spacing=0.1
    )
    for i, (size, part) in enumerate(table.groupby("size")):
        kept, name = part["eigenvectors"].tolist(), f"size {size}"
        figure.add_trace(_line(kept, part["accuracy"].tolist(), i, name), 1, 1)
        bands = tuple(part[column].tolist() for column in ("lost", "low", "high"))
        _band(figure, kept, bands, i, name, 1, 2, False)
    kept_axis = {"type": "log", "tickvals": list(result.kept)}
    figure.update_xaxes(title="eigenvectors kept for each class", **kept_axis)
    figure.update_yaxes(range=[-0.01, 0.1], col=2)
    return _sized(figure, 880, 360)


# ---------------------------------------------------------------------- hidden target


def target_figure(result: HiddenTarget, size: Size, *, shown: int = 4) -> go.Figure:
    """Target, eigenvectors by absolute eigenvalue and the biases' linear part, a row a seed (Fig. 6)."""
    tiles, captions = [], []
    for seed in range(len(result.accuracy)):
        linear = result.linear[seed][None]
        tiles.append(torch.cat([result.target[None], result.vectors[seed, :shown], linear]))
        values = [f"{float(v):+.2f}" for v in result.values[seed, :shown]]
        cosine = float(result.cosines[seed, 0])
        captions.append([f"cosine {cosine:.2f}", *values, f"{float(result.constant[seed]):+.2f}"])
    grey = torch.zeros(len(tiles), shown + 2, dtype=torch.bool)
    grey[:, 0] = True
    return mosaic_figure(
        torch.stack(tiles), size,
        rows=[f"seed {seed}, accuracy {float(a):.3f}" for seed, a in enumerate(result.accuracy)],
        columns=["target", *(f"eigenvector {i + 1}" for i in range(shown)), "linear; constant"],
        captions=captions, grey=grey,
    )  # fmt: skip


def parts_figure(result: HiddenTarget) -> go.Figure:
    """Mean interaction, linear and constant part of the logit difference, a bar a seed (appendix J)."""
    names = ["interaction", "linear", "constant", "sum"]
    figure = go.Figure()
    for seed, parts in enumerate(result.parts):
        figure.add_trace(
            go.Bar(
                x=names,
                y=_round(torch.cat([parts, parts.sum()[None]])),
                name=f"seed {seed}",
                marker_color=CATEGORICAL[seed % len(CATEGORICAL)],
            )
        )
    return _sized(figure, 620, 320, yaxis_title="mean of True - False")


# ---------------------------------------------------------------------- adversarial masks


def masks_figure(
    masks: Mapping[str, AdversarialMasks], example: Tensor, size: Size, *, strength: float = 0.3
) -> go.Figure:
    """A row a model: eigenvectors, the masks made of them, and an image under the first (Fig. 7, 23)."""
    tiles, names = [], []
    for name, found in masks.items():
        image = (example + strength * found.masks[0])[None]
        tiles.append(torch.cat([found.vectors, found.masks, example[None], image]))
        names.append(name.replace(", ", "<br>"))
    count = len(next(iter(masks.values())).masks)
    grey = torch.zeros(len(tiles), 2 * count + 2, dtype=torch.bool)
    grey[:, -2:] = True
    return mosaic_figure(
        torch.stack(tiles), size,
        rows=names,
        columns=[
            *(f"eigenvector {i + 1}" for i in range(count)),
            *(f"mask {i + 1}" for i in range(count)),
            "image", f"+ {strength:g} mask 1",
        ],
        grey=grey,
    )  # fmt: skip


def mask_effect_figure(effects: Mapping[str, MaskEffect]) -> go.Figure:
    """Accuracy and rate of the adversarial class against strength, with both controls (Fig. 7)."""
    from tl_bilinear.recipes.images.adversarial import KINDS

    figure = make_subplots(
        rows=2, cols=len(effects), shared_xaxes=True, shared_yaxes=True,
        subplot_titles=[name.replace(", ", "<br>") for name in effects],
        horizontal_spacing=0.03, vertical_spacing=0.08,
    )  # fmt: skip
    for column, effect in enumerate(effects.values(), start=1):
        strengths = list(effect.strengths)
        for row, numbers in enumerate((effect.accuracy, effect.steered), start=1):
            for i, kind in enumerate(KINDS):
                line = _line(strengths, numbers[i].mean(0), i, kind)
                line.update(showlegend=column == 1 and row == 1, legendgroup=kind)
                figure.add_trace(line, row, column)
    figure.update_xaxes(title="strength", row=2)
    figure.update_yaxes(range=[0, 1.02])
    figure.update_yaxes(title="accuracy", row=1, col=1)
    figure.update_yaxes(title="taken for the class", row=2, col=1)
    figure.update_annotations(font_size=12)
    return _sized(figure, 880, 480).update_layout(margin_t=55)


# ---------------------------------------------------------------------- one prediction


def explanation_figure(
    result: Explanation, size: Size, *, shown: int = 3
) -> tuple[go.Figure, go.Figure]:
    """One image: contributions and logits, and the eigenvectors behind them (Fig. 15, 16).

    The three classes of largest logit; for each its eigenvectors of largest and most negative
    contribution, with what they add.
    """
    top = result.logits.argsort(descending=True)[:3].tolist()
    lines = make_subplots(
        rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.1,
        subplot_titles=["contributions of eigenvectors, sorted", "logit = made + suppressed"],
    )  # fmt: skip
    for i, label in enumerate(top):
        ordered = result.contributions[label].sort(descending=True).values
        ends = torch.cat([ordered[:10], ordered[-10:]])
        name = f"class {result.classes[label]}"
        lines.add_trace(_line([*range(1, 11), *range(13, 23)], ends, i, name), 1, 1)
    names = list(result.classes)
    for kind, numbers, color in (
        ("made", result.made, POSITIVE),
        ("suppressed", result.suppressed, NEGATIVE),
        ("biases", result.linear + result.constant, NEUTRAL),
    ):
        if kind != "biases" or bool(numbers.any()):
            lines.add_trace(
                go.Bar(x=names, y=_round(numbers), name=kind, marker_color=color, opacity=0.55),
                1,
                2,
            )
    lines.add_trace(
        go.Scatter(
            x=names, y=_round(result.logits), mode="markers", name="logit",
            marker={"color": "black", "symbol": "line-ew-open", "size": 16, "line": {"width": 3}},
        ),
        1, 2,
    )  # fmt: skip
    lines.update_xaxes(title="largest 10 | most negative 10", showticklabels=False, col=1)
    lines.update_xaxes(title="class", type="category", col=2)
    _sized(lines, 880, 340, barmode="relative")
    tiles, captions = [], []
    for label in top:
        pictures, text = _both_ends(result.contributions[label], result.vectors[label], shown)
        tiles.append(torch.cat([result.image[None], pictures]))
        captions.append([f"logit {float(result.logits[label]):+.1f}", *text])
    grey = torch.zeros(len(top), 2 * shown + 1, dtype=torch.bool)
    grey[:, 0] = True
    columns = ["image", *(f"made {i + 1}" for i in range(shown))]
    columns += [f"suppressed {i + 1}" for i in range(shown)]
    pictures = mosaic_figure(
        torch.stack(tiles), size, rows=[f"class {names[label]}" for label in top],
        columns=columns, captions=captions, grey=grey,
    )  # fmt: skip
    return lines, pictures


# ---------------------------------------------------------------------- toy tasks


def toy_figure(fits: Sequence[FittedToy], *, title: str = "") -> go.Figure:
    """First output of each task: its matrix as trained, symmetrised, seen by the inputs, expected.

    And the first two eigenvectors of the symmetrised one, a coordinate a column. What is zero to
    rounding is left white.
    """
    width = max(fit.matrices.shape[-1] for fit in fits)
    tiles, captions, names = [], [], []
    for fit in fits:
        d = fit.matrices.shape[-1]
        count = min(2, d)
        rows = fit.vectors[0, :count, None, :].expand(count, d, d)
        rows = rows * (fit.values[0, :count].abs() > _ROUNDING)[:, None, None]
        pictures = torch.stack([fit.raw[0], fit.matrices[0], fit.seen[0], fit.expected[0], *rows])
        pictures = pictures * (pictures.abs().amax((1, 2), keepdim=True) > _ROUNDING)
        # Smaller matrices are put in the upper left corner of the same frame.
        tile = pictures.new_zeros(4 + 2, width, width)
        tile[: len(pictures), :d, :d] = pictures
        tiles.append(tile.flatten(1).float())
        values = [f"λ = {float(v):+.2f}" for v in fit.values[0, :count]]
        captions.append(
            ["", "", f"distance {float(fit.distance[0]):.0e}", ""] + values + [""] * (2 - count)
        )
        names.append(f"{fit.outputs[0]}{', biases' if fit.bias else ''}")
    columns = ["as trained", "symmetrised", "seen by inputs", "expected"]
    columns += ["eigenvector 1", "eigenvector 2"]
    return mosaic_figure(
        torch.stack(tiles), (width, width), rows=names, columns=columns, captions=captions,
        title=title,
    )  # fmt: skip


# ---------------------------------------------------------------------- low rank


def neurons_figure(result: SharedNeurons) -> go.Figure:
    """Accuracy against numbers stored, shared neurons beside eigenvectors of each class."""
    table: pandas.DataFrame = result.to_pandas()
    figure = go.Figure()
    for i, (method, part) in enumerate(table.groupby("method", sort=False)):
        line = _line(part["numbers"].tolist(), part["accuracy"].tolist(), i, str(method))
        line.update(mode="lines+markers+text", text=part["components"].astype(str).tolist())
        figure.add_trace(line.update(textposition="bottom right"))
    figure.add_hline(y=result.whole, line={"color": NEUTRAL, "dash": "dash"})
    figure.update_xaxes(title="numbers stored", type="log", dtick="D1")
    return _sized(figure, 760, 360, yaxis_title="test accuracy")


def neuron_gallery_figure(
    result: SharedNeurons, fit: int, size: Size, classes: Sequence[str], *, count: int = 9
) -> go.Figure:
    """The first neurons of one fit: the pattern that adds, the one that takes off, what it writes."""
    neurons = result.fits[fit]
    count = min(count, neurons.rank)
    tiles = torch.stack([neurons.plus[:count], neurons.minus[:count]])
    text = []
    for column in neurons.out.T[:count]:
        order = column.abs().argsort(descending=True)[:3].tolist()
        text.append(" ".join(f"{classes[i]}{'+' if column[i] > 0 else '-'}" for i in order))
    return mosaic_figure(tiles, size, rows=["l + m", "l - m"], columns=text)


def certificates_figure(result: Certificates) -> go.Figure:
    """Bound, worst and mean error of a truncated logit, mean over classes, on a logarithmic axis."""
    figure = go.Figure()
    for i, (name, numbers) in enumerate(
        (
            (f"bound for every image of norm ≤ {result.radius:.1f}", result.bound),
            ("worst on test images", result.worst),
            ("mean on test images", result.mean),
        )
    ):
        figure.add_trace(_line(list(result.kept), numbers.mean(0), i, name))
    spread = [float(result.spread.mean())] * len(result.kept)
    dashed = _line(list(result.kept), spread, 6, "standard deviation of a logit")
    figure.add_trace(dashed.update(mode="lines", line_dash="dash"))
    kept = {"type": "log", "tickvals": list(result.kept)}
    figure.update_xaxes(title="eigenvectors kept for each class", **kept)
    figure.update_yaxes(title="error of a logit", type="log", exponentformat="power", dtick=1)
    return _sized(figure, 760, 380)


# ---------------------------------------------------------------------- what they share


def _line(x: Sequence[Any], y: Any, number: int, name: str) -> go.Scatter:
    color = CATEGORICAL[number % len(CATEGORICAL)]
    return go.Scatter(
        x=list(x), y=_round(y), mode="lines+markers", name=name, line={"color": color, "width": 1.8}
    )


def _band(
    figure: go.Figure, x: Sequence[Any], bands: tuple[Any, ...], number: int, name: str,
    row: int, column: int, legend: bool,
) -> None:  # fmt: skip
    mean, low, high = (_round(each) for each in bands)
    color = CATEGORICAL[number % len(CATEGORICAL)]
    figure.add_trace(
        go.Scatter(
            x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", fillcolor=color,
            opacity=0.15, mode="none", showlegend=False, hoverinfo="skip",
        ),
        row, column,
    )  # fmt: skip
    figure.add_trace(_line(x, mean, number, name).update(showlegend=legend), row, column)


def _heatmap(values: Tensor, x: list[str], y: list[str]) -> go.Heatmap:
    scale = float(values.abs().max()) or 1.0
    return go.Heatmap(
        z=_round(values), x=x, y=y, zmin=-scale, zmax=scale, colorscale=DIVERGING, showscale=False
    )


def _sized(figure: go.Figure, width: int, height: int, **layout: Any) -> go.Figure:
    return figure.update_layout(**LAYOUT, width=width, height=height, **layout)


def _round(values: Any) -> Any:
    """Numbers to five digits as lists: what a page holds, a reader downloads."""
    return torch.as_tensor(values, dtype=torch.float64).mul(1e5).round().div(1e5).tolist()
