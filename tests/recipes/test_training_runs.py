"""Training several models at once, augmentations, and the folder of finished runs."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from tests.recipes.conftest import SIZE
from tl_bilinear.recipes.images import TrainingConfig, runs, train_classifier, train_classifiers
from tl_bilinear.recipes.images.augment import (
    Blur,
    Perlin,
    Rotation,
    SaltAndPepper,
    Translation,
)
from tl_bilinear.recipes.images.runs import Runs, run_key
from tl_bilinear.recipes.images.training import config_for

FAST = TrainingConfig(size=6, noise=0.1, epochs=3, batch=50, learning_rate=0.01)
SQUARE = (28, 28)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


# ---------------------------------------------------------------------- together


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_is_the_same_in_any_company(striped, bias):
    configs = [
        dataclasses.replace(FAST, bias=bias, seed=1, weight_decay=0.0),
        dataclasses.replace(FAST, bias=bias, seed=2, noise=0.0, dropout=0.3),
        dataclasses.replace(FAST, bias=bias, seed=3, augment=(SaltAndPepper(0.1),)),
        dataclasses.replace(FAST, bias=bias, seed=4, activation_noise=0.2, learning_rate=0.02),
    ]
    together = train_classifiers(striped, configs, progress=False)
    for config, result in zip(configs, together, strict=True):
        alone = train_classifier(striped, config, progress=False)
        assert result.config == config
        assert_close(weights(result), weights(alone), rtol=1e-4, atol=1e-5)
        assert result.accuracies == alone.accuracies
        assert_close(result.losses, alone.losses, rtol=1e-4, atol=1e-5)
    assert (weights(together[0]) - weights(together[3])).abs().max() > 0.01


def test_it_is_the_plain_loop(striped):
    """A DataLoader-like loop over the model itself, with torch's own optimiser and schedule."""
    config = dataclasses.replace(FAST, noise=0.0, batch=70, weight_decay=0.3)
    draws = generator(config.seed)
    from tl_bilinear.recipes.images import ImageClassifier

    model = ImageClassifier(striped.pixels, 3, config.size, False, draws)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    for _ in range(config.epochs):
        for index in torch.randperm(300, generator=draws).split(70):  # the last batch is short
            logits = model(striped.train_images[index])
            loss = torch.nn.functional.cross_entropy(logits, striped.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    found = train_classifier(striped, config, progress=False)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_close(weights(found), expected, rtol=1e-4, atol=1e-5)


def test_shapes_that_differ_do_not_train_together(striped):
    other = dataclasses.replace(FAST, size=7)
    with pytest.raises(
        ValueError, match=r"must agree in \(size, bias, batch, epochs, depth\), got .*6.*7"
    ):
        train_classifiers(striped, [FAST, other])
    assert train_classifiers(striped, []) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout is a share of the embedding below 1, got 1.0"),
        ({"activation_noise": -1.0}, "activation_noise must not be negative"),
    ],
)
def test_settings_inside_the_model_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


# ---------------------------------------------------------------------- augmentations


@pytest.mark.parametrize(
    "augmentation", [SaltAndPepper(0.3), Perlin(0.4), Translation(3), Rotation(30), Blur(1.0)]
)
def test_augmentations_repeat_and_keep_shape(augmentation):
    if isinstance(augmentation, Translation | Rotation | Blur):
        pytest.importorskip("kornia")
    images = torch.rand(20, 784, generator=generator())
    state = torch.get_rng_state()
    first, again = (augmentation(images.clone(), SQUARE, generator(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == images.shape
    assert not torch.equal(first, images)
    if not isinstance(augmentation, Blur):  # which is the same for every draw
        assert not torch.equal(first, augmentation(images.clone(), SQUARE, generator(2)))


def test_salt_and_pepper_changes_its_share():
    images = torch.full((200, 784), 0.5)
    found = SaltAndPepper(0.3)(images, SQUARE, generator())
    for value, share in ((0.0, 0.15), (0.5, 0.7), (1.0, 0.15)):
        assert float((found == value).float().mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("size", "cells"), [((28, 28), 4), ((12, 10), 2), ((9, 20), 1)])
def test_perlin_noise_is_smooth_and_of_its_std(size, cells):
    noise = Perlin(0.7, cells)(torch.zeros(4000, math.prod(size)), size, generator())
    assert float(noise.std()) == pytest.approx(0.7, rel=0.03)
    rows = noise.reshape(-1, *size)
    neighbours = torch.corrcoef(torch.stack([rows[:, 0, 1:].flatten(), rows[:, 0, :-1].flatten()]))
    assert float(neighbours[0, 1]) > 0.6


def test_perlin_noise_is_the_textbook_one():
    """One image, from the definition: corner gradients, quintic fade, bilinear interpolation."""
    from tl_bilinear.recipes.images.augment import _perlin_basis

    size, cells = (8, 6), 2
    basis = _perlin_basis(size, cells).double()
    angles = torch.rand(9, generator=generator()).double() * 6.28
    found = torch.cat([angles.cos(), angles.sin()]) @ basis
    gradient = torch.stack([angles.sin(), angles.cos()], -1).reshape(3, 3, 2)  # (y, x)

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    def offset(*values):
        return torch.tensor(values, dtype=torch.float64)

    expected = torch.zeros(size, dtype=torch.float64)
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = (i + 0.5) / size[0] * cells, (j + 0.5) / size[1] * cells
            a, b = int(y), int(x)
            u, v = fade(y - a), fade(x - b)
            corner = [
                [float(gradient[a + s, b + t] @ offset(y - a - s, x - b - t)) for t in (0, 1)]
                for s in (0, 1)
            ]
            low = corner[0][0] * (1 - v) + corner[0][1] * v
            high = corner[1][0] * (1 - v) + corner[1][1] * v
            expected[i, j] = low * (1 - u) + high * u
    ratio = found / expected.flatten()
    assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-5, atol=0)


def test_geometry():
    pytest.importorskip("kornia")
    image = torch.zeros(28, 28)
    image[13:15, 10:18] = 1
    flat = image.flatten()[None].repeat(300, 1)
    rows, columns = torch.meshgrid(*[torch.arange(28.0)] * 2, indexing="ij")

    def centres(images):
        mass = images.reshape(-1, 28, 28)
        total = mass.sum((1, 2))
        return [(mass * where).sum((1, 2)) / total for where in (rows, columns)]

    moved = Translation(4)(flat, SQUARE, generator())
    for centre in centres(moved):
        assert 3.5 < float((centre - 13.5).abs().max()) < 4.1
    assert_close(moved.sum(1), flat.sum(1), rtol=1e-4, atol=1e-4)
    turned = Rotation(90)(flat, SQUARE, generator())
    assert max(float((centre - 13.5).abs().max()) for centre in centres(turned)) < 0.6
    upright = turned.reshape(-1, 28, 28).sum(2).gt(0.5).sum(1)
    assert upright.min() <= 3
    assert upright.max() >= 7
    blurred = Blur(1.5)(flat, SQUARE, generator())
    assert float(blurred.max()) < 0.7
    assert_close(blurred.sum(1), flat.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SaltAndPepper(1.5),
            "share must be a share of the pixels, between 0 and 1, got 1.5",
        ),
        (lambda: Perlin(-1), "std must be a standard deviation of at least 0, got -1"),
        (lambda: Perlin(1, 0), "cells must be at least 1 cell a side, got 0"),
        (lambda: Translation(-2), "pixels must be a shift of at least 0 pixels"),
        (lambda: Rotation(-2), "degrees must be an angle of at least 0 degrees"),
        (lambda: Blur(0), "sigma must be a width above 0 pixels, got 0"),
    ],
)
def test_augmentations_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_kornia(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match=r"come from kornia: pip install 'tl-bilinear\[vision\]'"):
        Blur(1.0)(torch.zeros(1, 784), SQUARE, generator())


# ---------------------------------------------------------------------- kept runs


@pytest.fixture
def counted(monkeypatch):
    """The configurations that were really trained."""
    trained = []

    def counting(data, configs, **options):
        trained.extend(configs)
        return train_classifiers(data, configs, **options)

    monkeypatch.setattr(runs, "train_classifiers", counting)
    return trained


def configs_of(count, **changes):
    return [dataclasses.replace(FAST, seed=seed, **changes) for seed in range(count)]


def test_finished_runs_are_read(striped, tmp_path, counted):
    kept = Runs(tmp_path / "a" / "runs", progress=False)
    first = kept.train(striped, configs_of(2, bias=True))
    more = kept.train(striped, configs_of(3, bias=True)[::-1])
    assert [config.seed for config in counted] == [0, 1, 2]
    assert [result.config.seed for result in more] == [2, 1, 0]
    for old, new in zip(first, more[:0:-1], strict=True):
        assert torch.equal(weights(old), weights(new))
        assert (old.losses, old.accuracies) == (new.losses, new.accuracies)
        assert not new.model.training
    assert len(list(kept.folder.iterdir())) == 3
    # One setting twice is one model.
    assert kept.train(striped, configs_of(1, bias=True) * 2)[1].config.seed == 0
    assert len(counted) == 3


def test_without_a_folder_nothing_is_kept(striped, tmp_path, monkeypatch, counted):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        Runs(progress=False).train(striped, configs_of(1))
    assert len(counted) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_belongs_to_its_data_settings_and_recipe(striped, monkeypatch):
    keys = {run_key(striped, FAST)}
    other = striped.train_images.clone()
    other[0, 0] += 1e-3
    for field, value in (
        ("train_images", other),
        ("test_labels", striped.test_labels.flip(0)),
        ("size", SIZE[::-1]),
    ):
        keys.add(run_key(dataclasses.replace(striped, **{field: value}), FAST))
    for changes in (
        {"seed": 1}, {"noise": 0.2}, {"augment": (Blur(1.0),)}, {"augment": (Blur(1.5),)},
        {"augment": (Rotation(1.0),)}, {"augment": (Translation(1.0),)},
    ):  # fmt: skip
        keys.add(run_key(striped, dataclasses.replace(FAST, **changes)))
    monkeypatch.setattr(runs, "RECIPE", 2)
    keys.add(run_key(striped, FAST))
    assert len(keys) == 11
    assert run_key(dataclasses.replace(striped, name="renamed"), FAST) in keys


def test_settings_follow_the_number_of_images(striped):
    found = config_for(striped, noise=0.2, seed=None)
    assert found == dataclasses.replace(TrainingConfig(), noise=0.2, batch=256, epochs=60)
    long = dataclasses.replace(FAST, epochs=100)
    assert config_for(striped, long, size=9) == dataclasses.replace(long, size=9, batch=256)
    assert config_for(striped, long, epochs=2, batch=7).shape == (6, False, 7, 2, 1)
    images, labels = torch.zeros(20_000, 30), torch.zeros(20_000, dtype=torch.int64)
    many = dataclasses.replace(striped, train_images=images, train_labels=labels)
    assert config_for(many, long) == long


def test_damaged_and_foreign_files_are_trained_again(striped, tmp_path, counted):
    kept = Runs(tmp_path, progress=False)
    (expected,) = kept.train(striped, [FAST])
    path = kept.path(striped, FAST)
    path.write_bytes(path.read_bytes()[:-40])
    assert torch.equal(weights(kept.train(striped, [FAST])[0]), weights(expected))
    # The weights of another run under this one's name are not taken for it.
    other = dataclasses.replace(FAST, seed=9)
    kept.train(striped, [other])
    kept.path(striped, other).replace(path)
    assert torch.equal(weights(kept.train(striped, [FAST])[0]), weights(expected))
    assert [config.seed for config in counted] == [0, 0, 9, 0]


def test_an_interrupted_sweep_goes_on(striped, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(runs, "_ALONE", 0)  # every model on its own
    kept = Runs(tmp_path, progress=False)
    counting = runs.train_classifiers

    def interrupted(data, configs, **options):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return counting(data, configs, **options)

    monkeypatch.setattr(runs, "train_classifiers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.train(striped, configs_of(4))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(runs, "train_classifiers", counting)
    kept.train(striped, configs_of(4))
    assert [config.seed for config in counted] == [0, 1, 2, 3]


def test_small_models_train_in_one_pass(striped, monkeypatch):
    groups = []

    def grouping(data, configs, **options):
        groups.append([(config.size, config.seed) for config in configs])
        return train_classifiers(data, configs, **options)

    monkeypatch.setattr(runs, "train_classifiers", grouping)
    monkeypatch.setattr(runs, "_ALONE", 6 * 50)
    Runs(progress=False).train(striped, configs_of(2) + configs_of(2, size=7))
    assert groups == [[(6, 0), (6, 1)], [(7, 0)], [(7, 1)]]
