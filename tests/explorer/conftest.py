"""A real browser, the pages it opens, and what every one of them must not do."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest
import torch

from tests.explorer import building
from tests.recipes.conftest import striped
from tl_bilinear.explorer import image_panel, write_folder, write_page
from tl_bilinear.recipes.images import ImageClassifier

__all__ = ["striped"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="package")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of [dev]")
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


@contextmanager
def visiting(browser, viewport=LAPTOP, allowed=("file:", "data:", "blob:")):
    """A tab; at its end nothing may have been asked of a network, and nothing complained of."""
    tab = browser.new_page(viewport=viewport)
    requests, complaints = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.set_default_timeout(20_000)
    try:
        yield tab
        assert [url for url in requests if not url.startswith(allowed)] == []
        assert complaints == []
        assert tab.title() != "run", "a label was run as a script"
    finally:
        tab.close()


@pytest.fixture
def tab(browser):
    with visiting(browser) as opened:
        yield opened


@pytest.fixture(scope="package")
def classifier(striped):
    generator = torch.Generator().manual_seed(0)
    return ImageClassifier(striped.pixels, len(striped.classes), 8, bias=True, generator=generator)


@pytest.fixture(scope="package")
def panels(classifier, striped):
    image = image_panel(classifier, striped, title="stripes", name="image")
    return [*(building.panel(case) for case in building.CASES), image, building.graphs_panel()]


@pytest.fixture(scope="package")
def page(panels, tmp_path_factory):
    """One page with every case, an image model and graphs."""
    folder = tmp_path_factory.mktemp("page")
    return write_page(panels, folder / "page.html", title=building.HOSTILE, progress=False)


@pytest.fixture(scope="package")
def folder(panels, tmp_path_factory):
    """The same as a folder; its index.html."""
    return write_folder(panels, tmp_path_factory.mktemp("folder") / "all", progress=False)
