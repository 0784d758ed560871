"""Tokens as text, names of features, and one run of the model for several analyses."""

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from tests.features.building import N_OUT, model, sae
from tests.recipes.stories import make_stories
from tl_bilinear import Dictionary, FeatureInteractions, TopInteractions
from tl_bilinear.features.text import label, pieces
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
    known = FeatureInteractions(f.model, 1, f.inputs, f.outputs)
    counts = known.low_rank_correlation(tokens, 1, progress=False).counts
    found = known.examples(tokens, int(counts.argmax()), k=1)
    (text,) = found.to_pandas(word_pieces, window=100)["text"]
    place = int(found.positions[0])
    words = pieces(word_pieces, found.tokens[0].tolist())
    assert f"[[{words[place].strip()}]]" in text
    assert text.replace("[[", "").replace("]]", "") == "".join(words).strip()


def test_names():
    assert label(None, [], []) == "never active"
    assert label(None, [7, 7, 3], [1, 2, 3]) == "7"
    assert label(None, [7, 7, 3], [1, 1, 3]) == "(1) 7"
    assert label(None, [7, 7], [None, None]) == "7"  # where a row begins nothing stands before
    assert label(None, [7, 8, 9, 9, 6], [1, 1, 1, 1, 1]) == "9 | 7 | 8"


@pytest.mark.parametrize("side", ["input", "output"])
def test_labels_are_those_of_the_strongest_tokens(f, tokens, side):
    k = 5
    found = f.labels(tokens, k, side=side, skip=2, batch=3)
    _, cache = f.model.run_with_cache(tokens)
    dictionary = f.inputs if side == "input" else f.outputs
    z = dictionary.sae.encode(cache[dictionary.hook]).detach()
    assert len(found) == dictionary.n
    alone = 0
    for feature, name in enumerate(found):
        strengths = [
            (float(z[row, place, feature]), int(tokens[row, place]), int(tokens[row, place - 1]))
            for row in range(7)
            for place in range(2, 12)
            if z[row, place, feature] > 0
        ]
        strongest = sorted(strengths, reverse=True)[:k]
        if not strongest:
            assert name == "never active"
            continue
        (most, times), *others = Counter(token for _, token, _ in strongest).most_common()
        if times < len(strongest) / 2:
            assert sorted(name.split(" | ")[:1]) == [str(most)]
            assert len(name.split(" | ")) == min(3, 1 + len(others))
        else:
            assert name.split(" ")[-1] == str(most)
            before = [b for _, token, b in strongest if token == most]
            twice = [b for b in set(before) if before.count(b) >= len(strongest) / 2]
            assert name == (f"({twice[0]}) {most}" if len(twice) == 1 else name)
            assert bool(twice) == name.startswith("(")
            alone += 1
    assert 0 < alone < len(found)


def test_labels_go_into_every_table(f, tokens):
    names = [f"name {i}" for i in range(f.inputs.n)]
    named = Dictionary.of(f.inputs, labels=names)
    assert f.inputs.labels is None
    again = FeatureInteractions(f.model, 1, named, f.outputs)
    feature = int(f.low_rank_correlation(tokens, 1, progress=False).counts.argmax())
    active = again.active_interactions(tokens, feature)
    for table in (
        active.to_pandas(names),
        again.verify_pairs(tokens, feature, active.top(2, kind="cross")).to_pandas(names),
    ):
        assert list(table["label_b"]) == [f"name {b}" for b in table["b"]]
        assert list(table["label_c"]) == [f"name {c}" for c in table["c"]]
    assert "label_b" not in active.to_pandas()


def test_pairs_of_a_kind(f, tokens):
    feature = int(f.low_rank_correlation(tokens, 1, progress=False).counts.argmax())
    active = f.active_interactions(tokens, feature)
    own = active.rows == active.columns
    for kind, chosen in (("self", own), ("cross", ~own), ("all", own | ~own)):
        found = active.top(2, kind=kind)
        assert torch.equal(found.rows, active.rows[chosen][:2])
        assert torch.equal(found.means, active.means[chosen][:2])
        assert (found.tokens, found.preactivation) == (active.tokens, active.preactivation)
    with pytest.raises(ValueError, match="the pairs held"):
        active.top(int(own.sum()) + 1, kind="self")
    with pytest.raises(ValueError, match="kind must be 'all', 'self' or 'cross', got 'both'"):
        active.top(1, kind="both")


def test_one_run_serves_every_analysis(f, tokens, monkeypatch):
    feature = int(f.low_rank_correlation(tokens, 1, progress=False).counts.argmax())
    pairs = f.active_interactions(tokens, feature).top(2, kind="cross")
    run = f.run(tokens, batch=3)
    assert len(run) == 7
    assert torch.equal(run.tokens, tokens)

    def all_of(text, one):
        return {
            "correlation": f.low_rank_correlation(text, 2, progress=False).active,
            "scatter": f.scatter(text, feature).approximation,
            "active": f.active_interactions(text, feature).means,
            "examples": f.examples(text, feature).strengths,
            "labels": f.labels(text),
            "mean": f.mean_input(text),
            "attribution": f.attribute(one, feature, 5).quadratic,
        }

    expected = all_of(tokens, tokens[3])
    measured = f.verify_pairs(tokens, feature, pairs)

    def unexpected(*args, **kwargs):
        raise AssertionError("the model ran again")

    with monkeypatch.context() as patch:
        patch.setattr(f.model, "run_with_cache", unexpected)
        found = all_of(run, run[3])
    for name, value in found.items():
        assert_close(value, expected[name], rtol=0, atol=1e-12, equal_nan=True, msg=name) if (
            isinstance(value, torch.Tensor)
        ) else None
    assert found["labels"] == expected["labels"]
    assert_close(f.verify_pairs(run, feature, pairs).measured, measured.measured)
    assert torch.equal(run[-2:].x, run.x[5:])
    assert torch.equal(run[-1].x, run.x[6:])
    assert [len(one) for one in run] == 7 * [1]
    with pytest.raises(IndexError, match="sequence 7 of a run of 7"):
        run[7]
    assert torch.equal(run[torch.tensor([4, 1]), :5].output_scale, run.output_scale[[4, 1], :5])


def test_a_run_at_other_hooks_is_refused(f, tokens):
    run = f.run(tokens)
    other = FeatureInteractions(f.model, 1, sae(f"{LAYER}.mlp.hook_in", dtype="float64"), f.outputs)
    with pytest.raises(
        ValueError, match=r"holds activations at blocks.1.hook_resid_mid.*asked for"
    ):
        other.examples(run, 0)
    normalised = FeatureInteractions(
        f.model, 1, f.inputs,
        sae(f"{LAYER}.hook_mlp_out", n=N_OUT, dtype="float64", normalize_activations="layer_norm"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="layer_norm of"):
        normalised.low_rank_correlation(run, 1, progress=False)


def test_checks_of_pairs_run_the_sequences_met_only(f, tokens, monkeypatch):
    feature = int(f.low_rank_correlation(tokens, 1, progress=False).counts.argmax())
    pairs = f.active_interactions(tokens, feature).top(1, kind="cross")
    run = f.run(tokens)
    seen = []
    forward = f.model.run_with_hooks
    monkeypatch.setattr(
        f.model, "run_with_hooks", lambda t, **given: (seen.append(t), forward(t, **given))[1]
    )
    z = f.inputs.sae.encode(run.activations)
    both = (z[..., int(pairs.rows[0])] != 0) & (z[..., int(pairs.columns[0])] != 0)
    found = f.verify_pairs(run, feature, pairs, limit=1)
    row, place = both.nonzero()[0].tolist()
    assert len(seen) == 8  # four runs of the pair, four of the control
    assert all(torch.equal(t, tokens[row : row + 1, : place + 1]) for t in seen)
    assert found.tokens.tolist() == [1]
    assert found.difference < 1e-10
    by_hand = TopInteractions(pairs.rows, pairs.columns, pairs.means)
    assert_close(f.verify_pairs(run, feature, by_hand, limit=1).predicted, found.predicted)
