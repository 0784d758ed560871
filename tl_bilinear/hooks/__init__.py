"""What runs inside `run_with_hooks` and `run_with_cache`: record, keep, ablate, scale, steer, replace,
measure.

>>> u = model.W_U[:, token]
>>> eigen = BilinearTensor.from_model(model, 3).interaction(u).eigh(k=8)
>>> parts = EigenComponents(eigen, layer=3)
>>> with recording(model, parts) as names:
...     logits, cache = model.run_with_cache(tokens, names_filter=names)
>>> model.run_with_hooks(tokens, fwd_hooks=parts.ablate(0, positions=-1).fwd_hooks(model))
>>> loss_added(model, tokens, {"rank 4": parts.low_rank(4), "first": parts.ablate(0)}).to_pandas()
>>> verify(model, tokens, parts).to_pandas()

Importing it loads no framework; of a model it needs only the names of its hook points.
"""

from tl_bilinear.hooks.components import Components, EigenComponents, HOSVDComponents
from tl_bilinear.hooks.effects import (
    Edit,
    LossAdded,
    logit_difference,
    loss_added,
    next_token_loss,
    token_losses,
    with_loss_added,
)
from tl_bilinear.hooks.interventions import (
    Chain,
    Intervention,
    OutputEdit,
    ProjectInput,
    ReplaceLayer,
)
from tl_bilinear.hooks.leaving_out import LeftOut, leave_out
from tl_bilinear.hooks.recording import recording
from tl_bilinear.hooks.verify import Trial, Verification, verify, verify_trials

__all__ = [
    "Chain",
    "Components",
    "Edit",
    "EigenComponents",
    "HOSVDComponents",
    "Intervention",
    "LeftOut",
    "LossAdded",
    "OutputEdit",
    "ProjectInput",
    "ReplaceLayer",
    "Trial",
    "Verification",
    "leave_out",
    "logit_difference",
    "loss_added",
    "next_token_loss",
    "recording",
    "token_losses",
    "verify",
    "verify_trials",
    "with_loss_added",
]
