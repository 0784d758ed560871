// Eigenvectors under inputs: of M^1/2 Q M^1/2, mapped back, for the second moment M of some inputs.
//
//   M_t = (1 - t) E[x x^T] + t tr(M)/d I,   Q = sum_i lambda_i w_i w_i^T with w_i = M_t^-1/2 y_i
//
// Still the exact form; now lambda_i is what term i contributes on average (t = 0), and the largest come
// first. w_i is a filter, what x is read along; M_t w_i is its pattern, what inputs that excite it share.

import { apply, dot, eigen, hiddenWeights, form, timesFactors, type Eigen, type Form, type Layer } from "./algebra";

export interface MetricEigen extends Eigen {
  /** M_t w_i. */
  patterns: Float64Array[];
}

export function metricEigen(of: Form, inputs: Float64Array[], ridge: number): MetricEigen {
  const { d, Q } = of;
  const M = new Float64Array(d * d);
  for (const x of inputs) {
    for (let i = 0; i < d; i++) for (let j = i; j < d; j++) M[i * d + j] += (x[i] * x[j]) / inputs.length;
  }
  let trace = 0;
  for (let i = 0; i < d; i++) {
    trace += M[i * d + i];
    for (let j = 0; j < i; j++) M[i * d + j] = M[j * d + i];
  }
  for (let i = 0; i < d * d; i++) M[i] *= 1 - ridge;
  for (let i = 0; i < d; i++) M[i * d + i] += (ridge * trace) / d;
  const basis = eigen({ d, Q: M, linear: new Float64Array(d), constant: 0 });
  const power = (exponent: number) => {
    const made = new Float64Array(d * d);
    basis.vectors.forEach((v, k) => {
      const scale = Math.max(basis.values[k], 1e-30) ** exponent;
      for (let i = 0; i < d; i++) for (let j = 0; j < d; j++) made[i * d + j] += scale * v[i] * v[j];
    });
    return { rows: d, columns: d, data: made };
  };
  const root = power(0.5);
  const back = power(-0.5);
  const half = product(root.data, Q, d);
  const turned = product(half, root.data, d);
  for (let i = 0; i < d; i++) for (let j = 0; j < i; j++) turned[i * d + j] = turned[j * d + i];
  const found = eigen({ d, Q: turned, linear: new Float64Array(d), constant: 0 });
  return {
    values: found.values,
    vectors: found.vectors.map((y) => apply(back, y)),
    patterns: found.vectors.map((y) => apply(root, y)),
  };
}

const STEPS = 200; // of Lanczos, at most
const CHECKED = 5; // steps between two looks at the pairs
const TOLERANCE = 1e-6; // residual of a pair that counts, of the largest value

/**
 * The first k of `metricEigen`, by falling absolute value, without a matrix: for layers too wide for one.
 *
 * The filters solve Q M w = lambda w, and Q M is symmetric in the inner product u . M v: Lanczos in it,
 * each new vector made orthogonal to all before, takes one product with the factors a step. Fewer than k
 * where the others do not settle (a flat spectrum).
 */
export function leadingMetricEigen(
  layer: Layer,
  p: Float64Array,
  inputs: Float64Array[],
  ridge: number,
  k: number,
): MetricEigen {
  const d = layer.left.columns;
  const trace = inputs.reduce((sum, x) => sum + dot(x, x), 0) / inputs.length;
  const timesM = (v: Float64Array) => {
    const made = v.map((value) => (ridge * trace * value) / d);
    for (const x of inputs) {
      const scale = ((1 - ridge) * dot(x, v)) / inputs.length;
      for (let i = 0; i < d; i++) made[i] += scale * x[i];
    }
    return made;
  };
  const basis: Float64Array[] = [];
  const images: Float64Array[] = []; // M times the basis
  const diagonal: number[] = [];
  const beside: number[] = [];
  const combine = (rows: Float64Array[], weights: Float64Array) => {
    const made = new Float64Array(d);
    rows.forEach((row, j) => {
      for (let i = 0; i < d; i++) made[i] += weights[j] * row[i];
    });
    return made;
  };
  // A start that meets every direction: the entries of a permutation, centred.
  let next: Float64Array = Float64Array.from(permutation(d, 1), (value) => value - (d - 1) / 2);
  for (;;) {
    const image = timesM(next);
    const size = Math.sqrt(Math.max(0, dot(next, image)));
    if (basis.length) beside.push(size);
    const done = size <= 1e-12 * Math.max(...diagonal.map(Math.abs), ...beside, 1e-300);
    const last = done || basis.length >= Math.min(d, STEPS);
    if (basis.length && (last || basis.length % CHECKED === 0)) {
      const n = basis.length;
      const Q = new Float64Array(n * n);
      for (let i = 0; i < n; i++) {
        Q[i * n + i] = diagonal[i];
        if (i + 1 < n) Q[i * n + i + 1] = Q[(i + 1) * n + i] = beside[i];
      }
      const small = eigen({ d: n, Q, linear: new Float64Array(n), constant: 0 });
      const settled = (i: number) => done || n === d || Math.abs(size * small.vectors[i][n - 1]) <= TOLERANCE * Math.abs(small.values[0]);
      let count = 0;
      while (count < Math.min(k, n) && settled(count)) count++;
      if (last || count === k) {
        const kept = small.vectors.slice(0, count);
        return {
          values: small.values.slice(0, count),
          vectors: kept.map((weights) => combine(basis, weights)),
          patterns: kept.map((weights) => combine(images, weights)),
        };
      }
    }
    if (done) return { values: new Float64Array(0), vectors: [], patterns: [] }; // inputs that are all zero
    basis.push(next.map((value) => value / size));
    images.push(image.map((value) => value / size));
    const newest = images[images.length - 1];
    next = timesFactors(layer, p, newest);
    diagonal.push(dot(next, newest));
    // Twice: once leaves rounding of what is taken out.
    for (let pass = 0; pass < 2; pass++) {
      basis.forEach((w, j) => {
        const along = dot(next, images[j]);
        for (let i = 0; i < d; i++) next[i] -= along * w[i];
      });
    }
  }
}

function product(a: Float64Array, b: Float64Array, d: number): Float64Array {
  const made = new Float64Array(d * d);
  for (let i = 0; i < d; i++) {
    for (let k = 0; k < d; k++) {
      const v = a[i * d + k];
      for (let j = 0; j < d; j++) made[i * d + j] += v * b[k * d + j];
    }
  }
  return made;
}

/** A permutation of n numbers; the same seed gives the same one. */
export function permutation(n: number, seed: number): number[] {
  let state = (seed * 2654435761 + 12345) >>> 0;
  const order = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((state / 2 ** 32) * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

/**
 * Eigenvalues, falling, of a null: what each hidden neuron writes paired at random with what it reads; the
 * mean of a few draws, rank by rank.
 */
export function nullSpectrum(layer: Layer, direction: Float32Array | Float64Array, draws: number): Float64Array {
  const p = hiddenWeights(layer, direction);
  const mean = new Float64Array(layer.left.columns);
  for (let draw = 0; draw < draws; draw++) {
    const order = permutation(p.length, draw + 1);
    const { values } = eigen(form(layer, Float64Array.from(order, (h) => p[h])));
    [...values].sort((a, b) => b - a).forEach((value, i) => (mean[i] += value / draws));
  }
  return mean;
}
