"""Directions from weights alone, against the model's own run and against definitions."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.circuits.building import DIRECTION, TOKENS, VOCABULARY, D, model
from tests.features.building import sae
from tl_bilinear import BilinearTensor, Dictionary, FeatureInteractions
from tl_bilinear.circuits import (
    SourcePairs,
    VirtualWeights,
    direct_path,
    embedding,
    paths,
    positions,
    source_pairs,
    through_head,
    unembedding,
    virtual_weights,
)


@pytest.mark.parametrize("norm", ["RMS", "LN", "LNPre", None])
def test_token_pairs_of_layer_0(norm):
    """Every entry of the V x V table of one logit, from its definition."""
    built = model(normalization_type=norm)
    features = FeatureInteractions(
        built, 0, direct_path(built, 0, embedding(built)), unembedding(built)
    )
    B = BilinearTensor.from_model(built, 0).dense()

    def through(norm_layer, rows):
        if norm in ("LN", "LNPre"):
            rows = rows - rows.mean(-1, keepdim=True)
        return rows * norm_layer.w if norm in ("RMS", "LN") else rows

    tokens = through(getattr(built.blocks[0], "ln2", None), built.W_E)
    logit = built.W_U[:, 7] * (built.ln_final.w if norm in ("RMS", "LN") else 1)
    logit = logit - logit.mean() if norm in ("LN", "LNPre") else logit
    table = torch.einsum("a,aij,mi,nj->mn", logit, B, tokens, tokens)
    assert_close(features.interaction(7).dense(), table, rtol=1e-10, atol=1e-10)
    top = features.top(7, 5)
    assert top.first.shape == (5,)
    doubled = table.triu() * (2 - torch.eye(VOCABULARY, dtype=torch.float64))
    assert_close(top.coefficients.abs(), doubled.abs().flatten().topk(5).values)


@pytest.mark.parametrize("norm", ["RMS", "LN", "LNPre", "RMSPre"])
def test_unembedding_is_the_logit(norm):
    built = model(normalization_type=norm)
    logits, cache = built.run_with_cache(TOKENS)
    scale = cache["ln_final.hook_scale"][0]
    bias = getattr(built.ln_final, "b", torch.zeros(D, dtype=torch.float64)) @ built.W_U + built.b_U
    read = cache["blocks.2.hook_resid_post"][0] @ unembedding(built).decoder.T / scale
    assert_close(logits[0], read + bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "fields", [{}, {"n_key_value_heads": 2, "d_head": 4}, {"normalization_type": None}], ids=str
)
def test_a_token_through_a_head_is_what_the_head_writes(fields):
    """Up to its attention and the norm's scale, which a run has: there it is the component."""
    built = model(positional_embedding_type="rotary", **fields)
    found = paths(built, TOKENS, 0, DIRECTION, 4)
    _, cache = built.run_with_cache(TOKENS)
    tokens = embedding(built)
    assert len(found.labels) > 10
    for i, (kind, (_, head, source)) in enumerate(
        zip(found.kinds, found.where.tolist(), strict=True)
    ):
        if kind != "head":
            continue
        weight = cache["blocks.0.attn.hook_pattern"][0, head, 4, source]
        if built.cfg.normalization_type is not None:
            weight = weight / cache["blocks.0.ln1.hook_scale"][0, source, 0]
        written = through_head(built, tokens, 0, head).decoder[TOKENS[source]]
        assert_close(found.vectors[i], weight * written, rtol=1e-10, atol=1e-10)


def test_heads_compose():
    built = model(normalization_type="LN")
    once = through_head(built, positions(built), 0, 1)
    assert once.hook == "blocks.0.hook_attn_out"
    assert once.labels[3] == "position 3 through 0.1"
    twice = through_head(built, once, 2, 0)
    assert twice.labels[3] == "position 3 through 0.1 through 2.0"
    rows = built.W_pos
    for layer, head in ((0, 1), (2, 0)):
        block = built.blocks[layer]
        rows = (rows - rows.mean(1, keepdim=True)) * block.ln1.w
        rows = rows @ block.attn.W_V[head] @ block.attn.W_O[head]
    assert_close(twice.decoder, rows)


def test_sources_of_a_layer_are_what_a_prompt_adds_up():
    """The pair of two sources in a run is the weights' entry times their factors."""
    built = model(positional_embedding_type="rotary")
    found = paths(built, TOKENS, 0, DIRECTION, 4)
    _, cache = built.run_with_cache(TOKENS)
    sources = direct_path(built, 0, embedding(built), through_head(built, embedding(built), 0, 1))
    assert sources.n == 2 * VOCABULARY
    features = FeatureInteractions(built, 0, sources, DIRECTION[None])
    table = features.interaction(0).dense()
    inner = cache["blocks.0.ln1.hook_scale"][0, :, 0]
    outer = cache["blocks.0.ln2.hook_scale"][0, 4, 0]
    place = found.where.tolist()
    embed = found.kinds.index("embed")
    for source in range(5):
        head = place.index([0, 1, source])
        factor = cache["blocks.0.attn.hook_pattern"][0, 1, 4, source] / inner[source] / outer**2
        entry = table[TOKENS[4], VOCABULARY + TOKENS[source]]
        assert_close(found.quadratic[embed, head], entry * factor, rtol=1e-9, atol=1e-12)


def test_an_earlier_layer_s_features_reach_a_later_layer():
    built = model(normalization_type="LN")
    written = sae("blocks.0.hook_mlp_out", n=30, dtype="float64")
    features = FeatureInteractions(built, 2, direct_path(built, 2, written), DIRECTION[None])
    B = torch.einsum("a,aij->ij", DIRECTION, BilinearTensor.from_model(built, 2).dense())
    rows = written.W_dec - written.W_dec.mean(1, keepdim=True)
    rows = rows * built.blocks[2].ln2.w
    assert_close(features.interaction(0).dense(), rows @ B @ rows.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [5, 10**6])
def test_pairs_of_two_sources(block, monkeypatch, tmp_path):
    monkeypatch.setattr("tl_bilinear.tensor.top.BLOCK_ELEMENTS", block * VOCABULARY)
    built = model(normalization_type="LN")
    tokens = embedding(built)
    carried = through_head(built, tokens, 0, 1)
    found = source_pairs(built, 0, DIRECTION, tokens, carried, 7)
    features = FeatureInteractions(
        built, 0, direct_path(built, 0, tokens, carried), DIRECTION[None]
    )
    table = 2 * features.interaction(0).dense()[:VOCABULARY, VOCABULARY:]
    assert_close(found.coefficients, table[found.first, found.second])
    assert_close(found.coefficients.abs(), table.abs().flatten().topk(7).values)
    assert found.to_pandas()["label_second"][0].endswith(" through 0.1")
    found.save(tmp_path / "x")
    assert SourcePairs.load(tmp_path / "x").top(2).to_pandas().equals(found.to_pandas().head(2))
    with pytest.raises(ValueError, match="k must lie between 1 and 529"):
        source_pairs(built, 0, DIRECTION, tokens, carried, 530)


def test_virtual_weights(tmp_path):
    built = model(normalization_type="LN")
    written = Dictionary(
        torch.randn(9, D, dtype=torch.float64),
        hook="blocks.0.mlp.hook_out",
        labels=list("abcdefghi"),
    )
    whole = virtual_weights(built, written, 2, DIRECTION, k=D)
    z = torch.rand(9, dtype=torch.float64)
    features = FeatureInteractions(built, 2, direct_path(built, 2, written), DIRECTION[None])
    expected = features.interaction(0).quadratic(z)
    assert_close((whole.values * (z @ whole.weights).square()).sum(), expected)
    found = virtual_weights(built, written, 2, DIRECTION, k=2)
    assert found.residual == pytest.approx(float(whole.values[2].abs()), rel=1e-6)
    table = found.strongest(3, 1)
    best = int(found.weights[:, 1].abs().argmax())
    assert table["index"][0] == best
    assert table["label"][0] == f"{best} {'abcdefghi'[best]}"
    assert table["contribution"][0] == pytest.approx(
        float(found.values[1] * found.weights[best, 1] ** 2)
    )
    assert found.to_pandas().shape == (9, 2)
    found.save(tmp_path / "x")
    assert_close(VirtualWeights.load(tmp_path / "x").weights, found.weights)


def test_what_is_upstream():
    built, rows = model(), torch.randn(3, D, dtype=torch.float64)

    def at(hook):
        return Dictionary(rows, hook=hook)

    for hook, layer in itertools.product(
        ("hook_embed", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre",
         "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out"), (1, 2)
    ):  # fmt: skip
        assert direct_path(built, layer, at(hook)).hook == f"blocks.{layer}.hook_resid_mid"
    for hook in ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out", "blocks.2.hook_resid_pre"):
        with pytest.raises(ValueError, match="is not upstream of the MLP of layer 1"):
            direct_path(built, 1, at(hook))
    with pytest.raises(ValueError, match=r"is not upstream of head 1\.0"):
        through_head(built, at("blocks.1.hook_resid_mid"), 1, 0)
    with pytest.raises(ValueError, match="does not write into the residual stream"):
        direct_path(built, 1, at("blocks.0.mlp.hook_in"))
    with pytest.raises(ValueError, match="has width 7, the residual stream 16"):
        direct_path(built, 1, torch.randn(2, 7))
    with pytest.raises(ValueError, match="needs at least one source"):
        direct_path(built, 1)
    with pytest.raises(IndexError, match=r"head 2 does not exist: there are 2 \(0 to 1\)"):
        through_head(built, rows, 0, 2)
    parallel = model(parallel_attn_mlp=True)
    assert direct_path(parallel, 1, at("blocks.0.hook_mlp_out")).hook == "blocks.1.hook_resid_pre"
    with pytest.raises(ValueError, match="is not upstream of the MLP of layer 1"):
        direct_path(parallel, 1, at("blocks.1.hook_attn_out"))


def test_models_without_such_directions(unchecked):
    with pytest.raises(ValueError, match="this model's are 'rotary'"):
        positions(model(positional_embedding_type="rotary"))
    with pytest.raises(ValueError, match=r"post_embedding_ln=True"):
        embedding(model(post_embedding_ln=True))
    with pytest.raises(ValueError, match=r"direction must be one vector \[16\] .*, got \[2, 16\]"):
        virtual_weights(model(), embedding(model()), 1, DIRECTION.expand(2, -1))
