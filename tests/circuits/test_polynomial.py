"""Heads of tensor transformers as forms, and whole ones as polynomials, against the running model."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.models.tensor_format import TOKENS, config, weights, write
from tl_bilinear.circuits import TensorPolynomial, product_head, tensor_polynomial
from tl_bilinear.models import HookedBilinearTransformer, TensorTransformer
from tl_bilinear.tensor import ProductHead

SMALL = {"n_layer": 2, "n_ctx": 12}


def made(folder, **fields):
    cfg = config(**{**SMALL, **fields})
    tensors = weights(cfg)
    if not cfg.get("norm", True):
        tensors = {n: 0.5 * t if n.endswith("weight") else t for n, t in tensors.items()}
    write(folder, cfg, tensors)
    return TensorTransformer.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    return made(tmp_path_factory.mktemp("free") / "model", norm=False)


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    return made(tmp_path_factory.mktemp("normed") / "model")


def random_head(d_query=3, d_key=4, d_head=2, d_out=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d_head, d_query), (d_head, d_key)] * 2 + [(d_head, d_key), (d_out, d_head)]
    return ProductHead(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes))


# ---------------------------------------------------------------------- a head


def test_a_head_sums_to_what_the_model_writes(free):
    """The message from each key to each query, rotated by the model's tables."""
    free.set_use_attn_result(True)
    try:
        _, cache = free.run_with_cache(TOKENS[:1])
    finally:
        free.set_use_attn_result(False)
    for layer, number in itertools.product(range(2), range(2)):
        head = product_head(free, layer, number)
        x = cache[f"blocks.{layer}.hook_resid_pre"][0]
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, number]
        for i, j in [(0, 0), (4, 2), (6, 6), (6, 1)]:
            first, second = head.between(i, j).scores(x[i], x[j])
            assert_close(first * second, pattern[i, j])
        if layer == 0:  # whose values are its own
            for i in (0, 5):
                written = sum(head.between(i, j)(x[i], x[j]) for j in range(i + 1))
                assert_close(written, cache["blocks.0.attn.hook_result"][0, i, number])


def test_features_terms_and_their_sum():
    head = random_head()
    D, E = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    z, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    u = torch.randn(3, dtype=torch.float64)
    folded = head.fold(D, E)
    assert_close(folded(z, y), head(z @ D, y @ E))
    every = folded.leading(u, 2 * 3 * 2 * 3 * 3)
    assert_close(every.contributions(z, y).sum(-1), head(z @ D, y @ E) @ u)
    one, two = (D @ q.T @ k @ E.T for q, k in ((head.query, head.key), (head.query2, head.key2)))
    w = E @ head.value.T @ head.out.T @ u
    dense = torch.einsum("ac,be,g->acbeg", one, two, w)
    best = folded.leading(u, 7)
    assert_close(best.coefficients.abs(), dense.abs().flatten().sort(descending=True).values[:7])
    index = (best.query_first, best.key_first, best.query_second, best.key_second, best.value)
    assert_close(best.coefficients, dense[index])
    assert len(best.to_pandas()) == 7
    with pytest.raises(ValueError, match="k must lie between 1 and 108"):
        folded.leading(u, 109)


def test_the_pattern_is_a_quartic_form_with_leading_directions():
    head = random_head()
    form = head.pattern_form()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    first, second = head.scores(x, y)
    assert_close(form(torch.cat([x, y], 1)), first * second)
    assert_close(head.score_form()(x, y), torch.stack([first, second], 1))
    best = form.leading(1, starts=10)
    directions = torch.nn.functional.normalize(torch.randn(2000, 7, dtype=torch.float64), dim=1)
    assert float(best.values[0]) > float(form(directions).max())


def test_positions(free):
    head = product_head(free, 0, 0)
    x = torch.randn(16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"choose them with head.between\(query, key\)"):
        head.scores(x, x)
    with pytest.raises(ValueError, match="a query at 2 does not read a key after it, at 3"):
        head.between(2, 3)
    with pytest.raises(IndexError, match="key position -1 is not of 0 to 11"):
        head.between(2, -1)
    with pytest.raises(IndexError, match="head 2 does not exist: there are 2"):
        product_head(free, 0, 2)


@pytest.mark.usefixtures("unchecked")
def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \{'query': \[2, 3\], 'key': \[2, 4\]"):
        ProductHead(*(torch.ones(2, n) for n in (3, 4, 3, 4, 5, 2)))


# ---------------------------------------------------------------------- a whole model


def test_a_model_without_norms_is_one_polynomial(free, tmp_path):
    polynomial = tensor_polynomial(free)
    assert (polynomial.degree, polynomial.scales) == (100, {})
    logits, cache = free.run_with_cache(TOKENS)
    x0 = cache["hook_embed"]
    assert_close(polynomial(x0), logits, rtol=0, atol=1e-8)
    # On embeddings that no token has as well.
    other = torch.randn(1, 5, 16, dtype=torch.float64)
    replaced = free.run_with_hooks(
        TOKENS[:1, :5], fwd_hooks=[("hook_embed", lambda value, hook: other)]
    )
    assert_close(polynomial(other), replaced, rtol=0, atol=1e-8)
    polynomial.save(tmp_path / "polynomial.safetensors")
    loaded = TensorPolynomial.load(tmp_path / "polynomial.safetensors")
    assert_close(loaded(x0), polynomial(x0))


def test_degrees_sum_to_the_model_and_scale_as_they_should(free):
    polynomial = tensor_polynomial(free)
    _, cache = free.run_with_cache(TOKENS[:1])
    x0 = cache["hook_embed"][0]
    parts = polynomial.by_degree(x0)
    assert parts.shape == (101, 7, 23)
    assert_close(parts.sum(0), free(TOKENS[:1])[0], rtol=0, atol=1e-8)
    half = polynomial.by_degree(0.5 * x0)
    powers = 0.5 ** torch.arange(101, dtype=torch.float64)
    assert_close(half, powers[:, None, None] * parts, rtol=0, atol=1e-9 * float(parts.abs().max()))
    zero = polynomial(torch.zeros_like(x0))
    assert_close(parts[0], zero, rtol=0, atol=1e-8)
    with pytest.raises(MemoryError, match="use fewer positions"):
        polynomial.by_degree(x0, max_bytes=1000)


def test_with_its_norms_held_a_model_is_one_on_that_text(normed):
    polynomial = tensor_polynomial(normed, TOKENS[0])
    logits, cache = normed.run_with_cache(TOKENS)
    capped = 30 * torch.tanh(polynomial(cache["hook_embed"][0]) / 30)
    assert_close(capped, logits[0], rtol=0, atol=1e-8)
    elsewhere = 30 * torch.tanh(polynomial(cache["hook_embed"][1]) / 30)
    assert (elsewhere - logits[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="give the tokens of the text to hold them at"):
        tensor_polynomial(normed)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"squared_attn": False}, "attention is a difference of softmaxes"),
        ({"bilinear_attn": False}, "squared attention divides by its row's sum"),
        ({"bilinear_attn": False, "squared_attn": False}, "attention is a softmax"),
        ({"gated": True}, "its MLPs are gated by SiLU"),
        ({"bilinear": False}, "its MLPs square a ReLU"),
    ],
)
def test_what_is_no_polynomial_is_refused_by_name(tmp_path, fields, reason):
    model = made(tmp_path / "model", n_layer=1, **fields)
    with pytest.raises(ValueError, match=reason):
        tensor_polynomial(model, TOKENS[0])
    if "MLPs" not in reason:
        with pytest.raises(ValueError, match=f"a product of scores: here {reason}"):
            product_head(model, 0, 0)


def test_a_squared_mlp_is_a_polynomial_too(tmp_path):
    model = made(tmp_path / "model", norm=False, bilinear=False, squared_mlp=True)
    _, cache = model.run_with_cache(TOKENS)
    assert_close(tensor_polynomial(model)(cache["hook_embed"]), model(TOKENS), rtol=0, atol=1e-8)


@pytest.mark.usefixtures("unchecked")
def test_another_kind_of_model_is_refused():
    cfg = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 4, "d_vocab": 5, "d_mlp": 8}
    other = HookedBilinearTransformer({**cfg, "normalization_type": "RMS"})
    with pytest.raises(TypeError, match="needs a TensorTransformer, got HookedBilinearTransformer"):
        tensor_polynomial(other)
