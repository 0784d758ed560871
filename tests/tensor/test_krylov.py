"""The iterative eigensolver: right where it converges, honest where it does not."""

import pytest
import torch
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor import eigensolvers, krylov


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    # At the sizes of a test a basis is soon a third of the space, where the solver would turn dense.
    monkeypatch.setattr(krylov, "DENSE_AT", 0.9)


@pytest.fixture
def _as_shipped(monkeypatch):
    monkeypatch.setattr(krylov, "DENSE_AT", 1 / 3)


def decaying(d=240, h=400, n=6, power=1.0, dtype=torch.float64):
    """A layer whose interaction matrices have spectra that fall off, as trained ones do."""
    scale = torch.arange(1, d + 1, dtype=dtype) ** -power
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=dtype)).Q
    left, right = (torch.randn(h, d, dtype=dtype) * scale @ rotation for _ in range(2))
    return BilinearTensor(left, right, torch.randn(n, h, dtype=dtype)).interaction()


def with_spectrum(values, d, n=2):
    vectors = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q[: len(values)]
    out = torch.tensor(values, dtype=torch.float64).expand(n, -1).contiguous()
    return BilinearTensor(vectors, vectors, out).interaction()


def assert_same_pairs(found, exact, atol):
    assert_close(found.values, exact.values, rtol=0, atol=atol)
    overlap = (found.vectors * exact.vectors).sum(-1).abs()
    assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", ["magnitude", "positive", "negative"])
@pytest.mark.parametrize("n", [1, 6, 40])
def test_it_finds_what_the_dense_solver_finds(which, n):
    Q = decaying(n=n)
    found = Q.eigh(5, which=which, method="krylov")
    exact = Q.eigh(5, which=which, method="dense")
    assert found.method.startswith("krylov")
    assert "dense" not in found.method
    assert_same_pairs(found, exact, atol=1e-9 * float(exact.values.abs().max()))
    assert found.converged.all()
    measured = torch.linalg.vector_norm(
        (Q @ found.vectors.mT).mT - found.values[..., None] * found.vectors, dim=-1
    )
    assert_close(found.residuals, measured, rtol=0, atol=1e-12)
    left_out = torch.linalg.matrix_norm(Q.dense() - found.dense(), ord=2)
    assert (found.bound >= left_out).all()
    assert (found.bound <= 6 * left_out).all()
    assert found.bound_failure == 1e-6
    assert exact.bound_failure == 0


def test_float32_is_good_to_its_tolerance():
    Q = decaying(dtype=torch.float32)
    found, exact = Q.eigh(5, method="krylov"), Q.eigh(5, method="dense")
    assert found.values.dtype == torch.float32
    assert_close(found.values, exact.values, rtol=0, atol=1e-5 * float(exact.values.abs().max()))


def test_a_seed_repeats_and_batches_do_not_matter_to_the_result():
    Q = decaying()
    first, again = Q.eigh(4, method="krylov", seed=3), Q.eigh(4, method="krylov", seed=3)
    assert torch.equal(first.vectors, again.vectors)
    each = krylov.bytes_per_direction(Q.d, Q.left.shape[0], 4, 8)
    small = Q.eigh(4, method="krylov", max_bytes=2 * each)
    assert_same_pairs(small, first, atol=1e-9 * float(first.values.abs().max()))


def test_it_forms_the_matrix_once_columns_run_past_the_break_even(monkeypatch):
    Q = decaying(d=200, h=100)
    formed = []
    form = krylov._Products.form
    monkeypatch.setattr(krylov._Products, "form", lambda self: (formed.append(self), form(self)))
    monkeypatch.setattr(krylov, "implicit_columns", lambda d, hidden: 30)
    found = Q.eigh(5, method="krylov")
    assert formed
    assert_same_pairs(found, Q.eigh(5, method="dense"), atol=1e-9)


def test_the_break_even_is_where_the_flops_meet():
    d, h = 1024, 4096
    c = krylov.implicit_columns(d, h)
    assert abs(8 * c * d * h - (2 * h * d**2 + 2 * c * d**2)) / (2 * h * d**2) < 0.01
    assert krylov.implicit_columns(64, 8) == 64


@pytest.mark.parametrize(("sign", "which"), [(1, "magnitude"), (1, "positive"), (-1, "negative")])
def test_copies_of_an_eigenvalue_that_a_block_cannot_hold_are_found(sign, which, monkeypatch):
    # Forty directions take blocks of three columns: a Krylov space alone holds three of eight copies.
    tail = [2.0 * 0.8**i for i in range(60)]
    Q = with_spectrum([sign * v for v in [3.0] * 8 + tail], 200, n=40)
    expected = torch.full((40, 6), 3.0 * sign, dtype=torch.float64)
    found = Q.eigh(6, which=which, method="krylov", tol=1e-6)
    assert "dense" not in found.method
    assert_close(found.values, expected, rtol=0, atol=1e-5)
    assert (found.bound >= 3).all()

    monkeypatch.setattr(krylov, "_probe", lambda *args: _never_larger(probe(*args)))
    alone = Q.eigh(6, which=which, method="krylov", tol=1e-6)
    assert alone.values.abs().amin() < 2.1  # the trap is real: this is what residuals cannot tell
    assert alone.converged.all()
    assert (alone.bound >= 3).all()  # and the certificate covers what it missed


probe = krylov._probe


def _never_larger(outcome):
    bound, larger, probes = outcome
    return bound, torch.zeros_like(larger), probes


@pytest.mark.usefixtures("_as_shipped")
def test_a_flat_spectrum_is_decomposed_densely_and_says_so():
    Q = random_tensor(150, 600, 3).interaction()
    found, exact = Q.eigh(5, method="krylov"), Q.eigh(5, method="dense")
    assert "dense for 3 of 3 with a flat spectrum" in found.method
    assert torch.equal(found.values, exact.values)
    assert found.bound_failure == 0
    assert found.converged.all()


@pytest.mark.usefixtures("_as_shipped")
def test_a_flat_spectrum_that_does_not_fit_is_returned_as_not_converged():
    Q = random_tensor(150, 600, 3).interaction()
    found = Q.eigh(5, method="krylov", max_bytes=1)
    assert "3 of 3 NOT converged" in found.method
    assert not found.converged.any()
    left_out = torch.linalg.matrix_norm(Q.dense() - found.dense(), ord=2)
    assert (found.bound >= left_out * (1 - 1e-9)).all()
    # What is reported of each pair is still true of it.
    measured = (Q @ found.vectors.mT).mT - found.values[..., None] * found.vectors
    assert_close(found.residuals, torch.linalg.vector_norm(measured, dim=-1), rtol=0, atol=1e-9)


def test_mixed_batches_converge_each_in_its_own_time():
    steep, gentle = decaying(d=240, power=2.0, n=2), decaying(d=240, power=0.8, n=2)
    left, right = torch.cat([steep.left, gentle.left]), torch.cat([steep.right, gentle.right])
    zero = torch.zeros_like(steep.weights)
    out = torch.cat([torch.cat([steep.weights, zero], 1), torch.cat([zero, gentle.weights], 1)])
    out = torch.cat([out, torch.zeros(1, out.shape[1], dtype=out.dtype)])
    Q = BilinearTensor(left, right, out).interaction()
    found, exact = Q.eigh(4, method="krylov"), Q.eigh(4, method="dense")
    assert_same_pairs(found[:4], exact[:4], atol=1e-9 * float(exact.values.abs().max()))
    assert_close(found.values[4], torch.zeros(4, dtype=torch.float64))
    assert found.bound[4] == 0


def test_auto_follows_the_cost_model():
    assert eigensolvers.choose_method(1024, 4096, 10) == "krylov"
    assert eigensolvers.choose_method(1024, 4096, 600) == "dense"
    assert eigensolvers.choose_method(64, 256, 5) == "dense"
    assert eigensolvers.choose_method(1024, 64, 10) == "lowrank"


def test_progress_and_bad_requests(capfd):
    Q = decaying(d=100, n=3)
    Q.eigh(2, method="dense", progress=True)
    assert "3/3" in capfd.readouterr().err
    Q.eigh(2, method="krylov")
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=r"2 k \+ 32 must not exceed d=100, got k=40"):
        Q.eigh(40, method="krylov")
    with pytest.raises(ValueError, match="tol is a relative residual"):
        Q.eigh(2, tol=0.0)
