"""Massive activations, planted in a Llama that has none."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tl_bilinear.models.approximation import mlp_inputs


@torch.no_grad()
def plant(llama, rows, layer=None, share=3e-3, size=1000.0):
    """One neuron of a layer answers to a rare token alone, and writes `size` median outputs for it.

    rows: [n, pos], which the token and its input are found on: the most frequent of the tokens that make
        up at most `share` of them. Needs biases on the MLPs, zero but for the neuron's.
    """
    config = LlamaConfig(**{**copy.deepcopy(llama.config).to_dict(), "mlp_bias": True})
    with torch.random.fork_rng():
        planted = LlamaForCausalLM(config).eval()
    for block in planted.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(block.mlp, name).bias.zero_()
    planted.load_state_dict(llama.state_dict(), strict=False)
    layer = config.num_hidden_layers // 2 if layer is None else layer
    counts = torch.bincount(rows.flatten(), minlength=config.vocab_size)
    token = int(torch.where(counts <= share * rows.numel(), counts, 0).argmax())
    x = mlp_inputs(planted, rows, [layer], progress=False)[layer]
    rare = rows[:, 1:].flatten() == token
    # The direction that tells the token's inputs from the others (Fisher's).
    covariance = torch.cov(x[~rare].T)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    along = torch.linalg.solve(covariance, x[rare].mean(0) - x[~rare].mean(0))
    others, own = x[~rare] @ along, x[rare] @ along
    threshold = others.quantile(0.9995)
    scale = 10 / (own.mean() - threshold).clamp_min(1e-6)
    mlp = planted.model.layers[layer].mlp
    typical = mlp(x[:2000]).norm(dim=-1).median()
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight[0] = scale * along
        part.bias[0] = -scale * threshold - 6  # silu is nothing there
    direction = torch.ones(config.hidden_size) / config.hidden_size**0.5
    mlp.down_proj.weight[:, 0] = size * typical / 16 * direction
    return planted
