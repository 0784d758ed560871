"""A language model trained by a plain loop over a HookedTransformer, and text for it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch

from tl_bilinear.recipes.language import (
    CleaningReport,
    LanguageConfig,
    LanguageData,
    train_tokenizer,
)


def random_data(rows: int, vocabulary: int, n_ctx: int = 256) -> LanguageData:
    """Rows of random tokens under a tokenizer of so many entries, made of words that do not exist."""
    from datasets import Dataset

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(vocabulary)]
    tokenizer = train_tokenizer([" ".join(words)], vocabulary)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(tokenizer), (rows, n_ctx), generator=generator)
    ids[:, 0] = tokenizer.bos_token_id
    part = Dataset.from_dict({"input_ids": ids.tolist()})
    return LanguageData(
        folder=Path(),
        train=part,
        validation=part,
        tokenizer=tokenizer,
        n_ctx=n_ctx,
        stories={},
        rows={},
        cleaning=CleaningReport(0, 0, 0, 0, {}, {}),
        fingerprint="random",
    )


def plain_loop(data: LanguageData, config: LanguageConfig) -> dict[str, Any]:
    """The same model, rows, optimiser and schedule, as one writes it in a notebook."""
    from tl_bilinear import HookedBilinearTransformer
    from tl_bilinear.recipes.language.llama import build_llama

    llama = build_llama(config, data.tokenizer, data.n_ctx)
    model = HookedBilinearTransformer.from_hf(llama, fold_ln=False, device="cpu")
    for name, parameter in model.named_parameters():  # Llama has no others
        parameter.requires_grad_(name.rpartition(".")[2].startswith("W_"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    tokens = torch.tensor(data.train["input_ids"][:])
    start = time.perf_counter()
    for _ in range(config.steps):
        loss = model(tokens, return_type="loss")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return {"loss": loss.item(), "tokens a second": config.steps * tokens.numel() / seconds}
