"""The documents: against the schema, against the objects they come from, whole or not at all."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest
import torch
from torch.testing import assert_close

from tests.explorer import building
from tl_bilinear.explorer import (
    documents,
    language_documents,  # the module
    language_panel,
    write_folder,
    write_page,
)
from tl_bilinear.explorer.documents import Panel, packed, unpacked

KINDS = {
    "layer": "layer", "words": "words", "table": "table", "text": "text", "activations": "activations",
    "output": "output_block", "input": "input_block", "output-directions": "directions",
    "input-directions": "directions",
}  # fmt: skip


def documents_of(page):
    found = re.findall(r'data-document="([^"]+)">(.*?)</script>', page.read_text(), re.DOTALL)
    return {name: json.loads(text) for name, text in found}


@pytest.fixture(scope="module")
def found(page):
    return documents_of(page)


def test_every_document_keeps_to_the_schema(page, found):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(
        (resources.files("tl_bilinear.explorer") / "bundle.schema.json").read_text()
    )
    manifest = json.loads(
        re.search(r'id="manifest">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    )
    jsonschema.Draft202012Validator.check_schema(schema)

    def check(value, kind):
        jsonschema.validate(value, {**schema, "$ref": f"#/$defs/{kind}"})

    check(manifest, "manifest")
    assert len(found) > 50
    for name, document in found.items():
        panel, rest = name.split("-", 1)
        kind = re.sub(r"-\d+$", "", rest)
        image = {"layer": "image_layer", "eigen": "eigen", "images": "images"}
        kinds = {"image": image, "graph": {"graph": "graph"}}.get(panel, KINDS)
        check(document, kinds[kind])


@pytest.mark.parametrize("case", building.CASES)
def test_features_are_those_of_the_layer(case, found):
    run = building.run(case)
    features = run.features
    block = found[f"{case}-output-0"]["features"]
    z = run.activations()
    for a in (0, 3, 17):
        one = block[a]
        pairs = features.top(a, 20)
        assert unpacked(one["pairs"]["first"]).tolist() == pairs.first.tolist()
        assert_close(unpacked(one["pairs"]["coefficient"]), pairs.coefficients.float())
        eigen = features.interaction(a, basis="activations").eigh()
        assert_close(unpacked(one["eigenvalues"]), eigen.values.float(), atol=1e-5, rtol=1e-5)
        expected = features.promoted(a, 10)
        assert_close(
            torch.tensor([v for _, v in one["promoted"]]),
            expected.raised.float(),
            rtol=1e-4,
            atol=1e-5,
        )
        assert [w for w, _ in one["promoted"]] == expected.words[:10]
        measured = unpacked(one["measured"])
        for (row, position, activation, _), values in zip(one["examples"], measured, strict=True):
            assert activation == pytest.approx(float(z[row, position, a]), rel=1e-6)
            model = run.preactivations([a])[row, position, 0]
            assert float(values[language_panel_before()]) == pytest.approx(float(model), rel=1e-5)
    for b in (0, 11):
        one = found[f"{case}-input-0"]["features"][b]
        expected = features.promoted(b, 10, side="input")
        assert [w for w, _ in one["promoted"]] == expected.words[:10]
        for a, value in one["own"]:
            entry = features.interaction(a, basis="activations").quadratic(
                features.input_directions[b]
            )
            assert value == pytest.approx(float(entry), rel=1e-4, abs=1e-6)


def language_panel_before():
    from tl_bilinear.explorer.language_documents import BEFORE

    return BEFORE


def test_examples_are_the_strongest_of_rows_and_stand_at_their_quantiles(found):
    run = building.run("plain")
    z = run.activations().masked_fill(~run.mask[..., None], 0)
    seen = 0
    for a, one in enumerate(found["plain-output-0"]["features"]):
        values = z[..., a]
        strongest = values.max(1).values
        expected = sorted((float(v) for v in strongest if v > 0), reverse=True)
        top = [value for *_, value, quantile in one["examples"] if quantile == 1]
        assert top == pytest.approx(expected[:6], rel=1e-6)
        active = values[values > 0]
        for _, _, value, quantile in one["examples"]:
            if quantile != 1:
                seen += 1
                below = float((active < value * (1 + 1e-9)).float().mean())
                assert abs(below - quantile) <= 2.1 / len(active) + 0.5 / len(active)
    assert seen > 10


def test_arrays_come_back():
    for tensor in (
        torch.randn(3, 4), torch.randn(2).half(), torch.arange(5), torch.zeros(0, 3),
        torch.tensor([1, 255], dtype=torch.uint8), torch.tensor([-5], dtype=torch.int16),
    ):  # fmt: skip
        assert_close(unpacked(packed(tensor)), tensor, check_dtype=False)
    assert_close(unpacked(packed(torch.tensor([0.1], dtype=torch.float64))), torch.tensor([0.1]))
    with pytest.raises(ValueError, match="holds integers of 32 bits"):
        packed(torch.tensor([2**31]))


def test_an_input_dictionary_that_cannot_encode_is_refused():
    from tl_bilinear import FeatureInteractions

    features = FeatureInteractions(
        building.model(), 1, torch.randn(9, 16, dtype=torch.float64), building.out()
    )
    run = features.run(building.TOKENS, progress=False)
    with pytest.raises(ValueError, match="no token can be taken apart: give an SAE"):
        language_panel(run, title="x")


def test_a_shortlist_finds_what_a_search_of_all_pairs_finds_or_says_that_it_may_not(
    tmp_path, monkeypatch
):
    run = building.run("plain")
    n = run.features.inputs.n
    for shortlist in (n + 5, n - 1, 20, 8):
        monkeypatch.setattr(language_documents, "SEARCHED_WHOLE", 0)
        monkeypatch.setattr(language_documents, "SHORTLIST", shortlist)
        monkeypatch.setattr(language_documents, "PAIRS", 5)
        page = write_page([building.panel("plain")], tmp_path / "page.html", progress=False)
        certified = 0
        for a, one in enumerate(documents_of(page)["plain-output-0"]["features"]):
            pairs, expected = one["pairs"], run.features.top(a, 5)
            found = unpacked(pairs["coefficient"])
            entries = run.features.interaction(a).dense()
            for b, c, value in zip(
                *map(unpacked, (pairs["first"], pairs["second"], pairs["coefficient"])), strict=True
            ):
                factor = 1 if b == c else 2
                assert float(value) == pytest.approx(
                    factor * float(entries[b, c]), rel=1e-4, abs=1e-6
                )
            if pairs["searched"] == n:
                certified += 1
                assert_close(found.abs(), expected.coefficients.abs().float(), rtol=1e-4, atol=1e-6)
            assert bool((found.abs() <= expected.coefficients.abs().float() * (1 + 1e-4)).all())
        assert certified >= {n + 5: run.features.outputs.n, n - 1: 10}.get(shortlist, 0)


# ---------------------------------------------------------------------- folders


class Interrupted(Exception):
    pass


def counting(panel, stop_at=None):
    """A panel that counts the documents it makes, and breaks off before one of them."""
    made = []

    def wrap(name, make):
        def document(read):
            if name == stop_at:
                raise Interrupted
            made.append(name)
            return make(read)

        return document

    wrapped = {name: wrap(name, make) for name, make in panel.documents.items()}
    return Panel(panel.manifest, wrapped, panel.identity), made


def test_documents_are_written_piece_by_piece_and_read_back_whole(tmp_path):
    made = {
        "empty": {},
        "mixed": {
            building.HOSTILE: [1, None, '\u2028 "</script>'],
            "array": packed(torch.randn(3, 2)),
            "none": packed(torch.zeros(0, 3)),
            "within": {"array": packed(torch.arange(4))},
        },
    }
    makers = {name: lambda read, name=name: made[name] for name in made}
    path = write_page([Panel({"name": "p"}, makers, "x")], tmp_path / "p.html", progress=False)
    assert documents_of(path) == made


def test_numbers_are_as_short_as_their_32_bits_allow(tmp_path):
    values = [*torch.randn(200).tolist(), 0.0, -1e-40, 3e38, 1e300, 0.1 + 2**-40]
    made = {"values": values, "within": [{"count": 3, "value": values[0], "text": "0.25"}]}
    panel = Panel({"name": "p"}, {"numbers": lambda read: made}, "x")
    path = write_page([panel], tmp_path / "p.html", progress=False)
    found = documents_of(path)["numbers"]
    assert torch.equal(torch.tensor(found["values"]), torch.tensor(values))
    assert found["within"] == [{"count": 3, "value": found["values"][0], "text": "0.25"}]
    assert found["values"][-1] == 0.1
    assert max(len(str(value)) for value in found["values"]) <= 15


def test_an_interrupted_folder_goes_on_and_another_identity_starts_anew(tmp_path):
    panel = building.panel("plain")
    out = tmp_path / "bundle"
    broken, first = counting(panel, "plain-output-0")
    with pytest.raises(Interrupted):
        write_folder([broken], out, progress=False)
    assert not (out / "index.html").exists()
    whole, second = counting(panel)
    index = write_folder([whole], out, progress=False)
    assert index.is_file()
    assert set(first).isdisjoint(second)
    assert {*first, *second} == set(panel.documents)
    again, third = counting(panel)
    write_folder([again], out, progress=False)
    assert third == []
    other, fourth = counting(Panel(panel.manifest, panel.documents, "another"))
    write_folder([other], out, progress=False)
    assert len(fourth) == len(panel.documents)


def test_a_folder_equals_a_page(folder, found):
    for name, document in found.items():
        text = (folder.parent / "data" / f"{name}.js").read_text()
        assert (
            json.loads(text.removeprefix(f'tlBilinear.add("{name}",').removesuffix(")\n"))
            == document
        )


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds mine\.txt"):
        write_folder([building.panel("plain")], tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_page_leaves_the_one_that_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    broken, _ = counting(building.panel("plain"), "plain-table")
    with pytest.raises(Interrupted):
        write_page([broken], path, progress=False)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_names_that_would_leave_the_folder_are_refused(tmp_path):
    panel = Panel({"kind": "language", "name": ".."}, {"../x": dict}, "x")
    with pytest.raises(ValueError, match=r"lower-case letters, digits, \. _ -"):
        write_page([panel], tmp_path / "page.html", progress=False)


def test_nothing_in_the_page_ends_its_scripts_early(page):
    text = page.read_text()
    assert building.HOSTILE not in text
    assert "</script" not in documents.asset("explorer.js").lower()
    assert "</style" not in documents.asset("explorer.css").lower()
    program = documents.asset("explorer.js").partition("*/")[2]  # behind the licences
    assert not re.search(r"https?://(?!www\.w3\.org|svelte\.dev)", program)
