"""A graph of features over layers: which pairs of earlier features make which later one.

A bilinear layer joins *two* inputs to an output: ``coefficient * z_first z_second`` adds to the output
feature. So a pair is a node of its own: first -> pair <- second, pair -> the feature it makes (a
self-interaction has one input). From weights alone the strongest pairs are taken, layer by layer or
backward from chosen features; on a prompt, those whose features are active there.

>>> circuit = FeatureCircuit(model, {0: sae_0, 2: sae_2}, {"embed": embedding(model)})
>>> graph = circuit.graph(20, targets={2: [1882]})       # from weights
>>> there = circuit.prune(graph, tokens, position=7)     # what of it is active, with contributions
>>> circuit.graph_at(tokens, position=7)                 # the strongest of all that is active there
>>> there.to_graphml("circuit.graphml")

Everything is along the direct path through the residual stream (a source of `through_head` adds a path
through that head), and holds up to the norm's scale, which only a prompt has. Graphs are written as
GraphML, not as the JSON of circuit-tracer's viewer: its links join one feature to one feature and have
no place for pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.circuits.residual import EMBED, direct_path, reaches
from tl_bilinear.circuits.upstream import as_tokens
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.interactions import FeatureInteractions
from tl_bilinear.features.module_names import placed
from tl_bilinear.features.pairs import FeaturePairs
from tl_bilinear.features.passage import refuse_attached, residual_passage
from tl_bilinear.hooks.points import LayerTensor
from tl_bilinear.io import whole_file
from tl_bilinear.results import Result
from tl_bilinear.tensor import approximation_note

if TYPE_CHECKING:
    import networkx
    import pandas


@dataclass(frozen=True, eq=False)
class FeatureGraph(Result):
    """Features of several dictionaries and the pairs between them, strongest pair first.

    Attributes
    ----------
    dictionaries: their names, upstream first
    nodes: [n, 2], the number of a node's dictionary and its feature in that
    labels: [n] names
    pairs: [m, 3], nodes (first, second, made): the first two make the third; equal for self-interactions
    coefficients: [m], what stands before ``z_first z_second``, up to ``1 / s^2``
    contributions: [m], ``coefficient z_first z_second / s^2`` on a prompt; None from weights alone
    activations: [n], of the nodes on the prompt; NaN for output directions that have none
    position: the token's, None for weights alone
    approximation: which layers are approximations, of what and how well; None for exact ones
    """

    _finite = ("coefficients",)

    dictionaries: list[str]
    nodes: Int[Tensor, "n 2"]
    labels: list[str]
    pairs: Int[Tensor, "m 3"]
    coefficients: Float[Tensor, " m"]
    contributions: Float[Tensor, " m"] | None = None
    activations: Float[Tensor, " n"] | None = None
    position: int | None = None
    approximation: str | None = None

    @property
    def strengths(self) -> Float[Tensor, " m"]:
        """What pairs are ordered by: contributions where there are any, coefficients otherwise."""
        return self.coefficients if self.contributions is None else self.contributions

    def top(self, k: int) -> FeatureGraph:
        """The k strongest pairs and the features that they join."""
        checks.require_count("k", k, max(1, len(self.pairs)), "the pairs of the graph")
        return self._choose(torch.arange(len(self.pairs))[:k])

    def _choose(self, kept: Tensor) -> FeatureGraph:
        """The graph of some pairs, strongest first; its nodes by dictionary and feature."""
        kept = kept[self.strengths[kept].abs().argsort(descending=True, stable=True)]
        used = self.pairs[kept].unique()
        used = used[
            [i for i, _ in sorted(enumerate(self.nodes[used].tolist()), key=lambda n: n[1])]
        ]
        places = torch.empty(len(self.nodes), dtype=torch.long)
        places[used] = torch.arange(len(used))
        return FeatureGraph(
            self.dictionaries,
            self.nodes[used],
            [self.labels[i] for i in used.tolist()],
            places[self.pairs[kept]],
            self.coefficients[kept],
            None if self.contributions is None else self.contributions[kept],
            None if self.activations is None else self.activations[used],
            self.position,
            self.approximation,
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: first, second and what they make (labels), kind, coefficient, contribution."""
        import pandas as pd

        columns: dict[str, list[Any]] = {}
        for name, index in zip(("first", "second", "makes"), self.pairs.T.tolist(), strict=True):
            columns[name] = [self.labels[i] for i in index]
        columns["kind"] = ["self" if b == c else "cross" for b, c, _ in self.pairs.tolist()]
        columns["coefficient"] = self.coefficients.tolist()
        if self.contributions is not None:
            columns["contribution"] = self.contributions.tolist()
        return pd.DataFrame(columns)

    def networkx(self) -> networkx.DiGraph:
        """A directed graph of feature nodes and pair nodes.

        Feature nodes have `kind` ("feature"), `dictionary`, `depth`, `feature` and `label`; pair nodes
        `kind` ("self" or "cross") and `coefficient`; on a prompt also `activation` and `contribution`.
        Edges carry the pair's strength as `weight`.
        """
        import networkx as nx

        graph = nx.DiGraph()
        if self.approximation is not None:
            graph.graph["approximation"] = self.approximation
        names = []
        for i, (depth, feature) in enumerate(self.nodes.tolist()):
            names.append(f"{self.dictionaries[depth]}/{feature}")
            data = {
                "kind": "feature",
                "dictionary": self.dictionaries[depth],
                "depth": depth,
                "feature": feature,
                "label": self.labels[i],
            }
            if self.activations is not None:
                data["activation"] = float(self.activations[i])
            graph.add_node(names[-1], **data)
        for i, (b, c, a) in enumerate(self.pairs.tolist()):
            name = f"{names[b]} x {names[c]} -> {names[a]}"
            data = {
                "kind": "self" if b == c else "cross",
                "coefficient": float(self.coefficients[i]),
            }
            if self.contributions is not None:
                data["contribution"] = float(self.contributions[i])
            graph.add_node(name, **data)
            for source, target in dict.fromkeys(
                [(names[b], name), (names[c], name), (name, names[a])]
            ):
                graph.add_edge(source, target, weight=float(self.strengths[i]))
        return graph

    def to_graphml(self, path: str | Path) -> None:
        """Write `networkx()` as GraphML (Gephi, Cytoscape, yEd, networkx), whole or not at all.

        Raises FileNotFoundError for a folder that does not exist.
        """
        import networkx as nx

        graph = nx.relabel_nodes(self.networkx(), _readable)
        for _, data in graph.nodes(data=True):
            data |= {name: _readable(v) for name, v in data.items() if isinstance(v, str)}
        with whole_file(path) as temporary:
            nx.write_graphml(graph, temporary)


_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _readable(text: str) -> str:
    """A label without the characters that XML cannot hold; each becomes its escape."""
    return _NOT_XML.sub(lambda found: ascii(found[0])[1:-1], text)


class FeatureCircuit:
    """Dictionaries of several layers' outputs, each read through those upstream of it.

    Parameters
    ----------
    model: a bilinear HookedTransformer or TransformerBridge; with `layer_tensors` a gated one
    outputs: layer to SAE, transcoder, Dictionary or matrix [n, d_model]
        Features of a layer's output, at ``hook_mlp_out`` or ``mlp.hook_out`` (a bare matrix is taken
        to be there). Read as `FeatureInteractions` reads outputs; they write along the decoder.
    sources: name to dictionary, optional
        What else is upstream: `embedding(model)`, `through_head(...)`, SAEs on the residual stream
        (which hold what others wrote before them: their pairs say it again). Each enters the layers
        that come after it.
    layer_tensors: layer to BilinearTensor or Approximation, optional
        What stands for a layer instead of reading it from the model, as in `FeatureInteractions`.

    Attributes
    ----------
    interactions: layer to FeatureInteractions, for the layers that have something upstream

    Raises ValueError where a dictionary does not fit its layer, or nothing is upstream of any layer.
    """

    def __init__(
        self,
        model: Any,
        outputs: Mapping[int, Any],
        sources: Mapping[str, Any] | None = None,
        *,
        layer_tensors: Mapping[int, LayerTensor] = {},
    ) -> None:
        self.model = model
        layers = len(model.blocks)
        for layer in outputs:
            if not 0 <= layer < layers:
                raise IndexError(f"layer {layer} does not exist: there are {layers}, from 0")
        self._written = {
            name: placed(model, Dictionary.of(source)) for name, source in (sources or {}).items()
        }
        self._depth = dict(zip(self._written, range(len(self._written)), strict=True))
        self.interactions: dict[int, FeatureInteractions] = {}
        self._upstream: dict[int, list[str]] = {}
        for layer in sorted(outputs):
            name = layer_name(layer)
            if name in self._written:
                raise ValueError(
                    f"a source cannot be called {name!r}: that is layer {layer}'s output"
                )
            own = _at_output(placed(model, Dictionary.of(outputs[layer])), layer)
            found = [each for each in self._written if reaches(model, self._written[each], layer)]
            if found:
                inputs = direct_path(model, layer, *(self._written[each] for each in found))
                self.interactions[layer] = FeatureInteractions(
                    model, layer, inputs, outputs[layer], layer_tensor=layer_tensors.get(layer)
                )
                self._upstream[layer] = found
            self._written[name] = own
            self._depth[name] = len(self._depth)
        if not self.interactions:
            raise ValueError(
                f"nothing is upstream of the layers {sorted(outputs)}: give outputs of two layers, or "
                f"sources such as {{'embed': embedding(model)}}"
            )

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {d.n}" for name, d in self._written.items())
        note = f"; {self.approximation}" if self.approximation else ""
        return f"FeatureCircuit(features {parts}; layers read: {list(self.interactions)}{note})"

    @property
    def approximation(self) -> str | None:
        """Which of the layers read are approximations, of what and how well."""
        notes = {n: approximation_note(one.layer_tensor) for n, one in self.interactions.items()}
        return "; ".join(f"layer {n}: {note}" for n, note in notes.items() if note) or None

    @property
    def names(self) -> list[str]:
        """Names of all dictionaries, sources first, then ``mlp L`` by layer."""
        return list(self._written)

    # ------------------------------------------------------------------ from weights

    def graph(
        self, k: int = 20, targets: Mapping[int, Sequence[int]] | None = None
    ) -> FeatureGraph:
        """The strongest pairs, from weights alone.

        Parameters
        ----------
        k: int
            Pairs of each layer over all its output features, or, with targets, of each feature met.
        targets: layer to features, optional
            Go backward from these: the k pairs of each, then those of the features in them, and so on.

        Raises ValueError for a target layer that has nothing upstream, IndexError for a feature that
        does not exist.
        """
        return self._backward(targets, lambda layer, features: self._strongest(layer, k, features))

    def _backward(
        self,
        targets: Mapping[int, Sequence[int]] | None,
        strongest: Callable[[int, dict[int, None] | None], FeaturePairs],
    ) -> FeatureGraph:
        """Layer by layer, last first: the strongest pairs of the targets, then of what is in them.

        `strongest` gives the pairs of a layer's chosen features, or with None over all of them.
        """
        rows: list[tuple[int, int, int]] = []
        values: list[Tensor] = []
        index: dict[tuple[str, int], int] = {}

        def node(name: str, feature: int) -> int:
            return index.setdefault((name, feature), len(index))

        wanted: dict[int, dict[int, None]] = {}
        for layer, features in (targets or {}).items():
            if layer not in self.interactions:
                raise ValueError(
                    f"no interactions at layer {layer}: there are at {list(self.interactions)}"
                )
            wanted[layer] = dict.fromkeys(int(f) for f in features)
        for layer in sorted(self.interactions, reverse=True):
            pairs = strongest(layer, None if targets is None else wanted.get(layer, {}))
            values.append(pairs.coefficients.detach().flatten().cpu())
            numbers = (pairs.first, pairs.second, pairs.features)
            for b, c, a in zip(*(each.flatten().tolist() for each in numbers), strict=True):
                inputs = [self._place(layer, i) for i in (b, c)]
                rows.append((node(*inputs[0]), node(*inputs[1]), node(layer_name(layer), a)))
                for name, feature in inputs:
                    earlier = self._layer_of.get(name)
                    if targets is not None and earlier is not None:
                        wanted.setdefault(earlier, {})[feature] = None
        return FeatureGraph(
            self.names,
            torch.tensor([(self._depth[name], f) for name, f in index]).reshape(-1, 2),
            [f"{name}: {self._written[name].label(f)}" for name, f in index],
            torch.tensor(rows, dtype=torch.long).reshape(-1, 3),
            torch.cat(values),
            approximation=self.approximation,
        )._choose(torch.arange(len(rows)))

    def _strongest(self, layer: int, k: int, features: dict[int, None] | None) -> FeaturePairs:
        """The k strongest pairs of a layer: of each chosen feature [m, k], or over all [k]."""
        found = self.interactions[layer]
        n = found.inputs.n
        most = n * (n + 1) // 2
        if features is None:
            return found.top_overall(min(k, most * found.outputs.n))
        return found.top(torch.tensor(list(features), dtype=torch.long), min(k, most))

    def _place(self, layer: int, index: int) -> tuple[str, int]:
        """Which (dictionary, feature) an input of a layer's interactions is."""
        for name in self._upstream[layer]:
            if index < self._written[name].n:
                return name, index
            index -= self._written[name].n
        raise AssertionError("an input beyond all dictionaries")

    @property
    def _layer_of(self) -> dict[str, int]:
        return {layer_name(layer): layer for layer in self.interactions}

    # ------------------------------------------------------------------ on a prompt

    @torch.no_grad()
    def activations(
        self, tokens: Tensor | str, position: int = -1
    ) -> tuple[dict[str, Tensor | None], dict[int, float]]:
        """Activations [n] of every dictionary at one token, and the norm's scale of every layer.

        Token embeddings are active (1) for the token that is there. None for directions that have no
        activation (a matrix, a source through a head).

        Raises IndexError for a position that does not exist.
        """
        refuse_attached(self.model)
        rows = as_tokens(self.model, tokens)
        length = rows.shape[1]
        if not -length <= position < length:
            raise IndexError(f"position {position} does not exist: the prompt has {length} tokens")
        scales = {
            layer: residual_passage(self.model, layer).scale_hook for layer in self.interactions
        }
        hooks = {hook for hook in scales.values() if hook is not None}
        for found in self._written.values():
            if found.encode is not None:
                hooks |= {hook for hook in (found.hook, found.encoder_hook) if hook is not None}
        _, cache = self.model.run_with_cache(
            rows, names_filter=lambda name: name in hooks, return_type=None
        )

        def active(found: Dictionary) -> Tensor | None:
            if found.encode is not None and found.hook is not None:
                source = found.encoder_hook
                reads = None if source in (None, found.hook) else cache[source][0, position]
                return found.read(cache[found.hook][0, position], reads).coefficients
            if found.hook == EMBED:
                one_hot = torch.zeros(found.n, dtype=found.decoder.dtype)
                one_hot[rows[0, position]] = 1
                return one_hot
            return None

        return (
            {name: active(found) for name, found in self._written.items()},
            {
                layer: 1.0 if hook is None else float(cache[hook][0, position])
                for layer, hook in scales.items()
            },
        )

    def prune(self, graph: FeatureGraph, tokens: Tensor | str, position: int = -1) -> FeatureGraph:
        """The pairs of a graph whose features are active at a token, with their contributions.

        A contribution ``coefficient z_first z_second / s^2`` is exact: the pair adds that much to the
        product of the layer's output with the feature's direction. Output features that have no
        activation (a matrix of directions) are kept.

        Raises ValueError for a graph of other dictionaries, and for inputs that have no activations.
        """
        if graph.dictionaries != self.names:
            raise ValueError(
                f"the graph is of {', '.join(graph.dictionaries)}, this circuit of "
                f"{', '.join(self.names)}"
            )
        found, scales = self.activations(tokens, position)
        length = as_tokens(self.model, tokens).shape[1]
        return self._there(graph, found, scales, position % length)

    def _there(
        self,
        graph: FeatureGraph,
        found: dict[str, Tensor | None],
        scales: dict[int, float],
        position: int,
    ) -> FeatureGraph:
        """`prune`, with the `activations` of a position."""
        inputs = set(graph.pairs[:, :2].flatten().tolist())
        z = torch.full((len(graph.labels),), torch.nan, dtype=graph.coefficients.dtype)
        for i, (depth, feature) in enumerate(graph.nodes.tolist()):
            active = found[self.names[depth]]
            if active is not None:
                z[i] = float(active[feature])
            elif i in inputs:
                raise ValueError(_no_activations(self.names[depth]))
        b, c, a = graph.pairs.unbind(1)
        by_name = {layer_name(layer): scale for layer, scale in scales.items()}
        made_at = [by_name[self.names[depth]] for depth in graph.nodes[a, 0].tolist()]
        s = torch.tensor(made_at, dtype=z.dtype)
        contributions = graph.coefficients * z[b] * z[c] / s.square()
        kept = (z[b] != 0) & (z[c] != 0) & (z[a] != 0)
        return FeatureGraph(
            **{
                **vars(graph),
                "contributions": contributions,
                "activations": z,
                "position": position,
            }
        )._choose(kept.nonzero()[:, 0])

    @torch.no_grad()
    def graph_at(
        self,
        tokens: Tensor | str,
        position: int = -1,
        k: int = 20,
        targets: Mapping[int, Sequence[int]] | None = None,
    ) -> FeatureGraph:
        """The pairs that contribute most at a token, of all whose features are active there.

        Exhaustive where `prune` takes from a graph: few features are active, so all their pairs are
        looked at.

        Parameters
        ----------
        k: int
            Pairs of each feature: of the targets, then of the features in their pairs, and so on back.
        targets: layer to features, optional
            By default the most active feature of the last layer that is read. Features that are not
            active make nothing.

        Raises ValueError for inputs that have no activations, and without targets where the last
        layer's output has none.
        """
        checks.require_positive("k", k)
        found, scales = self.activations(tokens, position)
        if targets is None:
            last = max(self.interactions)
            made = found[layer_name(last)]
            if made is None:
                raise ValueError(
                    f"{layer_name(last)!r} has directions but no activations: name the features that "
                    f"the graph is to lead to, targets={{{last}: [...]}}"
                )
            targets = {last: [int(made.argmax())]}

        def strongest(layer: int, features: dict[int, None] | None) -> FeaturePairs:
            parts = []
            for name in self._upstream[layer]:
                active = found[name]
                if active is None:
                    raise ValueError(_no_activations(name))
                parts.append(active)
            numbers = torch.tensor(list(features or ()), dtype=torch.long)
            return _pairs_among(self.interactions[layer], numbers, torch.cat(parts), k)

        length = as_tokens(self.model, tokens).shape[1]
        return self._there(self._backward(targets, strongest), found, scales, position % length)


def _pairs_among(
    found: FeatureInteractions, features: Int[Tensor, " m"], z: Float[Tensor, " n"], k: int
) -> FeaturePairs:
    """Of each feature the k pairs of active inputs with the largest ``coefficient z z`` [m, k]."""
    active = z.nonzero()[:, 0]
    first, second = torch.triu_indices(len(active), len(active))
    rows = found.input_directions[active]
    entries = found.interaction(features, basis="activations").fold(rows).dense()
    values = entries[:, first, second]
    alike = z[active[first]] * z[active[second]] * torch.where(first == second, 1, 2)
    best = (values * alike.to(values)).abs().topk(min(k, len(first)), dim=1).indices
    return FeaturePairs(
        features[:, None].expand_as(best),
        active[first][best],
        active[second][best],
        values.gather(1, best),
    )


def _no_activations(name: str) -> str:
    return (
        f"{name!r} has directions but no activations, so that a graph with its features has no "
        f"contributions on a prompt; `paths` takes heads on a prompt apart"
    )


def layer_name(layer: int) -> str:
    """What the output dictionary of a layer is called in a graph."""
    return f"mlp {layer}"


def _at_output(found: Dictionary, layer: int) -> Dictionary:
    """An output dictionary with the hook where its decoder writes."""
    if found.hook is not None:
        return found
    return Dictionary(**{**vars(found), "hook": f"blocks.{layer}.hook_mlp_out"})
