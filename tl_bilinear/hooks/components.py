"""Components of a layer: scalar functions of its input, each written along a direction.

An eigencomponent of an output direction u is ``lambda_i (v_i . x)^2`` (Pearce et al. 2025, equation 3),
a HOSVD component ``sigma_i q_i(x) = u_i . f(x)`` (section 3.3). What a component does to the layer's
output needs a write direction w. Removing eigencomponent i of u is

    ``mlp_out <- mlp_out - lambda_i (v_i . x)^2 w``  with  ``u . w = 1``,

so that u . mlp_out loses exactly that component, and r . mlp_out loses ``r . w`` times it for any r.

>>> u = model.W_U[:, token]
>>> eigen = BilinearTensor.from_model(model, 3).interaction(u).eigh(k=8)
>>> parts = EigenComponents(eigen, layer=3)
>>> parts.activations(x)                               # [..., 8]
>>> edit = parts.ablate([0, 2], positions=-1)          # or keep, scale, steer
>>> model.run_with_hooks(tokens, fwd_hooks=edit.fwd_hooks(model))

**Choosing.** `which` indexes the grid of components, [k] or [directions, k], as it would index a tensor
of that shape: ``0``, ``[0, 2]``, ``(1, slice(3))``, a boolean mask; None means all. A component that two
interventions of a chain ablate is subtracted twice.

**Biases.** The components of a biased layer are those of its interaction part; its linear and constant
parts belong to no component. In ``tensor.augmented()`` they are part of the form of [x, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.hooks.interventions import OutputEdit, Outside
from tl_bilinear.hooks.points import LayerPoints, Positions
from tl_bilinear.tensor import HOSVD, Eigendecomposition
from tl_bilinear.tensor.reexpress import dual_directions


class Components(ABC):
    """What eigencomponents and HOSVD components share; see the module's documentation.

    Attributes
    ----------
    layer: counts from 0, negative from the end
    shape: of the grid of components: [k] or [directions, k]
    reads: [n, d_out], the output directions
    writes: [n, d_out], the direction along which the components of each are written
    """

    layer: int
    hook_name: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    @abstractmethod
    def reads(self) -> Float[Tensor, "n d_out"]: ...

    @property
    @abstractmethod
    def writes(self) -> Float[Tensor, "n d_out"]: ...

    @abstractmethod
    def at(self, x: Float[Tensor, "... d_in"], index: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        """Activations of the components numbered `index` in the flattened grid, from the weights."""

    @abstractmethod
    def check(self, model: Any, points: LayerPoints) -> None:
        """Raise ValueError, naming both sides, where these are components of another layer."""

    def current(
        self,
        x: Float[Tensor, "... d_in"],
        out: Float[Tensor, "... d_out"],
        index: Int[Tensor, " m"],
    ) -> Float[Tensor, "... m"]:
        """The components as interventions see them, given what the layer is about to write."""
        return self.at(x, index)

    # ------------------------------------------------------------------ the grid

    @property
    def count(self) -> int:
        return self.shape.numel()

    def index(self, which: Any = None) -> Int[Tensor, "..."]:
        """The numbers, in the flattened grid, of the components chosen; in the shape of the choice.

        Raises IndexError for a choice outside the grid, or one that names a component twice.
        """
        grid = torch.arange(self.count).reshape(self.shape)
        try:
            if isinstance(which, str):
                raise IndexError("components are numbered, not named")
            chosen = grid if which is None else grid[which]
        except (IndexError, TypeError) as error:
            raise IndexError(
                f"{which!r} chooses nothing in components of shape {list(self.shape)}: {error}"
            ) from None
        if len(chosen.unique()) != chosen.numel():
            raise IndexError(f"{which!r} names a component twice")
        return chosen

    def direction_of(self, index: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The number of the direction that each component belongs to."""
        return index // (self.count // max(1, len(self.reads)))

    def activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "..."]:
        """Every component's activation on layer inputs: [..., *shape]."""
        return self.at(x, self.index().flatten()).reshape(x.shape[:-1] + self.shape)

    def per_direction(
        self, coefficients: Float[Tensor, "... m"], index: Int[Tensor, " m"]
    ) -> Float[Tensor, "... n"]:
        """Sums of coefficients over the components of each direction."""
        sums = coefficients.new_zeros(*coefficients.shape[:-1], len(self.reads))
        return sums.index_add(-1, self.direction_of(index).to(sums.device), coefficients)

    def written(
        self, coefficients: Float[Tensor, "... m"], index: Int[Tensor, " m"]
    ) -> Float[Tensor, "... d_out"]:
        """What the components numbered `index` write with these coefficients."""
        return self.per_direction(coefficients, index) @ self.writes

    # ------------------------------------------------------------------ interventions

    def ablate(self, which: Any = None, *, positions: Positions = None) -> EditComponents:
        """Remove components."""
        return self._edit(which, 0.0, 0.0, positions)

    def scale(
        self, factor: float | Tensor, which: Any = None, *, positions: Positions = None
    ) -> EditComponents:
        """Multiply components by one factor, or each by its own: a tensor in the shape of the choice."""
        return self._edit(which, factor, 0.0, positions)

    def steer(
        self,
        which: Any = None,
        *,
        by: float | Tensor | None = None,
        to: float | Tensor | None = None,
        positions: Positions = None,
    ) -> EditComponents:
        """Add to the activations of components (`by`), or set them (`to`).

        Both take a number, or a tensor in the shape of the choice.

        Raises ValueError unless exactly one of `by` and `to` is given.
        """
        if to is None and by is not None:
            return self._edit(which, 1.0, by, positions)
        if by is None and to is not None:
            return self._edit(which, 0.0, to, positions)
        raise ValueError(
            f"steer takes either `by` (added to the activation) or `to` (its new value); got by={by!r}, "
            f"to={to!r}"
        )

    def keep(
        self, which: Any = None, *, outside: Outside = "keep", positions: Positions = None
    ) -> KeepComponents:
        """Keep only the chosen components of every direction's reading u . mlp_out.

        Everything else in u . mlp_out goes: components that are not chosen, those that a truncated
        decomposition does not hold, and the biases (unless the form is that of `augmented()`). A
        direction of which nothing is chosen reads zero. Several directions keep exactly their own
        components if they are orthogonal or written with ``write="dual"``. To remove only components
        that are held, `ablate` the others.

        outside: "keep" or "drop" the part of mlp_out that is outside the span of the directions
        """
        if outside not in ("keep", "drop"):
            raise ValueError(f"outside must be 'keep' or 'drop', got {outside!r}")
        return KeepComponents(
            self, self.index(which).flatten(), outside, layer=self.layer, positions=positions
        )

    def _edit(
        self,
        which: Any,
        multiply: float | Tensor,
        add: float | Tensor,
        positions: Positions,
    ) -> EditComponents:
        chosen = self.index(which)

        def each(value: float | Tensor) -> float | Tensor:
            if not isinstance(value, Tensor):
                return float(value)
            if value.ndim == 0:
                return value
            try:
                return value.broadcast_to(chosen.shape).flatten()
            except RuntimeError:
                raise ValueError(
                    f"values for components of shape {list(chosen.shape)} were given in shape "
                    f"{checks.shape(value)}"
                ) from None

        return EditComponents(
            self,
            chosen.flatten(),
            each(multiply),
            each(add),
            layer=self.layer,
            positions=positions,
        )


@dataclass(frozen=True, eq=False)
class EigenComponents(Components):
    """Eigencomponents ``lambda_i (v_i . x)^2`` of output directions.

    Parameters
    ----------
    eigen: Eigendecomposition
        Of ``tensor.interaction(directions)``, one matrix [k] or a batch [n, k]; it knows them.
    layer: int
        Counts from 0, negative from the end.
    write: "minimal", "dual" or a tensor in the shape of `eigen.directions`
        The write direction w, with u . w = 1. "minimal": u / |u|^2, the smallest change. "dual": the
        row of the set's pseudo-inverse, which changes the reading of no other direction of the set. A
        tensor (a feature's decoder row, say) is scaled to u . w = 1.
    augmented: bool, optional
        Whether the matrices are those of ``tensor.augmented()``, forms of [x, 1]; by default as
        `eigen.space` says.

    Raises ValueError for shapes that disagree, a direction that is zero, a write direction orthogonal
    to its own u, and for "dual" a set that is not independent (naming its rank).
    """

    eigen: Eigendecomposition
    layer: int
    write: Literal["minimal", "dual"] | Float[Tensor, "*batch d_out"] = "minimal"
    augmented: bool | None = None
    _writes: Tensor = field(init=False, repr=False)

    hook_name: ClassVar[str] = "hook_eigen"

    def __post_init__(self) -> None:
        if self.eigen.directions is None:
            raise ValueError(
                "these eigenpairs do not say which output direction they belong to, so that nothing can "
                "be written along it: take them from tensor.interaction(directions).eigh(k)"
            )
        if len(self.eigen.batch_shape) > 1:
            raise ValueError(
                f"components take the eigenpairs of one matrix or of a list of them, got a batch of "
                f"shape {list(self.eigen.batch_shape)}: flatten the directions to [n, d_out]"
            )
        if self.augmented is None:
            object.__setattr__(self, "augmented", _is_augmented(self.eigen.space))
        object.__setattr__(self, "_writes", _write_directions(self.reads, self.write))

    @property
    def shape(self) -> torch.Size:
        return self.eigen.values.shape

    @property
    def reads(self) -> Float[Tensor, "n d_out"]:
        given = self.eigen.directions
        assert given is not None  # checked when it was made
        return given.reshape(-1, given.shape[-1]).to(self.eigen.values.dtype)

    @property
    def writes(self) -> Float[Tensor, "n d_out"]:
        return self._writes

    def vectors_at(self, index: Int[Tensor, "..."]) -> Float[Tensor, "... d_in"]:
        """The eigenvectors of the components numbered `index`."""
        return self.eigen.vectors.flatten(0, -2)[index]

    def at(self, x: Float[Tensor, "... d_in"], index: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        products = _layer_input(x, self.augmented, self.eigen.vectors) @ self.vectors_at(index).T
        return products.square() * self.eigen.values.flatten()[index]

    def check(self, model: Any, points: LayerPoints) -> None:
        _require_form_fits(
            model, points, "the eigendecomposition", self.eigen.d, self.eigen.space, self.augmented
        )
        width = self.reads.shape[-1]
        space = self.eigen.output_space
        points.require_fit(
            model,
            "the output direction",
            width=width,
            space=space,
            output=True,
            field="output_space",
        )

    def low_rank(
        self, k: int, *, outside: Outside = "keep", positions: Positions = None
    ) -> KeepComponents:
        """The layer's rank-k version for these directions.

        ``sum_u w_u sum_{i<=k} lambda_i (v_i . x)^2`` with pseudo-inverse rows w_u, plus the part of
        mlp_out outside the span of the directions, unless `outside` drops it. For a set that spans the
        output space, dependent or not, use ``ReplaceLayer(reexpress(tensor, U).eigenvector_form(k))``.

        Raises ValueError for k below 1 or above the pairs held.
        """
        checks.require_count("k", k, self.eigen.k, "the pairs held")
        return replace(self, write="dual").keep(
            (..., slice(k)), outside=outside, positions=positions
        )

    def to(self, *args: Any, **kwargs: Any) -> EigenComponents:
        """Move to a device or dtype, as `torch.Tensor.to`."""
        write = self.write if isinstance(self.write, str) else self.write.to(*args, **kwargs)
        return replace(self, eigen=self.eigen.to(*args, **kwargs), write=write)


@dataclass(frozen=True, eq=False)
class HOSVDComponents(Components):
    """HOSVD components of a layer: output directions u_i with their forms ``sigma_i q_i(x)``.

    The recorded activation is the form, computed from the weights. An intervention works on the
    component as the output has it, ``u_i . mlp_out``: removing it is ``mlp_out <- mlp_out -
    (u_i . mlp_out) u_i``. The two agree on an unedited layer without biases, or with
    ``hosvd(tensor.augmented())``. Otherwise the intervention also takes the biases' part along u_i.

    Parameters
    ----------
    hosvd: HOSVD of mode "output"
        One that was loaded from disk has no forms: it serves interventions, not recording.
    layer: int
    augmented: bool, optional
        Whether it is that of ``tensor.augmented()``; by default as the forms' `space` says.
    """

    hosvd: HOSVD
    layer: int
    augmented: bool | None = None

    hook_name: ClassVar[str] = "hook_hosvd"

    def __post_init__(self) -> None:
        if self.hosvd.mode != "output":
            raise ValueError(
                f"HOSVD components are written along output directions, this HOSVD is of mode "
                f"{self.hosvd.mode!r}; take hosvd(tensor, k)"
            )
        if self.augmented is None:
            forms = self.hosvd.interactions
            object.__setattr__(self, "augmented", forms is not None and _is_augmented(forms.space))

    @property
    def shape(self) -> torch.Size:
        return self.hosvd.values.shape

    @property
    def reads(self) -> Float[Tensor, "n d_out"]:
        return self.hosvd.vectors

    @property
    def writes(self) -> Float[Tensor, "n d_out"]:
        return self.hosvd.vectors

    def at(self, x: Float[Tensor, "... d_in"], index: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        forms = self.hosvd.interactions
        if forms is None:
            raise ValueError(
                "this HOSVD holds no quadratic forms (save does not store them); put them back with "
                "dataclasses.replace(hosvd, interactions=tensor.interaction(hosvd.vectors / "
                "hosvd.values[:, None]))"
            )
        x = _layer_input(x, self.augmented, forms.left)
        return forms[index].quadratic(x) * self.hosvd.values[index]

    def current(
        self,
        x: Float[Tensor, "... d_in"],
        out: Float[Tensor, "... d_out"],
        index: Int[Tensor, " m"],
    ) -> Float[Tensor, "... m"]:
        return out.to(self.reads.dtype) @ self.reads[index].T

    def check(self, model: Any, points: LayerPoints) -> None:
        hosvd, forms = self.hosvd, self.hosvd.interactions
        width = hosvd.vectors.shape[-1]
        points.require_fit(model, "the HOSVD", width=width, space=hosvd.space, output=True)
        if forms is not None:
            _require_form_fits(model, points, "the HOSVD", forms.d, forms.space, self.augmented)

    def to(self, *args: Any, **kwargs: Any) -> HOSVDComponents:
        """Move to a device or dtype, as `torch.Tensor.to`."""
        return replace(self, hosvd=self.hosvd.to(*args, **kwargs))


# ---------------------------------------------------------------------- what they make


@dataclass(frozen=True, eq=False)
class EditComponents(OutputEdit):
    """``mlp_out <- mlp_out + (multiply a + add - a) w`` for chosen components of activation a.

    Made by `Components.ablate`, `scale` and `steer`.

    Attributes
    ----------
    components: the grid that the edited components are chosen from
    index: [m], their numbers in the flattened grid
    multiply, add: numbers, or [m]
    """

    components: Components
    index: Int[Tensor, " m"]
    multiply: float | Tensor = 0.0
    add: float | Tensor = 0.0

    def check(self, model: Any, points: LayerPoints) -> None:
        self.components.check(model, points)

    def edit(self, x: Tensor, out: Tensor) -> Tensor:
        current = self.components.current(x, out, self.index)
        change = current * (self.multiply - 1) + self.add
        return out + self.components.written(change, self.index).to(out.dtype)


@dataclass(frozen=True, eq=False)
class KeepComponents(OutputEdit):
    """Only chosen components of every direction's reading remain; made by `Components.keep`.

    ``mlp_out <- mlp_out + sum_u (kept_u - u . mlp_out) w_u``, or ``sum_u kept_u w_u`` alone where
    `outside` is "drop".
    """

    components: Components
    index: Int[Tensor, " m"]
    outside: Outside = "keep"

    def check(self, model: Any, points: LayerPoints) -> None:
        self.components.check(model, points)

    def edit(self, x: Tensor, out: Tensor) -> Tensor:
        parts = self.components
        kept = parts.per_direction(parts.current(x, out, self.index), self.index)
        if self.outside == "drop":
            return (kept @ parts.writes).to(out.dtype)
        reading = out.to(parts.reads.dtype) @ parts.reads.T
        return out + ((kept - reading) @ parts.writes).to(out.dtype)


# ---------------------------------------------------------------------- small parts


def _is_augmented(space: str | None) -> bool:
    return space is not None and space.startswith("[") and space.endswith(", 1]")


def _require_form_fits(
    model: Any,
    points: LayerPoints,
    what: str,
    width: int,
    space: str | None,
    augmented: bool | None,
) -> None:
    if augmented:
        width -= 1
        space = space[1:-4] if space is not None and _is_augmented(space) else space
    points.require_fit(model, what, width=width, space=space)


def _layer_input(x: Tensor, augmented: bool | None, like: Tensor) -> Tensor:
    """x, or [x, 1], as the form takes it."""
    if augmented:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    return checks.require_rows("x", x, like.shape[-1], "what the form reads", like)


def _write_directions(reads: Tensor, write: str | Tensor) -> Tensor:
    """[n, d_out] with ``u . w = 1`` in each row."""
    squares = reads.square().sum(-1, keepdim=True)
    zero = (squares[:, 0] == 0).nonzero()[:, 0].tolist()
    if zero:
        raise ValueError(f"output directions {zero} are zero: nothing can be written along them")
    if isinstance(write, Tensor):
        rows = checks.require_rows("write", write, reads.shape[-1], "d_out", reads)
        rows = rows.reshape(-1, reads.shape[-1])
        if rows.shape != reads.shape:
            raise ValueError(
                f"write must hold one direction for each of {len(reads)}, got {checks.shape(write)}"
            )
        overlap = (reads * rows).sum(-1, keepdim=True)
        smallest = 100 * torch.finfo(reads.dtype).eps * reads.norm(dim=-1) * rows.norm(dim=-1)
        if bad := (overlap[:, 0].abs() <= smallest).nonzero()[:, 0].tolist():
            raise ValueError(
                f"write directions {bad} are orthogonal to their output directions, and cannot be "
                f"scaled to u . w = 1"
            )
        return rows / overlap
    if write == "minimal":
        return reads / squares
    if write == "dual":
        dual, rank = dual_directions(reads)
        if rank < len(reads):
            raise ValueError(
                f"write='dual' needs independent directions, these {len(reads)} have rank {rank}; "
                f"leave some out, take write='minimal', or replace the whole layer: "
                f"ReplaceLayer(reexpress(tensor, directions).eigenvector_form(k), layer=...)"
            )
        return dual
    raise ValueError(f"write must be 'minimal', 'dual' or a tensor, got {write!r}")
