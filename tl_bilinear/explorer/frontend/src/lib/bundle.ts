// Reads a bundle: the manifest and the documents of the page or of the folder beside it.

import { BundleError } from "./errors";
import { ask, hasModel, inNotebook } from "./model";

export { BundleError };

export const FORMAT = "tl_bilinear.explorer";
export const VERSION = 1;

export interface Packed {
  dtype: string;
  shape: number[];
  base64: string;
}

export type Numbers = Float32Array | Float64Array | Int32Array | Int16Array | Uint8Array;

export interface Matrix {
  rows: number;
  columns: number;
  data: Float32Array | Float64Array;
}

export interface LanguageManifest {
  kind: "language";
  name: string;
  title: string;
  facts: Record<string, string>;
  layer: number;
  input_hook: string;
  output_hook: string;
  along: string;
  needs_scale: boolean;
  d_in: number;
  d_out: number;
  d_hidden: number;
  n_in: number;
  n_out: number;
  rows: number;
  row_length: number;
  counted: number;
  block: number;
  window: [number, number];
  null?: { what: string; draws: number };
  served?: boolean;
}

export interface ImageManifest {
  kind: "image";
  name: string;
  title: string;
  facts: Record<string, string>;
  size: [number, number];
  classes: string[];
  hidden: number;
  /** Which of several models of this title it is, by setting. */
  choice?: Record<string, string>;
}

export interface GraphManifest {
  kind: "graph";
  name: string;
  title: string;
  facts: Record<string, string>;
  /** Names of the graphs. */
  graphs: string[];
  /** Where features of a dictionary have a page: panel and side. */
  links: Record<string, [string, "input" | "output"]>;
}

export type PanelManifest = LanguageManifest | ImageManifest | GraphManifest;

export interface Manifest {
  format: string;
  version: number;
  title: string;
  panels: PanelManifest[];
}

const BYTES: Record<string, number> = { float32: 4, float16: 2, int32: 4, int16: 2, uint8: 1 };

function half(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The numbers of a packed array. */
export function unpack(array: Packed | undefined, what: string): Numbers {
  if (!array || typeof array.base64 !== "string" || !Array.isArray(array.shape)) {
    throw new BundleError(`This bundle is damaged: ${what} is missing.`);
  }
  const size = BYTES[array.dtype];
  if (size === undefined) {
    throw new BundleError(`This bundle has an array of the unknown kind "${array.dtype}" (${what}).`);
  }
  let text: string;
  try {
    text = atob(array.base64);
  } catch {
    throw new BundleError(`This bundle is damaged: ${what} cannot be read.`);
  }
  const count = array.shape.reduce((product, n) => product * n, 1);
  if (text.length !== count * size) {
    throw new BundleError(
      `This bundle is damaged: ${what} has ${text.length} bytes, expected ${count * size}.`,
    );
  }
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  if (array.dtype === "uint8") return bytes;
  if (array.dtype === "float32") return new Float32Array(bytes.buffer);
  if (array.dtype === "int32") return new Int32Array(bytes.buffer);
  if (array.dtype === "int16") return new Int16Array(bytes.buffer);
  return Float32Array.from(new Uint16Array(bytes.buffer), half);
}

export function unpackMatrix(array: Packed | undefined, what: string): Matrix {
  const data = unpack(array, what) as Float32Array;
  const [rows, columns] = array!.shape;
  if (array!.shape.length !== 2) {
    throw new BundleError(`This bundle is damaged: ${what} is not a matrix.`);
  }
  return { rows, columns, data };
}

export function row(matrix: Matrix, index: number): Float32Array | Float64Array {
  return matrix.data.subarray(index * matrix.columns, (index + 1) * matrix.columns);
}

// ---------------------------------------------------------------- models to switch between

/** The panels shown in one place with this one, in order; itself alone where it has no choice. */
export function alternatives(panels: PanelManifest[], panel: PanelManifest): ImageManifest[] {
  if (panel.kind !== "image") return [];
  if (!panel.choice) return [panel];
  return panels.filter((each): each is ImageManifest => each.kind === "image" && !!each.choice && each.title === panel.title);
}

/** The settings that models differ in, with the values of each. */
export function settings(models: ImageManifest[]): [string, string[]][] {
  const names = [...new Set(models.flatMap((each) => Object.keys(each.choice ?? {})))];
  return names.map((name): [string, string[]] => [
    name,
    [...new Set(models.flatMap((each) => each.choice?.[name] ?? []))],
  ]);
}

/** The model with one setting changed: of those that have the value, the one most like `from`. */
export function switched(models: ImageManifest[], from: ImageManifest, name: string, value: string): ImageManifest {
  const alike = (each: ImageManifest) =>
    Object.entries(from.choice ?? {}).filter(([key, own]) => each.choice?.[key] === own).length;
  const found = models.filter((each) => each.choice?.[name] === value);
  return found.reduce((best, each) => (alike(each) > alike(best) ? each : best), found[0] ?? from);
}

// ---------------------------------------------------------------- documents

type Json = Record<string, any>;

const pending = new Map<string, Promise<Json>>();
const arrived = new Map<string, Json>();

declare global {
  interface Window {
    tlBilinear: { add(name: string, document: Json): void };
  }
}

/** Called by the files of a folder. */
export function listen(): void {
  window.tlBilinear = { add: (name, document) => void arrived.set(name, document) };
}

/** A document by name, from this page or from the folder beside it; asked for once. */
export function load<T = Json>(name: string): Promise<T> {
  let found = pending.get(name);
  if (!found) {
    found = fetchDocument(name);
    pending.set(name, found);
  }
  return found as Promise<T>;
}

async function fetchDocument(name: string): Promise<Json> {
  const element = document.querySelector(`script[data-document="${CSS.escape(name)}"]`);
  if (element) {
    try {
      return JSON.parse(element.textContent ?? "") as Json;
    } catch {
      throw new BundleError(`This page is damaged: its part "${name}" is not whole. Write it again.`);
    }
  }
  // A notebook may not load files from disk: Python reads them.
  if (inNotebook()) return ask<Json>("part", { name });
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => {
      script.remove();
      const made = arrived.get(name);
      arrived.delete(name);
      if (made) resolve(made);
      else reject(new BundleError(`The file data/${name}.js is damaged. Write the folder again.`));
    };
    script.onerror = () => {
      script.remove();
      reject(
        new BundleError(
          `The part "${name}" is missing: there is no data/${name}.js beside this page. ` +
            "Copy the whole folder, or write it again.",
        ),
      );
    };
    document.head.append(script);
  });
}

/** The manifest of this page, checked. */
export function readManifest(): Manifest {
  const element = document.getElementById("manifest");
  let found: Manifest;
  try {
    found = JSON.parse(element?.textContent ?? "") as Manifest;
  } catch {
    throw new BundleError("This page is damaged: its manifest cannot be read. Write it again.");
  }
  const manifest = checkManifest(found);
  if (hasModel()) for (const panel of manifest.panels) if (panel.kind === "language") panel.served = true;
  return manifest;
}

export function checkManifest(found: Manifest): Manifest {
  if (found?.format !== FORMAT) {
    throw new BundleError(`This is no bundle of ${FORMAT}: its format is "${found?.format}".`);
  }
  if (found.version !== VERSION) {
    throw new BundleError(
      `This bundle has version ${found.version}, and this page reads version ${VERSION}: ` +
        "write it again with the tl_bilinear that you have.",
    );
  }
  if (!Array.isArray(found.panels) || found.panels.length === 0) {
    throw new BundleError("This bundle has no panel, so there is nothing to show.");
  }
  for (const panel of found.panels) {
    if (!["language", "image", "graph"].includes(panel.kind)) {
      throw new BundleError(`This bundle has a panel of the unknown kind "${(panel as any).kind}".`);
    }
  }
  return found;
}
