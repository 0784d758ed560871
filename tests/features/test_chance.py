"""Nulls, p-values and discoveries, each against a slow obvious way."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.features.building import N_OUT, model, sae
from tl_bilinear import BilinearTensor, FeatureInteractions
from tl_bilinear.features import PairChance, SpectrumChance, discoveries
from tl_bilinear.features.chance import p_values, pair_scores, pursue_pairs, random_rotation

LAYER = "blocks.1"


def random_layer(hidden=5, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, hidden, d, generator=generator, dtype=torch.double)
    return BilinearTensor(left, right, torch.randn(1, hidden, generator=generator).double())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=60, deadline=None)
def test_discoveries_are_those_of_benjamini_and_hochberg(p, rate):
    """By the book: the largest i with p_(i) <= rate i / m, and all up to it."""
    values = torch.tensor(p, dtype=torch.double)
    ordered = sorted(values.tolist())
    passing = [i for i, v in enumerate(ordered, 1) if v <= rate * i / len(p)]
    limit = ordered[max(passing) - 1] if passing else -1
    assert discoveries(values, rate).tolist() == [v <= limit for v in values.tolist()]


def test_discoveries_that_are_refused():
    assert discoveries(torch.tensor([float("nan"), 1e-9])).tolist() == [False, True]
    assert not discoveries(torch.tensor([float("nan")])).any()
    with pytest.raises(ValueError, match="between 0 and 1"):
        discoveries(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="p-values lie"):
        discoveries(torch.tensor([2.0]))


def test_the_variance_of_a_pair_is_that_over_all_permutations():
    layer = random_layer()
    directions = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    found = pair_scores(layer, directions, draws=3)
    made = []
    for order in itertools.permutations(range(5)):
        turned = BilinearTensor(layer.left, layer.right, layer.out[:, list(order)])
        made.append(turned.interaction()[0].fold(directions).dense())
    made = torch.stack(made) * (2 - torch.eye(4, dtype=torch.double))
    own = layer.interaction()[0].fold(directions).dense() * (2 - torch.eye(4, dtype=torch.double))
    assert_close(found.coefficients, own)
    assert_close(found.z, (own - made.mean(0)) / made.std(0, correction=0))


def test_p_values_are_shares_of_the_null():
    null = torch.tensor([0.1, 0.5, 0.5, 2.0])
    found = p_values(torch.tensor([-3.0, 0.5, 0.0]), null)
    assert_close(found, torch.tensor([1, 4, 5]).double() / 5)


def test_rotations_are_orthogonal():
    rotation = random_rotation(7, torch.Generator().manual_seed(0))
    assert_close(rotation @ rotation.T, torch.eye(7, dtype=torch.double))


@pytest.mark.parametrize("null", ["neurons", "dictionary"])
def test_p_values_are_uniform_where_there_is_nothing(null):
    smallest = []
    for seed in range(40):
        layer = random_layer(hidden=30, d=12, seed=seed)
        directions = torch.randn(
            10, 12, generator=torch.Generator().manual_seed(seed + 99)
        ).double()
        found = pair_scores(layer, directions, null, draws=20, seed=seed)
        rows, columns = torch.triu_indices(10, 10)
        smallest.append(p_values(found.z[rows, columns], found.null))
    p = torch.cat(smallest)
    for level in (0.05, 0.2, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.035)


def planted(rows, pairs, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d = rows.shape[1]
    form = noise * torch.randn(d, d, generator=generator, dtype=torch.double) / d
    for b, c, weight in pairs:
        form = form + weight * torch.outer(rows[b], rows[c])
    return (form + form.T) / 2


def test_pursuit_tells_a_pair_from_those_that_resemble_it():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(40, 24, generator=generator, dtype=torch.double)
    rows[1] = rows[0] + 0.6 * rows[1]  # a neighbour
    rows = rows / rows.norm(dim=1, keepdim=True)
    form = planted(rows, [(0, 5, 1.0), (7, 7, -0.8)], 0.1)
    coefficients = (rows @ form @ rows.T).abs()
    assert float(coefficients[1, 5]) > 0.3  # looks like a pair as well
    pairs, weights, p = pursue_pairs(form, rows, draws=40)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 5), (7, 7)]
    assert_close(weights.sort().values, torch.tensor([-0.8, 1.0]).double(), atol=0.1, rtol=0)
    assert float(p.max()) <= 0.05
    assert not len(pursue_pairs(planted(rows, [], 1.0), rows, draws=40)[0])
    assert not len(pursue_pairs(torch.zeros(24, 24), rows, draws=40)[0])
    with pytest.raises(ValueError, match="take at least 100"):
        pursue_pairs(form, rows, rate=0.01, draws=20)


@pytest.fixture(scope="module")
def f():
    return FeatureInteractions(
        model(), 1, sae(f"{LAYER}.hook_resid_mid", dtype="float64"),
        sae(f"{LAYER}.hook_mlp_out", n=N_OUT, seed=1, dtype="float64"),
    )  # fmt: skip


def test_random_weights_are_no_better_than_their_null(f, tmp_path):
    found = f.pair_chance(3, 12, draws=25)
    assert (found.discoveries, found.tested) == (0, 40 * 41 // 2)
    assert found.verdict.startswith(
        "No pair is better than its null (what each hidden neuron writes"
    )
    strongest = f.top(3, 200)
    known = dict(zip(zip(strongest.first.tolist(), strongest.second.tolist(), strict=True),
                     strongest.coefficients.tolist(), strict=True))  # fmt: skip
    for row in found.to_pandas().to_dict("records"):
        if (row["first"], row["second"]) in known:
            assert row["coefficient"] == pytest.approx(known[row["first"], row["second"]])
    found.save(tmp_path / "x")
    assert torch.equal(PairChance.load(tmp_path / "x").p, found.p)
    assert len(found.top(2).first) == 2
    spectra = f.spectrum_chance([1, 2, 5], draws=39, progress=False)
    assert "No spectrum is better than its null" in spectra.verdict
    own = f.layer_tensor.interaction(f.directions[[1, 2, 5]]).eigh()
    assert_close(spectra.concentration, own.values[:, 0].abs() / own.values.norm(dim=-1))
    # The null is drawn: neurons written by chance, no spectrum like its own.
    gap = (spectra.null_concentration - spectra.concentration).abs()
    assert (gap > 1e-6).all()
    assert (spectra.p < 1).any()
    spectra.save(tmp_path / "y")
    assert torch.equal(SpectrumChance.load(tmp_path / "y").p, spectra.p)


def test_a_planted_pair_is_a_discovery(f):
    import copy

    planted_layer = copy.copy(f)
    rows = f.input_directions
    unit = rows / rows.norm(dim=1, keepdim=True)
    layer = f.hook_tensor
    left, right = torch.cat([layer.left, 60 * unit[:1]]), torch.cat([layer.right, 60 * unit[1:2]])
    written = f.directions[3] / f.directions[3].square().sum()
    out = torch.cat([0.001 * layer.out, written[:, None]], 1)
    planted_layer.hook_tensor = BilinearTensor(left, right, out)
    found = planted_layer.pair_chance(3, null="dictionary", draws=25)
    assert (int(found.first[0]), int(found.second[0])) == (0, 1)
    assert "of 820 pairs are discoveries" in found.verdict


def test_nulls_that_are_refused(f, unchecked):
    with pytest.raises(ValueError, match="neurons, dictionary"):
        f.pair_chance(0, null="mine")
    with pytest.raises(ValueError, match="take at least 20"):
        f.pair_chance(0, draws=10)
    with pytest.raises(MemoryError, match="fewer draws"):
        f.pair_chance(0, max_bytes=100)
    with pytest.raises(ValueError, match="one output at a time"):
        pair_scores(f.hook_tensor, f.input_directions)
