// Pairs of features across layers: which of them are shown, and where.

import { BundleError, load, unpack, type Numbers, type Packed } from "../lib/bundle";

export interface Node {
  depth: number;
  feature: number;
  label: string;
  /** On a prompt; NaN for directions that have none. */
  activation: number | null;
}

export interface Pair {
  /** Nodes; equal for a self-interaction. */
  first: number;
  second: number;
  made: number;
  coefficient: number;
  contribution: number | null;
}

export interface Graph {
  dictionaries: string[];
  nodes: Node[];
  pairs: Pair[];
  /** Of the token; none for a graph from weights alone. */
  position?: number;
  approximation?: string;
}

export async function loadGraph(name: string): Promise<Graph> {
  const found = await load(name);
  const nodes = unpack(found.nodes, "the features of the graph");
  const pairs = unpack(found.pairs, "the pairs of the graph");
  const coefficients = unpack(found.coefficients, "the coefficients of the graph");
  const contributions = optional(found.contributions, "the contributions of the graph");
  const activations = optional(found.activations, "the activations of the graph");
  const dictionaries: string[] = found.dictionaries ?? [];
  const labels: string[] = found.labels ?? [];
  const fits =
    nodes.length === 2 * labels.length &&
    pairs.length === 3 * coefficients.length &&
    (contributions?.length ?? coefficients.length) === coefficients.length &&
    (activations?.length ?? labels.length) === labels.length &&
    pairs.every((node) => node >= 0 && node < labels.length) &&
    labels.every((_, i) => nodes[2 * i] in dictionaries);
  if (!fits) throw new BundleError("This bundle is damaged: the parts of the graph do not fit together.");
  return {
    dictionaries,
    nodes: labels.map((label, i) => ({
      depth: nodes[2 * i],
      feature: nodes[2 * i + 1],
      label,
      activation: activations ? activations[i] : null,
    })),
    pairs: Array.from(coefficients, (coefficient, i) => ({
      first: pairs[3 * i],
      second: pairs[3 * i + 1],
      made: pairs[3 * i + 2],
      coefficient,
      contribution: contributions ? contributions[i] : null,
    })),
    position: found.position,
    approximation: found.approximation,
  };
}

function optional(array: Packed | undefined, what: string): Numbers | null {
  return array === undefined ? null : unpack(array, what);
}

/** What pairs are ordered by. */
export function strength(pair: Pair): number {
  return pair.contribution ?? pair.coefficient;
}

/** The pairs that lead to a feature, step by step back, and those that it feeds, step by step on. */
export function around(graph: Graph, node: number): Pair[] {
  const kept = new Set<Pair>();
  const follow = (next: (pair: Pair, at: Set<number>) => number[]) => {
    let at = new Set([node]);
    while (at.size) {
      const met = new Set<number>();
      for (const pair of graph.pairs) {
        const reached = next(pair, at);
        if (!reached.length) continue;
        kept.add(pair);
        for (const each of reached) met.add(each);
      }
      at = met;
    }
  };
  follow((pair, at) => (at.has(pair.made) ? [pair.first, pair.second] : []));
  follow((pair, at) => (at.has(pair.first) || at.has(pair.second) ? [pair.made] : []));
  return graph.pairs.filter((pair) => kept.has(pair));
}

/**
 * The k strongest pairs of each layer, last layer first: of an earlier one those before all others that
 * make what is already shown. Layers are not compared, as from weights each has a scale of its own.
 */
export function strongest(graph: Graph, pairs: Pair[], k: number): Pair[] {
  const shown: Pair[] = [];
  const used = new Set<number>();
  for (const [, layer] of layers(graph, pairs)) {
    const order = [...layer].sort(
      (a, b) => Number(used.has(b.made)) - Number(used.has(a.made)) || Math.abs(strength(b)) - Math.abs(strength(a)),
    );
    for (const pair of order.slice(0, k)) {
      shown.push(pair);
      used.add(pair.first).add(pair.second);
    }
  }
  return shown;
}

/** Pairs by the dictionary of what they make, last first. */
export function layers(graph: Graph, pairs: Pair[]): [number, Pair[]][] {
  const found = new Map<number, Pair[]>();
  for (const pair of pairs) {
    const depth = graph.nodes[pair.made].depth;
    found.set(depth, [...(found.get(depth) ?? []), pair]);
  }
  return [...found].sort((a, b) => b[0] - a[0]);
}

// ---------------------------------------------------------------- places

export interface Spot {
  x: number;
  y: number;
}

export interface Layout {
  width: number;
  height: number;
  columns: { depth: number; x: number }[];
  nodes: Map<number, Spot>;
  pairs: Map<Pair, Spot>;
}

const NAMES = 190; // left of the first column and right of the last
const STEP = 270, BEFORE = 105; // from column to column; from a pair to what it makes
const HEAD = 40, ROW = 27, PAIR = 16;
const SWEEPS = 6;

/** A column for each dictionary that is met, features in an order in which few lines cross. */
export function layout(graph: Graph, pairs: Pair[]): Layout {
  const met = [...new Set(pairs.flatMap((pair) => [pair.made, pair.first, pair.second]))];
  const depths = [...new Set(met.map((node) => graph.nodes[node].depth))].sort((a, b) => a - b);
  const columns = new Map(depths.map((depth) => [depth, met.filter((node) => graph.nodes[node].depth === depth)]));
  const most = Math.max(1, ...[...columns.values()].map((column) => column.length));
  const dense = Math.max(0, ...layers(graph, pairs).map(([, layer]) => layer.length));
  const height = Math.max(most * ROW, dense * PAIR);
  const y = new Map<number, number>();
  const spread = (column: number[]) => column.forEach((node, i) => y.set(node, ((i + 0.5) / column.length) * height));
  for (const column of columns.values()) spread(column);
  const middle = (pair: Pair) => (y.get(pair.first)! + y.get(pair.second)! + 2 * y.get(pair.made)!) / 4;
  const pulls = new Map(met.map((node) => [node, pairs.filter((p) => p.first === node || p.second === node || p.made === node)]));
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    for (const column of columns.values()) {
      const pull = new Map(column.map((node) => [node, mean(pulls.get(node)!.map(middle))]));
      column.sort((a, b) => pull.get(a)! - pull.get(b)!);
      spread(column);
    }
  }
  const across = new Map(depths.map((depth, i) => [depth, NAMES + i * STEP]));
  const spots = new Map<Pair, Spot>();
  for (const [depth, layer] of layers(graph, pairs)) {
    const order = [...layer].sort((a, b) => middle(a) - middle(b));
    order.forEach((pair, i) => spots.set(pair, { x: across.get(depth)! - BEFORE, y: HEAD + ((i + 0.5) / order.length) * height }));
  }
  return {
    width: 2 * NAMES + (depths.length - 1) * STEP,
    height: height + HEAD + 8,
    columns: depths.map((depth) => ({ depth, x: across.get(depth)! })),
    nodes: new Map(met.map((node) => [node, { x: across.get(graph.nodes[node].depth)!, y: HEAD + y.get(node)! }])),
    pairs: spots,
  };
}

function mean(values: number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
