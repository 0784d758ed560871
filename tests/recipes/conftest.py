import gzip
import struct

import pytest
import torch

from tests.recipes.stories import prepare_stories
from tl_bilinear.recipes.images import ImageData, TrainingConfig, train_classifier

SIZE = (6, 5)


def write_idx(path, tensor):
    """The IDX format, from its description: magic, sizes, bytes."""
    header = struct.pack(f">{1 + tensor.ndim}I", 0x800 + tensor.ndim, *tensor.shape)
    data = header + tensor.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="package")
def striped():
    """Images whose class is where their bright stripe lies: learnt in a moment, with three classes."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.randint(0, 3, (count,), generator=generator)
        images = 0.2 * torch.rand(count, *SIZE, generator=generator)
        for row in range(2):
            images[torch.arange(count), 2 * labels + row] += 0.7
        return images.flatten(1), labels

    return ImageData(*part(300), *part(100), SIZE, ("a", "b", "c"), "stripes")


@pytest.fixture(scope="package", params=[False, True], ids=["bare", "biased"])
def trained(request, striped):
    config = TrainingConfig(
        size=12,
        bias=request.param,
        noise=0.1,
        weight_decay=0.1,
        epochs=30,
        batch=50,
        learning_rate=0.01,
    )
    return train_classifier(striped, config, progress=False)


@pytest.fixture(scope="package")
def idx_folder(tmp_path_factory, striped):
    folder = tmp_path_factory.mktemp("idx")
    for prefix, images, labels in (
        ("train", striped.train_images, striped.train_labels),
        ("t10k", striped.test_images, striped.test_labels),
    ):
        pixels = (images.reshape(-1, *SIZE) * 255).round()
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="package")
def story_data(tmp_path_factory):
    """Rows of 32 tokens of a vocabulary of 180, from made-up stories."""
    return prepare_stories(tmp_path_factory.mktemp("text"), 300, 180)
