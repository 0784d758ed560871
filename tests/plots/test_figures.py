"""Figures show the numbers of their results, and compute none."""

from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch

from tests.circuits.building import TOKENS, model
from tests.features.building import sae
from tl_bilinear import BilinearTensor, Dictionary, FeatureInteractions, plots
from tl_bilinear.hooks import EigenComponents, loss_added, verify
from tl_bilinear.plots.decompositions import both_ends
from tl_bilinear.plots.style import NEGATIVE, POSITIVE, headline, rounded, sized
from tl_bilinear.tensor import (
    InputRegion,
    Metric,
    change_bounds,
    cp,
    hosvd,
    spectrum,
    truncation_change,
)

SIZE = (6, 5)


@pytest.fixture(scope="module")
def tensor():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 12, 30, generator=generator, dtype=torch.float64)
    return BilinearTensor(left, right, torch.randn(4, 12, generator=generator).double())


@pytest.fixture(scope="module")
def eigen(tensor):
    return tensor.interaction().eigh()


def texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def test_numbers_keep_seven_digits():
    assert rounded(torch.tensor([[1 / 3, -2e-9 / 3]]).double()) == [[0.3333333, -6.666667e-10]]
    assert rounded([]) == []


def title_lines(figure):
    """The title's lines, which fit the figure when a letter takes half the size of its font."""
    title, width = figure.layout.title, figure.layout.width
    lines = title.text.split("<br>")
    assert all(len(each) * title.font.size / 2 <= width - 2 * title.pad.l for each in lines)
    return lines


def test_a_title_is_broken_where_the_figure_ends():
    for text in ("one line", "many words " * 20, "x" * 300, "", "a break<br>" + "and more " * 30):
        figure = sized(go.Figure(), 400, 300, title=text)
        lines = title_lines(figure)
        assert "".join(lines).replace(" ", "") == text.replace("<br>", "").replace(" ", "")
        more = headline(text, 400)[1]
        assert more == 20 * (len(lines) - 1)
        assert (figure.layout.height, figure.layout.margin.t) == (300 + more, 40 + more)


def test_eigenvalues(eigen):
    figure = plots.eigenvalues_figure(eigen, names="abcd")
    assert [trace.name for trace in figure.data] == list("abcd")
    for trace, values in zip(figure.data, eigen.values, strict=True):
        assert list(trace.y) == pytest.approx(
            values.sort(descending=True).values.tolist(), rel=1e-5
        )
    assert len(plots.eigenvalues_figure(eigen[0]).data) == 1


def test_eigenvectors_of_one_matrix(eigen):
    figure = plots.eigenvectors_figure(eigen[1], SIZE, k=3)
    pictures = [trace for trace in figure.data if trace.type == "heatmap"]
    values = eigen[1].values
    ends = [*values.topk(3).values.tolist(), *values.topk(3, largest=False).values.tolist()]
    assert [text for text in texts(figure) if text] == [f"λ = {value:+.3f}" for value in ends]
    best = eigen[1].vectors[values.argmax()].reshape(SIZE)
    shown = torch.tensor(pictures[0].z).double().flip(0)  # plotly draws upwards
    assert torch.allclose(shown, best / best.abs().max(), atol=0.006)


def test_eigenvectors_of_several_matrices_are_one_row_each(eigen):
    figure = plots.eigenvectors_figure(eigen, SIZE, k=2, names=["a", "b", "c", "d"])
    assert figure.data[0].type == "image"
    captions = texts(figure)[:16]
    assert captions[4:6] == [f"{value:+.2f}" for value in eigen.values[1].topk(2).values.tolist()]
    assert texts(figure)[16:20] == ["a", "b", "c", "d"]


def test_filters_stand_beside_their_patterns(eigen):
    with pytest.raises(ValueError, match="filters and patterns differ in a metric"):
        plots.filters_figure(eigen, SIZE)
    x = torch.randn(50, eigen.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1:] += x[:, :-1]  # neighbours vary together
    metric = Metric.of_samples(x, 0.1)
    weighted = replace(eigen, metric=metric)
    figure = plots.filters_figure(weighted, SIZE, k=1, names=["a", "b", "c", "d"])
    assert texts(figure).count("filter 1") == texts(figure).count("pattern 1") == 1
    same = plots.filters_figure(replace(eigen, metric=Metric.of_samples(x, 1.0)), SIZE, k=1)
    assert figure.data[0].source != same.data[0].source


def test_eigenvectors_of_other_coordinates(eigen):
    figure = plots.eigenvectors_figure(eigen[0], k=2)
    (trace,) = figure.data
    assert len(trace.z) == 4
    best = eigen[0].vectors[eigen[0].values.argmax()]
    assert list(trace.z[0]) == pytest.approx(best.tolist())
    with pytest.raises(ValueError, match=r"shows one matrix, and these are \[4\]"):
        plots.eigenvectors_figure(eigen)
    with pytest.raises(ValueError, match="5x5 have 25 pixels, but the eigenvectors have 30"):
        plots.eigenvectors_figure(eigen, (5, 5))


def test_both_ends_are_ordered_by_sign():
    values = torch.tensor([0.2, -0.5, 3.0, -0.1, 0.0])
    tiles, captions = both_ends(values, torch.eye(5), 3)
    assert captions == ["+3.00", "+0.20", "", "-0.50", "-0.10", ""]
    assert tiles[[0, 1, 3, 4]].argmax(1).tolist() == [2, 0, 1, 3]
    assert tiles[[2, 5]].isnan().all()


def test_pairs(tensor):
    found = tensor.interaction(torch.ones(4).double()).top(9)
    (trace,) = plots.pairs_figure(found, k=5, labels=[f"n{i}" for i in range(30)]).data
    assert list(trace.x) == pytest.approx(found.coefficients[:5].tolist())
    colors = [POSITIVE if value >= 0 else NEGATIVE for value in trace.x]
    assert list(trace.marker.color) == colors
    with pytest.raises(ValueError, match=r"of one matrix, and these are of \[4\]"):
        plots.pairs_figure(tensor.interaction().top(3))


def test_spectrum(tensor):
    found = spectrum(tensor, torch.eye(4).double(), k=3)
    *heads, share = plots.spectrum_figure(found).data
    for rank, trace in enumerate(heads):
        assert list(trace.y) == pytest.approx(found.values[:, rank].tolist())
    assert list(share.y) == pytest.approx(found.share.tolist())


def test_hosvd_and_cp(tensor):
    found = hosvd(tensor, 3)
    values, weights = plots.hosvd_figure(found, names="abcd").data
    assert list(values.x) == pytest.approx(found.values.tolist())
    assert torch.allclose(torch.tensor(weights.z).double(), found.vectors, atol=1e-5)
    neurons = cp(tensor, 3, restarts=1, steps=5)
    bars, out = plots.cp_figure(neurons).data
    assert list(bars.x) == pytest.approx(neurons.weights.tolist())
    assert torch.allclose(torch.tensor(out.z).double(), neurons.out.T, atol=1e-4)
    pictures = plots.cp_figure(neurons, SIZE, names="abcd")
    strongest = neurons.out[:, 0].abs().argmax()
    does = "raises" if neurons.out[strongest, 0] > 0 else "lowers"
    first = texts(pictures)[2]  # after two row names
    assert first.split("<br>")[0] == f"{does} {'abcd'[strongest]}"
    assert first.count("<br>") == 2


# ---------------------------------------------------------------------- a layer of a language model


@pytest.fixture(scope="module")
def built():
    return model()


def test_verification_and_loss(built):
    u = torch.randn(built.cfg.d_model, dtype=torch.float64)
    eigen = BilinearTensor.from_model(built, 1).interaction(u).eigh(3)
    components = EigenComponents(eigen, 1)
    rows = TOKENS.reshape(1, -1) if TOKENS.ndim == 1 else TOKENS
    found = verify(built, rows, components, progress=False)
    _, points, errors, controls = plots.verification_figure(found).data
    assert list(points.x) == found.predicted.flatten().tolist()
    assert list(points.y) == found.measured.flatten().tolist()
    assert list(errors.y) == pytest.approx(found.error.flatten().tolist())
    assert list(controls.y) == pytest.approx(found.control_error.flatten().tolist())
    added = loss_added(
        built, rows.expand(2, -1), {"a": components.ablate(), "b": components.ablate(0)},
        progress=False,
    )  # fmt: skip
    (trace,) = plots.loss_added_figure(added).data
    assert list(trace.x) == pytest.approx(added.difference.tolist())


def test_dictionaries(built):
    d = built.cfg.d_model
    points = {"mlp_in": "blocks.1.mlp.hook_in", "mlp_out": "blocks.1.hook_mlp_out"}
    saes = [
        sae(hook, n=20, k=6, seed=i, d=d, dtype="float64") for i, hook in enumerate(points.values())
    ]
    features = FeatureInteractions(built, 1, *saes)
    statistics = features.statistics(3)
    cross, own, eigenvalues, random = plots.statistics_figure(statistics).data
    assert torch.tensor([y or 0.0 for y in cross.y]).sum() == pytest.approx(1)
    assert torch.tensor([y or 0.0 for y in own.y]).sum() == pytest.approx(1)
    assert list(eigenvalues.y) == statistics.eigenvalues.tolist()
    assert list(random.y) == statistics.reference.tolist()
    submatrix = features.submatrix(3, 4)
    (trace,) = plots.submatrix_figure(submatrix).data
    assert torch.allclose(torch.tensor(trace.z).double(), submatrix.matrix, atol=1e-4)
    found = features.run(TOKENS.reshape(-1), progress=False).attribute(3)
    pairs, terms = plots.attribution_figure(found, 5).data
    assert list(pairs.x) == pytest.approx(found.to_pandas(5)["contribution"].tolist())
    assert sum(terms.x) == pytest.approx(found.total, rel=1e-4)
    swept = features.sweep(k=2, progress=False)
    (trace,) = plots.feature_sweep_figure(swept).data
    assert list(trace.y) == pytest.approx(swept.share.tolist())
    assert not replace(statistics, self_values=statistics.self_values * 0 + 1e9).self_shares.any()


def test_long_labels_are_cut_in_titles_and_numbers_stay(built):
    d = built.cfg.d_model
    points = {"mlp_in": "blocks.1.mlp.hook_in", "mlp_out": "blocks.1.hook_mlp_out"}
    saes = [
        Dictionary.of(
            sae(hook, n=20, k=6, seed=i, d=d, dtype="float64"),
            labels=["a label that somebody wrote as a sentence, " * 9 + f"{j}" for j in range(20)],
        )
        for i, hook in enumerate(points.values())
    ]
    features = FeatureInteractions(built, 1, *saes)
    run = features.run(TOKENS.reshape(-1), progress=False)
    attribution = run.attribute(3)
    figures = [
        plots.submatrix_figure(features.submatrix(3, 4)),
        plots.statistics_figure(features.statistics(3)),
        plots.geometry_figure(features.geometry(3, 4)),
        plots.scatter_figure(run.scatter(3, k=2, progress=False)),
        plots.ranked_pairs_figure(run.ranked_pairs(3)),
        plots.effects_figure(run.effects(3, around="all")),
        plots.attribution_figure(attribution),
    ]
    for figure in figures:
        text = " ".join(title_lines(figure))
        assert text.startswith("output feature 3 a label that somebody wrote")
        assert len(text) < 180
    assert text.endswith(f"pre-activation {attribution.measured:+.3f}")


def test_bounds_on_changes_stand_above_what_was_measured(tensor):
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = truncation_change(tensor, tensor.interaction(torch.eye(4).double()).eigh(3))
    found = change_bounds(change, [InputRegion.ball(30, 1.0).holding(x)], x)
    figure = plots.change_bounds_figure(found, names="abcd")
    bound, measured, typical = (list(trace.y) for trace in figure.data)
    assert bound == pytest.approx(found.bound[0].tolist(), rel=1e-5)
    assert measured == pytest.approx(found.measured.tolist(), rel=1e-5)
    assert all(a > b > c for a, b, c in zip(bound, measured, typical, strict=True))
    assert figure.data[0].name == f"bound: {found.regions[0]}"
