"""Several forms chosen by the token's region, beside one wider form: tried, and not taken.

Regions are nearest centroids of what the layer reads (k-means), or the signs of the gates whose neurons
write most. In each region an own closed form is fitted to the region's inputs.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from tl_bilinear.tensor import approximate


def centroids(x, count, seed=0, steps=20):
    """Lloyd's k-means on rows of x; returns what gives the region of each row."""
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:count]].clone()
    for _ in range(steps):
        nearest = torch.cdist(x, centres).argmin(1)
        for i in range(count):
            if (nearest == i).any():
                centres[i] = x[nearest == i].mean(0)
    return lambda rows: torch.cdist(rows, centres).argmin(-1)


def everywhere(rows):
    return rows.new_zeros(len(rows)).long()


def signs(mlp, x, count):
    """Regions by the signs of the gates of the neurons that write most: 2^bits of them."""
    bits = {2: 1, 4: 2}[count]
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        written = (mlp.act_fn(gate) * up).square().mean(0) * mlp.down_proj.weight.square().sum(0)
        # A neuron whose gate has one sign only splits nothing.
        split = (gate > 0).float().mean(0)
        written = written * (split * (1 - split) > 0.05)
    chosen = written.topk(bits).indices

    def region(rows):
        on = (rows @ mlp.gate_proj.weight[chosen].T > 0).long()
        return (on * 2 ** torch.arange(bits)).sum(-1)

    return region


class Pieces(nn.Module):
    def __init__(self, mlp, x, region, count, extra=0):
        super().__init__()
        self.region, self.forms = region, []
        where = region(x)
        for i in range(count):
            rows = x[where == i]
            self.forms.append(
                approximate(mlp, rows, extra=extra, warn_below=-1e9).tensor if len(rows) else None
            )

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        where, out = self.region(rows), torch.zeros_like(rows)
        for i, form in enumerate(self.forms):
            chosen = where == i
            if form is not None and chosen.any():
                out[chosen] = form(rows[chosen]).to(out.dtype)
        return out.view_as(x)


class PiecewiseReplacement:
    """An edit for `loss_added`, as `Replacement`."""

    def __init__(self, modules):
        self.modules = modules

    @contextmanager
    def applied(self, llama):
        blocks = llama.model.layers
        before = {layer: blocks[layer].mlp for layer in self.modules}
        try:
            for layer, module in self.modules.items():
                blocks[layer].mlp = module
            yield
        finally:
            for layer, mlp in before.items():
                blocks[layer].mlp = mlp


def pieces(llama, inputs, h):
    """Name, how many times h neurons, and modules by layer of each way."""
    mlps = {layer: llama.model.layers[layer].mlp for layer in inputs}
    yield (
        "one form",
        1,
        {n: Pieces(m, inputs[n], everywhere, 1) for n, m in mlps.items()},
    )
    for count in (2, 3, 4):
        yield (
            f"{count} forms by nearest centroid",
            count,
            {n: Pieces(m, inputs[n], centroids(inputs[n], count), count) for n, m in mlps.items()},
        )
    for count in (2, 4):
        yield (
            f"{count} forms by signs of gates",
            count,
            {n: Pieces(m, inputs[n], signs(m, inputs[n], count), count) for n, m in mlps.items()},
        )
    for times in (1, 2, 3):
        yield (
            f"one form, extra = {times} h",
            1 + times,
            {n: Pieces(m, inputs[n], everywhere, 1, extra=times * h) for n, m in mlps.items()},
        )
