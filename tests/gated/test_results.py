"""What was measured on gated models, and that planted massive activations are found."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.gated.planting import plant
from tests.gated.tables import PAGE, RESULTS, written
from tl_bilinear.models.approximation import approximate_llama


def test_the_page_shows_the_stored_results():
    page = PAGE.read_text()
    assert written(page, json.loads(RESULTS.read_text())) == page


def test_each_step_costs_less_than_the_one_before():
    for one in json.loads(RESULTS.read_text())["models"].values():
        steps = {label: step["all"] for label, step in one["steps"].items()}
        assert one["clean"] > 0
        assert len(one["fidelity"]) == one["layers"]
        assert steps["neuron"] > steps["refit"] > steps["wider (extra = h)"]
        if "refit, repaired" in steps:
            assert steps["refit"] > steps["refit, repaired"]


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = torch.randint(3, 60, (150, 32))
    rare = torch.rand(rows.shape) < 0.002
    rows = torch.where(rare, 2, rows)
    return llama, plant(llama, rows, layer=1, share=3e-3), rows


def test_ordinary_tokens_are_explained_as_well_as_without_the_massive_ones(planted):
    llama, massive, rows = planted
    how = {"warn_below": -1e9, "progress": False}
    before = approximate_llama(llama, rows, [1], **how)[1].fidelity
    found = approximate_llama(massive, rows, [1], **how)[1].fidelity
    assert len(before.massive) == 0
    assert 2 in {int(rows[s, p]) for s, p in found.massive.places.tolist()}
    assert found.massive.share > 0.9
    assert found.ordinary == pytest.approx(before.ordinary, abs=0.03)
    plain = approximate_llama(massive, rows, [1], fit="neuron", weights="equal", **how)[1]
    assert plain.fidelity.ordinary < found.ordinary - 0.5
