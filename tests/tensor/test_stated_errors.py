"""What results say of their own error is never less than the truth, and little more."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor import cp, grams, hosvd, reexpress, tucker

SCALES = (1e-30, 1.0, 1e20)


def entries(left, right, out):
    """B in numpy's longest floats: nothing of what is judged is rounded with it."""
    left, right, out = (f.double().numpy().astype(np.longdouble) for f in (left, right, out))
    one_sided = np.einsum("ah,hi,hj->aij", out, left, right)
    return (one_sided + one_sided.transpose(0, 2, 1)) / 2


def norm(array):
    size = np.abs(array).max()
    return float(size * np.sqrt(np.sum((array / size) ** 2))) if size > 0 else 0.0


def of(t):
    return entries(t.left, t.right, t.out)


def layers():
    """Layers whose truth is hard to state: of low rank, with neurons that cancel; any dtype, scale."""

    def build(seed, kind, dtype, scale):
        rng = np.random.default_rng(seed)
        d_in, d_out, hidden = rng.integers(2, 9, 3)
        if kind == "rank one":
            hidden = 1
        left, right, out = (
            torch.from_numpy(rng.standard_normal(shape))
            for shape in ((hidden, d_in), (hidden, d_in), (d_out, hidden))
        )
        if kind == "cancelling":
            scale = max(scale, 1e-20)  # what is left of it must not be subnormal
            out = torch.cat([out, -out * (1 + 1e-6 * rng.random())], 1)
            left, right = torch.cat([left, left]), torch.cat([right, right])
        if kind == "copies":
            left, right, out = left.repeat(3, 1), right.repeat(3, 1), out.repeat(1, 3)
        return BilinearTensor(left.to(dtype), right.to(dtype), scale * out.to(dtype))

    return st.builds(
        build,
        st.integers(0, 2**32),
        st.sampled_from(["plain", "rank one", "cancelling", "copies"]),
        st.sampled_from([torch.float32, torch.float64]),
        st.sampled_from(SCALES),
    )


def check(stated, true, size, tight):
    """`size`: of the neurons; `tight`: how much more than the truth may be said, beside it."""
    assert true <= stated, f"stated {stated}, true {true}"
    assert stated <= true * (1 + 1e-9) + tight * size


def size_of(t):
    parts = [np.linalg.norm(f.double().numpy(), axis=axis) for f, axis in
             ((t.left, 1), (t.right, 1), (t.out, 0))]  # fmt: skip
    return norm(parts[0] * parts[1] * parts[2])


@settings(max_examples=200)
@given(layers(), st.integers(1, 8), st.sampled_from(["output", "input"]), st.booleans())
def test_hosvd(t, k, mode, exact):
    k = min(k, t.d_out if mode == "output" else t.d_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "EXACT_FLOPS", 1e9 if exact else 0)
        found = hosvd(t, k, mode=mode)
    values, vectors = (part.double().numpy() for part in (found.values, found.vectors))
    dense = of(t)
    if mode == "output":
        parts = found.interactions
        q = entries(parts.left, parts.right, parts.weights)
        rebuilt = np.einsum("i,ia,ijk->ajk", values.astype(np.longdouble), vectors, q)
    else:
        rebuilt = np.einsum("ib,ic,abk->ack", vectors, vectors, dense)
    single = torch.finfo(t.dtype).eps
    rough = 3e-7 if mode == "input" or not exact else 1e-14
    check(found.truncation_error, norm(dense - rebuilt), size_of(t), rough + 20 * single)
    assert math.isclose(found.norm, norm(dense), rel_tol=1e-6, abs_tol=1e-7 * size_of(t))
    assert math.isfinite(found.norm)
    assert found.norm > 0


@settings(max_examples=150)
@given(layers(), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_tucker(t, k_out, k_in, exact):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "EXACT_FLOPS", 1e9 if exact else 0)
        found = tucker(t, min(k_out, t.d_out), min(k_in, t.d_in))
    true = norm(of(t) - of(found.tensor))
    check(found.error, true, size_of(t), 3e-14 if exact else 2e-7)


@settings(max_examples=80)
@given(layers(), st.integers(1, 6), st.sampled_from([0.0, 1e-3]), st.booleans())
def test_cp(t, rank, ridge, exact):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "EXACT_FLOPS", 1e9 if exact else 0)
        found = cp(t, rank, ridge=ridge, restarts=1, steps=10, progress=False)
        few = found.top(1)
    size = size_of(t) + size_of(found.tensor)
    check(found.error, norm(of(t) - of(found.tensor)), size, 3e-14 if exact else 2e-7)
    assert norm(of(t) - of(few.tensor)) <= few.error
    assert found.relative_error <= 1 + 1e-6 + 1e-6 * size / found.norm
    assert (found.left.isfinite() & found.right.isfinite()).all()


@settings(max_examples=80)
@given(layers(), st.integers(0, 3), st.booleans())
def test_reexpression(t, more, exact):
    generator = torch.Generator().manual_seed(more)
    n = t.d_out + more
    directions = torch.linalg.qr(torch.randn(n, t.d_out, generator=generator).double()).Q.to(
        t.dtype
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "EXACT_FLOPS", 1e9 if exact else 0)
        found = reexpress(t, directions)
    true = norm(of(t) - of(found.tensor))
    check(found.error, true, size_of(t), 1e-13 if exact else 30 * torch.finfo(t.dtype).eps)


def test_a_layer_of_rank_one_in_float32():
    """Norm 122, true error 1e-5: a difference of squares said 0.05."""
    t = random_tensor(8, 1, 6, dtype=torch.float32)
    t = 10 * replace(t, right=t.left)
    found = tucker(t, 1, 1)
    true = norm(of(t) - of(found.tensor))
    assert true <= found.error < true + 1e-11 * float(t.norm())
    assert found.error < 1e-5 * float(t.norm())
    assert hosvd(t).truncation_error < 1e-5 * float(t.norm())


def test_a_layer_that_cancels_to_a_millionth_of_its_neurons():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 20, 8, generator=generator, dtype=torch.float64)
    out = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    moved = out * (1 + 1e-6 * torch.randn(20, generator=generator, dtype=torch.float64))
    t = BilinearTensor(
        torch.cat([left, left]), torch.cat([right, right]), torch.cat([out, -moved], 1)
    )
    dense = of(t)
    exact = np.linalg.svd(dense.reshape(6, -1).astype(np.float64), compute_uv=False)
    found = hosvd(t)
    assert float(np.abs(found.values.numpy() - exact).max()) <= found.floor
    assert found.floor < 1e-6 * size_of(t)
    fit = cp(t, 30, ridge=0.0, restarts=1, progress=False)
    true = norm(dense - of(fit.tensor))
    assert 0 < true <= fit.error < 1.01 * true + 1e-11


def test_a_part_of_a_cp_says_no_less_at_any_scale():
    for scale in SCALES:
        t = (scale * random_tensor(7, 12, 5)).to(torch.float32)
        found = cp(t, 6, restarts=1, progress=False)
        for k in range(1, 6):
            part = found.top(k)
            true = norm(of(t) - of(part.tensor))
            assert true <= part.error <= 8 * true


@pytest.mark.parametrize("scale", SCALES)
def test_relative_answers_do_not_depend_on_the_scale(scale):
    plain = random_tensor(6, 12, 5, dtype=torch.float32)
    moved = replace(plain, left=2.0**-20 * plain.left, out=scale * 2.0**20 * plain.out)
    for mode in ("output", "input"):
        one, other = hosvd(plain, 3, mode=mode), hosvd(moved, 3, mode=mode)
        torch.testing.assert_close(one.explained, other.explained, rtol=1e-5, atol=0)
        assert math.isclose(one.norm, other.norm / scale, rel_tol=1e-6)
        assert math.isclose(one.truncation_error, other.truncation_error / scale, rel_tol=1e-5)
        assert math.isclose(one.floor, other.floor / scale, rel_tol=0.5)
    one, other = hosvd(plain).interactions, hosvd(moved).interactions
    torch.testing.assert_close(one.frobenius_norm(), torch.ones(5), rtol=1e-5, atol=0)
    torch.testing.assert_close(other.frobenius_norm(), torch.ones(5), rtol=1e-5, atol=0)
    assert math.isclose(tucker(plain, 2, 3).error, tucker(moved, 2, 3).error / scale, rel_tol=1e-5)
    fits = [cp(t, 3, restarts=1, sparsity=s, progress=False)
            for t in (plain, moved) for s in (0.0, 3e-3)]  # fmt: skip
    for one, other in zip(fits[:2], fits[2:], strict=True):
        assert math.isclose(one.relative_error, other.relative_error, rel_tol=1e-3)
        assert one.zeros == other.zeros
        assert math.isclose(one.dense_error, other.dense_error / scale, rel_tol=1e-3)
        assert math.isclose(float(one.errors[0]), float(other.errors[0]) / scale, rel_tol=1e-3)


def test_both_ways_to_a_distance_agree(monkeypatch):
    one, other = random_tensor(6, 9, 5, seed=1), random_tensor(6, 4, 5, seed=2)
    pair = tuple((t.left, t.right, t.out) for t in (one, other))
    true = norm(of(one) - of(other))
    square = norm(of(one)) ** 2
    entrywise = grams.distance(*pair, square)
    monkeypatch.setattr(grams, "EXACT_FLOPS", 0)
    through_grams = grams.distance(*pair, square)
    assert true <= entrywise < true * (1 + 1e-12)
    assert true <= through_grams < true * (1 + 1e-12)
    same = grams.distance(pair[0], pair[0], square)
    assert 0 < same < 1e-6 * norm(of(one))
