"""Loss added: the numbers against loops and scipy, the intervals against their promise."""

import math
from contextlib import contextmanager

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from tests.hooks.running import EXACT, LAYER, TOKENS, eigen, model64, sae, through
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import (
    Chain,
    Edit,
    HOSVDComponents,
    LossAdded,
    logit_difference,
    loss_added,
    next_token_loss,
    token_losses,
)
from tl_bilinear.hooks.effects import mean_interval
from tl_bilinear.tensor import hosvd

MANY = torch.randint(0, 23, (7, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return model64()


@pytest.fixture(scope="module")
def edits(model):
    tensor = BilinearTensor.from_model(model, LAYER)
    return {
        "one": eigen(model, 2).ablate((0, 0)),
        "rank 2": eigen(model, 3).low_rank(2, outside="drop"),
        "both": Chain(
            eigen(model, 2).ablate((0, 0)), HOSVDComponents(hosvd(tensor, 2), layer=LAYER).ablate()
        ),
    }


def slow_loss(model, tokens, edit=None):
    """Cross-entropy of each next token, one at a time."""
    total = []
    for sequence in tokens:
        logits = through(model, *([edit] if edit else []), tokens=sequence[None])[2][0]
        losses = [
            float(row.exp().sum().log() - row[token])
            for row, token in zip(logits[:-1], sequence[1:], strict=True)
        ]
        total.append(sum(losses) / len(losses))
    return total


def test_the_losses_are_those_of_the_runs(model, edits):
    found = loss_added(model, MANY, edits, batch_size=3, progress=False)
    assert found.names == list(edits)
    clean = torch.tensor(slow_loss(model, MANY), dtype=torch.float64)
    assert_close(found.clean, clean, **EXACT)
    for row, edit in zip(found.patched, edits.values(), strict=True):
        assert_close(row, torch.tensor(slow_loss(model, MANY, edit), dtype=torch.float64), **EXACT)
    whole = model(MANY, return_type="loss").detach()
    assert_close(whole, found.clean.mean().to(whole), rtol=1e-6, atol=0)
    assert_close(found.difference, (found.patched - clean).mean(1), **EXACT)
    assert_close(found.relative, found.difference / clean.mean(), **EXACT)
    one = loss_added(model, MANY, edits["rank 2"], progress=False)
    assert one.names == ["edit"]
    assert_close(one.patched[0], found.patched[1], **EXACT)


class ZeroedEmbedding:
    """An edit of one's own: anything with `applied`."""

    @contextmanager
    def applied(self, model):
        weights = model.W_E.detach().clone()
        model.W_E.data.zero_()
        yield
        model.W_E.data.copy_(weights)


def test_edits_of_ones_own(model):
    found = loss_added(model, MANY, {"no tokens": ZeroedEmbedding()}, batch_size=4, progress=False)
    assert isinstance(ZeroedEmbedding(), Edit)
    assert_close(found.clean, torch.tensor(slow_loss(model, MANY), dtype=torch.float64), **EXACT)
    with ZeroedEmbedding().applied(model):
        expected = torch.tensor(slow_loss(model, MANY), dtype=torch.float64)
    assert_close(found.patched[0], expected, **EXACT)


def test_the_loss_of_each_token(model):
    logits = through(model, tokens=MANY)[2]
    losses = token_losses(logits, MANY)
    assert losses.shape == (7, 8)
    assert_close(losses.mean(-1), next_token_loss(logits, MANY), **EXACT)
    whole = model(MANY, return_type="loss", loss_per_token=True).detach()
    assert_close(losses.to(whole), whole, rtol=1e-5, atol=1e-6)


def test_intervals_are_students(model, edits):
    found = loss_added(model, MANY, edits, confidence=0.9, progress=False)
    for i in range(3):
        d, c = (found.patched[i] - found.clean).numpy(), found.clean.numpy()
        low, high = stats.t.interval(0.9, 6, loc=d.mean(), scale=stats.sem(d))
        assert_close(found.interval[i].tolist(), [low, high], **EXACT)
        ratio = d.mean() / c.mean()
        se = math.sqrt(sum((d - ratio * c) ** 2) / 6 / 7) / c.mean()
        low, high = stats.t.interval(0.9, 6, loc=ratio, scale=se)
        assert_close(found.relative_interval[i].tolist(), [low, high], **EXACT)
    table = found.to_pandas()
    assert list(table["edit"]) == ["one", "rank 2", "both"]
    assert (table["low"] < table["difference"]).all()
    assert (table["relative"] < table["relative_high"]).all()


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    clean = 2 + 0.3 * torch.randn(1500, 12, generator=generator, dtype=torch.float64)
    added = 0.05 * clean + 0.1 * torch.randn(1500, 12, generator=generator, dtype=torch.float64)
    covered = relative = 0
    for c, d in zip(clean, added, strict=True):
        result = LossAdded(["x"], c, (c + d)[None], confidence=0.8)
        low, high = result.interval[0]
        covered += bool(low <= 0.1 <= high)
        low, high = result.relative_interval[0]
        relative += bool(low <= 0.05 <= high)
    assert abs(covered / 1500 - 0.8) < 0.04
    assert abs(relative / 1500 - 0.8) < 0.04


def test_a_single_sequence_has_no_interval(model, edits):
    found = loss_added(model, TOKENS[:1], edits, progress=False)
    assert found.interval.isnan().all()
    assert not found.difference.isnan().any()


def test_masked_targets(model):
    logits = through(model)[2]
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, 4:] = False
    mask[2] = False
    found = next_token_loss(logits, TOKENS, mask)
    assert_close(found[0], next_token_loss(logits[:1, :4], TOKENS[:1, :4])[0], **EXACT)
    assert_close(found[1], next_token_loss(logits[1:2], TOKENS[1:2])[0], **EXACT)
    assert found[2] == 0
    edit = eigen(model, 1).ablate(0)
    added = loss_added(model, TOKENS, edit, mask=mask, batch_size=2, progress=False)
    assert_close(added.clean, found, **EXACT)
    with pytest.raises(
        ValueError, match=r"mask must be a boolean tensor of shape \[3, 6\].*\[3, 5\]"
    ):
        loss_added(model, TOKENS, edit, mask=mask[:, 1:], progress=False)


def test_saes_stay_attached_in_both_runs(sae_model):
    model = sae_model
    edit = eigen(model, 2).ablate((0, 0))
    one = sae("blocks.1.mlp.hook_in")
    plain = loss_added(model, TOKENS, edit, progress=False)
    with model.saes([one]):
        spliced = loss_added(model, TOKENS, edit, progress=False)
    expected = next_token_loss(model.run_with_saes(TOKENS, saes=[one]), TOKENS)
    assert_close(spliced.clean, expected, **EXACT)
    assert not torch.allclose(spliced.clean, plain.clean)


def test_top_and_storage(model, edits, tmp_path):
    found = loss_added(model, MANY, edits, progress=False)
    most = found.top(2)
    assert most.difference.tolist() == sorted(found.difference.tolist(), reverse=True)[:2]
    assert most.names == [
        found.names[i] for i in found.difference.argsort(descending=True)[:2].tolist()
    ]
    with pytest.raises(ValueError, match=r"k must lie between 1 and 3 \(the edits\), got 4"):
        found.top(4)
    found.save(tmp_path / "loss.safetensors")
    loaded = LossAdded.load(tmp_path / "loss.safetensors")
    assert loaded.names == found.names
    assert torch.equal(loaded.patched, found.patched)
    assert loaded.to_pandas().equals(found.to_pandas())


def test_logit_difference():
    logits = torch.randn(2, 3, 5)
    assert_close(logit_difference(1, 4)(logits, TOKENS), logits[:, -1, 1] - logits[:, -1, 4])
    assert_close(
        logit_difference(0, 2, position=1)(logits, TOKENS), logits[:, 1, 0] - logits[:, 1, 2]
    )


def test_it_can_be_interrupted(model, edits, monkeypatch):
    """Ctrl-C in the middle of a forward: the model is as it was."""
    logits = model(TOKENS)

    class Stop(type(edits["one"])):
        def edit(self, x, out):
            raise KeyboardInterrupt

    edit = edits["one"]
    stop = Stop(edit.components, edit.index, layer=LAYER)
    with pytest.raises(KeyboardInterrupt):
        loss_added(model, MANY, {"stop": stop}, progress=False)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(TOKENS), logits)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused(model, edits):
    with pytest.raises(ValueError, match=r"tokens must have shape \[n, pos\] .* got \[6\]"):
        loss_added(model, TOKENS[0], edits)
    with pytest.raises(ValueError, match=r"pos at least 2, got \[3, 1\]"):
        loss_added(model, TOKENS[:, :1], edits)
    with pytest.raises(TypeError, match="tokens must be a tensor of token numbers, got str"):
        loss_added(model, "Once upon a time", edits)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        loss_added(model, TOKENS, edits, confidence=95)
    with pytest.raises(ValueError, match="batch_size must be a number of sequences"):
        loss_added(model, TOKENS, edits, batch_size=0)


def test_intervals_are_along_the_last_dimension_whatever_stands_before():
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mean_interval(values, 0.9)
    assert found.shape == (2, 3, 2)
    for i in range(2):
        for j in range(3):
            one = values[i, j].numpy()
            ends = stats.t.interval(0.9, 4, loc=one.mean(), scale=stats.sem(one))
            assert_close(found[i, j].tolist(), list(ends), **EXACT)
            assert_close(mean_interval(values[i, j], 0.9), found[i, j])
