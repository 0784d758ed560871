"""What a change of the layer's output at one token does to the next one, beside random changes.

Three kinds of change, each multiplied by a factor (0 removes it):

- ``eigen``: the k leading eigenvectors of an output feature, as `FeatureInteractions.components` does;
- ``feature``: what the output dictionary says that the feature writes, ``z_a d_a``;
- ``pair``: what two input features make together, ``2 B(z_b d_b, z_c d_c) / s^2``, in the whole layer's
  output (once for a feature with itself): along each output feature it is that pair of the exact sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.explorer.documents import Document
from tl_bilinear.features import FeatureRun
from tl_bilinear.features.passage import fires_as, output_hooks
from tl_bilinear.features.unembedding import token_names
from tl_bilinear.hooks import EigenComponents
from tl_bilinear.hooks.effects import starts_at_blocks
from tl_bilinear.tensor import BilinearTensor, Eigendecomposition

Kind = Literal["eigen", "feature", "pair"]
KEPT_ROWS = 64


@dataclass(frozen=True)
class Change:
    """What is multiplied by `factor`: k eigenvectors, the feature, or a pair of input features."""

    kind: Kind
    factor: float = 0.0
    k: int = 0
    first: int = 0
    second: int = 0

    @classmethod
    def of(cls, asked: Document) -> Change:
        """From a request. Raises ValueError where it is none."""
        kind = asked.get("kind", "eigen")
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be 'eigen', 'feature' or 'pair', got {kind!r}")
        names = {"eigen": ("k",), "feature": (), "pair": ("first", "second")}[kind]
        try:
            return cls(kind, float(asked["factor"]), **{name: int(asked[name]) for name in names})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{', '.join((*names, 'factor'))}: give numbers") from error

    def document(self) -> Document:
        names = {"eigen": ("k",), "feature": (), "pair": ("first", "second")}[self.kind]
        return {name: getattr(self, name) for name in ("kind", "factor", *names)}


def writes_itself(run: FeatureRun) -> bool:
    """Whether the output dictionary reads and writes the layer's output."""
    known, outputs = run.features, run.features.outputs
    places = (None, *output_hooks(known.model, known.layer))
    return (
        outputs.encode is not None and outputs.hook in places and (outputs.encoder_hook in places)
    )


@dataclass
class WhatIf:
    """Effects of changes at tokens of a run.

    controls: random changes beside each, of its length; changed: tokens listed, the most changed first
    """

    run: FeatureRun
    controls: int = 8
    changed: int = 8
    _residuals: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _read: tuple[tuple[int, int], Tensor] | None = field(default=None, init=False, repr=False)
    _components: dict[tuple[int, int], EigenComponents] = field(
        default_factory=dict, init=False, repr=False
    )

    @torch.no_grad()
    def part(
        self, change: Change, feature: int, row: int, position: int
    ) -> Float[Tensor, " d_out"]:
        """The part of the layer's output at a token of the run that a change multiplies.

        Raises IndexError for features that there are not, ValueError where it cannot be said what a
        feature writes.
        """
        run, known, out = self.run, self.run.features, self.run.output[row, position]
        feature = known.number(feature)
        if change.kind == "eigen":
            without = self._leading(feature, change.k).ablate()
            return out - without.edit(run.x[row, position][None], out[None])[0]
        if change.kind == "feature":
            if not writes_itself(run):
                raise ValueError(
                    f"{known.outputs!r} does not read and write at {known.output_hook!r}, so what a "
                    f"feature writes there is not known"
                )
            z = known.outputs.read(out[None]).coefficients[0, feature]
            return z * known.outputs.decoder[feature].to(out)
        one, other = (known.number(each, "input") for each in (change.first, change.second))
        u, v = self._written(row, position, torch.tensor([one, other]))
        form = self._form
        together = form(u) if one == other else form(u + v) - form(u) - form(v)
        return together.to(out)

    @torch.no_grad()
    def strongest_pair(self, feature: int, row: int, position: int) -> tuple[int, int] | None:
        """The pair of input features that contributes most at a token; None where none is active."""
        known = self.run.features
        active = self._coefficients(row, position).nonzero()[:, 0]
        if not len(active):
            return None
        rows = self._written(row, position, active).to(known.hook_tensor.left)
        entries = known.hook_tensor.interaction(known.directions[feature]).fold(rows).dense()
        first, second = torch.triu_indices(len(active), len(active))
        sizes = entries[first, second].abs() * torch.where(first == second, 1.0, 2.0)
        best = int(sizes.argmax())
        return int(active[first[best]]), int(active[second[best]])

    def prepare(self, features: list[int], eigen: Eigendecomposition, k: int) -> None:
        """Take the k leading of eigenvectors found already, in place of those taken before.

        eigen: of the features' interaction matrices in ``features.layer_tensor``
        """
        layer = self.run.features.layer
        self._components = {
            (feature, k): EigenComponents(eigen[i].top(k), layer)
            for i, feature in enumerate(features)
        }

    @cached_property
    def _form(self) -> BilinearTensor:
        return self.run.features.hook_tensor.parts().interaction

    def _leading(self, feature: int, k: int) -> EigenComponents:
        found = self._components.get((feature, k))
        return self.run.features.components(feature, k) if found is None else found

    def _coefficients(self, row: int, position: int) -> Float[Tensor, " n_in"]:
        """What the input dictionary reads at a token."""
        if self._read is None or self._read[0] != (row, position):
            run = self.run
            source = None if run.source is None else run.source[row, position][None]
            x = run.hook_activations[row, position][None]
            found = run.features.inputs.read(x, source).coefficients[0]
            self._read = ((row, position), found)
        return self._read[1]

    def _written(
        self, row: int, position: int, features: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        """``z_b d_b / s`` of some input features at a token."""
        z = self._coefficients(row, position)
        scaled = z[features] / self.run.scale[row, position]
        return scaled[:, None] * self.run.features.input_directions[features].to(z)

    @torch.no_grad()
    def effects(
        self, feature: int, row: int, position: int, changes: list[Change]
    ) -> list[Document]:
        """Of each change, as the page takes it: next tokens before and after, KL divergence in nats."""
        whole = [replace(change, factor=0.0) for change in changes]
        parts = {each: self.part(each, feature, row, position) for each in dict.fromkeys(whole)}
        added = [
            (change.factor - 1) * parts[each] for change, each in zip(changes, whole, strict=True)
        ]
        width, generator = len(added[0]), torch.Generator().manual_seed(0)
        drawn = torch.randn(self.controls, width, generator=generator).to(added[0])
        drawn = drawn / drawn.norm(dim=1, keepdim=True)
        rows = [torch.zeros_like(added[0])]
        for each in added:
            rows += [each, *(drawn * each.norm())]
        predicted = self._predicted(row, position, torch.stack(rows)).float().log_softmax(-1)
        before, step = predicted[0], 1 + self.controls
        divergence = (before.exp() * (before - predicted)).sum(-1)
        found = []
        for i, change in enumerate(changes):
            after, at = predicted[1 + i * step], 1 + i * step
            listed = (after.exp() - before.exp()).abs().topk(min(self.changed, len(after))).indices
            found.append(
                change.document()
                | {
                    "tokens": [
                        [
                            self._names(len(after))[token],
                            _short(before[token].exp()),
                            _short(after[token].exp()),
                        ]
                        for token in listed.tolist()
                    ],
                    "divergence": _short(divergence[at]),
                    "controls": [_short(d) for d in divergence[at + 1 : at + step]],
                }
            )
        return found

    def _names(self, count: int) -> list[str]:
        if not hasattr(self, "_words"):
            self._words = token_names(self.run.features.model, count) or [
                str(i) for i in range(count)
            ]
        return self._words

    def _predicted(
        self, row: int, position: int, added: Float[Tensor, "m d_out"]
    ) -> Float[Tensor, "m d_vocab"]:
        """Logits of the next token with vectors added to the layer's output at a token."""
        known, model = self.run.features, self.run.features.model
        if starts_at_blocks(model):
            # A block adds what the layer writes, whatever it is, to the residual stream.
            residual = self._residual(row)[:, : position + 1].repeat(len(added), 1, 1)
            residual[:, -1] += added.to(residual)
            # After the last block no token reads another.
            kept = residual[:, -1:] if known.layer == model.cfg.n_layers - 1 else residual
            logits: Tensor = model(kept, start_at_layer=known.layer + 1)
            return logits[:, -1]

        def add(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, -1] += added.to(value)
            return value

        tokens = self.run.tokens[row, : position + 1].expand(len(added), -1)
        hook: tuple[str, Callable[..., Tensor]] = (fires_as(model, known.output_hook), add)
        hooked: Tensor = model.run_with_hooks(tokens, fwd_hooks=[hook])
        return hooked[:, -1]

    def _residual(self, row: int) -> Tensor:
        """The residual stream behind the layer's block."""
        if row not in self._residuals:
            if len(self._residuals) >= KEPT_ROWS:
                self._residuals.clear()
            name = f"blocks.{self.run.features.layer}.hook_resid_post"
            _, cache = self.run.features.model.run_with_cache(
                self.run.tokens[row][None],
                names_filter=name,
                stop_at_layer=self.run.features.layer + 1,
            )
            self._residuals[row] = cache[name]
        return self._residuals[row]


def _short(value: Tensor) -> float:
    return float(f"{float(value):.4g}")
