"""A planted circuit is found from weights alone, through noisy dictionaries, with nothing told.

The layer holds an AND of two features (one output fires where both are there) and a negation pair: a
negator flips the sign of a positive and a negative feature, written along an output direction and, for
its opposite, nearly along minus it. The rest is noise: other neurons, superposed features, dictionaries
whose rows are permuted, scaled, noisy and outnumbered by rows that mean nothing.
"""

from dataclasses import dataclass

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from tl_bilinear import FeatureInteractions, HookedBilinearTransformer

D, HIDDEN, TRUE, N_IN, N_OUT, VOCABULARY = 64, 96, 80, 128, 96, 200


@dataclass
class Key:
    """Where the planted features went: rows of the dictionaries."""

    a: int
    b: int
    negator: int
    positive: int
    negative: int
    out_and: int
    out_flip: int
    out_opposite: int


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def planted():
    generator = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    true = unit(normal(TRUE, D))
    o_and, o_flip, o_else = unit(normal(3, D))
    o_opposite = unit(-o_flip + 0.2 * o_else)
    a, b, negator, positive, negative = range(5)
    true[b] = unit(true[b] - (true[b] @ true[a]) * true[a])

    model = HookedBilinearTransformer(
        {
            "n_layers": 1, "d_model": D, "d_head": 8, "n_ctx": 8, "d_vocab": VOCABULARY,
            "d_mlp": HIDDEN, "normalization_type": "RMSPre", "device": "cpu", "seed": 0,
        }
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
        mlp = model.blocks[0].mlp
        left, right, out = (
            0.12 * normal(HIDDEN, D),
            0.12 * normal(HIDDEN, D),
            0.12 * normal(HIDDEN, D),
        )
        left[10], right[10], out[10] = true[a], true[b], 2 * o_and
        left[20], right[20], out[20] = true[negator], true[positive] - true[negative], 1.5 * o_flip
        mlp.W_gate.copy_(left.T), mlp.W_in.copy_(right.T), mlp.W_out.copy_(out)
        # A token is a few features at once, so that pairs meet.
        sums = torch.zeros(VOCABULARY, TRUE)
        for token in range(VOCABULARY):
            sums[token, torch.randperm(TRUE, generator=generator)[:3]] = 3
        sums[:20, :] = 0
        sums[:20, torch.tensor([a, b])] = 3
        sums[20:40, :] = 0
        sums[20:40, torch.tensor([negator, positive])] = 3
        model.W_E.copy_(sums @ true)
        model.W_pos.mul_(0)

    def dictionary(hook, known, n):
        rows = unit(torch.cat([known, normal(n - len(known), D)]) + 0.03 * normal(n, D))
        order = torch.randperm(n, generator=generator)
        made = TopKSAE(TopKSAEConfig(d_in=D, d_sae=n, k=8, metadata=SAEMetadata(hook_name=hook)))
        scale = 0.8 + 0.4 * torch.rand(n, 1, generator=generator)
        with torch.no_grad():
            made.W_dec.copy_((rows * scale)[order])
            made.W_enc.copy_((unit(rows + 0.03 * normal(n, D)) / scale)[order].T)
            made.b_dec.copy_(0.05 * normal(D))
        return made, order.argsort().tolist()

    sae_in, where_in = dictionary("blocks.0.hook_resid_mid", true, N_IN)
    sae_out, where_out = dictionary(
        "blocks.0.hook_mlp_out", torch.stack([o_and, o_flip, o_opposite]), N_OUT
    )
    key = Key(*(where_in[i] for i in range(5)), *(where_out[i] for i in range(3)))
    return FeatureInteractions(model, 0, sae_in, sae_out), key


@pytest.fixture(scope="module")
def found(planted):
    """What the pipeline says stands out, from `features` alone: never sees the key."""
    features, _ = planted
    return features.sweep(k=2, progress=False).to_pandas()


def test_the_planted_features_stand_out(planted, found):
    _, key = planted
    score = found["value_1"].abs() * found["share"]
    best = found.loc[score.sort_values(ascending=False).index, "feature"].tolist()
    assert set(best[:3]) == {key.out_and, key.out_flip, key.out_opposite}


def test_the_and_gate_is_read_off(planted, found):
    features, key = planted
    row = found[found["feature"] == key.out_and].iloc[0]
    assert {row["first"], row["second"]} == {key.a, key.b}
    assert row["coefficient"] > 0
    assert row["and_gate"] > 0.8
    # A symmetric product of two directions: one positive and one negative eigenvalue of like size.
    assert row["value_1"] * row["value_2"] < 0
    assert row["share"] > 0.6
    next_best = features.top(key.out_and, 2, kind="cross").coefficients.abs()
    assert next_best[0] > 2 * next_best[1]


def test_the_negation_pair_is_read_off(planted, found):
    features, key = planted
    row = found[found["feature"] == key.out_flip].iloc[0]
    assert row["opposite"] == key.out_opposite
    assert row["opposite_cosine"] < -0.9
    for output, sign in ((key.out_flip, 1), (key.out_opposite, -1)):
        pairs = features.top(output, 2, kind="cross")
        read = {
            frozenset((b, c)): float(value)
            for b, c, value in zip(
                pairs.first.tolist(), pairs.second.tolist(), pairs.coefficients, strict=True
            )
        }
        assert set(read) == {
            frozenset((key.negator, key.positive)),
            frozenset((key.negator, key.negative)),
        }
        assert sign * read[frozenset((key.negator, key.positive))] > 0
        assert sign * read[frozenset((key.negator, key.negative))] < 0


def test_the_clusters_are_the_roles(planted):
    features, key = planted
    geometry = features.geometry(key.out_flip, k=4)
    cluster = dict(zip(geometry.names, geometry.clusters.tolist(), strict=True))
    roles = [cluster[str(i)] for i in (key.negator, key.positive, key.negative)]
    assert len(set(roles)) == 3


def test_the_strongest_pairs_of_the_whole_tensor_are_the_planted_ones(planted):
    features, key = planted
    pairs = features.top_overall(10, kind="cross")
    names = {frozenset(p) for p in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    assert set(pairs.features.tolist()) <= {key.out_and, key.out_flip, key.out_opposite}
    assert frozenset((key.a, key.b)) in names


def test_the_story_holds_under_intervention(planted):
    features, key = planted
    tokens = torch.arange(VOCABULARY).view(-1, 8)
    run = features.run(tokens)
    checked = run.verify_pairs(key.out_and, 1)
    assert {int(checked.first[0]), int(checked.second[0])} == {key.a, key.b}
    assert checked.tokens[0] >= 10
    assert checked.difference[0] < 1e-4
    assert checked.measured[0] > 5 * checked.control[0]
    attributed = run.attribute(key.out_and, 3)
    top = attributed.to_pandas(1).iloc[0]
    assert {top["first"], top["second"]} == {key.a, key.b}
    assert attributed.error < 1e-5
