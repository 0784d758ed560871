"""Layers to measure on: random factors whose interaction matrices decay as a trained layer's do."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tl_bilinear import BilinearTensor
from tl_bilinear.io import load_tensors
from tl_bilinear.tensor import TwoInputForm

MEASURED = Path(__file__).with_name("trained_spectrum.json")
DICTIONARY = Path(__file__).parent / ".trained" / "dictionary-512.safetensors"


def decay() -> dict[str, float]:
    """The scale of input directions, ``(i + offset)^-power``, fitted to a trained layer."""
    fit = json.loads(MEASURED.read_text())["fit"]
    return {"offset": fit["offset"], "power": fit["power"]}


def layer_like_trained(
    d: int, hidden: int, d_out: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> BilinearTensor:
    """Random neurons with that scale in a random basis of the input, and the same on the output side."""
    generator = torch.Generator().manual_seed(seed)
    fit = decay()

    def scaled(rows: int, columns: int) -> torch.Tensor:
        scale = (torch.arange(columns) + fit["offset"]) ** -fit["power"]
        scale = scale / scale[0]
        return torch.randn(rows, columns, generator=generator) * scale

    def rotation(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q

    basis = rotation(d)
    left, right = scaled(hidden, d) @ basis, scaled(hidden, d) @ basis
    out = (scaled(hidden, d_out) @ rotation(d_out)).T / hidden**0.5
    return BilinearTensor(left.to(dtype), right.to(dtype), out.to(dtype))


def directions(count: int, d_out: int, seed: int = 1) -> torch.Tensor:
    """Unit directions, one a row."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, d_out, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def attention_head(
    d: int, d_head: int, n: int, *, alike: bool, seed: int = 0
) -> tuple[TwoInputForm, torch.Tensor, torch.Tensor]:
    """A head's scores as a form of two inputs, and two dictionaries of unit directions [n, d].

    Like trained ones, head and dictionaries read and write the same directions of the residual stream
    most, with the scale of `decay`; or all are random.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, d_head, d, generator=generator)
    rows = torch.randn(2, n, d, generator=generator)
    if alike:
        fit = decay()
        scale = (torch.arange(d) + fit["offset"]) ** -fit["power"]
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        weights, rows = (weights * scale) @ basis, (rows * scale) @ basis
    rows = torch.nn.functional.normalize(rows, dim=2)
    out = torch.full((1, d_head), d_head**-0.5)
    return TwoInputForm(weights[0], weights[1], out), rows[0], rows[1]


def trained_dictionary() -> tuple[BilinearTensor, torch.Tensor]:
    """A layer and an SAE's decoder [32768, 512] before it, trained by `trained_dictionary`."""
    if not DICTIONARY.is_file():
        raise FileNotFoundError(
            f"{DICTIONARY} does not exist: train it with "
            f"`python -m tests.benchmarks.trained_dictionary stories.txt`"
        )
    tensors, _ = load_tensors(DICTIONARY)
    return BilinearTensor(*(tensors[name] for name in ("left", "right", "out"))), tensors["decoder"]
