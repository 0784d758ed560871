"""Hard spectra for the eigensolvers, and a judge that knows nothing of how they work.

A case is a layer with planted eigenvalues, written in factors in one of several ways, a request, and the
truth: numpy's eigenvalues of the dense matrix of those very factors, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tl_bilinear import BilinearTensor

KINDS = (
    "clusters",
    "pairs of both signs",
    "many copies",
    "low rank",
    "condition 1e15",
    "geometric",
    "flat",
    "definite",
    "one end",
    "power law",
    "zero",
    "identity",
)
WRITINGS = ("eigenvectors", "scaled rows", "pairs", "cancelling", "random")


@dataclass(frozen=True)
class Case:
    """One request for the pairs of a batch of matrices."""

    seed: int
    kind: str
    writing: str
    dtype: torch.dtype
    d: int
    n: int
    k: int
    which: str
    method: str
    scale: float
    dense_at: float | None
    max_bytes: int | None
    tol: float | None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())


def eigenvalues(kind: str, d: int, rng: np.random.Generator) -> np.ndarray:
    """d planted eigenvalues of size about 1."""
    if kind == "clusters":
        centres = rng.standard_normal(rng.integers(1, 6))
        width = 10.0 ** rng.uniform(-14, -1)
        return rng.choice(centres, d) + width * rng.standard_normal(d)
    if kind == "pairs of both signs":
        half = np.sort(rng.random(d // 2))[::-1]
        return np.concatenate([half, -half, np.zeros(d - 2 * (d // 2))])
    if kind == "many copies":
        # More copies than a block has columns, and something at the other end that is larger.
        copies = int(rng.integers(1, max(2, d // 2)))
        other = -rng.uniform(0, 3) * np.ones(int(rng.integers(0, d - copies + 1)))
        rest = d - copies - len(other)
        return np.concatenate([np.ones(copies), other, rng.uniform(-0.9, 0.9, rest)])
    if kind == "low rank":
        rank = int(rng.integers(1, max(2, d // 3)))
        return np.concatenate([rng.standard_normal(rank), np.zeros(d - rank)])
    if kind == "condition 1e15":
        values = np.logspace(0, -15, d)
        return values * rng.choice([-1.0, 1.0], d)
    if kind == "geometric":
        return np.logspace(0, -30, d) * rng.choice([-1.0, 1.0], d)
    if kind == "flat":
        values = np.ones(d) + 0.1 * rng.random(d)
        return values * rng.choice([-1.0, 1.0], d)
    if kind == "definite":
        return rng.choice([-1.0, 1.0]) * (0.01 + rng.random(d))
    if kind == "one end":
        few = int(rng.integers(1, min(6, d)))
        return np.concatenate([-3 * np.ones(d - few), rng.uniform(0, 1, few)])
    if kind == "power law":
        return (np.arange(d) + 1.0) ** -rng.uniform(0.3, 2) * rng.choice([-1.0, 1.0], d)
    if kind == "zero":
        return np.zeros(d)
    return np.full(d, rng.choice([-1.0, 1.0]))


def layer(case: Case) -> BilinearTensor:
    """n outputs with spectra of that kind, over eigenvectors that they share."""
    rng = np.random.default_rng(case.seed)
    d = case.d
    vectors = np.linalg.qr(rng.standard_normal((d, d)))[0].T
    values = np.stack([eigenvalues(case.kind, d, rng) for _ in range(case.n)])
    left, right, out = vectors, vectors, values
    if case.writing == "scaled rows":
        scale = 10.0 ** rng.uniform(-3, 3, (d, 1))
        left, right = left * scale, right / scale
    elif case.writing == "pairs":
        # a v v^T - b w w^T = sym(l m^T), two by two.
        one, other = vectors[0 : d - 1 : 2], vectors[1:d:2]
        a, b = values[:, 0 : d - 1 : 2], values[:, 1:d:2]
        left = np.concatenate([one + other, one, other, vectors[d - d % 2 :]])
        right = np.concatenate([one - other, one, other, vectors[d - d % 2 :]])
        out = np.concatenate([(a - b) / 2, (a + b) / 2, (a + b) / 2, values[:, d - d % 2 :]], 1)
    elif case.writing == "cancelling":
        more = rng.standard_normal((d // 2 + 1, d))
        weight = 10.0 ** rng.uniform(-2, 4) * rng.standard_normal((case.n, len(more)))
        left = np.concatenate([vectors, more, more])
        right = np.concatenate([vectors, more, more])
        out = np.concatenate([values, weight, -weight], 1)
    elif case.writing == "random":
        hidden = int(rng.integers(1, 3 * d))
        left, right = rng.standard_normal((2, hidden, d)) * (np.arange(d) + 1.0) ** -0.7
        out = rng.standard_normal((case.n, hidden))
    factors = [torch.from_numpy(np.ascontiguousarray(f)) for f in (left, right, case.scale * out)]
    return BilinearTensor(*(f.to(case.dtype) for f in factors))


def draw(seed: int) -> Case:
    """A case at random; everything about it follows from the seed."""
    rng = np.random.default_rng([seed, 1])
    d = int(rng.choice([2, 3, 5, 8, 17, 33, 48, 64, 96, 130]))
    method = str(rng.choice(["auto", "dense", "lowrank", "krylov", "krylov", "krylov"]))
    if method == "krylov":
        d = max(d, 48)
    n = int(rng.choice([1, 1, 2, 5]))
    if method == "krylov" and rng.random() < 0.2:
        n = int(rng.choice([40, 40, 40, 130]))  # blocks of three columns, and of one
    case = Case(
        seed=seed,
        kind=str(rng.choice(KINDS)),
        writing=str(rng.choice(WRITINGS)),
        dtype=torch.float32 if rng.random() < 0.5 else torch.float64,
        d=d,
        n=n,
        k=1,
        which=str(rng.choice(["magnitude", "positive", "negative"])),
        method=method,
        scale=float(rng.choice([1.0, 1.0, 1e-30, 1e-12, 1e12, 1e20])),
        dense_at=float(rng.choice([1 / 3, 0.9])) if method == "krylov" else None,
        max_bytes=1 if method == "krylov" and rng.random() < 0.3 else None,
        tol=float(rng.choice([1e-2, 1e-3])) if rng.random() < 0.2 else None,
    )
    most = d
    if method == "krylov":
        most = (d - 32) // 2
    if method == "lowrank":
        most = min(d, 2 * layer(case).d_hidden)
    choices = [1, 2, 3, 5, 10, most // 3, most // 2, most - 1, most]
    k = min(most, max(1, int(rng.choice(choices))))
    return Case(**{**vars(case), "k": k})


def judge(case: Case, tensor: BilinearTensor, found) -> list[str]:
    """What is wrong with the pairs found: an empty list where every statement holds."""
    left, right, out = (f.double().numpy() for f in (tensor.left, tensor.right, tensor.out))
    wrong: list[str] = []
    unit = 1 / case.scale  # judged at size 1: the truth of 1e-30 must not underflow
    out = out * unit
    single = 2.0**-23 if case.dtype == torch.float32 else 2.0**-52
    double = 2.0**-52

    def array(name: str) -> np.ndarray:
        return getattr(found, name).double().numpy() * unit

    values, residuals, bound, rest, errors = map(
        array, ("values", "residuals", "bound", "rest", "errors")
    )
    norm, rounding = array("norm"), array("rounding")
    vectors, converged = found.vectors.double().numpy(), found.converged.numpy()
    for i in range(len(out)):
        one_sided = (left.T * out[i]) @ right
        dense = (one_sided + one_sided.T) / 2
        truth = np.linalg.eigvalsh(dense)
        size = np.abs(truth).max()
        mass = np.sqrt(
            np.sum((out[i] * np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)) ** 2)
        )
        # The oracle is computed in float64 as well.
        own = 8 * double * (mass + np.sqrt(case.d) * size) + 1e-300
        key = {"magnitude": np.abs, "positive": lambda x: x, "negative": lambda x: -x}[case.which]
        ordered = np.sort(key(truth))[::-1]
        k = case.k
        got = key(values[i])

        def fail(what: str, by: float, i: int = i, size: float = size) -> None:
            wrong.append(f"matrix {i}: {what} by {by / (size + 1e-300):.1e} of the norm")

        gap = np.abs(ordered[:k] - got) - errors[i] - own
        if gap.max() > 0:
            fail("a value is off by more than `errors`", gap.max())
        if (np.diff(got) > single * size + own).any():
            fail("values are not in the order asked for", np.diff(got).max())
        tol = found.tol
        if converged[i] and errors[i].max() > (3 + np.sqrt(k)) * tol * size + own:
            fail("converged, but `errors` is above the tolerance", errors[i].max())
        v = vectors[i]
        drift = np.abs(v @ v.T - np.eye(k)).max()
        if drift > 200 * single:
            wrong.append(f"matrix {i}: vectors are not orthonormal by {drift:.1e}")
        gaps = np.linalg.norm(v @ dense - values[i][:, None] * v, axis=1)
        over = gaps - residuals[i] - rounding[i] - own - 4 * single * size
        if over.max() > 0:
            fail("a residual is larger than stated", over.max())
        left_out = np.linalg.norm(dense - (v.T * values[i]) @ v, 2)
        if left_out > bound[i] + own + 4 * single * size:
            fail("what is left out is larger than `bound`", left_out - bound[i])
        ahead = {"negative": -rest[i]}.get(case.which, rest[i])
        if k < case.d and ordered[k] > ahead + own:
            fail("an eigenvalue left out passes `rest`", ordered[k] - ahead)
        if norm[i] > size * (1 + 4 * np.sqrt(case.d) * single) + rounding[i] + own:
            fail("`norm` is too large", norm[i] - size)
        if (
            converged[i]
            and case.which == "magnitude"
            and norm[i] < size * (1 - 2 * tol) - rounding[i] - own
        ):
            fail("`norm` is too small", size - norm[i])
        for j in {1, k // 2, k - 1} - {0, k}:
            part = found.top(j)
            part_bound = float(part.bound[i].double()) * unit
            left_out = np.linalg.norm(dense - (v[:j].T * values[i][:j]) @ v[:j], 2)
            if left_out > part_bound + own + 4 * single * size:
                fail(f"top({j}) leaves out more than its `bound`", left_out - part_bound)
            part_errors = part.errors[i].double().numpy() * unit
            gap = np.abs(ordered[:j] - got[:j]) - part_errors - own
            if gap.max() > 0:
                fail(f"a value of top({j}) is off by more than `errors`", gap.max())
    return wrong
