"""The command, as a user runs it: what it writes, and what it leaves when something goes wrong."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.conftest import idx_folder, striped  # noqa: F401  fixtures
from tl_bilinear import cli
from tl_bilinear.recipes.images import ImageClassifier, training

FAST = ["--size", "8", "--epochs", "2", "--batch", "100", "--no-language", "--quiet"]


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = cli.main([str(each) for each in arguments])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def quickstart(run, idx_folder, tmp_path):  # noqa: F811
    def quickstart(*arguments, out=tmp_path / "out"):
        return run("quickstart", "--data", idx_folder, "--out", out, *FAST, *arguments)

    return quickstart


def test_it_writes_report_vectors_model_and_summary(quickstart, tmp_path):
    status, output = quickstart()
    assert status == 0
    assert "eigenvectors a class" in output.out
    assert "whole model" in output.out
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "eigenvectors.safetensors",
        "model.safetensors",
        "report.html",
        "summary.json",
    ]
    stored = json.loads((out / "summary.json").read_text())
    assert list(stored) == ["kind", "images"]
    summary = stored["images"]
    assert summary["config"]["size"] == 8
    assert summary["largest_difference_model_tensor"] < 1e-4
    assert set(summary["accuracy_with_k_eigenvectors"]) == {"1", "3", "5", "10", "20"}
    vectors = load_file(out / "eigenvectors.safetensors")
    assert vectors["pixels.vectors"].shape == (3, 10, 30)
    assert vectors["embedding.vectors"].shape == (3, 8, 8)
    assert vectors["embedding.images"].shape == (3, 8, 30)
    model = ImageClassifier(30, 3, 8)
    model.load_state_dict(load_file(out / "model.safetensors"))
    values = model.tensor().interaction().eigh(10).values
    torch.testing.assert_close(values, vectors["pixels.values"], rtol=1e-4, atol=1e-5)


def test_the_report_opens_offline_and_says_which_space(quickstart, tmp_path):
    quickstart()
    report = (tmp_path / "out" / "report.html").read_text()
    page = re.sub(r"<script>.*?</script>", "", report, count=1, flags=re.DOTALL)  # plotly.js itself
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", page)
    for phrase in ("orthogonal to each other <em>as images", "neither unit vectors nor orthogonal"):
        assert phrase in re.sub(r"\s+", " ", page)
    assert page.count("Class a") == 0  # labels are numbers in IDX files
    assert page.count("<h3>Class 2</h3>") == 2


def test_a_previous_run_is_replaced_and_anything_else_is_refused(quickstart, tmp_path):
    assert quickstart("--seed", "1")[0] == 0
    assert quickstart("--seed", "2")[0] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"]["config"]["seed"] == 2
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    status, output = quickstart()
    assert status == 2
    assert "thesis.tex" in output.err
    assert len(output.err.strip().splitlines()) == 1
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("moment", ["training", "writing"])
def test_ctrl_c_leaves_nothing(quickstart, tmp_path, monkeypatch, moment):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "training":
        monkeypatch.setattr(training, "cross_entropy", interrupt)
    else:
        monkeypatch.setattr("tl_bilinear.recipes.images.quickstart.save_tensors", interrupt)
    status, output = quickstart()
    assert status == 130
    assert output.err.strip() == "tl-bilinear: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_found_before_training(
    quickstart, tmp_path, monkeypatch
):
    def unexpected(*args, **kwargs):
        raise AssertionError("trained although the results cannot be written")

    monkeypatch.setattr("tl_bilinear.recipes.images.quickstart.train_classifier", unexpected)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        status, output = quickstart(out=place)
        assert status == 2
        assert "file" in output.err
        assert len(output.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--data", "/no/such/folder"], "no such folder of images"),
        (["quickstart", "--size", "0"], "size must be at least 1, got 0"),
        (["quickstart", "--size", "wide"], 'Invalid value for --size: unable to convert "wide"'),
        (["quickstart", "--sise", "3"], "Unknown option: --sise. Did you mean --size?"),
        (["fastforward"], 'Unknown command "fastforward"'),
        (
            ["train", "lm", "--config", "huge"],
            "unknown config 'huge'; there are paper, small, nano",
        ),
        (["train", "compare", "--activation", "reglu"], "Did you mean --activations?"),
        (["tokenizer", "--size", "-1"], "size must be at least 1, got -1"),
        (["data", "--validation", "2"], "validation must be a share between 0 and 1, or a source"),
    ],
)
def test_bad_input(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, output = run(*arguments)
    assert status == 2
    assert message in output.err
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_version_and_help(run):
    status, output = run("--version")
    assert (status, output.out.split()[0]) == (0, "tl-bilinear")
    status, output = run("--help")
    assert status == 0
    assert "quickstart" in output.out
