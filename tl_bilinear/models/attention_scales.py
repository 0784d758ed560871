"""Which attention scale a published model was trained with, by its loss under each candidate.

`tl_bilinear.models.published_models` says what the scale is and why it is in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.io import read_json
from tl_bilinear.models.files import CONFIG
from tl_bilinear.models.pretrained import find_source, require_published
from tl_bilinear.models.published_models import attention_scale
from tl_bilinear.models.transformer import HookedBilinearTransformer
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class AttentionScales(Result):
    """The loss of one published model under several attention scales.

    Attributes
    ----------
    scales: [n], factors on attention's output
    losses: [n], nats a token: mean next-token cross-entropy of the sample
    n_tokens: predicted tokens of the sample
    default: the scale that ``from_pretrained(..., attn_scale=None)`` takes
    """

    scales: Float[Tensor, " n"]
    losses: Float[Tensor, " n"]
    n_tokens: int
    default: float

    @property
    def best(self) -> float:
        """The scale of the lowest loss, for ``from_pretrained(..., attn_scale=)``."""
        return float(self.scales[self.losses.argmin()])

    def top(self, k: int) -> AttentionScales:
        """The k scales of lowest loss, best first."""
        order = self.losses.argsort()[:k]
        return AttentionScales(self.scales[order], self.losses[order], self.n_tokens, self.default)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each scale: scale, loss, and whether it is the default."""
        import pandas

        scales = self.scales.tolist()
        is_default = [abs(scale - self.default) < 1e-12 for scale in scales]
        return pandas.DataFrame(
            {"scale": scales, "loss": self.losses.tolist(), "default": is_default}
        )


def compare_attention_scales(
    source: str | PathLike[str],
    sample: str | Sequence[str] | Int[Tensor, "batch pos"],
    *,
    device: str | torch.device | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> AttentionScales:
    """The loss of a published model under two scales of attention's output, 1 and 1 / sqrt(2 n_layer).

    Parameters
    ----------
    source: the model's name on the hub, or a folder of the published format
    sample: texts, each cut to the model's context, or tokens [batch, pos] without padding
    device: where to run; TransformerLens's choice by default
    batch_size: sequences a forward, for tokens; texts run one by one, so that nothing is padded

    Raises ValueError for a model of another format, for texts without a tokenizer, for a sample
    that holds nothing to predict or tokens that the model does not have.
    """
    path = find_source(HookedBilinearTransformer, source).require(CONFIG)
    stored = require_published(path, read_json(path))
    model = HookedBilinearTransformer.from_pretrained(source, device=device, attn_scale=1.0)
    batches = _batches(model, sample, batch_size)
    scales = torch.tensor([1.0, (2 * stored["n_layer"]) ** -0.5], dtype=torch.float64)
    unscaled = [block.attn.W_O.detach().clone() for block in model.blocks]
    totals, n_tokens = torch.zeros(len(scales), dtype=torch.float64), 0
    with torch.no_grad():
        for tokens in tqdm(batches, desc="loss under each scale", disable=not progress):
            n_tokens += tokens[:, 1:].numel()
            for i, scale in enumerate(scales.tolist()):
                for block, weight in zip(model.blocks, unscaled, strict=True):
                    block.attn.W_O.copy_(scale * weight)
                losses = model(tokens, return_type="loss", loss_per_token=True)
                totals[i] += losses.double().sum().cpu()
    default = attention_scale(stored, fspath(source))
    return AttentionScales(scales, totals / n_tokens, n_tokens, default)


def _batches(model: Any, sample: Any, batch_size: int) -> list[Tensor]:
    n_ctx, vocabulary = model.cfg.n_ctx, model.cfg.d_vocab
    if isinstance(sample, Tensor):
        if sample.ndim != 2 or sample.is_floating_point() or sample.shape[1] > n_ctx:
            raise ValueError(
                f"the sample has shape {list(sample.shape)} and dtype {sample.dtype}; expected token "
                f"numbers [batch, pos] with at most {n_ctx} positions"
            )
        if sample.numel() and not 0 <= int(sample.min()) <= int(sample.max()) < vocabulary:
            raise ValueError(
                f"the sample has tokens from {int(sample.min())} to {int(sample.max())}; the model's "
                f"are 0 to {vocabulary - 1}"
            )
        batches = list(sample.to(model.cfg.device).split(batch_size))
    else:
        if model.tokenizer is None:
            raise ValueError(
                "the sample is text, and the model has no tokenizer beside it: pass tokens [batch, pos]"
            )
        texts = [sample] if isinstance(sample, str) else sample
        batches = [model.to_tokens(text)[:, :n_ctx] for text in texts]
    batches = [tokens for tokens in batches if tokens[:, 1:].numel()]
    if not batches:
        raise ValueError(
            "the sample holds nothing to predict: give sequences of at least two tokens"
        )
    return batches
