"""Two bilinear layers composed: a symmetric form of degree four, in factored form.

Layer 2 along a direction u is ``sum_g c_g (v_g . y)^2`` with the eigenpairs of its interaction matrix,
and every ``v_g . f1(x)`` is a quadratic form of layer 1, ``x^T A_g x``. Composed,

    ``q(x) = u . f2(f1(x)) = sum_g c_g (x^T A_g x)^2 = T(x, x, x, x)``,
    ``T = sum_g c_g sym(A_g (x) A_g)``,

a fully symmetric tensor of d^4 entries that is never formed (a bilinear layer in the framework of
Sharkey 2023, twice). With the A_g as implicit interaction matrices of layer 1, everything follows:

- ``T(x,x,x,.) = sum_g c_g (x^T A_g x) A_g x``, a quarter of the gradient: two products with layer 1
- ``<T, T'> = 1/3 sum_gh c_g c'_h [<A_g, A'_h>^2 + 2 tr(A_g A'_h A_g A'_h)]``: from Grams, exact
- leading directions: unit x with ``T(x,x,x,.) = lambda x`` (Z-eigenvectors), by a shifted symmetric
  higher-order power method (Kolda and Mayo 2011, with the adaptive shift of Kolda and Mayo 2014)

>>> form = QuarticForm.of(first, second, u)
>>> form(x)                                # [...], equal to second(first(x)) @ u
>>> found = form.leading(3)                # values [3], vectors [3, d], residuals, hits

Biases and a residual connection enter as a coordinate that is always 1: see `with_residual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.eigendecomposition import fix_signs
from tl_bilinear.tensor.interaction import InteractionMatrix

if TYPE_CHECKING:
    import pandas

MAX_FLOPS = 10**14
"""Work, in flops, that `inner` and `leading` take on unless told otherwise: half an hour on one core."""

_SAME = 1 - 1e-6  # |cosine| above which two starts have found one direction
_NEAR = 0.05  # relative residual at which Newton's steps are tried
_MARGIN = 1e-6  # how positive the shifted Hessian is kept, relative to its scale


@dataclass(frozen=True, eq=False)
class QuarticForm(Result):
    """``q(x) = sum_g coefficients_g (x^T A_g x)^2``; an immutable value.

    Parameters
    ----------
    left, right: [h, d]
        Input factors of the first layer.
    mix: [n, h]
        ``A_g = sum_h mix[g,h] sym(left_h right_h^T)``.
    coefficients: [n]
    space: str, optional
        What the d coordinates are.
    """

    left: Float[Tensor, "h d"]
    right: Float[Tensor, "h d"]
    mix: Float[Tensor, "n h"]
    coefficients: Float[Tensor, " n"]
    space: str | None = None

    @classmethod
    def of(
        cls,
        first: BilinearTensor,
        second: BilinearTensor,
        direction: Float[Tensor, " d_out"],
        *,
        rank: int | None = None,
    ) -> QuarticForm:
        """``direction . second(first(x))``.

        Parameters
        ----------
        first, second: layers without biases, the outputs of the first the inputs of the second
        direction: [d_out] of the second layer
        rank: int, optional
            Use so many eigenpairs of the second layer, the largest; None for all that are not zero.

        Raises ValueError for widths that do not meet, and for biases: `with_residual` makes them part
        of the form.
        """
        if first.d_out != second.d_in:
            raise ValueError(
                f"the first layer writes {first.d_out} coordinates, the second reads {second.d_in}; "
                f"project or fold one of them first"
            )
        for name, layer in (("first", first), ("second", second)):
            if layer.has_biases:
                raise ValueError(
                    f"the {name} layer has biases, and a form of degree four has no lower terms: "
                    f"compose layers of [x, 1] (with_residual, or augmented() for the second), or take "
                    f"parts().interaction"
                )
        if direction.ndim != 1:
            raise ValueError(f"direction must be one vector, got {checks.shape(direction)}")
        pairs = second.interaction(direction).eigh(rank)
        floor = pairs.values.abs().max() * second.d_in * torch.finfo(pairs.values.dtype).eps
        kept = pairs.values.abs() > floor
        mix = first.interaction(pairs.vectors[kept].to(first.out)).weights
        values = pairs.values[kept].to(first.out)
        return cls(first.left, first.right, mix, values, first.input_space)

    @property
    def d(self) -> int:
        return self.left.shape[1]

    @property
    def n(self) -> int:
        """How many squares it is a sum of."""
        return len(self.coefficients)

    @property
    def forms(self) -> InteractionMatrix:
        """A_g, a batch of n implicit interaction matrices of the first layer."""
        return InteractionMatrix(self.left, self.right, self.mix, self.space)

    def __repr__(self) -> str:
        return f"QuarticForm(d={self.d}, squares={self.n}, d_hidden={len(self.left)})"

    # ------------------------------------------------------------------ evaluation

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """``q(x)``: [...]."""
        return self.forms.quadratic(x).square() @ self.coefficients

    def contract(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """``T(x, x, x, .)``, a quarter of the gradient: [..., d]."""
        x = checks.require_rows("x", x, self.d, self.space or "d", self.left)
        through_left, through_right = x @ self.left.T, x @ self.right.T
        values = (through_left * through_right) @ self.mix.T
        weights = (values * self.coefficients) @ self.mix
        return ((weights * through_left) @ self.right + (weights * through_right) @ self.left) / 2

    def dense(self, max_bytes: int = checks.MAX_DENSE_BYTES) -> Float[Tensor, "d d d d"]:
        """T itself; the oracle of the tests. Raises MemoryError, with the size, above `max_bytes`."""
        checks.require_affordable(
            f"dense() of shape {[self.d] * 4}",
            self.d**4,
            self.left.dtype,
            max_bytes,
            "use evaluation, contract, inner or leading, which do not form it",
        )
        A = self.forms.dense(max_bytes).flatten(1)
        pairs = (A.T * self.coefficients @ A).reshape([self.d] * 4)
        return (pairs + pairs.permute(0, 2, 1, 3) + pairs.permute(0, 3, 2, 1)) / 3

    # ------------------------------------------------------------------ numbers

    def inner(
        self,
        other: QuarticForm,
        *,
        max_flops: float = MAX_FLOPS,
        max_bytes: int = checks.MAX_SOLVER_BYTES,
    ) -> Float[Tensor, ""]:
        """``<T, T'>`` over all d^4 entries, exact, in float64, without them.

        Costs ``4 n n' d^3`` flops and the A_g of both, ``8 (n + n') d^2`` bytes.

        Raises ValueError for forms of different width, and, with the numbers, for one that costs more
        than `max_flops`; MemoryError above `max_bytes`.
        """
        if self.d != other.d:
            raise ValueError(f"forms of {self.d} and {other.d} coordinates cannot be compared")
        dtype = checks.gram_dtype(self.left)
        self._require_work("an inner product", 4.0 * self.n * other.n * self.d**3, max_flops)
        checks.require_affordable(
            f"the {self.n} and {other.n} quadratic forms of an inner product",
            (self.n + 2 * other.n) * self.d**2,
            dtype,
            max_bytes,
            "make the forms with a smaller rank",
        )
        one, two = self._matrices(dtype), other._matrices(dtype)
        weights = other.coefficients.to(dtype)
        total = torch.zeros((), dtype=dtype, device=self.left.device)
        for coefficient, A in zip(self.coefficients.to(dtype), one, strict=True):
            products = A @ two
            gram = products.diagonal(dim1=1, dim2=2).sum(1)
            crossed = (products * products.mT).sum((1, 2))
            total = total + coefficient * ((gram.square() + 2 * crossed) @ weights) / 3
        return total.to(self.left.dtype)

    def norm(self, **limits: float) -> Float[Tensor, ""]:
        """The Frobenius norm of T; limits as `inner`."""
        return self.inner(self, **limits).clamp_min(0).sqrt()  # type: ignore[arg-type]

    def cosine_similarity(self, other: QuarticForm, **limits: float) -> Float[Tensor, ""]:
        """``<T, T'> / (|T| |T'|)``; 0 where either is zero; limits as `inner`."""
        scale = self.norm(**limits) * other.norm(**limits)
        tiny = torch.finfo(scale.dtype).tiny
        product = self.inner(other, **limits)  # type: ignore[arg-type]
        return torch.where(scale > 0, product / scale.clamp_min(tiny), 0.0)

    # ------------------------------------------------------------------ leading directions

    def leading(
        self,
        k: int = 5,
        *,
        which: Literal["positive", "negative"] = "positive",
        starts: int = 20,
        steps: int = 500,
        tol: float | None = None,
        seed: int = 0,
        max_flops: float = MAX_FLOPS,
        max_bytes: int = checks.MAX_SOLVER_BYTES,
        progress: bool = False,
    ) -> QuarticDirections:
        """Unit directions where q has a local maximum ("negative": minimum), the strongest k found.

        Parameters
        ----------
        starts: int
            Leading eigenvectors of the A_g of largest coefficient take half of them, random directions
            the rest.
        steps: int
            At most, for each start.
        tol: float, optional
            Relative residual ``|T(x,x,x,.) - lambda x| / |lambda|`` that counts as converged; by default
            1e-4 in float32, 1e-10 in float64.

        A shifted symmetric power iteration: the shift makes the form convex at each point, and in
        practice every step raises q, up to a local optimum. Near its end Newton's step is taken where
        it raises q more. More starts find more of them; `hits` says
        how many agreed on each. That the best one found is the global one cannot be certified (the
        problem is NP-hard). A start that has not converged after `steps` is left out, and counted.
        Each step forms a d x d Hessian a start and takes its extreme eigenvalue: ``2 n h + 4 h d^2 +
        2 n d^2 + 8 d^3`` flops.

        Raises ValueError for counts below 1, and for a size that costs more than `max_flops`;
        MemoryError above `max_bytes`.
        """
        checks.require_option("which", which, ("positive", "negative"))
        for name, count in (("k", k), ("starts", starts), ("steps", steps)):
            checks.require_count(name, count, 10**9, "a count")
        hidden = len(self.left)
        a_step = 2.0 * self.n * hidden + (4.0 * hidden + 8.0 * self.d + 2.0 * self.n) * self.d**2
        self._require_work(f"{starts} starts of {steps} steps", starts * steps * a_step, max_flops)
        checks.require_affordable(
            "the Hessians",
            4 * starts * self.d**2 + self.n * self.d * starts,
            self.left.dtype,
            max_bytes,
            "use fewer starts, or fewer coordinates: fold the first layer into a subspace",
        )
        if tol is None:
            tol = 1e-10 if self.left.dtype == torch.float64 else 1e-4
        tol = checks.require_number("tol", tol, "is a relative residual", positive=True)
        checks.require_int("seed", seed)
        sign = 1.0 if which == "positive" else -1.0
        x, done, taken = self._climb(self._starts(starts, seed), sign, steps, tol, progress)
        values = self(x)
        order = (sign * values).argsort(descending=True)
        groups: list[list[int]] = []
        for index in order.tolist():
            if not done[index] or sign * float(values[index]) <= 0:
                continue
            same = (group for group in groups if abs(float(x[group[0]] @ x[index])) > _SAME)
            found = next(same, None)
            if found is None:
                groups.append([index])
            else:
                found.append(index)
        best = torch.tensor([group[0] for group in groups[:k]], dtype=torch.long, device=x.device)
        vectors = fix_signs(x[best])
        gaps = self.contract(vectors) - values[best, None] * vectors
        return QuarticDirections(
            values=values[best],
            vectors=vectors,
            residuals=gaps.norm(dim=1),
            hits=torch.tensor([len(group) for group in groups[:k]], dtype=torch.long),
            start_converged=done,
            start_steps=taken,
            start_values=values,
            space=self.space,
        )

    def _starts(self, count: int, seed: int) -> Tensor:
        generator = checks.generator(seed)
        drawn = torch.randn(count, self.d, generator=generator).to(self.left)
        informed = min(count // 2, self.n)
        strongest = self.coefficients.abs().topk(informed).indices
        if informed:
            drawn[:informed] = self.forms[strongest].eigh(1).vectors[:, 0]
        return _unit(drawn)

    def _climb(
        self, x: Tensor, sign: float, steps: int, tol: float, progress: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Iterate every start until it converges: (x, converged, steps taken)."""
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        taken = torch.full((len(x),), steps, dtype=torch.long)
        for step in tqdm(range(steps), unit="step", disable=not progress):
            active = (~done).nonzero()[:, 0]
            here = x[active]
            slope = sign * self.contract(here)
            values = (slope * here).sum(1)
            gap = (slope - values[:, None] * here).norm(dim=1)
            settled = gap <= tol * values.abs().clamp_min(torch.finfo(x.dtype).tiny)
            done[active[settled]] = True
            taken[active[settled].cpu()] = step
            if bool(settled.all()):
                break
            active, here, slope = active[~settled], here[~settled], slope[~settled]
            values, gap = values[~settled], gap[~settled]
            hessian = sign * self._hessian(here)
            spectrum = torch.linalg.eigvalsh(hessian)
            lowest, size = spectrum[:, 0], spectrum.abs().amax(1)
            # The shift makes the shifted form convex at x: the step then cannot lower it.
            shift = (3 * (_MARGIN * size - lowest)).clamp_min(0)
            moved = _unit(slope + shift[:, None] * here)
            near = (gap <= _NEAR * values.abs()).nonzero()[:, 0]
            if len(near):
                tried = _newton(here[near], slope[near], values[near], hessian[near])
                better = sign * self(tried) >= sign * self(moved[near])
                moved[near[better]] = tried[better]
            x[active] = moved
        return x, done, taken

    def _hessian(self, x: Tensor) -> Tensor:
        """``T(x, x, ., .)`` [m, d, d] = 1/3 sum_g c_g (a_g A_g + 2 A_g x x^T A_g)."""
        values = self.forms.quadratic(x)
        own = InteractionMatrix(self.left, self.right, (values * self.coefficients) @ self.mix)
        reached = torch.stack([self.forms.apply(row[None])[:, 0] for row in x])
        outer = (reached * self.coefficients[:, None]).mT @ reached
        return (own.dense() + 2 * outer) / 3

    def _matrices(self, dtype: torch.dtype) -> Tensor:
        return self.forms.to(dtype).dense()

    def _require_work(self, what: str, flops: float, most: float) -> None:
        if flops > checks.require_number("max_flops", most, "is a limit of work", positive=True):
            raise ValueError(
                f"{what} of {self!r} would take {flops:.1e} flops, more than max_flops={most:.1e}: use "
                f"fewer squares (rank), fold the first layer into a subspace, or raise max_flops"
            )


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def _newton(x: Tensor, slope: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Newton's step along the sphere for ``T(x,x,x,.) = lambda x``; x where q is not concave there.

    Quadratic convergence at the end of the way. Without the concavity it would run into saddles.
    """
    along = x[:, :, None] * x[:, None]
    across = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) - along
    level = values[:, None, None]
    bend = level * across + level.abs() * along - 3 * across @ hessian @ across
    factor, failed = torch.linalg.cholesky_ex(bend)
    step = torch.cholesky_solve((slope - values[:, None] * x)[..., None], factor)[..., 0]
    return torch.where((failed == 0)[:, None], _unit(x + step), x)


@dataclass(frozen=True, eq=False)
class QuarticDirections(Result):
    """Local optima of a quartic form on the unit sphere, strongest first; x and -x are one.

    Attributes
    ----------
    values: [k], ``q(v)``; vectors: [k, d], unit, largest-magnitude coordinate positive
    residuals: [k], ``|T(v,v,v,.) - q(v) v|``
    hits: [k], how many starts ended there
    start_converged, start_steps, start_values: [starts], what became of each start
    space: what the d coordinates are

    Fewer than asked for are held where the starts found fewer.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]
    residuals: Float[Tensor, " k"]
    hits: Int[Tensor, " k"]
    start_converged: Bool[Tensor, " starts"]
    start_steps: Int[Tensor, " starts"]
    start_values: Float[Tensor, " starts"]
    space: str | None = None

    @property
    def converged(self) -> float:
        """The share of starts that converged."""
        return float(self.start_converged.double().mean())

    def top(self, k: int) -> QuarticDirections:
        """The first k of them."""
        checks.require_count("k", k, len(self.values), "the directions held")
        parts = {
            name: getattr(self, name)[:k] for name in ("values", "vectors", "residuals", "hits")
        }
        return QuarticDirections(**{**vars(self), **parts})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a direction: rank, value, residual, hits."""
        import pandas as pd

        return pd.DataFrame(
            {
                "rank": range(1, len(self.values) + 1),
                "value": self.values.tolist(),
                "residual": self.residuals.tolist(),
                "hits": self.hits.tolist(),
            }
        )


def with_residual(layer: BilinearTensor, *, residual: bool = True) -> BilinearTensor:
    """A layer as a bilinear function of ``[x, 1]`` without biases: ``[x, 1] -> [x + layer(x), 1]``.

    Composed with ``second.augmented()`` it is a whole block: biases, the residual connection and the
    constants included. ``residual=False`` leaves x out: ``[layer(x), 1]``.

    Raises ValueError for a residual connection around a layer whose outputs are not its inputs.
    """
    d = layer.d_in
    if residual and layer.d_out != d:
        raise ValueError(
            f"a residual connection needs d_out == d_in, got {layer.d_out} and {d}; pass residual=False"
        )
    whole = layer.augmented()
    ones = torch.eye(d + 1, dtype=layer.dtype, device=layer.device)
    carried = ones if residual else ones[-1:]  # x_i * 1, and 1 * 1
    out = whole.out.new_zeros(layer.d_out + 1, whole.d_hidden + len(carried))
    out[:-1, : whole.d_hidden] = whole.out
    out[-len(carried) :, whole.d_hidden :] = torch.eye(len(carried), dtype=layer.dtype)
    return BilinearTensor(
        torch.cat([whole.left, carried]),
        torch.cat([whole.right, ones[-1:].expand(len(carried), -1)]),
        out,
        input_space=whole.input_space,
    )
