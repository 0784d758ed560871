"""What features do on data, each against a slow obvious way."""

import pytest
import torch
from torch.testing import assert_close

from tests.features.building import N_IN, N_OUT, model, sae
from tl_bilinear import BilinearTensor, FeatureInteractions
from tl_bilinear.features import (
    ActivationScatter,
    ActiveInteractions,
    Examples,
    LowRankCorrelation,
    PairCheck,
)

LAYER = "blocks.1"
OUTPUT = f"{LAYER}.hook_mlp_out"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 23, (7, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[f"{LAYER}.mlp.hook_in", f"{LAYER}.hook_resid_mid"])
def f(request):
    return FeatureInteractions(
        model(),
        1,
        sae(request.param, dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64"),
    )


def test_low_rank_correlation(f, tokens, tmp_path):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :2] = False
    run = f.run(tokens, mask=mask, batch_size=3, progress=False)
    counts = run.low_rank_correlation(1, progress=False).counts
    features = counts.topk(2).indices.tolist()
    found = run.low_rank_correlation(3, features, progress=False)
    layer = BilinearTensor.from_model(f.model, 1)
    _, cache = f.model.run_with_cache(tokens)
    x = cache[f"{LAYER}.mlp.hook_in"][:, 2:].flatten(0, 1)
    out = cache[OUTPUT][:, 2:].flatten(0, 1)
    assert found.tokens == len(x)
    for row, a in enumerate(features):
        p = f.outputs.preactivation(out)[:, a]
        on = f.outputs.sae.encode(out)[:, a] != 0
        assert int(found.counts[row]) == int(on.sum())
        spectrum = layer.interaction(f.outputs.encoder[a]).eigh()
        for rank in (1, 2, 3):
            q = spectrum.quadratic(x, rank)
            whole = torch.corrcoef(torch.stack([p, q]))[0, 1]
            assert_close(found.everywhere[row, rank - 1], whole, rtol=1e-8, atol=1e-8)
            some = torch.corrcoef(torch.stack([p[on], q[on]]))[0, 1]
            assert_close(found.active[row, rank - 1], some, rtol=1e-7, atol=1e-7)
    assert len(found.to_pandas()) == 2
    found.save(tmp_path / "x")
    assert torch.equal(LowRankCorrelation.load(tmp_path / "x").active, found.active)


def test_shares_say_how_many_samples_they_need():
    nan = float("nan")
    found = LowRankCorrelation(
        torch.arange(4), torch.zeros(4, 2),
        torch.tensor([[0.9, 0.9], [0.2, 0.8], [0.1, 0.3], [nan, nan]]),
        torch.tensor([100, 10, 50, 0]), 1000,
    )  # fmt: skip
    assert found.share_above(0.75, rank=2, min_active=10) == pytest.approx(2 / 3)
    assert found.share_above(0.75, rank=2, min_active=50) == pytest.approx(1 / 2)
    assert found.share_above(0.75, rank=1, min_active=10) == pytest.approx(1 / 3)
    assert_close(found.mean_active(50), torch.tensor([0.5, 0.6]))


def test_all_eigenvectors_are_the_quadratic_part(f, tokens):
    bare = FeatureInteractions(
        model(bilinear_bias=False), 1, f.inputs, sae(OUTPUT, n=N_OUT, seed=1, dtype="float64")
    )
    found = bare.run(tokens).low_rank_correlation(16, progress=False)
    assert_close(found.everywhere[:, -1], torch.ones(N_OUT, dtype=torch.float64))


def test_scatter(f, tokens, tmp_path):
    run = f.run(tokens)
    found = run.scatter(5, k=2)
    correlation = run.low_rank_correlation(2, [5], progress=False)
    pair = torch.stack([found.measured, found.approximation])
    assert_close(torch.corrcoef(pair)[0, 1], correlation.everywhere[0, 1], rtol=1e-8, atol=1e-8)
    assert int(found.active.sum()) == int(correlation.counts[0])
    assert len(found.to_pandas()) == 7 * 11
    assert "approximation=" in repr(found)  # here a field of numbers, not a layer's note
    found.save(tmp_path / "x")
    assert torch.equal(ActivationScatter.load(tmp_path / "x").active, found.active)


def test_active_interactions_are_the_mean_of_attributions(f, tokens, tmp_path):
    run = f.run(tokens, batch_size=3)
    feature = int(run.low_rank_correlation(1, progress=False).counts.argmax())
    found = run.active_interactions(feature)
    totals, counts, rows = {}, {}, 0
    values = 0.0
    _, cache = f.model.run_with_cache(tokens)
    on = f.outputs.sae.encode(cache[OUTPUT])[..., feature] != 0
    on[:, 0] = False
    for sequence, position in on.nonzero().tolist():
        rows += 1
        one = run.attribute(feature, position, sequence)
        values += one.measured
        for row in one.to_pandas().to_dict("records"):
            key = (row["first"], row["second"])
            totals[key] = totals.get(key, 0.0) + row["contribution"]
            counts[key] = counts.get(key, 0) + 1
    assert found.tokens == rows > 0
    assert found.preactivation == pytest.approx(values / rows)
    assert len(found.first) == len(totals)
    for row in found.to_pandas().to_dict("records"):
        key = (row["first"], row["second"])
        assert row["mean"] == pytest.approx(totals[key] / rows, abs=1e-10)
        assert row["tokens"] == counts[key]
    assert found.pairs_per_token == pytest.approx(sum(counts.values()) / rows)
    assert found.means.abs().diff().le(1e-12).all()
    limited = run.active_interactions(feature, limit=2)
    assert limited.tokens == 2
    found.top(3).save(tmp_path / "x")
    assert len(ActiveInteractions.load(tmp_path / "x").first) == 3


@pytest.mark.parametrize("side", ["input", "output"])
def test_examples(f, tokens, side, tmp_path):
    found = f.run(tokens, batch_size=3).examples(3, k=2, side=side)
    _, cache = f.model.run_with_cache(tokens)
    chosen = f.inputs if side == "input" else f.outputs
    z = chosen.sae.encode(cache[chosen.encoder_hook])[..., 3].clone()
    z[:, 0] = 0
    best = z.max(1).values.topk(2)
    assert_close(found.values, best.values[best.values > 0])
    for row, sequence in enumerate(found.sequences.tolist()):
        assert torch.equal(found.tokens[row], tokens[sequence])
        assert_close(found.strengths[row], z[sequence])
        assert z[sequence].argmax() == found.positions[row]
    if len(found.sequences):
        assert f"[[{int(found.tokens[0][found.positions[0]])}]]" in found.to_pandas()["text"][0]
    found.save(tmp_path / "x")
    assert Examples.load(tmp_path / "x").side == side


def test_promoted_tokens(f):
    found = f.promoted(3, k=4)
    logits = (f.outputs.decoder[3] * f.model.ln_final.w.detach()) @ f.model.W_U.detach()
    assert found.promoted.tolist() == logits.topk(4).indices.tolist()
    assert found.suppressed.tolist() == (-logits).topk(4).indices.tolist()
    assert found.to_pandas().shape == (4, 4)
    row = f.inputs.decoder[3]
    if f.passage.hook.endswith("hook_in"):
        row = row / f.model.blocks[1].ln2.w.detach()
    logits = (row * f.model.ln_final.w.detach()) @ f.model.W_U.detach()
    assert f.promoted(3, k=4, side="input").promoted.tolist() == logits.topk(4).indices.tolist()
    with pytest.raises(IndexError, match=f"input features are 0 to {N_IN - 1}"):
        f.promoted(N_IN, side="input")


def test_mean_input(f, tokens):
    _, cache = f.model.run_with_cache(tokens)
    where = tokens == 5
    run = f.run(tokens, mask=torch.ones_like(where))
    assert_close(run.mean_input(where), cache[f.passage.hook][where].mean(0))
    assert_close(run.mean_input(), cache[f.passage.hook].flatten(0, 1).mean(0))
    with pytest.raises(ValueError, match="no token was chosen"):
        run.mean_input(tokens > 99)


def test_pairs_do_what_the_weights_say(f, tokens, tmp_path):
    run = f.run(tokens)
    feature = int(run.low_rank_correlation(1, progress=False).counts.argmax())
    met = run.active_interactions(feature, limit=50)
    found = run.verify_pairs(feature, met.top(5, kind="cross"))
    assert len(found.first) == 5
    assert (found.tokens > 0).all()
    assert (found.difference < 1e-10).all()
    assert_close(found.predicted, found.measured, rtol=1e-8, atol=1e-10)
    assert (found.control > 0).all()
    found.save(tmp_path / "x")
    assert torch.equal(PairCheck.load(tmp_path / "x").measured, found.measured)
    assert len(run.verify_pairs(feature, 4).to_pandas()) == 4


@pytest.mark.parametrize("write", ["minimal", "feature"])
def test_eigencomponents_are_taken_out_of_the_running_model(f, tokens, write):
    from tl_bilinear.hooks import verify

    parts = f.components([3, 5], 4, write=write)
    assert parts.shape == (2, 4)
    checked = verify(f.model, tokens, parts, (0, slice(2)), at="output", progress=False)
    assert (checked.error < 1e-10).all()
    before = f.run(tokens).output
    edit = parts.ablate((0, 0))
    _, cache = f.model.run_with_cache(tokens)
    with f.model.hooks(fwd_hooks=edit.fwd_hooks(f.model)):
        _, edited = f.model.run_with_cache(tokens)
    change = (edited[OUTPUT] - before) @ f.directions[3]
    assert_close(change, -parts.activations(cache[f"{LAYER}.mlp.hook_in"])[..., 0, 0])


@pytest.mark.usefixtures("unchecked")
def test_components_that_cannot_be_written(f):
    with pytest.raises(ValueError, match="write must be"):
        f.components(3, 2, write="elsewhere")
    out = sae(OUTPUT, "transcoder", n=N_OUT, hook_out="blocks.1.hook_resid_post", dtype="float64")
    across = FeatureInteractions(f.model, 1, f.inputs, out)
    with pytest.raises(
        ValueError, match=r"the output dictionary writes at 'blocks\.1\.hook_resid_post'"
    ):
        across.components(3, 2, write="feature")


def test_the_check_of_pairs_can_fail(f, tokens, monkeypatch):
    """Weights that are not the model's predict something else."""
    run = f.run(tokens)
    feature = int(run.low_rank_correlation(1, progress=False).counts.argmax())
    pairs = run.active_interactions(feature, limit=50).top(3, kind="cross")
    wrong = 1.5 * f.hook_tensor
    monkeypatch.setattr(f, "hook_tensor", wrong)
    assert (run.verify_pairs(feature, pairs).difference > 0.01).all()
