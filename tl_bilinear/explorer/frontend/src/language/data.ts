// A language panel's documents, decoded when they are asked for, and what is computed from them.

import {
  around,
  attribute,
  cosine,
  dot,
  eigen,
  form,
  hiddenWeights,
  timesForm,
  type Centred,
  type Eigen,
  type Form,
  type Layer,
  type Part,
  type Sum,
} from "../lib/algebra";
import {
  BundleError,
  load,
  row as rowOf,
  unpack,
  unpackMatrix,
  type LanguageManifest,
  type Matrix,
  type Packed,
} from "../lib/bundle";

export type Side = "input" | "output";
/** A row of the bundle's text, or the reader's own. */
export type RowId = number | "own";

export interface Sparse {
  starts: Int32Array;
  features: ArrayLike<number>;
  values: Float32Array;
}

export interface Text {
  tokens: Int32Array;
  words: string[];
  length: number;
  counted: Uint8Array;
  input: Sparse;
  output: Sparse;
}

export interface Activations {
  x: Matrix;
  scale: Float32Array;
  gain: Float32Array;
  rest: { name: string; vector?: Float32Array; factors?: Float32Array; vectors?: Matrix }[];
}

export interface Example {
  row: number;
  position: number;
  value: number;
  quantile: number;
}

export interface Pair {
  first: number;
  second: number;
  /** What stands before z_first z_second. */
  coefficient: number;
  /** Its mean contribution, in the orders of the text. */
  mean?: number;
  tokens?: number;
}

export interface FeatureData {
  feature: number;
  promoted: [string, number][];
  suppressed: [string, number][];
  examples: Example[];
  neighbours: [number, number][];
  opposite: [number, number];
  /** Of output features. */
  measured?: Matrix;
  pairs?: Pair[];
  /** Among how many input features pairs were searched, where not among all. */
  searched?: number;
  norm?: number;
  eigenvalues?: Float32Array;
  eigenvectors?: Matrix;
  null_eigenvalues?: Float32Array;
  /** What if, computed beforehand for some of the examples. */
  effects?: { row: number; position: number; effects: Effect[] }[];
  /** Of input features: output features with d Q d^T; [output, other input, coefficient]. */
  own?: [number, number][];
  crossed?: [number, number, number][];
}

/** What a change of the layer's output at a token does to the next token. */
export interface Effect {
  kind: "eigen" | "feature" | "pair";
  factor: number;
  k?: number;
  first?: number;
  second?: number;
  /** Token, probability before and after. */
  tokens: [string, number, number][];
  divergence: number;
  controls: number[];
}

export interface Columns {
  labels: string[] | null;
  promoted: string[][];
  count: Int32Array;
  strongest: Float32Array;
  numbers: Record<string, ArrayLike<number>>;
}

export interface Token {
  row: RowId;
  position: number;
}

export interface TokenSum {
  sum: Sum;
  centred: Centred | null;
  /** The model's own value, where the bundle holds it. */
  measured: number | null;
  activation: number;
  word: string;
}

export interface Comparison {
  /** Of the directions; of the interaction matrices, where the page forms them. */
  cosine: number;
  forms: number | null;
  /** On how many tokens each is active, both are, and would be if they were independent. */
  tokens: { first: number; second: number; both: number; expected: number };
  /** The strongest pairs of both, with each one's coefficient. */
  pairs: { first: number; second: number; coefficients: [number, number] }[];
}

export type Order = "weights" | "text" | "active";

const SMALL = 384; // widths up to this are decomposed in the page
const MANY = 2048; // input features up to this number are paired over the whole text

export class Language {
  own: { text: Text; activations: Activations; measured: Matrix } | null = null;
  private cache = new Map<string, Promise<unknown>>();

  constructor(readonly manifest: LanguageManifest) {}

  private once<T>(key: string, make: () => Promise<T>): Promise<T> {
    if (!this.cache.has(key)) this.cache.set(key, make());
    return this.cache.get(key) as Promise<T>;
  }

  private document(name: string): Promise<Record<string, any>> {
    return load(`${this.manifest.name}-${name}`);
  }

  get small(): boolean {
    return this.manifest.d_in <= SMALL;
  }

  size(side: Side): number {
    return side === "input" ? this.manifest.n_in : this.manifest.n_out;
  }

  // -------------------------------------------------------------- documents

  layer(): Promise<Layer> {
    return this.once("layer", async () => {
      const found = await this.document("layer");
      const layer: Layer = {
        left: unpackMatrix(found.left, "the left matrix"),
        right: unpackMatrix(found.right, "the right matrix"),
        out: unpackMatrix(found.out, "the output matrix"),
      };
      for (const name of ["bias_left", "bias_right", "bias_out"] as const) {
        if (found[name]) layer[name] = unpack(found[name], name) as Float32Array;
      }
      return layer;
    });
  }

  private constants(): Promise<Record<string, Float32Array>> {
    return this.once("constants", async () => {
      const found = (await this.document("layer")).constants ?? {};
      return Object.fromEntries(
        Object.entries(found).map(([name, array]) => [name, unpack(array as Packed, name) as Float32Array]),
      );
    });
  }

  async direction(side: Side, feature: number): Promise<Float32Array> {
    const block = Math.floor(feature / this.manifest.block);
    const rows = await this.once(`${side}-directions-${block}`, async () => {
      const found = await this.document(`${side}-directions-${block}`);
      return unpackMatrix(found.directions, `directions of ${side} features`);
    });
    return rowOf(rows, feature % this.manifest.block) as Float32Array;
  }

  async directions(side: Side): Promise<Float32Array[]> {
    return Promise.all(Array.from({ length: this.size(side) }, (_, i) => this.direction(side, i)));
  }

  table(): Promise<Record<Side, Columns>> {
    return this.once("table", async () => {
      const found = await this.document("table");
      const read = (part: Record<string, any>): Columns => {
        const { labels, promoted, count, strongest, ...others } = part;
        return {
          labels,
          promoted,
          count: unpack(count, "the table") as Int32Array,
          strongest: unpack(strongest, "the table") as Float32Array,
          numbers: Object.fromEntries(
            Object.entries(others).map(([name, array]) => [name, unpack(array as Packed, name)]),
          ),
        };
      };
      return { input: read(found.input), output: read(found.output) };
    });
  }

  async feature(side: Side, feature: number): Promise<FeatureData> {
    if (!Number.isInteger(feature) || feature < 0 || feature >= this.size(side)) {
      throw new BundleError(
        `There is no ${side} feature ${feature}: they are numbered from 0 to ${this.size(side) - 1}.`,
      );
    }
    const block = Math.floor(feature / this.manifest.block);
    const found = (await this.document(`${side}-${block}`)).features?.[feature % this.manifest.block];
    if (!found) throw new BundleError(`This bundle is damaged: ${side} feature ${feature} is missing.`);
    const made: FeatureData = {
      ...found,
      examples: found.examples.map(([row, position, value, quantile]: number[]) => ({
        row,
        position,
        value,
        quantile,
      })),
    };
    if (side === "input") return made;
    return {
      ...made,
      measured: unpackMatrix(found.measured, "the model's own values"),
      pairs: pairsOf(found.pairs),
      searched: found.pairs.searched,
      eigenvalues: unpack(found.eigenvalues, "eigenvalues") as Float32Array,
      eigenvectors: found.eigenvectors && unpackMatrix(found.eigenvectors, "eigenvectors"),
      null_eigenvalues:
        found.null_eigenvalues && (unpack(found.null_eigenvalues, "the null") as Float32Array),
    };
  }

  words(): Promise<string[]> {
    return this.once("words", async () => (await this.document("words")).words as string[]);
  }

  async text(row: RowId): Promise<Text> {
    if (row === "own") {
      if (!this.own) throw new BundleError("There is no text of your own yet: type one first.");
      return this.own.text;
    }
    if (!(row >= 0 && row < this.manifest.rows)) {
      throw new BundleError(`There is no row ${row}: they are numbered from 0 to ${this.manifest.rows - 1}.`);
    }
    return this.once(`text-${row}`, async () =>
      readText(await this.document(`text-${row}`), await this.words()),
    );
  }

  async activations(row: RowId): Promise<Activations> {
    if (row === "own") {
      await this.text("own");
      return this.own!.activations;
    }
    return this.once(`activations-${row}`, async () =>
      readActivations(await this.document(`activations-${row}`)),
    );
  }

  texts(): Promise<Text[]> {
    return Promise.all(Array.from({ length: this.manifest.rows }, (_, row) => this.text(row)));
  }

  // -------------------------------------------------------------- tokens

  /** Tokens that count on which a feature is active, strongest first. */
  async activeTokens(side: Side, feature: number): Promise<(Example & { row: number })[]> {
    const found: Example[] = [];
    for (const [row, text] of (await this.texts()).entries()) {
      const { starts, features, values } = text[side];
      for (let position = 0; position < text.length; position++) {
        if (!text.counted[position]) continue;
        for (let at = starts[position]; at < starts[position + 1]; at++) {
          if (features[at] === feature && values[at] !== 0) {
            found.push({ row, position, value: values[at], quantile: 0 });
          }
        }
      }
    }
    return found.sort((a, b) => b.value - a.value);
  }

  /** What x / s is made of at a token: the active features, then the named rest. */
  async parts(token: Token): Promise<{ parts: Part[]; gain: number; scale: number }> {
    const [text, held] = await Promise.all([this.text(token.row), this.activations(token.row)]);
    const at = token.position;
    const scale = held.scale[at];
    const left = Float64Array.from(rowOf(held.x, at), (v) => v / scale);
    const parts: Part[] = [];
    const take = (name: string, vector: Float64Array, feature?: number) => {
      for (let i = 0; i < left.length; i++) left[i] -= vector[i];
      parts.push({ name, vector, feature });
    };
    const { starts, features, values } = text.input;
    const found = Array.from({ length: starts[at + 1] - starts[at] }, (_, i) => starts[at] + i);
    const directions = await Promise.all(found.map((i) => this.direction("input", features[i])));
    found.forEach((i, n) => {
      const z = values[i] / scale;
      take(String(features[i]), Float64Array.from(directions[n], (v) => z * v), features[i]);
    });
    for (const rest of held.rest) {
      const vector = rest.vectors ? rowOf(rest.vectors, at) : rest.vector!;
      const factor = (rest.factors ? rest.factors[at] : 1) / scale;
      take(rest.name, Float64Array.from(vector, (v) => factor * v));
    }
    parts.push({ name: "error", vector: left });
    return { parts, gain: held.gain[at], scale };
  }

  /** An output feature's value at a token as an exact sum. */
  async sumAt(feature: number, token: Token): Promise<TokenSum> {
    const [layer, direction, { parts, gain }, constants, text] = await Promise.all([
      this.layer(),
      this.direction("output", feature),
      this.parts(token),
      this.constants(),
      this.text(token.row),
    ]);
    const own = Object.fromEntries(
      Object.entries(constants).map(([name, values]) => [name, values[feature]]),
    );
    const sum = attribute(layer, direction, parts, gain, own);
    return {
      sum,
      centred: await this.centredAt(feature, token, parts, gain, sum),
      measured: await this.measuredAt(feature, token),
      activation: activationAt(text.output, token.position, feature),
      word: text.words[text.tokens[token.position]],
    };
  }

  /** The model's own pre-activation: held for tokens of examples and wherever the feature is active. */
  async measuredAt(feature: number, token: Token): Promise<number | null> {
    if (token.row === "own") {
      await this.text("own");
      return rowOf(this.own!.measured, token.position)[feature];
    }
    const found = await this.feature("output", feature);
    const [before, after] = this.manifest.window;
    for (const [i, example] of found.examples.entries()) {
      const at = token.position - example.position + before;
      if (example.row === token.row && at >= 0 && at < before + 1 + after) {
        return rowOf(found.measured!, i)[at];
      }
    }
    const text = await this.text(token.row);
    return activationAt(text.output, token.position, feature) || null;
  }

  /** Means over the tokens that count, of x / s and of its parts. */
  means(): Promise<{ x: Float64Array; z: Float64Array; rest: Map<string, Float64Array> }> {
    return this.once("means", async () => {
      const { d_in, n_in, rows } = this.manifest;
      const x = new Float64Array(d_in);
      const z = new Float64Array(n_in);
      const rest = new Map<string, Float64Array>();
      let count = 0;
      for (let row = 0; row < rows; row++) {
        const [text, held] = await Promise.all([this.text(row), this.activations(row)]);
        for (let at = 0; at < text.length; at++) {
          if (!text.counted[at]) continue;
          count++;
          const scale = held.scale[at];
          const here = rowOf(held.x, at);
          for (let i = 0; i < d_in; i++) x[i] += here[i] / scale;
          const { starts, features, values } = text.input;
          for (let i = starts[at]; i < starts[at + 1]; i++) z[features[i]] += values[i] / scale;
          for (const part of held.rest) {
            const sum = rest.get(part.name) ?? new Float64Array(d_in);
            rest.set(part.name, sum);
            const vector = part.vectors ? rowOf(part.vectors, at) : part.vector!;
            const factor = (part.factors ? part.factors[at] : 1) / scale;
            for (let i = 0; i < d_in; i++) sum[i] += factor * vector[i];
          }
        }
      }
      for (const values of [x, z, ...rest.values()]) for (let i = 0; i < values.length; i++) values[i] /= count;
      return { x, z, rest };
    });
  }

  private async centredAt(
    feature: number,
    token: Token,
    parts: Part[],
    gain: number,
    sum: Sum,
  ): Promise<Centred | null> {
    if (!this.small) return null;
    const [means, directions, form] = await Promise.all([
      this.means(),
      this.directions("input"),
      this.form(feature),
    ]);
    const present = new Map(parts.filter((p) => p.feature !== undefined).map((p) => [p.feature!, p]));
    const departures: Part[] = [];
    directions.forEach((direction, b) => {
      const part = present.get(b);
      if (!part && means.z[b] === 0) return;
      const vector = Float64Array.from(
        direction,
        (v, i) => (part ? part.vector[i] : 0) - means.z[b] * v,
      );
      departures.push({ name: String(b), feature: b, vector });
    });
    // The rest's departures: what remains of x - mean.
    const away = new Float64Array(means.x.length);
    for (const part of parts) for (let i = 0; i < away.length; i++) away[i] += part.vector[i];
    for (let i = 0; i < away.length; i++) away[i] -= means.x[i];
    for (const part of departures) for (let i = 0; i < away.length; i++) away[i] -= part.vector[i];
    departures.push({ name: "b_dec, error and other rest", vector: away });
    const { ["layer constant"]: _, ...others } = sum.constants;
    const constants = Object.values(others).reduce((a, b) => a + b, 0);
    return around(form, gain, means.x, departures, constants);
  }

  // -------------------------------------------------------------- one output feature's form

  form(feature: number): Promise<Form> {
    return this.once(`form-${feature}`, async () => {
      const [layer, direction] = await Promise.all([this.layer(), this.direction("output", feature)]);
      return form(layer, hiddenWeights(layer, direction));
    });
  }

  /** Its eigenpairs: all of them, or for a wide layer those that the bundle holds. */
  eigen(feature: number): Promise<Eigen> {
    return this.once(`eigen-${feature}`, async () => {
      if (this.small) return eigen(await this.form(feature));
      const { eigenvalues, eigenvectors } = await this.feature("output", feature);
      if (!eigenvectors) throw new BundleError("This bundle holds no eigenvectors of its layer.");
      return {
        values: Float64Array.from(eigenvalues!),
        vectors: Array.from(eigenvalues!, (_, i) => Float64Array.from(rowOf(eigenvectors, i))),
      };
    });
  }

  /** x / s of a token. */
  async input(token: Token): Promise<Float64Array> {
    const held = await this.activations(token.row);
    return Float64Array.from(rowOf(held.x, token.position), (v) => v / held.scale[token.position]);
  }

  /** Interactions d_b^T Q d_c among some input features. */
  async submatrix(feature: number, members: number[]): Promise<Float64Array> {
    const [layer, direction] = await Promise.all([this.layer(), this.direction("output", feature)]);
    const rows = await Promise.all(members.map((b) => this.direction("input", b)));
    const parts = rows.map((vector, i) => ({
      name: String(members[i]),
      feature: members[i],
      vector: Float64Array.from(vector),
    }));
    return attribute(layer, direction, parts, 1, {}).quadratic;
  }

  /** An output feature's pairs in one of three orders. */
  pairs(feature: number, order: Order, count = 20): Promise<Pair[] | null> {
    return this.once(`pairs-${feature}-${order}-${count}`, async () => {
      const found = await this.feature("output", feature);
      if (order === "weights") return found.pairs!;
      if (!this.small || this.manifest.n_in > MANY) return null;
      const [directions, form] = await Promise.all([this.directions("input"), this.form(feature)]);
      const applied = new Map<number, Float64Array>();
      const entry = (b: number, c: number) => {
        if (!applied.has(b)) applied.set(b, timesForm(form, directions[b]));
        return dot(applied.get(b)!, directions[c]);
      };
      const { sums, counts, tokens } =
        order === "text" ? await this.together() : await this.together(feature);
      const n = this.manifest.n_in;
      const pairs: Pair[] = [];
      for (const [key, sum] of sums) {
        const first = Math.floor(key / n);
        const second = key % n;
        const coefficient = entry(first, second) * (first === second ? 1 : 2);
        pairs.push({
          first,
          second,
          coefficient,
          mean: (coefficient * sum) / tokens,
          tokens: counts.get(key)!,
        });
      }
      return pairs.sort((a, b) => Math.abs(b.mean!) - Math.abs(a.mean!)).slice(0, count);
    });
  }

  /** Two features of a side, side by side. */
  async compare(side: Side, first: number, second: number, count = 8): Promise<Comparison> {
    const [e, f, one, other] = await Promise.all([
      this.direction(side, first),
      this.direction(side, second),
      this.activeTokens(side, first),
      this.activeTokens(side, second),
    ]);
    const places = new Set(one.map((each) => `${each.row}.${each.position}`));
    const both = other.filter((each) => places.has(`${each.row}.${each.position}`)).length;
    const expected = (one.length * other.length) / Math.max(1, this.manifest.counted);
    const found: Comparison = {
      cosine: cosine(e, f),
      forms: null,
      tokens: { first: one.length, second: other.length, both, expected },
      pairs: [],
    };
    if (side === "input") return found;
    if (this.small) {
      const [P, Q] = await Promise.all([this.form(first), this.form(second)]);
      found.forms = cosine(P.Q, Q.Q);
    }
    const strongest = await Promise.all([first, second].map((a) => this.pairs(a, "weights")));
    const pairs = new Map(
      strongest.flatMap((each) => each!.slice(0, count)).map((p) => [`${p.first}.${p.second}`, p]),
    );
    const members = [...new Set([...pairs.values()].flatMap((p) => [p.first, p.second]))];
    const place = new Map(members.map((b, i) => [b, i]));
    const entries = await Promise.all([first, second].map((a) => this.submatrix(a, members)));
    found.pairs = [...pairs.values()].map((p) => {
      const at = place.get(p.first)! * members.length + place.get(p.second)!;
      const factor = p.first === p.second ? 1 : 2;
      return { first: p.first, second: p.second, coefficients: [factor * entries[0][at], factor * entries[1][at]] };
    });
    return found;
  }

  /** Sums of gain z_b z_c / s^2 over the tokens that count (on which an output feature is active). */
  private together(feature?: number) {
    const make = async () => {
      const n = this.manifest.n_in;
      const sums = new Map<number, number>();
      const counts = new Map<number, number>();
      let tokens = 0;
      for (let row = 0; row < this.manifest.rows; row++) {
        const text = await this.text(row);
        const held = await this.activations(row);
        const { starts, features, values } = text.input;
        for (let at = 0; at < text.length; at++) {
          if (!text.counted[at]) continue;
          if (feature !== undefined && activationAt(text.output, at, feature) === 0) continue;
          tokens++;
          const factor = held.gain[at] / held.scale[at] ** 2;
          for (let i = starts[at]; i < starts[at + 1]; i++) {
            for (let j = i; j < starts[at + 1]; j++) {
              const key = features[i] * n + features[j];
              sums.set(key, (sums.get(key) ?? 0) + factor * values[i] * values[j]);
              counts.set(key, (counts.get(key) ?? 0) + 1);
            }
          }
        }
      }
      return { sums, counts, tokens: Math.max(1, tokens) };
    };
    return feature === undefined ? this.once("together", make) : make();
  }
}

export function activationAt(sparse: Sparse, position: number, feature: number): number {
  for (let at = sparse.starts[position]; at < sparse.starts[position + 1]; at++) {
    if (sparse.features[at] === feature) return sparse.values[at];
  }
  return 0;
}

/** The features active at a token, strongest first. */
export function activeAt(sparse: Sparse, position: number): [number, number][] {
  const found: [number, number][] = [];
  for (let at = sparse.starts[position]; at < sparse.starts[position + 1]; at++) {
    found.push([sparse.features[at], sparse.values[at]]);
  }
  return found.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
}

function pairsOf(found: Record<string, Packed>): Pair[] {
  const [first, second, coefficient] = ["first", "second", "coefficient"].map((name) =>
    unpack(found?.[name], "the strongest pairs"),
  );
  return Array.from(first, (_, i) => ({
    first: first[i],
    second: second[i],
    coefficient: coefficient[i],
  }));
}

function readSparse(found: Record<string, Packed>): Sparse {
  return {
    starts: unpack(found?.starts, "the text") as Int32Array,
    features: unpack(found?.features, "the text"),
    values: unpack(found?.values, "the text") as Float32Array,
  };
}

export function readText(found: Record<string, any>, words: string[]): Text {
  return {
    tokens: unpack(found.tokens, "the text") as Int32Array,
    words: found.words ?? words,
    length: found.length,
    counted: unpack(found.counted, "the text") as Uint8Array,
    input: readSparse(found.input),
    output: readSparse(found.output),
  };
}

export function readActivations(found: Record<string, any>): Activations {
  return {
    x: unpackMatrix(found.x, "activations"),
    scale: unpack(found.scale, "activations") as Float32Array,
    gain: unpack(found.gain, "activations") as Float32Array,
    rest: found.rest.map((part: Record<string, any>) => ({
      name: part.name,
      vector: part.vector && (unpack(part.vector, part.name) as Float32Array),
      factors: part.factors && (unpack(part.factors, part.name) as Float32Array),
      vectors: part.vectors && unpackMatrix(part.vectors, part.name),
    })),
  };
}
