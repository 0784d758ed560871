// The nearest point where a quadratic form is no longer positive, exactly: a trust-region problem.
//
// For q(x + e) = m + g . e + sum_i lambda_i e_i^2 in the form's eigenbasis, m > 0, with
// s = max(0, -lambda_min), mu_i = lambda_i + s and kappa >= 0:
//
//   e_i = -g_i / (2 (kappa + mu_i)),   h(kappa) = sum_i g_i^2 (2 kappa + mu_i + s) / (4 (kappa + mu_i)^2) = m
//
// h falls with kappa and no term of it cancels another, so that halving an interval finds kappa. Where h
// stays below m down to kappa = 0 (the hard case), the rest of the way goes along the lowest eigenvector.

export interface Step {
  /** Along the eigenvectors; null where the form is positive everywhere. */
  step: Float64Array | null;
  distance: number;
}

export function nearest(values: ArrayLike<number>, gradient: ArrayLike<number>, margin: number): Step {
  const n = values.length;
  if (!(margin > 0)) return { step: new Float64Array(n), distance: 0 };
  let lowest = 0;
  let weight = 0;
  for (let i = 0; i < n; i++) {
    if (values[i] < values[lowest]) lowest = i;
    weight += gradient[i] ** 2;
  }
  const s = n ? Math.max(0, -values[lowest]) : 0;
  const h = (kappa: number) => {
    let sum = 0;
    for (let i = 0; i < n; i++) {
      const mu = values[i] + s;
      if (gradient[i] !== 0) sum += (gradient[i] ** 2 * (2 * kappa + mu + s)) / (4 * (kappa + mu) ** 2);
    }
    return sum;
  };
  // Were all of the gradient along the lowest eigenvector, kappa would be this; it is no larger.
  const highest = (weight + Math.sqrt(weight ** 2 + 4 * margin * weight * s)) / (4 * margin);
  let low = highest * 1e-16;
  let high = highest;
  const hard = highest === 0 || h(low) < margin;
  if (hard && s === 0) return { step: null, distance: Infinity };
  if (!hard) {
    for (let i = 0; i < 200 && high / low > 1 + 1e-15; i++) {
      const middle = Math.sqrt(low * high);
      if (h(middle) > margin) low = middle;
      else high = middle;
    }
  }
  const kappa = hard ? low : high;
  const step = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    if (gradient[i] === 0 || (hard && i === lowest)) continue;
    step[i] = -gradient[i] / (2 * (kappa + (values[i] + s)));
  }
  if (hard) {
    let left = margin;
    for (let i = 0; i < n; i++) left += gradient[i] * step[i] + values[i] * step[i] ** 2;
    // left + g e - s e^2 = 0, the root to which the form falls; written so that nothing cancels.
    const g = gradient[lowest];
    step[lowest] = ((g > 0 ? -1 : 1) * 2 * left) / (Math.sqrt(g * g + 4 * s * left) + Math.abs(g));
  }
  return { step, distance: Math.sqrt(step.reduce((sum, v) => sum + v * v, 0)) };
}
