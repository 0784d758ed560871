"""Pairs counted on text, and their three orders, against counting token by token."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.features.building import N_IN, N_OUT, model, sae
from tl_bilinear import FeatureInteractions
from tl_bilinear.features import PairCounts, RankedPairs
from tl_bilinear.features import pair_counts as module

LAYER = "blocks.1"
OUTPUT = f"{LAYER}.hook_mlp_out"


@pytest.fixture(scope="module")
def f():
    return FeatureInteractions(
        model(),
        1,
        sae(f"{LAYER}.hook_resid_mid", dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64", normalize_activations="layer_norm"),
    )


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 23, (9, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def busy(f, tokens):
    return f.run(tokens).low_rank_correlation(1, progress=False).counts.topk(2).indices.tolist()


def by_hand(f, tokens, feature):
    """Per pair: [together, sum of products with the gain, both again where the feature is active]."""
    run = f.run(tokens, progress=False)
    z = run.activations(side="input") / run.scale
    on = run.activations([feature])[..., 0] != 0
    found = {}
    for row, position in run.mask.nonzero().tolist():
        active = z[row, position].nonzero()[:, 0].tolist()
        for b in active:
            for c in (c for c in active if c >= b):
                product = float(z[row, position, b] * z[row, position, c])
                product *= float(run.output_scale[row, position])
                held = found.setdefault((b, c), [0, 0.0, 0, 0.0])
                held[0] += 1
                held[1] += product
                if on[row, position]:
                    held[2] += 1
                    held[3] += product
    return found, run, z[run.mask]


@pytest.mark.parametrize("sparse", [False, True])
def test_counts_are_those_by_hand(f, tokens, busy, sparse, monkeypatch, tmp_path):
    if sparse:
        monkeypatch.setattr(module, "_DENSE", 0)
    found = f.count_pairs(tokens, busy, batch_size=4, progress=False)
    for row, feature in enumerate(busy):
        expected, run, z = by_hand(f, tokens, feature)
        pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
        assert sorted(expected) == pairs
        values = torch.tensor([expected[pair] for pair in pairs], dtype=torch.double)
        assert torch.equal(found.together, values[:, 0].long())
        assert_close(found.gained, values[:, 1])
        assert torch.equal(found.active_together[row], values[:, 2].long())
        assert_close(found.active_gained[row], values[:, 3])
    assert found.tokens == int(run.mask.sum())
    assert found.dropped == 0
    place = int(found.together.argmax())
    b, c = int(found.first[place]), int(found.second[place])
    expected = torch.corrcoef(z[:, [b, c]].T)[0, 1]
    if b != c:
        assert_close(found.correlation[place], expected)
    off = (found.first != found.second).nonzero()[:5, 0]
    for place in off.tolist():
        pair = z[:, [int(found.first[place]), int(found.second[place])]].T
        assert_close(found.correlation[place], torch.corrcoef(pair)[0, 1], atol=1e-8, rtol=1e-6)
    parts = [f.count_pairs(part, busy, progress=False) for part in tokens.split(4)]
    merged = PairCounts.merged(parts)
    assert torch.equal(merged.together, found.together)
    assert_close(merged.active_gained, found.active_gained)
    assert_close(merged.correlation, found.correlation)
    found.save(tmp_path / "x")
    assert torch.equal(PairCounts.load(tmp_path / "x").together, found.together)
    assert len(found.to_pandas()) == len(pairs)


def test_three_orders(f, tokens, busy, tmp_path):
    feature = busy[0]
    expected, run, _ = by_hand(f, tokens, feature)
    form = f.interaction(feature).dense()
    counts = f.count_pairs(tokens, busy, progress=False)
    found = f.ranked_pairs(feature, counts, k=6)
    assert found.order == "active"
    everything = {}
    for b in range(N_IN):
        for c in range(b, N_IN):
            coefficient = float(form[b, c]) * (1 if b == c else 2)
            sums = expected.get((b, c), [0, 0.0, 0, 0.0])
            everything[b, c] = (
                coefficient,
                coefficient * sums[1] / counts.tokens,
                coefficient * sums[3] / int(counts.active_tokens[0]),
            )
    for order, place in (("weights", 0), ("text", 1), ("active", 2)):
        top = found.top(6, by=order)
        best = sorted(everything, key=lambda pair: -abs(everything[pair][place]))[:6]
        assert list(zip(top.first.tolist(), top.second.tolist(), strict=True)) == best
        assert list(top.to_pandas()[f"rank_{order}"]) == [1, 2, 3, 4, 5, 6]
    for row in found.to_pandas().to_dict("records"):
        pair = everything[row["first"], row["second"]]
        assert (row["coefficient"], row["on_text"], row["where_active"]) == pytest.approx(pair)
    alike = run.ranked_pairs(feature, 6)
    assert torch.equal(alike.first, found.first)
    # Where the feature is active, these are the means of `active_interactions`.
    active = run.active_interactions(feature, progress=False).top(6)
    assert torch.equal(found.top(6).first, active.first)
    assert_close(found.top(6).where_active, active.means)
    assert len(found.top(2, kind="cross").first) == 2
    found.save(tmp_path / "x")
    assert RankedPairs.load(tmp_path / "x").order == "active"


def test_memory_is_bounded_and_what_is_missing_is_said(f, tokens, monkeypatch):
    monkeypatch.setattr(module, "_DENSE", 0)
    exact = f.count_pairs(tokens, progress=False)
    held = len(exact.first)
    few = f.count_pairs(tokens, max_pairs=held // 3, batch_size=2, progress=False)
    assert len(few.first) <= held // 3
    assert few.dropped > 0
    known = dict(zip(zip(exact.first.tolist(), exact.second.tolist(), strict=True),
                     exact.together.tolist(), strict=True))  # fmt: skip
    for b, c, count in zip(
        few.first.tolist(), few.second.tolist(), few.together.tolist(), strict=True
    ):
        assert count <= known[b, c] <= count + few.dropped


def test_counts_that_are_refused(f, tokens, busy, unchecked):
    counts = f.count_pairs(tokens, busy[:1], progress=False)
    with pytest.raises(ValueError, match="not for"):
        f.ranked_pairs(busy[1], counts)
    with pytest.raises(ValueError, match="by must be one of weights, text, active"):
        f.ranked_pairs(busy[0], counts, by="size")
    other = f.count_pairs(tokens, busy[1:], progress=False)
    with pytest.raises(ValueError, match="other output features"):
        PairCounts.merged([counts, other])
    with pytest.raises(ValueError, match="nothing to merge"):
        PairCounts.merged([])


MILLION = """
import resource, torch
from tl_bilinear import FeatureInteractions, demo
from tl_bilinear.features.pair_counts import PairCounter
saes = demo.load_demo_saes(3)
f = FeatureInteractions(demo.load_demo_model("cpu"), 3, saes["mlp_in"], saes["mlp_out"])
run = f.run(demo.load_demo_tokens()[:40], progress=False)
counter = PairCounter(f, torch.tensor([0, 1, 2]))
counter.add(run)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
while counter.tokens < 1_000_000:
    counter.add(run)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(counter.tokens, (after - before) * 1024)
"""


@pytest.mark.campaign
def test_a_million_tokens_take_no_more_memory_than_a_few():
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, check=True, env=os.environ
    )
    tokens, grown = map(int, done.stdout.split()[-2:])
    assert tokens >= 1_000_000
    assert grown < 200e6
