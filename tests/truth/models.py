"""Planted models, whose circuit is known, and null models, which have none.

A layer of one output feature between an input dictionary and a number. Planted neurons read along two
features and write the circuit; the other hidden neurons are random, and make up `noise`: the root mean
square of their coefficients over all pairs, beside the circuit's largest.
"""

import functools
from dataclasses import dataclass

import torch

from tl_bilinear import BilinearTensor
from tl_bilinear.demo import load_demo_saes
from tl_bilinear.features.chance import random_rotation

KINDS = ("and", "negation", "xor", "gated copy")
DICTIONARIES = ("random", "correlated", "trained")
SIZES = ((32, 64, 96), (96, 128, 192))  # width, features, hidden neurons
NOISES = (0.05, 0.15, 0.25)
SEEDS = (11, 12)  # fixed before any method was run
TOKENS = 3000
ACTIVE = 0.08  # share of tokens on which an input feature is active


@dataclass(frozen=True)
class Case:
    """A layer, its input features, the true pairs (first <= second), and activations on text."""

    name: dict
    layer: BilinearTensor
    directions: torch.Tensor
    truth: set
    z: torch.Tensor


@functools.cache
def trained_rows():
    return load_demo_saes(3)["mlp_in"].W_dec.detach().double()


def dictionary(kind, d, n, generator):
    """[n, d] unit rows: random, in clusters of four with cosines of .5, or trained SAE rows."""
    if kind == "trained":
        rows = trained_rows()
        rows = rows[torch.randperm(len(rows), generator=generator)[:n]]
        if d < rows.shape[1]:  # the d directions that hold most of these rows
            rows = rows @ torch.linalg.svd(rows, full_matrices=False).Vh[:d].T
    else:
        rows = torch.randn(n, d, generator=generator, dtype=torch.double)
        if kind == "correlated":
            shared = torch.randn(n // 4, d, generator=generator, dtype=torch.double)
            rows = rows + shared.repeat_interleave(4, 0)
    return rows / rows.norm(dim=-1, keepdim=True)


def circuit(kind, chosen):
    """[(first, second, weight)] of neurons, weight z_first z_second each."""
    a, b, c, d = chosen
    if kind == "and":
        return [(a, b, 1.0)]
    if kind == "negation":  # a, which b permits and c forbids
        return [(a, b, 1.0), (a, c, -1.0)]
    if kind == "xor":
        return [(a, a, 1.0), (b, b, 1.0), (a, b, -2.0)]
    return [(a, other, 1.0) for other in (b, c, d)]  # a is the gate


def activations(n, chosen, generator):
    """[tokens, n], sparse, positive; the features of the circuit meet more often than chance."""
    on = torch.rand(TOKENS, n, generator=generator) < ACTIVE
    together = torch.rand(TOKENS, generator=generator) < ACTIVE
    on[:, chosen] |= together[:, None] & (torch.rand(TOKENS, 4, generator=generator) < 0.5)
    size = -torch.rand(TOKENS, n, generator=generator, dtype=torch.double).clamp_min(1e-9).log()
    return on * size


def planted(kind, words, size, noise, seed):
    """One planted model."""
    d, n, hidden = size
    generator = torch.Generator().manual_seed(seed)
    rows = dictionary(words, d, n, generator)
    chosen = torch.randperm(n, generator=generator)[:4].tolist()
    neurons = circuit(kind, chosen)
    left = torch.stack([rows[b] for b, _, _ in neurons])
    right = torch.stack([rows[c] for _, c, _ in neurons])
    out = torch.tensor([w for _, _, w in neurons], dtype=torch.double)
    others = torch.randn(2, hidden, d, generator=generator, dtype=torch.double) / d**0.5
    written = torch.randn(hidden, generator=generator, dtype=torch.double)
    made = ((others[0] @ rows.T).T * written) @ (others[1] @ rows.T)
    written = written * noise / (made + made.T).square().mean().sqrt()
    layer = BilinearTensor(
        torch.cat([left, others[0]]), torch.cat([right, others[1]]), torch.cat([out, written])[None]
    )
    name = {"kind": kind, "dictionary": words, "size": list(size), "noise": noise, "seed": seed}
    truth = {(min(b, c), max(b, c)) for b, c, _ in neurons}
    return Case(name, layer, rows, truth, activations(n, chosen, generator))


def null(which, kind, words, size, noise, seed):
    """A model without a circuit: random weights, or a planted spectrum in random directions."""
    case = planted(kind, words, size, noise, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    d, _, hidden = size
    if which == "random weights":
        left, right = torch.randn(2, hidden, d, generator=generator, dtype=torch.double) / d**0.5
        out = torch.randn(1, hidden, generator=generator, dtype=torch.double)
        layer = BilinearTensor(left, right, out)
    else:  # the same eigenvalues
        values = torch.linalg.eigvalsh(case.layer.interaction()[0].dense())
        basis = random_rotation(d, generator)
        layer = BilinearTensor(basis, basis, values[None])
    return Case(case.name | {"null": which}, layer, case.directions, set(), case.z)


def all_planted(few=False):
    return [
        (kind, words, size, noise, seed + 100 * place)
        for place, (kind, words, size, noise) in enumerate(
            (k, w, s, x) for k in KINDS for w in DICTIONARIES for s in SIZES for x in NOISES
        )
        for seed in (SEEDS[:1] if few else SEEDS)
        if not few or (size == SIZES[0] and noise == NOISES[0])
    ]


def all_null(few=False):
    settings = [s for s in all_planted() if s[3] == NOISES[0]]
    made = [
        (which, *setting)
        for which in ("random weights", "same spectrum")
        for setting in (settings * 2)[:52]
    ]
    made = [(w, k, d, s, x, seed + 7 * place) for place, (w, k, d, s, x, seed) in enumerate(made)]
    return made[::9] if few else made
