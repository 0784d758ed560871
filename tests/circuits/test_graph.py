"""Graphs of features over layers: against the interactions they come from and the model's own run."""

import networkx as nx
import pytest
import torch
from torch.testing import assert_close

from tests.circuits.building import TOKENS, VOCABULARY, D, model
from tests.features.building import sae
from tl_bilinear import Dictionary
from tl_bilinear.circuits import (
    FeatureCircuit,
    FeatureGraph,
    embedding,
    paths,
    through_head,
    unembedding,
)


@pytest.fixture(scope="module")
def circuit():
    made = {
        layer: sae(f"blocks.{layer}.hook_mlp_out", n=12, seed=layer, dtype="float64", k=6)
        for layer in (0, 1)
    }
    built = model(normalization_type="LN", positional_embedding_type="rotary")
    return FeatureCircuit(built, {**made, 2: unembedding(built)}, {"embed": embedding(built)})


def test_the_strongest_pairs_of_every_layer(circuit):
    graph = circuit.graph(10)
    assert graph.dictionaries == ["embed", "mlp 0", "mlp 1", "mlp 2"]
    assert len(graph.pairs) == 30
    assert bool((graph.coefficients.abs()[:-1] >= graph.coefficients.abs()[1:]).all())
    for layer in range(3):
        features = circuit.interactions[layer]
        assert features.inputs.n == VOCABULARY + 12 * layer
        every = features.interaction().dense()
        doubled = every.triu() * (2 - torch.eye(features.inputs.n, dtype=torch.float64))
        mine = graph.nodes[graph.pairs[:, 2], 0] == layer + 1
        expected = doubled.abs().flatten().topk(10).values
        assert_close(graph.coefficients[mine].abs(), expected)


def test_every_pair_is_the_entry_of_its_features(circuit):
    graph = circuit.graph(8)
    dense = {layer: f.interaction().dense() for layer, f in circuit.interactions.items()}
    for row, coefficient in zip(graph.pairs, graph.coefficients, strict=True):
        (db, b), (dc, c), (da, a) = graph.nodes[row].tolist()
        places = [("embed", i) for i in range(VOCABULARY)]
        places += [(f"mlp {layer}", i) for layer in range(da - 1) for i in range(12)]
        i, j = (places.index((graph.dictionaries[d], f)) for d, f in ((db, b), (dc, c)))
        entry = dense[da - 1][a, i, j]
        assert float(coefficient) == pytest.approx(float(entry) * (1 if i == j else 2))


def test_backward_from_targets(circuit):
    graph = circuit.graph(4, targets={2: [7, 3]})
    makes = {tuple(node) for node in graph.nodes[graph.pairs[:, 2]].tolist()}
    assert {(3, 7), (3, 3)} <= makes
    assert {feature for depth, feature in makes if depth == 3} == {3, 7}
    # Everything that is used and can be made is made, by its four strongest pairs.
    used = {tuple(node) for node in graph.nodes[graph.pairs[:, :2].flatten()].tolist()}
    assert {node for node in used if node[0] > 0} <= makes
    made = graph.nodes[graph.pairs[:, 2]].tolist()
    assert all(made.count(list(node)) == 4 for node in makes)
    top = circuit.interactions[2].top(7, 4)
    mine = graph.coefficients[[node == [3, 7] for node in made]]
    assert_close(mine.abs(), top.coefficients.abs())


def test_active_pairs_add_up_to_what_their_features_make(circuit):
    """All pairs into one feature: their sum is the quadratic form of what the active features write."""
    features = circuit.interactions[1]
    n, W_dec = features.inputs.n, features.input_directions
    _, cache = circuit.model.run_with_cache(TOKENS)
    with torch.no_grad():
        z = circuit.interactions[0].outputs.sae.encode(cache["blocks.0.hook_mlp_out"][0, 4])
        made = features.outputs.sae.encode(cache["blocks.1.hook_mlp_out"][0, 4])
    feature = int(made.argmax())
    graph = circuit.graph(n * (n + 1) // 2, targets={1: [feature]})
    there = circuit.prune(graph, TOKENS, 4)
    named = {(there.dictionaries[depth], index) for depth, index in there.nodes.tolist()}
    active = {("mlp 0", int(i)) for i in z.nonzero()[:, 0]}
    assert named == active | {("embed", int(TOKENS[4])), ("mlp 1", feature)}
    written = W_dec[TOKENS[4]] + z @ W_dec[VOCABULARY:]
    x = written / cache["blocks.1.ln2.hook_scale"][0, 4]
    whole = features.interaction(feature, basis="activations").quadratic(x)
    mine = there.nodes[there.pairs[:, 2], 0] == 2
    assert float(there.contributions[mine].sum()) == pytest.approx(float(whole), rel=1e-9)


def test_pruned_contributions_match_paths(circuit):
    """Token with token at layer 0, whose contribution `paths` has under another name."""
    token = int(TOKENS[4])
    features = circuit.interactions[0]
    made = features.outputs.sae
    _, cache = circuit.model.run_with_cache(TOKENS)
    active = made.encode(cache["blocks.0.hook_mlp_out"][0, 4]).nonzero()[:, 0]
    feature = int(active[0])
    n = features.inputs.n
    graph = circuit.graph(n * (n + 1) // 2, targets={0: [feature]})
    there = circuit.prune(graph, TOKENS, 4)
    assert there.position == 4
    assert there.nodes.tolist() == [[0, token], [1, feature]]
    found = paths(circuit.model, TOKENS, 0, features.directions[feature], 4)
    assert float(there.contributions[0]) == pytest.approx(float(found.quadratic[0, 0]), rel=1e-9)
    assert there.to_pandas()["contribution"][0] == float(there.contributions[0])


def test_a_graph_at_a_token_is_the_strongest_of_every_active_pair(circuit):
    targets = {1: [int(circuit.activations(TOKENS, 4)[0]["mlp 1"].argmax())]}
    n = circuit.interactions[1].inputs.n
    every = circuit.prune(circuit.graph(n * (n + 1) // 2, targets), TOKENS, 4)
    whole = circuit.graph_at(TOKENS, 4, len(every.pairs), targets)
    assert whole.nodes.tolist() == every.nodes.tolist()
    assert {tuple(pair) for pair in whole.pairs.tolist()} == {
        tuple(pair) for pair in every.pairs.tolist()
    }
    assert_close(whole.contributions, every.contributions)
    assert_close(whole.activations, every.activations)
    some = circuit.graph_at(TOKENS, 4, 3, targets)
    made = some.nodes[some.pairs[:, 2]].tolist()
    (target,) = [node for node in made if node[0] == 2][:1]
    assert made.count(target) == 3
    used = {tuple(node) for node in some.nodes[some.pairs[:, :2].flatten()].tolist()}
    assert {node for node in used if node[0] == 1} <= {tuple(node) for node in made}
    mine = every.nodes[every.pairs[:, 2], 0] == 2
    assert_close(
        some.contributions[some.nodes[some.pairs[:, 2], 0] == 2], every.contributions[mine][:3]
    )
    assert some.position == 4


def test_what_a_graph_at_a_token_leads_to(circuit):
    with pytest.raises(ValueError, match=r"name the features .* targets=\{2: \[\.\.\.\]\}"):
        circuit.graph_at(TOKENS)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        circuit.graph_at(TOKENS, k=0, targets={2: [5]})
    found = circuit.graph_at(TOKENS, k=2, targets={2: [5]})
    assert {(3, 5)} == {
        node for node in map(tuple, found.nodes[found.pairs[:, 2]].tolist()) if node[0] == 3
    }
    built = circuit.model
    some = {layer: circuit.interactions[layer].outputs for layer in (0, 1)}
    lower = FeatureCircuit(built, some, {"embed": embedding(built)})
    by_default = lower.graph_at(TOKENS, 4)
    most = int(lower.activations(TOKENS, 4)[0]["mlp 1"].argmax())
    made = by_default.nodes[by_default.pairs[:, 2]].tolist()
    assert [2, most] in made
    assert all(feature == most for depth, feature in made if depth == 2)
    rows = torch.randn(4, D, dtype=torch.float64)
    blind = FeatureCircuit(built, {0: rows, 1: some[1]})
    with pytest.raises(ValueError, match="'mlp 0' has directions but no activations"):
        blind.graph_at(TOKENS)


def test_networkx_and_graphml(circuit, tmp_path):
    graph = circuit.graph(5)
    made = graph.networkx()
    features = [n for n, data in made.nodes(data=True) if data["kind"] == "feature"]
    assert len(features) == len(graph.labels)
    assert made.number_of_nodes() == len(features) + len(graph.pairs)
    assert nx.is_directed_acyclic_graph(made)
    for name, data in made.nodes(data=True):
        inputs = {"self": 1, "cross": 2}.get(data["kind"])
        if inputs:
            assert made.in_degree(name) == inputs
            assert made.out_degree(name) == 1
    graph.to_graphml(tmp_path / "x.graphml")
    read = nx.read_graphml(tmp_path / "x.graphml")
    assert dict(read.nodes) == dict(made.nodes)
    assert dict(read.edges) == dict(made.edges)
    assert [p.name for p in tmp_path.iterdir()] == ["x.graphml"]
    pruned = circuit.prune(circuit.graph(2000), TOKENS)
    pruned.to_graphml(tmp_path / "y.graphml")
    contributions = nx.get_node_attributes(nx.read_graphml(tmp_path / "y.graphml"), "contribution")
    assert len(contributions) == len(pruned.pairs) > 0
    with pytest.raises(FileNotFoundError, match="the folder"):
        graph.to_graphml(tmp_path / "nowhere" / "x.graphml")


def test_a_graph_with_nothing_active(circuit):
    graph = circuit.prune(circuit.graph(1, targets={0: [0]}), TOKENS)
    empty = graph if len(graph.pairs) == 0 else graph._choose(torch.tensor([], dtype=torch.long))
    assert len(empty.to_pandas()) == 0
    assert empty.networkx().number_of_nodes() == 0
    assert empty.labels == []


def test_nothing_half_written(circuit, tmp_path, monkeypatch):
    def fails(graph, path):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nx, "write_graphml", fails)
    with pytest.raises(KeyboardInterrupt):
        circuit.graph(1).to_graphml(tmp_path / "x.graphml")
    assert not list(tmp_path.iterdir())


def test_top_storage_and_table(circuit, tmp_path):
    graph = circuit.graph(6)
    few = graph.top(3)
    assert few.to_pandas().equals(graph.to_pandas().head(3))
    assert set(few.labels) == set(
        few.to_pandas()[["first", "second", "makes"]].to_numpy().flatten()
    )
    few.save(tmp_path / "graph")
    assert FeatureGraph.load(tmp_path / "graph").to_pandas().equals(few.to_pandas())
    with pytest.raises(ValueError, match="k must lie between 1 and 18"):
        graph.top(19)


def test_sources_enter_only_what_comes_after_them():
    built = model(positional_embedding_type="rotary")
    late = through_head(built, embedding(built), 1, 0)
    rows = torch.randn(4, D, dtype=torch.float64)
    circuit = FeatureCircuit(built, {0: rows, 2: rows}, {"embed": embedding(built), "by 1.0": late})
    assert circuit.interactions[0].inputs.n == VOCABULARY
    assert circuit.interactions[2].inputs.n == 2 * VOCABULARY + 4
    assert repr(circuit) == (
        f"FeatureCircuit(features embed: {VOCABULARY}, by 1.0: {VOCABULARY}, mlp 0: 4, mlp 2: 4; "
        f"layers read: [0, 2])"
    )
    graph = circuit.graph(300, targets={2: [0]})
    with pytest.raises(ValueError, match="has directions but no activations"):
        circuit.prune(graph, TOKENS)


def test_bad_requests(circuit):
    built = model()
    rows = torch.randn(4, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"nothing is upstream of the layers \[1\]"):
        FeatureCircuit(built, {1: rows})
    with pytest.raises(IndexError, match="layer 3 does not exist"):
        FeatureCircuit(built, {3: rows})
    with pytest.raises(ValueError, match="a source cannot be called 'mlp 1'"):
        FeatureCircuit(built, {1: rows}, {"mlp 1": embedding(built)})
    with pytest.raises(ValueError, match="does not write into the residual stream"):
        FeatureCircuit(built, {1: rows}, {"x": Dictionary(rows, hook="blocks.0.mlp.hook_in")})
    with pytest.raises(ValueError, match=r"no interactions at layer 5: there are at \[0, 1, 2\]"):
        circuit.graph(3, targets={5: [0]})
    with pytest.raises(IndexError, match="output features are 0 to 11"):
        circuit.graph(3, targets={1: [99]})
    with pytest.raises(IndexError, match="position 9 does not exist"):
        circuit.prune(circuit.graph(2), TOKENS, 9)
    other = FeatureCircuit(built, {0: rows, 1: rows})
    with pytest.raises(ValueError, match="the graph is of mlp 0, mlp 1, this circuit of embed"):
        circuit.prune(other.graph(2), TOKENS)
