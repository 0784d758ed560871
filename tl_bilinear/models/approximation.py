"""A Llama with gated MLPs made bilinear, all at once.

    found = approximate_llama(llama, tokens)                            # {layer: Approximation}
    loss_added(llama, held_out, {"all layers": Replacement(found)})     # of tl_bilinear.hooks
    tensors = {layer: one.tensor for layer, one in found.items()}
    bilinear = to_bilinear_llama(llama, tensors)                        # hidden_act="linear"

The mathematics is in `tl_bilinear.tensor.gated`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_bilinear.tensor import Approximation, BilinearTensor, approximate
from tl_bilinear.tensor.gated import WARN_BELOW, Fit
from tl_bilinear.tensor.registry import read_gated


@torch.no_grad()
def mlp_inputs(
    llama: Any,
    tokens: Int[Tensor, "n pos"],
    layers: Sequence[int] | None = None,
    *,
    drop_first: bool = True,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[int, Float[Tensor, "tokens d_model"]]:
    """What the MLPs of a Hugging Face model read, by layer: [tokens, d_model].

    Parameters
    ----------
    tokens: [n, pos]
    layers: default: all
    drop_first: leave out position 0, whose activations are often like no other's
    batch_size: sequences a forward
    """
    blocks = llama.model.layers
    chosen = range(len(blocks)) if layers is None else layers
    found: dict[int, list[Tensor]] = {layer: [] for layer in chosen}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
            found[layer].append(arguments[0][:, int(drop_first) :].flatten(0, 1))

        return hook

    with ExitStack() as stack:
        for layer in chosen:
            stack.callback(blocks[layer].mlp.register_forward_pre_hook(keep(layer)).remove)
        batches = tokens.split(batch_size)
        for some in tqdm(batches, desc="inputs of the MLPs", disable=not progress):
            llama.model(input_ids=some.to(llama.device))
    return {layer: torch.cat(inputs) for layer, inputs in found.items()}


def approximate_llama(
    llama: Any,
    tokens: Int[Tensor, "n pos"],
    layers: Sequence[int] | None = None,
    *,
    fit: Fit = "refit",
    warn_below: float = WARN_BELOW,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[int, Approximation]:
    """The bilinear approximations of several layers, on the inputs that they have in `tokens`.

    Each is fitted to the model as it is, not to one with the layers before it replaced: on a small
    TinyStories model that made no difference to the loss. `layers`, `tokens` and `batch_size` are
    those of `mlp_inputs`, `fit` that of `approximate`.

    Warns once, naming each layer whose variance explained is below `warn_below`.
    """
    inputs = mlp_inputs(llama, tokens, layers, batch_size=batch_size, progress=progress)
    found = {}
    for layer, x in tqdm(inputs.items(), desc="layers fitted", disable=not progress):
        found[layer] = approximate(
            llama.model.layers[layer].mlp,
            x,
            fit=fit,
            warn_below=-math.inf,  # one warning for all of them, below
            input_space=f"blocks.{layer}.mlp.hook_in",
            output_space=f"blocks.{layer}.hook_mlp_out",
        )
    low = {n: one.variance_explained for n, one in found.items()}
    low = {n: value for n, value in low.items() if not value >= warn_below}
    if low:
        listed = ", ".join(f"{n} ({value:.1%})" for n, value in low.items())
        warnings.warn(
            f"the bilinear approximation explains less than {warn_below:.0%} of the output's variance "
            f"in layer {listed}: measure the loss added, or finetune (`tl-bilinear finetune`)",
            stacklevel=2,
        )
    return found


@dataclass(frozen=True)
class Replacement:
    """An edit of a Hugging Face model for `tl_bilinear.hooks.loss_added`: MLPs replaced.

    approximations: by layer, what `approximate_llama` gives or some of it
    """

    approximations: Mapping[int, Approximation]

    @contextmanager
    def applied(self, llama: Any) -> Iterator[None]:
        """The model with these MLPs replaced, while the context is open."""
        blocks = llama.model.layers
        before = {layer: blocks[layer].mlp for layer in self.approximations}
        try:
            for layer, one in self.approximations.items():
                weight = before[layer].gate_proj.weight
                blocks[layer].mlp = _Evaluates(one.tensor.to(weight.device), weight.dtype)
            yield
        finally:
            for layer, mlp in before.items():
                blocks[layer].mlp = mlp


class _Evaluates(nn.Module):
    """A bilinear tensor where the model has a module."""

    def __init__(self, tensor: BilinearTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensor, self.dtype = tensor, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.tensor(x).to(self.dtype)


def require_gated_llama(llama: Any) -> None:
    """Raise TypeError or ValueError for what cannot become a Llama with a linear gate."""
    from transformers import LlamaForCausalLM

    if not isinstance(llama, LlamaForCausalLM):
        raise TypeError(
            f"expected a LlamaForCausalLM, got {type(llama).__name__}: only Llama has the form "
            "hidden_act='linear' that a bilinear model is stored in. Single layers of any gated model "
            "are read by approximate"
        )
    for layer in llama.model.layers:
        read_gated(layer.mlp)


@torch.no_grad()
def to_bilinear_llama(llama: Any, tensors: Mapping[int, BilinearTensor]) -> Any:
    """A new LlamaForCausalLM whose MLPs are these bilinear layers: a linear gate, biases where needed.

    `tensors` holds one for every layer, of the sizes of its MLP: `Approximation.tensor`, say. The model
    given does not change.

    Raises TypeError for another kind of model, ValueError for missing layers.
    """
    from transformers import LlamaForCausalLM

    require_gated_llama(llama)
    if missing := sorted(set(range(len(llama.model.layers))) - tensors.keys()):
        raise ValueError(f"a bilinear Llama needs a bilinear layer everywhere; missing: {missing}")
    config = copy.deepcopy(llama.config)
    config.hidden_act = "linear"
    biases = [(t.bias_left, t.bias_right, t.bias_out) for t in tensors.values()]
    config.mlp_bias = any(b is not None and bool(b.any()) for three in biases for b in three)
    state = llama.state_dict()
    for layer, tensor in tensors.items():
        prefix = f"model.layers.{layer}.mlp"
        state = {name: value for name, value in state.items() if not name.startswith(f"{prefix}.")}
        for name, weight, bias in (
            ("gate_proj", tensor.left, tensor.bias_left),
            ("up_proj", tensor.right, tensor.bias_right),
            ("down_proj", tensor.out, tensor.bias_out),
        ):
            state[f"{prefix}.{name}.weight"] = weight
            if config.mlp_bias:
                state[f"{prefix}.{name}.bias"] = (
                    weight.new_zeros(len(weight)) if bias is None else bias
                )
    with torch.random.fork_rng(devices=[]):  # its initial weights are replaced
        bilinear: Any = LlamaForCausalLM(config)
    bilinear.to(device=llama.device, dtype=llama.dtype)
    bilinear.load_state_dict(state)
    return bilinear.eval()
