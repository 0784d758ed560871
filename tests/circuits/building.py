"""Random models of every kind whose residual stream is a plain sum."""

import functools

import torch

from tests.models.building import config, randomise
from tl_bilinear.models import HookedBilinearTransformer

D, VOCABULARY = 16, 23
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9])
DIRECTION = torch.linspace(-1, 1, D, dtype=torch.float64)


@functools.cache
def model(folded=False, dtype=torch.float64, **fields):
    """Three layers, every weight and bias random; not to be changed."""
    fields = {"n_layers": 3, "normalization_type": "RMS", "bilinear_bias": True, **fields}
    built = randomise(HookedBilinearTransformer(config(dtype=dtype, **fields)))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("._b_V"):  # grouped queries keep their biases under another name
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape_as(parameter))
    if folded:
        built.process_weights_()
        built.to(dtype)
    return built.eval()
