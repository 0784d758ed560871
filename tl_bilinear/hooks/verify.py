"""The causal check of a decomposition: what an intervention should change, and what it did change.

Each component chosen is taken away in the running model. The weights predict by how much r . mlp_out
changes, for any read direction r. The prediction is compared with what the model did, at every token,
and the effect downstream (on the loss, or on a logit difference) is measured beside it.

>>> checked = verify(model, tokens, EigenComponents(eigen, layer=3))
>>> checked.to_pandas()               # predicted, measured, error, effect and its interval, controls
>>> checked.error.max()               # rounding, where the theory is exact

**Where.** ``at="input"``, the default for eigencomponents, takes v_i out of what the layer *reads* and
lets the model's weights answer. u . mlp_out changes by ``-lambda_i (v_i . x)^2`` if, and only if, v_i is
an eigenvector of this layer's Q_u with that eigenvalue. (With input biases it changes by
``-(l . v_i)(v_i . x)`` more, where l is the linear part of u.) Everything that the layer writes changes
with it, so the effect downstream is that of the input direction. Eigenvectors w in a metric M are taken
out obliquely, ``x <- x - (w . x) M w``, which leaves the other terms as they were (`ProjectInput`).

``at="output"`` subtracts the component from what the layer *writes*. r . mlp_out then changes by
``-lambda_i (v_i . x)^2 (r . w)``, whatever matrix was decomposed: this checks the hooks and not the
decomposition, and gives the downstream effect of that component alone. A HOSVD component is subtracted
as the model's own u_i . mlp_out, and its form predicts it.

**Controls.** At the input, random unit vectors take the place of v_i in intervention and prediction: for
them the check must fail. At the output, the same activations are written along random directions as long
as w: does the direction matter, or only the size?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.hooks.components import Components, EigenComponents
from tl_bilinear.hooks.effects import (
    Effect,
    each_run,
    mean_interval,
    next_token_loss,
    require_confidence,
    require_tokens,
)
from tl_bilinear.hooks.interventions import Hooks, Intervention, OutputEdit, ProjectInput
from tl_bilinear.hooks.points import LayerPoints, Positions, position_mask
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearTensor, Metric

if TYPE_CHECKING:
    import pandas

Site = Literal["output", "input"]


@dataclass(frozen=True, eq=False)
class Verification(Result):
    """Predicted and measured changes for c components, r read directions, t tokens, n sequences.

    Attributes
    ----------
    labels: columns of c entries that say what each component is: "direction" is the number of its
        direction, "component" its own number within that direction
    predicted, measured: [c, r, t], the change of r . mlp_out at each token under the intervention
    control_predicted, control_measured: [c, q, r, t], of q random controls of each
    scale: [c, r], the largest |r . mlp_out| over the tokens, without intervention
    clean_effect: [n], effect without intervention
    effect: [c, n], what each intervention adds to it
    control_effect: [c, q, n]
    at: where the interventions were made, "output" or "input"
    confidence: of the intervals of the mean effect (Student's, over sequences)
    """

    labels: dict[str, list[Any]]
    predicted: Float[Tensor, "c r t"]
    measured: Float[Tensor, "c r t"]
    control_predicted: Float[Tensor, "c q r t"]
    control_measured: Float[Tensor, "c q r t"]
    scale: Float[Tensor, "c r"]
    clean_effect: Float[Tensor, " n"]
    effect: Float[Tensor, "c n"]
    control_effect: Float[Tensor, "c q n"]
    at: str
    confidence: float = 0.95

    @property
    def error(self) -> Float[Tensor, "c r"]:
        """Largest |measured - predicted| over the tokens, relative to `scale`."""
        return _largest(self.measured - self.predicted) / self._positive_scale

    @property
    def control_error(self) -> Float[Tensor, "c r"]:
        """The `error` of the control with the smallest one; NaN without controls."""
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
        checks.require_count("k", k, len(self.effect), "the components")
        order = self.effect.mean(-1).abs().argsort(descending=True)[:k]
        per_component = (
            *("predicted", "measured", "scale", "effect"),
            *("control_predicted", "control_measured", "control_effect"),
        )
        return replace(
            self,
            labels={name: [column[i] for i in order] for name, column in self.labels.items()},
            **{name: getattr(self, name)[order] for name in per_component},
        )

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each component and read direction.

        Columns: the labels and read, the number of the read direction; predicted and measured (means
        over tokens), error, control_error; effect with low and high, control_effect (means over
        sequences).
        """
        import pandas as pd

        count, reads = self.scale.shape
        low, high = self.interval.T
        control = self.control_effect.mean((1, 2))  # NaN without controls

        def repeated(values: Tensor) -> Any:
            return values.repeat_interleave(reads).cpu().numpy()

        labels = {
            name: [label for label in column for _ in range(reads)]
            for name, column in self.labels.items()
        }
        return pd.DataFrame(
            {
                **labels,
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


@torch.no_grad()
def verify(
    model: Any,
    tokens: Int[Tensor, "n pos"],
    components: Components,
    which: Any = None,
    *,
    at: Site | None = None,
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
    at: "input" or "output", optional
        Where the intervention is made; see the module. The default is the check that can fail: "input"
        for eigencomponents of x. It is "output" for HOSVD components, for those of an augmented tensor
        and where `read` is given.
    read: [r, d_out], optional
        At the output, the directions whose change is compared; by default those of the components. At
        the input each component's own direction is read, the only one that is predicted.
    linear: [directions, d_in], optional
        At the input, the linear part of each direction, which input biases make:
        ``tensor.project(directions).parts().linear``. By default that of the model's own layer.
    effect: function of (logits [batch, pos, vocab], tokens [batch, pos]) giving [batch]
        The downstream effect: next-token loss, `logit_difference(first, second)`, or yours.
    positions: as in every intervention; a [n, pos] mask is cut into batches with the tokens
    controls: int
        Random controls of each component.
    seed: int
        Of the controls.

    ``1 + c (1 + controls)`` forwards a batch. The result holds ``2 c (1 + controls) r`` numbers a token.

    Raises ValueError for options that do not go together, and where the components do not fit the
    model.
    """
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 0:
        raise ValueError(
            f"controls must be a number of random controls, 0 or more, got {controls!r}"
        )
    if at is None:
        at = "input" if _is_of_input(components) and read is None else "output"
    components.check(model, LayerPoints.of(model, components.layer))
    index = components.index(which).flatten()
    # Away from the small seeds from which callers draw directions of their own.
    generator = checks.generator((checks.require_int("seed", seed) + 0x5EED_5EED) % 2**32)
    groups = _groups(model, components, index, at, read, linear, positions, controls, generator)
    direction = components.direction_of(index)
    number = index - direction * (components.count // len(components.reads))
    return verify_trials(
        model,
        tokens,
        components.layer,
        groups,
        labels={"direction": direction.tolist(), "component": number.tolist()},
        at=at,
        effect=effect,
        positions=positions,
        batch_size=batch_size,
        confidence=confidence,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class Trial:
    """An intervention, and what it is predicted to change.

    Attributes
    ----------
    intervention: what is done
    predict: gives the predicted change of each reading, [t, r], from what the layer reads without the
        intervention, [t, d_in]
    read: [r, d_out], the directions along which the layer's output is read
    """

    intervention: Intervention
    predict: Callable[[Tensor], Tensor]
    read: Float[Tensor, "r d_out"]


@torch.no_grad()
def verify_trials(
    model: Any,
    tokens: Int[Tensor, "n pos"],
    layer: int,
    groups: Sequence[Sequence[Trial]],
    *,
    labels: dict[str, list[Any]],
    at: str,
    effect: Effect = next_token_loss,
    positions: Positions = None,
    batch_size: int = 16,
    confidence: float = 0.95,
    progress: bool = True,
) -> Verification:
    """`verify` for interventions of any kind.

    Parameters
    ----------
    layer: whose input is given to the predictions and whose output is read
    groups: c groups, each a trial and its q controls; all have the same number of read directions
    labels: columns of c entries
    at: a word for where the interventions are made
    positions: where readings are compared; a trial's intervention has positions of its own

    The other parameters are those of `verify`.
    """
    require_tokens(tokens, at_least=2 if effect is next_token_loss else 1)
    require_confidence(confidence)
    sizes = {(len(group), *(len(trial.read) for trial in group)) for group in groups}
    if len(sizes) != 1 or any(len(column) != len(groups) for column in labels.values()):
        raise ValueError(
            f"groups must hold equally many trials with equally many read directions, and labels an "
            f"entry for each; got {len(groups)} groups, labels of length "
            f"{[len(column) for column in labels.values()]}"
        )
    trials = [trial for group in groups for trial in group]
    edits = [None, *(trial.intervention for trial in trials)]
    if isinstance(positions, Tensor) and positions.ndim == 2:
        batch_size = len(tokens)  # the mask is of all sequences
    points = LayerPoints.of(model, layer)
    seen: dict[str, Tensor] = {}
    watch: Hooks = [(points.reads, _keep(seen, "x")), (points.writes, _keep(seen, "out"))]

    predicted: list[list[Tensor]] = [[] for _ in trials]
    measured: list[list[Tensor]] = [[] for _ in trials]
    scales: list[list[Tensor]] = [[] for _ in trials]
    effects: list[list[Tensor]] = [[] for _ in edits]
    clean: dict[str, Tensor] = {}
    for rows, number, logits in each_run(model, tokens, edits, batch_size, progress, watch):
        effects[number].append(effect(logits, tokens[rows]))
        if number == 0:
            mask = position_mask(positions, seen["out"].shape[:-1], seen["out"].device)
            if mask is None:
                mask = torch.ones_like(seen["out"][..., 0], dtype=torch.bool)
            if not bool(mask.any()):
                raise ValueError(f"positions={positions!r} chooses no token of {list(mask.shape)}")
            clean = {name: values[mask] for name, values in seen.items()}
            continue
        trial = trials[number - 1]
        predicted[number - 1].append(trial.predict(clean["x"]).T)
        # The difference first: what is large and unchanged cancels before it is rounded.
        measured[number - 1].append(_reading(seen["out"][mask] - clean["out"], trial))
        scales[number - 1].append(_largest(_reading(clean["out"], trial)))

    def grouped(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The trial of each group, and the controls of each group."""
        rows = torch.stack(values).unflatten(0, (len(groups), -1))
        return rows[:, 0].clone(), rows[:, 1:].clone()

    predicted_own, predicted_controls = grouped([torch.cat(each, -1) for each in predicted])
    measured_own, measured_controls = grouped([torch.cat(each, -1) for each in measured])
    clean_effect, *others = (torch.cat(each) for each in effects)
    effect_own, effect_controls = grouped([each - clean_effect for each in others])
    return Verification(
        labels=labels,
        predicted=predicted_own,
        measured=measured_own,
        control_predicted=predicted_controls,
        control_measured=measured_controls,
        scale=grouped([torch.stack(each).amax(0) for each in scales])[0],
        clean_effect=clean_effect,
        effect=effect_own,
        control_effect=effect_controls,
        at=at,
        confidence=confidence,
    )


def _reading(out: Tensor, trial: Trial) -> Tensor:
    """[r, t]"""
    return trial.read @ out.to(trial.read.dtype).T


# ---------------------------------------------------------------------- one component each


@dataclass(frozen=True, eq=False)
class _Subtract(OutputEdit):
    """Subtract a component along a direction: its own, or a random one as control."""

    components: Components
    index: Int[Tensor, " one"]
    along: Float[Tensor, " d_out"]

    def check(self, model: Any, points: LayerPoints) -> None:
        self.components.check(model, points)

    def edit(self, x: Tensor, out: Tensor) -> Tensor:
        current = self.components.current(x, out, self.index)
        return out - (current * self.along).to(out.dtype)


def _groups(
    model: Any,
    components: Components,
    index: Tensor,
    at: str,
    read: Tensor | None,
    linear: Tensor | None,
    positions: Positions,
    controls: int,
    generator: torch.Generator,
) -> list[list[Trial]]:
    """The trial and the controls of each component chosen."""
    if at == "output":
        if linear is not None:
            raise ValueError("linear belongs to at='input'; at the output nothing of it changes")
        return _at_output(components, index, read, positions, controls, generator)
    if at != "input":
        raise ValueError(f"at must be 'output' or 'input', got {at!r}")
    if not _is_of_input(components):
        raise ValueError(
            "at='input' takes eigenvectors out of what the layer reads; HOSVD components and "
            "eigenvectors of augmented() are not directions of it: use at='output'"
        )
    if read is not None:
        raise ValueError(
            "at='input' predicts the change of each component's own direction only; leave read out"
        )
    if linear is None:
        linear = _linear_part(model, components)
    return _at_input(components, index, linear, positions, controls, generator)


def _is_of_input(components: Components) -> TypeGuard[EigenComponents]:
    """Whether components are directions of what the layer reads."""
    return isinstance(components, EigenComponents) and not components.augmented


def _at_output(
    components: Components,
    index: Tensor,
    read: Tensor | None,
    positions: Positions,
    controls: int,
    generator: torch.Generator,
) -> list[list[Trial]]:
    reads = components.reads
    if read is not None:
        reads = checks.require_rows("read", read, reads.shape[-1], "d_out", reads)
        reads = reads.reshape(-1, reads.shape[-1])

    def trial(one: Tensor, along: Tensor) -> Trial:
        taken = _Subtract(components, one, along, layer=components.layer, positions=positions)
        return Trial(taken, lambda x: -components.at(x, one) * (reads @ along), reads)

    groups = []
    for one in index[:, None]:
        own = components.writes[components.direction_of(one)[0]]
        random = (_random_like(own, generator) for _ in range(controls))
        groups.append([trial(one, along) for along in (own, *random)])
    return groups


def _linear_part(model: Any, components: EigenComponents) -> Tensor:
    """[directions, d_in], of the model's layer; zeros for a layer that has no reader."""
    reads = components.reads
    try:
        tensor = BilinearTensor.from_model(model, components.layer)
    except (TypeError, ValueError):
        return reads.new_zeros(len(reads), components.eigen.d)
    return tensor.project(reads.to(tensor.left)).parts().linear.to(reads)


def _at_input(
    components: EigenComponents,
    index: Tensor,
    linear: Tensor,
    positions: Positions,
    controls: int,
    generator: torch.Generator,
) -> list[list[Trial]]:
    reads, eigen = components.reads, components.eigen
    parts = checks.require_rows("linear", linear, eigen.d, "what the layer reads", reads)
    parts = parts.reshape(-1, eigen.d).expand(len(reads), eigen.d)
    metric = eigen.metric

    def trial(one: Tensor, vector: Tensor) -> Trial:
        number, value = components.direction_of(one), eigen.values.flatten()[one]
        part = parts[number] @ (vector if metric is None else metric.apply(vector))
        taken = ProjectInput(
            directions=vector,
            layer=components.layer,
            positions=positions,
            space=eigen.space,
            metric=metric,
        )

        def predict(x: Tensor) -> Tensor:
            along = (x.to(vector.dtype) @ vector)[:, None]
            return -value * along.square() - part * along

        return Trial(taken, predict, reads[number][None])

    groups = []
    for one in index:
        own = components.vectors_at(one)
        random = (_random_like(own, generator, metric) for _ in range(controls))
        groups.append([trial(one, vector) for vector in (own, *random)])
    return groups


def _random_like(
    vector: Tensor, generator: torch.Generator, metric: Metric | None = None
) -> Tensor:
    """A random direction, as long as `vector`: in a metric, ``w^T M w`` as large."""
    random = torch.randn(vector.shape, generator=generator, dtype=torch.float64).to(vector)
    if metric is None:
        return random * (vector.norm() / random.norm())
    random = metric.inverse_root(random)
    return random * (metric.root(vector).norm() / metric.root(random).norm())


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(value: Tensor, hook: Any) -> None:
        seen[name] = value

    return keep


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(-1)
