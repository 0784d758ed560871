"""From Python and from the command line: what is written, and that it is a page."""

from __future__ import annotations

import inspect
import re
import webbrowser

import pytest
import torch

from tests.explorer import building
from tests.explorer.conftest import visiting
from tl_bilinear import cli, explore, spectrum
from tl_bilinear.explorer import opening


@pytest.fixture
def opened(monkeypatch):
    found = []
    monkeypatch.setattr(webbrowser, "open", found.append)
    return found


def test_a_run_is_explored_and_opened(tmp_path, opened):
    view = explore(building.run("plain"), tmp_path / "page.html", title="My layer", progress=False)
    assert opened == [(tmp_path / "page.html").resolve().as_uri()]
    assert re.fullmatch(r"PageView\(.*page\.html, \d+\.\d MB\)", repr(view))
    folder = explore(
        building.panel("plain"), tmp_path / "folder", folder=True, open=False, progress=False
    )
    assert folder.path == tmp_path / "folder" / "index.html"
    assert len(opened) == 1


def test_in_a_notebook_the_page_shows_in_a_frame(tmp_path, browser):
    view = explore(building.panel("plain"), tmp_path / "page.html", open=False, progress=False)
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><body>{view.frame()}</body>")
    with visiting(browser, allowed=("file:", "data:", "blob:", "about:")) as tab:
        tab.goto(notebook.as_uri())
        frame = tab.frame_locator("iframe")
        frame.get_by_role("link", name="Input features").click()
        frame.get_by_role("heading", name="Input features of layer 1").wait_for()
        frame.locator("tbody a.chip").first.click()
        frame.get_by_role("heading", name="Output features that it feeds").wait_for()


def test_the_command_writes_the_page_of_the_model_that_ships(
    tmp_path, monkeypatch, opened, browser, capsys
):
    monkeypatch.setattr(opening, "language_panel", building.few_features)
    monkeypatch.setattr(opening, "GRAPH_TRIED", 8)  # all 64 in test_graph_panel.py
    out = tmp_path / "page.html"
    arguments = ["explore", "--rows", "2", "--layer", "2", "--out", str(out), "--quiet"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("PageView(")
    assert opened == [out.resolve().as_uri()]
    with visiting(browser) as tab:
        tab.goto(out.as_uri() + "#/language/about")
        tab.get_by_role("heading", name="Layer 2 of the model that ships").wait_for()
        assert "SAE 2-mlp_in" in tab.locator("main").inner_text()


def test_features_are_explored_on_a_text(tmp_path):
    features = building.run("plain").features
    view = explore(features, tmp_path / "p.html", text=building.TOKENS, open=False, progress=False)
    assert view.run.features.layer == features.layer
    assert torch.equal(view.run.tokens, building.TOKENS)


def test_what_holds_no_layer_is_refused_in_a_sentence(tmp_path):
    run = building.run("plain")
    unchecked = inspect.unwrap(explore)  # the tests check types before it
    with pytest.raises(ValueError, match=r"explore\(features, text=\.\.\.\) or explore\(run\)"):
        unchecked(run.features, tmp_path / "p.html", open=False)
    with pytest.raises(ValueError, match=r"text= goes with FeatureInteractions"):
        unchecked(run, tmp_path / "p.html", text=building.TOKENS, open=False)
    found = spectrum(run.features.hook_tensor, run.features.directions, k=2, progress=False)
    with pytest.raises(TypeError, match="got Spectrum, which has eigenvalues but no layer"):
        unchecked(found, tmp_path / "p.html", open=False)
    with pytest.raises(TypeError, match="or panels, got list"):
        unchecked([1], tmp_path / "p.html", open=False)
    assert list(tmp_path.iterdir()) == []
