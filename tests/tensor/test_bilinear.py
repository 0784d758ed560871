"""BilinearTensor against its dense form and against the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor import reference
from tests.tensor.reference import random_tensor, tensors
from tl_bilinear import BilinearTensor, register_mlp_reader
from tl_bilinear.tensor import registry

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
seeds = st.integers(0, 2**16)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(tensors(), seeds)
def test_evaluation_is_the_formula(t, seed):
    x = normal(seed, t.d_in)
    assert_close(t(x), reference.layer(t, x), **TOLERANCE)


@given(tensors(biases=False), seeds)
def test_evaluation_is_the_quadratic_form_of_dense(t, seed):
    x = normal(seed, 3, t.d_in)
    assert_close(t(x), torch.einsum("aij,ni,nj->na", t.dense(), x, x), **TOLERANCE)


@given(tensors())
def test_dense_is_the_definition_and_symmetric(t):
    assert_close(t.dense(), reference.dense(t), **TOLERANCE)
    assert torch.equal(t.dense(), t.dense().mT)


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (0,), (2, 0, 3)])
def test_leading_dimensions(leading):
    t = random_tensor(5, 3, 4, biases=True)
    x = normal(1, *leading, 5)
    result = t(x)
    assert result.shape == (*leading, 4)
    for index in (
        torch.cartesian_prod(*[torch.arange(n) for n in leading]) if len(leading) > 1 else []
    ):
        assert_close(result[tuple(index)], reference.layer(t, x[tuple(index)]), **TOLERANCE)


@given(tensors(), st.integers(1, 9), seeds, st.booleans())
def test_fold_commutes_with_evaluation(t, n, seed, with_offset):
    directions, z = normal(seed, n, t.d_in), normal(seed + 1, 4, n)
    offset = normal(seed + 2, t.d_in) if with_offset else None
    x = z @ directions + (offset if with_offset else 0)
    folded = t.fold(directions, offset)
    assert folded.shape == (t.d_out, n, n)
    assert_close(folded(z), t(x), **TOLERANCE)


@given(tensors(), st.integers(1, 9), seeds)
def test_project_commutes_with_evaluation(t, n, seed):
    directions, x = normal(seed, n, t.d_out), normal(seed + 1, 4, t.d_in)
    assert_close(t.project(directions)(x), t(x) @ directions.T, **TOLERANCE)


@given(tensors(), seeds)
def test_fold_and_project_are_the_dense_change_of_basis(t, seed):
    d, e = normal(seed, 4, t.d_in), normal(seed + 1, 5, t.d_out)
    expected = torch.einsum("ea,aij,bi,cj->ebc", e, t.dense(), d, d)
    assert_close(t.fold(d).project(e).dense(), expected, **TOLERANCE)
    assert_close(t.project(e).fold(d).dense(), expected, **TOLERANCE)


@given(tensors(), seeds)
def test_parts_sum_to_the_layer(t, seed):
    x = normal(seed, 6, t.d_in)
    interaction, linear, constant = t.parts()(x)
    assert_close(interaction + linear + constant, t(x), **TOLERANCE)
    # Each part is what its name says: even, odd, and the value at zero.
    assert_close(interaction + constant, (t(x) + t(-x)) / 2, **TOLERANCE)
    assert_close(linear, (t(x) - t(-x)) / 2, **TOLERANCE)
    assert_close(constant, t(torch.zeros_like(x[0])), **TOLERANCE)


@given(tensors(), seeds)
def test_augmented_is_the_same_function_without_biases(t, seed):
    x = normal(seed, 6, t.d_in)
    one = torch.cat([x, torch.ones(6, 1, dtype=x.dtype)], 1)
    augmented = t.augmented()
    assert not augmented.has_biases
    assert_close(augmented(one), t(x), **TOLERANCE)
    parts, dense = t.parts(), augmented.dense()
    assert_close(dense[:, :-1, :-1], t.dense(), **TOLERANCE)
    assert_close(2 * dense[:, -1, :-1], parts.linear, **TOLERANCE)
    assert_close(dense[:, -1, -1], parts.constant, **TOLERANCE)


@given(tensors(), seeds, st.integers(1, 6), st.booleans(), st.floats(-3, 3))
def test_sum_difference_and_scaling(t, seed, hidden, biases, factor):
    other = random_tensor(t.d_in, hidden, t.d_out, biases, seed)
    x = normal(seed, 5, t.d_in)
    assert_close((t + other)(x), t(x) + other(x), **TOLERANCE)
    assert (t + other).d_hidden == t.d_hidden + hidden
    assert_close((t - other)(x), t(x) - other(x), **TOLERANCE)
    assert_close((factor * t)(x), factor * t(x), **TOLERANCE)
    assert_close((t / 4)(x), t(x) / 4, **TOLERANCE)


@given(tensors(), seeds, st.integers(1, 6))
def test_inner_products_are_those_of_the_dense_tensors(t, seed, hidden):
    other = random_tensor(t.d_in, hidden, t.d_out, False, seed)
    scale = 1 + float(t.dense().norm() * other.dense().norm())
    assert_close(t.inner(other), (t.dense() * other.dense()).sum(), rtol=0, atol=1e-12 * scale)
    assert_close(t.norm(), t.dense().norm(), **TOLERANCE)
    cosine = torch.cosine_similarity(t.dense().flatten(), other.dense().flatten(), dim=0)
    assert_close(t.cosine_similarity(other), cosine, rtol=0, atol=1e-10)


def test_inner_products_are_tiled(monkeypatch):
    t, other = random_tensor(5, 13, 3), random_tensor(5, 7, 3, seed=1)
    whole = t.inner(other), t.norm()
    monkeypatch.setattr("tl_bilinear.tensor.grams.TILE_BYTES", 7 * 8 * 2)
    assert_close((t.inner(other), t.norm()), whole, **TOLERANCE)


def test_cosine_similarity_sees_through_the_factors():
    t = random_tensor(5, 6, 3)
    swapped = BilinearTensor(-2 * t.right, t.left, -0.5 * t.out)
    assert_close(t.cosine_similarity(swapped), torch.tensor(1.0, dtype=torch.float64))
    zero = 0.0 * t
    assert t.cosine_similarity(zero) == 0
    assert zero.norm() == 0


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 2), (6, 1, 1), (3, 0, 2), (3, 4, 0)])
def test_empty_and_size_one_dimensions(sizes):
    t = random_tensor(*sizes, biases=True)
    x = normal(0, 2, t.d_in)
    assert t(x).shape == (2, t.d_out)
    assert_close(t.dense(), reference.dense(t), **TOLERANCE)
    assert_close(t.norm(), t.dense().norm(), **TOLERANCE)
    assert_close(sum(t.parts()(x)), t(x), **TOLERANCE)
    assert t.interaction().trace().shape == (t.d_out,)
    assert t.interaction().frobenius_norm().shape == (t.d_out,)
    assert t.interaction().eigh().vectors.shape == (t.d_out, t.d_in, t.d_in)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_factors_are_computed_in_float32(dtype):
    t = random_tensor(16, 8, 4, biases=True, dtype=dtype)
    assert t.dtype == torch.float32
    exact = t.to(torch.float64)
    x = torch.randn(3, 16, dtype=dtype)
    for value, reference_value in [
        (t(x), exact(x)),
        (t.dense(), exact.dense()),
        (t.interaction().eigh(2).values, exact.interaction().eigh(2).values),
        (t.norm(), exact.norm()),
        (t.to(dtype)(x), exact(x)),
    ]:
        assert value.dtype == torch.float32
        assert_close(value, reference_value.float(), rtol=1e-4, atol=1e-4)


def test_float64_stays_float64_and_mixed_widths_widen():
    t = random_tensor(4, 3, 2)
    assert t(torch.randn(2, 4)).dtype == torch.float64
    assert t.interaction().eigh().values.dtype == torch.float64
    mixed = BilinearTensor(t.left.float(), t.right, t.out.bfloat16())
    assert mixed.dtype == torch.float64
    assert t.to(torch.float32).dtype == torch.float32


def test_gradients_flow_through_evaluation_and_norm():
    t = random_tensor(4, 3, 2, biases=True)
    factors = [p.clone().requires_grad_() for p in (t.left, t.right, t.out)]
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def evaluate(left, right, out, x):
        t = BilinearTensor(left, right, out)
        return t.fold(torch.eye(4, dtype=x.dtype))(x), t.interaction().quadratic(x), t.norm()

    assert torch.autograd.gradcheck(evaluate, (*factors, x))
    assert not BilinearTensor(*factors).detach().left.requires_grad


def test_it_is_immutable_and_says_what_it_is():
    t = random_tensor(4, 3, 2, biases=True)
    with pytest.raises(AttributeError):
        t.left = t.right
    assert repr(t) == (
        "BilinearTensor(d_out=2, d_in=4, d_hidden=3, float64, cpu, "
        "biases=bias_left, bias_right, bias_out, inputs -> outputs)"
    )
    assert t.fold(torch.eye(4)).input_space == "directions in inputs"
    assert t.fold(torch.eye(4), space="pixels").interaction().eigh().space == "pixels"
    assert t.augmented().input_space == "[inputs, 1]"


def test_save_and_load(tmp_path):
    t = random_tensor(4, 3, 2, biases=True)
    bare = BilinearTensor(t.left, t.right, t.out)
    for tensor in (t, bare):
        tensor.save(tmp_path / "t.safetensors")
        loaded = BilinearTensor.load(tmp_path / "t.safetensors")
        assert torch.equal(loaded(torch.eye(4)), tensor(torch.eye(4)))
        assert (loaded.input_space, loaded.has_biases) == (tensor.input_space, tensor.has_biases)
    assert list(tmp_path.iterdir()) == [tmp_path / "t.safetensors"]


def eye(*shape):
    return torch.eye(*shape)


ones = torch.ones
BAD_FACTORS = {
    "left and right differ": (
        (ones(3, 4), ones(3, 5), ones(2, 3)),
        ValueError,
        r"left \[3, 4\] and right \[3, 5\]",
    ),
    "out of another hidden size": (
        (ones(3, 4), ones(3, 4), ones(2, 5)),
        ValueError,
        r"d_hidden=3 .* got out \[2, 5\]",
    ),
    "out transposed": ((ones(3, 4), ones(3, 4), ones(3, 2)), ValueError, "transpose it"),
    "one dimension": (
        (ones(3), ones(3, 4), ones(2, 3)),
        ValueError,
        "left must have two dimensions",
    ),
    "bias of another size": (
        (ones(3, 4), ones(3, 4), ones(2, 3), ones(4)),
        ValueError,
        r"bias_left must have 3 entries \(d_hidden\), got \[4\]",
    ),
    "bias_out of another size": (
        (ones(3, 4), ones(3, 4), ones(2, 3), None, None, ones(3)),
        ValueError,
        r"bias_out must have 2 entries \(d_out\), got \[3\]",
    ),
    "bias matrix": (
        (ones(3, 4), ones(3, 4), ones(2, 3), ones(3, 1)),
        ValueError,
        "bias_left must have one dimension",
    ),
    "integers": (
        (ones(3, 4).long(), ones(3, 4), ones(2, 3)),
        TypeError,
        r"left must have a floating-point dtype, got torch.int64",
    ),
    "a list": (
        ([[1.0]], ones(1, 1), ones(1, 1)),
        TypeError,
        "left must be a torch.Tensor, got list",
    ),
    "no out": (
        (ones(3, 4), ones(3, 4), None),
        TypeError,
        "out must be a torch.Tensor, got NoneType",
    ),
    "mixed devices": (
        (ones(3, 4), ones(3, 4, device="meta"), ones(2, 3)),
        ValueError,
        "left on cpu, right on meta",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", BAD_FACTORS)
def test_bad_factors_are_refused(case):
    factors, error, message = BAD_FACTORS[case]
    with pytest.raises(error, match=message):
        BilinearTensor(*factors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_their_place(bad):
    right = ones(3, 4)
    right[1, 2] = bad
    with pytest.raises(ValueError, match=r"right has 1 NaN or infinite of 12 .* index \(1, 2\)"):
        BilinearTensor(ones(3, 4), right, ones(2, 3))
    huge = torch.full((3, 4), 3e38)  # its sum overflows, its entries are finite
    assert BilinearTensor(huge, ones(3, 4), ones(2, 3)).d_in == 4


@pytest.mark.usefixtures("unchecked")
def test_inputs_and_directions_of_the_wrong_width_are_refused():
    t = random_tensor(4, 3, 2)
    with pytest.raises(
        ValueError, match=r"x must have shape \[..., 4\] \(d_in, inputs\), got \[5\]"
    ):
        t(ones(5))
    with pytest.raises(
        ValueError, match=r"directions must have shape \[..., 2\] \(d_out, outputs\)"
    ):
        t.interaction(ones(3))
    with pytest.raises(ValueError, match=r"directions must have shape \[..., 4\]"):
        t.fold(ones(4, 3))
    with pytest.raises(ValueError, match=r"offset must have shape \[..., 4\]"):
        t.fold(eye(4), ones(3))
    with pytest.raises(ValueError, match=r"directions must have shape \[..., 2\]"):
        t.project(ones(2, 3))
    with pytest.raises(ValueError, match="scaled by a number"):
        t * ones(2)
    with pytest.raises(ValueError, match=r"\[2, 4, 4\] and \[3, 4, 4\] .* cannot be added"):
        t + random_tensor(4, 3, 3)
    with pytest.raises(ValueError, match="cannot be compared"):
        t.inner(random_tensor(5, 3, 2))


def test_dense_over_the_stated_size_is_refused_with_its_size():
    t = random_tensor(4, 3, 2)
    with pytest.raises(MemoryError, match=r"256 bytes, more than max_bytes=255; use @, quadratic"):
        t.dense(max_bytes=255)
    assert t.dense(max_bytes=256).shape == (2, 4, 4)


def test_a_result_file_that_is_broken_or_foreign_is_refused(tmp_path):
    t, path = random_tensor(4, 3, 2), tmp_path / "t.safetensors"
    t.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated or not a result file"):
        BilinearTensor.load(path)
    t.interaction().eigh(1).save(path)
    with pytest.raises(ValueError, match="holds Eigendecomposition, not BilinearTensor"):
        BilinearTensor.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        BilinearTensor.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        t.save(tmp_path / "absent" / "t.safetensors")


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    t, path = random_tensor(4, 3, 2), tmp_path / "t.safetensors"
    t.save(path)
    before = path.read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (2 * t).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_readers_are_a_registry(monkeypatch):
    monkeypatch.setattr(registry, "_mlp_readers", dict(registry._mlp_readers))

    class Mine(torch.nn.Module):
        weight = ones(3, 4)

    def read(module):
        if not isinstance(module, Mine):
            return None
        return BilinearTensor(module.weight, module.weight, ones(2, 3))

    with pytest.raises(
        TypeError, match=r"no reader recognises this MLP: .*Mine.*register_mlp_reader"
    ):
        BilinearTensor.from_mlp(Mine())
    register_mlp_reader("mine", read)
    assert BilinearTensor.from_mlp(Mine()).shape == (2, 4, 4)
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_mlp_reader("mine", read)
