"""The page of costs says what is stored, and what is measured is what it says."""

import torch

from tests.benchmarks import costs, costs_page
from tests.benchmarks.layers import directions, layer_like_trained


def test_the_page_is_the_stored_run():
    page = costs.PAGE.read_text()
    assert costs_page.filled(page) == page
    for part in costs.PARTS:
        found = costs.stored(part)
        assert found["environment"]["threads"] == 1
        assert found["rows"]


def test_the_plot_is_the_stored_run(tmp_path, monkeypatch):
    drawn = tmp_path / "costs.svg"
    monkeypatch.setattr(costs_page, "PICTURE", drawn)
    costs_page.draw()
    ours, theirs = (path.read_text().count("<path") for path in (costs.PICTURE, drawn))
    assert ours == theirs  # another matplotlib may place text elsewhere


def test_both_ways_find_the_same():
    tensor, dirs = layer_like_trained(24, 48, 24), directions(3, 24)
    values, vectors = costs.formed(tensor, dirs, 4)
    found = tensor.interaction(dirs).eigh(4)
    torch.testing.assert_close(found.values, values, rtol=1e-4, atol=1e-5)
    assert ((found.vectors * vectors).sum(-1).abs() > 0.999).all()


def test_an_exponent_is_that_of_a_power():
    assert abs(costs.exponent([2, 4, 8], [3.0, 24.0, 192.0]) - 3) < 1e-12


def test_families_are_close_to_each_other():
    rows = costs.families(32, 64)
    cosines = rows @ rows.T
    assert cosines[:8, :8].mean() > 0.5
    assert cosines[:8, 8:].abs().mean() < 0.2
