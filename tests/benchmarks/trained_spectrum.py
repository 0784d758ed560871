"""Measure the spectrum that the benchmarks imitate, on a trained bilinear language model.

    python -m tests.benchmarks.trained_spectrum CHECKPOINT [CHECKPOINT ...]

Each CHECKPOINT is a Hugging Face Llama with hidden_act="linear". For every layer but the first it takes
the interaction matrices of 256 unembedding directions and the median of ``|lambda_i| / |lambda_1|``,
fits the scale ``(i + offset)^-power`` of random factors to it, and writes trained_spectrum.json.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import LlamaForCausalLM

from tests.benchmarks.layers import MEASURED
from tl_bilinear import BilinearTensor

INDICES = (1, 2, 4, 9, 19, 39)  # of the eigenvalues compared, from 0


def measured(checkpoint: str) -> tuple[list[float], dict[str, object]]:
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    unembed = model.lm_head.weight.detach()
    generator = torch.Generator().manual_seed(0)
    profiles = []
    for block in model.model.layers[1:]:
        norm = block.post_attention_layernorm.weight.detach()
        mlp = block.mlp
        tensor = BilinearTensor(
            mlp.gate_proj.weight.detach() * norm,
            mlp.up_proj.weight.detach() * norm,
            mlp.down_proj.weight.detach(),
        )
        chosen = unembed[torch.randperm(len(unembed), generator=generator)[:256]]
        values = tensor.interaction(chosen).eigh().values.abs()
        profiles.append((values / values[:, :1]).median(0).values)
    config = model.config
    shape = {
        "d_model": config.hidden_size,
        "d_mlp": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
    }
    return [round(float(v), 4) for v in torch.stack(profiles).mean(0)], shape


def profile_of(offset: float, power: float, d: int, hidden: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = (torch.arange(d) + offset) ** -power
    left, right = (torch.randn(hidden, d, generator=generator) * scale for _ in range(2))
    weights = torch.randn(32, hidden, generator=generator)
    values = BilinearTensor(left, right, weights).interaction().eigh().values.abs()
    return (values / values[:, :1]).median(0).values


def fit(target: list[float], d: int, hidden: int) -> dict[str, object]:
    index = torch.tensor(INDICES)
    wanted = torch.tensor(target)[index]
    candidates = [
        (offset, power)
        for offset in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
        for power in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5)
    ]

    def distance(candidate: tuple[float, float]) -> float:
        found = profile_of(*candidate, d, hidden)[index]
        return float((found.log() - wanted.log()).square().mean())

    offset, power = min(candidates, key=distance)
    found = profile_of(offset, power, d, hidden)[index]
    return {
        "offset": offset,
        "power": power,
        "rank": [i + 1 for i in INDICES],
        "trained": [round(float(v), 3) for v in wanted],
        "imitated": [round(float(v), 3) for v in found],
    }


def main() -> None:
    models = []
    for checkpoint in sys.argv[1:]:
        profile, shape = measured(checkpoint)
        models.append(
            {**shape, "profile": profile, "fit": fit(profile, shape["d_model"], shape["d_mlp"])}
        )
    widest = max(models, key=lambda model: model["d_model"])
    MEASURED.write_text(json.dumps({"fit": widest["fit"], "models": models}, indent=1) + "\n")
    for model in models:
        print(model["d_model"], model["fit"])


if __name__ == "__main__":
    main()
