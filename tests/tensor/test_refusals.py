"""Bad input of tensor/: one sentence each, that says what was given and what was expected."""

import math

import pytest
import torch

from tests.tensor.reference import random_tensor
from tl_bilinear import approximate
from tl_bilinear.tensor import (
    QuarticForm,
    cp,
    hosvd,
    match_eigenvectors,
    reexpress,
    spectrum,
    tucker,
    with_residual,
)
from tl_bilinear.tensor.gated import GatedLayer

pytestmark = pytest.mark.usefixtures("unchecked")

T = random_tensor(6, 9, 5)
Q = T.interaction()
EIGEN = Q.eigh(3)
FORM = QuarticForm.of(random_tensor(4, 5, 3), random_tensor(3, 4, 2), torch.ones(2).double())
GATED = GatedLayer(T.left, T.right, T.out, torch.nn.functional.silu)


def spoiled(width, row=2, value=math.nan, rows=4):
    directions = torch.ones(rows, width, dtype=torch.float64)
    directions[row, 1] = value
    return directions


DIRECTIONS = {
    "interaction": (5, lambda d: T.interaction(d)),
    "interaction of a batch": (5, lambda d: T.interaction(d.reshape(2, 2, 5))),
    "project": (5, lambda d: T.project(d)),
    "fold": (6, lambda d: T.fold(d)),
    "fold a matrix": (6, lambda d: Q.fold(d)),
    "top": (6, lambda d: Q.top(1, directions=d)),
    "top of a batch": (6, lambda d: Q.top_of_batch(1, directions=d)),
    "entries": (6, lambda d: Q.entries(d)),
    "spectrum": (5, lambda d: spectrum(T, d, 1, progress=False)),
    "reexpress": (5, lambda d: reexpress(T, d)),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_that_are_not_finite_are_refused_by_row(name, value):
    width, call = DIRECTIONS[name]
    place = r"\(1, 0, 1\) \(row 1, 0\)" if "batch" in name and width == 5 else r"\(2, 1\) \(row 2\)"
    message = rf"directions has 1 NaN or infinite of \d+ entries, the first at index {place}; leave"
    with pytest.raises(ValueError, match=message):
        call(spoiled(width, value=value))


def test_one_direction_an_offset_and_a_form():
    u = torch.ones(5, dtype=torch.float64)
    u[3] = math.nan
    with pytest.raises(
        ValueError, match=r"directions has 1 NaN or infinite of 5 entries, .* index 3;"
    ):
        T.interaction(u)
    with pytest.raises(ValueError, match="offset has 1 NaN"):
        T.fold(torch.eye(6, dtype=torch.float64), spoiled(6)[2])
    with pytest.raises(ValueError, match="directions has 2 NaN"):
        QuarticForm.of(random_tensor(4, 5, 3), random_tensor(3, 4, 2), torch.full((2,), math.nan))
    with pytest.raises(ValueError, match=r"out has .* NaN or infinite"):
        T * math.nan
    with pytest.raises(ValueError, match="covariance has 36 NaN"):
        approximate(GATED, (torch.zeros(6).double(), torch.full((6, 6), math.nan).double()))


def test_weights_that_leave_the_dtype_name_their_matrix():
    t = (1e30 * T).to(torch.float32)
    directions = torch.ones(3, 5)
    directions[1] = 1e15
    with pytest.raises(ValueError, match="matrix 1 has hidden weights that are NaN or infinite"):
        t.interaction(directions).eigh(1)
    with pytest.raises(ValueError, match=r"matrix 1 has hidden weights.*use \.to\(torch.float64\)"):
        t.interaction(directions).frobenius_norm()


NUMBERS = {
    "cp ridge": (lambda x: cp(T, 2, ridge=x, progress=False), "ridge weighs a penalty"),
    "cp tol": (lambda x: cp(T, 2, tol=x, progress=False), "tol is a relative decrease"),
    "cp sparsity": (lambda x: cp(T, 2, sparsity=x, progress=False), "sparsity weighs an L1"),
    "eigh tol": (lambda x: Q.eigh(1, tol=x), "tol is a relative residual"),
    "spectrum tol": (lambda x: spectrum(T, k=1, tol=x, progress=False), "tol is a relative"),
    "certificate": (lambda x: EIGEN.certificate(x), "radius bounds a norm"),
    "projectors": (lambda x: EIGEN[0].projectors(x), "rtol is a relative gap"),
    "leading tol": (lambda x: FORM.leading(1, tol=x), "tol is a relative residual"),
    "leading work": (lambda x: FORM.leading(1, max_flops=x), "max_flops is a limit"),
    "inner work": (lambda x: FORM.inner(FORM, max_flops=x), "max_flops is a limit"),
    "held out": (lambda x: approximate(GATED, torch.ones(9, 6), held_out=x), "held_out is a share"),
    "warning": (lambda x: approximate(GATED, torch.ones(9, 6), warn_below=x), "warn_below is a"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_before_any_work(name, value):
    call, start = NUMBERS[name]
    if name == "warning" and value == -1:
        return  # the variance explained may be negative
    end = "must not be negative|must be positive" if value == -1 else "must be a finite number"
    with pytest.raises(ValueError, match=rf"{start}.* and ({end}), got {value}"):
        call(value)


@pytest.mark.parametrize("value", ["0.1", True, None, [1.0]])
@pytest.mark.parametrize("name", ["cp ridge", "certificate", "leading work"])
def test_what_is_no_number_is_a_type_error(name, value):
    with pytest.raises(TypeError, match="must be a number, got"):
        NUMBERS[name][0](value)


COUNTS = {
    "cp rank": lambda n: cp(T, n, progress=False),
    "cp steps": lambda n: cp(T, 2, steps=n, progress=False),
    "eigh": lambda n: Q.eigh(n),
    "eigen top": lambda n: EIGEN.top(n),
    "hosvd": lambda n: hosvd(T, n),
    "tucker": lambda n: tucker(T, 2, n),
    "top": lambda n: Q.top(n),
    "top of a batch": lambda n: Q.top_of_batch(n),
    "spectrum": lambda n: spectrum(T, k=n, progress=False),
    "screen": lambda n: spectrum(T, k=1, screen=n, progress=False),
    "match": lambda n: match_eigenvectors(EIGEN, EIGEN, k=n),
    "leading": lambda n: FORM.leading(n),
}


@pytest.mark.parametrize("value", [0, -1, 2**40])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"must lie between 1 and .*got {value}"):
        COUNTS[name](value)


@pytest.mark.parametrize("value", [2.0, "2", True, math.nan])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_are_no_integers(name, value):
    with pytest.raises(TypeError, match="must be an int, got"):
        COUNTS[name](value)


def test_options_are_named():
    for call, message in (
        (
            lambda: Q.eigh(1, which="smallest"),
            "which must be 'magnitude', 'positive' or 'negative'",
        ),
        (
            lambda: Q.eigh(1, method="lanczos"),
            "method must be 'auto', 'dense', 'lowrank' or 'krylov'",
        ),
        (lambda: hosvd(T, mode="left"), "mode must be 'output' or 'input', got 'left'"),
        (
            lambda: FORM.leading(1, which="both"),
            "which must be 'positive' or 'negative', got 'both'",
        ),
        (lambda: match_eigenvectors(EIGEN, EIGEN, by="x"), "by must be 'rank' or 'assignment'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: Q.eigh(1, seed=0.5),
        lambda: Q.eigh(1, max_bytes=1e9),
        lambda: cp(T, 2, seed="0", progress=False),
        lambda: FORM.leading(1, seed=None),
    ):
        with pytest.raises(TypeError, match="must be an int"):
            call()
    with pytest.raises(TypeError, match="init must be 'eigen', 'random' or a BilinearTensor"):
        cp(T, 2, init=3, progress=False)


def test_indices_out_of_range():
    with pytest.raises(IndexError, match=r"no matrix 7 in a batch of shape \[5\]"):
        Q[7]
    with pytest.raises(IndexError, match=r"no matrix -6 in a batch of shape \[5\]"):
        Q[-6]
    assert Q[...].shape == Q.shape
    assert Q[0][...].shape == (6, 6)
    with pytest.raises(IndexError, match="2 indices for 1 batch dimensions"):
        Q[0, 0]
    index = torch.tensor([0, 2])
    with pytest.raises(
        IndexError, match=r"second\[1\] is 6, but there are 6 inputs: .* from 0 to 5"
    ):
        Q.entries(None, index, torch.tensor([1, 6]))
    with pytest.raises(IndexError, match=r"first\[0\] is -4, but there are 3 directions"):
        Q.entries(torch.ones(3, 6).double(), torch.tensor([-4, 0]), index)
    with pytest.raises(TypeError, match=r"first must hold integer indices, got torch\.float32"):
        Q.entries(None, torch.ones(2), index)
    with pytest.raises(ValueError, match="index vectors of one length"):
        Q.entries(None, index, torch.tensor([0]))
    with pytest.raises(ValueError, match="give both or neither"):
        Q.entries(None, index)
    # Negative ones count from the end, as everywhere.
    torch.testing.assert_close(
        Q.entries(None, torch.tensor([-1]), torch.tensor([0])), T.dense()[:, 5, 0][:, None]
    )


def test_a_residual_connection_needs_the_same_width():
    with pytest.raises(ValueError, match="d_out == d_in, got 5 and 6"):
        with_residual(T)
