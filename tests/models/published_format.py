"""Checkpoints of the authors' format with random weights, and their forward pass from the formulas.

Nothing here knows the loader: the layout is the documented one, the forward takes one head, one
position and one neuron at a time, in float64.
"""

import json
import math

import torch
from safetensors.torch import save_file

SIZES = {"n_layer": 3, "n_head": 2, "n_ctx": 12, "d_model": 16, "d_hidden": 20}
VOCABULARY = 23
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 22], [2, 6, 5, 3, 5, 8, 0]])


def config(**fields):
    return {
        **SIZES,
        "bilinear": True,
        "gate": None,
        "bias": False,
        "normalization": True,
        "tokenizer": "ts-4096",
        "repo": None,
        "model_type": "",
        "torch_dtype": "float32",
        **fields,
    }


def weights(cfg, qkv_bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    d, h = cfg["d_model"], cfg["d_hidden"]
    size = 4 if cfg["normalization"] else 0.5  # without a norm, logits grow with its 8th power
    d_head = d // cfg["n_head"]
    tensors = {
        "transformer.wte.weight": size * random(VOCABULARY, d),
        "lm_head.weight": random(VOCABULARY, d),
    }
    for layer in range(cfg["n_layer"]):
        block = f"transformer.h.{layer}"
        tensors |= {
            f"{block}.attn.qkv.weight": 2 * random(3 * d, d),
            f"{block}.attn.o.weight": random(d, d),
            f"{block}.attn.rotary.inv_freq": 1
            / 10000 ** (torch.arange(0, d_head, 2).float() / d_head),
            f"{block}.mlp.w.weight": random(2 * h, d),
            f"{block}.mlp.p.weight": random(d, h),
        }
        if cfg["bias"]:
            tensors |= {f"{block}.mlp.w.bias": random(2 * h), f"{block}.mlp.p.bias": random(d)}
        if qkv_bias:
            tensors[f"{block}.attn.qkv.bias"] = random(3 * d)
    return tensors


def write(folder, cfg=None, tensors=None):
    cfg = config() if cfg is None else cfg
    tensors = weights(cfg) if tensors is None else tensors
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def forward(cfg, tensors, tokens, scale):
    """Logits [batch, pos, vocabulary] in float64."""
    return torch.stack([_sequence(cfg, tensors, row, scale) for row in tokens])


def _sequence(cfg, tensors, tokens, scale):
    def weight(name):
        return tensors[name].double()

    def biased(name):
        return tensors[name].double() if name in tensors else 0.0

    x = [weight("transformer.wte.weight")[token] for token in tokens]
    for layer in range(cfg["n_layer"]):
        block = f"transformer.h.{layer}"
        normed = [_norm(cfg, v) for v in x]
        qkv = [
            weight(f"{block}.attn.qkv.weight") @ v + biased(f"{block}.attn.qkv.bias")
            for v in normed
        ]
        heads = _attention(cfg, qkv)
        x = [
            v + scale * weight(f"{block}.attn.o.weight") @ z for v, z in zip(x, heads, strict=True)
        ]
        x = [
            v
            + _mlp(
                weight(f"{block}.mlp.w.weight"),
                biased(f"{block}.mlp.w.bias"),
                weight(f"{block}.mlp.p.weight"),
                _norm(cfg, v),
            )
            + biased(f"{block}.mlp.p.bias")
            for v in x
        ]
    return torch.stack([weight("lm_head.weight") @ _norm(cfg, v) for v in x])


def _norm(cfg, v):
    return v / math.sqrt(float((v * v).mean()) + 1e-8) if cfg["normalization"] else v


def _mlp(w, w_bias, p, v):
    both = w @ v + w_bias
    h = len(both) // 2
    return sum(both[i] * both[h + i] * p[:, i] for i in range(h))


def _attention(cfg, qkv):
    d, n_head = cfg["d_model"], cfg["n_head"]
    size = d // n_head
    out = []
    for here in range(len(qkv)):
        parts = []
        for head in range(n_head):
            at = slice(head * size, (head + 1) * size)
            query = _rotate(qkv[here][:d][at], here)
            scores = [
                float(query @ _rotate(qkv[there][d : 2 * d][at], there)) / math.sqrt(size)
                for there in range(here + 1)
            ]
            weights = [math.exp(s - max(scores)) for s in scores]
            values = [qkv[there][2 * d :][at] for there in range(here + 1)]
            parts.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        out.append(torch.cat(parts))
    return out


def _rotate(v, position):
    """Coordinate i turns with coordinate i + n/2, by position / 10000^(2i/n)."""
    half = len(v) // 2
    turned = v.clone()
    for i in range(half):
        angle = position / 10000 ** (2 * i / len(v))
        a, b = v[i], v[half + i]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[half + i] = b * math.cos(angle) + a * math.sin(angle)
    return turned
