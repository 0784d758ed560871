"""The stored measurement of few terms: what the page says of it, and how its text is read."""

import gzip
import json

import pytest

from tests.truth import few_terms
from tl_bilinear import load_demo_model


@pytest.fixture(scope="module")
def stored():
    return json.loads(few_terms.RESULTS.read_text())


def test_the_page_shows_what_is_stored(stored):
    page = few_terms.PAGE.read_text()
    block = page.split("<!-- few terms -->\n")[1].split("\n<!-- end -->")[0]
    assert block == few_terms.shown(stored)


def test_one_fitted_direction_explains_what_two_eigenvectors_do(stored):
    plain, best = stored["rows"][0], stored["rows"][-1]
    assert (plain["terms"], best["terms"]) == ("eigenvectors, by magnitude", "fitted")
    assert best["r of 1"] > plain["r of 2"]
    assert best["above .75, 1"] > plain["above .75, 2"]
    by_text = [row["above .75, 2"] for row in stored["rows"] if row["terms"] == "fitted"]
    assert by_text == sorted(by_text)


def test_text_becomes_whole_stories_in_rows(tmp_path):
    model = load_demo_model("cpu")
    path = tmp_path / "stories.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("<|endoftext|>\n".join(["Tom had a RED ball.", " ", "Mia was sad. "] * 200))
    rows = few_terms.text_rows(model, path, 3)
    assert rows.shape == (3, few_terms.N_CTX)
    begin = model.to_tokens("tom had a red ball.")[0]
    assert rows[0, : len(begin)].tolist() == begin.tolist()
    assert rows[0, len(begin)] == model.tokenizer.bos_token_id
    with pytest.raises(ValueError, match=r"are needed"):
        few_terms.text_rows(model, path, 1000)
