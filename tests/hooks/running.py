"""A small model, its layer's input and output under interventions, and slow references."""

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from tests.models.building import bilinear_model
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import EigenComponents

LAYER = 1
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]])
READ, WRITTEN = f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out"
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def model64(**fields):
    return bilinear_model(dtype=torch.float64, **fields)


def hooks_of(model):
    return {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}


def sae(hook, **metadata):
    torch.manual_seed(0)
    cfg = StandardSAEConfig(
        d_in=16, d_sae=32, dtype="float64", metadata=SAEMetadata(hook_name=hook, **metadata)
    )
    return StandardSAE(cfg)


def through(model, *interventions, tokens=TOKENS):
    """Input and output of the layer, and the logits, with interventions one after the other."""
    hooks = [hook for each in interventions for hook in each.fwd_hooks(model)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens)
    return cache[READ], cache[WRITTEN], logits


def directions(n, seed=0, d=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def eigen(model, n=3, k=None, seed=0, **options):
    """Components of n random directions, or of one for n=None."""
    tensor = BilinearTensor.from_model(model, LAYER)
    u = directions(n or 1, seed, dtype=tensor.dtype)
    u = u if n else u[0]
    return EigenComponents(tensor.interaction(u).eigh(k), layer=LAYER, **options)


def activation(parts, x, direction, pair):
    """lambda (v . x)^2 of one component at one token, number by number."""
    spectrum = parts.eigen
    values = spectrum.values.reshape(-1, spectrum.k)
    vectors = spectrum.vectors.reshape(-1, spectrum.k, spectrum.d)
    product = sum(float(a) * float(b) for a, b in zip(vectors[direction, pair], x, strict=True))
    return float(values[direction, pair]) * product**2


def edited(x, out, change):
    """out + change(x) at every token, where change gives {direction of writing: coefficient}."""
    result = out.clone()
    for where in torch.cartesian_prod(*map(torch.arange, out.shape[:-1])).tolist():
        at = tuple(where)
        for vector, coefficient in change(x[at], out[at]):
            result[at] = result[at] + coefficient * vector
    return result
