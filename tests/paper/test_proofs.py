"""The study of proofs: each number against a slow, obvious way."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tl_bilinear.paper.nearest import detours, first_change, nearest_images
from tl_bilinear.paper.proofs import ProofsSettings, attacked, classifier, pixel_classifier, proofs
from tl_bilinear.recipes.images import ImageData, Runs, TrainingConfig
from tl_bilinear.tensor import QuadraticForm, adversarial_distances, folded

EDGE = 6
CONFIG = TrainingConfig(size=12, epochs=30, batch=64, noise=0.1)


@pytest.fixture(scope="module")
def data():
    """Four classes of six by six pixels: a row each."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % 4
        images = 0.3 * torch.rand(count, EDGE, EDGE, generator=generator)
        images[torch.arange(count), labels + 1] += 0.6
        return images.flatten(1), labels

    names = ("one", "two", "three", "four")
    return ImageData(*part(600), *part(80), (EDGE, EDGE), names, "rows")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases"])
def model(request, data, runs):
    return runs.train(data, [replace(CONFIG, bias=request.param)])[0].model


def test_the_classifier_in_pixels_is_the_model(model, data):
    with torch.no_grad():
        wide = model.double()(data.test_images.double())
    model.float()
    assert_close(pixel_classifier(model)(data.test_images.double()), wide)
    assert_close(folded(*classifier(model))(data.test_images.double()), wide)


def test_payments_add_up_and_the_nearest_image_is_one(model, data):
    tensor = pixel_classifier(model)
    images = data.test_images[:6].double()
    found = nearest_images(tensor, images, data)
    assert_close((found.nearest - images).norm(dim=1), found.distance)
    assert bool((found.within >= found.distance * (1 - 1e-9)).all())
    for row in range(6):
        weights = torch.zeros(4, dtype=torch.float64)
        weights[found.predicted[row]], weights[found.rival[row]] = 1, -1
        form = QuadraticForm.of(tensor, weights)
        margin = form(images[row])
        assert abs(float(form(found.nearest[row]))) < 1e-9 * float(margin)
        # All eigenvectors and the linear part together pay the whole margin.
        values, basis = torch.linalg.eigh(form.interaction.dense())
        paid = values * ((basis.T @ images[row]) ** 2 - (basis.T @ found.nearest[row]) ** 2)
        linear = form.linear @ (images[row] - found.nearest[row])
        assert_close(paid.sum() + linear, margin)
        assert_close(found.payments[row], (paid / margin).sort(descending=True).values[:3])


def test_along_a_line_the_first_change_is_where_a_fine_scan_finds_it(model, data):
    tensor = pixel_classifier(model)
    x = data.test_images[:12].double()
    predicted = tensor(x).argmax(1)
    directions = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    directions /= directions.norm(dim=1, keepdim=True)
    found = first_change(tensor, x, predicted, directions)
    steps = torch.linspace(0, 12, 24001, dtype=x.dtype)
    for row in range(len(x)):
        answers = tensor(x[row] + steps[:, None] * directions[row]).argmax(1)
        changed = (answers != predicted[row]).nonzero()
        if len(changed):
            first = int(changed[0])
            assert steps[first - 1] <= found[row] <= steps[first]
        else:
            assert found[row] > 11.999


def test_no_direction_beats_the_exact_distance(model, data):
    tensor = pixel_classifier(model)
    images = data.test_images.double()
    found = adversarial_distances(tensor, images)
    result = detours(model, tensor, images, found, label=1)
    table = result.to_pandas()
    assert list(table["direction"]) == ["steepest", "adversarial mask", "random"]
    assert (table["over the minimum"] >= 1 - 1e-9).all()
    assert table["over the minimum"][0] < table["over the minimum"][2]
    mine = found.predicted == 1
    taken = adversarial_distances(tensor, images[mine])
    with pytest.raises(ValueError, match="every image is taken for class 1"):
        detours(model, tensor, images[mine], taken, label=1)


def test_the_study(data, runs):
    settings = ProofsSettings(
        CONFIG, noises=(0.0, 0.4), radii=(0.0, 0.3, 0.6), kept=(2, 8, 500), attacked=20, examples=3
    )
    result = proofs(data, settings, runs=runs)
    assert result.proved.shape == (2, 3)
    assert_close(result.proved[:, 0], result.accuracy)
    assert bool((result.proved.diff(dim=1) <= 0).all())
    assert bool((result.attacked >= result.proved_attacked - 1e-12).all())
    assert bool(result.between.diagonal().isnan().all())
    found = result.known["Euclidean"]
    assert found.k.tolist() == [2, 8]
    assert float(found.proved[-1]) <= float(result.accuracy[-1])
    assert result.nearest.predicted.unique().shape == (3,)
    tensor = pixel_classifier(runs.train(data, [CONFIG])[0].model)
    assert (
        attacked(tensor, data.test_images[:5].double(), data.test_labels[:5], [50.0]).item() == 0.0
    )


def test_wrong_settings_are_refused(data):
    with pytest.raises(ValueError, match="give at least one"):
        proofs(data, ProofsSettings(CONFIG, noises=()))
    with pytest.raises(ValueError, match="counts of at least 1"):
        proofs(data, ProofsSettings(CONFIG, attacked=0))
    with pytest.raises(ValueError, match="a radius is a length"):
        proofs(data, ProofsSettings(CONFIG, noises=(0.1,), radii=(-1.0,)))
