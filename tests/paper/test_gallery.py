"""Every study by name, and the gallery of them."""
# ruff: noqa: F811  the fixture `run` is imported

import dataclasses
import json
import re

import pandas as pd
import pytest
import torch

from tests.test_cli import run  # noqa: F401
from tl_bilinear.paper import (
    GallerySettings,
    Page,
    gallery,
    make,
    make_gallery,
    register,
    studies,
    target,
)
from tl_bilinear.paper.gallery import settings_of
from tl_bilinear.paper.target import TargetSettings
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig, training

EDGE = 12
CONFIG = TrainingConfig(
    size=40, noise=0.1, weight_decay=0.1, epochs=4, batch=100, learning_rate=0.01
)
SMALL = {
    "eigenvectors": {"config": CONFIG},
    "hosvd": {"config": CONFIG},
    "regularisation": {"config": CONFIG},
    "similarity": {"config": CONFIG, "sizes": (30, 40), "seeds": 2},
    "target": {
        "config": dataclasses.replace(CONFIG, bias=True, epochs=3),
        "seeds": 2,
        "threshold": 0.9,
    },
    "adversarial": {"config": CONFIG},
    "explanation": {"config": CONFIG},
    "toy": {"steps": 30},
    "sparsity": {"config": CONFIG},
    "neurons": {"config": CONFIG},
    "certificates": {"config": CONFIG},
    "proofs": {"config": CONFIG, "noises": (0.1, 0.4), "kept": (4, 16), "attacked": 30},
    "across-layers": {"config": dataclasses.replace(CONFIG, depth=3), "kept": (2, 8)},
}


@pytest.fixture(scope="module")
def bars():
    """Ten classes of twelve by twelve pixels, black at the edge, as the studies of digits need them."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % 10
        images = torch.zeros(count, EDGE, EDGE)
        images[:, 1:-1, 1:-1] = 0.2 * torch.rand(count, EDGE - 2, EDGE - 2, generator=generator)
        images[torch.arange(count), labels + 1, 1:-1] += 0.5
        images[torch.arange(count), 1:-1, labels // 2 + 1] += 0.2
        return images.flatten(1), labels

    return ImageData(*part(400), *part(100), (EDGE, EDGE), tuple("0123456789"), "bars")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture(scope="module")
def small(bars):
    """Settings of every study by name."""
    settings = {name: studies()[name].settings(**given) for name, given in SMALL.items()}
    other = dataclasses.replace(bars, name="other bars")
    return settings | {"eigenvectors": dataclasses.replace(settings["eigenvectors"], fashion=other)}


def test_the_studies():
    assert list(studies()) == list(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_every_study(bars, small, kept, name):
    if name == "regularisation":
        pytest.importorskip("kornia")
    found = make(name, bars, small[name], runs=kept)
    assert found.title
    assert found.text.endswith(".")
    assert found.plots
    for plot in found.plots:
        assert plot.layout.width <= 1000
        assert re.search(r'"type":"(image|scatter|bar|heatmap)"', plot.to_json())
    for table in found.tables.values():
        assert len(table)
        assert not table.isna().all().any()
    json.dumps(found.summary)


def test_studies_share_trained_models(bars, small, kept, monkeypatch):
    make("certificates", bars, small["certificates"], runs=kept)

    def unexpected(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("tl_bilinear.recipes.images.runs.train_classifiers", unexpected)
    make("certificates", bars, small["certificates"], runs=kept)


@pytest.fixture
def offered(bars, monkeypatch, tmp_path):
    """A gallery of the bars, its settings given as changes."""
    monkeypatch.setattr(gallery, "load_images", lambda source, classes: bars)

    def offered(*names, **changes):
        given = {"size": 8, "epochs": 2, "runs": tmp_path / "runs", "studies": names}
        settings = GallerySettings(out=tmp_path / "out", **given | changes)
        lines = []
        return make_gallery(settings, report=lines.append, progress=False), lines

    return offered


def test_the_gallery(offered, tmp_path):
    names = ["certificates", "toy"]
    made, lines = offered(*names)
    assert [study.name for study in made] == names
    assert [line.split(":")[0] for line in lines] == names
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "certificates, classes.csv",
        "gallery.html",
        "summary.json",
        "tl_bilinear.json",
        "toy, outputs.csv",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seconds"] == {study.name: study.seconds for study in made}
    assert summary["studies"]["toy"].keys() == made[1].page.summary.keys()
    table = pd.read_csv(out / "certificates, classes.csv")
    assert (table["worst"] <= table["bound"]).all()
    page = (out / "gallery.html").read_text()
    page = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # plotly.js itself
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", page)
    assert [page.index(f'id="{name}"') for name in names] == sorted(
        page.index(f'id="{name}"') for name in names
    )
    assert "<code>best_error</code>" in page
    # A gallery is replaced by the next, anything else is not.
    offered("neurons")
    assert not (out / "certificates, classes.csv").exists()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        offered("neurons")


def test_every_study_is_made_with_the_settings_that_the_page_states(offered, tmp_path, monkeypatch):
    """The hidden target too, whose defaults are its own."""
    labelled = target.target_data  # the bars are more alike than digits
    monkeypatch.setattr(target, "target_data", lambda data, image, _: labelled(data, image, 0.9))
    made, _ = offered("target", "certificates", noise=0.2, seeds=2)
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    page = (tmp_path / "out" / "gallery.html").read_text()
    for study in made:
        config = study.settings.config
        assert (config.size, config.noise, config.epochs) == (8, 0.2, 2)
        assert stored[study.name]["config"]["size"] == 8
        assert study.words.startswith("Size 8, input noise 0.2, weight decay 1, 2 epochs,")
        assert study.words in page
    assert stored["target"]["seeds"] == 2
    assert stored["target"]["config"]["bias"] is True
    assert "with biases; seeds 2; threshold 0.4; k 6." in page


def test_settings_that_are_not_given_are_the_studies_own(bars):
    found = settings_of(studies()["target"], GallerySettings(), bars)
    assert found == TargetSettings(dataclasses.replace(TargetSettings().config, batch=256), 3)
    similarity = settings_of(studies()["similarity"], GallerySettings(sizes=(7, 9), size=5), bars)
    assert (similarity.sizes, similarity.config.epochs) == ((7, 9), 60)
    assert settings_of(studies()["eigenvectors"], GallerySettings(), bars, bars).fashion is bars


def test_small_sizes_are_compared_with_what_they_have(bars, kept):
    settings = studies()["similarity"].settings(CONFIG, sizes=(12, 9), seeds=2)
    table = make("similarity", bars, settings, runs=kept).tables["truncation"]
    assert table["eigenvectors"].tolist() == [1, 2, 3, 5] * 2


def test_an_interrupt_names_the_folder_of_trained_models(offered, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "cross_entropy", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"are kept in {tmp_path / 'runs'}"):
        offered("hosvd")
    assert not (tmp_path / "out").exists()


def test_studies_that_do_not_exist(bars, offered):
    with pytest.raises(ValueError, match="no study fig2; there are eigenvectors, hosvd"):
        make("fig2", bars)
    with pytest.raises(ValueError, match="no study fig2"):
        offered("toy", "fig2")
    with pytest.raises(TypeError, match="settings of toy are ToySettings, got TargetSettings"):
        make("toy", bars, TargetSettings())


def test_a_study_of_ones_own(bars, monkeypatch):
    from tl_bilinear.paper import registry

    monkeypatch.setattr(registry, "_STUDIES", dict(registry._STUDIES))

    @dataclasses.dataclass(frozen=True)
    class CountSettings:
        label: int = 5

    @register("count", CountSettings)
    def count_page(data, settings, runs):
        count = int((data.train_labels == settings.label).sum())
        return Page("Count", "How many.", [], summary={"count": count})

    assert make("count", bars).summary == {"count": 40}
    with pytest.raises(ValueError, match="a study named 'count' already"):
        register("count", CountSettings)
    needy = dataclasses.make_dataclass("Needy", [("k", int)])
    with pytest.raises(ValueError, match=r"Needy\.k needs a default"):
        register("needy", needy)


# ---------------------------------------------------------------------- the command


def test_the_command(run, idx_folder, tmp_path):
    out = tmp_path / "out"
    given = [
        "images",
        "--data",
        idx_folder,
        "--out",
        out,
        "--studies",
        "certificates",
        "--size",
        8,
        "--quiet",
    ]
    status, output = run(*given)
    assert status == 0
    assert re.search(r"certificates: \d+\.\d s\n1 studies in \d+ s", output.out)
    assert (out / "gallery.html").is_file()
    assert len(list((tmp_path / "out.runs").iterdir())) == 1
    elsewhere = tmp_path / "elsewhere"
    assert run(*given, "--runs", elsewhere, "--epochs", 1)[0] == 0
    assert len(list(elsewhere.iterdir())) == 1


def test_ctrl_c_keeps_what_was_trained(run, idx_folder, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "cross_entropy", interrupt)
    status, output = run(
        "images", "--data", idx_folder, "--out", tmp_path / "out", "--quiet", "--studies", "hosvd"
    )
    assert status == 130
    kept = tmp_path / "out.runs"
    assert output.err.strip() == f"tl-bilinear: interrupted; trained models are kept in {kept}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--studies", "fig2"], "no study fig2; there are"),
        (
            ["--sizes", "small,large"],
            'Invalid value for --sizes: unable to convert "small" into int.',
        ),
        (["--fashion", "/no/such"], "no such folder of images"),
    ],
)
def test_bad_input(run, idx_folder, tmp_path, arguments, message):
    status, output = run(
        "images", "--data", idx_folder, "--out", tmp_path / "out", "--quiet", *arguments
    )
    assert status == 2
    assert message in output.err
    assert list(tmp_path.iterdir()) == []
