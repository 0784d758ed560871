"""The quickstart's language part: its numbers against slow ways, and the page that shows them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests.explorer import building
from tests.features.building import sae
from tl_bilinear import BilinearTensor, cli, demo
from tl_bilinear.explorer import opening
from tl_bilinear.io import write_json
from tl_bilinear.models import HookedBilinearTransformer
from tl_bilinear.paper import quickstart as whole
from tl_bilinear.paper import quickstart_language as language
from tl_bilinear.paper.page import finite, templates
from tl_bilinear.paper.quickstart_language import choose_features, language_quickstart
from tl_bilinear.paper.report_language import language_sections

LAYER, D, K = 1, 16, 6
READABLE = 1  # a model that has learned nothing promotes parts of words as often as words
POINTS = {
    "mlp_in": f"blocks.{LAYER}.mlp.hook_in",
    "resid_mid": f"blocks.{LAYER}.hook_resid_mid",
    "mlp_out": f"blocks.{LAYER}.hook_mlp_out",
}


@pytest.fixture(scope="module")
def model(story_data):
    return HookedBilinearTransformer(
        {
            "n_layers": 2,
            "d_model": D,
            "d_head": 8,
            "d_mlp": 24,
            "n_ctx": story_data.n_ctx,
            "d_vocab": len(story_data.tokenizer),
            "normalization_type": "RMSPre",
            "positional_embedding_type": "rotary",
            "seed": 0,
            "device": "cpu",
            "dtype": torch.float64,
        },
        tokenizer=story_data.tokenizer,
    ).requires_grad_(False)


@pytest.fixture(scope="module")
def saes():
    return {
        point: sae(hook, n=40, k=K, seed=seed, d=D, dtype="float64").requires_grad_(False)
        for seed, (point, hook) in enumerate(POINTS.items())
    }


@pytest.fixture(scope="module")
def tokens(story_data):
    return torch.tensor(story_data.train[:60]["input_ids"])


@pytest.fixture(scope="module", params=["mlp_in", "resid_mid"])
def result(request, model, saes, tokens):
    facts = {"loss <here>": "about 5 & more"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "READABLE", READABLE)
        return language_quickstart(
            model,
            saes,
            tokens,
            layer=LAYER,
            point=request.param,
            sample="tom & mia <b>",
            facts=facts,
            progress=False,
        )


@pytest.fixture(scope="module")
def halves(result, tokens):
    """By name what the model has on the second half, row by row."""
    model, second = result.features.model, tokens[30:]
    _, cache = model.run_with_cache(second)
    return SimpleNamespace(
        tokens=second,
        x=cache[POINTS["mlp_in"]],
        read=cache[result.features.passage.hook],
        out=cache[POINTS["mlp_out"]],
        scale=cache[f"blocks.{LAYER}.ln2.hook_scale"],
    )


def preactivation(result, out, feature):
    """SAELens's formula, for an SAE without input normalisation."""
    sae_out = result.features.outputs.sae
    centred = out - sae_out.b_dec if sae_out.cfg.apply_b_dec_to_input else out
    return centred @ sae_out.W_enc[:, feature] + sae_out.b_enc[feature]


def test_the_features_follow_the_rule(result, model, tokens):
    choice = result.choice
    special = set(model.tokenizer.all_special_ids)
    assert torch.equal(choice.features, torch.arange(40))
    _, cache = model.run_with_cache(tokens[:30])
    z = result.features.outputs.sae.encode(cache[POINTS["mlp_out"]])
    z[:, 0] = 0

    def allowed(feature, chosen):
        promoted = set(top_tokens(result, feature))
        words = model.tokenizer.batch_decode([[i] for i in top_tokens(result, feature)])
        if not all(word.isalpha() for word in words[:READABLE]):
            return False
        if any(len(promoted & set(top_tokens(result, other))) >= 3 for other in chosen):
            return False
        row, place = divmod(int(z[..., feature].argmax()), z.shape[1])
        return int(tokens[row, place]) not in special

    features = result.features
    read = features.inputs.read(cache[features.passage.hook]).coefficients
    if features.passage.needs_scale:
        read = read / cache[f"blocks.{LAYER}.ln2.hook_scale"]
    both = torch.cat([z[:, 1:].flatten(0, 1), read[:, 1:].flatten(0, 1)], dim=1)
    alike = torch.corrcoef(both.double().T)[:40, 40:].nan_to_num().max(1)
    assert_close(result.nearest.correlations.double(), alike.values, rtol=1e-4, atol=1e-4)

    chosen = []
    for feature in choice.active[:, 1].argsort(descending=True).tolist():
        made = choice.counts[feature] >= 100 and alike.values[feature] < language.NEAR
        if made and len(chosen) < 3 and allowed(feature, chosen):
            chosen.append(feature)
    assert [one.feature for one in result.found] == chosen
    assert torch.equal((z != 0).sum((0, 1)), choice.counts)


def top_tokens(result, feature):
    row = result.features.outputs.sae.W_dec[feature]
    return (row @ result.features.model.W_U).argsort(descending=True)[:10].tolist()


def test_promoted_tokens_are_those_of_the_decoder_row(result, model):
    for one in result.found:
        ids = top_tokens(result, one.feature)
        assert one.promoted.promoted.tolist() == ids
        assert one.promoted.words[:10] == [model.tokenizer.decode([i]) for i in ids]
        logits = result.features.outputs.sae.W_dec[one.feature] @ model.W_U
        assert one.promoted.suppressed.tolist() == logits.argsort()[:10].tolist()


def test_examples_and_counts_are_of_the_second_half(result, halves):
    z = result.features.outputs.sae.encode(halves.out)
    z[:, 0] = 0
    for one, count in zip(result.found, result.correlation.counts.tolist(), strict=True):
        assert count == int((z[..., one.feature] > 0).sum())
        rows = one.examples.sequences
        assert_close(one.examples.values, z[..., one.feature].amax(1).topk(8).values)
        assert torch.equal(one.examples.tokens, halves.tokens[rows])
        assert_close(one.examples.strengths, z[rows, :, one.feature])


def test_correlations_are_those_of_truncated_forms(result, halves):
    layer = BilinearTensor.from_model(result.features.model, LAYER)
    z = result.features.outputs.sae.encode(halves.out)
    for row, one in enumerate(result.found):
        on = z[..., one.feature] != 0
        on[:, 0] = False
        p = preactivation(result, halves.out, one.feature)[on]
        Q = torch.einsum(
            "a,aij->ij", result.features.outputs.sae.W_enc[:, one.feature], layer.dense()
        )
        values, vectors = torch.linalg.eigh(Q)
        order = values.abs().argsort(descending=True)
        parts = values[order] * (halves.x[on] @ vectors[:, order]) ** 2
        for k in language.RANKS:
            expected = torch.corrcoef(torch.stack([p, parts[:, :k].sum(1)]))[0, 1]
            assert_close(result.correlation.active[row, k - 1], expected, rtol=1e-7, atol=1e-7)


def test_the_attribution_is_the_preactivation_pair_by_pair(result, halves):
    layer = BilinearTensor.from_model(result.features.model, LAYER).dense()
    sae_in = result.features.inputs.sae
    for one in result.found:
        found = one.attribution
        row, place = int(one.examples.sequences[0]), int(one.examples.positions[0])
        assert found.position == place
        assert found.measured == pytest.approx(
            float(preactivation(result, halves.out[row, place], one.feature)), abs=1e-10
        )
        assert found.total == pytest.approx(found.measured, abs=1e-10)
        read, e = halves.read[row, place], result.features.outputs.sae.W_enc[:, one.feature]
        s = float(halves.scale[row, place]) if result.features.passage.needs_scale else 1.0
        z = sae_in.encode(read)
        Q = torch.einsum("a,aij->ij", e, layer)
        for entry in found.to_pandas(5).to_dict("records"):
            b, c = entry["first"], entry["second"]
            once = z[b] * z[c] * (sae_in.W_dec[b] @ Q @ sae_in.W_dec[c]) / s**2
            expected = float(once) * (1 if b == c else 2)
            assert entry["contribution"] == pytest.approx(expected, abs=1e-10)
        assert sum(found.terms().values()) == pytest.approx(found.total, abs=1e-10)


def test_the_strongest_pairs_are_those_of_the_whole_matrix(result):
    layer = BilinearTensor.from_model(result.features.model, LAYER).dense()
    D_in = result.features.inputs.sae.W_dec
    for one in result.found:
        e = result.features.outputs.sae.W_enc[:, one.feature]
        whole_matrix = D_in @ torch.einsum("a,aij->ij", e, layer) @ D_in.T
        b, c = torch.triu_indices(40, 40)
        coefficients = whole_matrix[b, c] * torch.where(b == c, 1, 2)
        order = coefficients.abs().argsort(descending=True)[:8]
        assert_close(one.strongest.coefficients, coefficients[order], rtol=1e-9, atol=1e-12)
        assert one.strongest.first.tolist() == b[order].tolist()


def test_interventions_agree_and_could_have_failed(result):
    for one in result.found:
        assert one.eigenvectors.error.max() < 1e-10
        assert one.eigenvectors.control_error.min() > 1e-4
        assert one.pairs.tokens.min() >= 1
        assert one.pairs.difference.max() < 1e-10
        assert_close(one.downstream.predicted, one.downstream.measured, rtol=0, atol=1e-10)


def test_the_downstream_effect_is_that_of_the_runs(result, model):
    one = result.found[0]
    on = one.examples.strengths > 0
    parts = result.features.components(one.feature, 2, write="feature")
    clean = model(one.examples.tokens).softmax(-1)[..., one.promoted.promoted].sum(-1).log()
    with model.hooks(fwd_hooks=parts.ablate(1, positions=on).fwd_hooks(model)):
        without = model(one.examples.tokens)
    chance = without.softmax(-1)[..., one.promoted.promoted].sum(-1).log()
    change = [float((b - a)[here].mean()) for a, b, here in zip(clean, chance, on, strict=True)]
    assert_close(one.downstream.effect[1], torch.tensor(change, dtype=torch.float64))
    assert one.loss.names == ["without both"]
    assert (one.loss.patched - one.loss.clean).abs().max() > 1e-6


def test_the_page(result):
    page = templates().get_template("language.html").render(language=language_sections(result))
    text = re.sub(r"\s+", " ", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert "loss &lt;here&gt;<dd>about 5 &amp; more" in text
    assert "<blockquote>tom &amp; mia &lt;b&gt;</blockquote>" in text
    assert "not typical" in text
    assert "nan" not in text
    for one in result.found:
        assert f"<h2 id=feature-{one.feature}>" in text
        assert f"<b>{one.attribution.total:+.4f}</b>" in text
        assert f"<b>{one.attribution.measured:+.4f}</b>" in text
    before_norm = "up to a positive number of each token" in text
    assert before_norm == result.features.passage.needs_scale
    assert text.count("class=peak") == sum(
        1 + min(5, len(one.examples.sequences)) for one in result.found
    )
    opened, closed = (len(re.findall(f"<{slash}div", text)) for slash in ("", "/"))
    assert opened == closed


def test_the_json(result, tmp_path):
    write_json(tmp_path / "summary.json", finite(result.summary()))
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["input_hook"] == result.features.passage.hook
    assert len(stored["features"]) == 3
    for shown, one in zip(stored["features"], result.found, strict=True):
        assert shown["feature"] == one.feature
        assert set(shown["active_correlation"]) == {"1", "2", "4", "8"}
        assert sum(shown["attribution"]["terms"].values()) == pytest.approx(
            shown["attribution"]["measured"]
        )
        assert len(shown["promoted"]) == len(shown["suppressed"]) == 10
        assert shown["strongest_pairs"][0]["names"][0] in result.labels


def test_json_has_no_nan(tmp_path):
    values = {"a": [float("nan"), 1.5, (float("inf"), "x")], "b": None, "c": True}
    write_json(tmp_path / "values.json", finite(values))
    expected = {"a": [None, 1.5, [None, "x"]], "b": None, "c": True}
    assert json.loads((tmp_path / "values.json").read_text()) == expected


def test_text_is_escaped_and_shaded_by_strength():
    macros = templates().get_template("macros.html").module
    html = str(macros.shaded([" a", " <b>", "&c"], [0.0, 2.0, 1.0], 1))
    assert html.startswith("a <span class=peak")
    assert "&lt;b&gt;</span><span" in html
    assert html.endswith("&amp;c</span>")
    strong, weak = (float(share) for share in re.findall(r"rgba\(33,102,172,([\d.]+)\)", html))
    assert (strong, weak) == (0.5, 0.25)
    assert "<b>" not in macros.chips(["<b>"])
    assert "<b>" not in macros.pair([1, 2], ["<b>", "c"])


def test_too_little_text_is_refused(model, saes, tokens):
    with pytest.raises(ValueError, match="at least 2 rows of tokens, got 1"):
        language_quickstart(model, saes, tokens[:1], layer=LAYER, progress=False)
    with pytest.raises(ValueError, match=r"output features, not 3, are active on at least 100 of"):
        language_quickstart(model, saes, tokens[:2], layer=LAYER, progress=False)


def test_features_that_promote_parts_of_words_are_passed_over(result, tokens, monkeypatch):
    run = result.features.run(tokens[:30])

    def readable(feature):
        words = run.features.promoted(feature).words[:2]
        return all(word.isalpha() for word in words)

    found = {}
    for count in (0, 2):
        monkeypatch.setattr(language, "READABLE", count)
        found[count] = choose_features(result.choice, result.nearest, run, 1)[0]
    assert not readable(found[0])  # or this test says nothing
    assert readable(found[2])


def test_too_few_features_that_differ_are_refused(result, tokens):
    run = result.features.run(tokens[:30])
    with pytest.raises(ValueError, match=r"output features, not 41, .*differ in what they promote"):
        choose_features(result.choice, result.nearest, run, 41)


FAST = ["--size", "8", "--epochs", "2", "--batch", "100", "--quiet"]


def test_an_interrupt_in_the_second_part_leaves_nothing(idx_folder, tmp_path, monkeypatch):
    def interrupt(progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole, "demo_quickstart", interrupt)
    out = tmp_path / "out"
    status = cli.main(["quickstart", "--data", str(idx_folder), "--out", str(out), *FAST])
    assert status == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_model_that_ships_and_images_are_in_one_report(
    idx_folder, tmp_path, unchecked, monkeypatch, capsys
):
    """The command as its users run it, but for the size of the explorer's page.

    The page of all features and graphs is that of explorer.md, of the site, and of README's command.
    """
    monkeypatch.setattr(opening, "language_panel", building.few_features)
    monkeypatch.setattr(opening, "GRAPH_TRIED", 8)
    out = tmp_path / "out"
    status = cli.main(["quickstart", "--data", str(idx_folder), "--out", str(out), *FAST])
    output = capsys.readouterr()
    assert status == 0, output.err
    assert "whole model" in output.out
    assert "A language model" in output.out
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["images", "language"]
    assert "Pairs across layers" in (out / "explorer.html").read_text()
    stored = summary["language"]
    assert stored["layer"] == demo.demo_layers()[-1]
    assert (
        f"{demo.demo_card()['model']['loss']:.3f}" in stored["facts"]["loss on validation stories"]
    )
    for shown in stored["features"]:
        assert str(shown["feature"]) in output.out
        assert all(word.isalpha() for word in shown["promoted"][: language.READABLE])
        assert shown["attribution"]["error"] < 1e-5
        assert shown["active_correlation"]["2"] > 0.8
        for check in shown["eigenvector_checks"]:
            assert check["error"] < 1e-4 < check["control_error"]
    page = (out / "report.html").read_text()
    page = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # plotly.js itself
    assert re.findall(r"href='(.*?)'", page) == ["#images", "#language"]
    assert not re.findall(r"src\s*=|url\(|@import", page)
    for part in ("images", "language"):
        assert page.count(f"<article id={part}>") == 1
