"""The command, as a user runs it: what it writes, and what it leaves when something goes wrong."""

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.conftest import idx_folder, striped  # noqa: F401  fixtures
from tl_bilinear import cli
from tl_bilinear.recipes.images import ImageClassifier, training
from tl_bilinear.recipes.language import config

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
        "explorer.html",
        "model.safetensors",
        "report.html",
        "summary.json",
        "tl_bilinear.json",
    ]
    stored = json.loads((out / "summary.json").read_text())
    assert list(stored) == ["images"]
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
        monkeypatch.setattr("tl_bilinear.paper.quickstart_images.save_tensors", interrupt)
    status, output = quickstart()
    assert status == 130
    assert output.err.strip() == "tl-bilinear: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_found_before_training(
    quickstart, tmp_path, monkeypatch
):
    def unexpected(*args, **kwargs):
        raise AssertionError("trained although the results cannot be written")

    monkeypatch.setattr("tl_bilinear.paper.quickstart_images.train_classifier", unexpected)
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
        (["explore", "--rows", "0"], "rows must be at least 1, got 0"),
        (["explore", "--layer", "0"], "layer 0 of the demo model has no SAEs; 2 and 3 do"),
        (["explore", "--point", "mlp_out"], "input features are at mlp_in and resid_mid"),
        (
            ["explore", "--out", "no/such/page.html"],
            "the folder of no/such/page.html does not exist",
        ),
        (["explore", "--out", "."], ". is a folder: name an HTML file, or give --folder"),
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


# ---------------------------------------------------------------------- settings and failures


@pytest.mark.parametrize(
    ("command", "settings", "hidden"),
    [
        (["quickstart"], [cli.QuickstartConfig], []),
        (["images"], [cli.GallerySettings], []),
        (["explore"], [cli.ExploreConfig], []),
        (["tokenizer"], [config.TokenizerConfig], []),
        (["data"], [config.TextConfig], []),
        (["train", "lm"], [config.LanguageConfig, config.RunOptions], []),
        (["train", "compare"], [config.LanguageConfig, config.RunOptions], ["activation"]),
        (["train", "saes"], [config.SAETrainingConfig], []),
        (["finetune"], [config.FinetuneConfig, config.RunOptions], []),
    ],
)
def test_every_setting_is_an_option_with_its_help(run, monkeypatch, command, settings, hidden):
    monkeypatch.setenv("COLUMNS", "400")
    status, output = run(*command, "--help")
    assert status == 0
    fields = [field.name for each in settings for field in dataclasses.fields(each)]
    for name in fields:
        option = f"--{name.replace('_', '-')}"
        line = next((each for each in output.out.splitlines() if f" {option} " in each), "")
        assert bool(line) == (name not in hidden), name
        if line:
            assert re.search(r"[A-Za-z][a-z0-9 ,:']{3,}", line.partition(option)[2]), line


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from tl_bilinear.cli import main\n"
        "words = ('images', 'explore', 'finetune', 'data')\n"
        "for words in ([], ['train'], ['train', 'lm'], *([word] for word in words)):\n"
        "    assert main([*words, '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'pandas', 'transformers', 'datasets', 'plotly', 'sae_lens'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_while_importing():
    program = (
        "import sys\n"
        "from tl_bilinear.cli import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.exit(main(['train', 'lm']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "tl-bilinear: interrupted\n")


def test_what_should_not_happen_says_where_to_report_it(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a line\nand another")

    monkeypatch.setattr("tl_bilinear.recipes.language.data.prepare_text", broken)
    status, output = run("data")
    assert status == 2
    assert re.fullmatch(
        r"tl-bilinear: unexpected RuntimeError: a line and another\. This is a bug: please report it.*",
        output.err.strip(),
    )
    status, output = run("data", "--debug")
    assert status == 2
    assert "Traceback" in output.err
    assert "in broken" in output.err
    monkeypatch.setattr(
        "importlib.metadata.metadata",
        lambda name: SimpleNamespace(get_all=lambda key: ["Issues, https://example.org/issues"]),
    )
    assert "report it at https://example.org/issues with" in run("data")[1].err


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 40 bytes",
        "CUDA out of memory. Tried to allocate 40.00 GiB",
    ],
)
def test_a_model_too_large_for_the_machine_is_no_bug(run, monkeypatch, said):
    def large(*args, **kwargs):
        raise RuntimeError(said)

    monkeypatch.setattr("tl_bilinear.recipes.language.data.prepare_text", large)
    status, output = run("data")
    assert status == 2
    assert output.err == f"tl-bilinear: there is not enough memory for these sizes: {said}\n"
