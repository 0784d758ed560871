"""CP against the dense tensor, on planted tensors, and its promises about form."""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor, tensors
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor.cp import CP, cp

module = importlib.import_module("tl_bilinear.tensor.cp")  # the package names the function


def planted(rank, d_in=9, d_out=7, seed=0, copies=3):
    """A tensor of exactly this rank, hidden in `copies` times as many neurons."""
    t = random_tensor(d_in, rank, d_out, seed=seed)
    left, right = t.left.repeat(copies, 1), t.right.repeat(copies, 1)
    return replace(t, left=left, right=right, out=t.out.repeat(1, copies) / copies)


def decaying(d_in=16, d_hidden=40, d_out=12, seed=0, dtype=torch.float64):
    t = random_tensor(d_in, d_hidden, d_out, seed=seed)
    scale = 1 / torch.arange(1.0, d_in + 1).double()
    return replace(t, left=t.left * scale, right=t.right * scale).to(dtype)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("init", ["eigen", "random"])
def test_a_planted_tensor_is_recovered(rank, init):
    t = planted(rank, seed=rank)
    found = cp(t, rank, ridge=0.0, restarts=8, init=init)
    assert found.converged
    assert found.relative_error < 1e-6
    assert_close(found.tensor.dense(), t.dense(), rtol=0, atol=1e-6 * float(t.norm()))
    # CP is unique: each planted neuron is found, not only their sum.
    one = t.left[:rank], t.right[:rank]
    planted_neurons = torch.einsum("hi,hj->hij", *one)
    planted_neurons = torch.nn.functional.normalize(
        (planted_neurons + planted_neurons.mT).flatten(1)
    )
    neurons = torch.einsum("hi,hj->hij", found.left, found.right)
    neurons = ((neurons + neurons.mT) / 2).flatten(1)
    cosines = (neurons @ planted_neurons.T).abs()
    assert_close(cosines.amax(1), torch.ones(rank).double(), rtol=0, atol=1e-6)
    assert sorted(cosines.argmax(1).tolist()) == list(range(rank))


@settings(max_examples=25)
@given(tensors(), st.integers(1, 5), st.sampled_from(["eigen", "random"]))
def test_form_and_error_of_any_layer(t, rank, init):
    found = cp(t, rank, restarts=1, steps=5, init=init)
    assert found.left.shape == found.right.shape == (rank, t.d_in)
    assert found.out.shape == (t.d_out, rank)
    dense = t.dense()  # biases are no part of it
    assert_close(found.norm, float(dense.norm()), rtol=1e-9, atol=1e-9)
    exact = float((dense - found.tensor.dense()).norm())
    assert_close(found.error, exact, rtol=1e-6, atol=3e-7 * (1 + found.norm))
    assert found.error <= found.norm * (1 + 1e-9)
    neurons = torch.einsum("ri,rj->rij", found.left, found.right)
    sizes = torch.linalg.matrix_norm((neurons + neurons.mT) / 2)
    alive = found.weights > 1e-12 * found.norm
    assert_close(sizes[alive], torch.ones_like(sizes[alive]))
    assert_close(found.left.norm(dim=1), found.right.norm(dim=1))
    assert (found.weights.diff() <= 0).all()
    assert ((found.left * found.right).sum(1) >= -1e-12).all()


def test_plus_and_minus_are_the_function_and_the_eigenvectors():
    t = decaying()
    found = cp(t, 4, restarts=1)
    x = torch.randn(20, t.d_in, dtype=torch.float64)
    through = ((x @ found.plus.T).square() - (x @ found.minus.T).square()) / 4
    assert_close(through @ found.out.T, found.tensor(x))
    assert_close((found.plus * found.minus).sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(
        (found.left[0][:, None] * found.right[0] + found.right[0][:, None] * found.left[0]) / 2
    )
    frame = found.to_pandas()
    assert_close(values[-1].item(), frame["plus"][0])
    assert_close(values[0].item(), frame["minus"][0])
    assert frame["weight"].is_monotonic_decreasing
    assert frame["written"][0] == found.out[frame["output"][0], 0]
    assert (found.plus.norm(dim=1) >= found.minus.norm(dim=1)).all()


def test_products_with_the_layer_are_the_gradient():
    t = random_tensor(5, 8, 4)
    inputs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    out = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    left, right = inputs.chunk(2)
    inner = t.inner(BilinearTensor(left, right, out))
    by_inputs, by_out = torch.autograd.grad(inner, (inputs, out))
    target = module._Target.of(t, float(t.norm()))
    with torch.no_grad():
        overlaps = target.overlaps(inputs)
        assert_close(target.input_product(overlaps, out), by_inputs)
        assert_close(target.out_product(overlaps), by_out)
        assert_close(target.half_product(right, out), by_inputs[:3])
        assert_close(target.half_product(left, out), by_inputs[3:])


def test_the_step_is_gauss_newton():
    """Undamped and solved to the end, it is the least-squares step of the dense residual."""
    t = random_tensor(4, 6, 3, seed=2)
    target = module._Target.of(t, float(t.norm()))
    point = module._point(target, torch.randn(4, 4, dtype=torch.float64), 0.0)

    def model(inputs, out):
        left, right = inputs.chunk(2)
        return BilinearTensor(left, right, out).dense().flatten()

    jacobian = torch.autograd.functional.jacobian(model, (point.inputs, point.out))
    whole = torch.cat([block.flatten(1) for block in jacobian], 1)
    residual = t.dense().flatten() - model(point.inputs, point.out)
    expected = torch.linalg.lstsq(whole, residual, driver="gelsd").solution
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_INNER_STEPS", 200)
        patch.setattr(module, "_INNER_TOL", 1e-12)
        step, _ = module._gauss_newton(target, point, 1e-10)
    tangent = expected[: step.numel()].reshape(step.shape)
    tangent = tangent - (tangent * point.inputs).sum(1, keepdim=True) * point.inputs
    assert_close(step, tangent, rtol=1e-5, atol=1e-6)


def test_out_is_the_ridge_solution():
    t = decaying()
    for ridge in (0.0, 1e-2):
        found = cp(t, 3, restarts=1, ridge=ridge)
        unit = [torch.nn.functional.normalize(half, dim=1) for half in (found.left, found.right)]
        neurons = torch.einsum("ri,rj->rij", *unit)
        neurons = ((neurons + neurons.mT) / 2).flatten(1)
        gram = neurons @ neurons.T + ridge * torch.eye(3)
        expected = torch.linalg.solve(gram, neurons @ t.dense().flatten(1).T).T
        sizes = neurons.norm(dim=1)
        assert_close(found.out, expected * sizes, rtol=1e-6, atol=1e-8)


def test_a_ridge_bounds_the_weights():
    """Of a dense layer the best fit has neurons that cancel; the ridge keeps them out."""
    t = decaying(24, 96, 24)
    free = cp(t, 12, ridge=0.0, restarts=1, steps=200)
    held = cp(t, 12, restarts=1, steps=200)
    assert free.error < held.error < 1.15 * free.error
    assert held.weights[0] < held.norm
    assert free.weights[0] > 3 * held.weights[0]


def test_more_rank_is_never_worse():
    t = decaying()
    errors = [cp(t, rank, restarts=1).relative_error for rank in (1, 2, 4, 8, 16, 32)]
    assert all(more <= less + 1e-3 for less, more in itertools.pairwise(errors))
    assert errors[-1] < 0.1
    smaller = cp(t, 4, restarts=1)
    for rank in (4, 5):
        grown = cp(t, rank, restarts=1, init=smaller.tensor)
        assert grown.error <= smaller.error * (1 + 1e-6)


def test_at_least_as_many_neurons_as_the_layer_is_the_layer():
    t = random_tensor(6, 3, 5)
    for rank in (3, 5):
        found = cp(t, rank, ridge=0.0, restarts=1)
        assert found.relative_error < 1e-7
        assert (found.weights[3:] == 0).all()
        assert (found.left[3:] == 0).all()


def test_rank_one_of_one_output_takes_the_eigenpair_of_each_end():
    t = random_tensor(7, 20, 1)
    values = torch.linalg.eigvalsh(t.dense()[0])
    best = values[0].clamp_max(0).square() + values[-1].clamp_min(0).square()
    expected = float((values.square().sum() - best).sqrt())
    assert_close(cp(t, 1, ridge=0.0, tol=1e-10).error, expected, rtol=1e-6, atol=0)


def test_float32_factors_with_an_exact_error():
    t = decaying(dtype=torch.float32)
    found = cp(t, 6)
    assert found.left.dtype == found.out.dtype == torch.float32
    rest = t.to(torch.float64).dense() - found.tensor.to(torch.float64).dense()
    exact = float(rest.norm())
    assert_close(found.error, exact, rtol=1e-9, atol=0)
    double = cp(t.to(torch.float64), 6)
    assert_close(found.relative_error, double.relative_error, rtol=1e-2, atol=0)
    # Where float32 sums are too coarse to see the error, the fit goes on in float64.
    exactly = cp(planted(4).to(torch.float32), 4, ridge=0.0, restarts=4)
    assert exactly.relative_error < 1e-6


def test_biases_are_no_part_of_it():
    with_biases = random_tensor(6, 9, 5, biases=True)
    bare = with_biases.parts().interaction
    first, second = cp(with_biases, 3), cp(bare, 3)
    assert torch.equal(first.left, second.left)
    assert first.error == second.error
    assert not first.tensor.has_biases


def test_seeds_repeat_and_restarts_are_reported():
    t = decaying()
    first, again, other = cp(t, 5, seed=1), cp(t, 5, seed=1), cp(t, 5, seed=2)
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.errors, again.errors)
    assert not torch.equal(first.errors, other.errors)
    assert first.errors.shape == (3,)
    assert first.error == first.errors.min() == first.dense_error
    assert not cp(t, 5, steps=1, restarts=1).converged


def test_sparsity_trades_fit_for_zeros():
    generator = torch.Generator().manual_seed(0)
    t = planted(4, d_in=20, d_out=10)
    mask = (torch.rand(20, 20, generator=generator) < 0.3).double()[:12]
    noise = 0.05 * random_tensor(20, 30, 10, seed=5)
    t = BilinearTensor(t.left * mask, t.right * mask.flip(0), t.out) + noise / 10
    found = [cp(t, 12, restarts=1, steps=300, sparsity=s) for s in (0.0, 3e-4, 3e-3)]
    assert found[0].zeros == 0
    assert found[0].zeros < found[1].zeros < found[2].zeros
    assert found[2].zeros > 0.2
    assert found[0].error < found[1].error < found[2].error
    for each in found:
        assert each.dense_error == found[0].error
        exact = float((t.dense() - each.tensor.dense()).norm())
        assert_close(each.error, exact, rtol=1e-7, atol=0)
    # A penalty above every gradient leaves nothing.
    nothing = cp(t, 3, restarts=1, sparsity=10.0)
    assert nothing.zeros == 1
    assert_close(nothing.error, nothing.norm)


def test_the_penalty_knows_no_units():
    t = decaying()
    one, other = (cp(scale * t, 4, restarts=1, sparsity=3e-3) for scale in (1.0, 1e-3))
    assert one.zeros == other.zeros > 0
    assert_close(one.relative_error, other.relative_error, rtol=1e-6, atol=0)


def test_zero_top_and_storage(tmp_path):
    zero = cp(0.0 * random_tensor(4, 6, 3), 2)
    assert zero.error == zero.relative_error == 0
    assert zero.weights.tolist() == [0, 0]
    t = decaying()
    found = cp(t, 4, restarts=2)
    few = found.top(2)
    assert float((t - few.tensor).norm()) <= few.error
    part = few.tensor
    assert part.d_hidden == 2
    assert (part.input_space, part.output_space) == ("inputs", "outputs")
    assert_close(part.dense(), torch.einsum("ar,rij->aij", found.out[:, :2], _neurons(found)[:2]))
    found.save(tmp_path / "cp.safetensors")
    loaded = CP.load(tmp_path / "cp.safetensors")
    assert torch.equal(loaded.out, found.out)
    assert torch.equal(loaded.errors, found.errors)
    assert (loaded.error, loaded.converged, loaded.steps) == (
        found.error,
        found.converged,
        found.steps,
    )


def _neurons(found):
    neurons = torch.einsum("ri,rj->rij", found.left, found.right)
    return (neurons + neurons.mT) / 2


def test_an_interrupt_goes_through(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_gauss_newton", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cp(decaying(), 2, progress=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must lie between 1 and"),
        ({"rank": 2, "restarts": 0}, "restarts must lie between 1 and"),
        ({"rank": 2, "steps": 0}, "steps must lie between 1 and"),
        ({"rank": 2, "tol": 0.0}, "tol is a relative decrease"),
        ({"rank": 2, "ridge": -1.0}, "ridge weighs a penalty on the weights"),
        ({"rank": 2, "sparsity": -1.0}, "sparsity weighs an L1 penalty"),
        ({"rank": 2, "init": "svd"}, "init must be 'eigen', 'random' or a BilinearTensor"),
        ({"rank": 2, "init": random_tensor(4, 3, 3)}, "at most rank=2 hidden neurons"),
    ],
)
def test_bad_requests(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        cp(random_tensor(4, 6, 3), **arguments)
    with pytest.raises(TypeError, match=r"rank must be an int, got 2\.0"):
        cp(random_tensor(4, 6, 3), 2.0)
