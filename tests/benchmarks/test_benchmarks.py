"""The benchmarks measure what they say: both sides of the quick cases agree. No test asserts a time."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import tensor_transformers
from tests.benchmarks.cases import (
    CASES,
    QUICK,
    image_accuracies,
    image_sides,
    seeds_sides,
)
from tests.benchmarks.layers import layer_like_trained
from tests.benchmarks.trained_spectrum import INDICES, MEASURED
from tl_bilinear.recipes.images import ImageData, TrainingConfig


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_both_sides_find_the_same(case):
    sides = case.build()
    errors = case.compare(sides["ours"](), sides["dense"]())
    assert all(value < 1e-5 for value in errors.values()), errors


def test_both_ways_of_training_learn_the_same():
    labels = torch.arange(200) % 3
    images = 0.9 * torch.nn.functional.one_hot(labels, 12) + 0.1 * torch.rand(200, 12)
    data = ImageData(images, labels, images, labels, (3, 4), ("a", "b", "c"), "dots")
    config = TrainingConfig(
        size=8, noise=0.1, weight_decay=0.1, batch=20, epochs=10, learning_rate=0.02
    )
    for sides in (image_sides(data, config), seeds_sides(data, config, 2)):
        found = {name: side() for name, side in sides.items()}
        errors = image_accuracies(found["ours"], found["dense"])
        assert min(errors.values()) > 0.95, errors


def test_the_layers_decay_as_the_trained_one_did():
    stored = json.loads(MEASURED.read_text())
    model = max(stored["models"], key=lambda model: model["d_model"])
    tensor = layer_like_trained(model["d_model"], model["d_mlp"], 32)
    values = tensor.interaction().eigh().values.abs()
    found = (values / values[:, :1]).median(0).values[list(INDICES)]
    trained = torch.tensor(model["profile"])[list(INDICES)]
    assert (found / trained).log().abs().max() < 0.35


def test_every_stored_result_has_a_row_and_an_environment():
    for path in benchmarks.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert path.stem in [case.name for case in CASES]
        assert result["title"] in benchmarks.table()
        assert result["environment"]["torch"]


def test_stored_certificates_agree_with_the_run_that_made_them():
    stored = sorted((benchmarks.RESULTS / "certificates").glob("*.json"))
    assert [path.stem for path in stored] == ["embedding", "plain"]
    for path in stored:
        result = json.loads(path.read_text())
        found, checked = result["distances"], result["certificate"]
        shares = found["certified accuracy"]
        counts = {str(radius): count for radius, count in checked["certified"]}
        assert counts == {radius: round(share * 10_000) for radius, share in shares.items()}
        for part in ("attack", "linf"):  # an attack leaves no fewer right than are proved
            for accuracy in result[part]["accuracy by radius"].values():
                assert accuracy["proved"] <= accuracy["left by the attack"]
        for part in ("distances", "attack", "box", "linf", "proofs", "certificate"):
            assert result[part]["environment"]["torch"]


def test_peak_memory_is_that_of_a_fresh_process():
    ballast = torch.ones(2**28)  # a gigabyte here must not be seen there
    assert 0 < benchmarks.memory_of(QUICK[1], "nothing") < ballast.nbytes


def test_the_page_of_tensor_transformers_states_what_is_stored():
    page = (Path(__file__).parents[2] / "demos/docs/tensor_transformers.md").read_text()
    for sentence in tensor_transformers.stated():
        assert sentence in page, sentence
