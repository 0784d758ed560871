"""The causal check beside a spectrum: what an intervention should change, and what it did.

For every component chosen, the component is taken away in the running model. What the weights predict
for the change of r . mlp_out, with r any read directions, is compared at every token with what the
model did, and the effect downstream (loss, or a logit difference) is measured beside it.

>>> checked = verify(model, tokens, EigenComponents(spectrum, u, layer=3), at="input")
>>> checked.to_pandas()               # predicted, measured, error, effect and its interval, controls
>>> checked.error.max()               # rounding, where the theory is exact

**Where.** ``at="output"`` subtracts the component from what the layer writes, which changes r . mlp_out
by ``-lambda_i (v_i . x)^2 (r . w)`` whatever the spectrum was taken from: it checks the hooks, and gives
the downstream effect of that component alone. A HOSVD component is subtracted as the model's own
u_i . mlp_out, and its form predicts it. ``at="input"`` takes v_i out of what the layer *reads*, and lets
the model's weights answer: u . mlp_out changes by ``-lambda_i (v_i . x)^2`` if, and only if, v_i is an
eigenvector of this layer's Q_u with that eigenvalue (with input biases, by ``-(l . v_i)(v_i . x)`` more,
l the linear part of u). All that the layer writes changes with it, so its downstream effect is that of
the input direction.

**Controls.** At the output the same activations are written along random directions as long as w: does
the direction matter, or only the size? At the input random unit vectors take the place of v_i in
intervention and prediction: the check must fail for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.hooks._points import LayerPoints, Positions, position_mask
from tl_bilinear.hooks.components import Components, EigenComponents
from tl_bilinear.hooks.effects import (
    Effect,
    each_run,
    mean_interval,
    next_token_loss,
    require_confidence,
    require_tokens,
)
from tl_bilinear.hooks.interventions import Intervention, OutputEdit, ProjectInput
from tl_bilinear.tensor import _checks
from tl_bilinear.tensor.storage import Storable

if TYPE_CHECKING:
    import pandas

Site = Literal["output", "input"]


@dataclass(frozen=True, eq=False)
class Verification(Storable):
    """Predicted and measured changes for c components, r read directions, t tokens, n sequences.

    Attributes
    ----------
    direction, component: [c], which direction a component belongs to, and its number there
    predicted, measured: [c, r, t], the change of r . mlp_out at each token under the intervention
    control_predicted, control_measured: [c, q, r, t], of q random controls of each
    scale: [c, r], the largest |r . mlp_out| over the tokens, without intervention
    clean_effect: [n], effect without intervention
    effect: [c, n], what each intervention adds to it
    control_effect: [c, q, n]
    at: "output" or "input"
    confidence: of the intervals of the mean effect (Student's, over sequences)
    """

    direction: Int[Tensor, " c"]
    component: Int[Tensor, " c"]
    predicted: Float[Tensor, "c r t"]
    measured: Float[Tensor, "c r t"]
    control_predicted: Float[Tensor, "c q r t"]
    control_measured: Float[Tensor, "c q r t"]
    scale: Float[Tensor, "c r"]
    clean_effect: Float[Tensor, " n"]
    effect: Float[Tensor, "c n"]
    control_effect: Float[Tensor, "c q n"]
    at: Site
    confidence: float = 0.95

    @property
    def error(self) -> Float[Tensor, "c r"]:
        """Largest |measured - predicted| over the tokens, relative to `scale`."""
        return _largest(self.measured - self.predicted) / self._positive_scale

    @property
    def control_error(self) -> Float[Tensor, "c r"]:
        """The same for the control that fails least; NaN without controls."""
        if not self.control_measured.shape[1]:
            return torch.full_like(self.scale, torch.nan)
        errors = _largest(self.control_measured - self.control_predicted)
        return errors.amin(1) / self._positive_scale

    @property
    def interval(self) -> Float[Tensor, "c 2"]:
        """Lower and upper end of the interval of each mean effect."""
        return mean_interval(self.effect, self.confidence)

    def top(self, k: int) -> Verification:
        """The k components with the largest mean effect, in absolute value."""
        _checks.require_count("k", k, len(self.component), "the components")
        order = self.effect.mean(-1).abs().argsort(descending=True)[:k]
        per_component = (
            *("direction", "component", "predicted", "measured", "scale", "effect"),
            *("control_predicted", "control_measured", "control_effect"),
        )
        return replace(self, **{name: getattr(self, name)[order] for name in per_component})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a component and read direction.

        direction, component, read; predicted and measured (means over tokens), error, control_error;
        effect with low and high, control_effect (means over sequences).
        """
        import pandas as pd

        count, reads = self.scale.shape
        low, high = self.interval.T
        control = self.control_effect.mean((1, 2))  # NaN without controls

        def repeated(values: Tensor) -> Any:
            return values.repeat_interleave(reads).cpu().numpy()

        return pd.DataFrame(
            {
                "direction": repeated(self.direction),
                "component": repeated(self.component),
                "read": torch.arange(reads).repeat(count).numpy(),
                "predicted": self.predicted.mean(-1).flatten().cpu().numpy(),
                "measured": self.measured.mean(-1).flatten().cpu().numpy(),
                "error": self.error.flatten().cpu().numpy(),
                "control_error": self.control_error.flatten().cpu().numpy(),
                "effect": repeated(self.effect.mean(-1)),
                "low": repeated(low),
                "high": repeated(high),
                "control_effect": repeated(control),
            }
        )

    @property
    def _positive_scale(self) -> Tensor:
        return self.scale.clamp_min(torch.finfo(self.scale.dtype).tiny)


def verify(
    model: Any,
    tokens: Int[Tensor, "n pos"],
    components: Components,
    which: Any = None,
    *,
    at: Site = "output",
    read: Float[Tensor, "r d_out"] | None = None,
    linear: Float[Tensor, "directions d_in"] | None = None,
    effect: Effect = next_token_loss,
    positions: Positions = None,
    controls: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    confidence: float = 0.95,
    progress: bool = True,
) -> Verification:
    """Compare the change that components predict with the one that the model makes.

    Parameters
    ----------
    model: with TransformerLens hooks
    tokens: [n, pos]
    components: EigenComponents or HOSVDComponents
    which: which of them, one after another; None for all
    at: "output" or "input"
        Where the intervention is made; see the module. "input" is for eigencomponents of x.
    read: [r, d_out], optional
        Directions whose change is compared; by default those of the components. At the input only a
        component's own direction is predicted, and is read.
    linear: [directions, d_in], optional
        At the input, the linear part of each direction where the layer has input biases:
        ``tensor.project(directions).parts().linear``.
    effect: function of (logits [batch, pos, vocab], tokens [batch, pos]) giving [batch]
        The downstream effect: next-token loss, `logit_difference(first, second)`, or yours.
    positions: where, as for every intervention; a [n, pos] mask is cut with the tokens
    controls: int
        Random controls of each component.
    seed: int
        Of the controls.

    ``1 + c (1 + controls)`` forwards a batch. The result holds ``2 c (1 + controls) r`` numbers a token.

    Raises ValueError for a site or options that do not go together, and where the components do not
    fit the model.
    """
    require_tokens(tokens, at_least=2 if effect is next_token_loss else 1)
    require_confidence(confidence)
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 0:
        raise ValueError(
            f"controls must be a number of random controls, 0 or more, got {controls!r}"
        )
    index = components.index(which).flatten()
    generator = torch.Generator().manual_seed(seed)
    trials = _trials(components, index, at, read, linear, controls, generator)
    if isinstance(positions, Tensor) and positions.ndim == 2:
        batch_size = len(tokens)  # the mask is of all sequences
    edits = [None, *(trial.intervention(components.layer, positions) for trial in trials)]
    points = LayerPoints.of(model, components.layer)
    seen: dict[str, Tensor] = {}
    watch = [(points.reads, _keep(seen, "x")), (points.writes, _keep(seen, "out"))]

    changes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in trials]
    scales: list[list[Tensor]] = [[] for _ in trials]
    effects: list[list[Tensor]] = [[] for _ in edits]
    clean: dict[str, Tensor] = {}
    for rows, number, logits in each_run(model, tokens, edits, batch_size, progress, watch):
        effects[number].append(effect(logits, tokens[rows]))
        if number == 0:
            mask = position_mask(positions, seen["out"].shape[:-1], seen["out"].device)
            mask = torch.ones_like(seen["out"][..., 0], dtype=torch.bool) if mask is None else mask
            if not bool(mask.any()):
                raise ValueError(f"positions={positions!r} chooses no token of {list(mask.shape)}")
            clean = {name: values[mask] for name, values in seen.items()}
            continue
        trial = trials[number - 1]
        rows_read = trial.read
        # The difference first: what is large and unchanged cancels before it is rounded.
        change = (seen["out"][mask] - clean["out"]).to(rows_read.dtype) @ rows_read.T
        changes[number - 1].append((trial.predict(clean["x"]), change))
        scales[number - 1].append(_largest((clean["out"].to(rows_read.dtype) @ rows_read.T).T))

    shape = (len(index), 1 + controls)
    predicted, measured = (
        torch.stack([torch.cat([pair[side] for pair in trial]).T for trial in changes]).unflatten(
            0, shape
        )
        for side in (0, 1)
    )
    scale = torch.stack([torch.stack(trial).amax(0) for trial in scales]).unflatten(0, shape)
    all_effects = torch.stack([torch.cat(each) for each in effects])
    added = (all_effects[1:] - all_effects[0]).unflatten(0, shape)
    direction = components.direction_of(index)
    return Verification(
        direction=direction,
        component=index - direction * (components.count // len(components.reads)),
        predicted=predicted[:, 0].clone(),
        measured=measured[:, 0].clone(),
        control_predicted=predicted[:, 1:].clone(),
        control_measured=measured[:, 1:].clone(),
        scale=scale[:, 0].clone(),
        clean_effect=all_effects[0].clone(),
        effect=added[:, 0].clone(),
        control_effect=added[:, 1:].clone(),
        at=at,
        confidence=confidence,
    )


# ---------------------------------------------------------------------- one intervention each


@dataclass(frozen=True, eq=False)
class _OutputTrial:
    """A component taken away along a direction: its own, or a random one as control."""

    components: Components
    index: Int[Tensor, " one"]
    along: Float[Tensor, " d_out"]
    read: Float[Tensor, "r d_out"]

    def intervention(self, layer: int, positions: Positions) -> Intervention:
        return _Subtract(self, layer=layer, positions=positions)

    def predict(self, x: Tensor) -> Tensor:
        return -self.components.at(x, self.index) * (self.read @ self.along)


@dataclass(frozen=True, eq=False)
class _Subtract(OutputEdit):
    trial: _OutputTrial

    def check(self, model: Any, points: LayerPoints) -> None:
        self.trial.components.check(model, points)

    def edit(self, x: Tensor, out: Tensor) -> Tensor:
        trial = self.trial
        current = trial.components.current(x, out, trial.index)
        return out - (current * trial.along).to(out.dtype)


@dataclass(frozen=True, eq=False)
class _InputTrial:
    """A vector taken out of the layer's input: an eigenvector, or a random one as control."""

    vector: Float[Tensor, " d_in"]
    value: Float[Tensor, ""]
    linear: Float[Tensor, ""]
    read: Float[Tensor, "one d_out"]
    space: str | None

    def intervention(self, layer: int, positions: Positions) -> Intervention:
        return ProjectInput(
            directions=self.vector, layer=layer, positions=positions, space=self.space
        )

    def predict(self, x: Tensor) -> Tensor:
        along = (x.to(self.vector.dtype) @ self.vector)[:, None]
        return -self.value * along.square() - self.linear * along


def _trials(
    components: Components,
    index: Tensor,
    at: Site,
    read: Tensor | None,
    linear: Tensor | None,
    controls: int,
    generator: torch.Generator,
) -> list[_OutputTrial] | list[_InputTrial]:
    """Each component chosen, followed by its controls."""
    if at == "output":
        if linear is not None:
            raise ValueError("linear belongs to at='input'; at the output nothing of it changes")
        reads = components.reads
        if read is not None:
            reads = _checks.require_rows("read", read, reads.shape[-1], "d_out", reads)
            reads = reads.reshape(-1, reads.shape[-1])
        trials = []
        for one in index:
            own = components.writes[components.direction_of(one)]
            along = [own, *(_random_like(own, generator) for _ in range(controls))]
            trials += [_OutputTrial(components, one[None], each, reads) for each in along]
        return trials
    if at != "input":
        raise ValueError(f"at must be 'output' or 'input', got {at!r}")
    if not isinstance(components, EigenComponents) or components.augmented:
        raise ValueError(
            "at='input' takes eigenvectors out of what the layer reads; HOSVD components and spectra "
            "of augmented() are not directions of it: use at='output'"
        )
    if read is not None:
        raise ValueError(
            "at='input' predicts the change of each component's own direction only; leave read out"
        )
    reads, spectrum = components.reads, components.spectrum
    parts = reads.new_zeros(len(reads), spectrum.d)
    if linear is not None:
        parts = _checks.require_rows("linear", linear, spectrum.d, "what the layer reads", parts)
        parts = parts.reshape(-1, spectrum.d).expand(len(reads), spectrum.d)
    inputs = []
    for one in index:
        number = components.direction_of(one)
        vector = components.vectors_at(one)
        for each in [vector, *(_random_like(vector, generator) for _ in range(controls))]:
            value, part = spectrum.values.flatten()[one], parts[number] @ each
            inputs.append(_InputTrial(each, value, part, reads[number][None], spectrum.space))
    return inputs


def _random_like(vector: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction, as long as `vector`."""
    random = torch.randn(vector.shape, generator=generator, dtype=torch.float64).to(vector)
    return random * (vector.norm() / random.norm())


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(value: Tensor, hook: Any) -> None:
        seen[name] = value

    return keep


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(-1)
