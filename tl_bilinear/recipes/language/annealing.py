"""The gates of a Llama on their way to an affine function (Pearce et al. 2025, appendix H).

With s the share of the way that is done, the gate's activation of a pre-activation g is

- on the path "beta", the paper's: ``act(beta g) / beta`` with beta = 1 - s; for SiLU this is
  ``g sigmoid(beta g)``, which ends at ``act'(0) g``, half of g;
- on the path "affine": ``(1 - s) act(g) + s (a + b g)``, with the a and b of each neuron that are best
  for the layer's output (`tl_bilinear.tensor.gated`); a is trained on as the gate's bias.

s goes from 0 to 1 over the first `anneal` share of the steps, by a schedule:

- "linear", the paper's, or "cosine";
- "even": at every step the gates change equally much, in the root mean square over their own
  pre-activations (on the path "beta" most of the change is at small beta; "affine" is even by itself);
- "layers": linear, one layer after the other, the first one first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from tl_bilinear.models.approximation import approximate_llama, mlp_inputs, to_bilinear_llama
from tl_bilinear.recipes.language.config import FinetuneConfig
from tl_bilinear.tensor.registry import read_gated

_SMALLEST_BETA = 1e-3  # below, act(beta g) / beta is its limit to float32's precision
_GRID, _POOL = 256, 50_000  # of the even schedule: betas, pre-activations


# ---------------------------------------------------------------------- the gate


class AnnealedGate(nn.Module):
    """An activation on its way to an affine function; `share` of the way is done.

    bias, slope: [d_hidden], the a and b of ``a + b g`` at the end. Only on the path "affine" is the bias
    a parameter, and trained.
    """

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor],
        path: str,
        bias: Float[Tensor, " d_hidden"],
        slope: Float[Tensor, " d_hidden"],
    ) -> None:
        super().__init__()
        self.slope: Tensor
        self.bias: Tensor
        self.activation, self.path, self.share = activation, path, 0.0
        self.register_buffer("slope", slope.clone())
        if path == "affine":
            self.bias = nn.Parameter(bias.clone())
        else:
            self.register_buffer("bias", bias.clone())

    def forward(self, g: Float[Tensor, "... d_hidden"]) -> Float[Tensor, "... d_hidden"]:
        slope = self.slope.to(g.dtype)
        if self.path == "beta":
            beta = 1 - self.share
            return slope * g if beta < _SMALLEST_BETA else self.activation(beta * g) / beta
        affine = torch.addcmul(self.bias.to(g.dtype), slope, g)
        if self.share == 1:
            return affine
        # The affine part is computed at a share of 0 too: several processes need every gradient.
        return torch.lerp(self.activation(g), affine, self.share)


def install_gates(
    llama: Any, path: str, gates: Mapping[int, tuple[Tensor, Tensor]]
) -> list[AnnealedGate]:
    """Put an `AnnealedGate` with (bias, slope) into every layer of a Llama."""
    installed = []
    for layer, (bias, slope) in gates.items():
        mlp = llama.model.layers[layer].mlp
        like = mlp.gate_proj.weight
        mlp.act_fn = AnnealedGate(mlp.act_fn, path, bias.to(like), slope.to(like))
        installed.append(mlp.act_fn)
    return installed


def fold_gates(llama: Any, path: str, checkpoint: Path) -> Any:
    """The bilinear Llama of the last checkpoint, given the model that the run started from."""
    activations = [block.mlp.act_fn for block in llama.model.layers]
    empty = torch.zeros(llama.config.intermediate_size)
    gates = install_gates(llama, path, dict.fromkeys(range(len(activations)), (empty, empty)))
    llama.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)  # tied weights
    tensors = {}
    for layer, (block, activation) in enumerate(zip(llama.model.layers, activations, strict=True)):
        block.mlp.act_fn = activation
        tensors[layer] = read_gated(block.mlp).with_gate(
            gates[layer].bias.detach(), gates[layer].slope
        )
    return to_bilinear_llama(llama, tensors)


def final_gates(
    llama: Any, path: str, rows: Tensor, *, progress: bool = True
) -> dict[int, tuple[Tensor, Tensor]]:
    """The affine functions (a, b) that the gates of each layer end at.

    Raises ValueError for an activation that the path does not lead away from.
    """
    if path == "affine":
        fitted = approximate_llama(
            llama, rows, fit="output", warn_below=-math.inf, progress=progress
        )
        return {layer: (one.intercept, one.slope) for layer, one in fitted.items()}
    found = {}
    for layer, block in enumerate(llama.model.layers):
        h = block.mlp.gate_proj.weight.shape[0]
        slope = _slope_at_zero(block.mlp.act_fn)
        found[layer] = (torch.zeros(h), torch.full((h,), slope))
    return found


def _slope_at_zero(activation: Callable[[Tensor], Tensor]) -> float:
    g = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)
    left, right = (activation(g) / g).tolist()
    if abs(left - right) > 0.01:
        name = type(activation).__name__
        raise ValueError(
            f"path='beta' scales the input of a smooth activation, and {name} has a kink at 0, where it "
            "is the same at every scale: use path='affine'"
        )
    return (left + right) / 2


# ---------------------------------------------------------------------- the schedule


def shares(
    schedule: str, progress: float, layers: int, even: Float[Tensor, " n"] | None = None
) -> list[float]:
    """The share of the way that the gates of each layer have gone, `progress` through the annealing.

    `even`: the progress at which each of n evenly spaced shares is reached, from `even_progress`.
    """
    p = min(max(progress, 0.0), 1.0)
    if schedule == "layers":
        return [min(max(p * layers - layer, 0.0), 1.0) for layer in range(layers)]
    if schedule == "cosine":
        p = (1 - math.cos(math.pi * p)) / 2
    elif schedule == "even" and even is not None:
        upper = int(torch.searchsorted(even, p).clamp(1, len(even) - 1))
        low, high = even[upper - 1].item(), even[upper].item()
        fraction = (p - low) / (high - low) if high > low else 1.0
        p = min((upper - 1 + fraction) / (len(even) - 1), 1.0)
    return [p] * layers


@torch.no_grad()
def even_progress(
    activation: Callable[[Tensor], Tensor], g: Float[Tensor, " n"]
) -> Float[Tensor, " grid"]:
    """The progress at which each share of the path "beta" is due if the gate is to change evenly.

    It is the length of the path up to the share over that of the whole path; lengths are root mean
    squares over the pre-activations g.
    """
    gate = AnnealedGate(
        activation, "beta", torch.zeros(1), torch.tensor([_slope_at_zero(activation)])
    )
    lengths, before = [0.0], activation(g)
    for index in range(1, _GRID):
        gate.share = index / (_GRID - 1)
        now = gate(g)
        lengths.append((now - before).square().mean().sqrt().item())
        before = now
    way = torch.tensor(lengths, dtype=torch.float64).cumsum(0)
    return way / way[-1]


@torch.no_grad()
def gate_pool(llama: Any, rows: Tensor, *, progress: bool = True) -> Float[Tensor, " n"]:
    """A sample of the pre-activations of all gates on these rows."""
    found = []
    for layer, x in mlp_inputs(llama, rows, progress=progress).items():
        g = llama.model.layers[layer].mlp.gate_proj(x).flatten()
        found.append(g[:: max(1, len(g) * len(llama.model.layers) // _POOL)])
    return torch.cat(found)


def annealing_callback(llama: Any, config: FinetuneConfig, even: Tensor | None) -> Any:
    """A callback for Trainer that moves the gates of `llama` on before each step."""
    from transformers import TrainerCallback

    class Anneal(TrainerCallback):
        # The share depends on the step alone, so a run that goes on from a checkpoint finds its place.
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            length = config.anneal * state.max_steps
            progress = state.global_step / length if length else 1.0
            blocks = llama.model.layers
            for block, share in zip(
                blocks, shares(config.schedule, progress, len(blocks), even), strict=True
            ):
                block.mlp.act_fn.share = share

    return Anneal()
