"""Tokens as text, names of features, and one run of the model for several analyses."""

import copy
import math
import re
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from tests.features.building import N_OUT, model, sae
from tests.recipes.stories import make_stories
from tl_bilinear import FeatureInteractions, plots
from tl_bilinear.features import ActiveInteractions, FeatureSweep, verification
from tl_bilinear.features.labels import (
    NEVER,
    NOTHING,
    distinguishing,
    label,
    name_features,
    pieces,
)
from tl_bilinear.recipes.language import train_tokenizer

LAYER = "blocks.1"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 23, (7, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def f():
    read = sae(f"{LAYER}.hook_resid_mid", dtype="float64")
    written = sae(f"{LAYER}.hook_mlp_out", n=N_OUT, seed=1, dtype="float64")
    return FeatureInteractions(model(), 1, read, written)


@pytest.fixture(scope="module")
def word_pieces():
    return train_tokenizer(make_stories(200), 120)


@pytest.fixture(scope="module")
def bytes_of_gpt2():
    """A byte-level BPE as GPT-2's: its tokens bring their spaces with them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(make_stories(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", ["word_pieces", "bytes_of_gpt2"])
def test_pieces_joined_are_the_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = 'lily wasn\'t happy. "look, unhappily!" said tom, 12 times.'
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) > len(text.split())
    assert "".join(found).strip() == tokenizer.decode(ids)
    assert [piece.strip() for piece in found if piece.startswith(" ")]  # spaces are kept
    assert [piece for piece in found[1:] if not piece.startswith(" ")]  # and none invented


def test_examples_read_as_text(f, tokens, word_pieces):
    known = FeatureInteractions(f.model, 1, f.inputs, f.outputs).run(tokens)
    counts = known.low_rank_correlation(1, progress=False).counts
    found = known.examples(int(counts.argmax()), k=1)
    (text,) = found.to_pandas(word_pieces, window=100)["text"]
    place = int(found.positions[0])
    words = pieces(word_pieces, found.tokens[0].tolist())
    assert f"[[{words[place].strip()}]]" in text
    assert text.replace("[[", "").replace("]]", "") == "".join(words).strip()


def test_names():
    assert label(None, [], []) == NEVER == "never active on this text"
    assert label(None, [7], [1]) == "(1) 7 (seen once)"
    assert label(None, [7, 8], [1, 1]) == "7 | 8 (seen twice)"
    assert label(None, [7, 7, 3], [1, 2, 3]) == "7 (seen 3 times)"
    assert label(None, [7, 7, 3] * 4, [1, 1, 3] * 4) == "(1) 7"
    # Where a row begins nothing stands before.
    assert label(None, [7] * 12, [None] * 12) == "7"
    assert label(None, [7, 8, 9, 9, 6] * 2, [1, 2, 3, 4, 5] * 2, base={9: 0.01}) != "9 | 7 | 8"
    assert label(None, [9] * 4 + [7] * 3 + [8] * 3, [1] * 10) == "9 | 7 | 8"


def test_a_token_that_is_everywhere_names_nothing():
    """The same places in two texts: in one, token 7 is rare, in the other it is everywhere."""
    places = [7] * 6 + [8] * 4
    assert label(None, places, [None] * 10, base={7: 0.02, 8: 0.001}) == "8 | 7"
    assert label(None, places, [None] * 10, base={7: 0.6, 8: 0.001}) == "8"
    assert label(None, [7] * 10, [None] * 10, base={7: 0.9}) == NOTHING
    # What stands before distinguishes only if it is not everywhere either.
    assert label(None, [5] * 10, [7] * 10, base={5: 0.001, 7: 0.9}) == "5"
    assert label(None, [5] * 10, [7] * 10, base={5: 0.001, 7: 0.1}) == "(7) 5"


def test_a_common_token_is_told_by_what_stands_further_in_front():
    near = [{3, i + 20} for i in range(10)]
    rates = {7: 0.1, 3: 0.01}
    assert label(None, [7] * 10, [None] * 10, near, rates) == "7 after 3"
    assert label(None, [7] * 10, [None] * 10, near, rates | {3: 0.09}) == "7"
    assert label(None, [7] * 10, [None] * 10, near, rates | {7: 0.001}) == "7"
    assert label(None, [*range(30, 40)], [None] * 10, near, rates) == "anything after 3"


def test_a_common_token_is_told_by_the_few_that_stand_before_it():
    near = [{3, i + 20} for i in range(10)]
    rates = {7: 0.1, 3: 0.01, 4: 0.01, 5: 0.01}
    before = [4] * 3 + [5] * 3 + [6, 8, 9, 10]
    assert label(None, [7] * 10, before, near, rates) == "(4 | 5) 7"
    # Not where they make less than half, are everywhere too, or the token says enough by itself.
    assert label(None, [7] * 10, [4, 4, 5, 5, *range(40, 46)], near, rates) == "7 after 3"
    assert label(None, [7] * 10, before, near, rates | {4: 0.4, 5: 0.4}) == "7 after 3"
    assert label(None, [7] * 10, before, near, rates | {7: 0.001}) == "7"
    assert label(None, [7] * 6, [4, 4, 4, 5, 5, 5], near[:6], rates) == "(4) 7 (seen 6 times)"


def test_special_tokens_name_nothing_unless_they_are_all_there_is():
    special = {1, 2}
    near = [{1, 2, i + 20} for i in range(10)]
    rates = {7: 0.1, 1: 0.001, 2: 0.001}
    assert label(None, [7] * 10, [None] * 10, near, rates) == "7 after 1 2"
    assert label(None, [7] * 10, [None] * 10, near, rates, special) == "7"
    assert label(None, [5] * 10, [1] * 10, base={5: 0.001}, special=special) == "5"
    assert label(None, [1] * 6 + [5] * 4, [None] * 10, special=special) == "5"
    assert label(None, [1] * 9 + [5], [None] * 10, special=special) == NOTHING
    assert label(None, [1, 5], [None] * 2, special=special) == "5 (seen twice)"
    assert label(None, [1] * 6 + [2] * 4, [2] * 10, special=special) == "(2) 1"


def test_the_tokenizers_special_tokens_are_left_out():
    class Tokenizer:
        all_special_ids = (1,)

        def decode(self, ids):
            return str(ids[0])

    tokens = torch.tensor([[1, 5, 1, 6, 1, 5]])
    z = torch.ones(1, 6, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    (name,) = name_features(Tokenizer(), tokens, iter([z]), 6, mask)
    assert name == "5 | 6 (seen 6 times)"


def test_what_distinguishes_is_ordered_by_how_much_it_tells():
    """By hand, with the prior: p = (count + 10 q) / (of + 10)."""
    base = {1: 0.1, 2: 0.001}
    seen = Counter({1: 8, 2: 4, 3: 1})

    def score(count, q):
        p = (count + 10 * q) / 30
        return p * math.log(p / q)

    assert score(4, 0.001) > score(8, 0.1)
    assert distinguishing(seen, 20, base, least=0, lift=2) == [2, 1]
    assert distinguishing(seen, 20, base, least=0.3, lift=2) == [1]
    assert distinguishing(seen, 20, base, least=0, lift=5) == [2]


@pytest.mark.parametrize("side", ["input", "output"])
def test_labels_are_those_of_the_strongest_tokens(f, tokens, side):
    k = 5
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :2] = False
    found = f.run(tokens, mask=mask, batch_size=3).labels(side, k=k)
    _, cache = f.model.run_with_cache(tokens)
    dictionary = f.inputs if side == "input" else f.outputs
    z = dictionary.sae.encode(cache[dictionary.hook]).detach()
    counted = Counter(tokens[mask].tolist())
    base = {token: count / int(mask.sum()) for token, count in counted.items()}
    assert len(found) == dictionary.n
    for feature, name in enumerate(found):
        strengths = [
            (float(z[row, place, feature]), row, place)
            for row in range(7)
            for place in range(2, 12)
            if z[row, place, feature] > 0
        ]
        strongest = [(row, place) for _, row, place in sorted(strengths, reverse=True)[:k]]
        expected = label(
            None,
            [int(tokens[at]) for at in strongest],
            [int(tokens[row, place - 1]) for row, place in strongest],
            [set(tokens[row, max(0, place - 9) : place - 1].tolist()) for row, place in strongest],
            base,
        )
        if side == "output" and expected != NEVER:
            promoted = f.promoted(feature, 2).words[:2]
            expected = f"{expected} -> {' '.join(promoted)}"
        assert name == expected


@pytest.fixture(scope="module")
def run(f, tokens):
    return f.run(tokens, batch_size=3, progress=False)


@pytest.fixture(scope="module")
def busy(run):
    """The output feature that is active most often."""
    return int(run.low_rank_correlation(1, progress=False).counts.argmax())


def test_labels_go_into_every_table(f, run, busy, tmp_path):
    names = [f"name {i}" for i in range(f.inputs.n)]
    made = [f"made {i}" for i in range(f.outputs.n)]
    known = f.with_labels(input=names, output=made)
    assert f.inputs.labels is None
    again = known.run(run.tokens)
    active = again.active_interactions(busy)
    tables = [
        known.top([busy, 3], 4).to_pandas(),
        known.top([busy, 3], 4).top(2).to_pandas(),
        known.top_overall(5).to_pandas(),
        known.sweep(k=1, progress=False).to_pandas(),
        known.sweep(k=1, progress=False).top(3).to_pandas(),
        active.to_pandas(),
        active.top(1).to_pandas(),
        again.verify_pairs(busy, active.top(2, kind="cross")).to_pandas(),
    ]
    for table in tables:
        assert list(table["label_first"]) == [f"name {b}" for b in table["first"]]
        assert list(table["label_second"]) == [f"name {c}" for c in table["second"]]
    tables = [*tables[:5], known.statistics(busy).to_pandas()]
    tables.append(again.low_rank_correlation(1, [busy, 2]).to_pandas())
    for table in tables:
        assert list(table["label"]) == [f"made {a}" for a in table["feature"]]
    assert list(tables[3]["label_opposite"]) == [f"made {a}" for a in tables[3]["opposite"]]
    for table in (run.active_interactions(busy).to_pandas(), f.top(busy).to_pandas()):
        assert "label_first" not in table
    attribution = again.attribute(busy)
    assert attribution.text().startswith(f"feature {busy} made {busy} at position 11: ")
    assert set(attribution.input_labels) == set(attribution.features.tolist())
    for figure in (
        plots.submatrix_figure(known.submatrix(busy)),
        plots.statistics_figure(known.statistics(busy)),
        plots.geometry_figure(known.geometry(busy)),
        plots.scatter_figure(again.scatter(busy)),
    ):
        assert figure.layout.title.text == f"output feature {busy} made {busy}"
    active.save(tmp_path / "active")
    assert ActiveInteractions.load(tmp_path / "active").to_pandas().equals(active.to_pandas())
    known.sweep(k=1, progress=False).save(tmp_path / "sweep")
    assert FeatureSweep.load(tmp_path / "sweep").output_labels[busy] == f"made {busy}"


def test_a_run_names_what_has_no_name(f, run, tokens):
    named = run.labelled(k=5)
    assert named.features.inputs.labels == run.labels("input", k=5)
    assert named.features.outputs.labels == run.labels("output", k=5)
    assert f.inputs.labels is None
    mine = f.with_labels(output=["mine"] * f.outputs.n).run(tokens).labelled()
    assert set(mine.features.outputs.labels) == {"mine"}
    assert named.examples(3).output_name(3) == f"3 {named.features.outputs.labels[3]}"
    assert named.examples(3, side="input").input_labels == {3: named.features.inputs.labels[3]}
    rows = FeatureInteractions(f.model, 1, torch.eye(16).double(), torch.eye(16).double())
    directions = rows.run(tokens).labelled().features
    assert directions.inputs.labels is None  # directions that nothing is active along
    assert len(directions.outputs.labels) == 16


def test_pairs_of_a_kind(run, busy, unchecked):
    active = run.active_interactions(busy)
    own = active.first == active.second
    for kind, chosen in (("self", own), ("cross", ~own), ("all", own | ~own)):
        found = active.top(2, kind=kind)
        assert torch.equal(found.first, active.first[chosen][:2])
        assert torch.equal(found.means, active.means[chosen][:2])
        assert (found.tokens, found.preactivation) == (active.tokens, active.preactivation)
    with pytest.raises(ValueError, match="the pairs held"):
        active.top(int(own.sum()) + 1, kind="self")
    with pytest.raises(ValueError, match="kind must be 'all', 'self' or 'cross', got 'both'"):
        active.top(1, kind="both")


def test_one_run_serves_every_analysis(f, tokens, run, busy, monkeypatch):
    """In whatever batches the model runs, and without running again."""
    pairs = run.active_interactions(busy).top(2, kind="cross")
    assert len(run) == 7
    assert torch.equal(run.tokens, tokens)
    assert repr(run).startswith(
        "FeatureRun(7 x 12 tokens, 77 of which count, 0 MB, of FeatureInter"
    )
    assert run.nbytes == 7 * 12 * (3 * 16 + 2) * 8

    def all_of(run):
        return {
            "correlation": run.low_rank_correlation(2, progress=False).active,
            "scatter": run.scatter(busy).approximation,
            "active": run.active_interactions(busy).means,
            "examples": run.examples(busy).strengths,
            "labels": run.labels(),
            "mean": run.mean_input(),
            "attribution": run.attribute(busy, 5, sequence=3).quadratic,
        }

    whole = f.run(tokens)
    expected = all_of(whole)
    measured = whole.verify_pairs(busy, pairs)

    def unexpected(*args, **kwargs):
        raise AssertionError("the model ran again")

    with monkeypatch.context() as patch:
        patch.setattr(f.model, "run_with_cache", unexpected)
        found = all_of(run)
    for name, value in found.items():
        assert_close(value, expected[name], rtol=0, atol=1e-12, equal_nan=True, msg=name) if (
            isinstance(value, torch.Tensor)
        ) else None
    assert found["labels"] == expected["labels"]
    assert_close(run.verify_pairs(busy, pairs).measured, measured.measured)
    assert torch.equal(run[-2:].x, run.x[5:])
    assert torch.equal(run[-1].x, run.x[6:])
    assert [len(one) for one in run] == 7 * [1]
    with pytest.raises(IndexError, match="sequence 7 of a run of 7"):
        run[7]
    assert torch.equal(run[torch.tensor([4, 1]), :5].output_scale, run.output_scale[[4, 1], :5])
    assert run[2, :5].lengths.tolist() == [5]


def test_checks_of_pairs_run_the_tokens_met_only(f, tokens, busy, monkeypatch):
    run = f.run(tokens, mask=torch.ones_like(tokens, dtype=torch.bool))
    pairs = run.active_interactions(busy).top(1, kind="cross")
    seen = []
    forward = f.model.run_with_hooks
    monkeypatch.setattr(
        f.model, "run_with_hooks", lambda t, **given: (seen.append(t), forward(t, **given))[1]
    )
    z = f.inputs.sae.encode(run.hook_activations)
    both = (z[..., int(pairs.first[0])] != 0) & (z[..., int(pairs.second[0])] != 0)
    found = run.verify_pairs(busy, pairs, limit=1)
    row, place = both.nonzero()[0].tolist()
    (given,) = seen  # four runs of the pair and four of the control, at once
    assert given.shape == (8, 1, f.model.cfg.d_model)
    assert torch.equal(given[0, 0], run.hook_activations[row, place])
    assert found.tokens.tolist() == [1]
    assert found.difference < 1e-10
    # A model that cannot begin at a block runs the sequences met, once for each of them.
    monkeypatch.setattr(verification, "starts_at_blocks", lambda model: False)
    seen.clear()
    whole = run.verify_pairs(busy, pairs, limit=1)
    assert len(seen) == 8
    assert all(torch.equal(t, tokens[row : row + 1, : place + 1]) for t in seen)
    for name in ("measured", "control", "predicted"):
        assert_close(getattr(whole, name), getattr(found, name), rtol=0, atol=1e-10)
    for by_hand in (
        torch.stack([pairs.first, pairs.second], 1),
        [(int(pairs.first[0]), int(pairs.second[0]))],
    ):
        assert_close(run.verify_pairs(busy, by_hand, limit=1).predicted, found.predicted)


# ---------------------------------------------------------------------- which tokens count


class Letters:
    """A tokenizer of letters: [BOS] is 0, [PAD] 1, [EOS] 2."""

    bos_token_id, pad_token_id, padding_side = 0, 1, "right"
    all_special_ids = (0, 1, 2)

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 3) if i > 2 else "." for i in ids)


@pytest.fixture(scope="module")
def reading(f):
    def to_tokens(text, prepend_bos=True):
        ids = [ord(letter) - ord("a") + 3 for letter in text]
        return torch.tensor([[0] * prepend_bos + ids])

    built = copy.copy(f.model)
    built.tokenizer, built.to_tokens = Letters(), to_tokens
    return FeatureInteractions(built, 1, f.inputs, f.outputs)


def test_padding_is_not_read(f, reading):
    both = reading.run(["abc", "hello"])
    assert both.tokens.tolist() == [[0, 3, 4, 5, 1, 1], [0, 10, 7, 14, 14, 17]]
    assert both.mask.sum(1).tolist() == [3, 5]
    assert both.lengths.tolist() == [4, 6]
    short = reading.run("abc")
    assert_close(both.attribute(3).quadratic, short.attribute(3).quadratic)
    assert both.attribute(3).position == 3
    with pytest.raises(IndexError, match="position 4 does not exist: the prompt has 4 tokens"):
        both.attribute(3, 4)
    strengths = both.activations([3], side="input")[..., 0]
    best = (strengths * both.mask).amax(1).sort(descending=True).values
    assert_close(both.examples(3, side="input").values, best[best > 0])
    ids = reading.run(both.tokens)  # padded by somebody else
    assert torch.equal(ids.mask, both.mask)


def test_special_tokens_are_not_read(f, reading):
    packed = torch.tensor([[0, 5, 6, 2, 0, 7, 8, 9], [3, 0, 5, 2, 6, 1, 1, 1]])
    assert reading.run(packed).mask.int().tolist() == [
        [0, 1, 1, 1, 0, 1, 1, 1],
        [0, 0, 1, 1, 1, 0, 0, 0],
    ]
    left_out = sae(f"{LAYER}.hook_resid_mid", dtype="float64")
    for given, skipped in (([0, 2], {0, 2}), (True, {0, 1, 2}), (False, {0})):
        left_out.cfg.metadata.exclude_special_tokens = given
        known = FeatureInteractions(reading.model, 1, left_out, f.outputs)
        expected = [[place > 0 and t not in skipped for place, t in enumerate(packed[0].tolist())]]
        assert known.run(packed[:1]).mask.tolist() == expected
    without = FeatureInteractions(f.model, 1, f.inputs, f.outputs)  # no tokenizer to ask
    assert without.run(packed).mask[:, 1:].all()


def test_a_mask_of_ones_own_is_kept(f, busy, tokens, unchecked):
    mask = tokens == 5
    chosen = f.run(tokens, mask=mask)
    assert len(chosen.scatter(busy).measured) == int(mask.sum())
    assert chosen.low_rank_correlation(1).tokens == int(mask.sum())
    z = f.outputs.sae.encode(chosen.output)[..., busy] * mask
    assert_close(
        chosen.examples(busy, k=7).strengths.amax(1),
        z.amax(1).sort(descending=True)[0][: (z.amax(1) > 0).sum()],
    )
    # Where all that counts is token 5 it distinguishes nothing, unless it was seen too rarely to say.
    for name in chosen.labels("output"):
        said = name.partition(" -> ")[0]
        rare = re.fullmatch(r"(\(\d+\) )?5 \(seen (once|twice|\d times)\)", said)
        assert said in (NEVER, NOTHING) or said.startswith("anything after ") or rare
    for wrong in (mask[:, :4], mask.long()):
        with pytest.raises(ValueError, match=r"mask must be a boolean tensor of shape \[7, 12\]"):
            f.run(tokens, mask=wrong)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text(f, reading):
    for wrong in (7, ["a", 3], [], None):
        with pytest.raises(TypeError, match="text is a string, several strings, or token ids"):
            reading.run(wrong)
    with pytest.raises(ValueError, match="there are no tokens"):
        f.run(torch.empty(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="batch_size must lie between 1 and"):
        f.run(torch.zeros(1, 4, dtype=torch.long), batch_size=0)
