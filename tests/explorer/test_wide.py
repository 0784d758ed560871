"""A layer too wide for all its eigenpairs: leading ones, beside one draw of each feature's null."""

from __future__ import annotations

import re

import pytest
import torch
from torch.testing import assert_close

from tests.explorer import building
from tests.explorer.test_bundle import documents_of
from tests.explorer.test_page import at, settled, value
from tl_bilinear.explorer import language_documents, language_panel, write_page
from tl_bilinear.explorer.documents import unpacked
from tl_bilinear.tensor import Metric

LEADING = language_documents.LEADING


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    panel = language_panel(building.wide_run(), title="wide", name="wide")
    return write_page([panel], tmp_path_factory.mktemp("wide") / "p.html", progress=False)


def nulls(features):
    """Spectra by size and norms of every feature with its hidden weights permuted, from matrices."""
    Q = features.interaction(basis="activations")
    order = torch.randperm(Q.weights.shape[-1], generator=torch.Generator().manual_seed(0))
    spectra = []
    for p in Q.weights.double():
        half = (Q.left.double().T * p[order]) @ Q.right.double()
        values = torch.linalg.eigvalsh((half + half.T) / 2)
        spectra.append(values[values.abs().argsort(descending=True)])
    spectra = torch.stack(spectra)
    return spectra, spectra.norm(dim=1)


def test_spectra_stand_beside_their_own_null(wide):
    features = building.wide_run().features
    spectra, norms = nulls(features)
    Q = features.interaction(basis="activations")
    held = documents_of(wide)
    found = held["wide-output-0"]["features"]
    null = torch.stack([unpacked(one["null_eigenvalues"]) for one in found])
    assert_close(null.double(), spectra[:, :LEADING], rtol=1e-4, atol=1e-4 * float(norms.max()))
    own = Q.to(torch.float64).eigh(1, method="dense").values[:, 0].abs() / Q.frobenius_norm()
    expected = own / (spectra[:, 0].abs() / norms)
    chance = torch.tensor([one["chance"] for one in found], dtype=torch.double)
    assert_close(chance, expected.double(), rtol=1e-4, atol=1e-4)
    assert_close(unpacked(held["wide-table"]["output"]["chance"]), chance.float())
    assert_close(torch.tensor([one["norm"] for one in found]), Q.frobenius_norm())
    assert float(chance.std()) > 0.01


def test_chance_is_in_the_table_and_beside_the_spectrum(wide, tab):
    features = building.wide_run().features
    spectra, _ = nulls(features)
    own = features.interaction(3, basis="activations").eigh(1).values.abs()
    tab.goto(at(wide, "#/wide/output?sort=chance"))
    settled(tab)
    shown = [float(c.get_attribute("data-chance")) for c in tab.locator("[data-chance]").all()]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == features.outputs.n
    assert "paired at random with what it reads (one draw for each feature)" in tab.inner_text(
        "main"
    )
    tab.goto(at(wide, "#/wide/output/3"))
    tab.wait_for_selector("[data-over-chance]")
    ratio = value(tab, "[data-over-chance]", "data-over-chance")
    assert ratio == pytest.approx(float(own[0] / spectra[3, 0].abs()), rel=1e-4)
    assert "with what it reads (one draw)" in tab.inner_text("main")


def test_the_metric_of_the_active_tokens_without_the_matrix(wide, tab):
    run = building.wide_run()
    held = (run.activations() > 0) & run.mask[..., None]
    even = torch.arange(len(run.tokens)) % 2 == 0
    feature = int(torch.minimum(held[even].sum((0, 1)), held[~even].sum((0, 1))).argmax())
    x, on = run.x, held[..., feature]
    metric = Metric.of_samples(x[even][on[even]].double(), 0.3)
    Q = run.features.interaction(feature, basis="activations").to(torch.float64)
    model = run.activations()[~even][..., feature][on[~even]].double()
    for k in (1, 3):
        eigen = Q.eigh(k, metric=metric)
        terms = eigen.activations(x[~even][on[~even]].double()).sum(-1)
        expected = float(torch.corrcoef(torch.stack([terms, model]))[0, 1])
        tab.goto("about:blank")
        tab.goto(at(wide, f"#/wide/output/{feature}?k={k}&metric=active"))
        tab.wait_for_selector("[data-correlation]")
        assert abs(value(tab, "[data-correlation]", "data-correlation") - expected) < 1e-4
    table = tab.locator("td.n").filter(has_text=re.compile(r"^[+\u2212]"))
    assert table.count() > 3
    tab.get_by_role("button", name="Euclidean").click()
    tab.wait_for_selector("[data-over-chance]")


def test_a_bundle_without_a_null_says_so(tmp_path, tab):
    def without(document):
        for one in document["features"]:
            del one["null_eigenvalues"]
        return document

    panel = language_panel(building.wide_run(), title="wide", name="wide")
    changed = building.with_documents(panel, **{"output-0": without})
    path = write_page([changed], tmp_path / "p.html", progress=False)
    tab.goto(at(path, "#/wide/output/3"))
    tab.get_by_text("holds no null of a layer so wide").wait_for()
