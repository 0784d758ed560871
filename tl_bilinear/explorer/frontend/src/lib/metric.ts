// Eigenvectors under inputs: of M^1/2 Q M^1/2, mapped back, for the second moment M of some inputs.
//
//   M_t = (1 - t) E[x x^T] + t tr(M)/d I,   Q = sum_i lambda_i w_i w_i^T with w_i = M_t^-1/2 y_i
//
// Still the exact form; now lambda_i is what term i contributes on average (t = 0), and the largest come
// first. w_i is a filter, what x is read along; M_t w_i is its pattern, what inputs that excite it share.

import { apply, eigen, hiddenWeights, form, type Eigen, type Form, type Layer } from "./algebra";

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
