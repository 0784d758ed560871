"""Stacks of bilinear layers against the dense tensor of their tree."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear.tensor import ODT, BilinearStack, InputMoments, hosvd, odt

WIDTHS = st.lists(st.integers(1, 3), min_size=3, max_size=4)  # two or three layers


def stack_of(widths, hidden=5, seed=0, **options):
    pairs = itertools.pairwise(widths)
    return BilinearStack(
        tuple(
            random_tensor(a, hidden, b, seed=seed + n, **options) for n, (a, b) in enumerate(pairs)
        )
    )


def tree(stack):
    """T [d_out, d_in^(2^L)], one layer at a time; the columns' order is that of the leaves."""
    forms = torch.eye(stack.d_in, dtype=torch.float64)
    for layer in stack.layers:
        B = layer.dense()
        forms = torch.einsum("oab,ai,bj->oij", B, forms, forms).flatten(1)
    return forms


def under_one_copy(stack, wire):
    """T flattened to the leaves under the first copy of a wire, against everything else."""
    leaves = stack.d_in ** (2**wire)
    T = tree(stack)
    return T.reshape(len(T), leaves, -1).transpose(0, 1).flatten(1)


@given(WIDTHS, st.integers(1, 5), st.integers(0, 2**16))
def test_function_values_and_norm(widths, hidden, seed):
    stack = stack_of(widths, hidden, seed)
    found = odt(stack)
    x = torch.randn(8, stack.d_in, dtype=torch.float64)
    expected = stack(x)
    assert_close(found.stack(x), expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    T = tree(stack)
    size = float(T.norm())
    assert_close(found.norm, size, rtol=1e-8, atol=0)
    assert_close(float(stack.norm()), size, rtol=1e-8, atol=0)
    for wire, values in enumerate(found.values, 1):
        s = torch.linalg.svdvals(under_one_copy(stack, wire))[: len(values)]
        assert_close(values[: len(s)], s, rtol=1e-6, atol=1e-6 * size)
        assert (values[len(s) :] <= 1e-6 * size).all()


@given(WIDTHS, st.integers(0, 2**16))
def test_truncation_stays_within_its_bound(widths, seed):
    stack = stack_of(widths, 6, seed)
    found, T = odt(stack), tree(stack)
    for k in range(1, max(stack.widths) + 1):
        kept = [min(k, width) for width in stack.widths]
        small = found.truncate(kept)
        assert small.widths == tuple(kept)
        error = float((tree(small) - T).norm())
        assert error <= found.bound(kept) * (1 + 1e-9) + 1e-12 * found.norm
        assert_close(float(stack.distance(small)), error, rtol=1e-5, atol=1e-6 * float(T.norm()))


def test_a_wire_is_cut_in_all_its_copies():
    """One direction of the first wire of three is met four times: the bound has to count them."""
    stack = stack_of((3, 3, 3, 2), 6, seed=3)
    found = odt(stack)
    assert found.copies == (4, 2)
    error = float((tree(found.truncate((2, 3))) - tree(stack)).norm())
    once = float(found.values[0][2])
    assert once < error <= math.sqrt(4) * once * (1 + 1e-9)


def test_it_beats_each_layers_own_hosvd():
    """Directions that the first layer writes most, and the second does not read."""
    first, second = stack_of((4, 4, 2), 8, seed=1).layers
    loud = torch.diag(torch.tensor([100.0, 1, 1, 1], dtype=torch.float64))
    deaf = torch.diag(torch.tensor([1e-6, 1, 1, 1], dtype=torch.float64))
    stack = BilinearStack((first.project(loud), second.fold(deaf)))
    error = float(odt(stack).truncate(3).distance(stack) / stack.norm())
    assert error < 1e-3
    own = hosvd(stack.layers[0], 3).vectors
    cut = BilinearStack((stack.layers[0].project(own), stack.layers[1].fold(own)))
    assert float(cut.distance(stack) / stack.norm()) > 0.1


def test_in_a_metric():
    stack = stack_of((3, 3, 2), 6)
    x = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([3.0, 1, 0.1], dtype=torch.float64)
    metric = InputMoments.of(x).metric(0.1)
    found = odt(stack, metric=metric)
    whitened = BilinearStack((stack.layers[0].whiten(metric), stack.layers[1]))
    assert_close(found.stack(x), stack(x))
    assert_close(found.norm, float(tree(whitened).norm()))
    small = found.truncate(2)
    moved = BilinearStack((small.layers[0].whiten(metric), small.layers[1]))
    error = float((tree(moved) - tree(whitened)).norm())
    assert error <= found.bound(2) * (1 + 1e-9)
    assert_close(found.values[0], torch.linalg.svdvals(under_one_copy(whitened, 1))[:3])


def test_biases_by_one_more_coordinate():
    stack = stack_of((3, 2, 2, 2), 4, biases=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\] have them: take stack.homogeneous"):
        odt(stack)
    whole = stack.homogeneous()
    ones = torch.ones(5, 1, dtype=torch.float64)
    assert_close(odt(whole).stack(torch.cat([x, ones], 1)), stack(x))
    assert whole.homogeneous() is whole


def test_float32_and_rank():
    stack = stack_of(
        (6, 5, 5, 3), 2, dtype=torch.float32
    )  # two neurons write at most two directions
    found = odt(stack)
    assert found.values[0].dtype == torch.float32
    assert (found.values[0][2:] <= found.floor).all()
    x = torch.randn(20, 6)
    assert_close(found.stack(x), stack(x), rtol=1e-3, atol=1e-4 * float(stack(x).abs().max()))
    small = found.truncate(2)
    assert_close(small(x), stack(x), rtol=1e-3, atol=1e-4 * float(stack(x).abs().max()))


def test_one_layer_zeros_and_bad_requests(tmp_path):
    one = odt(stack_of((3, 2)))
    assert (one.values, one.copies, one.bound([])) == ((), (), 0.0)
    nothing = odt(BilinearStack((0.0 * random_tensor(3, 4, 2), random_tensor(2, 4, 2))))
    assert nothing.norm == 0
    assert not nothing.stack(torch.ones(1, 3, dtype=torch.float64)).any()
    with pytest.raises(ValueError, match="layer 0 writes 2 coordinates and layer 1 reads 3"):
        BilinearStack((random_tensor(3, 4, 2), random_tensor(3, 4, 2)))
    with pytest.raises(ValueError, match="at least one layer"):
        BilinearStack(())
    found = odt(stack_of((3, 2, 2)))
    with pytest.raises(
        ValueError, match=r"k must lie between 1 and 2 \(the coordinates of wire 1\), got 3"
    ):
        found.truncate(3)
    with pytest.raises(ValueError, match="one for each of the 1 wires, got 2"):
        found.bound([1, 1])
    with pytest.raises(ValueError, match="have no inner product"):
        found.stack.inner(stack_of((3, 2)))
    found.save(tmp_path / "odt.safetensors")
    loaded = ODT.load(tmp_path / "odt.safetensors")
    assert torch.equal(loaded.values[0], found.values[0])
    assert len(found.to_pandas()) == 2
