import { describe, expect, it } from "vitest";
import { dot, eigen, form, formAt, hiddenWeights, type Layer } from "./algebra";
import { leadingMetricEigen, metricEigen, nullSpectrum, permutation } from "./metric";

function generator(seed: number) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
}
const next = generator(3);
const vector = (n: number) => Float64Array.from({ length: n }, next);
const matrix = (rows: number, columns: number) => ({ rows, columns, data: vector(rows * columns) });
const D = 5;
const layer: Layer = { left: matrix(7, D), right: matrix(7, D), out: matrix(4, 7) };
const direction = vector(4);
const of = form(layer, hiddenWeights(layer, direction));
const inputs = Array.from({ length: 9 }, () => vector(D));

describe("eigenvectors under inputs", () => {
  it.each([0, 0.3, 1])("sum to the form, ridge %f", (ridge) => {
    const { values, vectors } = metricEigen(of, inputs, ridge);
    const x = vector(D);
    const sum = vectors.reduce((total, w, i) => total + values[i] * dot(w, x) ** 2, 0);
    expect(sum).toBeCloseTo(formAt(of, x), 10);
  });
  it("have mean square one on the inputs, and their values sum to the mean of the form", () => {
    const { values, vectors } = metricEigen(of, inputs, 0);
    vectors.forEach((w, i) =>
      vectors.forEach((v, j) => {
        const mean = inputs.reduce((sum, x) => sum + dot(w, x) * dot(v, x), 0) / inputs.length;
        expect(mean).toBeCloseTo(i === j ? 1 : 0, 8);
      }),
    );
    const mean = inputs.reduce((sum, x) => sum + formAt(of, x), 0) / inputs.length;
    expect(values.reduce((a, b) => a + b, 0)).toBeCloseTo(mean, 8);
  });
  it("are the Euclidean ones at ridge one, up to a factor", () => {
    const trace = inputs.reduce((sum, x) => sum + dot(x, x), 0) / inputs.length / D;
    const { values } = metricEigen(of, inputs, 1);
    eigen(of).values.forEach((value, i) => expect(values[i]).toBeCloseTo(value * trace, 10));
  });
  it("have patterns that are the metric's image of the filters", () => {
    const { vectors, patterns } = metricEigen(of, inputs, 0.3);
    vectors.forEach((w, i) => vectors.forEach((_, j) => expect(dot(w, patterns[j])).toBeCloseTo(i === j ? 1 : 0, 9)));
  });
});

describe("the first eigenvectors under inputs, without a matrix", () => {
  const wide: Layer = { left: matrix(40, 30), right: matrix(40, 30), out: matrix(3, 40) };
  const p = hiddenWeights(wide, vector(3));
  const seen = Array.from({ length: 12 }, () => vector(30));
  const same = (a: Float64Array, b: Float64Array) => {
    const sign = Math.sign(dot(a, b));
    a.forEach((value, i) => expect(sign * value).toBeCloseTo(b[i], 5));
  };
  it.each([0.1, 0.3, 1])("are those with one, ridge %f", (ridge) => {
    const all = metricEigen(form(wide, p), seen, ridge);
    const found = leadingMetricEigen(wide, p, seen, ridge, 6);
    expect(found.values.length).toBe(6);
    found.values.forEach((value, i) => expect(value).toBeCloseTo(all.values[i], 8));
    found.vectors.forEach((w, i) => same(w, all.vectors[i]));
    found.patterns.forEach((w, i) => same(w, all.patterns[i]));
  });
  it("are all of a form that has fewer", () => {
    const one: Layer = { left: matrix(1, 30), right: matrix(1, 30), out: matrix(3, 1) };
    const q = hiddenWeights(one, vector(3));
    const all = metricEigen(form(one, q), seen, 0.3);
    const found = leadingMetricEigen(one, q, seen, 0.3, 6);
    found.values.slice(0, 2).forEach((value, i) => expect(value).toBeCloseTo(all.values[i], 8));
    found.values.slice(2).forEach((value) => expect(Math.abs(value)).toBeLessThan(1e-8 * Math.abs(found.values[0])));
    expect(found.values.length).toBeGreaterThanOrEqual(2);
  });
  it("are none of nothing", () => {
    expect(leadingMetricEigen(wide, new Float64Array(40), seen, 0.3, 6).values.every((value) => value === 0)).toBe(true);
  });
});

describe("the null", () => {
  it("permutes", () => {
    const order = permutation(20, 4);
    expect([...order].sort((a, b) => a - b)).toEqual(Array.from({ length: 20 }, (_, i) => i));
    expect(order).not.toEqual(permutation(20, 5));
  });
  it("is the mean spectrum of forms with permuted hidden weights", () => {
    const p = hiddenWeights(layer, direction);
    const one = (seed: number) =>
      [...eigen(form(layer, Float64Array.from(permutation(7, seed), (h) => p[h]))).values].sort((a, b) => b - a);
    const [first, second] = [one(1), one(2)];
    nullSpectrum(layer, direction, 2).forEach((value, i) => expect(value).toBeCloseTo((first[i] + second[i]) / 2, 12));
  });
});
