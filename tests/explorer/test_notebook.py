"""The page as a notebook's widget: messages, what is selected, and both in a browser."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.explorer import building
from tests.explorer.conftest import visiting
from tests.explorer.test_server import demo
from tl_bilinear import explore
from tl_bilinear.explorer import notebook
from tl_bilinear.explorer.answers import Answers
from tl_bilinear.explorer.documents import unpacked

__all__ = ["demo"]

pytest.importorskip("anywidget", reason="needs anywidget, of [notebook]")


@pytest.fixture(scope="module")
def view(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("notebook") / "page.html"
    return explore(demo, out, open=False, progress=False)


def asking(view, monkeypatch):
    """A function that asks the widget as its front end does."""
    said = []
    monkeypatch.setattr(view.widget, "send", lambda content, buffers=None: said.append(content))

    def ask(question, asked, id="1"):
        said.clear()
        message = {"tlBilinear": "ask", "id": id, "question": question, "asked": asked}
        view.widget._handle_custom_msg(message, [])
        (answer,) = said
        assert (answer["tlBilinear"], answer["id"]) == ("answer", id)
        return json.loads(json.dumps(answer["answer"]))

    return ask


def test_questions_are_answered_as_the_server_answers_them(view, demo, monkeypatch):
    ask = asking(view, monkeypatch)
    found = ask("text", {"text": "once upon a time"})
    run = demo.features.run("once upon a time", progress=False)
    assert torch.equal(unpacked(found["activations"]["x"]), run.x[0])
    asked = {"feature": 5, "k": 2, "factor": 0.0, "row": 1, "position": 40}
    assert ask("effect", asked, id="x7") == json.loads(
        json.dumps(Answers(demo).answer("effect", asked))
    )
    assert ask("effect", {**asked, "row": 9}) == {"error": "there is no row 9"}
    assert ask("effect", None) == {"error": "a request is a table of values"}
    assert ask("run", {}) == {"error": "nothing here answers 'run'"}


def test_other_messages_are_left_alone(view, monkeypatch):
    said = []
    monkeypatch.setattr(view.widget, "send", lambda *given, **named: said.append(given))
    for message in ("ask", None, {"kind": "ask"}, {"tlBilinear": "answer", "id": "1"}):
        view.widget._handle_custom_msg(message, [])
    assert said == []


def test_the_selected_feature_is_known_to_python(view):
    for place, expected in (
        ("", None), ("#/language/output", None), ("#/language/output/7?token=1.2", ("output", 7)),
        ("#/language/input/0", ("input", 0)), ("#/language/text/3", None),
        ("#/language/output/x", None),
    ):  # fmt: skip
        view.widget.place = place
        assert view.selected == expected
    view.select("input", 4)
    assert view.selected == ("input", 4)
    view.widget.place = ""


def test_a_folder_gives_out_its_parts_and_nothing_else(tmp_path, monkeypatch):
    folder = explore(
        building.panel("plain"), tmp_path / "all", folder=True, open=False, progress=False
    )
    ask = asking(folder, monkeypatch)
    assert ask("part", {"name": "plain-words"})["words"]
    for name in ("plain-nothing", "../index", "", None):
        assert "there is no part" in ask("part", {"name": name})["error"]
    assert "nothing here answers 'text'" in ask("text", {"text": "a"})["error"]


def test_without_anywidget_it_is_a_frame_and_says_what_is_missing(view, monkeypatch):
    from tl_bilinear.explorer import PageView

    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    plain = PageView(view.path)
    assert plain._repr_mimebundle_()["text/html"].startswith('<iframe srcdoc="&lt;!doctype')
    with pytest.raises(ImportError, match=r"pip install 'tl-bilinear\[notebook\]'"):
        plain.selected  # noqa: B018  reading it is what raises


def test_it_shows_itself_as_a_widget(view):
    shown = view._repr_mimebundle_()
    data = shown[0] if isinstance(shown, tuple) else shown
    assert "application/vnd.jupyter.widget-view+json" in data


# What Jupyter does for a widget: a model with traits and messages, here over a binding of the browser.
HOST = """<!doctype html><body><script type="module">
const page = new DataView(new TextEncoder().encode(window.page).buffer);
const listeners = {{}}, traits = {traits};
const model = {{
  get: (name) => name === "_page" ? page : traits[name],
  set: (name, value) => {{ traits[name] = value; }},
  save_changes: () => window.saved(JSON.stringify(traits)),
  send: async (message) => {{
    const answer = JSON.parse(await window.sent(JSON.stringify(message)));
    for (const each of listeners["msg:custom"] ?? []) each(answer);
  }},
  on: (name, call) => (listeners[name] ??= []).push(call),
  off: (name, call) => (listeners[name] = listeners[name].filter((each) => each !== call)),
}};
window.change = (name, value) => {{
  traits[name] = value;
  for (const each of listeners[`change:${{name}}`] ?? []) each();
}};
{esm}
window.clean = widget.render({{ model, el: document.body }});
</script></body>"""


def hosted(tab, view, tmp_path, monkeypatch):
    """Show a view's widget in a page of ours; its frame."""
    widget = view.widget
    ask = asking(view, monkeypatch)

    def sent(message):
        found = json.loads(message)
        answer = ask(found["question"], found["asked"], found["id"])
        return json.dumps({"tlBilinear": "answer", "id": found["id"], "answer": answer})

    tab.expose_function("sent", sent)
    tab.expose_function(
        "saved", lambda traits: setattr(widget, "place", json.loads(traits)["place"])
    )
    tab.add_init_script(f"window.page = {json.dumps(widget._page.decode())};")
    traits = json.dumps({"_height": widget._height, "place": widget.place})
    esm = widget._esm if isinstance(widget._esm, str) else str(widget._esm)
    host = tmp_path / "host.html"
    host.write_text(HOST.format(traits=traits, esm=esm.replace("export default", "const widget =")))
    tab.goto(host.as_uri())
    return tab.frame_locator("iframe")


ALLOWED = ("file:", "data:", "blob:", "about:")


def test_in_a_browser_python_follows_the_page_and_leads_it(
    view, demo, browser, tmp_path, monkeypatch
):
    view.widget.place = "#/language/output/5"
    text = "tom was not happy. lily gave him a big red ball"
    with visiting(browser, allowed=ALLOWED) as tab:
        frame = hosted(tab, view, tmp_path, monkeypatch)
        frame.get_by_role("heading", name="Output feature 5").wait_for()
        frame.get_by_role("link", name="6 →").click()
        frame.get_by_role("heading", name="Output feature 6").wait_for()
        assert view.selected == ("output", 6)
        tab.evaluate("change('place', '#/language/text')")
        frame.get_by_label("Text of your own").fill(text)
        frame.get_by_role("button", name="Run the model").click()
        frame.get_by_text("The bundle's text").wait_for()
        run = demo.features.run(text, progress=False)
        position, feature = (int(n) for n in run.activations()[0, 1:].nonzero()[-1])
        expected = run.attribute(feature, position + 1)
        frame.locator("p.tokens button").nth(position + 1).click()
        frame.get_by_label(f"why output feature {feature}", exact=True).click()
        total = float(frame.locator("[data-total]").get_attribute("data-total"))
        size = max(float(expected.quadratic.abs().max()), abs(expected.total))
        assert abs(total - expected.total) <= 1e-5 * size
        frame.locator("section[aria-labelledby=effect]").get_by_role("button").last.click()
        frame.locator("[data-divergence]").wait_for()
        assert view.selected == ("output", feature)
        # The frame is closed off from the notebook around it.
        outside = "() => { try { return parent.document.title } catch { return 'shut' } }"
        assert tab.frames[1].evaluate(outside) == "shut"
        tab.evaluate("clean()")
    view.widget.place = ""


def test_in_a_browser_a_folder_s_parts_come_through_python(browser, tmp_path, monkeypatch):
    folder = explore(
        building.panel("plain"), tmp_path / "all", folder=True, open=False, progress=False
    )
    with visiting(browser, allowed=ALLOWED) as tab:
        frame = hosted(tab, folder, tmp_path, monkeypatch)
        frame.get_by_role("link", name="Input features").click()
        frame.locator("tbody a.chip").first.click()
        frame.get_by_role("heading", name="Output features that it feeds").wait_for()
        assert folder.selected[0] == "input"
        tab.evaluate("change('place', '#/plain/text')")
        frame.get_by_role("heading", name="Text", exact=True).wait_for()
        assert frame.get_by_label("Text of your own").count() == 0
