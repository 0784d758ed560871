"""Text that a trained model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_PROMPT, _SAMPLE_TOKENS = "once upon a time", 80


def sample_text(llama: Any, tokenizer: Any, prompt: str = _PROMPT, seed: int = 0) -> str:
    """A continuation of a prompt, the same for the same seed. The caller's random numbers are kept."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(llama.device)
    room = llama.config.max_position_embeddings - ids.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(_SAMPLE_TOKENS, room)),
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


@torch.no_grad()
def sample_stories(
    llama: Any,
    tokenizer: Any,
    k: int,
    *,
    prompts: Sequence[str] = ("",),
    temperature: float = 0.8,
    batch_size: int = 64,
    seed: int = 0,
) -> list[str]:
    """k whole stories, up to [EOS], from each prompt in turn. A story that does not end is left out.

    Raises ValueError where too few end, as with a model that has not learned to.
    """
    eos = tokenizer.eos_token_id
    stories: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(4 * -(-k // batch_size)):
            prompt = prompts[start % len(prompts)]
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(llama.device)
            written = llama.generate(
                ids.expand(batch_size, -1),
                attention_mask=ids.new_ones(batch_size, ids.shape[1]),
                max_length=llama.config.max_position_embeddings,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                pad_token_id=eos,
            )
            ended = [row for row in written.tolist() if eos in row]
            stories += [tokenizer.decode(row, skip_special_tokens=True) for row in ended]
            if len(stories) >= k:
                return stories[:k]
    raise ValueError(f"only {len(stories)} of {k} stories came to an end: train the model longer")
