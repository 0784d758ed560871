"""What the studies share: eigenpairs of an image model in two spaces, and truncation."""

import pytest
import torch
from torch.testing import assert_close

from tl_bilinear.paper.image_spectra import class_spectra, like_nearest, truncate, truncation_figure
from tl_bilinear.recipes.images import TrainingConfig, load_images, train_classifier


def test_the_two_spaces(trained):
    spectra = class_spectra(trained.model)
    identity = torch.eye(30).expand(3, 30, 30)
    assert_close(spectra.pixel.vectors @ spectra.pixel.vectors.mT, identity, rtol=0, atol=1e-4)
    # Embedding-space eigenvectors are orthonormal there, and neither unit nor orthogonal as images.
    vectors = spectra.embedding.vectors
    assert_close(vectors @ vectors.mT, torch.eye(12).expand(3, 12, 12), rtol=0, atol=1e-4)
    images = spectra.images("embedding").vectors
    gram = images @ images.mT
    assert (gram - torch.eye(12)).abs().max() > 0.1
    # An image is multiplied with them as its embedding is with the vectors.
    x = torch.rand(4, 30)
    embedded = x @ trained.model.embed.weight.T
    assert_close(images @ x.T, vectors @ embedded.T.detach(), rtol=1e-4, atol=1e-5)
    assert spectra.of("pixels") is spectra.pixel


def test_truncation(trained, striped):
    spectra = class_spectra(trained.model)
    args = (striped.test_images, striped.test_labels)
    for space, all_pairs in (("pixels", 30), ("embedding", 12)):
        found = truncate(trained.model, spectra.of(space), *args, (1, 3, all_pairs))
        assert found.accuracy[2] == pytest.approx(trained.accuracy, abs=0.011)
        assert found.whole == trained.accuracy
        assert found.to_pandas()["lost"].tolist() == [found.whole - a for a in found.accuracy]
    # By hand, for one k: the forms rebuilt from their k largest pairs.
    forms = spectra.pixel.top(3).dense()
    _, linear, constant = trained.model.tensor().parts()(args[0])
    logits = torch.einsum("ni,aij,nj->na", args[0], forms, args[0]) + linear + constant
    by_hand = float((logits.argmax(-1) == args[1]).float().mean())
    found = truncate(trained.model, spectra.pixel, *args, (3,))
    assert found.accuracy == (by_hand,)
    assert list(truncation_figure(found).data[0].y) == pytest.approx([by_hand])
    with pytest.raises(ValueError, match="kept must lie between 1 and 30"):
        truncate(trained.model, spectra.pixel, *args, (31,))


@pytest.mark.shared
@pytest.mark.slow
def test_full_mnist_reaches_the_papers_accuracy(shared_data):
    data = load_images(shared_data / "mnist")
    assert len(data.train_labels) == 60_000
    result = train_classifier(data, TrainingConfig(epochs=5), progress=False)
    assert result.accuracy > 0.9
    spectra = class_spectra(result.model)
    one, twenty = truncate(
        result.model, spectra.pixel, data.test_images, data.test_labels, (1, 20)
    ).accuracy
    assert twenty > result.accuracy - 0.02
    assert one < result.accuracy - 0.1


def test_signs_are_those_of_the_nearest_row():
    others = torch.eye(4)[:3][None]
    rows = torch.tensor([[[0.1, -0.9, 0.0, 0.1], [0.8, 0.0, 0.3, 0.0]]])
    assert like_nearest(rows, others).flatten().tolist() == [-1.0, 1.0]
