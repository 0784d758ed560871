// The image classifier: pixels -> embedding -> bilinear layer -> logits, and its eigenvectors.

import { apply, dot, evaluate, type Layer } from "../lib/algebra";
import { load, row, unpack, unpackMatrix, type ImageManifest, type Matrix } from "../lib/bundle";

export interface ImageModel {
  embed: Matrix;
  embedBias?: Float32Array;
  layer: Layer;
  /** [classes][k], by falling absolute value, of the interaction matrices in pixel space. */
  values: Matrix;
  /** [classes][k][pixels], unit and orthogonal as images. */
  vectors: Float32Array[][];
  images: { pixels: Uint8Array; label: number }[];
}

export async function loadImageModel(manifest: ImageManifest): Promise<ImageModel> {
  const [layer, eigen, images] = await Promise.all(
    ["layer", "eigen", "images"].map((name) => load<Record<string, any>>(`${manifest.name}-${name}`)),
  );
  const found: Layer = {
    left: unpackMatrix(layer.left, "the left matrix"),
    right: unpackMatrix(layer.right, "the right matrix"),
    out: unpackMatrix(layer.out, "the output matrix"),
  };
  for (const name of ["bias_left", "bias_right", "bias_out"] as const) {
    if (layer[name]) found[name] = unpack(layer[name], name) as Float32Array;
  }
  const values = unpackMatrix(eigen.values, "eigenvalues");
  const flat = unpack(eigen.vectors, "eigenvectors") as Float32Array;
  const [classes, k, pixels] = eigen.vectors.shape as number[];
  const vectors = Array.from({ length: classes }, (_, c) =>
    Array.from({ length: k }, (_, i) => flat.subarray((c * k + i) * pixels, (c * k + i + 1) * pixels)),
  );
  const labels = unpack(images.labels, "labels");
  const bytes = unpack(images.images, "images") as Uint8Array;
  return {
    embed: unpackMatrix(layer.embed, "the embedding"),
    embedBias: layer.embed_bias && (unpack(layer.embed_bias, "the embedding") as Float32Array),
    layer: found,
    values,
    vectors,
    images: Array.from(labels, (label, i) => ({ pixels: bytes.subarray(i * pixels, (i + 1) * pixels), label })),
  };
}

/** The model's logits of an image, pixels in [0, 1]. */
export function logits(model: ImageModel, image: Float64Array): Float64Array {
  const embedded = apply(model.embed, image);
  if (model.embedBias) for (let i = 0; i < embedded.length; i++) embedded[i] += model.embedBias[i];
  return evaluate(model.layer, embedded);
}

/** The part of each logit that each eigenvector makes, [classes][k]: value * (vector . image)^2. */
export function eigenParts(model: ImageModel, image: Float64Array): Float64Array[] {
  return model.vectors.map((vectors, c) =>
    Float64Array.from(vectors, (v, i) => row(model.values, c)[i] * dot(v, image) ** 2),
  );
}

export function softmax(values: ArrayLike<number>): number[] {
  const largest = Math.max(...Array.from(values));
  const powers = Array.from(values, (v) => Math.exp(v - largest));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((p) => p / total);
}

/** A picture, pixels from 0 to 1, as text for a link: a byte a pixel. */
export function packDrawn(image: Float64Array): string {
  const text = String.fromCharCode(...Array.from(image, (v) => Math.round(255 * Math.min(1, Math.max(0, v)))));
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** The bytes of such a text, or null where it is no picture of this size. */
export function unpackDrawn(text: string, pixels: number): number[] | null {
  try {
    const bytes = Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
    return bytes.length === pixels ? bytes : null;
  } catch {
    return null;
  }
}
