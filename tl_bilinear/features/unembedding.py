"""Which directions of the residual stream raise which tokens' logits.

``logit_t = u_t . r / s + constant`` for the final residual stream r and the last norm's scale s, with
``u_t = C w W_U[:, t]``: w the last norm's weight, C its centring (LayerNorm).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.passage import norm_matrix


def unembedding(model: Any) -> Dictionary:
    """The directions that raise tokens' logits, [d_vocab_out, d_model], through the last norm's weight.

    As output directions of a layer: what it writes for each token directly, past all later layers.
    """
    rows = model.W_U.detach().T
    matrix = _last_norm(model)
    rows = rows if matrix is None else rows @ matrix.T
    return Dictionary(rows, labels=token_names(model, len(rows)))


def unembedding_row(model: Any, token: int) -> Float[Tensor, " d_model"]:
    """One token's row of `unembedding`."""
    row, matrix = model.W_U[:, token].detach(), _last_norm(model)
    return row if matrix is None else matrix @ row


def direct_logits(model: Any, rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
    """What directions of the residual stream add to every logit, before the last norm's scale."""
    weights, matrix = model.W_U.detach(), _last_norm(model)
    rows = rows.to(weights)
    return (rows if matrix is None else rows @ matrix) @ weights


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
