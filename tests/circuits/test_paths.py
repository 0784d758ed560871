"""Pairs of upstream components: exact for every kind of model, and equal to path patching."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.circuits.building import DIRECTION, TOKENS, D, model
from tl_bilinear import BilinearTensor
from tl_bilinear.circuits import PathCheck, Paths, check_paths, paths
from tl_bilinear.models import HookedBilinearTransformer

NORMS = ["RMS", "RMSPre", "LN", "LNPre", None]
KINDS = [
    {},
    {"positional_embedding_type": "rotary"},
    {"positional_embedding_type": "shortformer"},
    {"positional_embedding_type": "rotary", "n_key_value_heads": 2, "d_head": 4},
    {"parallel_attn_mlp": True},
    {"bilinear_bias": False},
    {"attention_dir": "bidirectional"},
]
PRECISE = {torch.float64: 1e-10, torch.float32: 1e-5}


def measure(built, tokens, layer, position):
    _, cache = built.run_with_cache(tokens)
    return float(cache[f"blocks.{layer}.mlp.hook_out"][0, position].double() @ DIRECTION)


def check(built, tolerance, layer=2, position=4, **options):
    found = paths(built, TOKENS, layer, DIRECTION, position, **options)
    measured = measure(built, TOKENS, layer, position)
    assert found.measured == pytest.approx(measured, rel=1e-12)
    assert abs(found.total - measured) <= tolerance * max(abs(measured), 1e-2)
    assert sum(found.terms().values()) == pytest.approx(found.total, rel=1e-9, abs=1e-9)
    assert found.error <= tolerance
    assert_close(found.quadratic, found.quadratic.T)
    return found


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_contributions_sum_to_the_output(norm, fields, dtype):
    built = model(dtype=dtype, normalization_type=norm, **fields)
    found = check(built, PRECISE[dtype])
    learned = fields.get("positional_embedding_type", "standard") == "standard"
    assert ("position" in found.kinds) == learned
    assert ("b_out" in found.constants) == fields.get("bilinear_bias", True)
    assert "attention bias" in found.kinds
    patched = check_paths(built, TOKENS, found, 5)
    assert patched.difference <= (1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_folded_models(norm):
    # Processing rounds in float32, once: the folded model is its own truth.
    check(model(folded=True, normalization_type=norm), 1e-10)
    check(model(folded=True, normalization_type=norm, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("by", ["sources", "heads", "layers"])
def test_every_place_and_grouping(layer, position, by):
    layer %= 3
    built = model()
    found = check(built, 1e-10, layer, position, by=by)
    assert (found.layer, found.position, found.by) == (layer, position % 6, by)
    heads = [
        place
        for place, kind in zip(found.where.tolist(), found.kinds, strict=True)
        if kind == "head"
    ]
    length, layers = found.position + 1, layer + 1
    assert len(heads) == {"sources": 2 * length, "heads": 2, "layers": 1}[by] * layers
    assert found.kinds.count("mlp") == layer
    assert len(set(found.labels)) == len(found.labels)
    every = range(len(found.labels))
    assert check_paths(built, TOKENS, found, [[i] for i in every]).difference < 1e-10


def test_components_are_those_of_the_definition():
    """Written out for one head, source and layer, from the weights and the cache."""
    built = model(normalization_type="LN")
    found = paths(built, TOKENS, 2, DIRECTION, 4)
    _, cache = built.run_with_cache(TOKENS)
    by_place = {
        (kind, *place): found.vectors[i]
        for i, (kind, place) in enumerate(zip(found.kinds, found.where.tolist(), strict=True))
    }
    assert_close(by_place["embed", -1, -1, -1], built.W_E[TOKENS[4]])
    assert_close(by_place["position", -1, -1, -1], built.W_pos[4])
    for layer, head, source in itertools.product(range(3), range(2), range(5)):
        attention = built.blocks[layer].attn
        normalised = cache[f"blocks.{layer}.ln1.hook_normalized"][0, source]
        entering = normalised * built.blocks[layer].ln1.w + built.blocks[layer].ln1.b
        weight = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, 4, source]
        expected = weight * (entering @ attention.W_V[head] @ attention.W_O[head])
        assert_close(by_place["head", layer, head, source], expected)
    assert_close(by_place["mlp bias", 1, -1, -1], built.blocks[1].mlp.b_out)
    assert_close(found.vectors.sum(0), cache["blocks.2.hook_resid_mid"][0, 4])


def test_pairs_are_what_the_weights_say():
    built = model(normalization_type="LN")
    found = paths(built, TOKENS, 1, DIRECTION, 3)
    Q = torch.einsum("a,aij->ij", DIRECTION, BilinearTensor.from_model(built, 1).dense())
    centred = found.vectors - found.vectors.mean(1, keepdim=True)
    _, cache = built.run_with_cache(TOKENS)
    scale = cache["blocks.1.ln2.hook_scale"][0, 3]
    rows = centred * built.blocks[1].ln2.w / scale
    assert_close(found.quadratic, rows @ Q @ rows.T, rtol=1e-10, atol=1e-10)
    assert found.scale == pytest.approx(float(scale))


def test_a_pair_is_the_second_difference_of_patching():
    built = model(normalization_type="LN", positional_embedding_type="rotary")
    found = paths(built, TOKENS, 2, DIRECTION)
    top = found.strongest(len(found.labels))
    pairs = [
        (i, j) for i, j in zip(top.first.tolist(), top.second.tolist(), strict=True) if i != j
    ][:6]
    for i, j in pairs:
        alone, other, both = check_paths(built, TOKENS, found, [[i], [j], [i, j]]).measured
        assert float(both - alone - other) == pytest.approx(
            2 * float(found.quadratic[i, j]), rel=1e-8
        )


def test_effects_of_single_components():
    found = paths(model(), TOKENS, 2, DIRECTION)

    def without(taken):
        """From the sum over all pairs of what is left."""
        kept = [i for i in range(len(found.labels)) if i not in taken]
        rest = found.quadratic[kept][:, kept].sum() + found.linear[kept].sum()
        return float(rest) + sum(found.constants.values())

    for taken in ([], [3], [7, 2, 7], range(len(found.labels))):
        assert found.without(taken) == pytest.approx(without(taken), abs=1e-9)
        assert found.effect(taken) == pytest.approx(without(taken) - without([]), abs=1e-9)
    expected = torch.tensor(
        [found.effect([i]) for i in range(len(found.labels))], dtype=torch.float64
    )
    assert_close(found.effects, expected, rtol=1e-9, atol=1e-9)
    strongest = check_paths(model(), TOKENS, found, 4).removed
    assert strongest == [[i] for i in expected.abs().topk(4).indices.tolist()]


def test_a_batch_is_refused_before_any_work(monkeypatch):
    built = model()
    found = paths(built, TOKENS, 1, DIRECTION)

    def unexpected(*args, **kwargs):
        raise AssertionError("work was done")

    for name in ("effect", "effects"):
        monkeypatch.setattr(Paths, name, property(unexpected))
    monkeypatch.setattr(BilinearTensor, "from_model", unexpected)
    for ask in (
        lambda: check_paths(built, TOKENS.expand(2, -1), found),
        lambda: paths(built, TOKENS.expand(2, -1), 1, DIRECTION),
    ):
        with pytest.raises(ValueError, match="paths are of one sequence, got a batch of 2"):
            ask()


def test_patching_knows_another_path():
    """The check fails where it should: for the paths of another direction. Another prompt is refused."""
    built = model()
    found = paths(built, TOKENS, 2, DIRECTION)
    wrong = Paths(**{**vars(found), "direction": DIRECTION.flip(0)})
    assert check_paths(built, TOKENS, wrong, 3).difference > 0.1
    moved = Paths(**{**vars(found), "tokens": TOKENS.flip(0)})
    assert check_paths(built, TOKENS.flip(0), moved, 3).difference > 0.1
    with pytest.raises(ValueError, match=r"these paths are of the tokens .* give the same"):
        check_paths(built, TOKENS.flip(0), found, 3)


def test_shares_top_and_text(tmp_path):
    found = paths(model(), TOKENS, 1, DIRECTION, 2)
    assert float(found.shares.sum()) + sum(found.constants.values()) == pytest.approx(found.total)
    table = found.to_pandas()
    n = len(found.labels)
    assert len(table) == n * (n + 1) // 2
    assert table["contribution"].abs().is_monotonic_decreasing
    assert table["contribution"].sum() == pytest.approx(float(found.quadratic.sum()))
    first = table.iloc[0]
    entry = float(found.quadratic[first["first"], first["second"]])
    assert first["contribution"] == pytest.approx(entry * (1 if first["kind"] == "self" else 2))
    assert first["label_first"] == found.labels[first["first"]]
    lines = found.text(3).splitlines()
    assert lines[0].startswith("layer 1 at position 2: ")
    assert lines[4] == "by kind:"
    assert "head 0.1 from 2 4" in found.labels  # without a tokenizer a token is its number
    named = paths(model(), TOKENS, 1, DIRECTION, 2, words=list("abcdef"))
    assert "head 0.1 from 2 c" in named.labels
    found.save(tmp_path / "paths")
    loaded = Paths.load(tmp_path / "paths")
    assert loaded.terms() == found.terms()
    assert loaded.labels == found.labels
    patched = check_paths(model(), TOKENS, found, 2)
    patched.save(tmp_path / "check")
    assert PathCheck.load(tmp_path / "check").to_pandas().equals(patched.to_pandas())


def test_bad_requests(unchecked):
    built = model()
    with pytest.raises(ValueError, match="paths are of one sequence, got a batch of 2"):
        paths(built, TOKENS.expand(2, -1), 1, DIRECTION)
    with pytest.raises(ValueError, match=r"tokens must be ids \[pos\] or \[1, pos\], or text"):
        paths(built, torch.zeros(3), 1, DIRECTION)
    with pytest.raises(IndexError, match="position 6 does not exist: the prompt has 6 tokens"):
        paths(built, TOKENS, 1, DIRECTION, 6)
    with pytest.raises(IndexError, match="layer 3"):
        paths(built, TOKENS, 3, DIRECTION)
    with pytest.raises(ValueError, match=r"direction must have shape \[\.\.\., 16\]"):
        paths(built, TOKENS, 1, torch.zeros(D + 1))
    with pytest.raises(ValueError, match=r"direction must be one vector \[16\] .*, got \[2, 16\]"):
        paths(built, TOKENS, 1, DIRECTION.expand(2, -1))
    with pytest.raises(ValueError, match="by must be one of 'sources', 'heads', 'layers', got 'x'"):
        paths(built, TOKENS, 1, DIRECTION, by="x")
    with pytest.raises(ValueError, match="2 words for 6 tokens"):
        paths(built, TOKENS, 1, DIRECTION, words=["a", "b"])
    with pytest.raises(MemoryError, match="sum over sources with by='heads'"):
        paths(built, TOKENS, 2, DIRECTION, max_bytes=100)
    with pytest.raises(ValueError, match="between 1 and"):
        paths(built, TOKENS, 0, DIRECTION).strongest(0)


def test_a_residual_stream_that_is_no_sum_is_refused():
    from tests.models.building import config, randomise

    built = randomise(
        HookedBilinearTransformer(config(use_normalization_before_and_after=True, n_layers=2))
    )
    with pytest.raises(ValueError, match="is not the sum of embedding, attention and MLPs"):
        paths(built, TOKENS, 1, DIRECTION)


def test_attached_saes_are_refused():
    from sae_lens import HookedSAETransformer

    from tests.features.building import sae
    from tests.models.building import config

    built = HookedSAETransformer.from_config(config(), bilinear=True)
    built.add_sae(sae("blocks.0.hook_mlp_out"))
    with pytest.raises(
        ValueError, match=r"SAEs are attached to the model at blocks\.0\.hook_mlp_out"
    ):
        paths(built, TOKENS, 1, DIRECTION)


def test_16_bit_models():
    built = model(dtype=torch.bfloat16)
    found = paths(built, TOKENS, 2, DIRECTION, 4)
    assert found.quadratic.dtype == torch.float64
    assert found.error < 0.05  # what the model's own arithmetic leaves
