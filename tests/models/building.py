"""Tiny models with every weight and bias random, and the layer written out from its formula."""

import torch

from tl_bilinear.models import HookedBilinearTransformer

SIZES = {"n_layers": 2, "d_model": 16, "d_head": 8, "n_ctx": 12, "d_vocab": 23, "d_mlp": 24}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def config(**fields):
    return {**SIZES, "device": "cpu", "seed": 0, "normalization_type": "RMS", **fields}


def randomise(model, seed=1):
    """Norm weights and all biases away from their initial ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            leaf = name.rpartition(".")[2]
            if leaf == "w":
                parameter.copy_(1 + 0.5 * noise)
            elif leaf == "b" or leaf.startswith("b_"):
                parameter.copy_(0.3 * noise)
    return model


def bilinear_model(**fields):
    return randomise(HookedBilinearTransformer(config(**fields)))


def reference_mlp(mlp, x):
    """The layer's formula, one number at a time in float64: out_a = sum_h W_out[h,a] g_h l_h + b_a."""
    weights = {
        name: getattr(mlp, name).detach().double()
        for name in ("W_gate", "W_in", "W_out", "b_gate", "b_in", "b_out")
    }
    rows = []
    for row in x.detach().double().reshape(-1, x.shape[-1]):
        total = weights["b_out"].clone()
        for h in range(weights["W_in"].shape[1]):
            gate = sum(row[i] * weights["W_gate"][i, h] for i in range(len(row)))
            linear = sum(row[i] * weights["W_in"][i, h] for i in range(len(row)))
            gate, linear = gate + weights["b_gate"][h], linear + weights["b_in"][h]
            total = total + gate * linear * weights["W_out"][h]
        rows.append(total)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def write_tokenizer(folder):
    """A tokenizer that knows no word, which a TransformerBridge asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "[BOS]": 1, "[EOS]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return folder
