"""Higher-order SVD against the SVD of the dense flattening."""

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from tests.tensor.reference import random_tensor, tensors
from tl_bilinear import HOSVD, BilinearTensor
from tl_bilinear.tensor import hosvd, tucker

TOLERANCE = {"rtol": 1e-7, "atol": 1e-6}  # values, not squares: the Gram's sqrt(eps) near zero


def flattening(t, mode):
    dense = t.dense()
    return dense.flatten(1) if mode == "output" else dense.permute(1, 0, 2).flatten(1)


@given(tensors())
def test_values_and_directions(t):
    for mode in ("output", "input"):
        s = torch.linalg.svdvals(flattening(t, mode))
        found = hosvd(t, mode=mode)
        count = len(s)
        assert_close(found.values[:count], s, **TOLERANCE)
        assert_close(found.norm, float(t.dense().norm()), rtol=1e-10, atol=1e-10)
        # Projected on each direction the flattening has that singular value as its norm.
        norms = torch.linalg.vector_norm(found.vectors @ flattening(t, mode), dim=1)
        assert_close(norms, found.values, **TOLERANCE)
        identity = torch.eye(len(found.values), dtype=torch.float64)
        assert_close(found.vectors @ found.vectors.T, identity, **TOLERANCE)
        largest = found.vectors.gather(1, found.vectors.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


@given(tensors(biases=False))
def test_right_singular_matrices_are_orthonormal_and_rebuild_the_tensor(t):
    h = hosvd(t)
    kept = h.values > 1e-6
    q = h.interactions.dense()[kept]
    gram = torch.einsum("iab,jab->ij", q, q)
    assert_close(gram, torch.eye(len(q), dtype=torch.float64), **TOLERANCE)
    rebuilt = torch.einsum("i,ia,ijk->ajk", h.values[kept], h.vectors[kept], q)
    assert_close(rebuilt, t.dense(), **TOLERANCE)


def test_truncation_error_and_explained_share():
    t = random_tensor(6, 9, 5)
    for k in range(1, 6):
        h = hosvd(t, k)
        rebuilt = torch.einsum("i,ia,ijk->ajk", h.values, h.vectors, h.interactions.dense())
        assert_close(h.truncation_error, float((t.dense() - rebuilt).norm()), **TOLERANCE)
        share = float(rebuilt.square().sum() / t.dense().square().sum())
        assert_close(float(h.explained[-1]), share, **TOLERANCE)
    assert hosvd(t).truncation_error < 1e-6


def test_tiles_do_not_matter(monkeypatch):
    t = random_tensor(5, 23, 4)
    whole = hosvd(t).values, hosvd(t, mode="input").values, t.norm()
    for size in (8, 8 * 23, 8 * 23 * 5 + 3):
        monkeypatch.setattr("tl_bilinear.tensor.grams.TILE_BYTES", size)
        assert_close((hosvd(t).values, hosvd(t, mode="input").values, t.norm()), whole)


def test_float32_factors_keep_small_singular_values():
    """A float32 Gram would lose everything below 3e-4 of the largest."""
    values = torch.tensor([1.0, 1e-2, 1e-4, 1e-6])
    left = torch.linalg.qr(torch.randn(4, 4)).Q
    t = BilinearTensor(left, left, torch.diag(values))
    h = hosvd(t)
    assert h.values.dtype == torch.float32
    assert_close(h.values, values, rtol=1e-4, atol=0)
    assert 0 < h.floor < 1e-6


def test_noise_below_the_floor():
    t = random_tensor(5, 3, 8)  # rank 3 in its output mode
    h = hosvd(t)
    assert (h.values[3:] <= h.floor).all()
    assert h.floor < 1e-6 * h.values[0]
    assert torch.isfinite(h.interactions.dense()).all()


@given(tensors(biases=True, min_size=2))
def test_tucker(t):
    k_out, k_in = max(1, t.d_out - 1), max(1, t.d_in - 1)
    small = tucker(t, k_out, k_in)
    assert small.core.shape == (k_out, k_in, k_in)
    expanded = small.tensor
    assert repr(expanded).endswith("inputs -> outputs)")
    assert expanded.shape == t.shape
    assert_close(small.error, float((t.dense() - expanded.dense()).norm()), rtol=1e-6, atol=1e-6)
    full = tucker(t, t.d_out, t.d_in)
    assert_close(full.tensor.dense(), t.dense(), **TOLERANCE)
    assert full.error < 1e-5 * (1 + float(t.norm()))


def test_zero_and_bad_requests(tmp_path):
    zero = 0.0 * random_tensor(4, 3, 2)
    h = hosvd(zero)
    assert h.values.tolist() == [0, 0]
    assert h.explained.tolist() == [0, 0]
    t = random_tensor(4, 3, 2)
    with pytest.raises(
        ValueError, match=r"k must lie between 1 and 2 \(the output directions\), got 3"
    ):
        hosvd(t, 3)
    with pytest.raises(ValueError, match="the input directions"):
        tucker(t, 1, 5)
    found = hosvd(t, 1)
    found.save(tmp_path / "h.safetensors")
    loaded = HOSVD.load(tmp_path / "h.safetensors")
    assert torch.equal(loaded.vectors, found.vectors)
    assert (loaded.mode, loaded.space, loaded.interactions) == ("output", "outputs", None)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be 'output' or 'input', got 'left'"):
        hosvd(random_tensor(4, 3, 2), mode="left")
