"""The bilinear MLP as a TransformerLens component, and the config that asks for it.

A bilinear layer is a gated linear unit without its element-wise nonlinearity (Pearce et al. 2025,
section 2); its biases enter before the product (appendix J):

    ``mlp(x) = ((x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out``

TransformerLens's GatedMLP with an identity activation is not this layer: it adds b_in after the
product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from tl_bilinear.models.fields import require_values

IDENTITY = "identity"
BIAS_NAMES = ("b_gate", "b_in", "b_out")


def identity(x: Tensor) -> Tensor:
    """The activation of a bilinear layer, in place of SiLU. At module level, so that it pickles."""
    return x


# HookedTransformerConfig accepts only names in this table, for its own gated_mlp as well.
SUPPORTED_ACTIVATIONS.setdefault(IDENTITY, identity)


@dataclass(repr=False)
class BilinearTransformerConfig(HookedTransformerConfig):
    """The config of a :class:`HookedBilinearTransformer`: HookedTransformerConfig with bilinear MLPs.

    `bilinear_bias` gives trainable b_gate, b_in and b_out; by default there are none, as in the
    paper. `act_fn` and `gated_mlp` follow from the layer and may be left out.

    Raises ValueError for settings that are not those of a bilinear MLP (another activation,
    ``gated_mlp=False``, experts, 4-bit weights).
    """

    act_fn: str | None = IDENTITY
    gated_mlp: bool = True
    bilinear: bool = True
    bilinear_bias: bool = False

    def __post_init__(self) -> None:
        if self.act_fn in (None, "linear"):
            self.act_fn = IDENTITY
        self._refuse_other_layers()
        require_values(vars(self))
        super().__post_init__()

    def _refuse_other_layers(self) -> None:
        conflict: str | None = None
        if not self.bilinear:
            conflict = "bilinear=False (use HookedTransformerConfig for an ordinary model)"
        elif self.act_fn != IDENTITY:
            conflict = (
                f"act_fn={self.act_fn!r}: a bilinear MLP has no element-wise nonlinearity "
                f"(leave act_fn out, or pass act_fn={IDENTITY!r} to override a config)"
            )
        elif not self.gated_mlp:
            conflict = "gated_mlp=False: a bilinear MLP is gated (leave gated_mlp out)"
        elif self.num_experts is not None:
            conflict = f"num_experts={self.num_experts}: mixtures of experts are not bilinear"
        elif self.load_in_4bit:
            conflict = "load_in_4bit=True: the weights of a bilinear MLP are not quantised"
        if conflict is not None:
            raise ValueError(f"bilinear=True contradicts {conflict}.")


class BilinearMLP(CanBeUsedAsMLP):
    """``((x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out``, hooked.

    Weights as TransformerLens holds them: W_gate, W_in [d_model, d_mlp], W_out [d_mlp, d_model];
    b_gate, b_in [d_mlp], b_out [d_model]. In the factored form of :class:`tl_bilinear.BilinearTensor`
    left is W_gate.T, right W_in.T and out W_out.T.

    Hooks: hook_in [... d_model], hook_pre (x W_gate + b_gate), hook_pre_linear (x W_in + b_in) and
    hook_post (their product), each [... d_mlp], hook_out [... d_model].

    Without `cfg.bilinear_bias` the biases are buffers of zeros. They do not train, but they are in the
    state dict, so that a LayerNorm's bias can be folded into them.
    """

    W_gate: Tensor
    b_gate: Tensor
    b_in: Tensor
    b_out: Tensor

    def __init__(self, cfg: HookedTransformerConfig | Mapping[str, Any]) -> None:
        super().__init__(
            BilinearTransformerConfig(**cfg) if isinstance(cfg, Mapping) else cfg,
        )
        d_model, dtype = self.cfg.d_model, self.cfg.dtype
        self.act_fn = identity
        # In the order of TransformerLens's GatedMLP: one seed gives both the same initial weights.
        self.W_in = nn.Parameter(torch.empty(d_model, self.d_mlp, dtype=dtype))
        self.W_out = nn.Parameter(torch.empty(self.d_mlp, d_model, dtype=dtype))
        self.W_gate = nn.Parameter(torch.empty(d_model, self.d_mlp, dtype=dtype))
        trainable = getattr(self.cfg, "bilinear_bias", False)
        for name, width in zip(BIAS_NAMES, (self.d_mlp, self.d_mlp, d_model), strict=True):
            zeros = torch.zeros(width, dtype=dtype)
            if trainable:
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros)

        self.hook_in = HookPoint()  # [..., d_model]
        self.hook_pre = HookPoint()  # [..., d_mlp]
        self.hook_pre_linear = HookPoint()  # [..., d_mlp]
        self.hook_post = HookPoint()  # [..., d_mlp]
        self.hook_out = HookPoint()  # [..., d_model]

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if x.device != self.W_gate.device:
            x = x.to(self.W_gate.device)
        x = self.hook_in(x)
        # F.linear reads the transposed view as it is. GatedMLP copies each weight on every call,
        # which at 512 x 2048 costs a sixth of a training step and five sixths of a single token.
        gate = self.hook_pre(F.linear(x, self.W_gate.T, self.b_gate))
        linear = self.hook_pre_linear(F.linear(x, self.W_in.T, self.b_in))
        post = self.hook_post(gate * linear)
        return self.hook_out(F.linear(post, self.W_out.T, self.b_out))

    def drop_foreign_forward(self) -> None:
        """Remove the `forward` that SAELens's HookedSAETransformer sets on every MLP.

        It is a lambda that calls `hook_in`, which this class does itself. With it the hook would fire
        twice, a deepcopy would run the original's MLP, and pickling would fail.
        """
        forward = self.__dict__.get("forward")
        if getattr(forward, "__module__", "").startswith("sae_lens."):
            del self.__dict__["forward"]
