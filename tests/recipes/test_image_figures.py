"""Every figure by name, the gallery, and the pictures in it."""
# ruff: noqa: F811  the fixture `run` is imported

import base64
import dataclasses
import json
import re
import struct
import zlib

import pandas as pd
import pytest
import torch

from tests.recipes.conftest import SIZE
from tests.test_cli import run  # noqa: F401
from tl_bilinear.plots import gallery_figure, mosaic_figure
from tl_bilinear.plots.mosaic import _diverging, _grey
from tl_bilinear.recipes.images import ImageData, TrainingConfig, figures, training
from tl_bilinear.recipes.images.figures import FIGURES, Study, make_figure, write_gallery
from tl_bilinear.recipes.images.runs import Runs

EDGE = 12


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Ten classes of twelve by twelve pixels, black at the edge, as the figures of digits need them."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % 10
        images = torch.zeros(count, EDGE, EDGE)
        images[:, 1:-1, 1:-1] = 0.2 * torch.rand(count, EDGE - 2, EDGE - 2, generator=generator)
        images[torch.arange(count), labels + 1, 1:-1] += 0.5
        images[torch.arange(count), 1:-1, labels // 2 + 1] += 0.2
        return images.flatten(1), labels

    data = ImageData(*part(400), *part(100), (EDGE, EDGE), tuple("0123456789"), "bars")
    config = TrainingConfig(
        size=40, noise=0.1, weight_decay=0.1, epochs=4, batch=100, learning_rate=0.01
    )
    runs = Runs(tmp_path_factory.mktemp("runs"), progress=False)
    other = dataclasses.replace(data, name="other bars")
    return Study(data, config, fashion=other, sizes=(30, 40), seeds=2, runs=runs)


@pytest.fixture(autouse=True)
def short(monkeypatch, study):
    """The task of the paper has a hundred epochs, and gates fifteen hundred steps."""
    quick = dataclasses.replace(figures.TARGET_CONFIG, epochs=3)
    fit = figures.fit_toy
    monkeypatch.setattr(figures, "TARGET_CONFIG", quick)
    monkeypatch.setattr(figures, "fit_toy", lambda task, **k: fit(task, steps=30, **k))
    target = figures.hidden_target
    monkeypatch.setattr(figures, "hidden_target", lambda *a, **k: target(*a, threshold=0.9, **k))
    monkeypatch.setattr(figures, "config_for", lambda data, **k: study.config)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure(study, name):
    if name == "regularisation":
        pytest.importorskip("kornia")
    found = make_figure(name, study)
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


def test_figures_share_trained_models(study, monkeypatch):
    make_figure("certificates", study)

    def unexpected(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("tl_bilinear.recipes.images.runs.train_classifiers", unexpected)
    make_figure("certificates", study)


def test_the_gallery(study, tmp_path):
    lines = []
    names = ["certificates", "toy"]
    seconds = write_gallery(study, tmp_path / "out", names, report=lines.append)
    assert list(seconds) == names
    assert [line.split(":")[0] for line in lines] == names
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "certificates, classes.csv",
        "gallery.html",
        "summary.json",
        "toy, outputs.csv",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seconds"] == seconds
    assert summary["figures"]["toy"].keys() == make_figure("toy", study).summary.keys()
    table = pd.read_csv(out / "certificates, classes.csv")
    assert (table["worst"] <= table["bound"]).all()
    page = (out / "gallery.html").read_text()
    page = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # plotly.js itself
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", page)
    assert [page.index(f'id="{name}"') for name in names] == sorted(
        page.index(f'id="{name}"') for name in names
    )
    # A gallery is replaced by the next, anything else is not.
    write_gallery(study, out, ["toy"])
    assert not (out / "certificates, classes.csv").exists()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        write_gallery(study, out, ["toy"])


def test_figures_that_do_not_exist(study, tmp_path):
    with pytest.raises(ValueError, match="no figure fig2; there are eigenvectors, hosvd"):
        make_figure("fig2", study)
    with pytest.raises(ValueError, match="no figure fig2"):
        write_gallery(study, tmp_path, ["toy", "fig2"])


# ---------------------------------------------------------------------- the command


def test_the_command(run, idx_folder, tmp_path):
    out = tmp_path / "out"
    given = [
        "images",
        "--data",
        idx_folder,
        "--out",
        out,
        "--figures",
        "certificates",
        "--size",
        8,
        "--quiet",
    ]
    status, output = run(*given)
    assert status == 0
    assert re.search(r"certificates: \d+\.\d s\n1 figures in \d+ s", output.out)
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
        "images", "--data", idx_folder, "--out", tmp_path / "out", "--quiet", "--figures", "hosvd"
    )
    assert status == 130
    kept = tmp_path / "out.runs"
    assert output.err.strip() == f"tl-bilinear: interrupted; trained models are kept in {kept}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "fig2"], "no figure fig2; there are"),
        (
            ["--sizes", "small,large"],
            'Invalid value for --sizes: unable to convert "small" into int',
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


# ---------------------------------------------------------------------- pictures


def decoded(figure):
    """The pixels of a mosaic, by another reader of PNG: [height, width, 3]."""
    data = base64.b64decode(figure.data[0].source.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">2I2B", data[16:26])
    assert (depth, kind) == (8, 2)
    place, body = 8, b""
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        name, chunk = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert zlib.crc32(name + chunk) == check
        body += chunk if name == b"IDAT" else b""
        place += 12 + length
    lines = torch.frombuffer(bytearray(zlib.decompress(body)), dtype=torch.uint8)
    lines = lines.reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_a_mosaic_shows_each_image_in_its_place():
    images = torch.zeros(2, 3, 30)
    images[0, 0, 0] = 5.0  # upper left corner, positive
    images[1, 2, 29] = -2.0  # lower right corner, negative
    images[0, 1] = torch.nan
    images[1, 0] = 1.0
    grey = torch.zeros(2, 3, dtype=torch.bool)
    grey[1, 0] = True
    pixels = decoded(mosaic_figure(images, SIZE, grey=grey)).int()
    blue = pixels[..., 2] - pixels[..., 0] > 60
    red = pixels[..., 0] - pixels[..., 2] > 60
    black = pixels.sum(-1) == 0
    height, width, _ = pixels.shape
    zoom = 84 // 6
    assert blue.sum() == red.sum() == zoom**2
    assert black.sum() == 30 * zoom**2
    y, x = blue.nonzero().float().mean(0)
    assert (y < height / 6, x < width / 6) == (True, True)
    y, x = red.nonzero().float().mean(0)
    assert (y > height * 5 / 6, x > width * 5 / 6) == (True, True)
    middle = pixels[: height // 2, width // 3 + 12 : 2 * width // 3 - 12]
    assert (middle == 255).all()  # NaN: empty


def test_colours():
    found = _diverging(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert found.tolist() == [[[103, 0, 31], [255, 255, 255], [5, 48, 97]]]
    assert _diverging(torch.zeros(1, 1)).tolist() == [[[255, 255, 255]]]
    assert _grey(torch.tensor([[0.0, 1.0, 2.0]]))[..., 0].tolist() == [[255, 0, 0]]


def test_the_gallery_orders_by_sign():
    values = torch.tensor([[0.2, -0.5, 3.0, -0.1, 0.0]])
    figure = gallery_figure(values, torch.rand(1, 5, 30), SIZE, ["a"], count=3)
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert texts[:6] == ["+3.00", "+0.20", "", "-0.50", "-0.10", ""]
