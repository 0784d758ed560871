"""Moments of populations of tokens, and the terms chosen by them, each against a slow obvious way."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.features.building import N_OUT, model, sae
from tl_bilinear import BilinearTensor, FeatureInteractions
from tl_bilinear.features import FeatureTerms, TermNames, streaming
from tl_bilinear.features.fitted import fitted_terms
from tl_bilinear.tensor import InputMoments

LAYER = "blocks.1"
OUTPUT = f"{LAYER}.hook_mlp_out"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 23, (24, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def f():
    return FeatureInteractions(
        model(),
        1,
        sae(f"{LAYER}.hook_resid_mid", dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64"),
    )


@pytest.fixture(scope="module")
def run(f, tokens):
    return f.run(tokens, batch_size=5, progress=False)


@pytest.fixture(scope="module")
def seen(f, tokens):
    """What the layer reads [tokens, d], and which features are active, of the tokens that count."""
    _, cache = f.model.run_with_cache(tokens)
    x = cache[f"{LAYER}.mlp.hook_in"][:, 1:].flatten(0, 1)
    return x, f.outputs.sae.encode(cache[OUTPUT])[:, 1:].flatten(0, 1) != 0


def assert_moments(found, x):
    assert found.count == len(x)
    assert_close(found.mean, x.mean(0))
    assert_close(found.second, x.T @ x / len(x))


def test_moments_are_those_of_the_population_asked_for(f, run, seen, tokens):
    x, on = seen
    busy = on.sum(0).topk(3).indices
    assert_moments(run.moments(), x)
    assert_moments(run.moments(int(busy[0])), x[on[:, busy[0]]])
    for feature, found in zip(busy, run.moments(busy, progress=False), strict=True):
        assert_moments(found, x[on[:, feature]])
        assert str(int(feature)) in found.population
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[3, 4:] = True
    mask[5, 0] = True  # does not count
    found = run.moments(mask=mask, population="a row")
    assert (found.count, found.population) == (8, "a row")
    assert found.space == f.layer_tensor.input_space
    metric = found.metric(0.3)
    f.layer_tensor.interaction(f.directions[0]).eigh(2, metric=metric)


def test_moments_stream_and_merge(f, run, tokens):
    busy = run.low_rank_correlation(1, progress=False).counts.topk(2).indices
    whole = f.moments(tokens, batch_size=5, progress=False)
    assert_close(whole.second, run.moments().second)
    parts = [f.moments(part, progress=False) for part in tokens.split(10)]
    assert_close(InputMoments.merged(parts).second, whole.second)
    for streamed, held in zip(
        f.moments(tokens, busy, progress=False), run.moments(busy, progress=False), strict=True
    ):
        assert_close(streamed.second, held.second)


def test_a_stopped_stream_goes_on(f, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_SAVE_EVERY", -1.0)
    path = tmp_path / "sums.safetensors"
    forward, calls = f.model.run_with_cache, []

    def stops(*args, **options):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **options)

    monkeypatch.setattr(f.model, "run_with_cache", stops)
    with pytest.raises(KeyboardInterrupt):
        f.moments(tokens, batch_size=5, checkpoint=path, progress=False)
    found = f.moments(tokens, batch_size=5, checkpoint=path, progress=False)
    assert sum(calls) == len(tokens) + 5  # the batch that was stopped ran again, no other
    assert_close(found.second, f.moments(tokens, progress=False).second)
    again = f.moments(tokens, batch_size=5, checkpoint=path, progress=False)
    assert_close(again.second, found.second)
    with pytest.raises(ValueError, match="belongs to other text"):
        f.moments(tokens[:5], checkpoint=path, progress=False)


def test_populations_that_are_refused(f, run, tokens, unchecked):
    with pytest.raises(ValueError, match="none was given or chosen"):
        run.moments(mask=torch.zeros_like(tokens, dtype=torch.bool))
    with pytest.raises(ValueError, match="not both"):
        run.moments(3, mask=torch.ones_like(tokens, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boolean tensor of shape \[24, 12\]"):
        run.moments(mask=torch.ones(2, 2, dtype=torch.bool))
    never = int(run.low_rank_correlation(1, progress=False).counts.argmin())
    if not int(run.low_rank_correlation(1, [never], progress=False).counts[0]):
        with pytest.raises(ValueError, match=f"output feature {never} is active in this text"):
            run.moments(never)
    with pytest.raises(MemoryError, match="fewer features"):
        f.moments(tokens, list(range(20)), max_bytes=1000, progress=False)


# ---------------------------------------------------------------------- terms


def test_terms_are_eigenpairs_in_the_metric_of_the_population(f, run, seen):
    x, on = seen
    busy = on.sum(0).topk(2).indices.tolist()
    layer = BilinearTensor.from_model(f.model, 1)
    for row, feature in enumerate(busy):
        form = layer.interaction(f.directions[feature])
        active = x[on[:, feature]]
        for metric, moments in (("all", InputMoments.of(x)), ("active", InputMoments.of(active))):
            expected = form.eigh(3, metric=moments.metric(0.2))
            found = run.terms(3, busy, metric=metric, ridge=0.2, progress=False)
            assert_close(found.values[row], expected.values)
            assert_close(found.activations(x)[:, row], expected.activations(x))
        ordered = form.eigh().ordered("covariance", active).top(2)
        found = run.terms(2, busy, by="covariance", progress=False)
        assert_close(found.activations(x)[:, row], ordered.activations(x))


def test_correlation_is_of_terms_fitted_elsewhere(f, run, seen, tmp_path):
    first, second = run[:12], run[12:]
    busy = seen[1].sum(0).topk(2).indices.tolist()
    found = second.low_rank_correlation(
        2, busy, metric="active", by="fit", fit=first, progress=False
    )
    terms = first.terms(2, busy, metric="active", by="fit", progress=False)
    x, on = second.x[second.mask], second.activations(busy)[second.mask] != 0
    p = second.preactivations(busy)[second.mask]
    for row in range(2):
        approximation = terms.activations(x[on[:, row]])[:, row].sum(-1)
        expected = torch.corrcoef(torch.stack([p[on[:, row], row], approximation]))[0, 1]
        assert_close(found.active[row, 1], expected, rtol=1e-7, atol=1e-7)
    terms.save(tmp_path / "terms")
    assert torch.equal(FeatureTerms.load(tmp_path / "terms").vectors, terms.vectors)
    assert list(terms.to_pandas()["feature"]) == busy
    metric = first.moments().metric(0.1)
    given = second.low_rank_correlation(2, busy, metric=metric, progress=False)
    alike = second.low_rank_correlation(2, busy, metric="all", ridge=0.1, fit=first, progress=False)
    assert_close(given.active, alike.active)


def test_choices_that_are_refused(run, unchecked):
    with pytest.raises(ValueError, match="fit="):
        run.low_rank_correlation(1, [0], metric="active")
    with pytest.raises(ValueError, match='give metric="active"'):
        run.terms(1, [0], by="fit")
    with pytest.raises(ValueError, match="euclidean, all, active"):
        run.terms(1, [0], metric="mine")
    with pytest.raises(ValueError, match="by must be one of"):
        run.terms(1, [0], by="size")


def test_terms_are_named_by_what_they_read_and_what_that_looks_like(f, run, seen, tmp_path):
    x, on = seen
    busy = on.sum(0).topk(2).indices.tolist()
    labelled = run.labelled(progress=False)
    terms = labelled.terms(3, busy, metric="active", progress=False)
    found = labelled.term_names(terms, 4, progress=False)
    # Slowly: the layer reads (r @ matrix) / s, so features reach it along d @ matrix, over s.
    z = (run.activations(side="input") / run.scale)[run.mask]
    rows = f.passage.map(f.input_directions)
    for row, feature in enumerate(busy):
        for term in range(3):
            w = terms.vectors[row, term]
            reading = x @ w
            sign = float(torch.sign(reading[on[:, feature]].mean()))
            cosines = sign * torch.cosine_similarity(rows, w[None], dim=1)
            by_token = torch.stack(
                [torch.corrcoef(torch.stack([reading, one]))[0, 1] for one in z.T]
            )
            by_token = sign * by_token.nan_to_num()
            for index, values, expected in (
                (found.filters, found.cosines, cosines),
                (found.patterns, found.correlations, by_token),
            ):
                assert_close(values[row, term].abs(), expected.abs().topk(4).values)
                assert_close(values[row, term], expected[index[row, term]])
    assert found.tokens == int(run.mask.sum())
    read, alike = found.words(0, 0)
    best = int(found.filters[0, 0, 0])
    assert read.startswith(
        f"“{labelled.features.inputs.labels[best]}” {found.cosines[0, 0, 0]:+.2f}, "
    )
    assert found.to_pandas()["looks_like"].iloc[0] == alike
    found.save(tmp_path / "names")
    assert TermNames.load(tmp_path / "names").to_pandas().equals(found.to_pandas())


def test_the_nearest_input_feature_is_the_one_that_is_active_alike(run, seen):
    busy = seen[1].sum(0).topk(3).indices.tolist()
    found = run.nearest_inputs(busy, progress=False)
    z = (run.activations(side="input") / run.scale)[run.mask]
    y = run.activations(busy)[run.mask]
    for row in range(3):
        pairs = [torch.corrcoef(torch.stack([y[:, row], one]))[0, 1] for one in z.T]
        expected = torch.stack(pairs).nan_to_num().max(0)
        assert int(found.nearest[row]) == int(expected.indices)
        assert_close(found.correlations[row], expected.values)
    assert found.tokens == len(z)
    assert list(found.to_pandas()["feature"]) == busy
    assert list(run.nearest_inputs(progress=False).features) == list(range(N_OUT))


def test_a_term_of_too_few_tokens_has_no_name(run, seen):
    never = int(seen[1].sum(0).argmin())
    assert int(seen[1][:, never].sum()) < 2
    terms = run.terms(1, [never], metric="active", progress=False)
    assert run.term_names(terms, progress=False).words(0, 0) == ("active on too few tokens",) * 2


def test_names_that_are_refused(run, unchecked):
    terms = run.terms(1, [0], progress=False)
    with pytest.raises(ValueError, match="n must"):
        run.term_names(terms, 0)
    narrow = replace(terms, vectors=terms.vectors[..., :3])
    with pytest.raises(ValueError, match=r"read 3 coordinates, .* has 16"):
        run.term_names(narrow)


@pytest.fixture(scope="module")
def planted():
    """A form of rank 5 whose third eigenvalue makes most of what varies, and inputs [600, 12]."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.double)).Q[:5]
    values = torch.tensor([3.0, -2.0, 1.0, 0.5, 0.2], dtype=torch.double)
    x = torch.randn(600, 12, generator=generator, dtype=torch.double)
    x = x + 4 * torch.randn(600, 1, generator=generator, dtype=torch.double) * basis[2]
    return (basis.T * values) @ basis, x, basis


def test_the_fitted_term_is_the_one_that_varies(planted):
    form, x, basis = planted
    value, vector = fitted_terms(form, x, 1)
    assert float((vector[0] @ basis[2]).abs()) > 0.98
    assert float(value) == pytest.approx(1.0, abs=0.2)
    f = ((x @ form) * x).sum(-1)

    def left(v, w):
        return float((f - v * (x @ w).square()).var() / f.var())

    best = left(value[0], vector[0])
    eigen = torch.linalg.eigh(form)
    assert best < min(
        left(a, b) for a, b in zip(eigen.eigenvalues, eigen.eigenvectors.T, strict=True)
    )


def test_fitted_terms_leave_less_and_less(planted):
    form, x, _ = planted
    f = ((x @ form) * x).sum(-1)
    values, vectors = fitted_terms(form, x, 5)
    assert_close(vectors.norm(dim=-1), torch.ones(5, dtype=torch.double))
    left = f - ((x @ vectors.T).square() * values).cumsum(-1).T
    shares = (left.var(-1) / f.var()).tolist()
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.02
    # Without inputs the closed form alone decides; scale of x does not matter.
    alone = fitted_terms(form, x, 1, samples=0.0)[1]
    assert float((alone @ vectors[:1].T).abs()) > 0.97
    scaled = fitted_terms(form, 10 * x, 1)
    assert_close(scaled[0], values[:1], rtol=1e-4, atol=0)


def test_the_variance_under_the_normal_distribution_is_as_sampled(planted):
    """The closed form that `fitted` relies on, against samples."""
    form, x, _ = planted
    mean, covariance = x.mean(0) + 0.5, torch.cov(x.T)
    draws = torch.randn(400_000, 12, dtype=torch.double) @ torch.linalg.cholesky(covariance).T
    values = (((draws + mean) @ form) * (draws + mean)).sum(-1)
    through = form @ covariance
    closed = 2 * (through @ through).trace() + 4 * mean @ form @ covariance @ form @ mean
    assert float(values.var() / closed) == pytest.approx(1, rel=0.05)


def test_terms_that_are_refused():
    eye = torch.eye(3, dtype=torch.double)
    with pytest.raises(ValueError, match="at least 2"):
        fitted_terms(eye, eye[:1], 1)
    with pytest.raises(ValueError, match="ridge lies above 0"):
        fitted_terms(eye, eye, 1, ridge=0.0)
    with pytest.raises(ValueError, match="do not vary"):
        fitted_terms(eye, torch.ones(4, 3, dtype=torch.double), 1)
