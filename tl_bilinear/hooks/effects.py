"""What interventions do to a model's loss, or to any number that it gives for a sequence.

>>> added = loss_added(model, tokens, {"rank 4": parts.low_rank(4), "first": parts.ablate(0)})
>>> added.to_pandas()                      # loss, difference, interval, relative ones

**Intervals.** The same sequences run with and without an intervention, so a sequence gives one
difference d. Sequences are taken to be independent, the tokens of one are not: the interval is
``mean(d) +- t s / sqrt(n)`` over the n sequences, s their standard deviation, t Student's quantile with
n - 1 degrees of freedom. For the relative effect R = mean(d) / mean(c), c the clean loss, s is that of
``(d - R c) / mean(c)`` (the ratio of means, linearised).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.hooks.interventions import Hooks, Intervention
from tl_bilinear.tensor import _checks
from tl_bilinear.tensor.storage import Storable

if TYPE_CHECKING:
    import pandas

Effect: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of the next token in each sequence, in nats.

    mask: [batch, pos], which tokens count as targets (not padding); the first is never one. A
    sequence without a target has loss 0.
    """
    wide = logits[:, :-1].to(_checks.compute_dtype(logits.dtype))
    losses = wide.logsumexp(-1) - wide.gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]
    if mask is None:
        return losses.mean(-1)
    weight = mask[:, 1:].to(losses)
    return (losses * weight).sum(-1) / weight.sum(-1).clamp_min(1)


def logit_difference(first: int, second: int, position: int = -1) -> Effect:
    """The effect ``logits[:, position, first] - logits[:, position, second]``, for `verify`."""

    def difference(logits: Tensor, tokens: Tensor) -> Tensor:
        at = logits[:, position].to(_checks.compute_dtype(logits.dtype))
        return at[:, first] - at[:, second]

    return difference


@dataclass(frozen=True, eq=False)
class LossAdded(Storable):
    """The loss that interventions add, sequence by sequence.

    Attributes
    ----------
    names: of the m interventions
    clean: [n], loss of each sequence without intervention, in nats a token
    patched: [m, n], with each intervention
    confidence: of the intervals; the module says how they are made
    """

    names: list[str]
    clean: Float[Tensor, " n"]
    patched: Float[Tensor, "m n"]
    confidence: float = 0.95

    @property
    def difference(self) -> Float[Tensor, " m"]:
        """Mean loss added, in nats a token."""
        return (self.patched - self.clean).mean(-1)

    @property
    def interval(self) -> Float[Tensor, "m 2"]:
        """Lower and upper end of the interval of `difference`; NaN for a single sequence."""
        return mean_interval(self.patched - self.clean, self.confidence)

    @property
    def relative(self) -> Float[Tensor, " m"]:
        """``(patched - clean) / clean`` of the mean losses."""
        return self.difference / self.clean.mean()

    @property
    def relative_interval(self) -> Float[Tensor, "m 2"]:
        """Lower and upper end of the interval of `relative`."""
        ratio = self.relative[:, None]
        deviations = (self.patched - self.clean - ratio * self.clean) / self.clean.mean()
        return mean_interval(deviations, self.confidence) + ratio

    def top(self, k: int) -> LossAdded:
        """The k interventions that add most."""
        _checks.require_count("k", k, len(self.names), "the interventions")
        order = self.difference.argsort(descending=True)[:k]
        names = [self.names[i] for i in order.tolist()]
        return LossAdded(names, self.clean, self.patched[order], self.confidence)

    def to_pandas(self) -> pandas.DataFrame:
        """One row an intervention: clean and patched loss, difference, relative, their intervals."""
        import pandas as pd

        low, high = self.interval.cpu().numpy().T
        relative_low, relative_high = self.relative_interval.cpu().numpy().T
        return pd.DataFrame(
            {
                "intervention": self.names,
                "clean": float(self.clean.mean()),
                "patched": self.patched.mean(-1).cpu().numpy(),
                "difference": self.difference.cpu().numpy(),
                "low": low,
                "high": high,
                "relative": self.relative.cpu().numpy(),
                "relative_low": relative_low,
                "relative_high": relative_high,
            }
        )


def loss_added(
    model: Any,
    tokens: Int[Tensor, "n pos"],
    interventions: Mapping[str, Intervention] | Intervention,
    *,
    mask: Tensor | None = None,
    batch_size: int = 16,
    confidence: float = 0.95,
    progress: bool = True,
) -> LossAdded:
    """Mean next-token loss with interventions and without, over whole sequences.

    Parameters
    ----------
    model: with TransformerLens hooks; SAEs attached to it stay attached in both runs
    tokens: [n, pos]
    interventions: by name, or one
    mask: [n, pos], optional
        Which tokens count as targets (not padding).
    batch_size: int
        Sequences a forward; an intervention with a [batch, pos] mask of its own needs ``len(tokens)``.
    confidence: float
        Of the intervals, between 0 and 1.

    ``(1 + len(interventions)) * n / batch_size`` forwards without gradients.

    Raises ValueError for tokens that are not [n, pos] with pos at least 2, a mask of another shape, a
    confidence outside (0, 1), and where an intervention does not fit the model.
    """
    if isinstance(interventions, Intervention):
        interventions = {"intervention": interventions}
    require_tokens(tokens, at_least=2)
    require_confidence(confidence)
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"mask must have the shape of tokens, {list(tokens.shape)}, got {_checks.shape(mask)}"
        )
    chosen = [None, *interventions.values()]
    losses: Tensor | None = None
    for rows, number, logits in each_run(model, tokens, chosen, batch_size, progress):
        some = next_token_loss(logits, tokens[rows], None if mask is None else mask[rows])
        if losses is None:
            losses = some.new_empty(len(chosen), len(tokens))
        losses[number, rows] = some
    assert losses is not None  # there is at least one sequence
    return LossAdded(list(interventions), losses[0].clone(), losses[1:].clone(), confidence)


# ---------------------------------------------------------------------- running and counting


def each_run(
    model: Any,
    tokens: Tensor,
    interventions: Sequence[Intervention | None],
    batch_size: int,
    progress: bool,
    watch: Hooks | None = None,
) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of tokens, number of the intervention, logits): every intervention on every batch.

    `watch` hooks come after those of each intervention.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a number of sequences, 1 or more, got {batch_size!r}")
    hooks = [[*(each.fwd_hooks(model) if each else []), *(watch or [])] for each in interventions]
    starts = range(0, len(tokens), batch_size)
    with tqdm(total=len(starts) * len(hooks), unit="forward", disable=not progress) as bar:
        for start in starts:
            rows = slice(start, min(start + batch_size, len(tokens)))
            for number, fwd_hooks in enumerate(hooks):
                with torch.no_grad(), model.hooks(fwd_hooks=fwd_hooks):
                    logits = model(tokens[rows], return_type="logits")
                yield rows, number, logits
                bar.update()


def mean_interval(values: Float[Tensor, "*m n"], confidence: float) -> Float[Tensor, "*m 2"]:
    """Student's interval of the mean over the last dimension; NaN for a single value."""
    from scipy.stats import t

    n = values.shape[-1]
    spread = values.std(-1, unbiased=True) if n > 1 else torch.full_like(values[..., 0], torch.nan)
    half = spread * (float(t.ppf((1 + confidence) / 2, n - 1)) if n > 1 else 1) / n**0.5
    mean = values.mean(-1)
    return torch.stack([mean - half, mean + half], -1)


def require_tokens(tokens: Any, at_least: int = 1) -> None:
    """Raise ValueError for what is not [n, pos] token numbers."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise TypeError(f"tokens must be a tensor of token numbers, got {type(tokens).__name__}")
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < at_least:
        raise ValueError(
            f"tokens must have shape [n, pos] with n at least 1 and pos at least {at_least}, got "
            f"{_checks.shape(tokens)}"
        )


def require_confidence(confidence: float) -> None:
    """Raise ValueError for what is no probability between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1 (0.95), got {confidence}")
