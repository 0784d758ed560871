"""What edits do to a model's loss, or to any other number that it gives for a sequence.

>>> added = loss_added(model, tokens, {"rank 4": parts.low_rank(4), "first": parts.ablate(0)})
>>> added.to_pandas()                      # loss, difference and relative difference, with intervals

**Edits.** An edit is anything with ``applied(model)``, a context in which the model is changed: every
intervention of this package, and `tl_bilinear.models.approximation.Replacement`, which replaces MLPs
of a Hugging Face model.

**Intervals.** Every sequence runs with and without the edit, and gives one difference d. The n sequences
are taken to be independent (the tokens of one are not), so the interval is ``mean(d) +- t s / sqrt(n)``:
s is the standard deviation of d, t Student's quantile with n - 1 degrees of freedom. For the relative
effect R = mean(d) / mean(c), with c the clean loss, s is the standard deviation of
``(d - R c) / mean(c)`` (the ratio of means, linearised).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.hooks.interventions import Hooks, Intervention
from tl_bilinear.models.approximation import Replacement
from tl_bilinear.results import Result
from tl_bilinear.tensor import Approximation

if TYPE_CHECKING:
    import pandas

Effect: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Edit(Protocol):
    """Something that changes a model for a while: an `Intervention`, or anything with `applied`."""

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """A context: the model is changed while it is open, and as it was afterwards."""


def token_losses(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch targets"]:
    """Cross-entropy of each next token, in nats: [batch, pos - 1], of ``tokens[:, 1:]``.

    Raises TypeError or ValueError for tokens that are not of these logits.
    """
    require_tokens(tokens)
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must have the shape of logits without its last dimension, "
            f"{list(logits.shape[:-1])}, got {checks.shape(tokens)}"
        )
    checks.require_tokens(tokens, logits.shape[-1])
    wide = logits[:, :-1].to(checks.compute_dtype(logits.dtype))
    return wide.logsumexp(-1) - wide.gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of the next token in each sequence, in nats.

    mask: [batch, pos], true for the tokens that count as targets (not padding); the first never
    does. A sequence without a target has loss 0.
    """
    losses = token_losses(logits, tokens)
    if mask is None:
        return losses.mean(-1)
    checks.require_mask(mask, tokens.shape)
    weight = mask[:, 1:].to(losses)
    return (losses * weight).sum(-1) / weight.sum(-1).clamp_min(1)


def logit_difference(first: int, second: int, position: int = -1) -> Effect:
    """The effect ``logits[:, position, first] - logits[:, position, second]``, for `verify`.

    Raises TypeError or ValueError for what are no token numbers; IndexError, when it runs, for a token
    or a position that the logits do not have.
    """
    checks.require_int("position", position)
    for token in (first, second):
        if checks.require_int("token", token) < 0:
            raise ValueError(f"token must be a token number, 0 or more, got {token}")

    def difference(logits: Tensor, tokens: Tensor) -> Tensor:
        at = logits[:, position].to(checks.compute_dtype(logits.dtype))
        return at[:, first] - at[:, second]

    return difference


@dataclass(frozen=True, eq=False)
class LossAdded(Result):
    """The loss that edits add, sequence by sequence.

    Attributes
    ----------
    names: of the m edits
    clean: [n], the loss of each sequence without an edit, in nats a token
    patched: [m, n], with each edit
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
        """The k edits that add most."""
        checks.require_count("k", k, len(self.names), "the edits")
        order = self.difference.argsort(descending=True)[:k]
        names = [self.names[i] for i in order.tolist()]
        return LossAdded(names, self.clean, self.patched[order], self.confidence)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each edit: losses, difference and relative difference with their intervals."""
        import pandas as pd

        low, high = self.interval.cpu().numpy().T
        relative_low, relative_high = self.relative_interval.cpu().numpy().T
        return pd.DataFrame(
            {
                "edit": self.names,
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
    edits: Mapping[str, Edit] | Edit,
    *,
    mask: Tensor | None = None,
    batch_size: int = 16,
    confidence: float = 0.95,
    progress: bool = True,
) -> LossAdded:
    """Mean next-token loss with each edit and without, over whole sequences.

    Parameters
    ----------
    model: with TransformerLens hooks (SAEs attached to it stay attached in all runs), or a causal
        language model of Hugging Face
    tokens: [n, pos]
    edits: by name, or one
    mask: [n, pos], optional
        True for the tokens that count as targets (not padding).
    batch_size: int
        Sequences a forward; an intervention with a [batch, pos] mask of its own needs ``len(tokens)``.
    confidence: float
        Of the intervals, between 0 and 1.

    ``(1 + len(edits)) * n / batch_size`` forwards without gradients.

    Raises ValueError for tokens that are not [n, pos] with pos at least 2, a mask of another shape, a
    confidence outside (0, 1), and where an edit does not fit the model.
    """
    if not isinstance(edits, Mapping):
        edits = {"edit": edits}
    require_tokens(tokens, at_least=2)
    require_confidence(confidence)
    if mask is not None:
        checks.require_mask(mask, tokens.shape)
    chosen = [None, *edits.values()]
    losses: Tensor | None = None
    for rows, number, logits in each_run(model, tokens, chosen, batch_size, progress):
        some = next_token_loss(logits, tokens[rows], None if mask is None else mask[rows])
        if losses is None:
            losses = some.new_empty(len(chosen), len(tokens))
        losses[number, rows] = some
    assert losses is not None  # there is at least one sequence
    return LossAdded(list(edits), losses[0].clone(), losses[1:].clone(), confidence)


def with_loss_added(
    llama: Any,
    approximations: Mapping[int, Approximation],
    tokens: Int[Tensor, "n pos"],
    *,
    mask: Tensor | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[int, Approximation]:
    """Approximations that know what each adds to a Hugging Face model's loss, replaced alone.

    The mean loss added, in nats a token, is in ``fidelity.loss_added``; `fidelity_table` shows it.
    `tokens` should not be those of the fit; the rest is as in `loss_added`.
    """
    edits = {str(layer): Replacement({layer: one}) for layer, one in approximations.items()}
    added = loss_added(
        llama, tokens, edits, mask=mask, batch_size=batch_size, progress=progress
    ).difference.tolist()
    return {
        layer: replace(one, fidelity=replace(one.fidelity, loss_added=value))
        for (layer, one), value in zip(approximations.items(), added, strict=True)
    }


# ---------------------------------------------------------------------- running and counting


def each_run(
    model: Any,
    tokens: Tensor,
    edits: Sequence[Edit | None],
    batch_size: int,
    progress: bool,
    watch: Hooks | None = None,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Run every batch with every edit; yield (rows of tokens, number of the edit, logits).

    `watch` hooks come after those of the edit. The first edit is None: the run without one. Where all
    hooks of an edit lie in block l and after, its runs start there, from what block l read in that run;
    where they come after its attention, with what that gave.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a number of sequences, 1 or more, got {batch_size!r}")
    checks.require_tokens(tokens, _vocabulary(model))
    starts = range(0, len(tokens), batch_size)
    first = [_first_place(model, edit, watch) for edit in edits]
    blocks = {place.block for place in first if place is not None}
    with tqdm(total=len(starts) * len(edits), unit="forward", disable=not progress) as bar:
        for start in starts:
            rows = slice(start, min(start + batch_size, len(tokens)))
            read: dict[int, Tensor] = {}
            attended: dict[int, Tensor] = {}
            for number, (edit, place) in enumerate(zip(edits, first, strict=True)):
                edited = nullcontext() if edit is None else edit.applied(model)
                watched = model.hooks(fwd_hooks=watch) if watch else nullcontext()
                kept = nullcontext() if edit else _kept(model, blocks, read, attended)
                known = attended.get(place.block) if place and place.attention else None
                with torch.no_grad(), edited, watched, kept:
                    if place is None or (place.block == 0 and known is None):
                        logits = _logits(model, tokens[rows])
                    else:
                        with _known_attention(model.blocks[place.block], known):
                            logits = model(read[place.block], start_at_layer=place.block)
                yield rows, number, logits
                bar.update()


def starts_at_blocks(model: Any) -> bool:
    """Whether a forward may begin at a block, with the residual stream before it in place of tokens."""
    if not hasattr(model, "input_to_embed"):  # HookedTransformer's alone
        return False
    tokenizer, cfg = model.tokenizer, model.cfg
    # Elsewhere a block needs more than the residual stream.
    padded_left = tokenizer is not None and tokenizer.padding_side == "left"
    return not padded_left and cfg.positional_embedding_type != "shortformer"


class _Place(NamedTuple):
    """Where an edited run starts: at a block, and whether what its attention gave is known too."""

    block: int
    attention: bool


_AFTER_ATTENTION = (
    "ln2.", "mlp.", "hook_mlp_in", "hook_mlp_out", "hook_resid_mid", "hook_resid_post",
)  # fmt: skip


def _first_place(model: Any, edit: Edit | None, watch: Hooks | None) -> _Place | None:
    """The first place that has a hook of the edit or of `watch`; None where a run needs all blocks."""
    if not isinstance(edit, Intervention) or not starts_at_blocks(model):
        return None
    names = [str(name) for name, _ in (*edit.fwd_hooks(model), *(watch or []))]
    found = [re.match(r"blocks\.(\d+)\.(.*)", name) for name in names]
    hooks = [(int(match[1]), match[2]) for match in found if match is not None]
    if len(hooks) < len(names) or not hooks:
        return None
    block = min(hooks)[0]
    attention = all(name.startswith(_AFTER_ATTENTION) for at, name in hooks if at == block)
    return _Place(block, attention) if block or attention else None


@contextmanager
def _kept(
    model: Any, blocks: Iterable[int], read: dict[int, Tensor], attended: dict[int, Tensor]
) -> Iterator[None]:
    """While it is open, keep what these blocks are given, and what their attention gives."""

    def given(block: int) -> Callable[..., None]:
        return lambda module, inputs: read.update({block: inputs[0]})

    def gives(block: int) -> Callable[..., None]:
        def keep(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, Tensor):  # a bridge's gives more: its edited runs attend again
                attended[block] = output

        return keep

    handles = [model.blocks[i].register_forward_pre_hook(given(i)) for i in blocks]
    handles += [model.blocks[i].attn.register_forward_hook(gives(i)) for i in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _known_attention(block: Any, output: Tensor | None) -> Iterator[None]:
    """While it is open, the attention of a block gives this, and is not computed; None: as ever."""
    if output is None:
        yield
        return
    block.attn.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del block.attn.forward


def _vocabulary(model: Any) -> int:
    hooked = getattr(model, "cfg", None)
    return int(model.config.vocab_size if hooked is None else hooked.d_vocab)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    if hasattr(model, "hook_dict"):
        logits: Tensor = model(tokens, return_type="logits")
    else:  # Hugging Face
        logits = model(input_ids=tokens.to(model.device)).logits
    return logits


def mean_interval(values: Float[Tensor, "*m n"], confidence: float) -> Float[Tensor, "*m 2"]:
    """Student's interval of the mean over the last dimension; NaN for a single value."""
    from scipy.stats import t

    n = values.shape[-1]
    spread = values.std(-1, unbiased=True) if n > 1 else torch.full_like(values[..., 0], torch.nan)
    half = spread * (float(t.ppf((1 + confidence) / 2, n - 1)) if n > 1 else 1) / n**0.5
    mean = values.mean(-1)
    return torch.stack([mean - half, mean + half], -1)


def require_tokens(tokens: Any, at_least: int = 1) -> None:
    """Raise TypeError or ValueError for what is not [n, pos] token numbers."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise TypeError(f"tokens must be a tensor of token numbers, got {type(tokens).__name__}")
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < at_least:
        raise ValueError(
            f"tokens must have shape [n, pos] with n at least 1 and pos at least {at_least}, got "
            f"{checks.shape(tokens)}"
        )


def require_confidence(confidence: float) -> None:
    """Raise ValueError for a confidence outside (0, 1)."""
    checks.require_number("confidence", confidence, "must lie between 0 and 1", positive=True)
    if confidence >= 1:
        raise ValueError(f"confidence must lie between 0 and 1 (0.95), got {confidence}")
