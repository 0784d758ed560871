"""Re-expression through a set of directions (appendix I) against the dense tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor, tensors
from tl_bilinear.tensor.reexpress import reexpress

TOLERANCE = {"rtol": 1e-7, "atol": 1e-7}


def directions_for(t, more, seed):
    """A full-rank set, well conditioned: an orthonormal basis mixed, and `more` beside it."""
    generator = torch.Generator().manual_seed(seed)
    n = t.d_out + more
    basis = torch.linalg.qr(torch.randn(n, t.d_out, generator=generator, dtype=torch.float64)).Q
    scale = torch.linspace(1, 2, t.d_out, dtype=torch.float64)
    return (basis * scale).to(t.dtype)


@given(tensors(), st.integers(0, 4), st.integers(0, 2**16))
def test_it_is_the_layer(t, more, seed):
    directions = directions_for(t, more, seed)
    written = reexpress(t, directions)
    dense = t.dense()
    assert_close(written.tensor.dense(), dense, **TOLERANCE)
    assert_close(
        torch.einsum("ka,kij->aij", written.dual, written.interactions.dense()), dense, **TOLERANCE
    )
    form = written.eigenvector_form()
    assert form.d_hidden == len(directions) * t.d_in
    assert torch.equal(form.left, form.right)
    assert_close(form.dense(), dense, **TOLERANCE)
    identity = torch.eye(t.d_out, dtype=torch.float64)
    assert_close(directions.T @ written.dual, identity, **TOLERANCE)
    if not more:
        assert_close(written.dual @ directions.T, identity, **TOLERANCE)


def test_each_direction_of_a_basis_keeps_its_own_pairs():
    """Truncated, what one direction reads is its k pairs: the others do not leak into it."""
    t = random_tensor(8, 20, 4)
    directions = directions_for(t, 0, 1)
    form = reexpress(t, directions).eigenvector_form(k=3)
    assert (form.d_hidden, form.input_space, form.output_space) == (12, "inputs", "outputs")
    for u in directions:
        expected = t.interaction(u).eigh(3).dense()
        assert_close(form.interaction(u).dense(), expected, **TOLERANCE)


def test_float32():
    t = random_tensor(6, 9, 5, dtype=torch.float32)
    written = reexpress(t, directions_for(t, 2, 0))
    assert written.dual.dtype == torch.float32
    assert_close(written.tensor.dense(), t.dense(), rtol=1e-4, atol=1e-4)
    assert_close(written.eigenvector_form().dense(), t.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_set_that_does_not_span_is_refused_with_its_rank(dtype):
    t = random_tensor(6, 9, 5, dtype=dtype)
    directions = directions_for(t, 3, 0)
    directions[:, 4] = directions[:, 0] / 3 + directions[:, 1]  # dependent up to rounding
    with pytest.raises(ValueError, match=r"these 8 have rank 4 of d_out=5; add directions that.*"):
        reexpress(t, directions)
    with pytest.raises(ValueError, match=r"tensor\.project\(basis\), basis \[3, 5\]"):
        reexpress(t, directions_for(t, 0, 0)[:3])
    # What the message proposes works.
    few = directions_for(t, 0, 0)[:3]
    basis = torch.linalg.qr(few.T).Q.T
    within = reexpress(t.project(basis), few @ basis.T)
    assert_close(within.interactions.dense(), t.interaction(few).dense(), rtol=1e-4, atol=1e-4)


def test_other_errors():
    t = random_tensor(6, 9, 5)
    with pytest.raises(ValueError, match="directions must have shape"):
        reexpress(t, torch.eye(6))
    broken = torch.eye(5)
    broken[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"directions has 1 NaN or infinite of .* .row 2"):
        reexpress(t, broken)
    with pytest.raises(ValueError, match="k must lie between 1 and 6"):
        reexpress(t, torch.eye(5)).eigenvector_form(7)
