"""InteractionMatrix and Eigendecomposition against the dense matrix."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor, tensors
from tl_bilinear import BilinearTensor, Eigendecomposition, TopInteractions
from tl_bilinear.tensor import top as top_module

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
BATCHES = [(), (1,), (3,), (2, 3), (0,), (2, 0)]
seeds = st.integers(0, 2**16)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(values, d=None, seed=0):
    """One matrix with these eigenvalues, as factors: left = right = its eigenvectors."""
    d = d or len(values)
    vectors = torch.linalg.qr(normal(seed, d, d)).Q[: len(values)]
    out = torch.tensor([values], dtype=torch.float64)
    return BilinearTensor(vectors, vectors, out).interaction()[0], vectors


@given(tensors(), seeds, st.sampled_from(BATCHES))
def test_products_and_numbers(t, seed, batch):
    Q = t.interaction(normal(seed, *batch, t.d_out))
    dense = torch.einsum("...a,aij->...ij", normal(seed, *batch, t.d_out), t.dense())
    x, m = normal(seed, 4, t.d_in), normal(seed, *batch, t.d_in, 2)
    assert Q.shape == dense.shape
    assert Q.batch_shape == torch.Size(batch)
    assert_close(Q.dense(), dense, **TOLERANCE)
    assert torch.equal(Q.dense(), Q.dense().mT)
    assert_close(Q @ x[0], dense @ x[0], **TOLERANCE)
    assert_close(Q @ x.T, dense @ x.T, **TOLERANCE)
    assert_close(Q @ m, dense @ m, **TOLERANCE)
    quadratic = torch.einsum("ni,...ij,nj->n...", x, dense, x)
    assert_close(Q.quadratic(x), quadratic, **TOLERANCE)
    assert_close(Q.quadratic(x[0]), quadratic[0], **TOLERANCE)
    assert_close(Q.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1), **TOLERANCE)
    assert_close(Q.frobenius_norm(), torch.linalg.matrix_norm(dense), **TOLERANCE)
    d = normal(seed, 3, t.d_in)
    assert_close(Q.fold(d).dense(), d @ dense @ d.T, **TOLERANCE)


@pytest.mark.parametrize(("d", "h", "count"), [(9, 4, 30), (4, 9, 1), (30, 3, 2)])
def test_norms_agree_whichever_way_is_cheaper(d, h, count, monkeypatch):
    Q = random_tensor(d, h, 5).interaction(normal(1, count, 5))
    monkeypatch.setattr("tl_bilinear.tensor.grams.TILE_BYTES", 2 * h * 8)
    monkeypatch.setattr("tl_bilinear.tensor.top.BLOCK_ELEMENTS", 2 * d)
    assert_close(Q.frobenius_norm(), torch.linalg.matrix_norm(Q.dense()), **TOLERANCE)


def test_output_of_a_direction_is_its_quadratic_form():
    t = random_tensor(5, 6, 3, biases=True)
    u, x = normal(0, 4, 3), normal(1, 7, 5)
    assert_close(t.parts().interaction(x) @ u.T, t.interaction(u).quadratic(x), **TOLERANCE)
    ones = torch.ones(7, 1, dtype=x.dtype)
    whole = t.augmented().interaction(u).quadratic(torch.cat([x, ones], 1))
    assert_close(t(x) @ u.T, whole, **TOLERANCE)


def test_a_batch_indexes_like_a_tensor():
    Q = random_tensor(5, 6, 3).interaction(normal(0, 4, 2, 3))
    dense = Q.dense()
    assert_close(Q[1].dense(), dense[1])
    assert_close(Q[1, 0].dense(), dense[1, 0])
    assert_close(Q[1:3].dense(), dense[1:3])
    assert_close(Q[:, 0].dense(), dense[:, 0])
    assert [one.shape for one in Q] == [torch.Size([2, 5, 5])] * 4
    assert len(Q) == 4
    with pytest.raises(IndexError, match="3 indices for 2 batch dimensions"):
        Q[0, 0, 0]
    with pytest.raises(TypeError, match="no length"):
        len(Q[0, 0])


# ---------------------------------------------------------------------------- eigenpairs


@given(tensors(), seeds, st.sampled_from(BATCHES), st.sampled_from(["auto", "dense", "lowrank"]))
def test_full_decomposition(t, seed, batch, method):
    Q = t.interaction(normal(seed, *batch, t.d_out))
    k = min(t.d_in, 2 * t.d_hidden) if method == "lowrank" else None
    e = Q.eigh(k, method=method)
    assert e.values.shape == (*batch, e.k)
    assert e.vectors.shape == (*batch, e.k, t.d_in)
    assert_close(e.dense(), Q.dense(), **TOLERANCE)
    identity = torch.eye(e.k, dtype=torch.float64).expand(*batch, e.k, e.k)
    assert_close(e.vectors @ e.vectors.mT, identity, **TOLERANCE)
    assert (e.values.abs().diff(dim=-1) <= 1e-12).all()
    assert (e.residuals <= 1e-9).all()
    assert_close(e.values.sum(-1), Q.trace(), **TOLERANCE)
    assert_close(e.values.square().sum(-1).sqrt(), Q.frobenius_norm(), **TOLERANCE)
    largest = e.vectors.gather(-1, e.vectors.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()
    x = normal(seed, 3, t.d_in)
    assert_close(e.quadratic(x), Q.quadratic(x), **TOLERANCE)
    assert e.activations(x).shape == (3, *batch, e.k)
    assert_close(e.activations(x).sum(-1), Q.quadratic(x), **TOLERANCE)


@pytest.mark.parametrize("which", ["magnitude", "positive", "negative"])
@pytest.mark.parametrize("method", ["dense", "lowrank"])
def test_which_end_of_the_spectrum(which, method):
    values = [5.0, -4.0, 3.0, -2.0, 1.0, -0.5]
    Q, vectors = planted(values, d=20)
    wanted = {
        "magnitude": [5.0, -4.0, 3.0],
        "positive": [5.0, 3.0, 1.0],
        "negative": [-4.0, -2.0, -0.5],
    }[which]
    e = Q.eigh(3, which=which, method=method)
    assert_close(e.values, torch.tensor(wanted, dtype=torch.float64), **TOLERANCE)
    planted_vectors = vectors[[values.index(v) for v in wanted]]
    assert_close((e.vectors * planted_vectors).sum(-1).abs(), torch.ones(3, dtype=torch.float64))
    dropped = max(abs(v) for v in values if v not in wanted)
    assert_close(e.bound, torch.tensor(dropped, dtype=torch.float64), rtol=1e-6, atol=0)


def test_negative_end_of_a_positive_matrix():
    Q, _ = planted([3.0, 2.0, 1.0])
    assert_close(Q.eigh(1, which="negative").values, torch.tensor([1.0], dtype=torch.float64))


def test_auto_takes_the_cheap_way():
    assert random_tensor(20, 4, 2).interaction().eigh(3).method == "lowrank"
    assert random_tensor(20, 4, 2).interaction().eigh(9).method == "dense"
    assert random_tensor(20, 40, 2).interaction().eigh(3).method == "dense"


@given(tensors(biases=False, min_size=2), seeds, st.floats(0.1, 10))
def test_truncation_and_its_certificate(t, seed, radius):
    Q = t.interaction(normal(seed, 2, t.d_out))
    full = Q.eigh()
    x = normal(seed, 50, t.d_in)
    x = radius * x / x.norm(dim=-1, keepdim=True)
    for k in range(1, t.d_in + 1):
        top = Q.eigh(k)
        assert_close(top.values, full.values[:, :k], **TOLERANCE)
        assert_close(full.top(k).quadratic(x), full.quadratic(x, k), **TOLERANCE)
        for e in (top, full.top(k), full.top(k)):
            error = (Q.quadratic(x) - e.quadratic(x)).abs()
            assert (error <= e.certificate(radius) * (1 + 1e-9) + 1e-12).all()
            norm = torch.linalg.matrix_norm(Q.dense() - e.dense(), ord=2)
            assert_close(e.bound, norm, rtol=1e-6, atol=1e-9)
    assert_close(full.certificate(radius, 1), full.top(1).certificate(radius))


def test_a_truncation_knows_what_was_left_out_before_it():
    """At one end of a spectrum what was never held may be larger than anything that is."""
    Q, _ = planted([5.0, 3.0, 1.0, -9.0], d=8)
    for scale in (1e-3, 1.0, 1e3):
        whole = replace(Q, weights=scale * Q.weights)
        for held in (2, 3):
            found = whole.eigh(held, which="positive")
            for e in (found, found.top(1)):
                left_out = torch.linalg.matrix_norm(whole.dense() - e.dense(), ord=2)
                assert_close(left_out, torch.tensor(9 * scale).double())
                assert_close(e.bound, left_out)
                assert_close(e.norm, left_out)
            assert_close(found.top(1).rest, torch.tensor(3 * scale).double())
        low = whole.eigh(3, which="negative")  # -9, and then zeros
        assert_close(low.top(1).bound, torch.tensor(5 * scale).double())
        assert_close(low.top(1).rest, torch.tensor(0.0).double(), rtol=0, atol=1e-9 * scale)
        assert low.n_signed == 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_residuals_are_part_of_a_truncations_bound(scale):
    """Of Ritz pairs that have not converged: without their residuals the bound would be too small."""
    too_small = 0
    for seed in range(20):
        Q = scale * random_tensor(8, 12, 1, seed=seed).dense()[0]
        basis = torch.linalg.qr(normal(seed, 8, 4)).Q.mT
        values, columns = torch.linalg.eigh(basis @ Q @ basis.mT)
        order = values.abs().argsort(descending=True)
        values, vectors = values[order], columns.mT[order] @ basis
        residuals = torch.linalg.vector_norm(vectors @ Q - values[:, None] * vectors, dim=1)

        def left_out(k, Q=Q, values=values, vectors=vectors):
            return torch.linalg.matrix_norm(Q - (vectors[:k].mT * values[:k]) @ vectors[:k], ord=2)

        held = Eigendecomposition(values, vectors, residuals, left_out(4), tol=1e-3)
        for k in (1, 2, 3):
            assert left_out(k) <= held.top(k).bound * (1 + 1e-12)
            too_small += bool(left_out(k) > torch.maximum(held.bound, values[k].abs()))
        assert not held.converged
    assert too_small > 5


def test_the_certificate_is_attained():
    Q, vectors = planted([5.0, -4.0, 3.0])
    e = Q.eigh(2)
    worst = 7 * vectors[2]
    error = (Q.quadratic(worst) - e.quadratic(worst)).abs()
    assert_close(error, e.certificate(7.0), rtol=1e-6, atol=0)


def test_projectors_are_unique_where_eigenvectors_are_not():
    values = [3.0, 3.0, -3.0, 1.0, 1.0, 1.0]
    Q, vectors = planted(values)
    groups = Q.eigh().projectors()
    assert [(round(g.value, 9), g.rank) for g in groups] == [(3.0, 2), (-3.0, 1), (1.0, 3)]
    for group, rows in zip(groups, ([0, 1], [2], [3, 4, 5]), strict=True):
        assert_close(group.matrix, vectors[rows].T @ vectors[rows], **TOLERANCE)
    whole = sum(g.value * g.matrix for g in groups)
    assert_close(whole, Q.dense(), **TOLERANCE)
    assert len(Q.eigh().projectors(rtol=3)) == 1
    with pytest.raises(ValueError, match="batch of"):
        random_tensor(3, 3, 2).interaction().eigh().projectors()


def test_effective_rank():
    assert_close(planted([2.0] * 3, d=8)[0].eigh().effective_rank().item(), 3.0)
    assert_close(planted([2.0, 1e-9])[0].eigh().effective_rank().item(), 1.0)
    zero = 0.0 * random_tensor(4, 3, 2)
    assert zero.interaction().eigh().effective_rank().tolist() == [0, 0]


def test_eigendecomposition_indexes_saves_and_lists(tmp_path):
    e = random_tensor(5, 6, 3).interaction().eigh(2)
    assert e[1].values.shape == (2,)
    assert e[1:].vectors.shape == (2, 2, 5)
    with pytest.raises(IndexError, match="no batch dimension"):
        e[1][0]
    e.save(tmp_path / "e.safetensors")
    loaded = Eigendecomposition.load(tmp_path / "e.safetensors")
    assert torch.equal(loaded.vectors, e.vectors)
    assert (loaded.method, loaded.space) == ("dense", "inputs")
    table = e.to_pandas()
    assert table.columns.tolist() == ["matrix", "rank", "value", "residual"]
    assert table["rank"].tolist() == [1, 2] * 3
    assert table["value"].tolist() == e.values.flatten().tolist()


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_refused():
    Q = random_tensor(5, 2, 3).interaction()
    for k in (0, -1, 6):
        with pytest.raises(ValueError, match=rf"k must lie between 1 and 5 \(d, .*got {k}"):
            Q.eigh(k)
    with pytest.raises(ValueError, match="finds at most 2 h = 4 eigenpairs, got k=5"):
        Q.eigh(5, method="lowrank")
    with pytest.raises(ValueError, match="k must lie between 1 and 2"):
        Q.eigh(2).top(3)
    with pytest.raises(ValueError, match="must not be negative"):
        Q.eigh(2).certificate(-1.0)
    with pytest.raises(
        ValueError, match=r"Q @ x needs x of shape \[5\] or \[..., 5, m\], got \[4\]"
    ):
        Q @ torch.ones(4)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 5\] \(d, inputs\)"):
        Q.eigh(2).activations(torch.ones(4))


# ---------------------------------------------------------------------------- top interactions


def brute_force_top(Q, k, kind):
    entries = []
    for i in range(Q.shape[0]):
        for j in range(i, Q.shape[0]):
            if kind == "all" or (kind == "self") == (i == j):
                coefficient = Q[i, j].item() * (1 if i == j else 2)
                entries.append((abs(coefficient), i, j, Q[i, j].item(), coefficient))
    return sorted(entries, reverse=True)[:k]


@pytest.mark.parametrize("block", [2**24, 7, 14])
@pytest.mark.parametrize("kind", ["all", "self", "cross"])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_top_interactions(kind, k, block, monkeypatch):
    monkeypatch.setattr("tl_bilinear.tensor.top.BLOCK_ELEMENTS", block)
    t = random_tensor(7, 5, 3)
    top = t.interaction().top(k, kind=kind)
    assert top.values.shape == (3, k)
    for a, dense in enumerate(t.dense()):
        expected = brute_force_top(dense, k, kind)
        assert [(i, j) for _, i, j, _, _ in expected] == list(
            zip(top.first[a].tolist(), top.second[a].tolist(), strict=True)
        )
        assert_close(top.values[a].tolist(), [e[3] for e in expected], **TOLERANCE)
        assert_close(top.coefficients[a].tolist(), [e[4] for e in expected], **TOLERANCE)


@pytest.mark.parametrize("block", [2**24, 40])
@pytest.mark.parametrize("kind", ["all", "self", "cross"])
@given(st.integers(0, 2**16), st.integers(2, 30), st.integers(1, 6), st.integers(1, 9))
def test_top_interactions_of_directions(kind, block, seed, n, d, k):
    t = random_tensor(d, 5, 2, seed=seed)
    directions = normal(seed + 1, n, d) * normal(seed + 2, n, 1).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_bilinear.tensor.top.BLOCK_ELEMENTS", block)
        k = min(k, n * (n - 1) // 2 if kind == "cross" else n)
        top = t.interaction().top(k, kind=kind, directions=directions)
    for a, dense in enumerate(t.fold(directions).dense()):
        expected = brute_force_top(dense, k, kind)
        assert_close(
            top.coefficients[a].abs().tolist(), [e[0] for e in expected], rtol=1e-8, atol=1e-10
        )
        assert_close(dense[top.first[a], top.second[a]], top.values[a], rtol=1e-8, atol=1e-10)
        pairs = set(zip(top.first[a].tolist(), top.second[a].tolist(), strict=True))
        assert len(pairs) == k
        assert all(i <= j for i, j in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "cross"])
@given(seeds, st.integers(20, 60), st.integers(2, 12), st.integers(1, 6))
def test_screening_in_few_rounded_terms_loses_no_pair(kind, dtype, seed, n, d, k):
    # Neurons of falling size: the last terms are small and are left out.
    scale = 4.0 ** -torch.arange(d, dtype=torch.float64)
    left, right = normal(seed, 2, 8, d) * scale
    t = BilinearTensor(left, right, normal(seed + 1, 1, 8))
    directions = normal(seed + 2, n, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_module, "SCREEN_FROM", 1)
        patch.setattr(top_module, "_FLAT", 1e9)  # never
        patch.setattr(top_module, "CORNER", 8)
        patch.setattr(
            top_module, "_MARGIN", 1.0
        )  # so that small cases are screened, in either precision
        patch.setattr(top_module, "_faster_dtype", lambda weighted: dtype)
        top = t.interaction()[0].top(k, kind=kind, directions=directions)
    dense = t.fold(directions).dense()[0]
    expected = brute_force_top(dense, k, kind)
    assert_close(top.coefficients.abs().tolist(), [e[0] for e in expected], rtol=1e-8, atol=1e-12)
    assert_close(dense[top.first, top.second], top.values, rtol=1e-8, atol=1e-12)


@given(seeds, st.integers(4, 12), st.integers(1, 3))
def test_what_leading_terms_leave_out_is_bounded(seed, d, terms):
    values = (0.5 ** torch.arange(d, dtype=torch.float64)) * normal(seed, d).sign()
    vectors = torch.linalg.qr(normal(seed + 1, d, d)).Q
    matrix, directions = (vectors * values) @ vectors.T, normal(seed + 2, 30, d)
    found = top_module.LeadingEntries(matrix, directions, values, vectors, terms)
    rows = directions[found.row_order]
    whole = rows @ matrix @ rows.T
    left_out = (whole - found.rows @ found.columns.T).abs()
    assert bool((left_out <= found.row_rest[:, None] * found.column_rest).all())
    assert bool((whole.abs() <= found.row_reach[:, None] * found.column_reach).all())
    assert bool((found.row_reach.diff() <= 0).all())
    some, others = torch.tensor([3, 0, 29, 3]), torch.tensor([1, 0, 2, 28])
    assert_close(found.entries(some, others), whole[some, others], **TOLERANCE)
    assert_close(found.block(slice(2, 9), slice(5, None)), whole[2:9, 5:], **TOLERANCE)


def test_where_most_terms_would_be_needed_every_block_is_computed(monkeypatch):
    """Pairs as far below the largest eigenvalue as the k-th here need terms that are as small."""
    values = 0.5 ** torch.arange(12, dtype=torch.float64)
    vectors = torch.linalg.qr(normal(0, 12, 12)).Q
    matrix, directions = (vectors * values) @ vectors.T, normal(1, 40, 12)
    few = top_module.LeadingEntries.of(matrix, directions, 3)
    assert few is not None
    assert few.rows.shape[1] < 8
    assert top_module.LeadingEntries.of(matrix, directions, 40 * 39 // 2) is None
    monkeypatch.setattr(top_module, "SCREEN_FROM", 1)
    t = BilinearTensor(vectors.T, vectors.T, values[None])
    found = t.interaction()[0].top(40 * 39 // 2, kind="cross", directions=directions)
    assert len(set(zip(found.first.tolist(), found.second.tolist(), strict=True))) == 40 * 39 // 2


@pytest.mark.parametrize("kind", ["all", "cross"])
@given(seeds, st.integers(20, 60), st.integers(2, 12), st.integers(1, 6))
def test_a_flat_matrix_is_searched_block_by_block(kind, seed, n, d, k):
    t = BilinearTensor(*normal(seed, 2, 8, d), normal(seed + 1, 1, 8))
    directions = normal(seed + 2, n, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_module, "SCREEN_FROM", 1)
        patch.setattr(top_module, "_FLAT", 0.0)
        patch.setattr(top_module, "CORNER", 8)
        patch.setattr(top_module.LeadingEntries, "__init__", None)
        top = t.interaction()[0].top(k, kind=kind, directions=directions)
    expected = brute_force_top(t.fold(directions).dense()[0], k, kind)
    assert_close(top.coefficients.abs().tolist(), [e[0] for e in expected], rtol=1e-8, atol=1e-12)


def test_directions_that_train_are_searched_too(monkeypatch):
    monkeypatch.setattr(top_module, "SCREEN_FROM", 1)
    monkeypatch.setattr(top_module, "_FLAT", 0.0)
    t = BilinearTensor(*normal(0, 2, 8, 6), normal(1, 1, 8))
    directions = normal(2, 40, 6).requires_grad_()
    top = t.interaction()[0].top(3, directions=directions)
    expected = brute_force_top(t.fold(directions.detach()).dense()[0], 3, "all")
    assert_close(top.coefficients.abs().tolist(), [e[0] for e in expected], rtol=1e-8, atol=1e-12)
    top.coefficients.sum().backward()
    assert directions.grad.count_nonzero() > 0


def test_what_counts_as_flat():
    """Random matrices, unless a pair makes as much of one as a leading eigenvector does."""
    random = normal(0, 200, 200)
    random = (random + random.T) / 20
    decaying = torch.diag(0.9 ** torch.arange(200, dtype=torch.float64))
    met_by_chance = 4 / 200  # times the Frobenius norm: about the largest of 30,000 random pairs
    for matrix, needed, flat in (
        (random, met_by_chance * float(random.norm()), True),
        (random, float(random.norm()) / 4, False),
        (decaying, met_by_chance * float(decaying.norm()), False),
    ):
        for scale in (1.0, 1e-9, 1e9):
            assert top_module._is_flat(scale * matrix, scale * needed) is flat


def test_the_margin_is_what_keeps_pairs(monkeypatch):
    """Without it a rounded screen does lose some."""
    scale = 2.0 ** -torch.arange(12, dtype=torch.float64)
    lost = 0
    for seed in range(20):
        left, right = normal(seed, 2, 8, 12) * scale
        t = BilinearTensor(left, right, normal(seed + 1, 1, 8))
        directions = normal(seed + 2, 60, 12)
        exact = t.interaction()[0].top(5, directions=directions)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(top_module, "SCREEN_FROM", 1)
            patch.setattr(top_module, "_FLAT", 1e9)
            patch.setattr(top_module, "CORNER", 30)
            patch.setattr(top_module, "_MARGIN", 1.0)
            patch.setattr(top_module, "_faster_dtype", lambda weighted: torch.bfloat16)
            made = top_module._Screen.__init__

            def careless(self, *args, made=made):
                made(self, *args)
                self.margin = torch.zeros_like(self.margin)

            patch.setattr(top_module._Screen, "__init__", careless)
            try:
                found = t.interaction()[0].top(5, directions=directions)
                lost += not torch.equal(found.coefficients, exact.coefficients)
            except RuntimeError:  # fewer than k were left
                lost += 1
    assert lost > 0


def test_most_pairs_of_directions_are_never_computed(monkeypatch):
    t = random_tensor(32, 64, 1, dtype=torch.float32)
    directions = normal(1, 4000, 32).float() * torch.linspace(1, 0.01, 4000)[:, None]
    computed = []
    block = top_module.DirectionEntries.block
    monkeypatch.setattr(
        top_module.DirectionEntries,
        "block",
        lambda self, rows, columns: (computed.append(block(self, rows, columns)), computed[-1])[1],
    )
    top = t.interaction()[0].top(20, directions=directions)
    assert sum(b.numel() for b in computed) < 4000**2 / 4
    dense = t.fold(directions).dense()[0].triu()
    dense.diagonal().div_(2)
    best = (2 * dense.abs()).flatten().topk(20)
    assert top.first.tolist() == (best.indices // 4000).tolist()
    assert top.second.tolist() == (best.indices % 4000).tolist()
    assert_close(top.coefficients.abs(), best.values, rtol=1e-5, atol=0)


def test_the_strongest_pair_of_a_batch_may_be_in_a_matrix_of_smaller_norm():
    """A pair is met twice: its coefficient, 2, is larger than the norm of its matrix, 1.41."""
    left = torch.eye(3, dtype=torch.float64)
    pair, alone = torch.zeros(2, 2, 3, dtype=torch.float64)
    pair[0, 0], alone[1, 0] = 2.0, 1.5
    t = BilinearTensor(left, left.roll(1, 0), pair) + BilinearTensor(left, left, alone)
    both = t.interaction()
    assert_close(both.frobenius_norm(), torch.tensor([2**0.5, 1.5]).double())
    for directions in (None, left, 3 * left):
        which, top = both.top_of_batch(1, directions=directions)
        assert which.tolist() == [0]
        assert sorted([int(top.first), int(top.second)]) == [0, 2]
        factor = 1 if directions is None else float(directions[0, 0]) ** 2
        assert_close(top.coefficients, torch.tensor([2.0 * factor]).double())
        which, top = both.top_of_batch(2, directions=directions)
        assert which.tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_strongest_interactions_of_any_scale(scale):
    t = random_tensor(7, 9, 4, dtype=torch.float32)
    t = replace(t, out=t.out * torch.tensor([1, 1e-3, 1e3, 1.0])[:, None])
    moved = replace(t, left=2.0**-30 * t.left, out=2.0**30 * scale * t.out)
    directions = torch.randn(20, 7)
    for rows in (None, directions):
        one, other = (x.interaction().top(5, directions=rows) for x in (t, moved))
        assert torch.equal(one.first, other.first)
        assert torch.equal(one.second, other.second)
        assert_close(one.values.double(), other.values.double() / scale, rtol=1e-5, atol=0)
        (a, one), (b, other) = (
            x.interaction().top_of_batch(6, directions=rows) for x in (t, moved)
        )
        assert a.tolist() == b.tolist() == [2] * 6
        assert_close(one.values.double(), other.values.double() / scale, rtol=1e-5, atol=0)
    for name in ("trace", "frobenius_norm", "dense"):
        one, other = (getattr(x.interaction(), name)() for x in (t, moved))
        assert_close(
            one.double(), other.double() / scale, rtol=1e-5, atol=1e-6 * float(one.abs().max())
        )
    one, other = t.interaction().entries(directions), moved.interaction().entries(directions)
    assert_close(
        one.double(), other.double() / scale, rtol=1e-5, atol=1e-6 * float(one.abs().max())
    )


def test_entries():
    t = random_tensor(5, 6, 3)
    directions = normal(3, 8, 5)
    dense = t.fold(directions).dense()
    rows, columns = torch.tensor([0, 7, 3, 3]), torch.tensor([7, 0, 3, 5])
    Q = t.interaction()
    assert_close(Q.entries(directions, rows, columns), dense[:, rows, columns], **TOLERANCE)
    assert_close(Q.entries(directions), dense.diagonal(dim1=1, dim2=2), **TOLERANCE)
    assert_close(
        Q.entries(None, rows[2:], columns[2:] - 2), t.dense()[:, [3, 3], [1, 3]], **TOLERANCE
    )


def test_all_interactions_make_the_output():
    t = random_tensor(6, 4, 2)
    top = t.interaction().top(6 * 7 // 2)
    x = normal(0, 6)
    total = (top.coefficients * x[top.first] * x[top.second]).sum(-1)
    assert_close(total, t(x), **TOLERANCE)


@pytest.mark.usefixtures("unchecked")
def test_top_interactions_of_one_and_of_no_matrix(tmp_path):
    t = random_tensor(4, 3, 2)
    one = t.interaction()[0].top(3)
    assert one.first.shape == (3,)
    assert t.interaction()[:0].top(3).values.shape == (0, 3)
    table = t.interaction().top(3).to_pandas()
    assert table.columns.tolist() == ["matrix", "first", "second", "kind", "value", "coefficient"]
    assert table["matrix"].tolist() == [0, 0, 0, 1, 1, 1]
    assert set(table["kind"]) <= {"self", "cross"}
    one.save(tmp_path / "top.safetensors")
    assert torch.equal(TopInteractions.load(tmp_path / "top.safetensors").values, one.values)
    assert one.top(2).first.tolist() == one.first[:2].tolist()
    with pytest.raises(
        ValueError, match=r"k must lie between 1 and 10 \(the all interactions of 4"
    ):
        t.interaction().top(11)
    with pytest.raises(ValueError, match="kind must be"):
        t.interaction().top(1, kind="diagonal")


def test_degenerate_entries():
    t = BilinearTensor(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1))
    e = t.interaction()[0].eigh()
    assert_close(e.values, torch.tensor([2.0, 0.0]), rtol=0, atol=1e-6)
    assert_close(e.vectors[0], torch.full((2,), math.sqrt(0.5)))
