"""The page in a real browser, from disk: what it shows equals what Python computes."""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.explorer import building
from tests.explorer.building import HOSTILE, with_documents
from tests.explorer.conftest import LAPTOP, PHONE, visiting
from tl_bilinear.explorer import language_panel, write_folder, write_page
from tl_bilinear.tensor import Metric
from tl_bilinear.tensor.boundary import boundary_distance
from tl_bilinear.tensor.quadratic import QuadraticForm

AXE = Path(__file__).parents[2] / "tl_bilinear/explorer/frontend/node_modules/axe-core/axe.min.js"
FEATURE = 3


def at(path, hash=""):
    return path.as_uri() + hash


def value(tab, selector, attribute):
    return float(tab.locator(selector).first.get_attribute(attribute))


def settled(tab):
    """Wait until nothing on the page is still being computed."""
    tab.wait_for_function("() => !document.querySelector('.wait') && document.querySelector('h1')")


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("where", ["page", "folder"])
@pytest.mark.parametrize("case", building.CASES)
def test_the_sum_at_a_token_equals_the_attribution(case, where, page, folder, tab):
    path = {"page": page, "folder": folder}[where]
    run = building.run(case)
    for sequence, position in ((0, 3), (2, 6)):
        expected = run.attribute(FEATURE, position, sequence)
        size = max(float(expected.quadratic.abs().max()), abs(expected.total), 1e-9)
        tab.goto("about:blank")
        tab.goto(at(path, f"#/{case}/output/{FEATURE}?token={sequence}.{position}"))
        tab.wait_for_selector("[data-total]")
        assert abs(value(tab, "[data-total]", "data-total") - expected.total) <= 1e-5 * size
        for name, term in expected.terms().items():
            if name != "features x features" and abs(term) > 1e-4 * size:
                cell = f'[data-term="{name}"]'
                assert abs(value(tab, cell, "data-value") - term) <= 1e-5 * size, name
        table = expected.to_pandas(5)
        for row in table.to_dict("records"):
            cell = f'[data-first="{row["first"]}"][data-second="{row["second"]}"][data-value]'
            assert abs(value(tab, cell, "data-value") - row["contribution"]) <= 1e-5 * size
        measured = tab.locator("[data-measured]")
        if measured.count():
            own = float(measured.get_attribute("data-measured"))
            assert abs(own - expected.measured) <= 1e-5 * size


@pytest.mark.parametrize("case", ["plain", "norm", "mean"])
def test_the_same_value_around_the_mean(case, page, tab):
    run = building.run(case)
    at_token = (1, 4)
    features = run.features
    x = run.hook_activations / run.scale
    mean = x[run.mask].mean(0)
    layer = features.hook_tensor.project(features.directions[FEATURE][None])
    around = layer.around(mean).parts()
    gain = float(run.output_scale[at_token])
    main = gain * float(around.linear[0] @ (x[at_token] - mean))
    expected = run.attribute(FEATURE, at_token[1], at_token[0])
    tab.goto(at(page, f"#/{case}/output/{FEATURE}?token=1.4"))
    tab.get_by_role("button", name="Around the mean").click()
    tab.wait_for_selector('[data-term="main effects"]')
    size = max(1.0, abs(expected.total))
    parts = {
        n: value(tab, f'[data-term="{n}"]', "data-value")
        for n in ("at the mean", "main effects", "interactions")
    }
    assert abs(parts["main effects"] - main) <= 1e-5 * max(size, abs(main))
    assert abs(sum(parts.values()) - expected.total) <= 1e-5 * max(size, *map(abs, parts.values()))


def test_pairs_where_active_are_those_of_python(page, tab):
    run = building.run("norm")
    feature = max(
        range(10), key=lambda a: int(((run.activations([a])[..., 0] != 0) & run.mask).sum())
    )
    expected = run.active_interactions(feature, progress=False)
    tab.goto(at(page, f"#/norm/output/{feature}?order=active"))
    tab.wait_for_selector("[data-mean]")
    for first, second, mean in zip(
        expected.first[:5].tolist(),
        expected.second[:5].tolist(),
        expected.means[:5].tolist(),
        strict=True,
    ):
        cell = f'[data-first="{first}"][data-second="{second}"][data-mean]'
        assert abs(value(tab, cell, "data-mean") - mean) <= 1e-5 * abs(expected.means[0])


def test_the_correlation_of_k_eigenvectors(page, tab):
    run = building.run("plain")
    active = (run.activations()[..., :] != 0) & run.mask[..., None]
    feature = int(active.flatten(0, 1).sum(0).argmax())
    held = active[..., feature] & (run.activations([feature])[..., 0] > 0)
    Q = run.features.interaction(feature, basis="activations")
    for k in (1, 3):
        eigen = Q.eigh(k)
        terms = eigen.activations(run.x[held]).sum(-1)
        model = run.activations([feature])[..., 0][held]
        expected = float(torch.corrcoef(torch.stack([terms, model]))[0, 1])
        tab.goto("about:blank")
        tab.goto(at(page, f"#/plain/output/{feature}?k={k}"))
        tab.wait_for_selector("[data-correlation]")
        assert abs(value(tab, "[data-correlation]", "data-correlation") - expected) < 1e-5


def test_the_correlation_in_the_metric_of_the_active_tokens(tmp_path, tab):
    """Chosen on the even rows, measured on the odd ones, beside Euclidean ones on the same tokens."""
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 10, (18, 8), generator=drawn)
    run = building.run("plain").features.run(tokens, progress=False)
    path = write_page([language_panel(run, title="plain", name="plain")], tmp_path / "p.html")
    z = run.activations()
    held = (z > 0) & run.mask[..., None]
    even = torch.arange(len(tokens)) % 2 == 0
    enough = torch.minimum(held[even].sum((0, 1)), held[~even].sum((0, 1)))
    feature = int(enough.argmax())
    assert int(enough[feature]) >= 10
    x, on = run.x, held[..., feature]
    metric = Metric.of_samples(x[even][on[even]], 0.3)
    Q = run.features.interaction(feature, basis="activations")
    model = z[~even][..., feature][on[~even]]

    def correlation(eigen):
        terms = eigen.activations(x[~even][on[~even]]).sum(-1)
        return float(torch.corrcoef(torch.stack([terms, model]))[0, 1])

    for k in (1, 3):
        tab.goto("about:blank")
        tab.goto(at(path, f"#/plain/output/{feature}?k={k}&metric=active"))
        tab.wait_for_selector("[data-correlation]")
        found = value(tab, "[data-correlation]", "data-correlation")
        assert abs(found - correlation(Q.eigh(k, metric=metric))) < 1e-5
        said = tab.locator("[data-correlation]").inner_text()
        euclidean = float(re.search(r"\((\S+) with Euclidean", said)[1].replace("\u2212", "-"))
        assert euclidean == pytest.approx(correlation(Q.eigh(k)), abs=6e-4)
    tab.get_by_role("button", name="Euclidean").click()
    tab.wait_for_function("() => !location.hash.includes('metric')")
    tab.wait_for_selector("[data-over-chance]")


def test_a_metric_of_too_few_tokens_says_so(page, tab):
    run = building.run("plain")
    feature = int(((run.activations() > 0) & run.mask[..., None]).sum((0, 1)).argmin())
    tab.goto(at(page, f"#/plain/output/{feature}?metric=active"))
    tab.get_by_role("status").filter(has_text="too few for a metric").wait_for()
    tab.get_by_role("button", name="Euclidean").click()
    tab.wait_for_selector("[data-correlation]")


def test_chance_in_the_table_and_on_the_page(page, tab):
    run = building.run("plain")
    found = run.features.spectrum_chance(range(30), draws=4, rate=0.5, progress=False)
    expected = found.concentration / found.null_concentration
    tab.goto(at(page, "#/plain/output?sort=number"))
    settled(tab)
    shown = [float(c.get_attribute("data-chance")) for c in tab.locator("[data-chance]").all()]
    torch.testing.assert_close(torch.tensor(shown), expected.float(), rtol=1e-5, atol=1e-5)
    tab.get_by_role("button", name="over chance").click()
    settled(tab)
    shown = [float(c.get_attribute("data-chance")) for c in tab.locator("[data-chance]").all()]
    assert shown == sorted(shown, reverse=True)
    tab.goto(at(page, "#/plain/input"))
    settled(tab)
    assert tab.locator("[data-chance]").count() == 0


def test_exports(page, tab):
    """A link that holds the state, a list as CSV, a figure as SVG that other programs read."""
    run = building.run("plain")
    feature = int(((run.activations() > 0) & run.mask[..., None]).sum((0, 1)).argmax())
    tab.goto(at(page, f"#/plain/output/{feature}?k=3"))
    settled(tab)
    figures = tab.get_by_role("button", name="Figure (SVG)")
    for i in range(figures.count()):
        with tab.expect_download() as saved:
            figures.nth(i).click()
        name = saved.value.suggested_filename
        assert name in (f"feature-{feature}.svg", f"feature-{feature}-plane.svg")
        text = Path(saved.value.path()).read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}svg"))) == 3 - i
        assert f"Output feature {feature}" in "".join(root.itertext())
        assert not {"href", "src", "class", "style"} & {
            key for e in root.iter() for key in e.attrib
        }
    tab.get_by_role("button", name="Copy link").click()
    tab.get_by_role("status").filter(has_text=re.compile("Copied|Copy the address")).wait_for()
    tab.goto(at(page, "#/plain"))
    settled(tab)
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="CSV").click()
    rows = list(csv.reader(Path(saved.value.path()).read_text().splitlines()))
    assert rows[0][:4] == ["feature", "label", "promoted", "tokens"]
    assert "chance" in rows[0]
    assert len(rows) == 31


def test_a_drawn_picture_is_in_the_link(page, tab):
    tab.goto(at(page, "#/image"))
    tab.wait_for_selector("[data-logit]")
    tab.get_by_role("button", name="Clear").click()
    tab.locator("canvas.paper").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Space")
    tab.wait_for_function("() => location.hash.includes('drawn=')")
    link, logit = tab.url, value(tab, "[data-logit]", "data-logit")
    assert logit != 0
    tab.goto("about:blank")
    tab.goto(link)
    tab.wait_for_selector("[data-logit]")
    # A byte a pixel.
    assert value(tab, "[data-logit]", "data-logit") == pytest.approx(logit, rel=0.02, abs=1e-3)
    tab.get_by_role("button", name="test image 1,").click()
    tab.wait_for_function(
        "() => location.hash.includes('image=1') && !location.hash.includes('drawn')"
    )
    for broken in ("drawn=%25%25", "drawn=AAAA", "image=99999"):
        tab.goto("about:blank")
        tab.goto(at(page, f"#/image?{broken}"))
        tab.wait_for_selector("[data-logit]")


def test_logits_of_a_chosen_and_of_a_drawn_image(page, tab, classifier, striped):
    model, size = classifier, striped.size
    tab.goto(at(page, "#/image"))
    tab.wait_for_selector("[data-logit]")

    def shown(attribute):
        cells = tab.locator(f"[{attribute}]")
        return torch.tensor([float(c.get_attribute(attribute)) for c in cells.all()])

    def close(found, expected):
        assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))

    for label in range(len(striped.classes)):
        image = striped.test_images[striped.test_labels == label][0]
        image = (image * 255).round() / 255
        index = 0
        for other in range(label):
            index += min(12, int((striped.test_labels == other).sum()))
        tab.get_by_label(f"test image {index}, a {striped.classes[label]}", exact=True).click()
        with torch.no_grad():
            expected = model(image)
        tab.wait_for_function(
            "wanted => Math.abs(+document.querySelector('[data-logit]').dataset.logit - wanted)"
            " < 1e-4 * (1 + Math.abs(wanted))",
            arg=float(expected[0]),
        )
        close(shown("data-logit"), expected)
        tab.locator("#k").fill("2")
        tensor = model.tensor()
        eigen = tensor.interaction().eigh(2)
        close(shown("data-kept"), eigen.activations(image).sum(-1).detach())
    # Drawn: read the picture back from the canvas, which holds 255 (1 - pixel), rounded.
    before = shown("data-logit")
    box = tab.locator("canvas.paper").bounding_box()
    tab.get_by_role("button", name="Clear").click()
    tab.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7, steps=8)
    tab.mouse.up()
    drawn = tab.evaluate(
        "() => { const c = document.querySelector('canvas.paper');"
        "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data) }"
    )
    image = 1 - torch.tensor(drawn).reshape(-1, 4)[:, 0] / 255
    assert image.numel() == size[0] * size[1]
    assert float(image.max()) > 0.5
    with torch.no_grad():
        expected = model(image)
    after = shown("data-logit")
    assert not torch.allclose(after, before)
    # Pixels of the canvas have eight bits.
    assert float((after - expected).abs().max()) <= 0.02 * max(1.0, float(expected.abs().max()))


def test_the_nearest_adversarial_image_is_that_of_python(page, tab, classifier, striped):
    image = (striped.test_images[striped.test_labels == 0][0] * 255).round() / 255
    image = image.double()
    model = copy.deepcopy(classifier).double()
    with torch.no_grad():
        label = int(model(image).argmax())
    unit = torch.eye(len(striped.classes), dtype=torch.float64)
    expected = {}
    for rival in set(range(len(striped.classes))) - {label}:
        form = QuadraticForm.of(model.tensor(), unit[label] - unit[rival])
        expected[rival] = boundary_distance(form, image[None])
    tab.goto(at(page, "#/image"))
    tab.get_by_role("button", name="Find the nearest").click()
    tab.wait_for_selector("[data-distance]")
    shown = {
        int(cell.get_attribute("data-rival")): float(cell.get_attribute("data-distance"))
        for cell in tab.locator("[data-distance]").all()
    }
    assert shown.keys() == expected.keys()
    for rival, found in expected.items():
        assert shown[rival] == pytest.approx(float(found.distance), rel=1e-5), rival
    nearest = min(expected, key=lambda rival: float(expected[rival].distance))
    assert next(iter(shown)) == nearest
    # At the distance both logits are equal; before it the model is right, and behind it wrong.
    assert abs(value(tab, "[data-difference]", "data-difference")) < 1e-5
    for share, winner in ((0.99, label), (1.01, nearest)):
        tab.locator("#amount").fill(str(share))
        tab.locator(f'[data-after="{striped.classes[winner]}"]').wait_for()


# ---------------------------------------------------------------------- finding one's way


def test_search_chip_back_and_keys(page, tab):
    tab.goto(at(page, "#/plain"))
    settled(tab)
    tab.keyboard.press("/")
    tab.wait_for_function("() => document.activeElement.type === 'search'")
    tab.keyboard.type("out 17")
    tab.wait_for_function("() => document.querySelectorAll('tbody tr').length === 1")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.startsWith('#/plain/output/17')")
    tab.get_by_role("heading", level=1).filter(has_text="Output feature 17").wait_for()
    settled(tab)
    chip = tab.locator("section[aria-labelledby=pairs] a.chip").first
    number = chip.get_attribute("href").rsplit("/", 1)[1]
    chip.focus()
    tab.keyboard.press("Enter")
    tab.get_by_role("heading", level=1).filter(has_text=f"Input feature {number}:").wait_for()
    tab.go_back()
    tab.get_by_role("heading", level=1).filter(has_text="Output feature 17").wait_for()
    tab.keyboard.press("n")
    tab.get_by_role("heading", level=1).filter(has_text="Output feature 18").wait_for()
    tab.keyboard.press("Escape")
    tab.wait_for_function("() => location.hash === '#/plain/output'")


def test_a_token_is_chosen_by_keyboard_and_kept_in_the_link(page, tab):
    run = building.run("plain")
    counted = (run.activations() > 0) & run.mask[..., None]
    tab.goto(at(page, f"#/plain/output/{int(counted.flatten(0, 1).sum(0).argmax())}"))
    settled(tab)
    tab.locator("p.example button.peak").first.focus()
    before = value(tab, "[data-total]", "data-total")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.includes('token=')")
    tab.wait_for_function(
        f"() => +document.querySelector('[data-total]')?.dataset.total !== {before!r}"
    )
    link, total = tab.url, value(tab, "[data-total]", "data-total")
    tab.goto("about:blank")
    tab.goto(link)
    tab.wait_for_selector("[data-total]")
    assert value(tab, "[data-total]", "data-total") == total


PLACES = [
    "#/plain", "#/plain/input", "#/plain/output/3", "#/norm/input/5", "#/plain/text/1?token=4",
    "#/plain/about", "#/image", "#/plain/output/3?order=text", "#/plain/output/3?metric=active",
    "#/plain/output/3?with=5", "#/plain/input/2?with=4", "#/graph", "#/graph/1?k=3", "#/graph/2",
]  # fmt: skip


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_every_panel_opens_and_fits(viewport, page, browser):
    with visiting(browser, viewport) as tab:
        for place in PLACES:
            tab.goto("about:blank")
            tab.goto(at(page, place))
            settled(tab)
            assert tab.locator("[role=alert]").count() == 0, place
            wide = tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= viewport["width"], place


def test_hostile_labels_are_text_everywhere(page, tab):
    for place in PLACES:
        tab.goto("about:blank")
        tab.goto(at(page, place))
        settled(tab)
        assert tab.locator("#explorer script, #explorer img").count() == 0
        assert tab.evaluate("document.title") == HOSTILE
    assert HOSTILE in tab.locator("main").inner_text()


def test_hostile_tokens_are_text(tmp_path, tab):
    def words(document):
        return {"words": [f" {HOSTILE} {i}" for i in range(len(document["words"]))]}

    def features(document):
        for one in document["features"]:
            for side in ("promoted", "suppressed"):
                one[side] = [[f"{HOSTILE} {i}", value] for i, (_, value) in enumerate(one[side])]
        return document

    changed = with_documents(
        building.panel("plain"), words=words, **{"output-0": features, "input-0": features}
    )
    path = write_page([changed], tmp_path / "page.html", progress=False)
    for place in ("#/plain/output/3", "#/plain/text/0?token=2", "#/plain/input/3", "#/plain"):
        tab.goto("about:blank")
        tab.goto(at(path, place))
        settled(tab)
        assert HOSTILE in tab.locator("main").inner_text()
        assert tab.locator("#explorer script, #explorer img").count() == 0


@pytest.mark.parametrize("place", PLACES)
def test_axe_finds_nothing(place, page, browser):
    check_axe(browser, at(page, place))


def check_axe(browser, address):
    if not AXE.is_file():
        pytest.skip("needs axe-core: npm ci in tl_bilinear/explorer/frontend")
    # The page's own policy lets no other script in, so the policy is set aside.
    context = browser.new_context(bypass_csp=True, viewport=LAPTOP)
    tab = context.new_page()
    tab.goto(address)
    settled(tab)
    tab.add_script_tag(path=AXE)
    found = tab.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa']})")
    context.close()
    wrong = [(each["id"], each["nodes"][0]["html"][:200]) for each in found["violations"]]
    assert wrong == []


# ---------------------------------------------------------------------- damage


def changed(page, tmp_path, change):
    text = page.read_text()
    found = change(text)
    assert found != text
    path = tmp_path / "changed.html"
    path.write_text(found)
    return path


def manifest_with(**fields):
    def change(text):
        pattern = r'(<script type="application/json" id="manifest">)(.*?)(</script>)'
        found = re.search(pattern, text, re.DOTALL)
        manifest = json.loads(found[2]) | fields
        return (
            text[: found.start(2)]
            + json.dumps(manifest).replace("<", "\\u003c")
            + text[found.end(2) :]
        )

    return change


def document_without(name, key):
    def change(text):
        start = text.index(f'data-document="{name}">') + len(f'data-document="{name}">')
        end = text.index("</script>", start)
        document = json.loads(text[start:end])
        del document[key]
        return text[:start] + json.dumps(document).replace("<", "\\u003c") + text[end:]

    return change


def cut_document(name):
    def change(text):
        start = text.index(f'data-document="{name}">')
        end = text.index("</script>", start)
        return text[: end - 40] + text[end:]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (manifest_with(version=9), "This bundle has version 9, and this page reads version 1"),
        (manifest_with(format="other"), 'its format is "other"'),
        (manifest_with(panels=[]), "This bundle has no panel"),
        (
            manifest_with(panels=[{"kind": "sound", "name": "s"}]),
            'a panel of the unknown kind "sound"',
        ),
        (
            document_without("plain-layer", "left"),
            "This bundle is damaged: the left matrix is missing.",
        ),
        (cut_document("plain-layer"), 'This page is damaged: its part "plain-layer" is not whole.'),
        (
            lambda text: text.replace('data-document="plain-text-0"', 'data-document="gone"'),
            "is missing",
        ),
    ],
)
def test_a_damaged_page_says_so_in_a_sentence(change, message, page, tmp_path, browser):
    tab = browser.new_page()
    tab.goto(at(changed(page, tmp_path, change), "#/plain/output/3"))
    alert = tab.locator("[role=alert]").filter(has_text=message).first
    alert.wait_for(timeout=10_000)
    assert alert.inner_text().count("\n") == 0
    tab.close()


def test_a_folder_without_a_part_names_the_file(tmp_path, browser):
    index = write_folder([building.panel("plain")], tmp_path / "bundle", progress=False)
    (index.parent / "data" / "plain-output-0.js").unlink()
    tab = browser.new_page()
    tab.goto(at(index, "#/plain/output/3"))
    tab.locator("[role=alert]").filter(
        has_text="there is no data/plain-output-0.js beside this page"
    ).first.wait_for()
    part = index.parent / "data" / "plain-input-0.js"
    part.write_text(part.read_text()[:-500])
    tab.goto("about:blank")
    tab.goto(at(index, "#/plain/input/3"))
    tab.locator("[role=alert]").filter(has_text="data/plain-input-0.js is damaged").first.wait_for()
    tab.close()


def test_what_does_not_exist_is_said(page, tab):
    tab.goto(at(page, "#/plain/output/999"))
    tab.locator("[role=alert]").filter(
        has_text="There is no output feature 999: they are numbered from 0 to 29."
    ).first.wait_for()


def test_two_features_side_by_side(page, tab):
    run = building.run("plain")
    features = run.features
    held = (run.activations() != 0) & run.mask[..., None]
    first = int(held.sum((0, 1)).argmax())
    tab.goto(at(page, f"#/plain/output/{first}"))
    tab.get_by_role("link", name="side by side").click()
    tab.wait_for_selector("[data-forms]")
    second = int(tab.get_by_label("Compare it with").input_value())
    rows = features.outputs.decoder
    assert second == int(torch.cosine_similarity(rows, rows[first, None]).argmin())
    pair = features.directions[[first, second]]
    cosine = float(torch.cosine_similarity(*pair, dim=0))
    assert value(tab, "[data-cosine]", "data-cosine") == pytest.approx(cosine, abs=1e-5)
    forms = features.hook_tensor.interaction(pair).dense()
    alike = float(torch.cosine_similarity(*forms.flatten(1), dim=0))
    assert value(tab, "[data-forms]", "data-forms") == pytest.approx(alike, abs=1e-5)
    both = held[..., first] & held[..., second]
    assert value(tab, "[data-both]", "data-both") == int(both.sum())
    strongest = features.top(first, 8)
    directions = features.input_directions
    for b, c in zip(strongest.first.tolist(), strongest.second.tolist(), strict=True):
        for a, Q in zip((first, second), forms, strict=True):
            shown = value(tab, f'[data-pair="{b}.{c}"][data-of="{a}"]', "data-value")
            expected = float(directions[b] @ Q @ directions[c]) * (1 if b == c else 2)
            assert shown == pytest.approx(expected, rel=1e-4, abs=1e-6)
    tab.get_by_label("Compare it with").fill(str(first))
    tab.get_by_label("Compare it with").press("Enter")
    tab.wait_for_function("() => document.querySelector('[data-cosine]')?.dataset.cosine > 0.9999")
    tab.get_by_role("link", name=f"Back to feature {first}").click()
    tab.get_by_role("heading", name="Why, at one token").wait_for()
