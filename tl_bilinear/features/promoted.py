"""Which tokens a feature's direction makes likelier (appendix M)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.features.labels import plain
from tl_bilinear.features.unembedding import direct_logits
from tl_bilinear.results import Result

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


def promoted_tokens(model: Any, row: Float[Tensor, " d_model"], k: int) -> PromotedTokens:
    """The k tokens that a direction of the residual stream promotes most, and the k it suppresses."""
    logits = direct_logits(model, row)
    k = min(k, len(logits))
    up, down = logits.topk(k), logits.topk(k, largest=False)
    words = [plain(model.tokenizer, t) for t in [*up.indices.tolist(), *down.indices.tolist()]]
    return PromotedTokens(up.indices, up.values, down.indices, down.values, words)
