"""A text of any length, run one batch at a time: nothing is held but the batch and the sums over it.

With a checkpoint, moments go on where they were stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.passage import refuse_attached
from tl_bilinear.features.populations import MomentSums, population_names
from tl_bilinear.features.run import FeatureRun, run_of
from tl_bilinear.io import digest_of, load_tensors, save_tensors
from tl_bilinear.tensor import InputMoments

if TYPE_CHECKING:
    from tl_bilinear.features.interactions import FeatureInteractions

_SAVE_EVERY = 60.0  # seconds


def stream(
    features: FeatureInteractions,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
    *,
    batch_size: int,
    progress: bool,
    start: int = 0,
) -> Iterator[tuple[int, FeatureRun]]:
    """The run of `batch_size` sequences at a time, and how many sequences are then done."""
    checks.require_positive("batch_size", batch_size)
    refuse_attached(features.model)
    with tqdm(
        total=len(tokens), initial=start, unit="sequence", desc="text", disable=not progress
    ) as bar:
        for place in range(start, len(tokens), batch_size):
            rows = slice(place, place + batch_size)
            part = run_of(features, tokens[rows], mask[rows], lengths[rows], batch_size)
            yield place + len(part), part
            bar.update(len(part))


def stream_moments(
    features: FeatureInteractions,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
    index: Int[Tensor, " m"] | None,
    *,
    batch_size: int,
    checkpoint: str | Path | None,
    max_bytes: int,
    progress: bool,
) -> list[InputMoments]:
    """See `FeatureInteractions.moments`."""
    names = population_names(features, index)
    d = features.layer_tensor.d_in
    checks.require_affordable(
        "these moments", len(names) * d * d, torch.double, max_bytes, "ask for fewer features"
    )
    sums, start, digest = MomentSums(len(names), d, features.directions.device), 0, ""
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        weights = features.layer_tensor
        tensors: dict[str, Tensor | None] = {
            "tokens": tokens,
            "mask": mask,
            "left": weights.left,
            "right": weights.right,
            "out": weights.out,
            "directions": None if index is None else features.directions[index],
        }
        digest = digest_of(tensors, {"layer": features.layer, "hook": features.passage.layer_hook})
        if path.exists():
            start = _resume(path, digest, sums)
    saved = time.monotonic()
    done = start
    for done, part in stream(
        features, tokens, mask, lengths, batch_size=batch_size, progress=progress, start=start
    ):
        for number, x in enumerate(part.inputs_of(index)):
            sums.add(number, x)
        if path is not None and time.monotonic() - saved > _SAVE_EVERY:
            _keep(path, digest, sums, done)
            saved = time.monotonic()
    if path is not None:
        _keep(path, digest, sums, done)
    return sums.moments(names, features.layer_tensor.input_space)


def _keep(path: Path, digest: str, sums: MomentSums, done: int) -> None:
    held = {"count": sums.count, "sum": sums.sum, "squares": sums.squares}
    save_tensors(path, held, {"digest": digest, "done": str(done)})


def _resume(path: Path, digest: str, sums: MomentSums) -> int:
    held, about = load_tensors(path)
    if about.get("digest") != digest:
        raise ValueError(
            f"{path} belongs to other text, weights or features: give another checkpoint, or delete it"
        )
    for name, value in held.items():
        setattr(sums, name, value.to(sums.sum.device))
    return int(about["done"])
