"""Two layers composed, against d^4 entries."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_bilinear.tensor import (
    BilinearTensor,
    QuarticDirections,
    QuarticForm,
    with_residual,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def layer(d_in, d_hidden, d_out, seed, biases=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    extra = (normal(d_hidden), normal(d_hidden), normal(d_out)) if biases else ()
    return BilinearTensor(
        normal(d_hidden, d_in), normal(d_hidden, d_in), normal(d_out, d_hidden), *extra
    )


def build(d=4, middle=3, seed=0, dtype=torch.float64, **options):
    first, second = (
        layer(d, 6, middle, seed, dtype=dtype),
        layer(middle, 5, 2, seed + 1, dtype=dtype),
    )
    u = torch.tensor([1.0, -0.5], dtype=dtype)
    return first, second, u, QuarticForm.of(first, second, u, **options)


def reference(first, second, u):
    """T from its definition: the composition's coefficients, averaged over all 24 permutations."""
    Q = torch.einsum("a,aij->ij", u, second.dense())
    B = first.dense()
    pairs = torch.einsum("ab,aij,bkl->ijkl", Q, B, B)
    return sum(pairs.permute(p) for p in itertools.permutations(range(4))) / 24


@given(d=st.integers(1, 5), middle=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_form_is_the_composition(d, middle, seed):
    first, second, u, form = build(d, middle, seed)
    x = torch.randn(3, d, dtype=torch.float64)
    T = reference(first, second, u)
    scale = float(T.abs().max())
    assert_close(form(x), second(first(x)) @ u, rtol=1e-9, atol=1e-9 * scale)
    assert_close(form.dense(), T, rtol=1e-9, atol=1e-10 * scale)
    contracted = torch.einsum("ijkl,ni,nj,nk->nl", T, x, x, x)
    assert_close(form.contract(x), contracted, rtol=1e-9, atol=1e-9 * scale)
    assert_close(
        form._hessian(x), torch.einsum("ijkl,ni,nj->nkl", T, x, x), rtol=1e-9, atol=1e-9 * scale
    )


@given(d=st.integers(1, 5), seed=st.integers(0, 100))
def test_inner_products(d, seed):
    *_, one = build(d, 3, seed)
    *_, two = build(d, 2, seed + 50)
    first, second = one.dense(), two.dense()
    scale = float(first.norm() * second.norm())
    assert float(one.inner(two)) == pytest.approx(float((first * second).sum()), abs=1e-10 * scale)
    assert float(one.norm()) == pytest.approx(float(first.norm()), rel=1e-9)
    assert float(one.cosine_similarity(two)) == pytest.approx(
        float((first * second).sum()) / scale, abs=1e-9
    )


def test_float32():
    first, second, u, form = build(dtype=torch.float32)
    x = torch.randn(20, 4)
    expected = second(first(x)) @ u
    assert_close(form(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert form.inner(form).dtype == torch.float32
    found = form.leading(1)
    assert float(found.residuals[0]) <= 1e-4 * float(found.values[0].abs())


def test_gradient():
    *_, form = build()
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    form(x).backward()
    assert_close(x.grad, 4 * form.contract(x.detach()), **EXACT)


def test_truncation_keeps_the_largest_squares():
    first, second, u, form = build(rank=1)
    values, vectors = torch.linalg.eigh(second.interaction(u).dense())
    best = values.abs().argmax()
    x = torch.randn(5, 4, dtype=torch.float64)
    assert form.n == 1
    assert_close(form(x), values[best] * (first(x) @ vectors[:, best]).square(), **EXACT)


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_leading_directions_are_optima_of_the_sphere(which):
    *_, form = build(d=3)
    found = form.leading(5, which=which, starts=30, steps=3000)
    assert found.converged > 0.9
    assert_close(found.vectors.norm(dim=1), torch.ones(len(found.values), dtype=torch.float64))
    assert_close(form(found.vectors), found.values, **EXACT)
    sign = 1 if which == "positive" else -1
    signed = sign * found.values
    assert bool((signed[:-1] >= signed[1:]).all())
    slope = form.contract(found.vectors)
    assert_close(slope, found.values[:, None] * found.vectors, rtol=1e-8, atol=1e-8)
    # A fine grid of the sphere finds nothing better, and no start ends below a neighbour.
    angles = torch.linspace(0, torch.pi, 400, dtype=torch.float64)
    theta, phi = torch.meshgrid(angles, 2 * angles, indexing="ij")
    grid = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
    best = float((sign * form(grid)).max())
    assert best <= float(signed[0]) * (1 + 1e-9)
    assert best == pytest.approx(float(signed[0]), rel=1e-3)
    near = found.vectors[:, None] + 1e-3 * torch.randn(len(signed), 200, 3, dtype=torch.float64)
    near = near / near.norm(dim=-1, keepdim=True)
    assert bool((sign * form(near) <= signed[:, None] + 1e-12 * float(signed[0])).all())


def test_planted_direction_is_found():
    """q = (v . x)^4 plus a little: the first direction is v, found by most starts."""
    d = 24
    generator = torch.Generator().manual_seed(3)
    v = torch.nn.functional.normalize(
        torch.randn(d, generator=generator, dtype=torch.float64), dim=0
    )
    noise = layer(d, 30, 8, 4)
    first = BilinearTensor(v[None], v[None], torch.eye(8, 1, dtype=torch.float64)) + 0.005 * noise
    second = BilinearTensor(
        *(torch.eye(8, dtype=torch.float64)[:1] for _ in range(2)), torch.ones(1, 1)
    )
    form = QuarticForm.of(first, second, torch.ones(1))
    found = form.leading(2, starts=16)
    assert float((found.vectors[0] @ v).abs()) > 0.99
    assert int(found.hits[0]) >= 8
    table = found.to_pandas()
    assert list(table.columns) == ["rank", "value", "residual", "hits"]


def test_every_direction_is_a_maximum_and_no_saddle():
    """In more dimensions, by the second derivative along the sphere."""
    *_, form = build(d=12, middle=8)
    for which, sign in (("positive", 1), ("negative", -1)):
        found = form.leading(20, which=which, starts=30)
        assert found.converged == 1
        assert len(found.values) > 1
        assert int(found.hits.sum()) <= 30
        for v, value in zip(found.vectors, found.values, strict=True):
            across = torch.eye(12, dtype=torch.float64) - torch.outer(v, v)
            bend = 3 * across @ form._hessian(v[None])[0] @ across - value * across
            assert float((sign * torch.linalg.eigvalsh(bend)).max()) < 1e-8 * float(value.abs())


def test_what_did_not_converge_is_said():
    *_, form = build()
    found = form.leading(3, steps=1)
    assert found.converged < 1
    assert len(found.start_values) == 20
    assert len(found.values) <= int(found.start_converged.sum())


def test_same_seed_same_result_and_storage(tmp_path):
    *_, form = build()
    one, two = form.leading(2, seed=5), form.leading(2, seed=5)
    assert_close(one.vectors, two.vectors, rtol=0, atol=0)
    form.save(tmp_path / "form")
    one.save(tmp_path / "directions")
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(QuarticForm.load(tmp_path / "form")(x), form(x), rtol=0, atol=0)
    loaded = QuarticDirections.load(tmp_path / "directions")
    assert loaded.to_pandas().equals(one.to_pandas())
    assert len(loaded.top(1).values) == 1
    assert loaded.top(1).converged == one.converged


@pytest.mark.parametrize("residual", [True, False])
def test_biases_and_the_residual_connection(residual):
    first, second = layer(4, 6, 4, 0, biases=True), layer(4, 5, 3, 1, biases=True)
    u = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    block = with_residual(first, residual=residual)
    x = torch.randn(6, 4, dtype=torch.float64)
    one = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1)
    middle = first(x) + (x if residual else 0)
    assert_close(block(one), torch.cat([middle, one[:, -1:]], 1), **EXACT)
    form = QuarticForm.of(block, second.augmented(), u)
    assert_close(form(one), second(middle) @ u, rtol=1e-9, atol=1e-9)


def test_bad_requests(unchecked):
    first, second, u, form = build()
    with pytest.raises(
        ValueError, match="the first layer writes 3 coordinates, the second reads 4"
    ):
        QuarticForm.of(first, layer(4, 2, 2, 0), u)
    with pytest.raises(ValueError, match="the second layer has biases, and a form of degree four"):
        QuarticForm.of(first, layer(3, 2, 2, 0, biases=True), u)
    with pytest.raises(ValueError, match=r"direction must be one vector, got \[2, 2\]"):
        QuarticForm.of(first, second, torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="which must be 'positive' or 'negative'"):
        form.leading(1, which="both")
    with pytest.raises(ValueError, match="starts must lie between 1"):
        form.leading(1, starts=0)
    with pytest.raises(ValueError, match="4 and 2 coordinates cannot be compared"):
        form.inner(build(2)[-1])
    with pytest.raises(ValueError, match="needs d_out == d_in, got 3 and 4; pass residual=False"):
        with_residual(first)


def test_sizes_that_cannot_work_are_refused():
    wide = layer(2048, 4, 4, 0, dtype=torch.float32)
    form = QuarticForm.of(wide, layer(4, 4, 1, 1, dtype=torch.float32), torch.ones(1))
    with pytest.raises(
        MemoryError, match=r"dense\(\) of shape \[2048, 2048, 2048, 2048\] would take"
    ):
        form.dense()
    with pytest.raises(ValueError, match=r"20 starts of 500 steps .* max_flops=1\.0e\+14"):
        form.leading(1)
    with pytest.raises(ValueError, match=r"an inner product of QuarticForm.* use fewer squares"):
        form.inner(form, max_flops=1e9)
    with pytest.raises(MemoryError, match="the Hessians would take"):
        form.leading(1, starts=100, steps=1, max_flops=1e16)


def test_a_direction_and_its_opposite_are_one():
    """Starts end at v as often as at -v, and all of them count for one direction."""
    t = BilinearTensor(
        torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.eye(3).double()
    )
    form = QuarticForm(
        t.left, t.right, torch.eye(3).double(), torch.tensor([4.0, 2.0, 1.0]).double()
    )
    ends = []
    climb = QuarticForm._climb

    def watched(self, *args):
        x, done, taken = climb(self, *args)
        ends.append(x)
        return x, done, taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuarticForm, "_climb", watched)
        found = form.leading(3, starts=40, seed=1)
    signs = ends[0].gather(1, ends[0].abs().argmax(1, keepdim=True))[:, 0].sign()
    assert -1 in signs
    assert 1 in signs
    assert len(found.values) == 3
    assert int(found.hits.sum()) == 40
    cosines = (found.vectors @ found.vectors.T).abs().fill_diagonal_(0)
    assert cosines.max() < 0.5
