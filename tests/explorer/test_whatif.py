"""What if: what is changed is the part that it names, and the model answers as under hooks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.explorer import building
from tests.explorer.conftest import visiting
from tests.explorer.test_bundle import documents_of
from tl_bilinear.explorer import whatif, write_page
from tl_bilinear.explorer.whatif import Change, WhatIf

FEATURE, ROW, POSITION = 3, 1, 5


def active_pair(run):
    z = run.features.inputs.read(run.hook_activations, run.source).coefficients[ROW, POSITION]
    return [int(b) for b in z.abs().topk(2).indices]


@pytest.mark.parametrize("case", ["plain", "norm", "gated"])
def test_a_pair_is_its_term_of_the_exact_sum_along_every_feature(case):
    run = building.run(case)
    b, c = active_pair(run)
    for first, second in ((b, c), (c, b), (b, b)):
        part = WhatIf(run).part(Change("pair", first=first, second=second), FEATURE, ROW, POSITION)
        for a in (0, FEATURE, 11):
            table = run.attribute(a, POSITION, ROW).to_pandas(400)
            here = {frozenset((int(r["first"]), int(r["second"]))): r["contribution"]
                    for r in table.to_dict("records")}  # fmt: skip
            along = float(run.output_scale[ROW, POSITION] * (run.features.directions[a] @ part))
            assert along == pytest.approx(here[frozenset((first, second))], rel=1e-6, abs=1e-9)


def test_a_feature_is_what_its_dictionary_writes():
    run = building.run("mean")
    out = run.output[ROW, POSITION]
    reading = run.features.outputs.read(out[None])
    what = WhatIf(run)
    every = [what.part(Change("feature"), a, ROW, POSITION) for a in range(run.features.outputs.n)]
    assert_close(sum(every) + sum(v[0] for v in reading.rest.values()), out)
    assert float(sum(every).norm()) > 0


@pytest.mark.parametrize("case", building.CASES)
def test_the_strongest_pair_is_the_first_of_the_exact_sum(case):
    run = building.run(case)
    what = WhatIf(run)
    for feature in range(0, run.features.outputs.n, 3):
        for row, position in ((ROW, POSITION), (0, 2)):
            first = run.attribute(feature, position, row).to_pandas(1).iloc[0]
            found = what.strongest_pair(feature, row, position)
            assert found == (first["first"], first["second"])


def test_eigenvectors_found_together_change_nothing():
    run = building.run("norm")
    one, other = WhatIf(run), WhatIf(run)
    directions = run.features.directions[[2, FEATURE]]
    other.prepare([2, FEATURE], run.features.layer_tensor.interaction(directions).eigh(5), 2)
    for feature, k in ((FEATURE, 2), (2, 2), (FEATURE, 1), (7, 2)):
        change = Change("eigen", k=k)
        parts = [each.part(change, feature, ROW, POSITION) for each in (one, other)]
        assert_close(parts[0], parts[1])
        assert float(parts[0].norm()) > 0


def test_where_no_input_feature_is_active_there_is_no_strongest_pair(monkeypatch):
    what = WhatIf(building.run("plain"))
    monkeypatch.setattr(WhatIf, "_coefficients", lambda *at: torch.zeros(40, dtype=torch.double))
    assert what.strongest_pair(FEATURE, ROW, POSITION) is None


def test_an_output_dictionary_that_reads_elsewhere_says_so():
    run = building.run("skip")
    assert not whatif.writes_itself(run)
    with pytest.raises(ValueError, match="what a feature writes there is not known"):
        WhatIf(run).part(Change("feature"), FEATURE, ROW, POSITION)


@pytest.mark.parametrize("last", [True, False])
def test_effects_are_those_of_hooks(last, monkeypatch):
    """With blocks behind the layer and without; started at a block, and under hooks."""
    from tl_bilinear import FeatureInteractions

    layer = 1 if last else 0
    hooks = (building.INTO, building.OUTPUT)
    into, out = (
        building.sae(name.replace("blocks.1", f"blocks.{layer}"), "topk", dtype="float64", seed=i,
                     **({"n": building.N_OUT} if i else {}))
        for i, name in enumerate(hooks)
    )  # fmt: skip
    features = FeatureInteractions(building.model(), layer, into, out)
    assert (layer == features.model.cfg.n_layers - 1) == last
    run = features.run(building.TOKENS, progress=False)
    b, c = active_pair(run)
    changes = [Change("eigen", 0.0, k=2), Change("eigen", 3.0, k=2), Change("feature", 0.0),
               Change("pair", 0.0, first=b, second=c), Change("eigen", 1.0, k=1)]  # fmt: skip
    feature = int(run.activations()[ROW, POSITION].argmax())
    found = WhatIf(run).effects(feature, ROW, POSITION, changes)
    tokens = run.tokens[ROW : ROW + 1, : POSITION + 1]
    before = features.model(tokens)[0, -1].detach().log_softmax(-1)
    hooked = features.components(feature, 2).scale(3.0, positions=-1).fwd_hooks(features.model)
    after = features.model.run_with_hooks(tokens, fwd_hooks=hooked)[0, -1].detach().log_softmax(-1)
    expected = float((before.exp() * (before - after)).sum())
    assert expected > 0
    assert found[1]["divergence"] == pytest.approx(expected, rel=2e-3)
    assert found[4]["divergence"] == pytest.approx(0, abs=1e-7)
    assert all(len(each["controls"]) == 8 and min(each["controls"]) > 0 for each in found[:4])
    assert found[1]["controls"] != found[0]["controls"]
    token, *_ = (
        max(range(len(after)), key=lambda t: abs(float(after[t].exp() - before[t].exp()))),
    )
    assert found[1]["tokens"][0][2] == pytest.approx(float(after[token].exp()), rel=2e-3)
    monkeypatch.setattr(whatif, "starts_at_blocks", lambda model: False)
    slow = WhatIf(run).effects(feature, ROW, POSITION, changes)
    for one, other in zip(found, slow, strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=2e-3, abs=1e-7)


def test_effects_of_examples_are_in_the_page_and_shown(page, browser):
    run = building.run("plain")
    known = documents_of(page)["plain-output-0"]["features"]
    one = next(each for each in known if len(each["effects"]) == 2)
    for (row, position, *_), held in zip(one["examples"], one["effects"], strict=False):
        assert (held["row"], held["position"]) == (row, position)
        kinds = [(each["kind"], each["factor"]) for each in held["effects"]]
        assert kinds == [("eigen", 0.0), ("eigen", 2.0), ("feature", 0.0), ("pair", 0.0)]
        changes = [Change.of(each) for each in held["effects"]]
        again = WhatIf(run, controls=4, changed=5).effects(one["feature"], row, position, changes)
        assert again == held["effects"]
    with visiting(browser) as tab:
        tab.goto(page.as_uri() + f"#/plain/output/{one['feature']}")
        card = tab.locator("section[aria-labelledby=effect]")
        for each, name in zip(
            one["effects"][0]["effects"],
            ("Without first 2", "eigenvectors \u00d7 2", "Without the feature", "Without input"),
            strict=True,
        ):
            card.get_by_role("button", name=name).click()
            shown = float(card.locator("[data-divergence]").get_attribute("data-divergence"))
            assert shown == each["divergence"]
        elsewhere = next(p for p in range(1, 8) if all(p != e["position"] for e in one["effects"]))
        tab.evaluate(f"location.hash = '#/plain/output/{one['feature']}?token=0.{elsewhere}'")
        card.get_by_text("Computed beforehand:").wait_for()
        card.get_by_role("link").first.click()
        card.locator("[data-divergence]").wait_for()


def test_hostile_tokens_of_effects_are_text(tmp_path, browser):
    shown = []

    def hostile(document):
        for each in document["features"]:
            for held in each["effects"]:
                shown.append(each["feature"])
                for effect in held["effects"]:
                    effect["tokens"] = [[building.HOSTILE, 0.5, 0.25]]
        return document

    changed = building.with_documents(building.panel("plain"), **{"output-0": hostile})
    path = write_page([changed], tmp_path / "page.html", progress=False)
    with visiting(browser) as tab:
        tab.goto(path.as_uri() + f"#/plain/output/{shown[0]}")
        cell = tab.locator("section[aria-labelledby=effect] td").first
        cell.wait_for()
        assert cell.inner_text() == building.HOSTILE


def test_a_request_s_numbers_are_needed():
    for asked in ({"factor": 0}, {"k": 2}, {"factor": "x", "k": 1}):
        with pytest.raises(ValueError, match="k, factor: give numbers"):
            Change.of(asked)
    assert Change.of({"kind": "feature", "factor": "2"}) == Change("feature", 2.0)
    assert torch.is_tensor(WhatIf(building.run("plain")).part(Change("eigen", k=1), 0, 0, 1))
