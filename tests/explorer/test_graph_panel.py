"""Pairs across layers on a page: what the panel shows equals the Python graph."""

from __future__ import annotations

import csv
import inspect
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.explorer import building
from tests.explorer.building import HOSTILE
from tests.explorer.conftest import PHONE, visiting
from tests.explorer.test_page import at, check_axe, settled
from tl_bilinear import explore
from tl_bilinear.explorer import graph_panel, opening, write_page
from tl_bilinear.explorer.documents import unpacked
from tl_bilinear.explorer.graph_documents import graph_document


def keys(graph):
    """(first, second) to (made, coefficient, contribution), features as the page names them."""
    names = [f"{depth}.{feature}" for depth, feature in graph.nodes.tolist()]
    contributions = graph.coefficients if graph.contributions is None else graph.contributions
    rows = zip(
        graph.pairs.tolist(), graph.coefficients.tolist(), contributions.tolist(), strict=True
    )
    return {
        (names[b], names[c], names[a]): (coefficient, contribution)
        for (b, c, a), coefficient, contribution in rows
    }


def shown(tab):
    """What the table shows, in the same form."""
    found = {}
    for row in tab.locator("tbody tr[data-made]").all():
        cell = row.locator("[data-coefficient]")
        first, second, coefficient = (
            cell.get_attribute(f"data-{name}") for name in ("first", "second", "coefficient")
        )
        there = row.locator("[data-contribution]")
        value = there.get_attribute("data-contribution") if there.count() else coefficient
        found[first, second, row.get_attribute("data-made")] = (float(coefficient), float(value))
    return found


def of_layer(pairs, depth):
    return {key: value for key, value in pairs.items() if key[2].startswith(f"{depth}.")}


@pytest.mark.parametrize("which", [0, 1])
def test_the_panel_shows_the_strongest_pairs_of_the_graph(which, page, tab):
    graph = list(building.graphs().values())[which]
    every = keys(graph)
    tab.goto(at(page, f"#/graph/{which}?k=60"))
    settled(tab)
    found = shown(tab)
    assert found.keys() == every.keys()
    for key, values in found.items():
        assert values == pytest.approx(every[key], rel=1e-6), key
    assert tab.locator("svg [data-pair]").count() == len(every)
    tab.locator("#pairs").fill("2")
    tab.wait_for_function("() => location.hash.includes('k=2')")
    last = of_layer(every, 2)
    strongest = sorted(last, key=lambda key: -abs(last[key][1]))[:2]
    few = shown(tab)
    assert of_layer(few, 2).keys() == set(strongest)
    # Of the earlier layer those first that make an input of these.
    used = {name for key in strongest for name in key[:2]}
    earlier = of_layer(every, 1)
    order = sorted(earlier, key=lambda key: (key[2] not in used, -abs(earlier[key][1])))
    assert of_layer(few, 1).keys() == set(order[:2])


def test_a_feature_keeps_what_leads_to_it_and_what_it_feeds(page, tab):
    graph = list(building.graphs().values())[1]
    every = keys(graph)
    middle = next(key[i] for key in of_layer(every, 2) for i in (0, 1) if key[i].startswith("1."))
    tab.goto(at(page, "#/graph/1?k=60"))
    settled(tab)
    tab.locator(f'svg a[href*="feature={middle}"]').focus()
    tab.keyboard.press("Enter")
    tab.get_by_role("button", name="Show all").wait_for()
    expected = {key for key in every if middle in key}
    assert shown(tab).keys() == expected
    link = tab.url
    tab.goto("about:blank")
    tab.goto(link)
    tab.get_by_role("button", name="Show all").wait_for()
    assert shown(tab).keys() == expected
    assert tab.get_by_role("link", name="Its page").count() == 0  # no such layer on this page
    tab.get_by_role("button", name="Show all").click()
    tab.wait_for_function("() => !location.hash.includes('feature')")
    assert shown(tab).keys() == every.keys()
    # From the table, by keyboard, to a feature whose layer is on the page, and to its page there.
    target = next(iter(of_layer(every, 2)))[2]
    tab.locator(f'tbody a[href*="feature={target}"]').first.focus()
    tab.keyboard.press("Enter")
    activation = float(graph.activations[graph.nodes.tolist().index([2, int(target[2:])])])
    said = tab.get_by_role("status").filter(has_text="what it feeds").inner_text()
    assert f"active at {activation:.3g}" in said
    tab.get_by_role("link", name="Its page").click()
    heading = tab.get_by_role("heading", level=1)
    heading.filter(has_text=f"Output feature {target[2:]}:").wait_for()
    tab.go_back()
    tab.get_by_role("link", name="Its page").wait_for()


def test_pointing_says_the_values(page, tab):
    graph = list(building.graphs().values())[1]
    tab.goto(at(page, "#/graph/1"))
    settled(tab)
    tab.locator("tbody tr").first.hover()
    status = tab.locator(".said")
    last = of_layer(keys(graph), 2)
    coefficient, contribution = max(last.values(), key=lambda value: abs(value[1]))
    for value in (coefficient, contribution):
        digits = f"{abs(value):.3g}" if abs(value) >= 1e-3 else f"{abs(value):.2e}"[:4]
        assert digits in status.inner_text()
    tab.locator("svg a").first.focus()
    assert "active at" in status.inner_text()


def test_exports_of_a_graph(page, tab):
    graph = next(iter(building.graphs().values()))
    tab.goto(at(page, "#/graph/0?k=60"))
    settled(tab)
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="CSV").click()
    text = Path(saved.value.path()).read_text()
    head, *rows = csv.reader(text.splitlines())
    assert len(rows) == len(graph.pairs)
    first = dict(zip(head, rows[0], strict=True))
    values = {
        (r[head.index("first")], r[head.index("second")], r[head.index("made")]) for r in rows
    }
    assert len(values) >= len(rows) - 1
    assert HOSTILE in first["made label"]
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="Figure (SVG)").click()
    root = ElementTree.fromstring(Path(saved.value.path()).read_text())
    assert HOSTILE in "".join(root.itertext())
    attributes = {key for each in root.iter() for key in each.attrib}
    assert not {"href", "src", "class", "style"} & attributes


def test_another_graph_is_chosen(page, tab):
    tab.goto(at(page, "#/graph/0?k=3&feature=2.1"))
    settled(tab)
    tab.get_by_role("combobox").select_option("nothing")
    tab.get_by_text("No pair of this graph is active there.").wait_for()
    assert tab.url.endswith("#/graph/2?k=3")
    tab.goto(at(page, "#/graph/9"))
    alert = tab.locator("[role=alert]")
    alert.filter(has_text="There is no graph 9 here: they are numbered from 0 to 2.").wait_for()
    tab.goto(at(page, "#/graph/1?feature=0.9999"))
    tab.get_by_text("No pair of this graph has the feature 0.9999.").wait_for()


def test_a_graph_whose_parts_do_not_fit_is_refused(tmp_path, browser):
    def cut(document):
        return {**document, "labels": document["labels"][:-1]}

    panel = building.with_documents(building.graphs_panel(), **{"graph-0": cut})
    path = write_page([panel], tmp_path / "page.html", progress=False)
    opened = browser.new_page()
    opened.goto(at(path))
    alert = opened.locator("[role=alert]")
    alert.filter(has_text="the parts of the graph do not fit together").wait_for()
    opened.close()


def test_it_fits_a_phone(page, browser):
    with visiting(browser, PHONE) as tab:
        tab.goto(at(page, "#/graph/0?feature=2.1"))
        settled(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_axe_finds_nothing_at_a_feature_of_a_graph(page, browser):
    graph = list(building.graphs().values())[1]
    depth, feature = graph.nodes[graph.pairs[0, 2]].tolist()
    check_axe(browser, at(page, f"#/graph/1?feature={depth}.{feature}"))


def test_a_document_holds_the_graph():
    graph = list(building.graphs().values())[1]
    found = graph_document(graph)
    assert torch.equal(unpacked(found["nodes"]).long(), graph.nodes)
    assert torch.equal(unpacked(found["pairs"]).long(), graph.pairs)
    torch.testing.assert_close(unpacked(found["contributions"]), graph.contributions.float())
    assert found["position"] == 4
    names = {"before": HOSTILE, "0": "mlp 0", "1": "mlp 1"}
    for label, (depth, feature) in zip(found["labels"], graph.nodes.tolist(), strict=True):
        assert label == f"{HOSTILE} {list(names)[depth]} {feature}"


def test_a_graph_is_explored_by_itself(tmp_path, tab):
    graph = list(building.graphs().values())[1]
    view = explore(graph, tmp_path / "graph.html", open=False, progress=False)
    tab.goto(at(view.path))
    settled(tab)
    counts = [len(of_layer(keys(graph), depth)) for depth in (1, 2)]
    assert len(shown(tab)) == sum(min(10, count) for count in counts)
    with pytest.raises(ValueError, match="at least one, got none"):
        graph_panel({}, title="x")


def test_a_link_to_no_side_is_refused():
    graphs = building.graphs()
    unchecked = inspect.unwrap(graph_panel)
    with pytest.raises(
        ValueError, match="the link of 'mlp 1' leads to the side 'input' or 'output'"
    ):
        unchecked(graphs, title="x", links={"mlp 1": ("norm", "above")})


def test_the_graphs_of_the_model_that_ships_go_through_a_layer_between():
    config = opening.ExploreConfig(rows=4)
    graphs = opening.demo_graphs(opening.demo_run(config, progress=False))
    weights, *there = graphs.values()
    assert weights.dictionaries == ["resid_mid 2", "mlp 2", "mlp 3"]
    assert weights.contributions is None
    assert len(there) == opening.GRAPH_TARGETS
    for name, graph in list(graphs.items())[1:]:
        made = graph.nodes[graph.pairs[:, 2]].tolist()
        (target,) = {feature for depth, feature in made if depth == 2}
        assert name.startswith(f"to {target} at “…")
        assert any(depth == 1 for depth, _ in made)
        assert math.isfinite(float(graph.contributions.sum()))
