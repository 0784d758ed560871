import pytest
import torch
from sae_lens import HookedSAETransformer

from tests.models.building import config, randomise


@pytest.fixture(scope="module")
def sae_model():
    return randomise(HookedSAETransformer.from_config(config(dtype=torch.float64), bilinear=True))
