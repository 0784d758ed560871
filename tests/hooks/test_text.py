"""A layer that was trained, on text: predictions in float32, and what its components are worth."""

import pytest
import torch
from torch.testing import assert_close

from tl_bilinear import BilinearTensor, HookedBilinearTransformer
from tl_bilinear.hooks import EigenComponents, HOSVDComponents, ReplaceLayer, loss_added, verify
from tl_bilinear.tensor import hosvd, tucker

pytestmark = [pytest.mark.slow, pytest.mark.shared]


@pytest.fixture(scope="module")
def text(shared_data):
    characters = (shared_data / "tinystories_valid.txt").read_text().lower()[:200_000]
    names = sorted(set(characters))
    tokens = torch.tensor([names.index(c) for c in characters])
    return tokens[: len(tokens) // 48 * 48].reshape(-1, 48), names


@pytest.fixture(scope="module")
def model(text):
    torch.manual_seed(0)
    tokens, names = text
    sizes = {"n_layers": 2, "d_model": 64, "d_head": 16, "n_ctx": 48, "d_mlp": 128, "seed": 0}
    model = HookedBilinearTransformer(
        {**sizes, "d_vocab": len(names), "normalization_type": "RMS", "device": "cpu"}
    )
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(250):
        batch = tokens[torch.randint(0, len(tokens) - 100, (16,))]
        loss = model(batch, return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 2.4  # it has learnt more than the frequencies of characters, 2.85
    model.process_weights_()
    return model


def test_predicted_is_measured_and_components_matter(text, model):
    tokens, names = text
    held_out = tokens[-100:]
    tensor = BilinearTensor.from_model(model, 1)
    u = model.W_U.detach()[:, [names.index(c) for c in "e ."]].T
    parts = EigenComponents(tensor.interaction(u).eigh(8), layer=1, write="dual")
    components = HOSVDComponents(hosvd(tensor, 3), layer=1)
    few, options = (slice(None), slice(2)), {"controls": 2, "progress": False}
    for found in (
        verify(model, held_out, parts, few, at="output", **options),
        verify(model, held_out, parts, few, **options),
        verify(model, held_out, components, **options),
    ):
        assert found.error.max() < 1e-5
        # What the weights name does more to the loss than as large a change of another direction.
        assert found.effect.mean() > 2 * found.control_effect.mean().abs()
        assert (found.interval[:, 0] > 0).any()


def test_loss_added_by_approximations_of_the_layer(text, model):
    held_out = text[0][-100:]
    tensor = BilinearTensor.from_model(model, 1)
    layers = {
        "nothing": ReplaceLayer(tensor * 0.0, layer=1),
        **{f"tucker {k}": ReplaceLayer(tucker(tensor, k, k).tensor, layer=1) for k in (8, 24, 64)},
    }
    found = loss_added(model, held_out, layers, progress=False)
    added = dict(zip(found.names, found.difference.tolist(), strict=True))
    assert found.interval[0, 0] > 0.02  # the layer is worth something
    assert added["tucker 24"] < added["tucker 8"] < added["nothing"]
    assert_close(found.patched[-1], found.clean, rtol=1e-5, atol=1e-5)
