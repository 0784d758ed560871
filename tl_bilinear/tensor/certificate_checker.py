"""Checks a certificate of a bilinear classifier. It needs numpy and shares no code with the prover.

    python certificate_checker.py FILE [MODEL_DIGEST [DATA_DIGEST]]

Taken for granted: IEEE doubles, and sums of n products in any order with an error of at most gamma_n =
n u / (1 - n u) times the sum of their absolute values. Every bound charges these errors, in norms.
1. `lower`: no nearer input gets another answer. With 1 - nu s >= 0, -s below the eigenvalues of A (a
   Cholesky factorisation shows it: Higham 2002, theorem 10.3), F(e) = |e|^2 + nu q(x + e) is convex,
   and at most |e|^2 where q <= 0. Where |grad F(e)| <= r, |e'|^2 >= F(e) - r (|e'| + |e|).
2. `upper`: x + change lies no further, and the rival's logit there is no smaller.
3. `answers`: k eigenpairs a pair of classes, and two bounds on the rest, prove that one class wins.
"""

import hashlib
import json
import struct
import sys

import numpy as np

UP, DOWN = 1 + 1e-10, 1 - 1e-10  # for the rounding of the bounds themselves
WEIGHTS = ("left", "right", "out", "bias_left", "bias_right", "bias_out", "directions", "offset")
DATA, DISTANCES = ("inputs", "labels"), ("predicted", "rival", "lower", "upper")
TYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}


class Refused(ValueError):
    """The certificate does not prove what it says, and why."""


def require(holds, what):
    if not np.all(holds):
        raise Refused(what)


def gamma(n):
    return 1.01 * n * 2.0**-53


def norm(x):
    return np.sqrt(np.square(x).sum(-1)) * UP


def read(path):
    raw = open(path, "rb").read()  # noqa: SIM115
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header, arrays = json.loads(raw[8:start]), {}
    claims = json.loads(header.pop("__metadata__")["claims"])
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(raw[start + first : start + last], TYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    for name in {"labels", "answers", *DISTANCES} & set(arrays):
        kind = "f" if name in ("lower", "upper") else "i"
        fits = arrays[name].shape == arrays["inputs"].shape[:1] and arrays[name].dtype.kind == kind
        require(fits, f"{name} must hold one number an input")
    return arrays, claims


def digest(arrays, names):
    found = hashlib.sha256()
    for name in names:
        if name in arrays:
            found.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
            found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


class Forms:
    """Logits as x^T Q x + l.x + c in float64, with bounds on the errors of Q, l and c."""

    def __init__(self, w):
        w, sides = {name: w[name].astype(float) for name in WEIGHTS if name in w}, []
        out, size, g = w["out"], np.abs(w["out"]), gamma(len(w["left"]) + 10)
        for name in ("left", "right"):
            m, b = w[name], w.get(f"bias_{name}", np.zeros(len(w["left"])))
            m_error = b_error = np.zeros(len(m))
            if "directions" in w:  # x -> x directions + offset, before the layer
                e, rounding = w["directions"], gamma(m.shape[1] + 4)
                offset = w.get("offset", np.zeros(e.shape[1]))
                m_error = rounding * norm(m) * norm(e.ravel())
                b_error = rounding * (norm(m) * norm(offset) + abs(b))
                m, b = m @ e.T, b + m @ offset
            sides.append((m, b, norm(m) + m_error, abs(b) + b_error, m_error, b_error))
        (L, bl, l1, bl1, le, ble), (R, br, r1, br1, re, bre) = sides
        half, bias = np.stack([(L.T * o) @ R for o in out]), w.get("bias_out", np.zeros(len(out)))
        c = (out * bl * br).sum(1) + bias
        self.exact = ((half + half.transpose(0, 2, 1)) / 2, (out * bl) @ R + (out * br) @ L, c)
        linear = g * (bl1 * r1 + br1 * l1) + ble * r1 + bl1 * re + bre * l1 + br1 * le
        constant = size @ (g * bl1 * br1 + ble * br1 + bl1 * bre) + g * abs(bias)
        errors = (size @ (g * l1 * r1 + le * r1 + l1 * re), size @ linear, constant)
        self.errors, self.count = tuple(UP * error for error in errors), len(out)
        self.pairs = [(a, b) for a in range(self.count) for b in range(a + 1, self.count)]

    def pair(self, a, b):  # matrix, linear part, constant, bounds on the errors of the three
        return *(x[a] - x[b] for x in self.exact), [x[a] + x[b] for x in self.errors]


def at(form, z):
    """Values and gradients of a margin, and bounds on the errors of each."""
    A, linear, c, (ea, el, ec) = form
    g, z1, through = gamma(2 * len(A) + 10), norm(z), z @ A
    value, slope = (through * z).sum(1) + z @ linear + c, 2 * through + linear
    ea, el, ec = ea + g * norm(A.ravel()), el + g * norm(linear), ec + g * abs(c)
    return value, slope, UP * (ea * z1**2 + el * z1 + ec), UP * (2 * ea * z1 + el)


def least(matrix, error, shift, what):
    """-s: a proved lower bound on the eigenvalues of a matrix known to `error` in norm."""
    d = len(matrix)
    try:
        np.linalg.cholesky(matrix + shift * np.eye(d))
    except np.linalg.LinAlgError:
        raise Refused(what) from None
    total = np.abs(np.diag(matrix)).sum() + d * shift
    return -UP * (shift + error + gamma(2 * d + 10) * total)


def lower_bounds(form, w, V, x, nu):
    """Below the distance of each x to {q <= 0}; w and V, about the eigenpairs, only choose a point."""
    A, _, _, errors = form
    shift = max(0.0, -w.min()) + 1e-11 * norm(A.ravel()) + 1e-300
    s = -least(A, errors[0], shift, "an eigenvalue lies below what a multiplier needs")
    nu = np.minimum(nu, (1 - 1e-12) / s)[:, None]
    step = (-nu * (at(form, x)[1] @ V) / (2 * np.maximum(1 + nu * w, 1e-9))) @ V.T
    z, nu = x + step, nu[:, 0]
    e, (q, slope, q_error, slope_error) = z - x, at(form, z)
    e1 = norm(e)
    F = e1**2 * (1 - 4e-10) + nu * (q - q_error) - 1e-13 * nu * abs(q)
    r = norm(2 * e + nu[:, None] * slope) + nu * slope_error
    r = UP * (r + gamma(8) * (2 * e1 + nu * norm(slope)))
    return DOWN * np.maximum(0, np.sqrt(np.maximum(0, r**2 / 4 + F - r * e1)) - UP * r / 2)


def check_distances(c, claims, forms):
    x, answer, rival, lower, upper = (c[name] for name in ("inputs", *DISTANCES))
    x, both = x.astype(float), np.stack([rival, answer])
    require((rival != answer) & (both >= 0) & (both < forms.count), "no two classes of the model")
    numbers = (x, lower, c["multiplier"], c["change"])
    require([np.isfinite(each).all() for each in numbers], "a number is infinite")
    require((lower >= 0) & (c["multiplier"].min(1) >= 0), "a length or a multiplier is negative")
    z = x + c["change"].astype(float).reshape(x.shape)
    for a, b in forms.pairs:
        w, V = np.linalg.eigh(forms.pair(a, b)[0])
        for y, j, sign in ((a, b, 1), (b, a, -1)):
            rows, form = np.flatnonzero((answer == y) & (lower > 0)), forms.pair(y, j)
            bound = lower_bounds(form, sign * w, V, x[rows], c["multiplier"][rows, j])
            require(bound >= lower[rows], f"a distance from class {y} to {j} is not proved")
            rows = np.flatnonzero((answer == y) & (rival == j) & np.isfinite(upper))
            value, _, error, _ = at(form, z[rows])
            require(value + error <= 0, f"a change from class {y} to {j} does not reach it")
    held = np.isfinite(upper)
    require(norm(z - x)[held] <= upper[held], "a change is larger than its upper bound")
    require(upper[held] <= lower[held] * (1 + claims["gap"]), "bounds lie too far apart")
    for radius, count in claims["certified"]:
        found = int(((answer == c["labels"]) & (lower > radius)).sum())
        require(radius >= 0 and found == count, f"{found} inputs hold at {radius}, not {count}")


def check_answers(c, claims, forms):
    T, centre, answer = c["map"], c["centre"], c["answers"]
    e = c["inputs"].astype(float) - centre
    t, e1, T1 = e @ T.T, norm(e), norm(T.ravel())
    require((answer >= -1) & (answer < forms.count), "an answer is no class")
    for pair, (a, b) in enumerate(forms.pairs):
        form, lam, v = forms.pair(a, b), c["values"][pair], c["vectors"][pair]
        W, top, v2 = v @ T, np.abs(lam).max(), norm(v.ravel()) ** 2
        N, R = T.T @ T - W.T @ W, form[0] - (W.T * lam) @ W
        value, slope, error, slope_error = (part[0] for part in at(form, centre[None]))
        u, g = t @ v.T, gamma(2 * sum(T.shape) + 2 * len(v) + 20)
        t1 = norm(t) + g * T1 * e1
        rest, kept = t1**2 - np.square(u).sum(1), value + e @ slope + np.square(u) @ lam
        for sign, name, y in ((1, "tail_lower", a), (-1, "tail_upper", b)):
            tail = float(c[name][pair])
            require(tail >= 0, "a bound on the rest is negative")
            blur = (tail * (1 + v2) + top * v2) * T1**2 + norm(form[0].ravel())
            blur, both = form[3][0] + 4 * g * blur, sign * R + tail * N
            what = f"the rest of classes {a} and {b} goes beyond its bound"
            s = -least((both + both.T) / 2, blur, 4 * blur + 1e-300, what)
            off = error + slope_error * e1 + g * (abs(value) + norm(slope) * e1) + s * e1**2
            off = off + 8 * g * (top + tail) * (1 + v2) * t1 * (T1 * e1 + t1)
            bound = sign * kept - tail * rest - UP * off
            require(bound[answer == y] > 0, f"an answer of class {y} is not proved")
    found = int((answer == c["labels"]).sum())
    require(found == claims["proved"], f"{found} labels are proved, not {claims['proved']}")


def check(path, model=None, data=None):
    """Check everything that a file claims; returns the claims. Raises Refused, saying what fails."""
    try:
        c, claims = read(path)
        every = (("model", WEIGHTS, model), ("data", DATA, data), ("content", sorted(c), None))
        for name, names, wanted in every:
            found = digest(c, names)
            require(found == claims[name], f"the {name} is not the one that the claims are about")
            require(wanted in (None, found), f"it is about another {name}: {found}")
        require(not any(np.isnan(array).any() for array in c.values()), "it holds NaN")
        tests = {"certified": check_distances, "proved": check_answers}
        require(set(tests) & set(claims), "it claims nothing")
        forms = Forms(c)
        for name in set(tests) & set(claims):
            tests[name](c, claims, forms)
    except (struct.error, KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"damaged, or arrays do not fit together: {error}") from error
    return claims


if __name__ == "__main__":
    sys.tracebacklimit = 0
    print("proved:", json.dumps(check(*sys.argv[1:])))
