"""How well SAEs stand in for a model's activations (Pearce et al. 2025, Fig. 21).

>>> evaluate_saes(model, {"mlp_out": sae, "resid_mid": other}, tokens).to_pandas()

One forward without SAEs gives every SAE its activations; one with each SAE's reconstruction in their
place, and one with zeros, give the losses. The first token of a row and the tokens that the SAEs were
not trained on (``metadata.exclude_special_tokens``, [BOS] as a rule) are left as they are and not
counted, nor are those special tokens as targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.labels import special_tokens
from tl_bilinear.features.module_names import hook_of
from tl_bilinear.features.passage import fires_as, refuse_attached
from tl_bilinear.hooks.effects import LossAdded, next_token_loss, require_tokens
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

__all__ = ["SAEEvaluation", "evaluate_saes"]


@dataclass(frozen=True, eq=False)
class SAEEvaluation(Result):
    """How well m SAEs reconstruct, and what the model loses by it.

    Attributes
    ----------
    names, hooks: of the SAEs
    tokens: on how many tokens
    nmse: [m], ``sum |x - x_hat|^2 / sum |x - mean x|^2``: 0 is perfect, 1 no better than the mean
    l0: [m], mean number of active features of a token
    features, dead: [m], how many there are, and how many were active on no token here
    clean: [n], loss of each sequence in nats a token, without SAEs
    patched, ablated: [m, n], with the reconstruction, and with zeros, in place of the activations
    """

    names: list[str]
    hooks: list[str]
    tokens: int
    nmse: Float[Tensor, " m"]
    l0: Float[Tensor, " m"]
    features: Int[Tensor, " m"]
    dead: Int[Tensor, " m"]
    clean: Float[Tensor, " n"]
    patched: Float[Tensor, "m n"]
    ablated: Float[Tensor, "m n"]

    @property
    def added(self) -> LossAdded:
        """The loss that the SAEs add, with intervals; `relative` is the paper's measure."""
        return LossAdded(self.names, self.clean, self.patched)

    @property
    def recovered(self) -> Float[Tensor, " m"]:
        """``(ablated - patched) / (ablated - clean)`` of the mean losses: 1 is perfect."""
        ablated = self.ablated.mean(-1)
        return (ablated - self.patched.mean(-1)) / (ablated - self.clean.mean())

    def to_pandas(self) -> pandas.DataFrame:
        """One row an SAE; `low` and `high` bound `loss_added_relative` at 95 %."""
        import pandas as pd

        added = self.added
        low, high = added.relative_interval.T
        columns = {
            "nmse": self.nmse,
            "l0": self.l0,
            "features": self.features,
            "dead": self.dead,
            "loss": self.patched.mean(-1),
            "loss_added": added.difference,
            "loss_added_relative": added.relative,
            "low": low,
            "high": high,
            "loss_recovered": self.recovered,
        }
        return pd.DataFrame(
            {"sae": self.names, "hook": self.hooks}
            | {name: values.cpu().numpy() for name, values in columns.items()}
        )

    def __str__(self) -> str:
        table = self.to_pandas().drop(columns="hook")
        return (
            f"clean loss {float(self.clean.mean()):.3f} nats a token, on {self.tokens:,} tokens\n"
            f"{table.to_string(index=False, float_format='{:.3f}'.format)}"
        )


class _Sums:
    """What nmse, l0 and the count of dead features are made of, in float64."""

    def __init__(self) -> None:
        self.error = self.square = self.active = 0.0
        self.mean: Tensor | None = None
        self.fired: Tensor | None = None

    def add(self, x: Tensor, made: Tensor, z: Tensor) -> None:
        x, made, on = x.double(), made.double(), z != 0
        self.error += float((x - made).square().sum())
        self.square += float(x.square().sum())
        self.active += float(on.sum())
        self.mean = x.sum(0) if self.mean is None else self.mean + x.sum(0)
        self.fired = on.any(0) if self.fired is None else self.fired | on.any(0)

    def variance(self, count: int) -> float:
        assert self.mean is not None  # something was added
        return self.square - float(self.mean.square().sum()) / count


@torch.no_grad()
def evaluate_saes(
    model: Any,
    saes: Mapping[str, Any],
    tokens: Int[Tensor, "n pos"],
    *,
    exclude: Iterable[int] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> SAEEvaluation:
    """Reconstruction, sparsity and loss of SAELens SAEs on one model, over whole sequences.

    Parameters
    ----------
    model: with TransformerLens hooks, no SAE attached
    saes: by name; each stands at its own ``cfg.metadata.hook_name``
    tokens: [n, pos]
    exclude: tokens at which nothing is replaced or counted; default: those of the SAEs' metadata
    batch_size: sequences a forward

    ``(1 + 2 m) n / batch_size`` forwards without gradients.

    Raises ValueError for an SAE whose hook the model does not have or whose width is another, and for
    tokens that are not [n, pos] with pos at least 2.
    """
    require_tokens(tokens, at_least=2)
    checks.require_tokens(tokens, model.cfg.d_vocab)
    checks.require_count("batch_size", batch_size, 2**31, "sequences a forward")
    refuse_attached(model)
    if not saes:
        raise ValueError("no SAE to evaluate: give them by name, {'mlp_out': sae}")
    hooks = {name: _hook_of(model, name, sae) for name, sae in saes.items()}
    if exclude is None:
        left_out = (
            getattr(sae.cfg.metadata, "exclude_special_tokens", None) for sae in saes.values()
        )
        exclude = set().union(*(special_tokens(model.tokenizer, each) for each in left_out))
    skipped = torch.tensor(sorted(exclude), dtype=torch.long)
    sums = {name: _Sums() for name in saes}
    clean: list[Tensor] = []
    patched: dict[str, list[Tensor]] = {name: [] for name in saes}
    ablated: dict[str, list[Tensor]] = {name: [] for name in saes}
    count = 0
    for rows in tqdm(tokens.split(batch_size), unit="batch", disable=not progress, desc="SAEs"):
        targets = ~torch.isin(rows.cpu(), skipped)
        kept = targets.clone()
        kept[:, 0] = False
        count += int(kept.sum())
        logits, cache = model.run_with_cache(
            rows, names_filter=lambda name: name in hooks.values(), return_type="logits"
        )
        clean.append(next_token_loss(logits, rows, targets).cpu())
        for name, sae in saes.items():
            x = cache[hooks[name]]
            z = sae.encode(x)
            made = sae.decode(z)
            sums[name].add(*(value.flatten(0, 1)[kept.flatten()] for value in (x, made, z)))
            for losses, value in ((patched, made), (ablated, torch.zeros_like(x))):
                logits = _with(model, hooks[name], value, rows, kept)
                losses[name].append(next_token_loss(logits, rows, targets).cpu())
    if not count:
        raise ValueError("every token is excluded: nothing to evaluate on")
    fired = [each.fired for each in sums.values() if each.fired is not None]
    return SAEEvaluation(
        list(saes),
        list(hooks.values()),
        count,
        torch.tensor([each.error / each.variance(count) for each in sums.values()]),
        torch.tensor([each.active / count for each in sums.values()]),
        torch.tensor([len(each) for each in fired]),
        torch.tensor([int((~each).sum()) for each in fired]),
        torch.cat(clean),
        torch.stack([torch.cat(losses) for losses in patched.values()]),
        torch.stack([torch.cat(losses) for losses in ablated.values()]),
    )


def _with(
    model: Any, hook: str, value: Tensor, tokens: Tensor, where: Bool[Tensor, "batch pos"]
) -> Tensor:
    def replace(x: Tensor, hook: Any) -> Tensor:
        return torch.where(where[..., None].to(x.device), value.to(x.dtype), x)

    logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)], return_type="logits")
    return logits


def _hook_of(model: Any, name: str, sae: Any) -> str:
    given = sae.cfg.metadata.hook_name
    hook = fires_as(model, hook_of(model, given)) if given else given
    if hook not in model.hook_dict:
        raise ValueError(f"the SAE {name!r} belongs to {given!r}, which the model does not have")
    if sae.cfg.d_in != model.cfg.d_model:
        raise ValueError(
            f"the SAE {name!r} takes activations of width {sae.cfg.d_in}, the model's are "
            f"{model.cfg.d_model} wide"
        )
    return str(hook)
