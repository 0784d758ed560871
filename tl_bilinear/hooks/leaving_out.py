"""Which layers of a gated model are better left as they are.

Variance explained does not say what a layer's approximation costs the model: some cost nothing, a few
cost most of what all of them add. `leave_out` finds the latter by measuring, and names them.

>>> found = approximate_llama(llama, tokens)
>>> left = leave_out(llama, found, held_out, budget=0.2)
>>> left.order, left.kept()                 # layers left out, worst first; the approximations kept
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.hooks.effects import loss_added
from tl_bilinear.models.approximation import Replacement
from tl_bilinear.results import Result
from tl_bilinear.tensor import Approximation

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LeftOut(Result):
    """Layers that keep the model's own MLP, those that cost most first.

    Attributes
    ----------
    approximations: all of them, by layer
    order: the layers left out
    loss: [len(order) + 1], nats a token added with none of them left out, with the first, ...
    """

    approximations: dict[int, Approximation]
    order: list[int]
    loss: Float[Tensor, " n"]

    def kept(self, count: int | None = None) -> dict[int, Approximation]:
        """The approximations without the first `count` layers of `order` (all of them)."""
        gone = self.order if count is None else self.order[:count]
        return {n: one for n, one in self.approximations.items() if n not in gone}

    def __str__(self) -> str:
        first, last = self.loss[0].item(), self.loss[-1].item()
        total = len(self.approximations)
        named = ", ".join(map(str, self.order)) or "none"
        return (
            f"left out: {named}; loss added by the other {total - len(self.order)} of {total} layers "
            f"{last:+.4f} nats a token, by all {first:+.4f}"
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer left out: layer, saved (nats a token), loss_added by those that remain."""
        import pandas as pd

        loss = self.loss.tolist()
        return pd.DataFrame(
            {
                "layer": self.order,
                "saved": [a - b for a, b in pairwise(loss)],
                "loss_added": loss[1:],
            }
        )


def leave_out(
    llama: Any,
    approximations: Mapping[int, Approximation],
    tokens: Int[Tensor, "n pos"],
    *,
    budget: float | None = None,
    at_most: int | None = None,
    mask: Tensor | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> LeftOut:
    """Put layers of a Hugging Face model back, each time the one that saves most.

    Parameters
    ----------
    approximations: by layer, as `approximate_llama` gives them
    tokens, mask, batch_size: as `loss_added`. Not the text of the fit
    budget: nats a token. Stops when those that remain add no more; None goes on to the end
    at_most: layers to leave out; all by default

    Every step runs the text once for each layer that remains: 465 runs to order thirty layers.
    """
    if budget is not None:
        checks.require_number("budget", budget, "is a loss in nats a token", signed=True)
    if not approximations:
        raise ValueError("there is no approximation to leave out: approximations is empty")
    most = len(approximations) if at_most is None else at_most
    checks.require_count("at_most", most, len(approximations), "the approximations")
    options: dict[str, Any] = {"mask": mask, "batch_size": batch_size, "progress": False}
    remaining = dict(approximations)
    order: list[int] = []
    losses = [loss_added(llama, tokens, Replacement(remaining), **options).difference.item()]
    with tqdm(total=most, desc="layers left out", disable=not progress) as bar:
        while len(order) < most and (budget is None or losses[-1] > budget):
            without = {
                str(layer): Replacement({n: one for n, one in remaining.items() if n != layer})
                for layer in remaining
            }
            found = loss_added(llama, tokens, without, **options).difference
            best = int(found.argmin())
            order.append(list(remaining)[best])
            del remaining[order[-1]]
            losses.append(found[best].item())
            bar.set_postfix(layer=order[-1], nats=f"{losses[-1]:.4f}")
            bar.update()
    return LeftOut(dict(approximations), order, torch.tensor(losses))
