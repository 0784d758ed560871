"""Figures show the numbers of their results."""

import pytest
import torch

from tests.circuits.building import DIRECTION, TOKENS, D, model
from tl_bilinear import Dictionary
from tl_bilinear.circuits import FeatureCircuit, embedding, paths
from tl_bilinear.plots import graph_figure, paths_figure


def test_paths_figure():
    found = paths(model(), TOKENS, 1, DIRECTION, 3)
    heatmap, bars = paths_figure(found, 5).data
    strongest = found.shares.abs().topk(5).indices.sort().values
    assert list(heatmap.x) == list(heatmap.y) == list(bars.y)
    assert list(bars.y) == [found.labels[i] for i in strongest]
    assert list(bars.x) == pytest.approx(found.shares[strongest].tolist())
    assert heatmap.z[0][1] == pytest.approx(float(found.quadratic[strongest[0], strongest[1]]))
    assert len(paths_figure(found, 1000).data[1].x) == len(found.labels)


def test_graph_figure():
    built = model(positional_embedding_type="rotary")
    rows = torch.randn(4, D, dtype=torch.float64)
    circuit = FeatureCircuit(built, {0: rows, 1: rows}, {"embed": embedding(built)})
    graph = circuit.graph(6)
    figure = graph_figure(graph)
    *lines, pairs, features = figure.data
    assert len(lines) == len(pairs.x) == len(graph.pairs) == 12
    assert list(features.hovertext) == graph.labels
    widths = torch.tensor([line.line.width for line in lines])
    assert bool((widths[:-1] >= widths[1:]).all())
    blue = [line.line.color == "#2166ac" for line in lines]
    assert blue == [value >= 0 for value in graph.coefficients.tolist()]
    assert list(figure.layout.xaxis.ticktext) == ["embed", "mlp 0", "mlp 1"]
    assert set(figure.data[-1].textposition) == {"middle left", "top center", "middle right"}


def test_names_of_a_graph_are_cut_to_the_room_beside_it():
    built = model(positional_embedding_type="rotary")
    rows = torch.randn(4, D, dtype=torch.float64)
    named = Dictionary.of(rows, labels=[f"{'long ' * 20}{i}" for i in range(4)])
    figure = graph_figure(FeatureCircuit(built, {0: named}, {"embed": embedding(built)}).graph(3))
    assert all(len(name) <= 26 for name in figure.data[-1].text)
    first, last = figure.layout.xaxis.range
    assert -first == pytest.approx(last - 1)
    assert -first > 0.7  # of the way to the next column: 190 pixels of 220
