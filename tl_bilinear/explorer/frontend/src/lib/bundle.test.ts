import { describe, expect, it } from "vitest";
import {
  alternatives,
  BundleError,
  checkManifest,
  settings,
  switched,
  unpack,
  unpackMatrix,
  FORMAT,
  VERSION,
  type ImageManifest,
} from "./bundle";
import { csv, number, signed } from "./format";
import { href, parse } from "./route";

function packed(dtype: string, shape: number[], bytes: Uint8Array) {
  return { dtype, shape, base64: btoa(String.fromCharCode(...bytes)) };
}

describe("arrays", () => {
  it("of every kind are read", () => {
    const floats = Float32Array.from([1.5, -2, 0.25]);
    expect([...unpack(packed("float32", [3], new Uint8Array(floats.buffer)), "x")]).toEqual([1.5, -2, 0.25]);
    const integers = Int32Array.from([7, -70000]);
    expect([...unpack(packed("int32", [2], new Uint8Array(integers.buffer)), "x")]).toEqual([7, -70000]);
    const narrow = Int16Array.from([7, -700]);
    expect([...unpack(packed("int16", [2], new Uint8Array(narrow.buffer)), "x")]).toEqual([7, -700]);
    expect([...unpack(packed("uint8", [2], Uint8Array.from([0, 255])), "x")]).toEqual([0, 255]);
  });

  it("of half precision are read: 1, -2, the largest, the smallest, infinity", () => {
    const bits = Uint16Array.from([0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00]);
    const found = unpack(packed("float16", [5], new Uint8Array(bits.buffer)), "x");
    expect([...found]).toEqual([1, -2, 65504, 2 ** -24, Infinity]);
  });

  it.each([
    [undefined, "x is missing"],
    [{ dtype: "float64", shape: [1], base64: "" }, 'the unknown kind "float64"'],
    [{ dtype: "float32", shape: [2], base64: btoa("1234") }, "x has 4 bytes, expected 8"],
    [{ dtype: "float32", shape: [1], base64: "***" }, "x cannot be read"],
  ])("that are damaged say what is wrong", (array, message) => {
    expect(() => unpack(array as any, "x")).toThrow(BundleError);
    expect(() => unpack(array as any, "x")).toThrow(message);
  });

  it("that are no matrix are refused as one", () => {
    expect(() => unpackMatrix(packed("uint8", [2], Uint8Array.from([0, 1])), "x")).toThrow("x is not a matrix");
  });
});

it("a manifest of another version is refused by name", () => {
  expect(() => checkManifest({ format: FORMAT, version: VERSION + 1, title: "", panels: [] })).toThrow(
    `version ${VERSION + 1}`,
  );
});

it("a route comes back from its link", () => {
  const link = href(["language", "output", 12], { token: "3.4", q: "a b&c=#", k: "" });
  expect(parse(link)).toEqual({ path: ["language", "output", "12"], query: { token: "3.4", q: "a b&c=#" } });
  expect(parse("#/a%zz/b")).toEqual({ path: ["a%zz", "b"], query: {} });
});

it("a cell that a spreadsheet would run is made text", () => {
  expect(csv([["=1+1", "a,b", 'say "x"', -2]])).toBe(`'=1+1,"a,b","say ""x""",-2\r\n`);
});

it("numbers are short, with a sign where it matters", () => {
  expect([number(1234.5), number(0.01234), number(-1e-7), number(NaN), number(0)]).toEqual([
    "1235",
    "0.0123",
    "−1.00e-7",
    "–",
    "0",
  ]);
  expect([signed(2), signed(-2), signed(0)]).toEqual(["+2.00", "−2.00", "0"]);
});

describe("models to switch between", () => {
  const model = (name: string, title: string, choice?: Record<string, string>): ImageManifest => ({
    kind: "image", name, title, facts: {}, size: [2, 2], classes: ["a"], hidden: 1, choice,
  });
  const digits = model("a", "Images", { set: "digits", noise: "0" });
  const noisy = model("b", "Images", { set: "digits", noise: "0.4" });
  const coats = model("c", "Images", { set: "coats", noise: "0.4" });
  const other = model("d", "Others", { set: "coats" });
  const alone = model("e", "Images");
  const all = [digits, noisy, coats, other, alone];
  it("are those of one title that have a choice", () => {
    expect(alternatives(all, noisy)).toEqual([digits, noisy, coats]);
    expect(alternatives(all, other)).toEqual([other]);
    expect(alternatives(all, alone)).toEqual([alone]);
    expect(settings([digits, noisy, coats])).toEqual([["set", ["digits", "coats"]], ["noise", ["0", "0.4"]]]);
  });
  it("keep the other settings where they can", () => {
    const models = [digits, noisy, coats];
    expect(switched(models, noisy, "set", "coats")).toBe(coats);
    expect(switched(models, digits, "noise", "0.4")).toBe(noisy);
    expect(switched(models, digits, "set", "coats")).toBe(coats); // the only one
    expect(switched(models, digits, "set", "none")).toBe(digits);
  });
});
