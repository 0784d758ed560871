"""The server: own text and interventions, for this machine only."""

from __future__ import annotations

import http.client
import json

import pytest
import torch

from tests.explorer.building import few
from tests.explorer.conftest import visiting
from tl_bilinear import FeatureInteractions
from tl_bilinear.demo import demo_layers, load_demo_model, load_demo_saes, load_demo_tokens
from tl_bilinear.explorer import language_panel, serving, write_page
from tl_bilinear.explorer.documents import unpacked


@pytest.fixture(scope="module")
def demo():
    layer = demo_layers()[-1]
    saes = load_demo_saes(layer)
    features = FeatureInteractions(
        load_demo_model("cpu"), layer, few(saes["mlp_in"]), few(saes["mlp_out"])
    )
    return features.run(load_demo_tokens()[:3], progress=False).labelled(progress=False)


@pytest.fixture(scope="module")
def address(demo, tmp_path_factory):
    page = tmp_path_factory.mktemp("served") / "page.html"
    write_page([language_panel(demo, title="demo")], page, progress=False)
    with serving(page, demo) as found:
        yield found


def post(address, path, value, **headers):
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    headers = {"Content-Type": "application/json", **headers}
    connection.request("POST", path, json.dumps(value), headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body) if body.startswith(b"{") else {}


def test_own_text_in_the_page_equals_the_attribution(address, demo, browser):
    text = "tom was not happy. lily gave him a big red ball"
    run = demo.features.run(text, progress=False)
    active = run.activations()[0, 1:].nonzero()
    position, feature = int(active[-1, 0]) + 1, int(active[-1, 1])
    expected = run.attribute(feature, position)
    with visiting(browser, allowed=(address, "data:", "blob:")) as tab:
        tab.goto(f"{address}#/language/text")
        tab.get_by_label("Text of your own").fill(text)
        tab.get_by_role("button", name="Run the model").click()
        tab.get_by_text("The bundle's text").wait_for()
        tab.locator("p.tokens button").nth(position).click()
        tab.get_by_label(f"why output feature {feature}", exact=True).click()
        tab.wait_for_selector("[data-total]")
        total = float(tab.locator("[data-total]").get_attribute("data-total"))
        measured = float(tab.locator("[data-measured]").get_attribute("data-measured"))
        size = max(float(expected.quadratic.abs().max()), abs(expected.total))
        assert abs(total - expected.total) <= 1e-5 * size
        assert abs(measured - expected.measured) <= 1e-5 * size
        tab.locator("section[aria-labelledby=effect]").get_by_role("button").click()
        tab.wait_for_selector("[data-divergence]")


def test_an_effect_is_that_of_the_hooks(address, demo):
    asked = {"feature": 5, "k": 2, "factor": 0.0, "row": 1, "position": 40}
    status, found = post(address, "/api/effect", asked)
    assert status == 200
    model, tokens = demo.features.model, demo.tokens[1:2, :41]
    before = model(tokens)[0, -1].detach().log_softmax(-1)
    hooks = demo.features.components(5, 2).ablate(positions=-1).fwd_hooks(model)
    after = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].detach().log_softmax(-1)
    expected = float((before.exp() * (before - after)).sum())
    assert found["divergence"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert len(found["controls"]) == 8
    largest = int((after.exp() - before.exp()).abs().argmax())
    assert found["tokens"][0][2] == pytest.approx(float(after[largest].exp()), rel=1e-3)
    nothing = post(address, "/api/effect", {**asked, "factor": 1.0})[1]
    assert abs(nothing["divergence"]) < 1e-6


def test_own_text_is_the_model_s(address, demo):
    status, found = post(address, "/api/text", {"text": "once upon a time"})
    assert status == 200
    run = demo.features.run("once upon a time", progress=False)
    assert torch.equal(unpacked(found["activations"]["x"]), run.x[0])
    assert found["text"]["words"][1:] == [" once", " upon", " a", " time"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("/api/text", {}, "type some text first"),
        ("/api/text", {"text": "word " * 600}, "the page takes 256"),
        ("/api/effect", {"row": "x"}, "row, position and feature are numbers"),
        (
            "/api/effect",
            {"feature": 1, "row": 0, "position": 3, "factor": 0},
            "k, factor: give numbers",
        ),
        (
            "/api/effect",
            {"feature": 1, "row": 0, "position": 3, "factor": 0, "kind": "bias"},
            "kind must be 'eigen', 'feature' or 'pair', got 'bias'",
        ),
        (
            "/api/effect",
            {
                "feature": 1,
                "row": 0,
                "position": 3,
                "factor": 0,
                "kind": "pair",
                "first": 1,
                "second": 99,
            },
            "input features are 0 to 47",
        ),
        (
            "/api/effect",
            {"feature": 999, "k": 1, "factor": 0, "row": 0, "position": 3},
            "output features are 0 to 47",
        ),
        (
            "/api/effect",
            {"feature": 1, "k": 1, "factor": 0, "row": 0, "position": 900},
            "there is no token 900",
        ),
        (
            "/api/effect",
            {"feature": 1, "k": 1, "factor": 0, "row": 9, "position": 3},
            "there is no row 9",
        ),
    ],
)
def test_bad_requests_are_answered_in_a_sentence(address, path, value, message):
    status, found = post(address, path, value)
    assert status == 400
    assert message in found["error"]


def test_only_this_machine_and_this_page_are_answered(address):
    assert address.startswith("http://127.0.0.1:")
    assert post(address, "/api/text", {"text": "a"}, Host="evil.example")[0] == 403
    assert post(address, "/api/text", {"text": "a"}, Origin="http://evil.example")[0] == 403
    assert post(address, "/api/text", {"text": "a"}, **{"Content-Type": "text/plain"})[0] == 400
    host = address.removeprefix("http://").rstrip("/")
    for path in ("/../../etc/passwd", "/data/../page.html", "/data/%2e%2e/page.html", "/page.html"):
        connection = http.client.HTTPConnection(host, timeout=20)
        connection.request("GET", path)
        assert connection.getresponse().status == 404
        connection.close()


def test_a_taken_port_is_one_sentence(address, demo, tmp_path):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    page = tmp_path / "page.html"
    page.write_text("x")
    with (
        pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"),
        serving(page, demo, port=port),
    ):
        pass
