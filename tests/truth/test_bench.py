"""The bench itself: a short version runs with the tests, all of it with the slow ones."""

import json

import pytest
import torch

from tests.truth import bench, models


def test_planted_layers_are_what_they_say():
    """Without noise the form is the circuit, by hand."""
    for kind in models.KINDS:
        case = models.planted(kind, "random", models.SIZES[0], 0.0, 3)
        rows, z = case.directions, case.z[:20]
        neurons = models.circuit(kind, torch.randperm(64, generator=_after(rows, 3)).tolist()[:4])
        x = z @ rows
        expected = sum(w * (x @ rows[b]) * (x @ rows[c]) for b, c, w in neurons)
        assert (case.layer(x)[:, 0] - expected).abs().max() < 1e-10
        assert case.truth == {(min(b, c), max(b, c)) for b, c, _ in neurons}


def _after(rows, seed):
    """The generator of `planted` after it has drawn a random dictionary."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(*rows.shape, generator=generator, dtype=torch.double)
    return generator


@pytest.mark.campaign
def test_some_planted_circuits_are_found_and_no_others():
    planted, null = bench.run(few=True)
    assert len(planted) == len(null) == 12
    found = bench.summary(planted, null)
    assert found["all"]["power, pursuit"] >= 0.95
    assert found["all"]["false, pursuit"] <= 0.01
    assert found["all"]["power, dictionary"] >= 0.9
    assert sum(row["discoveries, pursuit"] for row in null) <= 1


def test_the_stored_results_are_of_this_bench():
    stored = json.loads(bench.RESULTS.read_text())
    settings = [
        tuple(row[n] for n in ("kind", "dictionary", "noise", "seed")) for row in stored["planted"]
    ]
    assert settings == [(k, d, x, seed) for k, d, _, x, seed in models.all_planted()]
    assert stored["summary"]["planted"] == len(settings) >= 100
    assert stored["summary"]["null"] == len(stored["null"]) == len(models.all_null()) >= 100
    again = bench.summary(stored["planted"], stored["null"])
    for key, value in again["all"].items():
        assert stored["summary"]["all"][key] == pytest.approx(value)


@pytest.mark.campaign
def test_all_of_it_gives_what_is_stored():
    planted, null = bench.run()
    stored = json.loads(bench.RESULTS.read_text())["summary"]["all"]
    for key, value in bench.summary(planted, null)["all"].items():
        assert value == pytest.approx(stored[key], abs=0.03)
