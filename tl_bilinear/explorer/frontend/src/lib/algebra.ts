// The mathematics of a bilinear layer, in double precision from the float32 weights of the model.
//
//   f(x) = out ((left x + bias_left) * (right x + bias_right)) + bias_out
//
// Along an output direction e, with p = out^T e:
//
//   e . f(x) = x^T Q x + l . x + c,   Q = 1/2 sum_h p_h (left_h right_h^T + right_h left_h^T)

import { EigenvalueDecomposition, Matrix as MlMatrix } from "ml-matrix";
import { row, type Matrix } from "./bundle";

type Vector = Float32Array | Float64Array;

export interface Layer {
  left: Matrix;
  right: Matrix;
  out: Matrix;
  bias_left?: Vector;
  bias_right?: Vector;
  bias_out?: Vector;
}

export function dot(a: Vector, b: Vector): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** M x. */
export function apply(matrix: Matrix, x: Vector): Float64Array {
  const { rows, columns, data } = matrix;
  const made = new Float64Array(rows);
  for (let i = 0, at = 0; i < rows; i++) {
    let sum = 0;
    for (let j = 0; j < columns; j++, at++) sum += data[at] * x[j];
    made[i] = sum;
  }
  return made;
}

/** M^T x. */
export function applyTransposed(matrix: Matrix, x: Vector): Float64Array {
  const { rows, columns, data } = matrix;
  const made = new Float64Array(columns);
  for (let i = 0, at = 0; i < rows; i++) {
    const scale = x[i];
    for (let j = 0; j < columns; j++, at++) made[j] += scale * data[at];
  }
  return made;
}

/** p = out^T e. */
export function hiddenWeights(layer: Layer, direction: Vector): Float64Array {
  return applyTransposed(layer.out, direction);
}

/** Q x of the form along hidden weights p, without forming it. */
export function timesFactors(layer: Layer, p: Vector, x: Vector): Float64Array {
  const a = apply(layer.left, x);
  const b = apply(layer.right, x);
  for (let h = 0; h < p.length; h++) [a[h], b[h]] = [(p[h] * b[h]) / 2, (p[h] * a[h]) / 2];
  const made = applyTransposed(layer.left, a);
  const other = applyTransposed(layer.right, b);
  for (let i = 0; i < made.length; i++) made[i] += other[i];
  return made;
}

/** The whole layer, f(x). */
export function evaluate(layer: Layer, x: Vector): Float64Array {
  const a = apply(layer.left, x);
  const b = apply(layer.right, x);
  for (let h = 0; h < a.length; h++) {
    a[h] = (a[h] + (layer.bias_left?.[h] ?? 0)) * (b[h] + (layer.bias_right?.[h] ?? 0));
  }
  const made = apply(layer.out, a);
  if (layer.bias_out) for (let i = 0; i < made.length; i++) made[i] += layer.bias_out[i];
  return made;
}

export interface Form {
  d: number;
  /** [d * d], symmetric. */
  Q: Float64Array;
  linear: Float64Array;
  /** Without the output bias. */
  constant: number;
}

/** Cosine of two vectors; 0 where one is zero. */
export function cosine(a: Vector, b: Vector): number {
  const size = Math.sqrt(dot(a, a) * dot(b, b));
  return size > 0 ? dot(a, b) / size : 0;
}

/** Q, l and c along hidden weights p. */
export function form(layer: Layer, p: Vector): Form {
  const d = layer.left.columns;
  const Q = new Float64Array(d * d);
  const linear = new Float64Array(d);
  let constant = 0;
  for (let h = 0; h < p.length; h++) {
    const left = row(layer.left, h);
    const right = row(layer.right, h);
    const half = p[h] / 2;
    for (let i = 0; i < d; i++) {
      const a = half * left[i];
      const b = half * right[i];
      for (let j = i; j < d; j++) Q[i * d + j] += a * right[j] + b * left[j];
    }
    const bl = layer.bias_left?.[h] ?? 0;
    const br = layer.bias_right?.[h] ?? 0;
    if (bl || br) {
      for (let i = 0; i < d; i++) linear[i] += p[h] * (bl * right[i] + br * left[i]);
      constant += p[h] * bl * br;
    }
  }
  for (let i = 0; i < d; i++) for (let j = 0; j < i; j++) Q[i * d + j] = Q[j * d + i];
  return { d, Q, linear, constant };
}

/** Q x. */
export function timesForm(form: Form, x: Vector): Float64Array {
  return apply({ rows: form.d, columns: form.d, data: form.Q }, x);
}

/** x^T Q x + l . x + c. */
export function formAt(form: Form, x: Vector): number {
  return dot(timesForm(form, x), x) + dot(form.linear, x) + form.constant;
}

// ---------------------------------------------------------------- eigenvectors

export interface Eigen {
  /** By falling absolute value. */
  values: Float64Array;
  vectors: Float64Array[];
}

/** Eigenpairs of a symmetric form, each vector's largest entry positive. */
export function eigen(form: Form): Eigen {
  const { d, Q } = form;
  const dense = MlMatrix.from1DArray(d, d, Q);
  const found = new EigenvalueDecomposition(dense, { assumeSymmetric: true });
  const order = [...found.realEigenvalues.keys()].sort(
    (a, b) => Math.abs(found.realEigenvalues[b]) - Math.abs(found.realEigenvalues[a]),
  );
  const V = found.eigenvectorMatrix;
  return {
    values: Float64Array.from(order, (i) => found.realEigenvalues[i]),
    vectors: order.map((i) => {
      const vector = Float64Array.from({ length: d }, (_, j) => V.get(j, i));
      let largest = 0;
      for (const v of vector) if (Math.abs(v) > Math.abs(largest)) largest = v;
      return largest < 0 ? vector.map((v) => -v) : vector;
    }),
  };
}

/** Pearson's correlation; NaN for fewer than three pairs or a constant. */
export function correlation(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const n = a.length;
  if (n < 3) return NaN;
  let ma = 0;
  let mb = 0;
  for (let i = 0; i < n; i++) {
    ma += a[i] / n;
    mb += b[i] / n;
  }
  let ab = 0;
  let aa = 0;
  let bb = 0;
  for (let i = 0; i < n; i++) {
    ab += (a[i] - ma) * (b[i] - mb);
    aa += (a[i] - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  }
  return aa && bb ? ab / Math.sqrt(aa * bb) : NaN;
}

// ---------------------------------------------------------------- sums at a token

export interface Part {
  name: string;
  /** The input feature, where the part is one. */
  feature?: number;
  vector: Float64Array;
}

export interface Term {
  first: number;
  second: number;
  value: number;
}

export interface Sum {
  parts: Part[];
  /** Entries of parts' pairs, [n * n], symmetric: off the diagonal half of a pair's contribution. */
  quadratic: Float64Array;
  linear: Float64Array;
  constants: Record<string, number>;
  total: number;
}

/** gain * (e . f)(sum of the parts), as a sum over pairs of parts. */
export function attribute(
  layer: Layer,
  direction: Vector,
  parts: Part[],
  gain: number,
  constants: Record<string, number>,
): Sum {
  const p = hiddenWeights(layer, direction);
  const n = parts.length;
  const a = parts.map((part) => apply(layer.left, part.vector));
  const b = parts.map((part) => apply(layer.right, part.vector));
  const weighted = a.map((row) => row.map((value, h) => value * p[h]));
  const quadratic = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let j = i; j < n; j++) {
      const value = (gain / 2) * (dot(weighted[i], b[j]) + dot(weighted[j], b[i]));
      quadratic[i * n + j] = quadratic[j * n + i] = value;
    }
  }
  const linear = new Float64Array(n);
  let constant = 0;
  if (layer.bias_left || layer.bias_right) {
    for (let h = 0; h < p.length; h++) {
      const bl = layer.bias_left?.[h] ?? 0;
      const br = layer.bias_right?.[h] ?? 0;
      constant += gain * p[h] * bl * br;
      for (let i = 0; i < n; i++) linear[i] += gain * p[h] * (bl * b[i][h] + br * a[i][h]);
    }
  }
  const all: Record<string, number> = {
    "layer constant": constant,
    b_out: layer.bias_out ? gain * dot(direction, layer.bias_out) : 0,
    ...constants,
  };
  let total = 0;
  for (const value of quadratic) total += value;
  for (const value of linear) total += value;
  for (const value of Object.values(all)) total += value;
  return { parts, quadratic, linear, constants: all, total };
}

/** Pairs of features of a sum, largest contribution first. */
export function featurePairs(sum: Sum): Term[] {
  const n = sum.parts.length;
  const found: Term[] = [];
  for (let i = 0; i < n; i++) {
    if (sum.parts[i].feature === undefined) continue;
    for (let j = i; j < n; j++) {
      if (sum.parts[j].feature === undefined) continue;
      found.push({ first: i, second: j, value: sum.quadratic[i * n + j] * (i === j ? 1 : 2) });
    }
  }
  return found.sort((x, y) => Math.abs(y.value) - Math.abs(x.value));
}

/** The sum in a few named terms: features with features, with each other part, biases, constants. */
export function namedTerms(sum: Sum): Record<string, number> {
  const n = sum.parts.length;
  const group = (i: number) => (sum.parts[i].feature === undefined ? sum.parts[i].name : "features");
  const names = ["features", ...sum.parts.filter((p) => p.feature === undefined).map((p) => p.name)];
  const found: Record<string, number> = {};
  for (let i = 0; i < names.length; i++) {
    for (let j = i; j < names.length; j++) found[`${names[i]} x ${names[j]}`] = 0;
  }
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      const [a, b] = [names.indexOf(group(i)), names.indexOf(group(j))].sort((x, y) => x - y);
      found[`${names[a]} x ${names[b]}`] += sum.quadratic[i * n + j];
    }
  }
  if (sum.linear.some((value) => value !== 0)) {
    for (let i = 0; i < n; i++) {
      const name = `bias x ${group(i)}`;
      found[name] = (found[name] ?? 0) + sum.linear[i];
    }
  }
  return { ...found, ...sum.constants };
}

/** What each part makes, its pairs split in halves, largest first; with the constants, the whole sum. */
export function partShares(sum: Sum): { name: string; feature?: number; value: number }[] {
  const n = sum.parts.length;
  return sum.parts
    .map((part, i) => ({
      name: part.name,
      feature: part.feature,
      value: sum.quadratic.subarray(i * n, (i + 1) * n).reduce((a, b) => a + b, 0) + sum.linear[i],
    }))
    .sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
}

export interface Centred {
  /** The value at the mean, constants included. */
  atMean: number;
  /** One for each part that has a baseline or is present. */
  effects: { name: string; feature?: number; value: number }[];
  mainEffects: number;
  interactions: number;
  total: number;
}

/**
 * The same value around a mean m: f(m) + (2 Q m + l) . (x - m) + (x - m)^T Q (x - m).
 *
 * departures: what x - m is made of.
 */
export function around(
  form: Form,
  gain: number,
  mean: Vector,
  departures: Part[],
  constants: number,
): Centred {
  const slope = timesForm(form, mean).map((value, i) => 2 * value + form.linear[i]);
  const away = new Float64Array(form.d);
  for (const part of departures) for (let i = 0; i < away.length; i++) away[i] += part.vector[i];
  const effects = departures.map((part) => ({
    name: part.name,
    feature: part.feature,
    value: gain * dot(slope, part.vector),
  }));
  const atMean = gain * formAt(form, mean) + constants;
  const mainEffects = gain * dot(slope, away);
  const interactions = gain * dot(timesForm(form, away), away);
  return { atMean, effects, mainEffects, interactions, total: atMean + mainEffects + interactions };
}
