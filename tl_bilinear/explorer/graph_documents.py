"""Graphs of features over layers, as documents of a bundle, one a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tl_bilinear.circuits import FeatureGraph
from tl_bilinear.explorer.documents import Document, Panel, Read, packed
from tl_bilinear.features.examples import Side
from tl_bilinear.io import digest_of


def graph_panel(
    graphs: FeatureGraph | Mapping[str, FeatureGraph],
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    name: str = "graph",
    links: Mapping[str, tuple[str, Side]] | None = None,
) -> Panel:
    """A panel of pairs of features across layers: a graph, or several to choose from, by name.

    Parameters
    ----------
    graphs: of `FeatureCircuit`: `graph`, `prune` or `graph_at`
    facts: what else is to be said of the model, by name
    name: of the panel, the beginning of its documents' names
    links: where features of a dictionary have a page: ``{"mlp 3": ("language", "output")}``, the name
        of a language panel on the same page and the side

    Raises ValueError without a graph, and for a link to no side.
    """
    if isinstance(graphs, FeatureGraph):
        graphs = {_called(graphs): graphs}
    if not graphs:
        raise ValueError("a panel of graphs needs at least one, got none")
    for dictionary, (_, side) in (links or {}).items():
        if side not in ("input", "output"):
            raise ValueError(
                f"the link of {dictionary!r} leads to the side 'input' or 'output' of a panel, "
                f"got {side!r}"
            )
    manifest = {
        "kind": "graph",
        "name": name,
        "title": title,
        "facts": dict(facts or {}),
        "graphs": list(graphs),
        "links": {dictionary: list(place) for dictionary, place in (links or {}).items()},
    }
    made = {f"{name}-graph-{i}": _maker(graph) for i, graph in enumerate(graphs.values())}
    numbers = {
        f"{i}.{part}": getattr(graph, part)
        for i, graph in enumerate(graphs.values())
        for part in ("nodes", "pairs", "coefficients", "contributions", "activations")
        if getattr(graph, part) is not None
    }
    said = [
        [graph.dictionaries, graph.labels, graph.position, graph.approximation]
        for graph in graphs.values()
    ]
    return Panel(manifest, made, digest_of(numbers, {"said": said, "manifest": manifest}))


def _called(graph: FeatureGraph) -> str:
    return "from weights" if graph.position is None else f"at token {graph.position}"


def _maker(graph: FeatureGraph) -> Callable[[Read], Document]:
    return lambda read: graph_document(graph)


def graph_document(graph: FeatureGraph) -> Document:
    """A graph as a document; its labels are names alone, without dictionary and number."""
    labels = [
        label.removeprefix(f"{graph.dictionaries[depth]}: {feature}").lstrip()
        for label, (depth, feature) in zip(graph.labels, graph.nodes.tolist(), strict=True)
    ]
    found: Document = {
        "dictionaries": list(graph.dictionaries),
        "nodes": packed(graph.nodes),
        "labels": labels,
        "pairs": packed(graph.pairs),
        "coefficients": packed(graph.coefficients),
    }
    if graph.contributions is not None:
        found["contributions"] = packed(graph.contributions)
    if graph.activations is not None:
        found["activations"] = packed(graph.activations)
    if graph.position is not None:
        found["position"] = graph.position
    if graph.approximation is not None:
        found["approximation"] = graph.approximation
    return found
