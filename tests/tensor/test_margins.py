"""What k eigenpairs prove: never more than is true, in any metric, and what each metric is for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tensor.reference import random_tensor
from tl_bilinear.tensor.margins import (
    MarginSpectrum,
    euclidean_metric,
    margin_spectrum,
    moment_metric,
    proved_accuracy,
    proving_metric,
)
from tl_bilinear.tensor.moments import InputMoments

f64 = torch.float64
seeds = st.integers(0, 2**16)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def classifier(d=10, h=7, classes=4, seed=0, biases=True):
    return random_tensor(d, h, classes, biases, seed)


def inputs(seed=1, n=400, d=10):
    """Inputs that vary much along some directions and little along others."""
    return normal(seed, n, d) * torch.logspace(0.5, -1.5, d, dtype=f64) + 0.3


def metric_of(t, x, kind):
    moments = InputMoments.of(x)
    return {
        "euclidean": lambda: euclidean_metric(t),
        "euclidean, centred": lambda: euclidean_metric(t, x.mean(0)),
        "data": lambda: moment_metric(t, moments, power=1.0, ridge=0.1, centred=False),
        "between": lambda: moment_metric(t, moments),
        "proving": lambda: proving_metric(t, moments, 3, steps=5),
    }[kind]()


KINDS = ["euclidean", "euclidean, centred", "data", "between", "proving"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "h"), [(10, 7), (14, 4)])
def test_bounds_hold_and_are_exact_when_all_is_kept(kind, d, h):
    t, x = classifier(d, h), inputs(d=d)
    logits = t(x)
    margins = logits[:, :, None] - logits[:, None, :]
    other = ~torch.eye(4, dtype=torch.bool)
    metric = metric_of(t, x, kind)
    r = len(metric.map)
    assert r == min(d, 2 * h)
    last = torch.zeros(())
    for k in (1, 3, r // 2, r):
        known = margin_spectrum(t, k, metric)
        bounds = known.bounds(x)
        assert (bounds[:, other] <= margins[:, other] + 1e-12).all()
        proved = known.answers(x)
        assert (proved[proved >= 0] == logits.argmax(1)[proved >= 0]).all()
        assert (proved >= 0).sum() >= last
        last = (proved >= 0).sum()
    assert_close(bounds[:, other], margins[:, other], rtol=1e-5, atol=1e-5)
    assert last > 0.99 * len(x)


@given(seeds, st.integers(1, 9), st.booleans())
def test_bounds_hold_for_any_input_and_metric(seed, k, biases):
    """Far from the inputs that the metric was made of, too."""
    t = classifier(seed=seed, biases=biases)
    moments = InputMoments.of(normal(seed + 1, 12, 10))
    metric = moment_metric(t, moments, power=0.7, ridge=0.2)
    x = normal(seed + 3, 50, 10) * 10 ** normal(seed + 4, 50, 1)
    logits = t(x)
    margins = logits[:, :, None] - logits[:, None, :]
    other = ~torch.eye(4, dtype=torch.bool)
    bounds = margin_spectrum(t, k, metric).bounds(x)
    assert (bounds <= margins + 1e-10)[:, other].all()


def test_the_tail_is_attained():
    """The bound is the best that two numbers allow: an input along the extreme dropped pair meets it."""
    t = classifier(6, 6, 2, biases=False)
    known = margin_spectrum(t, 2)
    whole = margin_spectrum(t, 6)
    dropped = whole.values[0, 2:]
    worst = int(dropped.argmin()) + 2
    x = (whole.vectors[0, worst] @ whole.metric.map)[None]
    margin = t(x)[0, 0] - t(x)[0, 1]
    assert dropped.min() < 0
    assert_close(known.bounds(x)[0, 0, 1], margin, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_top_is_what_a_smaller_k_gives(kind):
    t, x = classifier(), inputs()
    metric = metric_of(t, x, kind)
    first, second = margin_spectrum(t, 6, metric).top(2), margin_spectrum(t, 2, metric)
    assert_close(first.bounds(x), second.bounds(x))
    assert_close(first.lower, second.lower)
    assert first.numbers == second.numbers
    assert first.k == 2


def test_metrics_meet_at_their_ends():
    t, x = classifier(), inputs()
    moments = InputMoments.of(x)
    plain, flat = euclidean_metric(t), moment_metric(t, moments, power=0.0)
    assert_close(flat.map.T @ flat.map, plain.map.T @ plain.map)
    for centred in (False, True):
        data = moment_metric(t, moments, power=1.0, ridge=0.0, centred=centred)
        # In the data's metric every direction has energy one on average, around 0 or the mean.
        assert_close(data(x).square().mean(0), torch.ones(len(data.map), dtype=f64))
        assert bool(data.centre.any()) is centred


def charge(t, x, metric, k):
    """What the tail is charged on average over inputs and pairs, measured."""
    known = margin_spectrum(t, k, metric)
    z = metric(x)
    rest = [z.square().sum(1) - (z @ v.T).square().sum(1) for v in known.vectors]
    both = torch.maximum(known.lower, known.upper)
    return float(torch.stack([r.mean() * b for r, b in zip(rest, both, strict=True)]).mean())


def test_the_proving_metric_lowers_what_it_says():
    t, x = classifier(16, 12), inputs(d=16)
    moments = InputMoments.of(x)
    start = proving_metric(t, moments, 4, steps=0, centred=False)
    found = proving_metric(t, moments, 4, steps=30, centred=False)
    plain = charge(t, x, euclidean_metric(t), 4)
    assert charge(t, x, found, 4) < 0.95 * charge(t, x, start, 4)
    assert charge(t, x, found, 4) < 0.95 * plain


def test_numbers_are_counted_from_what_is_read():
    t = classifier(6, 6, 3, biases=False)  # the span is everything: the map is the identity
    known = margin_spectrum(t, 2)
    assert known.numbers == 3 * (2 + 2 * 6 + 2) + 3
    t = classifier(10, 3, 3)
    known = margin_spectrum(t, 2, euclidean_metric(t, normal(0, 10)))
    assert known.numbers == 3 * (2 + 2 * 6 + 2) + 3 * 10 + 3 + 6 * 10 + 10


def test_proved_accuracy_by_k():
    t, x = classifier(), inputs()
    labels = t(x).argmax(1)
    labels[:100] = (labels[:100] + 1) % 4
    found = proved_accuracy(t, x, labels, (10, 2, 5))
    assert found.k.tolist() == [2, 5, 10]
    assert found.accuracy == 0.75
    assert (found.proved.diff() >= 0).all()
    assert found.proved[-1] > 0.74
    known = margin_spectrum(t, 5)
    assert_close(found.proved[1].item(), float((known.answers(x) == labels).double().mean()))
    assert list(found.to_pandas().columns) == ["k", "proved", "numbers"]


def test_float32_and_float64_agree():
    t, x = classifier(), inputs()
    exact = margin_spectrum(t, 5).answers(x)
    single = margin_spectrum(t.to(torch.float32), 5).answers(x.float())
    assert (exact == single).double().mean() > 0.99


def test_a_spectrum_is_saved(tmp_path):
    t, x = classifier(), inputs()
    known = margin_spectrum(t, 3, metric_of(t, x, "between"))
    known.save(tmp_path / "known.safetensors")
    loaded = MarginSpectrum.load(tmp_path / "known.safetensors")
    assert torch.equal(loaded.answers(x), known.answers(x))


def test_bad_input(unchecked):
    t, x = classifier(), inputs()
    moments = InputMoments.of(x)
    with pytest.raises(ValueError, match="k must lie between 1 and 10"):
        margin_spectrum(t, 11)
    with pytest.raises(ValueError, match="k must lie between 1 and 3"):
        margin_spectrum(t, 3).top(4)
    with pytest.raises(ValueError, match="the metric is of 10 inputs, the layer of 6"):
        margin_spectrum(classifier(6), 2, euclidean_metric(t))
    with pytest.raises(ValueError, match="power and ridge lie between 0 and 1"):
        moment_metric(t, moments, power=1.5)
    with pytest.raises(
        ValueError, match=r"the moments are of 4 inputs .*, the classifier reads 10"
    ):
        moment_metric(t, InputMoments.of(x[:, :4]))
    with pytest.raises(TypeError, match=r"moments must be InputMoments, .* got Tensor"):
        moment_metric(t, x.T @ x)
    with pytest.raises(ValueError, match="their trace is 0"):
        moment_metric(t, InputMoments.of(torch.ones_like(x)))
    with pytest.raises(ValueError, match=r"the moments are of 10 inputs .hook_in., .* .pixels."):
        moment_metric(replace(t, input_space="pixels"), InputMoments.of(x, space="hook_in"))
    with pytest.raises(ValueError, match="x must have shape"):
        margin_spectrum(t, 2).bounds(x[:, :3])
    with pytest.raises(ValueError, match="labels must be"):
        proved_accuracy(t, x, torch.zeros(3, dtype=torch.long), (2,))
