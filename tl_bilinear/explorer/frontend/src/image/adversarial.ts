// The nearest image that the model takes for another class, at its exact distance, from the matrices.

import { apply, dot, eigen, form, formAt, timesForm, type Eigen, type Form } from "../lib/algebra";
import { nearest } from "../lib/boundary";
import { row } from "../lib/bundle";
import type { ImageModel } from "./model";

export interface Rival {
  label: number;
  /** In l2, over all images: pixels may leave 0 to 1. */
  distance: number;
  /** What is added to the image; null where no image is taken for this class. */
  step: Float64Array | null;
}

/** An orthonormal basis of what the embedding reads: E = M B with B [r][pixels], M [size][r]. */
interface Basis {
  images: Float64Array[];
  map: Float64Array[];
}

export class Adversary {
  private basis: Basis | null = null;
  private forms = new Map<string, { form: Form; eigen: Eigen }>();

  constructor(private model: ImageModel) {}

  /** Distance to where `rival` has the larger logit, for an image that the model takes for `label`. */
  find(image: Float64Array, label: number, rival: number): Rival {
    const { form, eigen } = this.pair(label, rival);
    const basis = this.read();
    const embedded = this.embed(image);
    const slope = timesForm(form, embedded).map((value, i) => 2 * value + form.linear[i]);
    const along = Float64Array.from(basis.images, (_, i) => {
      let sum = 0;
      for (let h = 0; h < slope.length; h++) sum += basis.map[h][i] * slope[h];
      return sum;
    });
    const bias = this.model.layer.bias_out;
    const margin = formAt(form, embedded) + (bias ? bias[label] - bias[rival] : 0);
    const found = nearest(eigen.values, eigen.vectors.map((v) => dot(v, along)), margin);
    if (!found.step) return { label: rival, distance: Infinity, step: null };
    const inside = new Float64Array(basis.images.length);
    found.step.forEach((amount, i) => {
      for (let j = 0; j < inside.length; j++) inside[j] += amount * eigen.vectors[i][j];
    });
    const step = new Float64Array(image.length);
    inside.forEach((amount, i) => {
      for (let p = 0; p < step.length; p++) step[p] += amount * basis.images[i][p];
    });
    return { label: rival, distance: found.distance, step };
  }

  private embed(image: Float64Array): Float64Array {
    const made = apply(this.model.embed, image);
    if (this.model.embedBias) for (let i = 0; i < made.length; i++) made[i] += this.model.embedBias[i];
    return made;
  }

  /** The form of a difference of two logits behind the embedding, and its eigenpairs as images. */
  private pair(label: number, rival: number): { form: Form; eigen: Eigen } {
    const key = `${label}.${rival}`;
    let found = this.forms.get(key);
    if (!found) {
      const { out } = this.model.layer;
      const p = Float64Array.from(row(out, label), (v, h) => v - row(out, rival)[h]);
      const difference = form(this.model.layer, p);
      const { map, images } = this.read();
      const r = images.length;
      // M^T Q M, whose eigenvectors are those of the form of the image, in the basis.
      const half = map.map(() => new Float64Array(r));
      for (let i = 0; i < difference.d; i++) {
        for (let j = 0; j < difference.d; j++) {
          const q = difference.Q[i * difference.d + j];
          for (let a = 0; a < r; a++) half[i][a] += q * map[j][a];
        }
      }
      const Q = new Float64Array(r * r);
      for (let i = 0; i < difference.d; i++) {
        for (let a = 0; a < r; a++) for (let b = 0; b < r; b++) Q[a * r + b] += map[i][a] * half[i][b];
      }
      found = { form: difference, eigen: eigen({ d: r, Q, linear: new Float64Array(r), constant: 0 }) };
      this.forms.set(key, found);
    }
    return found;
  }

  private read(): Basis {
    if (this.basis) return this.basis;
    const { embed } = this.model;
    const d = embed.rows;
    const Q = new Float64Array(d * d);
    for (let i = 0; i < d; i++) {
      for (let j = i; j < d; j++) Q[i * d + j] = Q[j * d + i] = dot(row(embed, i), row(embed, j));
    }
    const { values, vectors } = eigen({ d, Q, linear: new Float64Array(d), constant: 0 });
    const kept = [...values.keys()].filter((i) => values[i] > 1e-12 * values[0]);
    const images = kept.map((i) => {
      const image = new Float64Array(embed.columns);
      for (let h = 0; h < d; h++) {
        const weight = vectors[i][h] / Math.sqrt(values[i]);
        const pixels = row(embed, h);
        for (let p = 0; p < image.length; p++) image[p] += weight * pixels[p];
      }
      return image;
    });
    const map = Array.from({ length: d }, (_, h) => Float64Array.from(kept, (i) => vectors[i][h] * Math.sqrt(values[i])));
    return (this.basis = { images, map });
  }
}
