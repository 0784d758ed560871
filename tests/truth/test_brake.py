"""The stored measurement of a feature that holds back its own token."""

import json

import pytest

from tests.truth import brake
from tl_bilinear import FeatureInteractions, load_demo_model, load_demo_saes
from tl_bilinear.demo import load_demo_tokens
from tl_bilinear.explorer.whatif import Change, WhatIf


@pytest.fixture(scope="module")
def stored():
    return json.loads(brake.RESULTS.read_text())


def test_the_page_says_what_is_stored(stored):
    page = brake.PAGE.read_text()
    block = page.split("<!-- brake -->\n")[1].split("\n<!-- end -->")[0]
    assert block == brake.shown(stored)


def test_the_token_is_held_back_by_more_than_chance(stored):
    for part in (stored["strongest"], stored["drawn"]):
        assert part["after"] - part["before"] > 3 * part["random"]
        assert part["rises"] > 0.9 * part["tokens"]
        assert 0.4 < part["random_rises"] < 0.6


def test_the_explorer_shows_the_same_at_the_strongest_place(stored):
    at, saes = stored["first"], load_demo_saes(stored["layer"])
    features = FeatureInteractions(
        load_demo_model("cpu"), stored["layer"], saes["mlp_in"], saes["mlp_out"]
    )
    run = features.run(load_demo_tokens()[at["row"]][None], progress=False)
    change = Change("pair", 0.0, first=stored["feature"], second=stored["feature"])
    (found,) = WhatIf(run, controls=2).effects(0, 0, at["position"], [change])
    values = {word: (before, after) for word, before, after in found["tokens"]}
    assert values[stored["token"]] == pytest.approx((at["before"], at["after"]), abs=2e-4)
