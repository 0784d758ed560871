"""Interaction matrices: which pairs of inputs make an output direction, in factored form.

For an output direction u of a bilinear layer, ``u . f(x) = x^T Q x`` with

    ``Q = sum_h p[h] 1/2 (left[h] right[h]^T + right[h] left[h]^T)``,  ``p = out^T u``

(Pearce et al. 2025, section 2 and 3.2). :class:`InteractionMatrix` keeps left, right and p; Q is
symmetric by construction and is formed only by `dense()`. Many directions over the same layer are
one object whose weights have leading dimensions:

>>> Q = tensor.interaction(torch.eye(10))     # ten directions: Q.shape == (10, d, d)
>>> Q.frobenius_norm()                        # [10], no eigendecomposition, no matrix
>>> Q[3].eigh(k=5).vectors                    # [5, d]

**Self and cross.** ``x^T Q x = sum_i Q[i,i] x_i^2 + sum_{i<j} 2 Q[i,j] x_i x_j``: an off-diagonal entry
is met twice. Wherever interactions are listed, `value` is the entry Q[i,j] and `coefficient` what
stands before ``x_i x_j``: Q[i,i] for a self-interaction, 2 Q[i,j] for a cross-interaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Kind, Result, kinds
from tl_bilinear.tensor import eigensolvers, top
from tl_bilinear.tensor.eigendecomposition import Eigendecomposition, Which, fix_signs
from tl_bilinear.tensor.eigensolvers import Method
from tl_bilinear.tensor.factors import Factors, apply, rescaled
from tl_bilinear.tensor.moments import Metric

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class InteractionMatrix(Result):
    """A batch of symmetric d x d matrices that share their hidden neurons.

    Made by `BilinearTensor.interaction`; immutable.

    Parameters
    ----------
    left, right: [h, d]
        Input factors of the layer, shared by the batch.
    weights: [..., h]
        ``p = out^T u`` for each direction; its leading dimensions are the batch.
    space: str, optional
        What the d coordinates are.
    directions: [..., d_out], optional
        The output direction u of each matrix, where it was asked for by one.
    output_space: str, optional
        What the coordinates of the directions are.
    """

    _finite = ("left", "right", "weights")

    left: Float[Tensor, "h d"]
    right: Float[Tensor, "h d"]
    weights: Float[Tensor, "*batch h"]
    space: str | None = None
    directions: Float[Tensor, "*batch d_out"] | None = None
    output_space: str | None = None

    # ------------------------------------------------------------------ what it is

    @property
    def d(self) -> int:
        return self.left.shape[1]

    @property
    def batch_shape(self) -> torch.Size:
        return self.weights.shape[:-1]

    @property
    def shape(self) -> torch.Size:
        """(*batch, d, d)"""
        return torch.Size((*self.batch_shape, self.d, self.d))

    @property
    def factors(self) -> Factors:
        """The matrices with their batch dimensions flattened to one: what solvers take."""
        flat = self.weights.reshape(self.batch_shape.numel(), self.weights.shape[-1])
        return Factors(self.left, self.right, flat)

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def __repr__(self) -> str:
        return (
            f"InteractionMatrix(shape={list(self.shape)}, d_hidden={self.left.shape[0]}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device}, space={self.space or '?'})"
        )

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a single interaction matrix has no length; Q.d is its width")
        return self.batch_shape[0]

    def __getitem__(self, index: Any) -> InteractionMatrix:
        """Index the batch dimensions, as a tensor's."""
        count = len(index) if isinstance(index, tuple) else 1
        if count > len(self.batch_shape) and index is not Ellipsis:
            raise IndexError(
                f"{count} indices for {len(self.batch_shape)} batch dimensions; "
                f"entries of a matrix are in dense()"
            )
        try:
            weights = self.weights[index]
        except IndexError as error:
            raise IndexError(
                f"no matrix {index!r} in a batch of shape {list(self.batch_shape)}: {error}"
            ) from error
        directions = None if self.directions is None else self.directions[index]
        return replace(self, weights=weights, directions=directions)

    def __iter__(self) -> Iterator[InteractionMatrix]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> InteractionMatrix:
        """Move to a device or dtype, as `torch.Tensor.to`; a 16-bit dtype is held as float32."""
        moved = super().to(*args, **kwargs)
        dtype = checks.compute_dtype(moved.dtype)
        return moved if moved.dtype == dtype else moved.to(dtype)

    # ------------------------------------------------------------------ products

    def __matmul__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``Q @ x`` as torch.matmul: x is [d] or [..., d, m]; four matrix products, Q not formed."""
        x = checks.require_tensor("x", x)
        rows = x[None] if x.ndim == 1 else x.mT
        if rows.ndim == 0 or rows.shape[-1] != self.d:
            raise ValueError(
                f"Q @ x needs x of shape [{self.d}] or [..., {self.d}, m], got {checks.shape(x)}"
            )
        product = self.apply(rows.to(self.dtype))
        return product[..., 0, :] if x.ndim == 1 else product.mT

    def apply(self, rows: Float[Tensor, "*rows_batch m d"]) -> Float[Tensor, "*batch m d"]:
        """``rows @ Q``: the matrix on row vectors; leading dimensions broadcast against the batch."""
        rows = checks.require_rows("rows", rows, self.d, checks.meaning("d", self.space), self.left)
        return apply(self.left, self.right, self.weights, rows)

    def quadratic(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """``x^T Q x``: shape [*x_batch, *batch], every vector against every matrix."""
        x = checks.require_rows("x", x, self.d, checks.meaning("d", self.space), self.left)
        hidden = (x @ self.left.T) * (x @ self.right.T)
        values = hidden @ self.factors.weights.T
        return values.reshape(x.shape[:-1] + self.batch_shape)

    def fold(self, directions: Float[Tensor, "n d"], space: str | None = None) -> InteractionMatrix:
        """The matrix in another basis: entries ``d_i^T Q d_j`` for the rows of `directions`."""
        directions = self._directions(directions)
        return replace(
            self,
            left=self.left @ directions.T,
            right=self.right @ directions.T,
            space=space or self._folded_space(),
        )

    def dense(self, max_bytes: int = checks.MAX_DENSE_BYTES) -> Float[Tensor, "*batch d d"]:
        """The matrices themselves; raises MemoryError, with the size in bytes, above `max_bytes`."""
        checks.require_affordable(
            f"dense() of shape {list(self.shape)} in {self.dtype}",
            self.shape.numel(),
            self.dtype,
            max_bytes,
            "use @, quadratic, eigh(k), top(k) or frobenius_norm, which do not form it",
        )
        matrices, exponents = self.factors.normalised()
        dense = rescaled("entries", matrices.dense().flatten(1), exponents, self.dtype)
        return dense.reshape(self.shape)

    # ------------------------------------------------------------------ numbers

    def trace(self) -> Float[Tensor, "*batch"]:
        """``tr Q = p . rowsum(left * right)``, the sum of the eigenvalues."""
        return self.factors.trace().reshape(self.batch_shape)

    def frobenius_norm(self) -> Float[Tensor, "*batch"]:
        """``||Q||_F``, the root of the sum of the squared eigenvalues, without them.

        For many directions ``||Q||_F^2 = p^T M p`` with the float64 Gram M of the hidden neurons
        (one h x h Gram for all of them); for few, where that costs more, through blocks of Q.
        """
        return self.factors.frobenius_norm().reshape(self.batch_shape)

    # ------------------------------------------------------------------ reading it

    def eigh(
        self,
        k: int | None = None,
        *,
        which: Which = "magnitude",
        method: Method = "auto",
        tol: float | None = None,
        seed: int = 0,
        max_bytes: int = checks.MAX_SOLVER_BYTES,
        metric: Metric | None = None,
        progress: bool = False,
    ) -> Eigendecomposition:
        """Eigenpairs ``Q = sum_i lambda_i v_i v_i^T`` (section 3.2, equation 2).

        Parameters
        ----------
        k: int, optional
            How many; None for all d.
        which: "magnitude", "positive" or "negative"
            Largest absolute values, or one end of the spectrum: the largest, or the most negative. Where
            fewer than k have that sign, zeros follow and then the other sign; `n_signed` counts.
        method: "auto", "dense", "lowrank" or "krylov"
            How; the result's `method` says which was taken, its `residuals` how well it did.
        tol: float, optional
            Relative residual ``||Q v - lambda v|| / ||Q||`` that counts as converged, at which "krylov"
            stops; by default 1e-5 in float32, 1e-10 in float64, and never less than 32 eps. Errors of
            the values are about its square: 1e-2 serves a table of three digits.
        seed: int
            Of the random blocks of "krylov": the same seed gives the same result.
        max_bytes: int
            Memory for the solver beside its result; directions are processed in batches that fit.
        metric: Metric, optional
            Eigenpairs of ``M^1/2 Q M^1/2`` instead, mapped back (`tl_bilinear.tensor.moments`): the same
            exact sum, whose terms are ranked by what they contribute to real inputs. Costs two products
            of the factors with the metric more, once for all directions.
        progress: bool
            Show a progress bar over the directions.

        Notes
        -----
        Flops for each direction, with d inputs and h hidden neurons:

        - "dense" forms Q and takes all its eigenpairs: ``2 h d^2 + ~13 d^3``, memory ``4 d^2``. For full
          spectra and small d.
        - "lowrank", where ``2 h < d``: exact in the span of the 2 h factor rows, ``~13 (2h)^3``.
        - "krylov", for few of many pairs: ``8 c d h`` on the factors with c basis columns (about
          3 k + 40 for the spectrum of a trained layer), all directions sharing four matrix products a
          step. About twenty of the columns are random vectors, which prove except with probability
          1e-6 that no pair was left out. Where c passes d / 3 the spectrum is flat and the direction is
          decomposed densely, or, if that does not fit `max_bytes`, returned with `converged` false.

        "auto" compares these, for as many directions as there are: for few, or below d of about 256,
        "krylov" seldom pays. Raises ValueError for k below 1 or above d, or a k that the method asked
        for cannot give.
        """
        factors = self.factors
        if metric is not None:
            metric.require_fit("the interaction matrix", self.d, self.space)
            left, right = metric.root(factors.left), metric.root(factors.right)
            factors = Factors(left, right, factors.weights)
        found = eigensolvers.eigenpairs(
            factors,
            k,
            which=which,
            method=method,
            tol=tol,
            seed=seed,
            max_bytes=max_bytes,
            progress=progress,
        )
        vectors = fix_signs(found.vectors if metric is None else metric.inverse_root(found.vectors))
        batch = self.batch_shape

        def shaped(flat: Tensor) -> Tensor:
            return flat if len(batch) == 1 else flat.reshape((*batch, *flat.shape[1:]))

        return Eigendecomposition(
            values=shaped(found.values),
            vectors=shaped(vectors),
            residuals=shaped(found.residuals),
            bound=shaped(found.bound),
            method=found.method,
            space=self.space,
            tol=found.tol,
            bound_failure=found.bound_failure,
            directions=self.directions,
            output_space=self.output_space,
            which=which,
            rest=shaped(-found.rest if which == "negative" else found.rest),
            norm=shaped(found.norm),
            rounding=shaped(found.rounding),
            metric=metric,
        )

    def top(
        self, k: int, *, kind: Kind = "all", directions: Float[Tensor, "n d"] | None = None
    ) -> TopInteractions:
        """The k interactions with the largest absolute coefficient, exact, streamed in blocks of Q.

        Parameters
        ----------
        k: int
            How many, for each matrix of the batch.
        kind: "all", "self" (diagonal) or "cross" (off-diagonal)
        directions: [n, d], optional
            Of ``fold(directions)``, whose inputs are these rows, instead of Q itself. Faster than
            folding: a bound from the eigenvalues of Q (top.py) leaves out most of the n^2 pairs.
        """
        inputs, space = self.d, self.space
        if directions is not None:
            directions = self._directions(directions)
            inputs, space = len(directions), self._folded_space()
        most = _pair_count(kind, inputs)
        checks.require_count("k", k, most, f"the {kind} interactions of {inputs} inputs")
        every, exponents = self.factors.normalised()
        found = [top.strongest(every[i : i + 1], k, kind, directions) for i in range(len(every))]
        shape = (*self.batch_shape, k)
        if not found:
            none = self.weights.new_empty(shape, dtype=torch.long)
            return TopInteractions(none, none, self.weights.new_empty(shape), space)
        first, second, values = (torch.stack(parts) for parts in zip(*found, strict=True))
        values = rescaled("interactions", values, exponents, self.dtype)
        return TopInteractions(
            first.reshape(shape), second.reshape(shape), values.reshape(shape), space
        )

    def top_of_batch(
        self, k: int, *, kind: Kind = "all", directions: Float[Tensor, "n d"] | None = None
    ) -> tuple[Int[Tensor, " k"], TopInteractions]:
        """The k strongest interactions over all matrices of a batch: (which matrix [k], pairs [k]).

        Matrices whose norm cannot reach the k-th are not searched. The batch is flattened.
        """
        if not self.batch_shape.numel():
            raise ValueError("an empty batch has no interactions")
        every, exponent = self.factors.normalised_together()
        longest, space = 1.0, self.space
        if directions is not None:
            directions = self._directions(directions)
            longest, space = float(directions.square().sum(1).max()), self._folded_space()
        # |d_i^T Q d_j| <= |d|^2 ||Q||, and the coefficient of a pair is twice its entry.
        reach = 2 * longest * every.frobenius_norm()
        most = _pair_count(kind, self.d if directions is None else len(directions))
        checks.require_count("k", k, most * len(every), f"the {kind} interactions of the batch")
        best = top.Strongest(k, like=self.weights)
        for index in reach.argsort(descending=True).tolist():
            if float(reach[index]) < best.threshold:
                break
            one = every[index : index + 1]
            found = top.strongest(one, min(k, most), kind, directions)
            best.add(*found, matrix=index)
        order = best.coefficients.argsort(descending=True, stable=True)[:k]
        values = rescaled("interactions", best.values[order], exponent, self.dtype)
        pairs = TopInteractions(best.first[order], best.second[order], values, space)
        return best.matrices[order], pairs

    def entries(
        self,
        directions: Float[Tensor, "n d"] | None = None,
        first: Int[Tensor, " m"] | None = None,
        second: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "*batch m"]:
        """Entries ``d_i^T Q d_j`` of chosen pairs of directions (of inputs, where none are given).

        Without `first` and `second` the diagonal. Accumulated in float64. Returns [*batch, m]. Raises
        IndexError for a pair that does not exist.
        """
        inputs = self.d
        if directions is not None:
            directions = self._directions(directions)
            inputs = len(directions)
        if (first is None) != (second is None):
            raise ValueError("first and second are the two members of pairs: give both or neither")
        if first is not None and second is not None:
            what = "inputs" if directions is None else "directions"
            first = checks.require_index("first", first, inputs, what, self.left)
            second = checks.require_index("second", second, inputs, what, self.left)
            if first.shape != second.shape or first.ndim != 1:
                raise ValueError(
                    f"first and second must be index vectors of one length, got "
                    f"{checks.shape(first)} and {checks.shape(second)}"
                )
        matrices, exponents = self.factors.normalised()
        found = top.entries(matrices, directions, first, second)
        found = rescaled("entries", found, exponents, self.dtype)
        return found.reshape(*self.batch_shape, found.shape[1])

    def _directions(self, directions: Tensor) -> Tensor:
        return checks.require_matrix(
            "directions", directions, self.d, checks.meaning("d", self.space), self.left
        )

    def _folded_space(self) -> str | None:
        return None if self.space is None else f"directions in {self.space}"


def _pair_count(kind: Kind, inputs: int) -> int:
    """How many interactions of a kind so many inputs have."""
    counts = {
        "self": inputs,
        "cross": inputs * (inputs - 1) // 2,
        "all": inputs * (inputs + 1) // 2,
    }
    if kind not in counts:
        raise ValueError(f"kind must be 'all', 'self' or 'cross', got {kind!r}")
    return counts[kind]


@dataclass(frozen=True, eq=False)
class TopInteractions(Result):
    """The strongest interactions of a matrix, ordered by falling absolute coefficient.

    Attributes
    ----------
    first, second: [..., k], with first <= second; equal for a self-interaction
    values: [..., k], the entries ``Q[i,j]``
    space: what the indices number
    """

    first: Int[Tensor, "*batch k"]
    second: Int[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]
    space: str | None = None

    @property
    def is_self(self) -> Tensor:
        """[..., k], true where an input interacts with itself."""
        return self.first == self.second

    @property
    def coefficients(self) -> Float[Tensor, "*batch k"]:
        """What stands before ``x_i x_j``: Q[i,i] for self, 2 Q[i,j] for cross."""
        return torch.where(self.is_self, self.values, 2 * self.values)

    def top(self, k: int) -> TopInteractions:
        """The first k of them."""
        checks.require_count("k", k, self.first.shape[-1], "the interactions held")
        parts = {name: getattr(self, name)[..., :k] for name in ("first", "second", "values")}
        return replace(self, **parts)

    def to_pandas(self) -> pandas.DataFrame:
        """One row an interaction: matrix (of a flattened batch), the pair, value, coefficient."""
        import pandas as pd

        *batch, k = self.first.shape
        matrix = torch.arange(torch.Size(batch).numel()).repeat_interleave(k)
        columns = {} if not batch else {"matrix": matrix.tolist()}
        columns["first"] = self.first.flatten().tolist()
        columns["second"] = self.second.flatten().tolist()
        columns["kind"] = kinds(self.first, self.second)
        columns["value"] = self.values.flatten().tolist()
        columns["coefficient"] = self.coefficients.flatten().tolist()
        return pd.DataFrame(columns)
