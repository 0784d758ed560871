"""Checkpoints of the tensor transformers' format with random weights, and their forward pass.

Nothing here knows the loader: the layout is the documented one, the forward is the formulas, one head
and one position at a time.
"""

import json
import math

import torch

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 22], [2, 6, 5, 3, 5, 8, 0]])
VOCABULARY = 23


def config(**fields):
    return {
        "vocab_size": VOCABULARY,
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 16,
        "squared_mlp": False,
        "bilinear": True,
        "expansion_factor": 2,
        "gated": False,
        "squared_attn": True,
        "bilinear_attn": True,
        "step": 7,
        **fields,
    }


def weights(cfg, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if shape else 1)

    d = cfg["n_embd"]
    tensors = {
        "transformer.wte.weight": 3 * random(VOCABULARY, d),
        "lm_head.weight": 3 * random(VOCABULARY, d),
    }
    for layer in range(cfg["n_layer"]):
        block = f"transformer.h.{layer}"
        tensors[f"{block}.lambdas"] = torch.tensor([0.9, 0.3]) + 0.1 * random(2)
        tensors[f"{block}.attn.lamb"] = 0.5 + 0.1 * random()
        names = ["c_q", "c_k", "c_v", "c_proj"]
        if cfg["bilinear_attn"]:
            names += ["c_q2", "c_k2"]
            if not cfg["squared_attn"]:
                tensors[f"{block}.attn.bilinear_lamb"] = 0.8 + 0.1 * random()
        for name in names:
            tensors[f"{block}.attn.{name}.weight"] = random(d, d)
        if cfg["bilinear"]:
            h = cfg["expansion_factor"] * d
            tensors[f"{block}.mlp.Left.weight"] = random(h, d)
            tensors[f"{block}.mlp.Right.weight"] = random(h, d)
            tensors[f"{block}.mlp.Down.weight"] = random(d, h)
            tensors[f"{block}.mlp.Down_bias"] = 0.1 * random(d)
        else:
            tensors[f"{block}.mlp.c_fc.weight"] = random(4 * d, d)
            tensors[f"{block}.mlp.c_proj.weight"] = random(d, 4 * d)
            tensors[f"{block}.mlp.bias"] = 0.1 * random(d)
    return tensors


def write(folder, cfg, tensors):
    """As published: a pickled table of tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    torch.save(tensors, folder / "pytorch_model.bin")


def forward(cfg, tensors, tokens, eps=2.220446049250313e-16):
    """Logits [batch, pos, vocabulary] in float64."""
    return torch.stack([_sequence(cfg, tensors, row.tolist(), eps) for row in tokens])


def _sequence(cfg, tensors, tokens, eps):
    T = {name: tensor.double() for name, tensor in tensors.items()}
    d, n = cfg["n_embd"], cfg["n_head"]
    D = d // n
    normed = cfg.get("norm", True)

    def always(x):
        return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps)

    norm = always if normed else (lambda x: x)

    def turned(x, position):
        """By minus the position's angles, the tables rounded to bfloat16."""
        out = torch.empty_like(x)
        for i in range(D // 2):
            angle = torch.tensor(float(position)) * (1.0 / 10000 ** (torch.tensor(2.0 * i) / D))
            c, s = (float(f(angle).bfloat16()) for f in (torch.cos, torch.sin))
            a, b = x[i], x[i + D // 2]
            out[i], out[i + D // 2] = a * c + b * s, -a * s + b * c
        return out

    x0 = [always(T["transformer.wte.weight"][token]) for token in tokens]
    stream, first_values = list(x0), None
    for layer in range(cfg["n_layer"]):
        W = {
            k.removeprefix(f"transformer.h.{layer}."): v
            for k, v in T.items()
            if f".h.{layer}." in k
        }
        stream = [
            W["lambdas"][0] * x + W["lambdas"][1] * e for x, e in zip(stream, x0, strict=True)
        ]
        read = [norm(x) for x in stream]
        values = [W["attn.c_v.weight"] @ x for x in read]
        first_values = values if first_values is None else first_values
        lamb = W["attn.lamb"]
        mixed = [(1 - lamb) * v + lamb * f for v, f in zip(values, first_values, strict=True)]
        attended = []
        for i in range(len(tokens)):
            z = []
            for head in range(n):
                rows = slice(head * D, (head + 1) * D)

                def dots(q, k, W=W, read=read, rows=rows, i=i):
                    query = turned(norm((W[f"attn.{q}.weight"] @ read[i])[rows]), i)
                    key = W[f"attn.{k}.weight"]
                    keys = [turned(norm((key @ read[j])[rows]), j) for j in range(i + 1)]
                    return torch.stack([query @ key for key in keys])

                one = dots("c_q", "c_k")
                if cfg["bilinear_attn"]:
                    two = dots("c_q2", "c_k2")
                    if cfg["squared_attn"]:
                        pattern = one / D * two / D
                    else:
                        pattern = torch.softmax(one / D, 0)
                        pattern = pattern - W["attn.bilinear_lamb"] * torch.softmax(two / D, 0)
                elif cfg["squared_attn"]:
                    pattern = (one / D) ** 2
                    pattern = pattern / max(float(pattern.sum()), 1e-9)
                else:
                    pattern = torch.softmax(one / math.sqrt(D), 0)
                z.append(sum(pattern[j] * mixed[j][rows] for j in range(i + 1)))
            attended.append(W["attn.c_proj.weight"] @ torch.cat(z))
        stream = [x + a for x, a in zip(stream, attended, strict=True)]
        for i, x in enumerate(stream):
            r = norm(x)
            if cfg["bilinear"]:
                left, right = W["mlp.Left.weight"] @ r, W["mlp.Right.weight"] @ r
                left = left / (1 + torch.exp(-left)) if cfg["gated"] else left
                out = W["mlp.Down.weight"] @ (left * right) + W["mlp.Down_bias"]
            else:
                hidden = W["mlp.c_fc.weight"] @ r
                hidden = hidden if cfg["squared_mlp"] else hidden.clamp_min(0)
                out = W["mlp.c_proj.weight"] @ hidden**2 + W["mlp.bias"]
            stream[i] = x + out
    logits = torch.stack([T["lm_head.weight"] @ norm(x) for x in stream])
    return 30 * torch.tanh(logits / 30) if normed else logits
