"""Hidden neurons added in closed form: against least squares on every product of two inputs."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tensor.test_gated import layer, samples
from tl_bilinear.tensor import approximate

QUIET = {"warn_below": -1e9}


def share_left(found, gated, x):
    y = gated(x)
    return ((found(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item()


def best_quadratic(gated, x):
    """Least squares on 1, x_i and x_i x_j, written out."""

    def features(x):
        i, j = torch.triu_indices(x.shape[1], x.shape[1])
        return torch.cat([x[:, i] * x[:, j], x, torch.ones_like(x[:, :1])], 1)

    weights = torch.linalg.lstsq(features(x), gated(x)).solution
    return lambda x: features(x) @ weights


def test_each_neuron_added_leaves_less_until_the_best_quadratic_function():
    gated, x = layer(d_in=6, h=8, d_out=5), samples(4000, 6)
    used, test = x[:3200], x[3200:]
    left = [
        share_left(approximate(gated, x, extra=extra, **QUIET).tensor, gated, used)
        for extra in (0, 2, 6, 30)
    ]
    assert left == sorted(left, reverse=True)
    assert left[2] < 0.75 * left[0]
    best = share_left(best_quadratic(gated, used), gated, used)
    assert best * (1 - 1e-9) <= left[3] <= 1.05 * best
    found = approximate(gated, x, extra=30, **QUIET)
    assert found.fidelity.overall == pytest.approx(1 - share_left(found.tensor, gated, test))
    assert "Approximation(6 -> 44 -> 5: " in repr(found)


def test_a_quadratic_layer_is_met_exactly():
    """Squares along other directions than the layer's own are found: here it has no use for its own."""
    draw = torch.Generator().manual_seed(0)
    along = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    out = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    gated, x = layer(d_in=6, h=2, d_out=4), samples(2000, 6)

    def square(x):
        return (x @ along.T).square() @ out.T

    from tl_bilinear.tensor.widened import widened

    start = approximate(gated, x, **QUIET).tensor
    wide = widened(square, start, x, torch.ones(2000).double(), 24)
    assert share_left(wide, square, x) < 1e-6
    assert_close(wide.left[:2], start.left)
    assert wide.d_hidden == 2 + 6 + 24
    assert not wide.left[2:8].any()  # the linear ones
    assert_close(wide.out[:, 2:].norm(dim=0), wide.out[:, :2].norm(dim=0).median().expand(30))


def test_inputs_without_weight_do_not_count():
    gated, x = layer(d_in=6, h=8), samples(1000, 6)
    weight = (torch.arange(1000) < 500) * 1.0
    far = x.clone()
    far[500:800] *= 100
    one, other = (
        approximate(gated, some, weights=weight, extra=5, **QUIET).tensor for some in (x, far)
    )
    assert_close(one.out, other.out)


def test_what_cannot_be_added():
    gated, x = layer(), samples(500, 5)
    with pytest.raises(ValueError, match=r"extra must lie between 1 and 20 \(neurons to add\)"):
        approximate(gated, x, extra=21)
    with pytest.raises(ValueError, match="extra neurons are found on samples"):
        approximate(gated, (x.mean(0), torch.cov(x.T)), extra=3)
    with pytest.raises(MemoryError, match="the Gram matrix of 15 neurons"):
        approximate(gated, x, extra=3, fit="neuron", max_bytes=1000)


def test_float32():
    gated, x = layer(d_in=6, h=8, dtype=torch.float32, activation=F.gelu), samples(2000, 6)
    found = approximate(gated, x.float(), extra=6, **QUIET)
    exact = approximate(gated.to(torch.float64), x.float().double(), extra=6, **QUIET)
    assert found.tensor.dtype == torch.float32
    assert_close(found.tensor(x.float()).double(), exact.tensor(x), rtol=1e-3, atol=1e-3)
