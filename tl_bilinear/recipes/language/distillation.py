"""Learning from another model's predictions, beside the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Distillation:
    """A frozen language model of the same vocabulary that teaches another one.

    The loss of a token is ``share * KL(teacher || model) + (1 - share) * cross-entropy``, in nats
    (Hinton et al. 2015, at temperature 1). Every process holds the whole teacher.
    """

    teacher: Any
    share: float

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    def divergence(
        self, logits: Float[Tensor, "n n_ctx d_vocab"], inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, ""]:
        """KL(teacher || model), summed over the tokens that have a label in `inputs` (see `Collate`)."""
        with torch.no_grad():
            taught = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
        each = torch.nn.functional.kl_div(
            logits[:, :-1].float().log_softmax(-1),
            taught.float().log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        return each.masked_fill(inputs["labels"][:, 1:] == -100, 0).sum()
