"""Attention scores as sums over pairs, against the scores that models have."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import HookedTransformer

from tests.circuits.building import DIRECTION, VOCABULARY
from tests.circuits.building import model as bilinear_model
from tests.features.building import sae
from tests.models.building import SIZES, randomise
from tl_bilinear import Dictionary, plots
from tl_bilinear.circuits import (
    AttentionInteractions,
    AttentionPairs,
    HeadDirections,
    OffsetProfile,
    PairsChance,
    ScoreAttribution,
    ScoreCheck,
    ScoreDifference,
    SelfScores,
    embedding,
    paths,
    through_head,
    why,
)
from tl_bilinear.models.heads import UnreadAttention

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
D = SIZES["d_model"]

KINDS = {
    "learned positions": {},
    "LayerNorm": {"normalization_type": "LN"},
    "folded LayerNorm": {"normalization_type": "LNPre"},
    "folded RMSNorm": {"normalization_type": "RMSPre"},
    "no norm": {"normalization_type": None},
    "rotary": {"positional_embedding_type": "rotary"},
    "rotary, adjacent": {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": True},
    "rotary, partial": {"positional_embedding_type": "rotary", "rotary_dim": 4},
    "rotary, another base": {"positional_embedding_type": "rotary", "rotary_base": 100},
    "rotary, stretched": {
        "positional_embedding_type": "rotary",
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": 8,
    },
    "rotary, YaRN": {
        "positional_embedding_type": "rotary",
        "use_yarn_rope": True,
        "yarn_factor": 4.0,
        "yarn_attention_factor": 1.2,
        "yarn_original_max_position_embeddings": 8,
    },
    "ALiBi": {"positional_embedding_type": "alibi"},
    "grouped queries": {"n_key_value_heads": 2, "n_heads": 4, "d_head": 4},
    "grouped queries, rotary": {
        "n_key_value_heads": 1,
        "n_heads": 4,
        "d_head": 4,
        "positional_embedding_type": "rotary",
    },
    "ungrouped": {
        "n_key_value_heads": 2,
        "n_heads": 4,
        "d_head": 4,
        "ungroup_grouped_query_attention": True,
    },
    "QK-norm": {"use_qk_norm": True},
    "QK-norm, rotary, grouped": {
        "use_qk_norm": True,
        "n_key_value_heads": 2,
        "n_heads": 4,
        "d_head": 4,
        "positional_embedding_type": "rotary",
    },
    "QK-norm of all heads (OLMo 2)": {
        "original_architecture": "Olmo2ForCausalLM",
        "positional_embedding_type": "rotary",
    },
    "another scale": {"attn_scale": 3.7},
    "no scale": {"use_attn_scale": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "soft cap": {"attn_scores_soft_cap": 0.8},
    "local": {"use_local_attn": True, "attn_types": ["local", "local"], "window_size": 3},
    "parallel": {"parallel_attn_mlp": True},
    "attention only": {"attn_only": True},
    "split inputs": {"use_split_qkv_input": True},
    "sinks": {"use_attention_sinks": True},
}


def model(dtype=torch.float64, seed=0, **fields):
    """A HookedTransformer of TransformerLens's own, not bilinear, every weight random."""
    from transformer_lens import HookedTransformerConfig

    fields = {"normalization_type": "RMS", "act_fn": "gelu", "n_heads": 2, **fields}
    fields = {**SIZES, "device": "cpu", "seed": seed, "dtype": dtype, **fields}
    built = randomise(HookedTransformer(HookedTransformerConfig(**fields)))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.rpartition(".")[2] in ("_b_K", "_b_V"):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape_as(parameter))
    return built.eval()


def dictionaries(dtype="float64"):
    here = "blocks.1.hook_resid_pre"
    return sae(here, dtype=dtype, d=D), sae(here, "jumprelu", seed=5, dtype=dtype, d=D)


def scores_of(built, layer=1):
    _, cache = built.run_with_cache(TOKENS[None])
    return cache[f"blocks.{layer}.attn.hook_attn_scores"][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_pairs_is_the_score(kind, dtype):
    """Every head and score of layer 1, with SAEs; and with embeddings along the direct path."""
    built = model(dtype, **KINDS[kind])
    close = (
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    query, key = dictionaries("float64" if dtype == torch.float64 else "float32")
    for head, other in ((0, embedding(built)), (built.cfg.n_heads - 1, key)):
        run = AttentionInteractions(built, 1, head, query, other).run(TOKENS)
        # After it: an earlier, longer run shifts all ALiBi scores of a query in TransformerLens.
        scores = scores_of(built)
        for i in range(len(TOKENS)):
            for j in range(i + 1):
                if not scores[head, i, j].isfinite():
                    continue
                found = run.score(i, j)
                assert_close(found.total, float(scores[head, i, j]), **close)
                assert math.isclose(found.sum, sum(found.terms().values()), abs_tol=1e-9)
    assert found.pairs.shape == (len(found.query_labels), len(found.key_labels))


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_at_an_offset_is_the_score(kind):
    """From weights alone, given the scales: f(r_i / s_i, r_j / s_j) at offset i - j."""
    built = model(**KINDS[kind])
    _, cache = built.run_with_cache(TOKENS[None])
    scores = cache["blocks.1.attn.hook_attn_scores"][0]
    x = cache["blocks.1.hook_resid_pre"][0]
    head = AttentionInteractions(built, 1, 1, torch.eye(D, dtype=torch.float64))
    if head.query_passage.scale_hook is not None:
        scale = cache["blocks.1.ln1.hook_scale"][0]
        x = x / (scale[:, 0] if kind == "split inputs" else scale)
    own = []
    for norm, name, index in (
        (head.reading.q_norm, "q", 1),
        (head.reading.k_norm, "k", head.reading.key_head),
    ):
        every = cache[f"blocks.1.attn.hook_{name}"][0]
        own.append(torch.ones(len(x)) if norm is None else norm.scale(every, index))
    for i, j in ((0, 0), (3, 1), (4, 4), (7, 5)):
        if not scores[1, i, j].isfinite():
            continue
        form = head.form(i - j, scales=(float(own[0][i]), float(own[1][j])))
        made = head.reading.capped(float(form(x[i], x[j])))
        if kind == "ALiBi":  # up to a constant of the query
            made += float(scores[1, i, i]) - float(head.form(0)(x[i], x[i]))
        assert_close(made, float(scores[1, i, j]), rtol=1e-9, atol=1e-9)


def test_every_hook_before_attention():
    """SAEs at the residual stream, its copies, after the norm, and upstream of it."""
    built = model(positional_embedding_type="rotary", normalization_type="LN")
    scores = scores_of(built)[0]
    hooks = [
        "blocks.1.hook_resid_pre",
        "blocks.1.ln1.hook_normalized",
        "blocks.1.hook_q_input",
        "blocks.1.attn.hook_q_input",
        "blocks.0.hook_resid_post",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_resid_mid",
        "hook_embed",
    ]
    for hook in hooks:
        for other in ("blocks.1.ln1.hook_normalized", "blocks.1.hook_resid_pre"):
            pair = sae(hook, dtype="float64"), sae(other, seed=3, dtype="float64")
            found = AttentionInteractions(built, 1, 0, *pair).run(TOKENS).score(6, 2)
            assert_close(found.total, float(scores[6, 2]), rtol=1e-10, atol=1e-10)
            assert "features x features" in found.terms()
    direct = AttentionInteractions(built, 1, 0, sae("blocks.0.hook_mlp_out", dtype="float64"))
    assert "everything else" in direct.run(TOKENS).score().query_labels
    with pytest.raises(
        ValueError, match=r"is at 'blocks\.1\.hook_mlp_out', which attention of layer 1"
    ):
        AttentionInteractions(built, 1, 0, sae("blocks.1.hook_mlp_out"))
    with pytest.raises(ValueError, match="does not write into the residual stream"):
        AttentionInteractions(built, 1, 0, sae("blocks.0.mlp.hook_pre"))


def test_a_bilinear_model_and_one_with_processed_weights():
    for built in (bilinear_model(), bilinear_model(folded=True)):
        scores = scores_of(built)
        run = AttentionInteractions(built, 1, 1, sae("blocks.1.hook_resid_pre")).run(TOKENS)
        assert_close(run.score(5, 2).total, float(scores[1, 5, 2]), rtol=1e-10, atol=1e-10)
    processed = model(normalization_type="LN")
    processed.process_weights_()
    run = AttentionInteractions(processed, 1, 1, sae("blocks.1.hook_resid_pre")).run(TOKENS)
    expected = scores_of(processed)[1, 5, 2]
    assert_close(run.score(5, 2).total, float(expected), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- from weights


@pytest.fixture(scope="module")
def rotary():
    """A head with rotary positions between two random dictionaries."""
    built = model(positional_embedding_type="rotary", normalization_type="LN", rotary_dim=4)
    names = [f"q{i}" for i in range(30)]
    here = "blocks.1.hook_resid_pre"
    generator = torch.Generator().manual_seed(1)
    D_q, D_k = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (30, 20))
    return built, AttentionInteractions(
        built, 1, 1, Dictionary(D_q, hook=here, labels=names), Dictionary(D_k, hook=here)
    )


def table(built, head, offset):
    """Every coefficient at an offset, the rotation by TransformerLens's own code."""
    block = built.blocks[1]

    def through(rows, weight, position):
        rows = (rows - rows.mean(1, keepdim=True)) * block.ln1.w
        made = (rows @ weight[1])[None, None].expand(1, 9, -1, -1)
        turned = block.attn.apply_rotary(made.contiguous())
        return turned[0, position]

    q = through(head.query.decoder, block.attn.W_Q, offset)
    k = through(head.key.decoder, block.attn.W_K, 0)
    return (q @ k.T).detach() / block.attn.attn_scale


def test_strongest_pairs_at_an_offset(rotary, tmp_path):
    built, head = rotary
    for offset in (0, 1, 5):
        expected = table(built, head, offset)
        found = head.top(7, offset)
        assert_close(found.coefficients, expected[found.query, found.key], rtol=1e-9, atol=1e-10)
        assert_close(found.coefficients.abs(), expected.abs().flatten().topk(7).values)
    rows = found.to_pandas()
    assert rows["label_query"][0] == f"{rows['query'][0]} q{rows['query'][0]}"
    found.save(tmp_path / "pairs")
    assert AttentionPairs.load(tmp_path / "pairs").top(2).to_pandas().equals(rows.head(2))
    with pytest.raises(TypeError, match="offset"):
        head.top(3, 1.5)
    with pytest.raises(ValueError, match="k must lie between 1 and 600"):
        head.top(601)


def test_pairs_as_a_function_of_the_offset(rotary, tmp_path):
    built, head = rotary
    found = head.profile(head.top(3), range(6))
    expected = torch.stack([table(built, head, offset) for offset in range(6)], -1)
    pairs = head.top(3)
    assert_close(found.coefficients, expected[pairs.query, pairs.key].float(), rtol=1e-5, atol=1e-6)
    chosen = head.profile([(4, 7)], [2, 0])
    assert_close(chosen.coefficients[0], expected[4, 7, [2, 0]].float(), rtol=1e-5, atol=1e-6)
    assert chosen.labels == ["4 q4 x 7"]
    assert chosen.to_pandas().index.tolist() == [2, 0]
    found.save(tmp_path / "x")
    assert OffsetProfile.load(tmp_path / "x").to_pandas().equals(found.to_pandas())
    with pytest.raises(IndexError, match=r"key\[0\] is 20, but there are 20 key features"):
        head.profile([(0, 20)])
    with pytest.raises(ValueError, match="at least one pair"):
        head.profile([])


def test_singular_directions_and_their_features(rotary, tmp_path):
    _, head = rotary
    found = head.singular(3, 1, features=4)
    dense = head.matrix(1).dense()
    assert_close(found.svd.values, torch.linalg.svdvals(dense)[:3], rtol=1e-9, atol=1e-10)
    cosines = torch.nn.functional.normalize(head.query.decoder, dim=1) @ found.svd.left.T
    assert_close(found.query_cosines.abs(), cosines.T.abs().topk(4).values)
    assert (
        found.query_labels[0][0]
        == f"{int(found.query_features[0, 0])} q{int(found.query_features[0, 0])}"
    )
    assert len(found.to_pandas()) == 3 * 2 * 4
    found.save(tmp_path / "x")
    assert HeadDirections.load(tmp_path / "x").to_pandas().equals(found.to_pandas())


def test_self_and_other(tmp_path):
    """A head whose keys are its queries finds what is the same; a random one does not."""
    built = model(n_heads=2, d_head=16, normalization_type=None)
    with torch.no_grad():
        built.blocks[1].attn.W_Q[1] = torch.eye(D)
        built.blocks[1].attn.W_K[1] = torch.eye(D)
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(
        torch.randn(60, D, generator=generator, dtype=torch.float64), dim=1
    )
    same = AttentionInteractions(built, 1, 1, rows).self_scores()
    assert same.first == same.mean_place == 1.0
    own = AttentionInteractions(built, 1, 0, rows)
    found = own.self_scores(3)
    entries = own.matrix(3).fold(rows, rows).dense()
    assert_close(found.coefficients, entries.diagonal(), rtol=1e-9, atol=1e-9)
    places = (entries <= entries.diagonal()[:, None]).double().mean(1)
    assert_close(found.places, places)
    assert abs(found.mean_place - 0.5) < 0.2
    assert found.to_pandas()["first by chance"][0] == pytest.approx(1 / 60)
    found.save(tmp_path / "x")
    assert SelfScores.load(tmp_path / "x").mean_place == found.mean_place
    with pytest.raises(ValueError, match="have 60 and 2 features"):
        AttentionInteractions(built, 1, 0, rows, rows[:2]).self_scores()


def test_chance(rotary, tmp_path):
    """A planted pair is beyond its null; a random head's pairs are not."""
    _, head = rotary
    found = head.chance(3, 0, draws=9, progress=False)
    assert found.null.shape == (9, 3)
    assert float(found.p.min()) > 0.1
    found.save(tmp_path / "x")
    assert PairsChance.load(tmp_path / "x").to_pandas().equals(found.to_pandas())
    planted = model(normalization_type=None, positional_embedding_type="rotary", d_head=4)
    u, v = torch.eye(D, dtype=torch.float64)[:2]
    with torch.no_grad():
        planted.blocks[1].attn.W_Q[0] += 30 * torch.outer(u, torch.eye(4, dtype=torch.float64)[3])
        planted.blocks[1].attn.W_K[0] += 30 * torch.outer(v, torch.eye(4, dtype=torch.float64)[3])
    rows = torch.eye(D, dtype=torch.float64)
    pairs = AttentionInteractions(planted, 1, 0, rows).chance(1, 0, draws=19, progress=False)
    assert (int(pairs.pairs.query), int(pairs.pairs.key)) == (0, 1)
    assert float(pairs.p) == pytest.approx(0.05)


# ---------------------------------------------------------------------------- on a prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"positional_embedding_type": "rotary"},
        {"normalization_type": "LN", "attn_scores_soft_cap": 0.8},
        {"use_qk_norm": True, "positional_embedding_type": "rotary"},
        {"normalization_type": None, "positional_embedding_type": "alibi"},
        {"n_key_value_heads": 1, "n_heads": 4, "d_head": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("places", [(6, 2), (5, 5)])
def test_interventions_do_what_the_sum_predicts(fields, places, tmp_path):
    built = model(**fields)
    query, key = dictionaries()
    run = AttentionInteractions(built, 1, 1, query, key).run(TOKENS)
    found = run.verify(*places, k=3, progress=False)
    assert found.kinds.count("random") == 3
    assert {"query", "key", "pair"} <= set(found.kinds)
    assert_close(found.measured, found.predicted, rtol=1e-7, atol=1e-9)
    assert found.difference < 1e-6
    assert float(found.measured.abs().max()) > 1e-3
    score = run.score(*places)
    strongest = int(score.pairs.sum(1)[: (score.query_features >= 0).sum()].abs().argmax())
    effects = [score.effect(query=i) for i in range(len(score.pairs))]
    assert any(math.isclose(float(p), effects[strongest], rel_tol=1e-6) for p in found.predicted)
    found.save(tmp_path / "x")
    assert ScoreCheck.load(tmp_path / "x").to_pandas().equals(found.to_pandas())


def test_a_wrong_prediction_is_seen(monkeypatch):
    """A check that predicts another head's effects differs."""
    built = model(positional_embedding_type="rotary")
    run = AttentionInteractions(built, 1, 1, *dictionaries()).run(TOKENS)
    wrong = AttentionInteractions(built, 1, 0, *dictionaries()).run(TOKENS)
    monkeypatch.setattr(run, "_frame", wrong._frame)
    assert run.verify(6, 2, k=2, progress=False).difference > 0.1


def test_differences_of_scores_are_exact(tmp_path):
    for fields in ({"positional_embedding_type": "rotary"}, {"attn_scores_soft_cap": 0.5}):
        built = model(**fields)
        run = AttentionInteractions(built, 1, 1, *dictionaries()).run(TOKENS)
        one, other = run.score(6, 2), run.score(6, 4)
        found = one.minus(other)
        assert_close(found.total, found.measured, rtol=1e-9, atol=1e-10)
        # Softmax: of two keys of one query, the log of the ratio of weights.
        ratio = math.log(float(run.pattern[6, 2] / run.pattern[6, 4]))
        assert_close(found.total, ratio, rtol=1e-9, atol=1e-10)
        assert found.log_ratio == pytest.approx(ratio)
        assert one.minus(run.score(5, 2)).log_ratio is None
        label = one.query_labels[0]
        assert label in found.query_labels
        found.save(tmp_path / "x")
        assert ScoreDifference.load(tmp_path / "x").total == found.total
        assert one.minus(one).total == 0
    with pytest.raises(ValueError, match=r"these are of 1\.1 and 1\.0"):
        one.minus(AttentionInteractions(built, 1, 0, *dictionaries()).run(TOKENS).score(6, 2))


def test_what_a_score_says_of_itself(tmp_path):
    built = model(positional_embedding_type="alibi")
    found = AttentionInteractions(built, 1, 1, *dictionaries()).run(TOKENS).score(-1, 2)
    assert found.query_position == len(TOKENS) - 1
    assert "position" in found.terms()
    assert found.error < 1e-9
    assert found.to_pandas(3)["contribution"].abs().is_monotonic_decreasing
    assert found.to_pandas()["share"].sum() == pytest.approx(1 - found.position / found.sum)
    lines = found.text(4).splitlines()
    assert lines[0].startswith("head 1.1, query 7, key 2: score ")
    assert len(lines) == 6 + len(found.terms())
    found.save(tmp_path / "x")
    assert ScoreAttribution.load(tmp_path / "x").text() == found.text()
    with pytest.raises(IndexError, match="query row 999 does not exist"):
        found.effect(query=999)


def test_why_a_path_goes_through_a_head():
    built = bilinear_model()
    found = paths(built, TOKENS, 2, DIRECTION, 5)
    heads = {(1, h): AttentionInteractions(built, 1, h, embedding(built)) for h in range(2)}
    place = found.where.tolist().index([1, 1, 3])
    attended = why(found, place, heads)
    assert (attended.query_position, attended.key_position) == (5, 3)
    assert_close(attended.total, float(scores_of(built)[1, 5, 3]), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"is of head 0\.0, and the heads given are 1\.0, 1\.1"):
        why(found, found.where.tolist().index([0, 0, 3]), heads)
    with pytest.raises(ValueError, match=r"\(embed\) is not what a head brings"):
        why(found, found.kinds.index("embed"), heads)
    with pytest.raises(IndexError, match="component 10000 does not exist"):
        why(found, 10000, heads)


# ---------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positional_embedding_type": "shortformer"}, "its positions are 'shortformer'"),
        ({"positional_embedding_type": "relative_positional_bias"}, "relative_positional_bias"),
        ({"clip_qkv": 0.1}, r"queries and keys are clipped, which is not linear \(clip_qkv\)"),
        ({"use_logn_attn": True}, "logarithm of the length"),
        (
            {"use_dynamic_ntk_rope": True, "positional_embedding_type": "rotary"},
            "the rotation changes with the length",
        ),
    ],
    ids=str,
)
def test_models_that_are_refused_by_name(fields, message):
    with pytest.raises(UnreadAttention, match=f"attention scores of HookedTransformer.*{message}"):
        AttentionInteractions(model(**fields), 1, 0, torch.eye(D))


def test_what_does_not_fit():
    built = model()
    eye = torch.eye(D, dtype=torch.float64)
    with pytest.raises(IndexError, match=r"layer 2 does not exist: there are 2 \(0 to 1\)"):
        AttentionInteractions(built, 2, 0, eye)
    with pytest.raises(IndexError, match="head -3 does not exist"):
        AttentionInteractions(built, 0, -3, eye)
    with pytest.raises(ValueError, match="dictionary_key has width 5, the residual stream 16"):
        AttentionInteractions(built, 0, 0, eye, torch.eye(5))
    head = AttentionInteractions(built, -1, -1, eye)
    assert (head.layer, head.head) == (1, 1)
    assert "head 1.1: 16 query features" in repr(head)
    with pytest.raises(ValueError, match="has directions but no activations"):
        head.run(TOKENS)
    carried = through_head(built, embedding(built), 0, 1)
    assert AttentionInteractions(
        built, 1, 0, embedding(built), carried
    ).self_scores().places.shape == (VOCABULARY,)
    run = AttentionInteractions(built, 1, 0, embedding(built)).run(TOKENS)
    with pytest.raises(ValueError, match="query 2 does not see key 5: the score is masked"):
        run.score(2, 5)
    with pytest.raises(IndexError, match="position 8 does not exist: the prompt has 8 tokens"):
        run.score(8, 0)
    with pytest.raises(ValueError, match="paths are of one sequence"):
        AttentionInteractions(built, 1, 0, embedding(built)).run(TOKENS[None].expand(2, -1))
    assert "8 tokens" in repr(run)


# ---------------------------------------------------------------------------- figures


def test_figures_show_the_numbers(rotary):
    _, head = rotary
    pairs = head.top(4, 1)
    (trace,) = plots.attention_pairs_figure(pairs).data
    assert list(trace.x) == pytest.approx(pairs.coefficients.tolist())
    profile = head.profile(pairs, range(5))
    traces = plots.offset_figure(profile).data
    assert list(traces[2].y) == pytest.approx(profile.coefficients[2].tolist())
    long = replace(profile, labels=[f"{'long ' * 9}{i} x {'other ' * 9}" for i in range(4)])
    assert plots.offset_figure(long).data[0].name == "long long long long… x other other other o…"
    built = model(positional_embedding_type="rotary")
    run = AttentionInteractions(built, 1, 1, *dictionaries()).run(TOKENS)
    found = run.score(6, 2)
    figure = plots.score_figure(found, k=99)
    assert torch.allclose(torch.tensor(figure.data[0].z).double(), found.pairs, atol=1e-5)
    few = torch.tensor(plots.score_figure(found, k=3).data[0].z)
    assert few.shape == (3, 3)
    checked = run.verify(6, 2, k=2, progress=False)
    _, features, control = plots.score_check_figure(checked).data
    both = [*features.y, *control.y]
    assert sorted(both) == pytest.approx(sorted(checked.measured.tolist()))
    assert len(control.x) == checked.kinds.count("random")
