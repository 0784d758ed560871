"""Interventions on a layer: immutable objects that give TransformerLens hooks.

>>> edit = components.ablate([0, 2], positions=-1)
>>> logits = model.run_with_hooks(tokens, fwd_hooks=edit.fwd_hooks(model))
>>> with Chain(edit, other).applied(model):
...     loss = model(tokens, return_type="loss")

An intervention computes what the layer writes, given what it read and what it was about to write. It
keeps nothing of a run: one object serves many models, threads and forwards, and gradients flow through
it. Several compose in the order given: each edits what the one before it left.

**SAEs.** An intervention reads what the layer reads: the output of an SAE attached to `mlp.hook_in`. It
edits what the layer writes before an SAE attached to `hook_mlp_out` sees it, and after one attached to
`mlp.hook_out`. Attach SAEs first: SAELens replaces the hook point, and with it the hooks that it had.
``run_with_hooks_with_saes`` does it in this order.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.hooks.points import (
    LayerPoints,
    LayerTensor,
    Positions,
    as_tensor,
    position_mask,
    require_layer_tensor,
)
from tl_bilinear.tensor import (
    Massive,
    Metric,
    approximation_note,
)

Hooks: TypeAlias = list[tuple[str | Callable[[str], bool], Callable[..., Any]]]
Outside: TypeAlias = Literal["keep", "drop"]


class Intervention(ABC):
    """Something done to one or several layers of a model while it runs."""

    edits_input: ClassVar[bool] = False  # such edits come first in a Chain

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """The model with this intervention, while the context is open."""
        hooked: AbstractContextManager[Any] = model.hooks(fwd_hooks=self.fwd_hooks(model))
        return hooked

    @abstractmethod
    def fwd_hooks(self, model: Any) -> Hooks:
        """``[(hook name, function), ...]`` for ``model.run_with_hooks(fwd_hooks=...)``.

        Each call makes new functions. The hook name is a predicate on names, which TransformerLens
        also takes, so that the hooks find their place behind an SAE too.

        Raises ValueError where the intervention does not fit the model's layer, naming both sides.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputEdit(Intervention):
    """An intervention that replaces a layer's output by a function of its input and its output.

    A subclass defines `edit`, and `check` where something must fit the model.

    Attributes
    ----------
    layer: counts from 0, negative from the end
    positions: which positions: None for all, an int, a slice, ints, or a boolean mask [pos] or
        [batch, pos]. They count within one forward: while generating with a cache, the new token is 0
    """

    layer: int
    positions: Positions = None

    @abstractmethod
    def edit(
        self, x: Float[Tensor, "*pos d_model"], out: Float[Tensor, "*pos d_model"]
    ) -> Float[Tensor, "*pos d_model"]:
        """What the layer writes in place of `out`, having read `x`."""

    def check(self, model: Any, points: LayerPoints) -> None:
        """Raise ValueError where this does not fit the layer."""

    def fwd_hooks(self, model: Any) -> Hooks:
        points = LayerPoints.of(model, self.layer)
        self.check(model, points)
        seen = threading.local()  # what the layer read, between two hooks of one forward

        def read(x: Tensor, hook: Any) -> None:
            seen.x = x

        def write(out: Tensor, hook: Any) -> Tensor:
            edited = self.edit(seen.x, out)
            mask = position_mask(self.positions, out.shape[:-1], out.device)
            return edited if mask is None else torch.where(mask[..., None], edited, out)

        return [(points.reads, read), (points.writes, write)]


@dataclass(frozen=True, eq=False)
class ReplaceLayer(OutputEdit):
    """The layer computed by another factored tensor: a Tucker or CP approximation, say.

    ``ReplaceLayer(cp(tensor, rank=64).tensor, layer=3)``, ``ReplaceLayer(tucker(tensor, 8, 32).tensor,
    layer=3)``; or an Approximation. The tensor stands for the whole layer: the layer's own biases are
    not added.

    keep: the massive tokens of an approximation (``found.fidelity.massive``), which keep the layer's
        own output
    """

    tensor: LayerTensor
    keep: Massive | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        tensor = as_tensor(self.tensor)
        note = approximation_note(tensor)
        what = f"{tensor!r}" if note is None else f"{note}"
        return f"ReplaceLayer(layer {self.layer}: {what})"

    def check(self, model: Any, points: LayerPoints) -> None:
        require_layer_tensor(model, points.layer, self.tensor)

    def edit(self, x: Tensor, out: Tensor) -> Tensor:
        new = as_tensor(self.tensor)(x).to(out.dtype)
        return new if self.keep is None else torch.where(self.keep.beyond(out)[..., None], out, new)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProjectInput(Intervention):
    """Take directions out of what the layer reads: ``x <- x - V^T V x``, V a basis of their span.

    Take out eigenvectors of Q_u, and the layer's own weights give ``u . mlp_out`` without their terms;
    the other terms stay as they were (where there are no input biases). This tests an eigenvector
    causally, without using the answer. Everything else that the layer writes changes as well.

    Eigenvectors w in a metric M are no orthogonal directions of x. What leaves the others' terms as they
    were is the oblique projection ``x <- x - (w . x) M w``: each is read along its filter and taken out
    along its pattern.

    Attributes
    ----------
    directions: [n, d_in] or [d_in]
    layer, positions: as in `OutputEdit`
    space: what the coordinates are; compared with the layer's where given
    metric: the metric in which the directions are eigenvectors; None for the Euclidean one
    """

    directions: Float[Tensor, "*n d_in"]
    layer: int
    positions: Positions = None
    space: str | None = None
    metric: Metric | None = None
    edits_input: ClassVar[bool] = True

    def fwd_hooks(self, model: Any) -> Hooks:
        points = LayerPoints.of(model, self.layer)
        given = checks.require_tensor("directions", self.directions)
        points.require_fit(model, "the direction", width=given.shape[-1], space=self.space)
        rows = given.reshape(-1, given.shape[-1]).to(checks.gram_dtype(given))
        if self.metric is not None:
            self.metric.require_fit("the layer", rows.shape[-1], points.input_space)
            rows = self.metric.root(rows)
        _, scale, basis = torch.linalg.svd(rows, full_matrices=False)
        basis = basis[scale > scale.amax() * max(rows.shape) * torch.finfo(given.dtype).eps]
        filters = patterns = basis
        if self.metric is not None:
            filters, patterns = self.metric.inverse_root(basis), self.metric.root(basis)

        def project(x: Tensor, hook: Any) -> Tensor:
            reads, takes = (
                rows.to(x.device, checks.compute_dtype(x.dtype)) for rows in (filters, patterns)
            )
            edited = x - ((x.to(reads.dtype) @ reads.T) @ takes).to(x.dtype)
            mask = position_mask(self.positions, x.shape[:-1], x.device)
            return edited if mask is None else torch.where(mask[..., None], edited, x)

        return [(points.reads, project)]


class Chain(Intervention):
    """Several interventions as one, in the order given. A chain may hold chains.

    Edits of a layer's input come first: the others read that input.
    """

    def __init__(self, *interventions: Intervention) -> None:
        for each in interventions:
            if not isinstance(each, Intervention):
                raise TypeError(
                    f"Chain takes interventions, Chain(first, second), got {type(each).__name__}"
                )
        self.interventions = interventions

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.interventions))})"

    def flat(self) -> list[Intervention]:
        """The interventions, with those of inner chains in the place of the chain."""
        return [
            one
            for each in self.interventions
            for one in (each.flat() if isinstance(each, Chain) else [each])
        ]

    def fwd_hooks(self, model: Any) -> Hooks:
        ordered = sorted(self.flat(), key=lambda each: not each.edits_input)
        return [hook for each in ordered for hook in each.fwd_hooks(model)]
