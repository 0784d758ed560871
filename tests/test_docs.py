"""README and the site's pages: every Python block runs as it is written, and shows what is shown.

A page is one namespace. A block that begins ```python runs; a block ```output below it is what it
prints, compared number by number (processors may differ by one unit of the last digit shown).
CHANGELOG (code of before) and CONTRIBUTING (sketches) are no pages.
Pages may name things of the Hugging Face hub: `stand_ins` puts tiny models of the same format there.
After a change of a page, `python -m tests.test_docs PAGE.md` writes what its blocks print now.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tl_bilinear
from tests.benchmarks import certificates
from tests.benchmarks.__main__ import table
from tests.conftest import folder_hub
from tests.models import published_format, tensor_format

ROOT = Path(__file__).parents[1]
SITE = ROOT / "demos" / "docs"
README = ROOT / "README.md"
PAGES = [p for p in (README, *sorted(SITE.glob("*.md"))) if "```python" in p.read_text()]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text, and the line and offsets of the text."""

    language: str
    text: str
    line: int
    span: tuple[int, int]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(found[1], found[2], page[: found.start(2)].count("\n") + 1, found.span(2))
        for found in FENCE.finditer(page)
    ]


def printed(page: str, name: str) -> Iterator[tuple[Block, Block | None, str]]:
    """Each Python block, the output block right below it if there is one, and what it prints.

    Errors name the page and the line in it.
    """
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        padded = "\n" * (block.line - 1) + block.text
        caught = io.StringIO()
        with contextlib.redirect_stdout(caught):
            exec(compile(padded, name, "exec"), namespace)
        shown = after if after is not None and after.language == "output" else None
        yield block, shown, caught.getvalue()


def differences(shown: str, got: str) -> str | None:
    """What differs between two outputs, or None.

    Spaces count as one; a last digit may differ; what is below 1e-6 in both is rounding, which
    depends on the processor and on the number of threads.
    """
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", got).split():
        return f"shown:\n{shown}\ngot:\n{got}"
    for a, b in zip(NUMBER.findall(shown), NUMBER.findall(got), strict=True):
        if all("e-" in n and abs(float(n.replace(",", ""))) < 1e-6 for n in (a, b)):
            continue
        unit = 10.0 ** -len(a.partition(".")[2].partition("e")[0]) if "." in a else 0.0
        unit *= 10.0 ** int(a.partition("e")[2] or 0)
        if abs(float(a.replace(",", "")) - float(b.replace(",", ""))) > 1.01 * unit:
            return f"shown {a}, got {b}, in\n{got}"
    return None


def write_stand_ins(hub: Path) -> None:
    """What pages name on the hub: models of the paper's authors and of others."""
    published_format.write(hub / "tdooms" / "ts-medium")
    tensor = tensor_format.config(n_layer=2)
    folder = hub / "Elriggs" / "gpt2-bilinear-sqrd-attn-18l-9h-1152embd"
    tensor_format.write(folder, tensor, tensor_format.weights(tensor))


@pytest.fixture
def stand_ins(hub, tmp_path, monkeypatch) -> Path:
    """A working folder, and tiny models with random weights for the hub's names that pages use."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_stand_ins(hub)
    return folder


SLOW = {"saes", "images", "proofs"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW))
        for page in PAGES
    ],
)
def test_blocks_run_as_written_and_print_what_is_shown(page, stand_ins, unchecked):
    for block, shown, got in printed(page.read_text(), str(page)):
        place = f"{page.name}, line {block.line}"
        if shown is None:
            assert not got.strip(), f"{place} prints what the page does not show:\n{got}"
        else:
            different = differences(shown.text, got)
            assert different is None, f"{place}: {different}"


def test_comparison_sees_other_numbers_and_words():
    assert differences("a 0.25 b", "a  0.26 b") is None
    assert differences("a 0.25 b", "a 0.28 b") is not None
    assert differences("a 3 b", "a 4 b") is not None
    assert differences("1.2e-05", "1.9e-05") is not None
    assert differences("off by 3.5e-08", "off by 9.1e-08") is None
    assert differences("off by 3.5e-08", "off by 2.1e-05") is not None
    assert differences("a 0.25 b", "a 0.25 c") is not None
    assert differences("a 0.25", "a 0.25 0.5") is not None


def test_every_page_for_users_has_code_that_runs():
    with_code = {page.stem for page in PAGES}
    assert with_code >= {
        "README",
        "start",
        "concepts",
        "train",
        "saes",
        "swiglu",
        "images",
        "traps",
    }


def test_commands_on_pages_name_a_module_that_is_a_command():
    for page in (README, *sorted(SITE.glob("*.md"))):
        for name in re.findall(r"-m (tl_bilinear[\w.]*)", page.read_text()):
            assert name == "tl_bilinear", f"{page.name}: python -m {name} does nothing"


def test_a_block_that_fails_names_its_line():
    page = "# Title\n\n```python\nx = 1\n```\n\n```python\nprint(x)\nraise KeyError\n```\n"
    with pytest.raises(KeyError) as caught:
        list(printed(page, "page.md"))
    assert caught.traceback[-1].lineno + 1 == 9


# ---------------------------------------------------------------- numbers of README


def stored(name: str) -> dict[str, Any]:
    return json.loads((ROOT / name).read_text())


def stated() -> list[str]:
    """The sentences and rows of README that hold numbers of runs, made from the runs' stored results."""
    digits = stored("demos/quickstart.json")["images"]
    kept = digits["accuracy_with_k_eigenvectors"]
    accuracies = [*kept.values(), digits["accuracy"]]
    pronouns = stored("demos/pronouns.json")
    logit = pronouns["mean_logit_difference"]
    card = stored("tl_bilinear/demo/files/card.json")
    hosvd = stored("tests/benchmarks/results/hosvd-512.json")["seconds"]
    return [
        f"| eigenvectors a class | {' | '.join(kept)} | whole model |",
        f"| test accuracy | {' | '.join(f'{x:.3f}' for x in accuracies)} |",
        f"from {logit['whole model']['she']:+.1f} to {logit['without v1']['she']:+.1f}",
        f"from {logit['whole model']['he']:+.1f} to {logit['without v2']['he']:+.1f}",
        f"{pronouns['occurrences']['she']} and {pronouns['occurrences']['he']} places",
        f"{card['model']['parameters'] / 1e6:.1f} million parameters",
        f"{hosvd['ours']:.2f} s instead of {hosvd['dense']:.1f} s",
    ]


def prose(page: str) -> str:
    """A page without its fenced blocks, links' targets and comments, on one line."""
    page = FENCE.sub("", page)
    page = re.sub(r"\]\([^)]*\)|<!--.*?-->|<img[^>]*>", "", page)
    return " ".join(page.split())


def test_numbers_of_readme_are_those_of_the_stored_runs():
    text = prose(README.read_text())
    for sentence in stated():
        assert sentence in text, f"README does not say: {sentence}"


def test_readme_states_no_other_measured_number():
    text = prose(README.read_text())
    for sentence in stated():
        text = text.replace(sentence, "")
    text = re.sub(r"Python 3\.\d+ to 3\.\d+|TransformerLens 3\.9\+?|1e-\d+", "", text)
    assert re.findall(r"(?<![\w.])[-+]?\d+\.\d+", text) == []


def test_readme_is_short_and_keeps_the_markers_of_ci():
    text = README.read_text()
    assert text.count("\n") <= 150
    for marker in ("<!-- quickstart -->\n```bash\n", "<!-- tests -->\n```bash\n"):
        assert text.count(marker) == 1


def test_links_of_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", README.read_text())
    for target in (a or b for a, b in targets):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_papers_table_is_what_is_stored():
    page = " ".join((SITE / "paper.md").read_text().split())
    digits = stored("demos/quickstart.json")["images"]
    kept, agreement = digits["accuracy_with_k_eigenvectors"], digits["controls"]["model"]
    terms = {row["terms"]: row for row in stored("tests/truth/few_terms.json")["rows"]}
    plain = terms["eigenvectors, by magnitude"]
    card = stored("tl_bilinear/demo/files/card.json")
    added = {"mlp": [], "resid": []}
    for row in card["saes"]["evaluation"]:
        kind = row["sae"].split("-")[1].split("_")[0]
        added[kind].append(round(100 * row["loss_added_relative"]))
    assert (
        f"10 eigenvectors a class {kept['10']:.3f}, the whole model {digits['accuracy']:.3f}; "
        f"cosine of two seeds' eigenvectors {agreement['agreement']:.2f}"
    ) in page
    assert (
        f"mean r {plain['r of 1']:.2f} with one, {100 * plain['above .75, 2']:.0f} % of features"
    ) in page
    model = card["model"]
    assert f"{model['parameters'] / 1e6:.1f} million parameters, {model['loss']:.2f} nats" in page
    low, high = min(added["mlp"]), max(added["mlp"])
    assert f"loss added {low} to {high} % at mlp_in and mlp_out" in page
    assert f"{min(added['resid'])} and {max(added['resid'])} % at resid_mid" in page
    mask = r"accuracy from ([.\d]+) to ([.\d]+) \(permuted: ([.\d]+)\)"
    whole, masked, permuted = re.findall(mask, (SITE / "notebooks.md").read_text())[0]
    assert f"accuracy {whole} to {masked}, permuted mask {permuted}" in page


def test_method_page_shows_the_stored_benchmarks():
    page = (SITE / "method.md").read_text()
    assert table() in page
    attention = stored("tests/benchmarks/results/attention-768.json")["seconds"]
    assert f"takes {attention['queries and keys']:.1f} s for the first of them" in " ".join(
        page.split()
    )


def test_proofs_page_shows_the_stored_certificates():
    assert certificates.table() in (SITE / "proofs.md").read_text()


def test_version_is_the_same_everywhere():
    version = f'"{tl_bilinear.__version__}"'
    assert f"\nversion = {version}\n" in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {tl_bilinear.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {tl_bilinear.__version__}" in (ROOT / "CHANGELOG.md").read_text()


LOADED = [
    '<script async src="https://cdn.example/mathjax.js"></script>',
    '<script src="//cdn.example/require.js"></script>',
    '<link href="https://cdn.example/a.css" rel="stylesheet">',
    '<img src="https://cdn.example/badge.svg">',
    '<script type="module">import "https://cdn.example/plotly.js"</script>',
    "<script>const it = await import('https://cdn.example/plotly.js')</script>",
    '<style>@import url("https://cdn.example/font.css");</style>',
]
ASIDE = [
    '<a href="https://cdn.example/">a link is followed by who wants to</a>',
    '<link rel="canonical" href="https://cdn.example/page.html">',
    '<script src="_static/plotly.min.js"></script>',
    '<script>import "./own.js"; const home = "https://cdn.example/"</script>',
    '<pre>import "https://cdn.example/plotly.js"</pre>',
]


@pytest.mark.parametrize(("line", "count"), [*((x, 1) for x in LOADED), *((x, 0) for x in ASIDE)])
def test_what_a_page_of_the_site_takes_from_a_network_is_found(tmp_path, line, count):
    page = f"<html><script>let a = 1</script><body>{line}<p>text</p></body></html>"
    (tmp_path / "page.html").write_text(page)
    found = runpy.run_path(str(SITE / "check_links.py"))["remote"](tmp_path)
    assert len(found) == count
    assert all(each.startswith("page.html loads ") and "cdn.example" in each for each in found)


def test_gallery_shows_every_figure():
    page = (SITE / "gallery.md").read_text()
    cells = "".join(re.findall(r"```\{code-cell\}\n(.*?)```", page, re.S))
    assert [name for name in tl_bilinear.plots.__all__ if f"plots.{name}(" not in cells] == []


def test_notebooks_page_lists_every_notebook_once():
    page = (SITE / "notebooks.md").read_text()
    listed = re.findall(r"^\| \[.*?\]\(notebooks/(.*?\.ipynb)\)", page, re.M)
    said = re.findall(
        r"^- \[.*?\]\(notebooks/(.*?\.ipynb)\): \S", page, re.M
    )  # check_learned.py writes
    assert said == listed
    assert listed == sorted(path.name for path in (ROOT / "demos").glob("*.ipynb"))


@pytest.mark.parametrize("path", sorted((ROOT / "demos").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


def test_the_numbers_of_the_explorers_folder_are_those_measured():
    found = stored("tests/benchmarks/results/explorer/folder-1024.json")
    case, blocks = found["case"], found["kinds"]["output"]
    text = prose((SITE / "explorer.md").read_text())
    assert (
        f"d = {case['d']:,} and h = {case['hidden']:,} between two dictionaries of "
        f"{case['features']:,} features: {found['whole_megabytes']:.0f} MB, "
        f"{found['whole_cpu_minutes']:.0f} minutes of one core (extrapolated from {blocks['made']} of "
        f"{blocks['of']} blocks), nulls of the spectra included. The process holds "
        f"{found['peak_gigabytes']:.1f} GB at most, {found['imported_gigabytes']:.1f} GB of it for what "
        "is imported (Torch, TransformerLens, SAELens), and the page opens in "
        f"{found['opens_seconds']:.1f} s"
    ) in text
    assert found["environment"]["threads"] == 1
    nulls = stored("tests/benchmarks/results/explorer/null.json")
    one, other = ([case["d"], case["cpu_seconds_a_thousand_features"]] for case in nulls["cases"])
    assert (
        f"Nulls add {one[1]:.0f} s to the building of 1,000 features at d = {one[0]:,} and "
        f"{other[1]:.0f} s at d = {other[0]:,} (one core"
    ) in text
    assert nulls["environment"]["threads"] == 1


def test_the_stored_quickstart_says_whether_its_model_learned():
    found = stored("demos/quickstart.json")["images"]
    controls = found["controls"]
    assert controls["verdict"].startswith("This model learned: of the test images it gets ")
    assert f"{found['accuracy']:.3f} right" in controls["verdict"]
    assert controls["shuffled"]["test_accuracy"] < 2 * controls["chance"]
    assert controls["model"]["effective_rank"] < controls["shuffled"]["effective_rank"]
    assert controls["model"]["certificate"] < controls["shuffled"]["certificate"]


def main(pages: list[str]) -> None:
    """Write into pages what their blocks print now."""
    for name in pages:
        path = Path(name).resolve()
        page = path.read_text()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            pytest.MonkeyPatch.context() as patch,
        ):
            write_stand_ins(folder_hub(Path(folder) / "hub", patch))
            found = list(printed(page, name))
        for _, shown, got in reversed(found):
            if shown is not None:
                got = "\n".join(line.rstrip() for line in got.rstrip().split("\n")) + "\n"
                page = page[: shown.span[0]] + got + page[shown.span[1] :]
        path.write_text(page)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
