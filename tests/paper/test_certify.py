"""`tl-bilinear certify`: what it writes is accepted by the checker that lies beside it."""

import json
import subprocess
import sys

import pytest

from tests.recipes.conftest import idx_folder, striped  # noqa: F401  fixtures
from tl_bilinear import cli
from tl_bilinear.paper import CertifyConfig, certify
from tl_bilinear.recipes.images import training

FAST = {"--size": 8, "--epochs": 3, "--k": 4, "--noises": "0,0.2", "--radii": "0,0.2"}


@pytest.fixture
def run(idx_folder, tmp_path, capsys):  # noqa: F811
    def run(**changes):
        options = FAST | {"--data": idx_folder, "--out": tmp_path / "out"}
        options |= {f"--{name}": value for name, value in changes.items()}
        given = [str(each) for option in options.items() for each in option]
        status = cli.main(["certify", "--quiet", *given])
        return status, capsys.readouterr()

    return run


def check(folder, *given):
    command = [
        sys.executable,
        folder / "certificate_checker.py",
        folder / "certificate.safetensors",
    ]
    return subprocess.run([*command, *given], capture_output=True, text=True, cwd=folder, env={})


def test_the_folder_proves_itself(run, tmp_path, monkeypatch):
    status, output = run()
    assert status == 0, output.err
    out = tmp_path / "out"
    assert sorted(each.name for each in out.iterdir()) == [
        "certificate.safetensors",
        "certificate_checker.py",
        "proofs.html",
        "summary.json",
        "tl_bilinear.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    certified = dict(summary["certificate"]["certified"])
    images = summary["test_images"]
    assert certified[0.0] == round(summary["study"]["accuracy"] * images)
    assert 0 < certified[0.2] < certified[0.0]
    assert f"radius 0.2: {certified[0.2] / images:.4f}" in output.out
    assert 0 < summary["certificate"]["proved"] <= certified[0.0]
    good = check(out)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout.removeprefix("proved: "))["certified"] == [
        [0.0, certified[0.0]],
        [0.2, certified[0.2]],
    ]
    assert check(out, "0" * 64).returncode == 1
    assert list(tmp_path.glob(".*")) + list(tmp_path.glob("tmp*")) == []

    def unexpected(*args, **kwargs):
        raise AssertionError("trained again")

    # The trained models are kept: a second call proves, and does not train.
    monkeypatch.setattr("tl_bilinear.recipes.images.runs.train_classifiers", unexpected)
    assert run()[0] == 0


def test_an_interrupt_names_the_folder_of_models_and_leaves_nothing_else(
    run, tmp_path, monkeypatch
):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_bilinear.paper.certification.write_certificate", interrupt)
    status, output = run()
    assert status == 130
    assert f"are kept in {tmp_path / 'out.runs'}" in output.err
    assert [each.name for each in tmp_path.iterdir() if each.name != "idx"] == ["out.runs"] or (
        not (tmp_path / "out").exists()
    )


def test_what_the_checker_refuses_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tl_bilinear.paper.certification.verify_certificate", refused)
    status, output = run()
    assert status == 2
    assert output.err.strip() == "tl-bilinear: lower is not proved"
    assert not (tmp_path / "out").exists()


def refused(*args, **kwargs):
    from tl_bilinear.tensor.certificate_checker import Refused

    raise Refused("lower is not proved")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noises": "-1"}, "noises are standard deviations of at least 0"),
        ({"radii": "-0.5"}, "radii are lengths of at least 0"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 400}, "k must lie between 1 and"),
        ({"data": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_bad_options_are_one_line(run, given, message, monkeypatch):
    if given != {"k": 400}:
        monkeypatch.setattr(training, "cross_entropy", None)  # refused before any work
    status, output = run(**given)
    assert status == 2
    assert message in output.err
    assert len(output.err.strip().splitlines()) == 1


def test_a_folder_of_somebody_else_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tl_bilinear.paper.certification.load_images", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    status, output = run()
    assert status == 2
    assert "thesis.tex" in output.err


def test_from_python_with_a_model_with_few_neurons(idx_folder, tmp_path):  # noqa: F811
    config = CertifyConfig(tmp_path / "out", str(idx_folder), size=8, epochs=2, noises=(0.1,), k=2)
    found = certify(config, progress=False)
    assert found.k == 2
    assert found.proofs.noises == (0.1,)
    assert "accepted by the checker" in str(found)
