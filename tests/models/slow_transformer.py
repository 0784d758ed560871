"""A transformer with bilinear MLPs written out from its formulas: the oracle of bridges.

Weights are under HookedTransformer's names. No framework but torch.
"""

import math

import torch

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
SIZES = {"n_layers": 2, "d_model": 16, "d_head": 8, "n_heads": 2, "n_ctx": 12, "d_vocab": 23}


def config(**fields):
    """Fields of HookedTransformerConfig, as `save_pretrained` writes them."""
    return {
        **SIZES,
        "d_mlp": 24,
        "d_vocab_out": 23,
        "n_key_value_heads": None,
        "normalization_type": "RMS",
        "final_rms": False,
        "eps": 1e-5,
        "positional_embedding_type": "rotary",
        "rotary_dim": fields.get("d_head", 8),
        "rotary_base": 10000,
        "rotary_adjacent_pairs": False,
        "use_attn_scale": True,
        "attn_scale": math.sqrt(fields.get("d_head", 8)),
        "attn_scores_soft_cap": -1.0,
        "output_logits_soft_cap": -1.0,
        "attn_only": False,
        "attention_dir": "causal",
        "default_prepend_bos": True,
        "model_name": "slow",
        "bilinear_bias": True,
        "dtype": "float32",
        **fields,
    }


def random_state(cfg, seed=0):
    """A state dict for such a config: every weight and bias random."""
    generator = torch.Generator().manual_seed(seed)
    d, h, m, n = (cfg[name] for name in ("d_model", "d_head", "d_mlp", "n_heads"))
    kv, grouped = cfg["n_key_value_heads"] or n, cfg["n_key_value_heads"] is not None
    norms = {"RMS": ("w",), "LN": ("w", "b")}.get(cfg["normalization_type"], ())
    shapes = {"embed.W_E": (cfg["d_vocab"], d), "unembed.W_U": (d, cfg["d_vocab_out"])}
    shapes |= {"unembed.b_U": (cfg["d_vocab_out"],)}
    shapes |= {f"ln_final.{leaf}": (d,) for leaf in (norms[:1] if cfg["final_rms"] else norms)}
    if cfg["positional_embedding_type"] == "standard":
        shapes["pos_embed.W_pos"] = (cfg["n_ctx"], d)
    for layer in range(cfg["n_layers"]):
        block, under = f"blocks.{layer}.", "_" if grouped else ""
        shapes |= {f"{block}ln{i}.{leaf}": (d,) for i in (1, 2) for leaf in norms}
        shapes |= {f"{block}attn.W_Q": (n, d, h), f"{block}attn.b_Q": (n, h)}
        for name in "KV":
            shapes[f"{block}attn.{under}W_{name}"] = (kv, d, h)
            shapes[f"{block}attn.{under}b_{name}"] = (kv, h)
        shapes |= {f"{block}attn.W_O": (n, h, d), f"{block}attn.b_O": (d,)}
        shapes |= {f"{block}mlp.W_gate": (d, m), f"{block}mlp.W_in": (d, m)}
        shapes |= {f"{block}mlp.W_out": (m, d), f"{block}mlp.b_out": (d,)}
        shapes |= {f"{block}mlp.b_gate": (m,), f"{block}mlp.b_in": (m,)}
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        leaf = name.rpartition(".")[2].lstrip("_")
        if leaf == "w":
            state[name] = 1 + 0.4 * noise
        elif leaf == "b" or leaf.startswith("b_"):
            state[name] = 0.3 * noise
        else:
            state[name] = noise / shape[-2] ** 0.5
    if not cfg["bilinear_bias"]:
        for name in state:
            if name.endswith(("mlp.b_gate", "mlp.b_in", "mlp.b_out")):
                state[name].zero_()
    return state


def log_probs(state, cfg, tokens=TOKENS):
    """Log-probabilities [batch, pos, d_vocab_out] in float64."""
    state = {name: t.double() for name, t in state.items()}
    x = state["embed.W_E"][tokens]
    if cfg["positional_embedding_type"] == "standard":
        x = x + state["pos_embed.W_pos"][: tokens.shape[1]]
    for layer in range(cfg["n_layers"]):
        block = {
            name.removeprefix(f"blocks.{layer}."): t
            for name, t in state.items()
            if name.startswith(f"blocks.{layer}.")
        }
        x = x + attention(block, cfg, norm(block, "ln1", cfg, x))
        x = x + mlp(block, norm(block, "ln2", cfg, x))
    x = norm(state, "ln_final", cfg, x)
    return (x @ state["unembed.W_U"] + state["unembed.b_U"]).log_softmax(-1)


def mlp(block, x):
    gate = x @ block["mlp.W_gate"] + block["mlp.b_gate"]
    linear = x @ block["mlp.W_in"] + block["mlp.b_in"]
    return (gate * linear) @ block["mlp.W_out"] + block["mlp.b_out"]


def norm(state, name, cfg, x):
    kind = cfg["normalization_type"]
    if kind is None:
        return x
    if kind.startswith("LN") and not (cfg["final_rms"] and name == "ln_final"):
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + cfg["eps"]).sqrt()
    return x * state.get(f"{name}.w", 1.0) + state.get(f"{name}.b", 0.0)


def attention(block, cfg, x):
    heads, out = cfg["n_heads"], block["attn.b_O"]
    group = heads // (cfg["n_key_value_heads"] or heads)
    under = "_" if cfg["n_key_value_heads"] is not None else ""
    for head in range(heads):
        q = x @ block["attn.W_Q"][head] + block["attn.b_Q"][head]
        k, v = (
            x @ block[f"attn.{under}W_{n}"][head // group]
            + block[f"attn.{under}b_{n}"][head // group]
            for n in "KV"
        )
        if cfg["positional_embedding_type"] == "rotary":
            q, k = rotate(q, cfg), rotate(k, cfg)
        scores = q @ k.mT / (cfg["attn_scale"] if cfg["use_attn_scale"] else 1.0)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = out + pattern @ v @ block["attn.W_O"][head]
    return out


def rotate(x, cfg):
    """Each pair of coordinates turned by position * base^(-2 i / r), one pair at a time."""
    r, x = cfg["rotary_dim"], x.clone()
    old = x.clone()
    for i in range(r // 2):
        a, b = (2 * i, 2 * i + 1) if cfg["rotary_adjacent_pairs"] else (i, i + r // 2)
        for position in range(x.shape[1]):
            angle = position * cfg["rotary_base"] ** (-2 * i / r)
            cos, sin = math.cos(angle), math.sin(angle)
            x[:, position, a] = old[:, position, a] * cos - old[:, position, b] * sin
            x[:, position, b] = old[:, position, b] * cos + old[:, position, a] * sin
    return x
