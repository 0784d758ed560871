"""Which directions of the residual stream raise which tokens' logits.

``logit_t = u_t . r / s + constant`` for the final residual stream r and the last norm's scale s, with
``u_t = C w W_U[:, t]``: w the last norm's weight, C its centring (LayerNorm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.labels import plain
from tl_bilinear.features.passage import norm_matrix
from tl_bilinear.results import Result
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class PromotedTokens(Result):
    """Tokens whose logits a direction raises and lowers most, before the last norm's scale.

    Attributes
    ----------
    promoted, suppressed: [k], token ids; raised, lowered: [k], change of their logits
    words: name of each, promoted first
    """

    promoted: Int[Tensor, " k"]
    raised: Float[Tensor, " k"]
    suppressed: Int[Tensor, " k"]
    lowered: Float[Tensor, " k"]
    words: list[str]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a rank."""
        import pandas as pd

        k = len(self.promoted)
        return pd.DataFrame(
            {
                "promoted": self.words[:k],
                "raised": self.raised.tolist(),
                "suppressed": self.words[k:],
                "lowered": self.lowered.tolist(),
            }
        )


def unembedding(model: Any) -> Dictionary:
    """The directions that raise tokens' logits, [d_vocab_out, d_model], through the last norm's weight.

    As output directions of a layer: what it writes for each token directly, past all later layers.
    """
    rows = model.W_U.detach().T
    matrix = _last_norm(model)
    rows = rows if matrix is None else rows @ matrix.T
    return Dictionary(rows, labels=token_names(model, len(rows)))


def unembedding_row(model: Any, token: int) -> Float[Tensor, " d_model"]:
    """One token's row of `unembedding`. Raises TypeError or ValueError for a token that there is not."""
    checks.require_tokens(torch.tensor([checks.require_int("token", token)]), model.W_U.shape[1])
    row, matrix = model.W_U[:, token].detach(), _last_norm(model)
    return row if matrix is None else matrix @ row


def promoted_tokens(model: Any, row: Float[Tensor, " d_model"], k: int) -> PromotedTokens:
    """The k tokens that a direction of the residual stream promotes most, and the k it suppresses."""
    weights, matrix = model.W_U.detach(), _last_norm(model)
    checks.require_positive("k", k)
    row = row.to(weights)
    logits = (row if matrix is None else row @ matrix) @ weights
    k = min(k, len(logits))
    up, down = logits.topk(k), logits.topk(k, largest=False)
    words = [plain(model.tokenizer, t) for t in [*up.indices.tolist(), *down.indices.tolist()]]
    return PromotedTokens(up.indices, up.values, down.indices, down.values, words)


def most_promoted(model: Any, rows: Float[Tensor, "n d_model"], k: int) -> Int[Tensor, "n k"]:
    """The k tokens that each of n directions of the residual stream promotes most."""
    weights, matrix = model.W_U.detach(), _last_norm(model)
    k = min(checks.require_positive("k", k), weights.shape[1])
    step = max(1, BLOCK_ELEMENTS // weights.shape[1])
    parts = rows.to(weights).split(step)
    return torch.cat(
        [((r if matrix is None else r @ matrix) @ weights).topk(k).indices for r in parts]
    )


def token_names(model: Any, count: int) -> list[str] | None:
    """The first `count` tokens as the tokenizer writes them; None without a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return None
    known = tokenizer.convert_ids_to_tokens(list(range(min(count, len(tokenizer)))))
    return [str(word) for word in known] + [""] * (count - len(known))


def _last_norm(model: Any) -> Tensor | None:
    norm = getattr(model, "ln_final", None)
    return None if norm is None else norm_matrix(model.cfg, norm, model.W_U)
