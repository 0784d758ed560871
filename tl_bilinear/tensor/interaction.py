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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.tensor import _checks, _top
from tl_bilinear.tensor._grams import squared_norms
from tl_bilinear.tensor.eigen import Eigendecomposition
from tl_bilinear.tensor.storage import Storable

if TYPE_CHECKING:
    import pandas


Kind = Literal["all", "self", "cross"]
Which = Literal["magnitude", "positive", "negative"]
Method = Literal["auto", "dense", "lowrank", "krylov"]


@dataclass(frozen=True, eq=False, repr=False)
class InteractionMatrix:
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
    """

    left: Float[Tensor, "h d"]
    right: Float[Tensor, "h d"]
    weights: Float[Tensor, "*batch h"]
    space: str | None = None

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
    def flat_weights(self) -> Float[Tensor, "n h"]:
        """The weights with their batch dimensions flattened to one."""
        return self.weights.reshape(self.batch_shape.numel(), self.weights.shape[-1])

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
        if count > len(self.batch_shape):
            raise IndexError(
                f"{count} indices for {len(self.batch_shape)} batch dimensions; "
                f"entries of a matrix are in dense()"
            )
        return InteractionMatrix(self.left, self.right, self.weights[index], self.space)

    def __iter__(self) -> Iterator[InteractionMatrix]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> InteractionMatrix:
        """Move to a device or dtype, as `torch.Tensor.to`; a 16-bit dtype is held as float32."""

        def moved(tensor: Tensor) -> Tensor:
            tensor = tensor.to(*args, **kwargs)
            return tensor.to(_checks.compute_dtype(tensor.dtype))

        return InteractionMatrix(
            moved(self.left), moved(self.right), moved(self.weights), self.space
        )

    # ------------------------------------------------------------------ products

    def __matmul__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``Q @ x`` as torch.matmul: x is [d] or [..., d, m]; four matrix products, Q not formed."""
        x = _checks.require_tensor("x", x)
        rows = x[None] if x.ndim == 1 else x.mT
        if rows.ndim == 0 or rows.shape[-1] != self.d:
            raise ValueError(
                f"Q @ x needs x of shape [{self.d}] or [..., {self.d}, m], got {_checks.shape(x)}"
            )
        product = self.apply(rows.to(self.dtype))
        return product[..., 0, :] if x.ndim == 1 else product.mT

    def apply(self, rows: Float[Tensor, "*rows_batch m d"]) -> Float[Tensor, "*batch m d"]:
        """``rows @ Q``: the matrix on row vectors; leading dimensions broadcast against the batch."""
        weights = self.weights[..., None, :]
        through_left = (rows @ self.left.T) * weights
        through_right = (rows @ self.right.T) * weights
        return (through_left @ self.right + through_right @ self.left) / 2

    def quadratic(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """``x^T Q x``: shape [*x_batch, *batch], every vector against every matrix."""
        x = _checks.require_rows("x", x, self.d, self._meaning(), self.left)
        hidden = (x @ self.left.T) * (x @ self.right.T)
        values = hidden @ self.flat_weights.T
        return values.reshape(x.shape[:-1] + self.batch_shape)

    def fold(self, directions: Float[Tensor, "n d"], space: str | None = None) -> InteractionMatrix:
        """The matrix in another basis: entries ``d_i^T Q d_j`` for the rows of `directions`."""
        directions = self._directions(directions)
        return InteractionMatrix(
            self.left @ directions.T,
            self.right @ directions.T,
            self.weights,
            space or self._folded_space(),
        )

    def dense(self, max_bytes: int = _checks.MAX_DENSE_BYTES) -> Float[Tensor, "*batch d d"]:
        """The matrices themselves; raises MemoryError, with the size in bytes, above `max_bytes`."""
        _checks.require_affordable(
            f"dense() of shape {list(self.shape)} in {self.dtype}",
            self.shape.numel(),
            self.dtype,
            max_bytes,
            "use @, quadratic, eigh(k), top(k) or frobenius_norm, which do not form it",
        )
        flat = self.flat_weights
        # One block is [directions, d, h] before its product, whence the step.
        step = max(1, _top.BLOCK_ELEMENTS // max(1, self.d * flat.shape[1]))
        blocks = []
        for weights in flat.split(step):
            half = (self.left.T * weights[:, None, :]) @ self.right
            blocks.append((half + half.mT) / 2)
        joined = torch.cat(blocks) if blocks else self.left.new_empty(0, self.d, self.d)
        return joined.reshape(self.shape)

    # ------------------------------------------------------------------ numbers

    def trace(self) -> Float[Tensor, "*batch"]:
        """``tr Q = p . rowsum(left * right)``, the sum of the eigenvalues."""
        return self.weights @ (self.left * self.right).sum(1)

    def frobenius_norm(self) -> Float[Tensor, "*batch"]:
        """``||Q||_F``, the root of the sum of the squared eigenvalues, without them.

        For many directions ``||Q||_F^2 = p^T M p`` with the float64 Gram M of the hidden neurons
        (one h x h Gram for all of them); for few, where that costs more, through blocks of Q.
        """
        flat = self.flat_weights
        count, hidden, width = *flat.shape, self.d
        # In flops; a float64 product costs two.
        through_blocks = 4 * count * hidden * width**2
        through_gram = 2 * (4 * hidden**2 * width + count * hidden**2)
        if through_blocks < through_gram:
            squares = torch.stack([self._square_sum(weights) for weights in flat] or [flat.sum(1)])
        else:
            squares = squared_norms(flat, self.left, self.right)
        return squares.clamp_min(0).sqrt().to(self.dtype).reshape(self.batch_shape)

    def _square_sum(self, weights: Tensor) -> Tensor:
        step = max(1, _top.BLOCK_ELEMENTS // max(1, self.d))
        total = weights.new_zeros((), dtype=_checks.gram_dtype(weights))
        entries = _top.FactorEntries(InteractionMatrix(self.left, self.right, weights))
        for start in range(0, self.d, step):
            block = entries.block(slice(start, start + step), slice(None))
            total = total + block.square().sum(dtype=total.dtype)
        return total

    # ------------------------------------------------------------------ reading it

    def eigh(
        self,
        k: int | None = None,
        *,
        which: Which = "magnitude",
        method: Method = "auto",
        tol: float | None = None,
        seed: int = 0,
        max_bytes: int = _checks.MAX_SOLVER_BYTES,
        progress: bool = False,
    ) -> Eigendecomposition:
        """Eigenpairs ``Q = sum_i lambda_i v_i v_i^T`` (section 3.2, equation 2).

        Parameters
        ----------
        k: int, optional
            How many; None for all d.
        which: "magnitude", "positive" or "negative"
            Largest absolute values, or one end of the spectrum: the largest, or the most negative.
        method: "auto", "dense", "lowrank" or "krylov"
            How; the result's `method` says which was taken, its `residuals` how well it did.
        tol: float, optional
            Relative residual ``||Q v - lambda v|| / |lambda_1|`` at which "krylov" stops; by default
            1e-5 in float32, 1e-10 in float64.
        seed: int
            Of the random blocks of "krylov": the same seed gives the same result.
        max_bytes: int
            Memory for the solver beside its result; directions are processed in batches that fit.
        progress: bool
            Show a progress bar over the directions.

        Notes
        -----
        Flops for each direction, with d inputs and h hidden neurons:

        - "dense" forms Q and takes all its eigenpairs: ``2 h d^2 + ~13 d^3``, memory ``4 d^2``. For full
          spectra and small d.
        - "lowrank", where ``2 h < d``: exact in the span of the 2 h factor rows, ``~13 (2h)^3``.
        - "krylov", for few of many pairs: ``8 c d h`` on the factors with c basis columns (about
          4 k + 40 for the spectrum of a trained layer), all directions sharing four matrix products a
          step. Where c passes ``d / (4 - d/h)`` it forms Q once and goes on; where it passes d / 3 the
          spectrum is flat and the direction is decomposed densely, or, if that does not fit
          `max_bytes`, returned with `converged` false. Its `bound` holds except with probability 1e-6.

        "auto" compares these. Raises ValueError for k below 1 or above d, or a k that the method asked
        for cannot give.
        """
        from tl_bilinear.tensor._eigensolvers import eigendecompose

        return eigendecompose(
            self,
            k,
            which=which,
            method=method,
            tol=tol,
            seed=seed,
            max_bytes=max_bytes,
            progress=progress,
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
            folding: a bound from the eigenvalues of Q (``_top``) leaves out most of the n^2 pairs.
        """
        inputs, space = self.d, self.space
        if directions is not None:
            directions = self._directions(directions)
            inputs, space = len(directions), self._folded_space()
        most = _pair_count(kind, inputs)
        _checks.require_count("k", k, most, f"the {kind} interactions of {inputs} inputs")
        found = [self._top_of_one(weights, k, kind, directions) for weights in self.flat_weights]
        rows, columns, values = (
            torch.stack(parts).reshape(*self.batch_shape, k)
            if found
            else self.weights.new_empty(
                *self.batch_shape, k, dtype=torch.long if i < 2 else self.dtype
            )
            for i, parts in enumerate(zip(*found, strict=True) if found else ((), (), ()))
        )
        return TopInteractions(rows, columns, values, space)

    def top_of_batch(
        self, k: int, *, kind: Kind = "all", directions: Float[Tensor, "n d"] | None = None
    ) -> tuple[Int[Tensor, " k"], TopInteractions]:
        """The k strongest interactions over all matrices of a batch: (which matrix [k], pairs [k]).

        Matrices whose norm cannot reach the k-th are not searched. The batch is flattened.
        """
        flat = InteractionMatrix(self.left, self.right, self.flat_weights, self.space)
        if not len(flat):
            raise ValueError("an empty batch has no interactions")
        longest = 1.0
        if directions is not None:
            longest = float(self._directions(directions).square().sum(1).max())
        reach = 2 * longest * flat.frobenius_norm()
        most = _pair_count(kind, self.d if directions is None else len(directions))
        found: list[tuple[Tensor, TopInteractions]] = []
        threshold = 0.0
        for index in reach.argsort(descending=True):
            if float(reach[index]) < threshold:
                break
            found.append((index, flat[index].top(min(k, most), kind=kind, directions=directions)))
            coefficients = torch.cat([pairs.coefficients.abs() for _, pairs in found])
            if len(coefficients) >= k:
                threshold = float(coefficients.topk(k).values[-1])
                found = [
                    (i, pairs)
                    for i, pairs in found
                    if float(pairs.coefficients[0].abs()) >= threshold
                ]
        which = torch.cat([index.expand(len(pairs.rows)) for index, pairs in found])
        rows, columns, values = (
            torch.cat([getattr(pairs, name) for _, pairs in found])
            for name in ("rows", "columns", "values")
        )
        joined = TopInteractions(rows, columns, values, found[0][1].space)
        _checks.require_count("k", k, len(rows), f"the {kind} interactions of the batch")
        kept = joined.coefficients.abs().argsort(descending=True, stable=True)[:k]
        return which[kept], TopInteractions(rows[kept], columns[kept], values[kept], joined.space)

    def _top_of_one(
        self, weights: Tensor, k: int, kind: Kind, directions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        one = InteractionMatrix(self.left, self.right, weights)
        if kind == "self":
            diagonal = one.entries(directions)
            rows = columns = diagonal.abs().topk(k).indices
            return rows, columns, diagonal[rows]
        if directions is None:
            rows, columns, values = _top.strongest_of_factors(one, k, kind)
        else:
            rows, columns = _top.strongest_of_directions(one, directions, k, kind)
            values = one.entries(directions, rows, columns)
        coefficients = torch.where(rows == columns, 1.0, 2.0) * values.abs()
        kept = coefficients.topk(k).indices
        return rows[kept], columns[kept], values[kept]

    def entries(
        self,
        directions: Float[Tensor, "n d"] | None = None,
        rows: Int[Tensor, " m"] | None = None,
        columns: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "*batch m"]:
        """Entries ``d_i^T Q d_j`` of chosen pairs of directions (of inputs, where none are given).

        Without `rows` and `columns` the diagonal. Accumulated in float64. Returns [*batch, m].
        """
        if directions is None:
            left, right = self.left.T, self.right.T
        else:
            directions = self._directions(directions)
            used = torch.arange(len(directions), device=self.device)
            if rows is not None and columns is not None:
                used, places = torch.cat([rows, columns]).unique(return_inverse=True)
                rows, columns = places[: len(rows)], places[len(rows) :]
            left, right = directions[used] @ self.left.T, directions[used] @ self.right.T
        if rows is None or columns is None:
            rows = columns = torch.arange(len(left), device=self.device)
        dtype = _checks.gram_dtype(self.left)
        weights = self.flat_weights.to(dtype)
        step = max(1, _top.BLOCK_ELEMENTS // (4 * self.left.shape[0]))
        parts = []
        for i, j in zip(rows.split(step), columns.split(step), strict=True):
            a, b = left[i].to(dtype), right[i].to(dtype)
            hidden = (a * right[j] + b * left[j]) / 2
            parts.append(weights @ hidden.T)
        found = torch.cat(parts, 1) if parts else weights.new_empty(len(weights), 0)
        return found.to(self.dtype).reshape(*self.batch_shape, len(rows))

    def _directions(self, directions: Tensor) -> Tensor:
        return _checks.require_rows("directions", directions, self.d, self._meaning(), self.left)

    def _folded_space(self) -> str | None:
        return None if self.space is None else f"directions in {self.space}"

    def _meaning(self) -> str:
        return "d" if self.space is None else f"d, {self.space}"


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
class TopInteractions(Storable):
    """The strongest interactions of a matrix, ordered by falling absolute coefficient.

    Attributes
    ----------
    rows, columns: [..., k], with rows <= columns; equal for a self-interaction
    values: [..., k], the entries ``Q[i,j]``
    space: what the indices number
    """

    rows: Int[Tensor, "*batch k"]
    columns: Int[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]
    space: str | None = None

    @property
    def is_self(self) -> Tensor:
        """[..., k], true where an input interacts with itself."""
        return self.rows == self.columns

    @property
    def coefficients(self) -> Float[Tensor, "*batch k"]:
        """What stands before ``x_i x_j``: Q[i,i] for self, 2 Q[i,j] for cross."""
        return torch.where(self.is_self, self.values, 2 * self.values)

    def top(self, k: int) -> TopInteractions:
        """The first k of them."""
        _checks.require_count("k", k, self.rows.shape[-1], "the interactions held")
        return TopInteractions(
            self.rows[..., :k], self.columns[..., :k], self.values[..., :k], self.space
        )

    def to_pandas(self, labels: Sequence[str] | None = None) -> pandas.DataFrame:
        """One row an interaction: matrix (of a flattened batch), i, j, kind, value, coefficient.

        `labels`, a name for each input, adds the columns label_i and label_j.
        """
        import pandas as pd

        k = self.rows.shape[-1]
        count = self.rows.shape[:-1].numel()
        table = pd.DataFrame(
            {
                "matrix": torch.arange(count).repeat_interleave(k).numpy(),
                "i": self.rows.flatten().cpu().numpy(),
                "j": self.columns.flatten().cpu().numpy(),
                "kind": ["self" if s else "cross" for s in self.is_self.flatten().tolist()],
                "value": self.values.detach().flatten().cpu().numpy(),
                "coefficient": self.coefficients.detach().flatten().cpu().numpy(),
            }
        )
        if labels is not None:
            table["label_i"] = [labels[i] for i in self.rows.flatten().tolist()]
            table["label_j"] = [labels[j] for j in self.columns.flatten().tolist()]
        return table
