"""Where in a text a feature is most active (appendix M)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.features.labels import Named, pieces

if TYPE_CHECKING:
    import pandas

Side = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Examples(Named):
    """Sequences on which a feature is most active, one for each, strongest first.

    Attributes
    ----------
    feature: the feature; side: "input" or "output"
    sequences: [k], rows of the tokens given; positions: [k], where it is strongest
    values: [k], its activation there
    tokens: [k, pos]; strengths: [k, pos], its activation on every token, 0 on those that do not count
    """

    feature: int
    side: str
    sequences: Int[Tensor, " k"]
    positions: Int[Tensor, " k"]
    values: Float[Tensor, " k"]
    tokens: Int[Tensor, "k pos"]
    strengths: Float[Tensor, "k pos"]

    @classmethod
    def of(
        cls,
        feature: int,
        side: Side,
        tokens: Int[Tensor, "n pos"],
        strengths: Float[Tensor, "n pos"],
        k: int,
    ) -> Examples:
        """The k rows of largest strength."""
        largest = strengths.max(1)
        best = largest.values.topk(min(k, len(strengths))).indices
        best = best[largest.values[best] > 0]
        return cls(
            feature,
            side,
            best,
            largest.indices[best],
            largest.values[best],
            tokens[best],
            strengths[best],
        )

    def to_pandas(self, tokenizer: Any = None, window: int = 10) -> pandas.DataFrame:
        """One row an example: sequence, position, value, and the text around it, the token in [[ ]]."""
        texts = []
        for row, position in zip(self.tokens.tolist(), self.positions.tolist(), strict=True):
            words = pieces(tokenizer, row)
            space = " " * words[position].startswith(" ")
            words[position] = f"{space}[[{words[position].strip()}]]"
            texts.append("".join(words[max(0, position - window) : position + window + 1]).strip())
        return self.table(
            {
                "sequence": self.sequences,
                "position": self.positions,
                "activation": self.values,
                "text": texts,
            },
            inputs=(),
        )
