"""Main effects and interactions around a mean, each against a slow obvious way; sums are exact."""

import pytest
import torch
from torch.testing import assert_close

from tests.features.building import N_OUT, model, sae
from tl_bilinear import FeatureInteractions, plots
from tl_bilinear.features import CentredAttribution, Dictionary, FeatureEffects
from tl_bilinear.tensor import shapley

LAYER = "blocks.1"
OUTPUT = f"{LAYER}.hook_mlp_out"


@pytest.fixture(scope="module", params=["mlp.hook_in", "hook_resid_mid"])
def run(request):
    f = FeatureInteractions(
        model(),
        1,
        sae(f"{LAYER}.{request.param}", dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64", normalize_activations="layer_norm"),
    )
    tokens = torch.randint(0, 23, (9, 12), generator=torch.Generator().manual_seed(0))
    return f.run(tokens, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def busy(run):
    return int(run.low_rank_correlation(1, progress=False).counts.argmax())


@pytest.mark.parametrize("around", ["all", "active", "mask"])
def test_the_parts_of_one_token_sum_to_the_model(run, busy, around, tmp_path):
    if around == "mask":
        around = run.mask & (torch.arange(12) > 6)
    found = run.centred(busy, 5, 3, around=around)
    assert found.measured == pytest.approx(float(run.preactivations([busy])[3, 5, 0]))
    assert found.error < 1e-10
    assert sum(found.terms().values()) == pytest.approx(found.total)
    table = found.to_pandas()
    m = len(found.features)
    assert len(table) == m + m * (m + 1) // 2
    assert table["contribution"].sum() + found.constant == pytest.approx(
        found.constant + found.terms()["main effects"] + found.terms()["interactions of features"]
    )
    found.save(tmp_path / "x")
    assert torch.equal(CentredAttribution.load(tmp_path / "x").main, found.main)
    assert "main" in found.text(5)


def test_a_main_effect_is_what_changes_when_a_feature_changes_alone(run, busy):
    """By hand: the layer at the mean, and at the mean with one feature at its value here."""
    f = run.features
    found = run.centred(busy, 5, 3, around="all")
    coefficients, rests = zip(*[(p.coefficients, p.rest) for p in run.read()], strict=True)
    z, rest = torch.cat(coefficients), torch.cat(rests)
    centre = z.mean(0) @ f.input_directions + rest.mean(0)
    gain = float(run.output_scale[3, 5])
    read = f.hook_tensor.project(f.directions[busy][None])
    for row, b in enumerate(found.features.tolist()):
        assert float(found.means[row]) == pytest.approx(float(z[:, b].mean()))
        change = (found.activations[row] - found.means[row]) * f.input_directions[b]
        there = gain * float(read(centre + change)[0] - read(centre)[0])
        own = float(found.main[row] + found.interactions[row, row])
        assert there == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize("around", ["all", "active"])
def test_shares_are_covariances_of_the_parts_over_the_population(run, busy, around, tmp_path):
    found = run.effects(busy, around=around, k=60)
    chosen, _ = run.population(around, busy)
    main, f = [], []
    for sequence, position in chosen.nonzero().tolist():
        one = run.centred(busy, position, sequence, around=around)
        f.append(one.measured)
        row = torch.zeros(run.features.inputs.n, dtype=torch.double)
        # A feature that is absent has a main effect as well: that of its own absence.
        row -= found.slopes * found.means * float(run.output_scale[sequence, position])
        for place, b in enumerate(one.features.tolist()):
            row[b] = float(one.main[place])
        main.append(row)
    f = torch.tensor(f, dtype=torch.double)
    assert found.tokens == len(f)
    assert found.mean == pytest.approx(float(f.mean()))
    assert found.variance == pytest.approx(float(f.var(correction=0)))
    away = f - f.mean()
    expected = (torch.stack(main) * away[:, None]).mean(0) / found.variance
    assert_close(found.main, expected, rtol=1e-8, atol=1e-10)
    assert float(found.main.sum()) + found.interactions + found.rest == pytest.approx(1)
    # A pair by hand.
    z = torch.cat([p.coefficients for p in run.read(chosen)])
    gain = run.output_scale[chosen]
    form = run.features.interaction(busy).dense()
    centred = z - z.mean(0)
    for b, c, share in zip(
        found.first.tolist(), found.second.tolist(), found.pairs.tolist(), strict=True
    ):
        term = (1 if b == c else 2) * form[b, c] * centred[:, b] * centred[:, c] * gain
        assert share == pytest.approx(float((term * away).mean() / found.variance), abs=1e-9)
    everything = torch.einsum("tb,bc,tc->t", centred, form, centred) * gain
    assert found.interactions == pytest.approx(float((everything * away).mean() / found.variance))
    found.save(tmp_path / "x")
    assert torch.equal(FeatureEffects.load(tmp_path / "x").main, found.main)
    table = found.to_pandas(8)
    assert len(table) == 11
    assert table["share"][8:].sum() == pytest.approx(1)
    assert len(found.top(3).pairs) == 3


def test_a_feature_beside_one_that_is_always_there_is_a_main_effect():
    """f = a b with b = 1 on every token but for little: what varies is a, alone."""
    generator = torch.Generator().manual_seed(1)
    built = model(bilinear_bias=False, normalization_type=None)
    d = built.cfg.d_model
    rows = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double)).Q

    def encode(x):
        return torch.einsum("...d,nd->...n", x, rows)

    inputs = Dictionary(rows, hook=f"{LAYER}.mlp.hook_in", encode=encode)
    f = FeatureInteractions(built, 1, inputs, torch.eye(d, dtype=torch.double))
    left = f.hook_tensor
    planted = type(left)(rows[:1], rows[1:2], torch.eye(d, dtype=torch.double)[:, :1])
    f.layer_tensor = f.hook_tensor = planted
    run = f.run(torch.arange(12).reshape(2, 6) % 23, progress=False)
    z = torch.randn(2, 6, d, generator=generator, dtype=torch.double)
    z[..., 1] = 1 + 0.01 * z[..., 1]
    x = z @ rows
    object.__setattr__(run, "x", x)
    object.__setattr__(run, "hook_activations", x)
    object.__setattr__(run, "output", planted(x))
    found = run.effects(0, around="all")
    assert float(found.main[0]) == pytest.approx(1, abs=0.05)
    assert abs(found.interactions) < 0.05
    assert found.to_pandas(1)["kind"].iloc[0] == "main"


def test_populations_that_are_refused(run, busy, unchecked):
    with pytest.raises(ValueError, match="'all', 'active' or a mask"):
        run.effects(busy, around="some")
    with pytest.raises(ValueError, match="give more text"):
        run.effects(busy, around=torch.zeros_like(run.mask))
    with pytest.raises(ValueError, match="give more text"):
        run.centred(busy, around=torch.zeros_like(run.mask))
    with pytest.raises(MemoryError, match="fewer features"):
        run.effects(busy, max_bytes=100)


# ---------------------------------------------------------------------- Shapley values


@pytest.mark.parametrize("baseline", [None, "all", "active"])
def test_shapley_values_sum_to_what_they_explain(run, busy, baseline):
    found = run.shapley(busy, 5, 3, baseline=baseline)
    assert found.output == pytest.approx(float(run.preactivations([busy])[3, 5, 0]))
    assert found.error < 1e-9
    if baseline is None:
        assert found.rest == pytest.approx(0, abs=1e-12)
        assert set(found.features.tolist()) <= set(run.attribute(busy, 5, 3).features.tolist())


def test_shapley_values_beside_no_feature_halve_every_pair(run, busy):
    """Beside zero, a feature has its self term, half of each pair, and its products with the rest."""
    found = run.shapley(busy, 5, 3)
    plain = run.attribute(busy, 5, 3)
    m = len(plain.features)
    expected = plain.quadratic[:m, :m].sum(1) + 2 * plain.quadratic[:m, m:].sum(1)
    expected = expected + plain.linear[:m]
    values = dict(zip(found.features.tolist(), found.values.tolist(), strict=True))
    for b, value in zip(plain.features.tolist(), expected.tolist(), strict=True):
        assert values.get(b, 0.0) == pytest.approx(value, abs=1e-9)


def test_shapley_values_beside_a_population_are_means_over_its_tokens(run, busy):
    """Beside each token of the population as a point, and averaged."""
    mask = torch.zeros_like(run.mask)
    mask[2, 3:6] = True
    found = run.shapley(busy, 5, 3, baseline=mask)
    f = run.features
    n = f.inputs.n
    parts = list(run.read(mask))
    background = torch.cat([torch.cat([p.coefficients, p.rest], 1) for p in parts])
    here = torch.zeros_like(run.mask)
    here[3, 5] = True
    one = next(p for p in run.read(here) if len(p.coefficients))
    x = torch.cat([one.coefficients, one.rest], 1)[0]
    players = torch.cat([f.input_directions, torch.eye(16, dtype=torch.double)])
    layer = f.hook_tensor.project(f.directions[busy][None]).fold(players)
    values = torch.stack([shapley(layer, x, b).values[0] for b in background]).mean(0)
    values = values * run.output_scale[3, 5]
    for b, value in zip(found.features.tolist(), found.values.tolist(), strict=True):
        assert value == pytest.approx(float(values[b]), abs=1e-9)
    assert found.rest == pytest.approx(float(values[n:].sum()), abs=1e-9)
    assert list(found.to_pandas()["input_feature"]) == found.features.tolist()


def test_figures_show_what_the_tables_say(run, busy):
    effects = run.effects(busy, k=8)
    parts, sums = plots.effects_figure(effects, 6).data
    table = effects.to_pandas(6)
    assert list(parts.x) == pytest.approx(table["share"][:6].tolist(), abs=1e-3)
    assert sum(sums.x) == pytest.approx(1, abs=1e-3)
    ranked = run.ranked_pairs(busy, 5)
    bars = plots.ranked_pairs_figure(ranked, 4).data
    assert len(bars) == 3
    assert list(bars[2].x) == pytest.approx(ranked.top(4).where_active.tolist(), rel=1e-2)
