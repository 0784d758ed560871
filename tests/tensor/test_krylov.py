"""The iterative eigensolver: right where it converges, honest where it does not."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor import eigensolvers, krylov
from tl_bilinear.tensor.basis import Ritz
from tl_bilinear.tensor.eigendecomposition import signed


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

    monkeypatch.setattr(Ritz, "limit", lambda self, sign, level: level + 1e3)  # proved at once
    alone = Q.eigh(6, which=which, method="krylov", tol=1e-6)
    assert alone.values.abs().amin() < 2.1  # the trap is real: this is what residuals cannot tell
    assert (alone.residuals < 1e-5).all()
    assert not alone.converged.any()
    assert (alone.bound >= 3).all()  # and the certificate covers what it missed
    assert (signed(alone.rest, which) >= 3).all()


def test_one_end_is_seen_whatever_stands_at_the_other():
    """Powers of Q see the larger end alone; the smallest eigenvalue here is 0, not .4."""
    values = [0.5] * 60 + [0.4] * 20
    Q = with_spectrum(values, 96, n=1)[0]
    for method in ("auto", "krylov", "dense"):
        found = Q.eigh(1, which="negative", method=method)
        assert abs(float(found.values)) < 1e-12
        assert found.converged
        assert found.n_signed == 0
        assert float(found.rest) <= 0 + 1e-12
    few = Q.eigh(30, which="negative", method="krylov", max_bytes=1)  # sixteen zeros, then .4
    assert (~few.converged | (few.values[:16].abs().amax() < 1e-9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_at_both_ends(dtype, seed):
    torch.manual_seed(seed)
    values = [-0.3] * 40 + [-0.2] * 40 + torch.linspace(0.4, 0.1, 60).tolist()
    Q = with_spectrum(values, 512, n=2).to(dtype)
    found = Q.eigh(20, which="negative", method="krylov")
    assert found.converged.all()
    assert_close(found.values, torch.full((2, 20), -0.3, dtype=dtype), rtol=0, atol=1e-5)
    assert (found.errors < 1e-5).all()


@pytest.mark.usefixtures("_as_shipped")
@pytest.mark.parametrize("method", ["dense", "lowrank", "krylov"])
def test_fewer_than_k_of_a_sign_are_completed_by_zeros(method):
    Q = with_spectrum([3.0, 2.0, 1.0, -0.5], 80, n=2)
    found = Q.eigh(6, which="negative", method=method)
    expected = torch.tensor([-0.5, 0, 0, 0, 0, 0], dtype=torch.float64).expand(2, -1)
    assert_close(found.values, expected, rtol=0, atol=1e-12)
    assert found.n_signed.tolist() == [1, 1]
    assert found.converged.all()
    assert (found.residuals < 1e-12).all()
    assert_close(
        found.vectors @ found.vectors.mT, torch.eye(6, dtype=torch.float64).expand(2, -1, -1)
    )
    assert_close(found.rest, torch.zeros(2, dtype=torch.float64), rtol=0, atol=3e-10)
    assert_close(found.bound, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-9, atol=0)
    assert Q.eigh(4, method=method).n_signed.tolist() == [4, 4]


def test_lowrank_completes_an_end_only_as_far_as_there_is_room():
    """Outside the span of 2 h = 6 rows there is one zero in seven inputs, and it comes first here."""
    vectors = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q[:3]
    left, right = (
        torch.cat([vectors, torch.randn(0, 7)]),
        vectors + 0.1 * torch.randn(3, 7).double(),
    )
    Q = BilinearTensor(left, right, torch.ones(1, 3, dtype=torch.float64)).interaction()[0]
    exact = torch.linalg.eigvalsh(Q.dense())
    for k in range(1, 7):
        for which, wanted in (("negative", exact[:k]), ("positive", exact.flip(0)[:k])):
            found = Q.eigh(k, which=which, method="lowrank")
            assert_close(found.values, wanted, rtol=0, atol=1e-12)
            following = exact[k] if which == "negative" else exact.flip(0)[k]
            assert_close(found.rest, following, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
@pytest.mark.parametrize("method", ["dense", "krylov", "lowrank"])
@pytest.mark.parametrize("which", ["magnitude", "positive", "negative"])
def test_scale_changes_nothing_but_the_scale(dtype, scale, method, which):
    layer = decaying(d=100, h=40, n=3)
    plain = layer.to(dtype).eigh(4, which=which, method=method)
    moved = BilinearTensor(
        layer.left.to(dtype), layer.right.to(dtype), scale * layer.weights.to(dtype)
    ).interaction()
    found = moved.eigh(4, which=which, method=method)
    eps = 40 * torch.finfo(dtype).eps
    for name in ("values", "bound", "rest", "norm", "rounding"):
        one, other = getattr(found, name).double() / scale, getattr(plain, name).double()
        assert_close(one, other, rtol=1e3 * eps if name in ("bound", "rest") else eps, atol=0)
    assert torch.equal(found.converged, plain.converged)
    assert found.converged.all()
    assert (found.errors.double() / scale <= 1e-4 * plain.norm[:, None]).all()
    assert_close(found.effective_rank(), plain.effective_rank(), rtol=1e3 * eps, atol=0)


def test_factors_of_any_size_make_the_same_pairs():
    Q = decaying(d=100, h=40, n=3, dtype=torch.float32)
    for method in ("dense", "krylov", "lowrank"):
        plain = Q.eigh(4, method=method)
        for left, right, weights in ((-60, 30, 10), (0, -90, 40), (50, 50, -120)):
            moved = BilinearTensor(
                Q.left * 2.0**left, Q.right * 2.0**right, Q.weights * 2.0**weights
            ).interaction()
            found = moved.eigh(4, method=method)
            assert_close(found.vectors, plain.vectors, rtol=0, atol=1e-4)
            scale = 2.0 ** (left + right + weights)
            assert_close(found.values / scale, plain.values, rtol=2e-6, atol=0)


def test_what_a_dtype_cannot_hold_is_said():
    Q = decaying(d=64, h=40, n=2, dtype=torch.float32)
    huge = BilinearTensor(1e20 * Q.left, 1e20 * Q.right, Q.weights).interaction()
    tiny = BilinearTensor(1e-30 * Q.left, 1e-30 * Q.right, Q.weights).interaction()
    for each, size in ((huge, r"e\+4\d"), (tiny, r"e-[56]\d")):
        for method in ("dense", "krylov"):
            with pytest.raises(
                ValueError, match=rf"eigenvalues of up to .*{size} cannot be held in float32"
            ):
                each.eigh(2, method=method)
    small = BilinearTensor(1e20 * Q.left[:, :8], 1e20 * Q.right[:, :8], Q.weights).interaction()
    with pytest.raises(ValueError, match="eigenvalues of up to"):
        small.eigh(2)


def test_converged_means_the_same_for_every_method_and_scale():
    """A tolerance relative to ||Q||: not to the values held, nor to those of a truncation."""
    values = [1.0, 0.9, -1e-7, -2e-7, -3e-7]
    for scale in (1e-25, 1.0, 1e25):
        Q = with_spectrum([scale * v for v in values], 80)
        for method in ("dense", "lowrank", "krylov"):
            found = Q.eigh(3, which="negative", method=method)
            assert found.converged.all()
            assert_close(
                found.values[0] / scale,
                torch.tensor([-3e-7, -2e-7, -1e-7]).double(),
                rtol=0,
                atol=1e-12,
            )
            assert_close(found.norm / scale, torch.ones(2).double(), rtol=1e-9, atol=0)
            assert found.top(1).converged.all()
            assert_close(found.top(1).norm, found.norm)
            spoiled = replace(found, residuals=found.residuals + 2e-10 * scale)
            assert not spoiled.converged.any()
            wrong = replace(found, rest=found.rest - 3e-7 * scale)  # something was left out
            assert not wrong.converged.any()
            assert (wrong.errors[:, -1] >= 2e-7 * scale).all()


@pytest.mark.usefixtures("_as_shipped")
def test_an_unfinished_bound_holds_at_every_scale():
    for scale in (1e-3, 1.0, 1e3):
        Q = (scale * random_tensor(150, 600, 3)).interaction()
        for which in ("magnitude", "positive", "negative"):
            found = Q.eigh(5, method="krylov", which=which, max_bytes=1)
            assert not found.converged.any()
            left_out = torch.linalg.matrix_norm(Q.dense() - found.dense(), ord=2)
            frobenius = torch.linalg.matrix_norm(Q.dense() - found.dense())
            assert (found.bound >= left_out).all()
            assert_close(found.bound, frobenius, rtol=1e-6, atol=0)
            exact = torch.linalg.eigvalsh(Q.dense())
            following = {
                "magnitude": exact.abs().sort().values,
                "positive": exact,
                "negative": -exact.flip(1),
            }
            assert (signed(found.rest, which) >= following[which][:, -6]).all()
            assert (
                found.errors[:, 0] >= (following[which][:, -1] - signed(found.values, which)[:, 0])
            ).all()


def test_an_unfinished_bound_holds_where_squares_cancel(monkeypatch):
    """What is left out is a thousandth of the matrix: the difference of squares is rounding."""
    monkeypatch.setattr(krylov, "_settled", lambda index, *_: torch.zeros_like(index, dtype=bool))
    for seed in range(20):
        torch.manual_seed(seed)
        values = [-1.0, -0.6, -0.3, 1e-4]
        Q = with_spectrum(values, 64, n=4).to(torch.float32)
        found = Q.eigh(3, method="krylov", which="negative", max_bytes=1)
        assert "NOT converged" in found.method
        rest = Q.to(torch.float64).dense() - found.to(torch.float64).dense()
        assert (found.bound >= torch.linalg.matrix_norm(rest, ord=2)).all()
        assert (found.bound <= 4e-3).all()  # rounding of the squares and of the values


def test_no_tolerance_below_rounding_is_worked_for():
    Q = decaying(n=40, dtype=torch.float32)
    for method in ("krylov", "dense"):
        found = Q.eigh(4, method=method, tol=1e-12)
        assert found.tol == 32 * torch.finfo(torch.float32).eps
    assert Q.eigh(4, tol=1e-3, method="krylov").tol == 1e-3


def test_a_looser_tolerance_takes_fewer_columns():
    Q = decaying(n=40)
    columns = {}
    for tol in (1e-1, 1e-3, 1e-9):
        found = Q.eigh(4, method="krylov", tol=tol)
        assert found.converged.all()
        assert (found.residuals <= tol * found.norm[:, None]).all()
        columns[tol] = int(found.method.split()[3])
        exact = Q.eigh(4, method="dense")
        # The error of a value is about the square of its residual.
        assert ((found.values - exact.values).abs() <= found.errors).all()
        assert_close(found.values, exact.values, rtol=0, atol=200 * tol**2 + 1e-12)
    assert columns[1e-1] < columns[1e-9]


def test_neurons_that_cancel_are_not_called_converged():
    """Float32 cannot know a matrix that is a millionth of its neurons, and says so."""
    Q = decaying(d=64, h=100, n=1)
    more, weight = torch.randn(50, 64).double(), 1e3 * torch.randn(1, 50).double()
    left, right = torch.cat([Q.left, more, more]), torch.cat([Q.right, more, more])
    both = BilinearTensor(left, right, torch.cat([Q.weights, weight, -weight], 1))
    for method in ("dense", "krylov"):
        precise = both.interaction().eigh(3, method=method)
        assert precise.converged.all()
        found = both.to(torch.float32).interaction().eigh(3, method=method)
        assert not found.converged.any()
        truth = torch.linalg.eigvalsh(both.to(torch.float32).to(torch.float64).dense())[0]
        order = truth.abs().argsort(descending=True)[:3]
        assert ((found.values.double() - truth[order]).abs() <= found.errors.double()).all()
        assert (found.rounding > 1e-3 * found.norm).all()


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
    assert eigensolvers.choose_method(1024, 4096, 10, 64) == "krylov"
    assert eigensolvers.choose_method(1024, 4096, 10, 1) == "dense"  # one matrix: its own few rows
    assert eigensolvers.choose_method(4096, 14336, 10, 1) == "krylov"
    assert eigensolvers.choose_method(1024, 4096, 600, 64) == "dense"
    assert eigensolvers.choose_method(256, 1024, 10, 10) == "dense"
    assert eigensolvers.choose_method(64, 256, 5, 100) == "dense"
    assert eigensolvers.choose_method(1024, 64, 10, 64) == "lowrank"


def test_progress_and_bad_requests(capfd):
    Q = decaying(d=100, n=3)
    Q.eigh(2, method="dense", progress=True)
    assert "3/3" in capfd.readouterr().err
    Q.eigh(2, method="krylov")
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=r"2 k \+ 16 must not exceed d=100, got k=45"):
        Q.eigh(45, method="krylov")
    with pytest.raises(ValueError, match="tol is a relative residual"):
        Q.eigh(2, tol=0.0)
