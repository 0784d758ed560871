"""What every result has in common: a short repr, a small table in notebooks, devices and dtypes."""

import pandas as pd
import pytest
import torch

from tests.tensor.reference import random_tensor
from tl_bilinear.results import SHOWN_ROWS, kinds, of_kind, table_html
from tl_bilinear.tensor import hosvd, spectrum, tucker


def results():
    t = random_tensor(20, 40, 30)
    Q = t.interaction()
    return [t, Q, Q.eigh(5), Q.top(20), hosvd(t, 4), tucker(t, 2, 3), spectrum(t, progress=False)]


@pytest.mark.parametrize("result", results(), ids=lambda result: type(result).__name__)
def test_shown_in_one_glance(result):
    text, page = repr(result), result._repr_html_()
    assert text.startswith(type(result).__name__)
    assert len(text) < 800
    assert "grad_fn" not in text
    assert "tensor(" not in text
    assert page.count("<tr") <= SHOWN_ROWS + 1
    assert len(page) < 10_000


def test_gradients_are_not_shown():
    t = random_tensor(4, 5, 2)
    t = type(t)(t.left.requires_grad_(), t.right, t.out)
    found = t.interaction().eigh(2)
    assert "grad" not in repr(found) + found._repr_html_()


def test_tables_are_cut_and_escaped():
    table = pd.DataFrame({"label": ["<script>"] * 100})
    page = table_html(table)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "and 88 more rows" in page


def test_to_moves_nested_values_and_keeps_integers():
    Q = random_tensor(4, 5, 2).interaction()
    top = Q.top(3).to(torch.float32)
    assert top.values.dtype == torch.float32
    assert top.first.dtype == torch.long
    small = tucker(random_tensor(4, 5, 2), 1, 2).to(torch.float32)
    assert small.core.left.dtype == torch.float32
    assert small.output_directions.dtype == torch.float32


def test_pairs():
    first, second = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 1])
    assert of_kind(first, second, "all").tolist() == [True] * 3
    assert of_kind(first, second, "self").tolist() == [True, False, True]
    assert of_kind(first, second, "cross").tolist() == [False, True, False]
    assert kinds(first, second) == ["self", "cross", "self"]


def test_unknown_kind(unchecked):
    with pytest.raises(ValueError, match="kind must be 'all', 'self' or 'cross', got 'both'"):
        of_kind(torch.zeros(1), torch.zeros(1), "both")
