"""Every bad input of the tables gets its sentence: none is unclear, silent or without end."""

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import tl_bilinear
from tests.faults.campaign import Case, outcome
from tests.faults.tables import all_cases


def _name(case):
    return case.name if isinstance(case, Case) else ""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", all_cases(), ids=_name)
def test_it_is_refused_with_its_sentence(case, tmp_path):
    kind, line = outcome(case, tmp_path)
    assert kind == "clear", line


def test_the_campaign_is_large_and_names_each_case_once():
    names = Counter(case.name for case in all_cases())
    assert len(names) >= 1000
    assert [name for name, count in names.items() if count > 1] == []


OF_OBJECTS = {  # they take the package's own objects, which were checked when they were made, or nothing
    "image_panel", "language_panel", "quickstart_page", "serving", "with_loss_added", "recording",
    "verify_trials", "unembedding", "approximation_note", "register", "clean_story", "demo_layers",
    "load_demo_model", "load_demo_stories", "load_demo_tokens", "published_huggingface_loader",
    "bilinear_class", "explore_demo", "language_loss", "sample_text", "run_quickstart",
    "sample_stories", "write_gallery",
}  # fmt: skip
ELSEWHERE = {  # their refusals are in these tests: readers and commands of their own
    "explore_images": "explorer/test_image_switch.py",
    "graph_panel": "explorer/test_graph_panel.py",
    "register_dictionary": "features/test_dictionary.py",
    "register_gated_reader": "models/test_approximation.py",
    "register_mlp_reader": "tensor/test_bilinear.py",
    "change_bounds": "tensor/test_regions.py",
    "extremes": "tensor/test_regions.py",
    "leave_out": "models/test_approximation.py",
    "linf_sdp_bound": "tensor/test_robustness.py",
    "product_head": "circuits/test_polynomial.py",
    "tensor_polynomial": "circuits/test_polynomial.py",
    "why": "circuits/test_attention.py",
    "compare_finetuning": "recipes/test_finetune.py",
    "make_gallery": "paper/test_gallery.py",
    "make_tokenizer": "recipes/test_language_text.py",
    "prepare_text": "recipes/test_language_text.py",
    "train_language_model": "recipes/test_language_training.py",
    "train_saes": "recipes/test_saes.py",
}


def public_functions():
    found = {}
    inside = pkgutil.walk_packages(tl_bilinear.__path__, "tl_bilinear.")
    for name in ["tl_bilinear", *(each.name for each in inside if each.ispkg)]:
        module = importlib.import_module(name)
        for each in getattr(module, "__all__", ()):
            if inspect.isfunction(inspect.unwrap(getattr(module, each))):
                found[each] = name
    return found


def test_every_public_function_is_in_the_tables():
    """By its name; a figure is drawn of a result, and a result was checked when it was made."""
    here = Path(__file__).parent
    tables = ("values", "surface", "proofs", "settings", "files", "commands")
    words = set(re.findall(r"\w+", " ".join((here / f"{t}.py").read_text() for t in tables)))
    functions = public_functions()
    missing = {
        name
        for name, package in functions.items()
        if name not in words | OF_OBJECTS | set(ELSEWHERE) and package != "tl_bilinear.plots"
    }
    assert not missing, "give these bad inputs in tests/faults/surface.py"
    assert set(ELSEWHERE) <= set(functions)
    for name, file in ELSEWHERE.items():
        assert re.search(rf"\b{name}\(", (here.parent / file).read_text()), name


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda folder: None, "silent"),
        (lambda folder: [][1], "unclear"),
        (lambda folder: int("x"), "unclear"),
        (_name, "silent"),
    ],
)
def test_the_campaign_notices(call, kind):
    """What is not refused by the package itself is not counted as clear."""
    assert outcome(Case("x", call, ""), None)[0] == kind


def test_the_campaign_notices_what_never_ends(monkeypatch):
    monkeypatch.setattr("tests.faults.campaign.PATIENCE", 0.1)

    def forever(folder):
        while True:
            pass

    assert outcome(Case("x", forever, ""), None)[0] == "never ends"
