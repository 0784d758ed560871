import { describe, expect, it } from "vitest";
import { around, layout, strongest, type Graph, type Pair } from "./graph";

/** Nodes 0-3 in the first dictionary, 4-6 in the second, 7-8 in the third. */
function graph(rows: [number, number, number, number][]): Graph {
  const depths = [0, 0, 0, 0, 1, 1, 1, 2, 2];
  return {
    dictionaries: ["embed", "mlp 0", "mlp 1"],
    nodes: depths.map((depth, i) => ({ depth, feature: 10 * i, label: "", activation: null })),
    pairs: rows.map(([first, second, made, coefficient]) => ({ first, second, made, coefficient, contribution: null })),
  };
}

const rows = (pairs: Pair[]) => pairs.map((p) => [p.first, p.second, p.made]);

const small = graph([
  [4, 5, 7, -3], [0, 4, 8, 2], [5, 5, 8, 1], [0, 1, 6, 9], [0, 0, 4, 0.5], [1, 2, 5, -0.2], [2, 3, 5, 0.1],
]);

describe("around", () => {
  it("keeps what leads to a feature and what it feeds", () => {
    expect(rows(around(small, 4))).toEqual([[4, 5, 7], [0, 4, 8], [0, 0, 4]]);
    // Back through both inputs; what else feature 4 feeds is no part of it.
    expect(rows(around(small, 7))).toEqual([[4, 5, 7], [0, 0, 4], [1, 2, 5], [2, 3, 5]]);
    expect(rows(around(small, 3))).toEqual([[4, 5, 7], [5, 5, 8], [2, 3, 5]]);
  });

  it("is nothing for a feature in no pair", () => {
    expect(around(graph([[0, 1, 4, 1]]), 8)).toEqual([]);
  });
});

describe("strongest", () => {
  it("takes k of each layer, those first that make what is shown", () => {
    expect(rows(strongest(small, small.pairs, 1))).toEqual([[4, 5, 7], [0, 0, 4]]);
    expect(rows(strongest(small, small.pairs, 2))).toEqual([[4, 5, 7], [0, 4, 8], [0, 0, 4], [1, 2, 5]]);
    // With room left, others follow by strength.
    expect(rows(strongest(small, small.pairs, 9)).at(-1)).toEqual([0, 1, 6]);
  });

  it("goes by contributions where there are any", () => {
    const there = graph([[0, 1, 4, 5], [1, 1, 4, 1]]);
    there.pairs[0].contribution = 0.1;
    there.pairs[1].contribution = -0.2;
    expect(rows(strongest(there, there.pairs, 1))).toEqual([[1, 1, 4]]);
  });
});

describe("layout", () => {
  it("gives every feature and pair a place of its own, left of what it makes", () => {
    const found = layout(small, small.pairs);
    const places = [...found.nodes.values(), ...found.pairs.values()].map(({ x, y }) => `${x} ${y.toFixed(3)}`);
    expect(new Set(places).size).toBe(places.length);
    for (const [pair, spot] of found.pairs) {
      expect(spot.x).toBeLessThan(found.nodes.get(pair.made)!.x);
      for (const input of [pair.first, pair.second]) expect(found.nodes.get(input)!.x).toBeLessThan(spot.x);
    }
    for (const { x, y } of found.nodes.values()) {
      expect(x > 0 && x < found.width && y > 0 && y < found.height).toBe(true);
    }
  });

  it("uncrosses lines that need not cross", () => {
    const crossed = graph([[0, 0, 6, 1], [1, 1, 5, 1], [2, 2, 4, 1]]);
    const { nodes } = layout(crossed, crossed.pairs);
    const order = (members: number[]) => members.map((node) => nodes.get(node)!.y);
    const [a, b, c] = order([0, 1, 2]);
    const [d, e, f] = order([6, 5, 4]);
    expect(Math.sign(a - b)).toBe(Math.sign(d - e));
    expect(Math.sign(b - c)).toBe(Math.sign(e - f));
  });

  it("has columns for the dictionaries that are met only", () => {
    const few = graph([[0, 1, 7, 1]]);
    expect(layout(few, few.pairs).columns.map(({ depth }) => depth)).toEqual([0, 2]);
  });
});
