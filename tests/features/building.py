"""Models and SAEs with every weight random, for tests of the layer between dictionaries."""

import functools

import torch
from sae_lens import HookedSAETransformer
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

import tl_bilinear  # noqa: F401  gives from_config
from tests.models.building import config, randomise

D, N_IN, N_OUT = 16, 40, 30
ARCHITECTURES = ["standard", "gated", "topk", "abstopk", "jumprelu"]
TRANSCODERS = [
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@functools.cache
def model(dtype=torch.float64, **fields):
    """A two-layer bilinear model with biases and norm weights; not to be changed."""
    fields = {"normalization_type": "RMS", "bilinear_bias": True, **fields}
    built = HookedSAETransformer.from_config(config(dtype=dtype, **fields), bilinear=True)
    return randomise(built)


def sae(hook, architecture="topk", n=N_IN, seed=0, dtype="float32", hook_out=None, d=D, **fields):
    """An SAE of any SAELens architecture with random weights."""
    cls, config_class = get_sae_class(architecture)
    if "topk" in architecture:
        fields = {"k": 6, **fields}
    if "transcoder" in architecture:
        fields = {"d_out": d, "apply_b_dec_to_input": False, **fields}
    metadata = SAEMetadata(hook_name=hook, hook_name_out=hook_out, prepend_bos=True)
    made = cls(config_class(d_in=d, d_sae=n, dtype=dtype, metadata=metadata, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise.abs() * 0.1 if name == "threshold" else 0.5 * noise)
    return made
