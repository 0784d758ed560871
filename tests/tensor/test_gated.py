"""The nearest bilinear layer: against dense least squares, quadrature against sampling, exact cases."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from tl_bilinear.tensor import Approximation, GatedLayer, approximate
from tl_bilinear.tensor.gated import _gaussian_moments, _sample_moments

QUIET = {"warn_below": -1e9}
PLAIN = {**QUIET, "weights": "equal"}  # plain least squares: no input is left out


def layer(seed=0, d_in=5, h=7, d_out=4, activation=F.silu, biases=True, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    given = (randn(h, d_in), randn(h, d_in), randn(d_out, h))
    bias = (randn(h), randn(h), randn(d_out)) if biases else ()
    return GatedLayer(*given, activation, *bias)


def samples(n, d, seed=1):
    """Skewed and correlated, as activations are."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64)
    mix = torch.randn(d, d, generator=draw, dtype=torch.float64)
    return (x + 0.3 * x**2) @ mix / d**0.5 + 0.2


def used(x, held_out=0.2):
    """The samples that a fit may see."""
    return x[: int(len(x) * (1 - held_out))]


def mean_square(t, gated, x):
    return (t(x) - gated(x)).square().sum(-1).mean()


# ---------------------------------------------------------------------- what the fits minimise


@given(st.integers(0, 50), st.booleans(), st.sampled_from([F.silu, F.gelu, F.relu, torch.tanh]))
def test_each_neuron_is_a_weighted_regression(seed, biases, activation):
    gated, x = layer(seed, biases=biases, activation=activation), samples(400, 5, seed)
    found = approximate(gated, x, fit="neuron", **PLAIN)
    g, u = gated.branches(used(x))
    for h in range(gated.d_hidden):
        design = torch.stack([torch.ones_like(g[:, h]), g[:, h]], 1) * u[:, h, None]
        best = torch.linalg.lstsq(design, activation(g[:, h]) * u[:, h]).solution
        assert_close(torch.stack([found.intercept[h], found.slope[h]]), best, rtol=1e-8, atol=1e-9)


@given(st.integers(0, 50))
def test_all_neurons_are_a_least_squares_fit_of_the_output(seed):
    gated, x = layer(seed), samples(400, 5, seed)
    found = approximate(gated, x, fit="output", **PLAIN)
    g, u = gated.branches(used(x))
    # One row for each output of each input; columns: every neuron's a and b.
    design = torch.cat([u[:, None] * gated.out, (g * u)[:, None] * gated.out], -1).flatten(0, 1)
    target = ((gated.activation(g) * u) @ gated.out.T).flatten()
    best = torch.linalg.lstsq(design, target).solution
    least = (design @ best - target).square().mean()
    error = (design @ torch.cat([found.intercept, found.slope]) - target).square().mean()
    assert error <= least * (1 + 1e-4)  # the ridge of 1e-6 costs that


def test_each_fit_is_better_than_the_last():
    gated, x = layer(h=20, d_out=6), samples(4000, 5)
    errors = [
        mean_square(approximate(gated, x, fit=fit, **PLAIN).tensor, gated, used(x))
        for fit in ("neuron", "output", "refit")
    ]
    assert errors[0] > 1.01 * errors[1]
    assert errors[1] > 1.01 * errors[2]


def test_the_refitted_map_is_stationary():
    """With its a and b kept, no other output map or bias of the output does better."""
    gated, x = layer(h=6), samples(2000, 5)
    found = approximate(gated, x, fit="refit", **PLAIN).tensor
    left = F.linear(used(x), found.left, found.bias_left)
    hidden = left * F.linear(used(x), found.right, found.bias_right)
    design = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
    best = torch.linalg.lstsq(design, gated(used(x))).solution
    least = (design @ best - gated(used(x))).square().sum(-1).mean()
    assert least <= mean_square(found, gated, used(x)) <= 1.02 * least  # a and b moved last


# ---------------------------------------------------------------------- exact cases


@given(
    st.integers(0, 50),
    st.sampled_from(["neuron", "output", "refit"]),
    st.tuples(st.floats(-2, 2), st.floats(0.2, 2)),
)
def test_an_affine_activation_is_met_exactly(seed, fit, affine):
    a, b = affine
    gated, x = layer(seed, activation=lambda g: a + b * g), samples(300, 5, seed)
    for inputs in (x, (x.mean(0), torch.cov(x.T))):
        found = approximate(gated, inputs, fit=fit)  # and does not warn
        assert_close(found.tensor(x), gated(x), rtol=1e-7, atol=1e-7)
        assert found.variance_explained > 1 - 1e-12


def test_the_tensor_is_the_layer_with_affine_gates():
    gated, x = layer(), samples(300, 5)
    found = approximate(gated, x, fit="output", **QUIET)
    g, u = gated.branches(x)
    by_hand = ((found.intercept + found.slope * g) * u) @ gated.out.T + gated.bias_out
    assert_close(found.tensor(x), by_hand, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- Gaussian inputs


@pytest.mark.parametrize("activation", [F.silu, torch.sin])
def test_moments_by_quadrature_are_those_of_many_samples(activation):
    gated = layer(activation=activation, d_in=3, h=4)
    mean, factor = torch.tensor([0.3, -0.5, 0.1]).double(), samples(3, 3) / 2
    draw = torch.Generator().manual_seed(0)
    x = mean + torch.randn(400_000, 3, generator=draw, dtype=torch.float64) @ factor.T
    exact = _gaussian_moments(gated, mean, factor @ factor.T)
    sampled = _sample_moments(gated, x)
    for name, one, other in zip(exact._fields, exact, sampled, strict=True):
        scale = other.abs().max()
        assert_close(
            one / scale, other / scale, rtol=0, atol=0.02, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_moments_of_a_polynomial_are_exact():
    """act(g) = g^2: every moment is a Gaussian one of degree 5, by Wick's sum over pairings."""
    gated = layer(activation=torch.square, d_in=2, h=3, biases=False)
    cov = torch.tensor([[1.0, 0.4], [0.4, 0.7]]).double()
    found = _gaussian_moments(gated, torch.zeros(2).double(), cov)
    G, U = gated.gate, gated.up
    gg, gu, uu = G @ cov @ G.T, G @ cov @ U.T, U @ cov @ U.T
    j = range(3)
    # E[u_i g_j^2 u_j] = 2 E[u_i g_j] E[g_j u_j] + E[u_i u_j] E[g_j^2]
    want = torch.tensor(
        [[2 * gu[b, a] * gu[b, b] + uu[a, b] * gg[b, b] for b in j] for a in j]
    ).double()
    assert_close(found.cross[:3], want, rtol=1e-10, atol=1e-10)
    assert_close(found.cross[3:], torch.zeros(3, 3).double(), rtol=0, atol=1e-10)  # of odd degree
    # E[g_i u_i g_j u_j] by pairings
    want = gu.diagonal()[:, None] * gu.diagonal() + gg * uu + gu * gu.T
    assert_close(found.gram[3:, 3:], want, rtol=1e-10, atol=1e-10)


def test_gaussian_inputs_give_the_fit_of_many_gaussian_samples():
    gated, x = layer(h=10), torch.randn(60_000, 5).double() * 0.8 + 0.1
    sampled = approximate(gated, x, fit="output", **QUIET)
    moments = (x.mean(0), torch.cov(x.T))
    exact = approximate(gated, moments, fit="output", **QUIET)
    assert "4,096 Gaussian inputs" in exact.measured_on
    assert abs(sampled.variance_explained - exact.variance_explained) < 0.02
    best = mean_square(sampled.tensor, gated, x)
    assert mean_square(exact.tensor, gated, x) < 1.02 * best


# ---------------------------------------------------------------------- massive tokens and weights

PLANTED = [11, 402, 1500, 2801, 2990]  # three to fit on, two held out (the last 600)


def planted(n=3000, d=8, h=24):
    """A gated layer with a neuron that only a rare direction of the input excites, a thousandfold.

    Returns the layer, ordinary inputs, and the same with a few massive ones among them.
    """
    ordinary = layer(d_in=d, h=h, d_out=6, biases=False)
    gate, up, out = ordinary.gate / 2, ordinary.up / 2, ordinary.out
    gate[0], up[0], out[:, 0] = 0, 0, 300 * out[:, 1]
    gate[:, -1], up[:, -1] = 0, 0
    gate[0, -1], up[0, -1] = 3, 3
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64)
    x[:, -1] = 0
    y = x.clone()
    y[PLANTED, -1] = torch.linspace(3, 8, 5, dtype=torch.float64)
    return GatedLayer(gate, up, out, F.silu), x, y


@pytest.mark.parametrize("fit", ["neuron", "output", "refit"])
def test_massive_tokens_are_found_and_ordinary_ones_explained_as_well_as_without_them(fit):
    gated, x, with_massive = planted()
    without = approximate(gated, x, fit=fit, **QUIET)
    assert len(without.fidelity.massive) == 0
    found = approximate(gated, with_massive, fit=fit, **QUIET)
    massive = found.fidelity.massive
    assert massive.rows.tolist() == PLANTED
    assert massive.share > 0.99
    assert f"5 massive of 3,000 tokens carry {massive.share:.0%}" in str(massive)
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[PLANTED] = False
    assert found.fidelity.ordinary == pytest.approx(without.variance_explained, abs=0.01)
    assert found.fidelity.median == pytest.approx(without.fidelity.median, abs=0.01)
    want, got = (mean_square(one.tensor, gated, x[rest]) for one in (without, found))
    assert got == pytest.approx(want.item(), rel=0.01)


def test_what_one_number_hides():
    """Least squares over all tokens meets the massive ones and little else, and reports nearly 1."""
    gated, _, with_massive = planted()
    with pytest.warns(UserWarning, match=r"in the .*ordinary tokens|in the median token"):
        plain = approximate(gated, with_massive, fit="neuron", weights="equal")
    assert plain.fidelity.overall > 0.99
    assert plain.fidelity.ordinary < 0.9
    name, worst = plain.worst
    assert worst == min(plain.fidelity.scores().values())
    assert f"{worst:.1%} of {name}" in plain.tensor.output_space
    assert f"{worst:.1%} of {name}" in str(plain)
    table = plain.fidelity.to_pandas().set_index("of")["explained"]
    assert table["all tokens"] == plain.fidelity.overall
    assert table["token at 50%"] == table["the median token"]


def test_scores_are_what_they_say():
    gated, _, x = planted()
    found = approximate(gated, x, **QUIET)
    test = x[2400:]
    keep = torch.ones(600, dtype=torch.bool)
    keep[[401, 590]] = False
    y, wrong = gated(test), (gated(test) - found.tensor(test)).square().sum(-1)
    total = (y - y.mean(0)).square().sum()
    assert found.fidelity.overall == pytest.approx((1 - wrong.sum() / total).item(), abs=1e-9)
    centred = (y[keep] - y[keep].mean(0)).square().sum(-1)
    ordinary = 1 - wrong[keep].sum() / centred.sum()
    assert found.fidelity.ordinary == pytest.approx(ordinary.item(), abs=1e-9)
    each = sorted((1 - wrong[keep] / centred).tolist())
    assert found.fidelity.median == pytest.approx((each[298] + each[299]) / 2, abs=1e-9)


def test_a_group_that_is_not_explained_is_named():
    gated = layer(biases=False)
    calm, wild = samples(1000, 5) / 10, samples(500, 5, seed=3) * 3
    with pytest.warns(UserWarning, match=r"in the group 'wild' \(.*of all tokens"):
        found = approximate(
            gated, {"calm": calm, "wild": wild}, weights=(torch.arange(1500) < 800) * 1.0
        )
    assert found.worst[0] == "the group 'wild'"
    test = wild[400:]
    y = gated(test)
    want = 1 - (found.tensor(test) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert found.fidelity.groups["wild"] == pytest.approx(want.item(), abs=1e-9)
    assert found.measured_on == "300 held-out inputs"
    alone = approximate(gated, calm, **PLAIN)  # of the others, the weights are 0
    assert_close(found.tensor.left, alone.tensor.left, rtol=1e-8, atol=1e-10)


def test_worse_than_the_mean_says_so():
    gated, x = layer(activation=torch.sin, biases=False), samples(500, 5) * 20
    weight = torch.zeros(500, dtype=torch.float64)
    weight[:8] = 1  # too few to go by
    with pytest.warns(UserWarning, match=r"worse than the layer's mean.*fit='neuron' does that"):
        found = approximate(gated, x, fit="neuron", weights=weight)
    assert "(worse than the mean)" in str(found)


@given(st.integers(0, 20), st.sampled_from(["neuron", "output", "refit"]))
def test_a_weight_of_two_is_an_input_given_twice(seed, fit):
    gated, x = layer(seed), samples(300, 5, seed)
    weight = torch.ones(300, dtype=torch.float64)
    weight[:50] = 2
    twice = torch.cat([x[:50], x])  # 290 of them to fit on
    one = approximate(gated, x, fit=fit, weights=weight, **QUIET)
    other = approximate(gated, twice, fit=fit, weights="equal", held_out=60 / 350, **QUIET)
    assert_close(one.tensor(x), other.tensor(x), rtol=1e-6, atol=1e-6)


def test_weighed_by_token_the_small_outputs_count_too():
    gated, x = layer(biases=False), samples(2000, 5)
    x[::2] *= 4
    plain, by_token = (
        approximate(gated, x, weights=weights, **QUIET) for weights in ("equal", "token")
    )
    assert by_token.fidelity.median > plain.fidelity.median
    assert by_token.fidelity.overall < plain.fidelity.overall


# ---------------------------------------------------------------------- what comes out


def test_the_fidelity_is_that_of_inputs_the_fit_has_not_seen():
    gated, x = layer(h=12), samples(1000, 5)
    x[800:] *= 3  # the held-out share is another distribution
    found = approximate(gated, x, **QUIET)
    y = gated(x[800:])
    want = 1 - (found.tensor(x[800:]) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert found.variance_explained == pytest.approx(want.item(), abs=1e-10)
    assert found.measured_on == "200 held-out inputs"


def test_it_warns_below_the_level_and_says_what_to_do():
    gated, x = layer(activation=torch.sin), samples(500, 5) * 3
    with pytest.warns(UserWarning, match=r"explains .*% of the variance .*finetune"):
        approximate(gated, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        approximate(gated, x, warn_below=-10)


def test_results_say_that_they_are_of_an_approximation():
    gated, x = layer(), samples(500, 5)
    found = approximate(gated, x, output_space="blocks.0.hook_mlp_out", **QUIET)
    space = found.tensor.output_space
    assert space.startswith("blocks.0.hook_mlp_out (approximation of a silu layer, ")
    assert f"{found.variance_explained:.1%}" in space
    assert str(found).startswith("bilinear in place of silu: ")


def test_neurons_are_listed_by_their_error():
    gated, x = layer(), samples(500, 5)
    found = approximate(gated, x, fit="neuron", **QUIET)
    table = found.to_pandas()
    assert list(table.columns) == ["neuron", "intercept", "slope", "errors"]
    assert list(table["errors"]) == sorted(found.errors.tolist(), reverse=True)
    h, test = int(table["neuron"][0]), x[400:]
    g, u = gated.branches(test)
    alone = ((gated.activation(g) - found.intercept - found.slope * g) * u)[:, h, None] * gated.out[
        :, h
    ]
    variance = (gated(test) - gated(test).mean(0)).square().sum()
    assert table["errors"][0] == pytest.approx((alone.square().sum() / variance).item(), rel=1e-8)


def test_saved_and_loaded(tmp_path):
    found = approximate(layer(), samples(500, 5), input_space="here", **QUIET)
    found.save(tmp_path / "a.safetensors")
    again = Approximation.load(tmp_path / "a.safetensors")
    assert again.to_pandas().equals(found.to_pandas())
    assert again.tensor.input_space == "here"
    assert torch.equal(again.tensor.bias_left, found.tensor.bias_left)
    assert str(again) == str(found)
    found.tensor.save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="holds BilinearTensor, not Approximation"):
        Approximation.load(tmp_path / "t.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision(dtype):
    gated, x = layer(dtype=dtype), samples(2000, 5)
    found = approximate(gated, x.to(dtype), **QUIET)
    assert found.tensor.dtype == found.slope.dtype == torch.float32
    exact = approximate(gated.to(torch.float64), x.to(dtype).double(), **QUIET)
    assert_close(found.tensor.left.double(), exact.tensor.left, rtol=1e-5, atol=1e-5)


def test_neurons_that_never_move_are_no_trouble():
    gated = layer(biases=False)
    gated.gate[0], gated.up[1], gated.out[:, 2] = 0, 0, 0
    for fit in ("neuron", "output", "refit"):
        found = approximate(gated, samples(500, 5), fit=fit, **QUIET)
        assert torch.isfinite(found.tensor.out).all()
        assert found.variance_explained > 0.5


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (torch.randn(50, 4).double(), {}, ValueError, r"inputs must have shape \[\.\.\., 5\]"),
        (torch.randn(2, 5).double(), {}, ValueError, "2 inputs are too few to fit"),
        (
            torch.randn(50, 5).double(),
            {"fit": "best"},
            ValueError,
            "there are neuron, output, refit",
        ),
        (
            torch.randn(50, 5).double(),
            {"weights": "best"},
            ValueError,
            "unknown weights 'best'; there are ordinary, token, equal, or a tensor",
        ),
        (
            torch.randn(50, 5).double(),
            {"weights": torch.ones(49)},
            ValueError,
            r"weights must be 50 numbers of at least 0, one for each input, got \[49\]",
        ),
        (
            torch.randn(50, 5).double(),
            {"weights": torch.zeros(50)},
            ValueError,
            "leave no input to fit on",
        ),
        ({}, {}, ValueError, "inputs has no group"),
        (
            {"docs": torch.randn(2, 5).double()},
            {},
            ValueError,
            r"2 inputs\['docs'\] are too few",
        ),
        (torch.randn(50, 5).double(), {"held_out": 1.0}, ValueError, "between 0 and 1, got 1.0"),
        (
            torch.randn(50, 5).double() / 0,
            {},
            ValueError,
            "inputs has 250 NaN or infinite",
        ),
        (
            torch.randn(50, 5).double(),
            {"max_bytes": 100},
            MemoryError,
            "moments of 7 neurons .* use fit='neuron'",
        ),
        (
            (torch.zeros(5).double(), -torch.eye(5).double()),
            {},
            ValueError,
            "the covariance has a negative eigenvalue, -1",
        ),
        (
            (torch.zeros(5).double(), torch.zeros(5).double()),
            {},
            ValueError,
            r"a mean \[5\] and a covariance \[5, 5\], got \[5\] and \[5\]",
        ),
    ],
)
def test_bad_input(inputs, options, error, message, unchecked):
    with pytest.raises(error, match=message):
        approximate(layer(), inputs, **options)
    if error is MemoryError:
        approximate(layer(), inputs, fit="neuron", max_bytes=100, warn_below=-1e9)
