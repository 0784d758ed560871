"""Functional comparison against the dense formula and against samples; matching of eigenvectors."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor, tensors
from tl_bilinear import Eigendecomposition
from tl_bilinear.tensor.compare import (
    EigenvectorMatch,
    functional_inner,
    functional_similarity,
    match_eigenvectors,
    pairwise_similarity,
)

seeds = st.integers(0, 2**16)


def by_definition(f, g, centred):
    """2 tr(AB) + a.b + (tr A + a0)(tr B + b0) of the dense forms."""
    (a, a0), (b, b0) = ((p.linear, p.constant) for p in (f.parts(), g.parts()))
    dense_f, dense_g = f.dense(), g.dense()
    total = 2 * torch.einsum("aij,aji->", dense_f, dense_g) + (a * b).sum()
    means = [torch.einsum("aii->a", d) + c for d, c in ((dense_f, a0), (dense_g, b0))]
    return total if centred else total + means[0] @ means[1]


@given(tensors(), seeds, st.integers(1, 6), st.booleans(), st.booleans())
def test_the_dense_formula(f, seed, hidden, biases, centred):
    g = random_tensor(f.d_in, hidden, f.d_out, biases, seed)
    found = functional_inner(f, g, centred=centred)
    assert_close(found, by_definition(f, g, centred), rtol=1e-9, atol=1e-8)
    assert_close(functional_inner(g, f, centred=centred), found, rtol=1e-9, atol=1e-8)
    squares = by_definition(f, f, centred) * by_definition(g, g, centred)
    cosine = functional_similarity(f, g, centred=centred)
    assert_close(cosine * squares.sqrt(), found, rtol=1e-7, atol=1e-7)
    assert cosine.abs() <= 1 + 1e-9
    assert_close(functional_similarity(f, -3.0 * f, centred=centred).item(), -1.0)


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("centred", [False, True])
def test_samples(biases, centred):
    f = random_tensor(4, 5, 3, biases[0], seed=1)
    g = random_tensor(4, 7, 3, biases[1], seed=2) + 0.5 * random_tensor(4, 5, 3, seed=1)
    x = torch.randn(200_000, 4, dtype=torch.float64)
    y, z = f(x), g(x)
    if centred:
        y, z = y - y.mean(0), z - z.mean(0)
    products = (y * z).sum(1)
    sigma = float(products.std()) / math.sqrt(len(x))
    assert abs(float(products.mean() - functional_inner(f, g, centred=centred))) < 5 * sigma


def test_one_output_bias_only_shifts_the_mean():
    f = random_tensor(4, 5, 3)
    shifted = replace(f, bias_out=torch.tensor([10.0, 0.0, -10.0]).double())
    assert_close(functional_similarity(f, shifted, centred=True).item(), 1.0)
    assert functional_similarity(f, shifted) < 0.9


def test_float32_zero_and_other_shapes():
    f = random_tensor(4, 5, 3, biases=True)
    single = f.to(torch.float32)
    assert functional_inner(single, single).dtype == torch.float32
    assert_close(
        functional_inner(single, single).double(), functional_inner(f, f), rtol=1e-5, atol=0
    )
    assert functional_similarity(f, 0.0 * f) == 0
    with pytest.raises(ValueError, match=r"\[3, 4, 4\] and \[2, 4, 4\].*cannot be compared"):
        functional_inner(f, random_tensor(4, 5, 2))


def spectrum(values, vectors, space=None):
    values = torch.tensor(values, dtype=torch.float64)
    zeros = torch.zeros_like(values)
    return Eigendecomposition(values, vectors, zeros, zeros[..., 0], space=space)


def rotation(seed, d=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def test_signs_are_matched_apart():
    v = rotation(0)
    first = spectrum([5.0, -4, 3, -2, 1], v[:5])
    second = spectrum([-6.0, 5, -4, 3, 2, 1e-17], v[[1, 2, 3, 0, 4, 5]])  # 5 and 3 have swapped
    ranked = match_eigenvectors(first, second, by="rank")
    assert ranked.pairs.tolist() == [[0, 1], [2, 3], [4, 4], [1, 0], [3, 2]]
    assert_close(ranked.cosines, torch.tensor([0.0, 0, 1, 1, 1]).double(), rtol=0, atol=1e-12)
    assert_close(ranked.mean, 0.6)
    best = match_eigenvectors(first, second)
    assert best.pairs.tolist() == [[0, 3], [2, 1], [4, 4], [1, 0], [3, 2]]
    assert_close(best.mean, 1.0)
    # A negative eigenvector is never given to a positive eigenvalue, however well it fits.
    opposite = spectrum([-5.0, -3], v[[0, 2]])
    alone = match_eigenvectors(spectrum([5.0, 3], v[[0, 2]]), opposite)
    assert alone.pairs.shape == (0, 2)
    assert math.isnan(alone.mean)


@given(seeds, st.sampled_from(["rank", "assignment"]))
def test_assignment_is_one_to_one_and_the_best(seed, by):
    t, u = random_tensor(6, 9, 2, seed=seed), random_tensor(6, 4, 2, seed=seed + 1)
    first, second = t.interaction().eigh(), u.interaction().eigh(4)
    found = match_eigenvectors(first, second, by=by)
    frame = found.to_pandas()
    assert not frame.duplicated(["matrix", "first"]).any()
    assert not frame.duplicated(["matrix", "second"]).any()
    for matrix, i, j, cosine in frame.itertuples(index=False):
        v, w = first.vectors[matrix, i], second.vectors[matrix, j]
        assert_close(cosine, (v @ w).abs().item())
        assert first.values[matrix, i] * second.values[matrix, j] > 0
    best = match_eigenvectors(first, second)
    assert best.cosines.sum() >= found.cosines.sum() - 1e-12
    own = match_eigenvectors(first, first, by=by)
    assert_close(own.mean, 1.0)
    assert own.first.tolist() == own.second.tolist()
    assert len(match_eigenvectors(first, second, by=by, k=2).cosines) <= 4


def test_pairs_leave_out_an_eigendecomposition_with_itself():
    spectra = [random_tensor(6, 9, 1, seed=seed).interaction().eigh(4) for seed in range(3)]
    table = pairwise_similarity(spectra, k=3)
    assert table.diagonal().isnan().all()
    expected = [match_eigenvectors(spectra[i], spectra[j], k=3).mean for i, j in [(1, 0), (2, 1)]]
    assert [table[0, 1].item(), table[2, 1].item()] == expected
    assert_close(table, table.T, equal_nan=True)
    assert_close(pairwise_similarity([spectra[0]] * 3).nanmean().item(), 1.0)
    with pytest.raises(ValueError, match="at least two decompositions, got 1"):
        pairwise_similarity(spectra[:1])


def test_storage_and_errors(tmp_path, unchecked):
    v = rotation(1)
    first = spectrum([2.0, -1], v[:2], space="a")
    found = match_eigenvectors(first, first)
    found.save(tmp_path / "match.safetensors")
    loaded = EigenvectorMatch.load(tmp_path / "match.safetensors")
    assert torch.equal(loaded.pairs, found.pairs)
    assert loaded.by == "assignment"
    assert len(match_eigenvectors(first, replace(first, space=None)).cosines) == 2
    with pytest.raises(ValueError, match="different spaces, 'a' and 'b'"):
        match_eigenvectors(first, replace(first, space="b"))
    with pytest.raises(ValueError, match="width 6 and 5 cannot be compared"):
        match_eigenvectors(first, spectrum([2.0, -1], rotation(2, 5)[:2]))
    with pytest.raises(ValueError, match=r"batch shape \[\] and \[1\] cannot be matched"):
        match_eigenvectors(first, spectrum([[2.0, -1]], v[None, :2]))
    with pytest.raises(ValueError, match="by must be 'rank' or 'assignment', got 'value'"):
        match_eigenvectors(first, first, by="value")
    with pytest.raises(ValueError, match="k must lie between 1 and 2"):
        match_eigenvectors(first, first, k=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", ["rank", "assignment"])
def test_null_vectors_are_not_matched(by, dtype):
    """A matrix of rank 4 in 9 inputs has five eigenvalues of 1e-17, which mean nothing."""
    for seed in range(5):
        one, other = (
            random_tensor(9, 2, 1, seed=s, dtype=dtype).interaction().eigh()
            for s in (seed, seed + 9)
        )
        assert one.k == 9
        found = match_eigenvectors(one, other, by=by)
        for side, e in ((found.first, one), (found.second, other)):
            values = e.values[0, side].abs()
            assert (values > 1e-4 * e.values.abs().max()).all()
        assert len(found.cosines) <= 4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e20])
@pytest.mark.parametrize("centred", [False, True])
def test_similarity_does_not_depend_on_the_scale(scale, centred):
    f, g = (random_tensor(4, 5, 3, biases=True, seed=s, dtype=torch.float32) for s in (1, 2))
    plain = functional_similarity(f, g, centred=centred)
    moved = functional_similarity(scale * f, 2.0**-40 * g, centred=centred)
    assert_close(moved, plain, rtol=1e-5, atol=1e-7)
    bare, other = f.parts().interaction, g.parts().interaction
    one = replace(bare, left=2.0**-10 * bare.left, out=scale * bare.out)
    assert_close(one.cosine_similarity(other), bare.cosine_similarity(other), rtol=1e-5, atol=1e-7)
    assert_close(one.norm().double() / scale, 2.0**-10 * bare.norm().double(), rtol=1e-6, atol=0)


def test_an_inner_product_that_float32_cannot_hold_is_refused():
    f = 1e20 * random_tensor(4, 5, 3, dtype=torch.float32)
    for call in (lambda: functional_inner(f, f), lambda: f.inner(f)):
        with pytest.raises(
            ValueError, match=r"inner products of up to .*e\+4\d cannot be held in float32"
        ):
            call()
    assert_close(f.cosine_similarity(f).item(), 1.0, rtol=1e-6, atol=0)
