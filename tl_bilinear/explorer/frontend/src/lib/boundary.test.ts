import { describe, expect, it } from "vitest";
import { nearest } from "./boundary";

const at = (values: number[], g: number[], m: number, e: ArrayLike<number>) =>
  values.reduce((sum, v, i) => sum + g[i] * e[i] + v * e[i] ** 2, m);

/** The shortest of many directions: along each, the first root of a quadratic. */
function searched(values: number[], g: number[], m: number): number {
  let best = Infinity;
  for (let i = 0; i < 200000; i++) {
    const angle = (2 * Math.PI * i) / 200000;
    const u = [Math.cos(angle), Math.sin(angle)];
    const b = g[0] * u[0] + g[1] * u[1];
    const a = values[0] * u[0] ** 2 + values[1] * u[1] ** 2;
    const root = b * b - 4 * a * m;
    if (root < 0) continue;
    for (const t of [(-b + Math.sqrt(root)) / (2 * a), (-b - Math.sqrt(root)) / (2 * a)]) if (t > 0) best = Math.min(best, t);
  }
  return best;
}

describe("the nearest point where a form is not positive", () => {
  const cases: [string, number[], number[], number][] = [
    ["indefinite", [1.5, -0.7], [0.4, -1.1], 2],
    ["concave", [-0.2, -0.7], [0.4, 0.3], 1],
    ["convex that crosses", [0.3, 0.2], [2, -1], 0.7],
    ["hard case", [1.5, -0.7], [0.4, 0], 2],
    ["nearly hard", [1.5, -0.7], [0.4, 1e-9], 2],
    ["no gradient", [0.5, -0.7], [0, 0], 2],
  ];
  for (const [name, values, g, m] of cases) {
    it(`is the shortest of all directions: ${name}`, () => {
      const { step, distance } = nearest(values, g, m);
      expect(Math.abs(at(values, g, m, step!))).toBeLessThan(1e-10);
      expect(Math.abs(distance - searched(values, g, m))).toBeLessThan(1e-6 * distance + 1e-7);
    });
  }
  it("is nowhere for a form that is positive everywhere", () => {
    expect(nearest([1, 2], [0.1, 0.1], 5)).toEqual({ step: null, distance: Infinity });
    expect(nearest([0, 0], [0, 0], 5).distance).toBe(Infinity);
  });
  it("is here where the form is not positive already", () => {
    expect(nearest([1, -2], [0.1, 0.1], -1).distance).toBe(0);
    expect(nearest([1, -2], [0.1, 0.1], 0).distance).toBe(0);
  });
  it("is along the gradient of a linear form", () => {
    expect(nearest([0, 0], [3, 4], 10).distance).toBeCloseTo(2, 12);
  });
});
