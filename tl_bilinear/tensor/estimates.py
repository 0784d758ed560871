"""How long work will take on this machine, said before it starts: flops over a measured speed.

Good to a factor of two or so where large matrix products are most of the work and nothing else runs.
"""

from __future__ import annotations

import time
from functools import cache

import torch

WORTH_SAYING = 60.0
"""Seconds from which a call says how long it will take."""

_ROWS, _WIDTH = 256, 2048  # of the product that is timed: a step of a solver has as many rows


@cache
def flops_per_second(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Speed of matrix products; measured once in a process, in a few hundredths of a second."""
    rows = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
    square = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):  # the first sets things up
        begin = time.perf_counter()
        float((rows @ square)[0, 0])  # waits for a device that computes in the background
        best = min(best, time.perf_counter() - begin)
    return 2 * _ROWS * _WIDTH**2 / best


def expected_seconds(
    flops: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> float:
    """Seconds that so many flops of matrix products take on a device."""
    return flops / flops_per_second(device, dtype)


def worth_saying(flops: float, device: torch.device, dtype: torch.dtype) -> str:
    """How long so many flops take, in words, from `WORTH_SAYING` on; less is not worth a word."""
    seconds = expected_seconds(flops, device, dtype)
    return human_seconds(seconds) if seconds > WORTH_SAYING else ""


def human_seconds(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 10 else f"{minutes} min"
