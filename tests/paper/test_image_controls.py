"""A model beside those that could not have learned, and what a reader sees of it."""

import dataclasses
import math
import re

import pytest
import torch

from tests.test_cli import run  # noqa: F401
from tl_bilinear.paper import GallerySettings, QuickstartConfig, studies
from tl_bilinear.paper.certified import certificates, certificates_figure
from tl_bilinear.paper.explanation import contributions_figure, explain
from tl_bilinear.paper.gallery import settings_of
from tl_bilinear.paper.image_controls import (
    KEPT,
    Controls,
    ModelFacts,
    image_controls,
    model_facts,
    shuffled_labels,
)
from tl_bilinear.paper.image_spectra import class_spectra
from tl_bilinear.paper.quickstart_images import image_quickstart
from tl_bilinear.paper.similarity import (
    SimilaritySettings,
    seeds_and_sizes,
    similarity_figure,
    similarity_page,
    sizes_truncation_figure,
)
from tl_bilinear.plots import hosvd_figure
from tl_bilinear.recipes.images import Runs, TrainingConfig, load_images, train_classifier
from tl_bilinear.tensor import hosvd

CONFIG = TrainingConfig(size=12, noise=0.1, epochs=6, batch=32, learning_rate=0.01)


@pytest.fixture(scope="module")
def found(striped):
    model = train_classifier(striped, CONFIG, progress=False).model
    return model, image_controls(model, striped, CONFIG, progress=False)


def test_the_facts_by_hand(found, striped):
    model, controls = found
    own = controls.model
    logits = model(striped.test_images).detach()
    right = (logits.argmax(1) == striped.test_labels).float().mean()
    assert own.test_accuracy == pytest.approx(float(right))
    dense = model.tensor().interaction().dense()
    values = torch.linalg.eigvalsh(dense)
    rank = (values.abs().sum(1) ** 2 / values.square().sum(1)).mean()
    assert own.effective_rank == pytest.approx(float(rank), rel=1e-3)
    longest = float(striped.test_images.norm(dim=1).max())
    k = min(KEPT, 12)
    dropped = values.abs().sort(dim=1, descending=True).values[:, k]
    expected = float((longest**2 * dropped / logits.std(0)).max())
    assert own.certificate == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_agreement_is_of_the_first_positive_eigenvectors(found, striped):
    model, controls = found
    other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)
    second = train_classifier(striped, other, progress=False).model
    cosines = []
    for left, right in zip(
        model.tensor().interaction().dense(), second.tensor().interaction().dense(), strict=True
    ):
        cosines.append(
            float((torch.linalg.eigh(left)[1][:, -1] @ torch.linalg.eigh(right)[1][:, -1]).abs())
        )
    assert controls.model.agreement == pytest.approx(sum(cosines) / len(cosines), abs=1e-3)
    assert math.isnan(controls.untrained.agreement)
    assert math.isnan(model_facts(model, striped).agreement)


def test_shuffled_labels_keep_the_shares_and_the_test(striped):
    permuted = shuffled_labels(striped)
    assert torch.equal(permuted.train_labels.sort().values, striped.train_labels.sort().values)
    assert not torch.equal(permuted.train_labels, striped.train_labels)
    assert torch.equal(permuted.test_labels, striped.test_labels)
    assert torch.equal(permuted.train_images, striped.train_images)
    assert permuted.fingerprint != striped.fingerprint


def test_a_model_that_learned_and_one_that_did_not_are_told_apart(found, striped):
    _, controls = found
    assert controls.learned
    assert controls.verdict.startswith("This model learned: of the test images it gets ")
    permuted = shuffled_labels(striped)
    lost = image_quickstart(permuted, CONFIG, progress=False).controls
    assert not lost.learned
    # Three tight classes: luck gets whole classes right, and the page does not call it learning.
    assert "learned nothing about" in lost.verdict or "It is not clear that" in lost.verdict
    assert lost.verdict.endswith("Read nothing into its eigenvectors.")


FACTS = ModelFacts(0.9, 0.8, 10.0, 2.0, 0.9)


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ({}, {}, "Its eigenvectors are the data's, not the seed's"),
        ({"agreement": 0.3}, {}, "as much the seed's as the data's: cosine 0.30 between two seeds"),
        ({"test_accuracy": 0.13, "train_accuracy": 0.15}, {}, "learned nothing about the classes"),
        ({"test_accuracy": 0.15, "train_accuracy": 0.15}, {}, "This model learned"),
        # No better on training images than shuffled labels are, which luck on the test does not change.
        (
            {"test_accuracy": 0.15, "train_accuracy": 0.15},
            {"train_accuracy": 0.14},
            "It is not clear that this model learned anything",
        ),
        ({"test_accuracy": 0.3, "train_accuracy": 0.99}, {}, "This model learned"),
        ({"test_accuracy": 0.8, "train_accuracy": 0.3}, {}, "It is not clear that this model"),
        ({}, {"train_accuracy": 0.9}, "This model learned"),
    ],
)
def test_the_sentence_of_judgement(own, other, said):
    shuffled = dataclasses.replace(
        FACTS, **{"train_accuracy": 0.1, "test_accuracy": 0.1, "agreement": 0.4, **other}
    )
    found = Controls(dataclasses.replace(FACTS, **own), shuffled, FACTS, 0.1, 1000)
    assert said in found.verdict


def test_a_reader_of_the_report_sees_the_difference(run, idx_folder, tmp_path):  # noqa: F811
    fast = ["--epochs", 6, "--size", 12, "--noise", 0.1, "--batch", 32, "--no-language", "--quiet"]
    said = {}
    for name, more in (("real", []), ("shuffled", ["--shuffle-labels"])):
        status, output = run(
            "quickstart", "--data", idx_folder, "--out", tmp_path / name, *fast, *more
        )
        assert status == 0
        page = (tmp_path / name / "report.html").read_text()
        said[name] = re.search(r"<p class=verdict><strong>(.*?)</strong>", page, re.DOTALL)[1]
        assert "Did it learn?" in output.out
        for column in ("this model", "trained on shuffled labels", "untrained", "chance"):
            assert column in page
    assert "Read nothing into its eigenvectors." in said["shuffled"]
    assert said["real"].startswith("This model learned:")
    assert "training labels shuffled" in page
    assert "digits" not in page[page.index("<h1>") :].split("<h2>")[0]
    status, _ = run(
        "quickstart", "--data", idx_folder, "--out", tmp_path / "none", *fast, "--no-controls"
    )
    assert status == 0
    assert "class=verdict" not in (tmp_path / "none" / "report.html").read_text()


# ---------------------------------------------------------------------- what pages said wrongly


def test_classes_of_a_folder_have_names(idx_folder, tmp_path, striped):
    n = len(striped.classes)
    names = tuple(f"kind {i}" for i in range(n))
    assert load_images(idx_folder, classes=names).classes == names
    assert load_images(idx_folder).classes == tuple(map(str, range(n)))
    for path in idx_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    assert load_images(tmp_path).classes == names
    assert load_images(tmp_path, classes=[f"c{i}" for i in range(n)]).classes[0] == "c0"
    with pytest.raises(ValueError, match=rf"classes must name the {n} classes of "):
        load_images(idx_folder, classes=["one"])
    with pytest.raises(ValueError, match="classes names two classes alike"):
        load_images(idx_folder, classes=["one"] * n)
    (tmp_path / "classes.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"classes\.txt must name"):
        load_images(tmp_path)


def test_a_vector_has_one_sign_in_both_spaces(found):
    model, _ = found
    spectra = class_spectra(model)
    cosines = spectra.mapped.vectors @ spectra.pixel.vectors.mT
    nearest = cosines.gather(-1, cosines.abs().argmax(-1, keepdim=True))
    assert (nearest >= 0).all()
    mapped = model.to_pixels(spectra.embedding.vectors)
    torch.testing.assert_close(spectra.mapped.vectors, mapped)


def test_the_certificate_drawn_holds_for_every_class(found, striped):
    model, _ = found
    result = certificates(model, striped, kept=[1, 3])
    images = certificates(model, striped.test_images, kept=[1, 3])
    torch.testing.assert_close(result.bound, images.bound)
    bound, worst, mean, spread = certificates_figure(result).data
    assert "worst class" in bound.name
    assert list(bound.y) == pytest.approx(result.bound.amax(0).tolist(), rel=1e-5)
    assert list(worst.y) == pytest.approx(result.worst.amax(0).tolist(), rel=1e-5)
    assert list(mean.y) == pytest.approx(result.mean.mean(0).tolist(), rel=1e-5)
    assert "mean over classes" in spread.name


@pytest.mark.parametrize("sizes", [(8,), (8, 12)])
def test_no_panel_is_empty_and_none_is_clipped(striped, sizes):
    settings = SimilaritySettings(CONFIG, seeds=2, sizes=sizes, k=2)
    runs = Runs(progress=False)
    result = seeds_and_sizes(striped, settings, runs=runs)
    figure = similarity_figure(result)
    drawn = {trace.xaxis or "x" for trace in figure.data}
    assert drawn == {axis.plotly_name.replace("axis", "") for axis in figure.select_xaxes()}
    assert all(axis.title.text for axis in figure.select_yaxes())
    lost = sizes_truncation_figure(result)
    assert all(axis.range is None for axis in lost.select_yaxes())
    text = similarity_page(striped, settings, runs).text
    assert "Two seeds make one pair" in text
    assert "Shaded: the middle" not in text


def test_the_space_of_the_paper_is_an_option(striped):
    chosen = GallerySettings(space="embedding")
    for name in ("similarity", "explanation"):
        assert settings_of(studies()[name], chosen, striped).space == "embedding"
        assert settings_of(studies()[name], GallerySettings(), striped).space == "pixels"


def test_the_help_names_every_study(run):  # noqa: F811
    status, output = run("images", "--help")
    assert status == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", output.out).split())
    assert ", ".join(studies()) in text
    assert QuickstartConfig().controls


def test_axes_and_colours_are_explained(found, striped):
    model, _ = found
    colours = hosvd_figure(hosvd(model.tensor()), names=striped.classes)
    (grid,) = [trace for trace in colours.data if trace.type == "heatmap"]
    assert grid.showscale is not False
    parts = contributions_figure(explain(model, striped.test_images[0], striped.size))
    assert [axis.title.text for axis in parts.select_yaxes()] == ["λ (v·x)²", "logit"]
