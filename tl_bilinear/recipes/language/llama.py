"""The untrained model, its batches, and its loss on text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_bilinear.hooks.effects import next_token_loss
from tl_bilinear.io import read_table
from tl_bilinear.models.files import CONFIG
from tl_bilinear.models.huggingface import load_llama
from tl_bilinear.models.tensor_format import is_tensor_format
from tl_bilinear.recipes.language.config import ACTIVATIONS, LanguageConfig

_EPS = 1e-8  # of the norms, in the published models
_STD = 0.02  # of initial weights (GPT-2)


def build_llama(config: LanguageConfig, tokenizer: Any, n_ctx: int) -> Any:
    """The untrained model: GPT-2's initialisation, norms without weights, rotary positions.

    A norm's weight is fixed at one. The maps that write to the residual stream start smaller by
    sqrt(2 n_layers). The caller's random numbers are left as they are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    llama_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        max_position_embeddings=n_ctx,
        hidden_act=ACTIVATIONS[config.activation],
        mlp_bias=config.bias,
        initializer_range=_STD,
        rms_norm_eps=_EPS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # No pad_token_id: it is [EOS], whose embedding Llama would then not train.
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        llama = LlamaForCausalLM(llama_config)
    with torch.no_grad():
        for layer in llama.model.layers:
            for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writes.weight.div_(math.sqrt(2 * config.n_layers))
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)
    return llama


def build_language_model(config: LanguageConfig, tokenizer: Any, n_ctx: int) -> Any:
    """The untrained Llama or, for another attention than softmax, tensor transformer."""
    if config.attention == "softmax":
        return build_llama(config, tokenizer, n_ctx)
    from tl_bilinear.models.tensor_language_model import (
        TensorLanguageConfig,
        TensorLanguageModel,
    )

    described = TensorLanguageConfig(
        vocab_size=len(tokenizer),
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_embd=config.d_model,
        bilinear=True,
        expansion_factor=config.d_mlp // config.d_model,
        gated=config.activation == "swiglu",
        squared_attn=True,
        bilinear_attn=config.attention == "product",
        norm=config.norm,
        n_ctx=n_ctx,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TensorLanguageModel(described)
    model.zero_writers()
    return model


def load_language_model(folder: Path) -> Any:
    """A trained model from its folder: a Llama or a tensor transformer, in its own dtype."""
    if not is_tensor_format(read_table(folder / CONFIG)):
        return load_llama(folder)
    from tl_bilinear.models.tensor_language_model import TensorLanguageModel

    return TensorLanguageModel.from_pretrained(folder, dtype="auto")


class Collate:
    """Turns rows of a data set into inputs of a Llama. [BOS] is an input and never a label."""

    def __init__(self, bos: int) -> None:
        self.bos = bos

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
        return {"input_ids": ids, "labels": ids.masked_fill(ids == self.bos, -100)}


@torch.no_grad()
def language_loss(llama: Any, rows: Any, bos: int, batch_size: int = 32) -> float:
    """Mean cross-entropy over the tokens of a data set of rows, in nats; [BOS] is not counted."""
    rows = rows.with_format("torch")
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size]["input_ids"].long().to(llama.device)
        predicted = ids != bos
        losses = next_token_loss(llama(input_ids=ids).logits, ids, predicted)  # a mean for each row
        numbers = predicted[:, 1:].sum(1)
        total += float((losses.double() * numbers).sum())
        count += int(numbers.sum())
    return total / count
