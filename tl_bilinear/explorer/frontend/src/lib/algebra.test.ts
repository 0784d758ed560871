import { describe, expect, it } from "vitest";
import {
  apply,
  around,
  attribute,
  correlation,
  cosine,
  dot,
  eigen,
  evaluate,
  featurePairs,
  form,
  formAt,
  hiddenWeights,
  namedTerms,
  partShares,
  timesFactors,
  timesForm,
  type Layer,
  type Part,
} from "./algebra";
import type { Matrix } from "./bundle";

// A small generator, so that a failure can be seen again.
function generator(seed: number) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
}

function matrix(rows: number, columns: number, next: () => number): Matrix {
  return { rows, columns, data: Float64Array.from({ length: rows * columns }, next) };
}

function vector(n: number, next: () => number): Float64Array {
  return Float64Array.from({ length: n }, next);
}

const D = 5;
const H = 7;
const E = 4;

function layer(seed: number, biased: boolean): Layer {
  const next = generator(seed);
  const made: Layer = { left: matrix(H, D, next), right: matrix(H, D, next), out: matrix(E, H, next) };
  if (biased) {
    made.bias_left = vector(H, next);
    made.bias_right = vector(H, next);
    made.bias_out = vector(E, next);
  }
  return made;
}

/** e . f(x), written out index by index. */
function slow(layer: Layer, e: Float64Array, x: Float64Array): number {
  let total = 0;
  for (let a = 0; a < E; a++) {
    let written = layer.bias_out?.[a] ?? 0;
    for (let h = 0; h < H; h++) {
      let left = layer.bias_left?.[h] ?? 0;
      let right = layer.bias_right?.[h] ?? 0;
      for (let i = 0; i < D; i++) {
        left += layer.left.data[h * D + i] * x[i];
        right += layer.right.data[h * D + i] * x[i];
      }
      written += layer.out.data[a * H + h] * left * right;
    }
    total += e[a] * written;
  }
  return total;
}

describe.each([
  [1, false],
  [2, true],
  [3, true],
])("a layer (seed %i, biases %s)", (seed, biased) => {
  const made = layer(seed, biased);
  const next = generator(seed + 100);
  const e = vector(E, next);
  const x = vector(D, next);
  const p = hiddenWeights(made, e);

  it("is evaluated", () => {
    expect(dot(e, evaluate(made, x))).toBeCloseTo(slow(made, e, x), 12);
  });

  it("is a quadratic form along a direction", () => {
    const found = form(made, p);
    const bias = made.bias_out ? dot(e, made.bias_out) : 0;
    expect(formAt(found, x) + bias).toBeCloseTo(slow(made, e, x), 12);
    for (let i = 0; i < D; i++) for (let j = 0; j < D; j++) expect(found.Q[i * D + j]).toBe(found.Q[j * D + i]);
  });

  it("has eigenvectors that rebuild it", () => {
    const found = form(made, p);
    const { values, vectors } = eigen(found);
    for (let i = 1; i < D; i++) expect(Math.abs(values[i])).toBeLessThanOrEqual(Math.abs(values[i - 1]));
    for (let i = 0; i < D; i++) {
      const image = timesForm(found, vectors[i]);
      for (let j = 0; j < D; j++) expect(image[j]).toBeCloseTo(values[i] * vectors[i][j], 10);
      for (let j = 0; j < D; j++) expect(dot(vectors[i], vectors[j])).toBeCloseTo(i === j ? 1 : 0, 10);
      expect(Math.max(...vectors[i])).toBeGreaterThanOrEqual(-Math.min(...vectors[i]));
    }
  });

  it("is a sum over pairs of the parts of its input", () => {
    const parts: Part[] = [
      { name: "4", feature: 4, vector: vector(D, next) },
      { name: "9", feature: 9, vector: vector(D, next) },
      { name: "b_dec", vector: vector(D, next) },
      { name: "error", vector: vector(D, next) },
    ];
    const whole = new Float64Array(D);
    for (const part of parts) for (let i = 0; i < D; i++) whole[i] += part.vector[i];
    const sum = attribute(made, e, parts, 1.7, { b_enc: 0.3 });
    expect(sum.total).toBeCloseTo(1.7 * slow(made, e, whole) + 0.3, 11);
    const terms = Object.values(namedTerms(sum)).reduce((a, b) => a + b, 0);
    expect(terms).toBeCloseTo(sum.total, 11);
    const shares = partShares(sum).reduce((a, each) => a + each.value, 0);
    const constants = Object.values(sum.constants).reduce((a, b) => a + b, 0);
    expect(shares + constants).toBeCloseTo(sum.total, 11);
    const pairs = featurePairs(sum).reduce((a, pair) => a + pair.value, 0);
    expect(pairs).toBeCloseTo(namedTerms(sum)["features x features"], 11);
    expect(featurePairs(sum)).toHaveLength(3);
  });

  it("is the same around any point", () => {
    const mean = vector(D, next);
    const parts: Part[] = [
      { name: "1", feature: 1, vector: vector(D, next) },
      { name: "rest", vector: vector(D, next) },
    ];
    const at = mean.map((m, i) => m + parts[0].vector[i] + parts[1].vector[i]);
    const found = around(form(made, p), 1.3, mean, parts, 0);
    const bias = made.bias_out ? dot(e, made.bias_out) : 0;
    expect(found.total).toBeCloseTo(1.3 * (slow(made, e, at) - bias), 11);
    expect(found.effects.reduce((a, each) => a + each.value, 0)).toBeCloseTo(found.mainEffects, 11);
    // A main effect is the derivative at the mean.
    const step = 1e-6;
    const moved = mean.map((m, i) => m + step * parts[0].vector[i]);
    const slope = (1.3 * (slow(made, e, moved) - slow(made, e, mean))) / step;
    expect(found.effects[0].value).toBeCloseTo(slope, 4);
  });
});

it("correlation agrees with the definition and needs three points", () => {
  expect(correlation([1, 2, 3, 4], [2, 4, 6, 8])).toBeCloseTo(1, 12);
  expect(correlation([1, 2, 3], [3, 2, 1])).toBeCloseTo(-1, 12);
  expect(correlation([1, 2], [2, 1])).toBeNaN();
  expect(correlation([1, 1, 1], [2, 1, 0])).toBeNaN();
});

it("the form without its matrix is the form", () => {
  const next = generator(11);
  const made: Layer = { left: matrix(H, D, next), right: matrix(H, D, next), out: matrix(E, H, next) };
  const p = hiddenWeights(made, vector(E, next));
  const x = vector(D, next);
  const expected = timesForm(form(made, p), x);
  timesFactors(made, p, x).forEach((value, i) => expect(value).toBeCloseTo(expected[i], 12));
});

it("a matrix is applied row by row", () => {
  expect([...apply({ rows: 2, columns: 3, data: Float64Array.from([1, 2, 3, 4, 5, 6]) }, Float64Array.from([1, 0, -1]))]).toEqual([-2, -2]);
});

describe("cosine", () => {
  it("is that of the angle, whatever the lengths, and 0 beside a zero vector", () => {
    for (const angle of [0, 0.3, 2, Math.PI]) {
      const a = [3, 0];
      const b = [0.5 * Math.cos(angle), 0.5 * Math.sin(angle)];
      expect(cosine(Float64Array.from(a), Float64Array.from(b))).toBeCloseTo(Math.cos(angle), 12);
    }
    expect(cosine(Float64Array.from([1, 2]), Float64Array.from([0, 0]))).toBe(0);
  });
});
