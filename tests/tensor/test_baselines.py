"""Shapley values and integrated gradients, against enumeration of coalitions and a line integral."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear.tensor import InputMoments, ShapleyValues, shapley

seeds = st.integers(0, 2**16)


def enumerated(f, x, baseline):
    """Shapley's definition: marginal contributions averaged over all coalitions."""
    d = len(x)
    phi = torch.zeros(len(f(x)), d, dtype=torch.float64)
    for i in range(d):
        others = [j for j in range(d) if j != i]
        for size in range(d):
            weight = math.factorial(size) * math.factorial(d - size - 1) / math.factorial(d)
            for chosen in itertools.combinations(others, size):
                without = baseline.clone()
                without[list(chosen)] = x[list(chosen)]
                joined = without.clone()
                joined[i] = x[i]
                phi[:, i] += weight * (f(joined) - f(without))
    return phi


@given(seeds, st.integers(1, 4))
def test_against_a_point(seed, d):
    t = random_tensor(d, 5, 2, seed=seed, biases=True)
    generator = torch.Generator().manual_seed(seed)
    x, b = torch.randn(2, d, generator=generator, dtype=torch.float64)
    found = shapley(t, x, b)
    assert_close(found.values, enumerated(t, x, b), rtol=1e-9, atol=1e-9)
    assert_close(found.values.sum(-1), t(x) - t(b), rtol=1e-9, atol=1e-9)
    assert (found.error < 1e-9).all()
    assert_close(shapley(t, x).values, enumerated(t, x, torch.zeros_like(x)), rtol=1e-9, atol=1e-9)
    # Integrated gradients: the gradient is linear along the line, so two points integrate it exactly.
    gradients = []
    for share in (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6):
        point = (b + share * (x - b)).requires_grad_()
        gradients.append(
            torch.stack([torch.autograd.grad(y, point, retain_graph=True)[0] for y in t(point)])
        )
    assert_close(found.values, (x - b) * sum(gradients) / 2, rtol=1e-9, atol=1e-9)


@given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_against_a_population(seed, d, n):
    t = random_tensor(d, 5, 2, seed=seed, biases=True)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, d, generator=generator, dtype=torch.float64)
    background = torch.randn(n, d, generator=generator, dtype=torch.float64)
    found = shapley(t, x, InputMoments.of(background))
    for i in range(3):
        expected = sum(enumerated(t, x[i], b) for b in background) / n
        assert_close(found.values[i], expected, rtol=1e-8, atol=1e-8)
    assert_close(found.baseline_output, t(background).mean(0), rtol=1e-8, atol=1e-8)
    assert_close(found.values.sum(-1), t(x) - t(background).mean(0), rtol=1e-8, atol=1e-8)


def test_table_and_storage(tmp_path):
    t = random_tensor(3, 5, 2)
    found = shapley(t, torch.tensor([1.0, -2.0, 0.5]))
    table = found.to_pandas()
    assert table.columns.tolist() == ["output", "input", "value"]
    assert table["value"].abs().is_monotonic_decreasing
    assert len(table) == 6
    found.save(tmp_path / "s.safetensors")
    assert_close(ShapleyValues.load(tmp_path / "s.safetensors").values, found.values)
    assert shapley(t, torch.ones(4, 3)).to_pandas().columns[0] == "x"


def test_bad_requests(unchecked):
    t = random_tensor(3, 5, 2)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 3\]"):
        shapley(t, torch.ones(4))
    with pytest.raises(ValueError, match=r"baseline must have shape"):
        shapley(t, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"baseline must have shape \[3\]"):
        shapley(t, torch.ones(3), torch.ones(2, 3))
