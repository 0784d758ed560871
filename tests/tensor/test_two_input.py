"""Forms of two inputs against their dense tensors and against the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import tensors
from tl_bilinear import hosvd
from tl_bilinear.tensor import SVD, PairMatrix, TopPairs, TwoInputForm
from tl_bilinear.tensor import top as top_module

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
seeds = st.integers(0, 2**16)
size = st.integers(1, 7)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_form(d_left, d_right, hidden, d_out, biases=False, seed=0, dtype=torch.float64):
    shapes = [(hidden, d_left), (hidden, d_right), (d_out, hidden)]
    shapes += [(hidden,), (hidden,), (d_out,)] if biases else []
    factors = [normal(seed + i, *shape).to(dtype) for i, shape in enumerate(shapes)]
    return TwoInputForm(*factors, left_space="queries", right_space="keys", output_space="scores")


def forms(biases=None):
    flag = st.booleans() if biases is None else st.just(biases)
    return st.builds(random_form, size, size, size, size, flag, seeds)


def oracle(form):
    """F by its definition."""
    return torch.einsum("ah,hi,hj->aij", form.out, form.left, form.right)


def slow(form, x, y):
    """One pair of inputs, neuron by neuron."""
    total = form.out.new_zeros(form.d_out) if form.bias_out is None else form.bias_out.clone()
    for h in range(form.d_hidden):
        a, b = form.left[h] @ x, form.right[h] @ y
        a = a if form.bias_left is None else a + form.bias_left[h]
        b = b if form.bias_right is None else b + form.bias_right[h]
        total = total + form.out[:, h] * a * b
    return total


@given(forms(), seeds)
def test_evaluation_is_the_formula(form, seed):
    x, y = normal(seed, form.d_left), normal(seed + 1, form.d_right)
    assert_close(form(x, y), slow(form, x, y), **TOLERANCE)
    assert_close(form.swap()(y, x), form(x, y), **TOLERANCE)
    many = form(x[None, None], normal(seed + 2, 4, 1, form.d_right))
    assert many.shape == (4, 1, form.d_out)


@given(forms(), seeds)
def test_dense_and_parts(form, seed):
    assert_close(form.dense(), oracle(form), **TOLERANCE)
    x, y = normal(seed, 3, form.d_left), normal(seed + 1, 3, form.d_right)
    parts = form.parts()
    assert_close(sum(parts(x, y)), form(x, y), **TOLERANCE)
    assert not parts.pairs.has_biases
    zero = torch.zeros_like(y)
    assert_close(form(x, zero) - form(0 * x, zero), parts(x, y)[1], **TOLERANCE)


@given(forms(), st.integers(1, 9), st.integers(1, 9), seeds)
def test_a_change_of_either_basis(form, n, m, seed):
    D, E = normal(seed, n, form.d_left), normal(seed + 1, m, form.d_right)
    a, b = normal(seed + 2, form.d_left), normal(seed + 3, form.d_right)
    z, w = normal(seed + 4, 4, n), normal(seed + 5, 4, m)
    folded = form.fold(D, E, left_offset=a, right_offset=b)
    assert folded.shape == (form.d_out, n, m)
    assert_close(folded(z, w), form(z @ D + a, w @ E + b), **TOLERANCE)
    y = w @ E
    assert_close(form.fold(D)(z, y), form(z @ D, y), **TOLERANCE)
    assert form.fold(D).right_space == "keys"
    assert form.fold(D).left_space == "directions in queries"
    P = normal(seed + 6, 2, form.d_out)
    x = z @ D
    assert_close(form.project(P)(x, y), form(x, y) @ P.T, **TOLERANCE)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), seeds)
def test_algebra(d_left, d_right, d_out, seed):
    one = random_form(d_left, d_right, 3, d_out, biases=True, seed=seed)
    other = random_form(d_left, d_right, 5, d_out, biases=False, seed=seed + 50)
    x, y = normal(seed + 9, 2, d_left), normal(seed + 10, 2, d_right)
    assert_close((one + 2 * other)(x, y), one(x, y) + 2 * other(x, y), **TOLERANCE)
    assert_close((one - other)(x, y), one(x, y) - other(x, y), **TOLERANCE)
    F, G = oracle(one), oracle(other)
    assert_close(one.norm(), F.norm(), **TOLERANCE)
    assert_close(one.inner(other), (F * G).sum(), **TOLERANCE)
    cosine = (F * G).sum() / F.norm() / G.norm()
    assert_close(one.cosine_similarity(other), cosine, rtol=1e-9, atol=1e-9)
    assert_close(one.cosine_similarity(-3 * one), -torch.ones((), dtype=torch.float64))


@given(tensors(), seeds)
def test_a_bilinear_layer_is_the_case_of_equal_inputs(layer, seed):
    form = TwoInputForm.of(layer)
    x, y = normal(seed, 3, layer.d_in), normal(seed + 1, 3, layer.d_in)
    assert_close(form(x, x), layer(x), **TOLERANCE)
    assert_close(form(x, y), form(y, x), **TOLERANCE)
    assert_close(form.dense(), layer.dense(), **TOLERANCE)
    assert_close(form.symmetric().dense(), layer.dense(), **TOLERANCE)
    assert_close(form.symmetric()(x), layer(x), **TOLERANCE)
    # Polarisation: f(x, y) from the layer alone.
    known = (layer(x + y) - layer(x - y)) / 4
    pairs = TwoInputForm.of(layer).parts()
    assert_close(pairs.pairs(x, y) + pairs(x, y)[2], known, rtol=1e-8, atol=1e-8)


@given(forms(), seeds)
def test_both_inputs_are_one_input_of_a_layer(form, seed):
    layer = form.stacked()
    x, y = normal(seed, 4, form.d_left), normal(seed + 1, 4, form.d_right)
    assert_close(layer(torch.cat([x, y], 1)), form(x, y), **TOLERANCE)
    assert_close(2**0.5 * layer.norm(), oracle(form).norm(), **TOLERANCE)


@given(forms(biases=False), seeds)
def test_the_matrix_of_a_direction(form, seed):
    u = normal(seed, form.d_out)
    M = form.matrix(u)
    dense = torch.einsum("a,aij->ij", u, oracle(form))
    assert_close(M.dense(), dense, **TOLERANCE)
    y = normal(seed + 1, form.d_right, 3)
    assert_close(M @ y, dense @ y, **TOLERANCE)
    assert_close(M @ y[:, 0], dense @ y[:, 0], **TOLERANCE)
    assert_close(M.T.dense(), dense.T, **TOLERANCE)
    assert_close(M.frobenius_norm(), dense.norm(), **TOLERANCE)
    found = M.svd()
    assert found.values.shape == (min(form.d_hidden, *dense.shape),)
    assert_close((found.left.T * found.values) @ found.right, dense, **TOLERANCE)
    expected = torch.linalg.svdvals(dense)
    assert_close(found.values, expected[: len(found.values)], **TOLERANCE)
    assert (found.left.gather(1, found.left.abs().argmax(1, keepdim=True)) >= 0).all()
    few = M.svd(1)
    assert few.rest == pytest.approx(float(found.values[1]) if len(found.values) > 1 else 0)
    assert_close(found.top(1).rest, few.rest)
    assert_close(found.explained[-1], torch.ones((), dtype=torch.float64))


@given(forms(biases=False), seeds)
def test_hosvd_of_every_mode(form, seed):
    F = oracle(form)
    flat = {"output": F.flatten(1), "left": F.permute(1, 0, 2).flatten(1)}
    flat["right"] = F.permute(2, 0, 1).flatten(1)
    for mode, matrix in flat.items():
        found = hosvd(form, mode=mode)
        expected = torch.zeros(len(matrix), dtype=torch.float64)
        values = torch.linalg.svdvals(matrix)
        expected[: len(values)] = values
        assert_close(found.values, expected, rtol=1e-6, atol=1e-6 * float(values[0]))
        assert_close(found.norm, float(F.norm()), rtol=1e-9, atol=0)
        few = hosvd(form, 1, mode=mode)
        left_out = matrix - few.vectors.T @ (few.vectors @ matrix)
        error = float(left_out.norm())
        assert error <= few.truncation_error <= error + 1e-6 * float(F.norm())


def test_hosvd_of_any_scale():
    form = random_form(4, 5, 6, 3, dtype=torch.float32)
    large = TwoInputForm(form.left * 2.0**40, form.right * 2.0**-60, form.out * 2.0**30)
    assert_close(hosvd(large, mode="left").values, hosvd(form, mode="left").values * 2.0**10)
    with pytest.raises(ValueError, match="mode must be 'output', 'left' or 'right', got 'input'"):
        hosvd(form, mode="input")


# ---------------------------------------------------------------------------- strongest pairs


@pytest.mark.parametrize("block", [2**24, 40])
@given(forms(biases=False), st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), seeds)
def test_strongest_pairs_of_two_dictionaries(block, form, n, m, k, seed):
    D = normal(seed, n, form.d_left) * normal(seed + 1, n, 1).abs()
    E = normal(seed + 2, m, form.d_right) * normal(seed + 3, m, 1).abs()
    u, k = normal(seed + 4, form.d_out), min(k, n * m)
    table = D @ torch.einsum("a,aij->ij", u, oracle(form)) @ E.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_bilinear.tensor.top.BLOCK_ELEMENTS", block)
        patch.setattr("tl_bilinear.tensor.top.CORNER", 5)
        found = form.matrix(u).top(k, left=D, right=E)
    assert_close(found.coefficients.abs(), table.abs().flatten().topk(k).values, **TOLERANCE)
    assert_close(table[found.first, found.second], found.coefficients, **TOLERANCE)
    assert len(set(zip(found.first.tolist(), found.second.tolist(), strict=True))) == k
    entries = form.matrix(u).entries(D, E, found.first, found.second)
    assert_close(entries, found.coefficients, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seeds, st.integers(20, 60), st.integers(20, 60), st.integers(1, 6))
def test_screening_two_dictionaries_loses_no_pair(dtype, seed, n, m, k):
    scale = 4.0 ** -torch.arange(10, dtype=torch.float64)
    left, right = normal(seed, 2, 8, 10) * scale
    form = TwoInputForm(left, right, normal(seed + 1, 1, 8))
    D, E = normal(seed + 2, n, 10), normal(seed + 3, m, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_module, "SCREEN_FROM", 1)
        patch.setattr(top_module, "CORNER", 8)
        patch.setattr(top_module, "_MARGIN", 1.0)
        patch.setattr(top_module, "_faster_dtype", lambda weighted: dtype)
        found = form.matrix().top(k, left=D, right=E)
    table = D @ oracle(form)[0] @ E.T
    assert_close(found.coefficients.abs(), table.abs().flatten().topk(k).values, **TOLERANCE)


def test_most_pairs_of_two_dictionaries_are_never_computed(monkeypatch):
    form = random_form(32, 24, 8, 1, dtype=torch.float32)
    D = normal(1, 3000, 32).float() * torch.linspace(1, 0.01, 3000)[:, None]
    E = normal(2, 2000, 24).float() * torch.linspace(1, 0.01, 2000)[:, None]
    computed, block = [], top_module.DirectionEntries.block
    monkeypatch.setattr(
        top_module.DirectionEntries,
        "block",
        lambda self, rows, columns: (computed.append(block(self, rows, columns)), computed[-1])[1],
    )
    found = form.matrix().top(20, left=D, right=E)
    assert sum(b.numel() for b in computed) < 3000 * 2000 / 3
    table = D @ form.dense()[0] @ E.T
    best = table.abs().flatten().topk(20)
    assert found.first.tolist() == (best.indices // 2000).tolist()
    assert_close(found.coefficients.abs(), best.values, rtol=1e-5, atol=0)


def test_pairs_of_coordinates_zero_forms_and_float32(tmp_path):
    form = random_form(5, 4, 3, 1, dtype=torch.float32)
    found = form.matrix().top(20)
    assert_close(
        found.coefficients.abs(), form.dense()[0].abs().flatten().sort(descending=True).values
    )
    nothing = (0 * form).matrix().top(7)
    assert nothing.coefficients.tolist() == [0.0] * 7
    assert len(set(zip(nothing.first.tolist(), nothing.second.tolist(), strict=True))) == 7
    assert form.matrix().svd(2).values.dtype == torch.float32
    for result in (form, form.matrix(), form.matrix().svd(), found, form.parts()):
        path = tmp_path / "result.safetensors"
        result.save(path)
        assert type(type(result).load(path)) is type(result)
    assert found.top(2).to_pandas().columns.tolist() == ["first", "second", "coefficient"]
    assert form.matrix().svd().to_pandas()["share"].sum() == pytest.approx(1)
    assert "d_left=5, d_right=4" in repr(form)
    assert form.to(torch.bfloat16).dtype == torch.float32
    assert isinstance(found, TopPairs)
    assert isinstance(form.matrix().svd(), SVD)
    assert form.matrix().svd().effective_rank <= 3.0 + 1e-5


def test_a_multiplicative_mixture_of_experts_is_one():
    C, D, W = normal(0, 6, 9), normal(1, 7, 9), normal(2, 4, 9)
    a, z = normal(3, 2, 6), normal(4, 2, 7)
    assert_close(TwoInputForm(C.T, D.T, W)(a, z), ((a @ C) * (z @ D)) @ W.T, **TOLERANCE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.fold(torch.zeros(2, 3)), ValueError, r"left must have shape \[..., 5\]"),
        (lambda f: f.fold(right=torch.zeros(2, 5)), ValueError, r"right must have shape"),
        (lambda f: f(torch.zeros(4), torch.zeros(4)), ValueError, "x must have shape"),
        (lambda f: f.matrix(), ValueError, "a form of 2 outputs has a matrix along a direction"),
        (lambda f: f.symmetric(), ValueError, "inputs of width 5 and 4"),
        (lambda f: f + f.swap(), ValueError, "cannot be added"),
        (lambda f: f.matrix(torch.ones(2)).svd(9), ValueError, "k must lie between 1 and 3"),
        (lambda f: f.matrix(torch.ones(2)).top(21), ValueError, "the pairs of 5 and 4 directions"),
        (lambda f: f.matrix(torch.ones(2)) @ torch.ones(3), ValueError, "needs y of shape"),
        (lambda f: f.dense(max_bytes=8), MemoryError, "matrix"),
        (
            lambda f: f.matrix(torch.ones(2)).entries(
                None, None, torch.tensor([7]), torch.tensor([0])
            ),
            IndexError,
            "there are 5 directions",
        ),
    ],
)
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call(random_form(5, 4, 3, 2))


def test_gradients_flow():
    left = normal(0, 3, 5).requires_grad_()
    form = TwoInputForm(left, normal(1, 3, 4), normal(2, 1, 3))
    form(normal(3, 5), normal(4, 4)).sum().backward()
    assert left.grad is not None
    assert isinstance(form.detach().matrix(), PairMatrix)
