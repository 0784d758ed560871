"""Gated MLPs of other models as bilinear layers: how they are read, and whole Llamas made bilinear.

    approximations = approximate_llama(llama, rows)         # {layer: Approximation}
    loss_added(llama, approximations, held_out_rows)        # nats a token, as a LossAdded
    bilinear = to_bilinear_llama(llama, approximations)     # LlamaForCausalLM, hidden_act="linear"

Rows are token numbers [n, n_ctx]. The mathematics is in `tl_bilinear.tensor.gated`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_bilinear.models.readers import (
    _ACTIVATION_NAMES,
    _copy,
    _evaluating,
    _is_a,
    _transposed,
)
from tl_bilinear.tensor import BilinearTensor, register_gated_reader
from tl_bilinear.tensor.gated import WARN_BELOW, Approximation, Fit, GatedLayer
from tl_bilinear.tensor.readers import read_gated

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 16  # rows a forward pass

_registered = False


def register() -> None:
    """Register the readers that `BilinearTensor.approximate` asks. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    register_gated_reader("gate_proj/up_proj/down_proj", read_gate_up_down)
    register_gated_reader("transformer-lens", read_tl_gated)


# ---------------------------------------------------------------------- gated modules


def read_gate_up_down(module: Any) -> GatedLayer | None:
    """Linear maps gate_proj, up_proj and down_proj with an activation on the gate (Llama, Gemma ...)."""
    maps: list[Any] = [
        getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")
    ]
    if not all(isinstance(one, nn.Linear) for one in maps):
        return None
    found = (getattr(module, name, None) for name in _ACTIVATION_NAMES)
    activation = next((one for one in found if callable(one)), None)
    if activation is None:
        raise ValueError(
            f"this {type(module).__name__} has gate_proj, up_proj and down_proj, but no activation "
            f"under {', '.join(_ACTIVATION_NAMES)}: build GatedLayer(gate, up, out, activation)"
        )
    gate, up, out = (_copy(one.weight) for one in maps)
    biases = (None if one.bias is None else _copy(one.bias) for one in maps)
    layer = GatedLayer(gate, up, out, activation, *biases)
    _compare_with_forward(module, layer)
    return layer


def read_tl_gated(module: Any) -> GatedLayer | None:
    """TransformerLens's GatedMLP, whose b_in is added after the product."""
    if not _is_a(module, "transformer_lens", "GatedMLP"):
        return None
    gate, up, out = (_transposed(getattr(module, name)) for name in ("W_gate", "W_in", "W_out"))
    bias_out = module.b_out.detach() + module.b_in.detach() @ module.W_out.detach()
    layer = GatedLayer(gate, up, out, module.act_fn, bias_out=bias_out)
    _compare_with_forward(module, layer)
    return layer


def _compare_with_forward(module: nn.Module, layer: GatedLayer) -> None:
    """Refuse a module whose forward is another function than the layer read from its weights."""
    if layer.gate.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, layer.d_in, generator=generator).to(layer.gate)
    with torch.no_grad(), _evaluating(module):
        given, expected = module(x), layer(x)
    difference, scale = (given - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= (0.1 if x.dtype.itemsize < 4 else 0.01) * scale:
        raise ValueError(
            f"this {type(module).__name__} has the names of a gated MLP, but its forward computes "
            f"something else: outputs up to {scale:.3g} differ by {difference:.3g}; build "
            "GatedLayer(gate, up, out, activation) from the weights that make the layer"
        )


# ---------------------------------------------------------------------- a whole Llama


@torch.no_grad()
def mlp_inputs(
    llama: Any,
    rows: Int[Tensor, "n n_ctx"],
    layers: Sequence[int] | None = None,
    *,
    drop_first: bool = True,
) -> dict[int, Float[Tensor, "tokens d_model"]]:
    """What the MLPs of a Hugging Face model read on rows of tokens, by layer; one token a row.

    `drop_first` leaves out position 0, whose activations are often like no other's.
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
        for batch in rows.split(_BATCH):
            llama.model(input_ids=batch.to(llama.device))
    return {layer: torch.cat(batches) for layer, batches in found.items()}


def approximate_llama(
    llama: Any,
    rows: Int[Tensor, "n n_ctx"],
    layers: Sequence[int] | None = None,
    *,
    fit: Fit = "refit",
    warn_below: float = WARN_BELOW,
) -> dict[int, Approximation]:
    """`BilinearTensor.approximate` of several layers (default: all), on the inputs they have in `rows`.

    Each is fitted to the model as it is, not to one with the layers before it replaced: on a small
    TinyStories model that made no difference to the loss. One warning for all layers below
    `warn_below`.
    """
    inputs = mlp_inputs(llama, rows, layers)
    found = {}
    for layer, x in inputs.items():
        found[layer] = BilinearTensor.approximate(
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
class LossAdded:
    """Loss in nats a token of a model and of the same with layers replaced.

    `alone[layer]`: with that layer alone replaced; `together`: with all of them.
    """

    clean: float
    together: float
    alone: dict[int, float]

    @property
    def added(self) -> float:
        """What replacing all the layers adds, in nats a token."""
        return self.together - self.clean

    def to_pandas(self) -> pd.DataFrame:
        """Loss and loss added, one row for each replacement."""
        import pandas as pd

        losses = {str(layer): loss for layer, loss in self.alone.items()} | {"all": self.together}
        table = pd.DataFrame({"loss": losses}).rename_axis("replaced")
        return table.assign(added=table["loss"] - self.clean)


def loss_added(
    llama: Any, approximations: Mapping[int, Approximation], rows: Int[Tensor, "n n_ctx"]
) -> LossAdded:
    """The loss of a Hugging Face model with MLPs replaced by their approximations."""
    clean = _loss(llama, rows)
    alone = {}
    for layer, one in approximations.items():
        with replaced(llama, {layer: one}):
            alone[layer] = _loss(llama, rows)
    with replaced(llama, approximations):
        return LossAdded(clean, _loss(llama, rows), alone)


@contextmanager
def replaced(llama: Any, approximations: Mapping[int, Approximation]) -> Iterator[None]:
    """A model with its MLPs replaced, and put back at the end."""
    before = {layer: llama.model.layers[layer].mlp for layer in approximations}
    try:
        for layer, one in approximations.items():
            weight = before[layer].gate_proj.weight
            llama.model.layers[layer].mlp = _Evaluates(one.tensor.to(weight.device), weight.dtype)
        yield
    finally:
        for layer, mlp in before.items():
            llama.model.layers[layer].mlp = mlp


class _Evaluates(nn.Module):
    def __init__(self, tensor: BilinearTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensor, self.dtype = tensor, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.tensor(x).to(self.dtype)


@torch.no_grad()
def _loss(llama: Any, rows: Int[Tensor, "n n_ctx"]) -> float:
    total, bos = 0.0, llama.config.bos_token_id
    count = 0
    for batch in rows.split(_BATCH):
        batch = batch.to(llama.device)
        labels = batch[:, 1:]
        if bos is not None:
            labels = labels.masked_fill(labels == bos, -100)  # given, never predicted
        logits = llama(input_ids=batch).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.mT, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def require_gated_llama(llama: Any) -> None:
    """Raise TypeError or ValueError for what cannot become a Llama with a linear gate."""
    from transformers import LlamaForCausalLM

    if not isinstance(llama, LlamaForCausalLM):
        raise TypeError(
            f"expected a LlamaForCausalLM, got {type(llama).__name__}: only Llama has the form "
            "hidden_act='linear' that a bilinear model is stored in. Single layers of any gated model "
            "are read by BilinearTensor.approximate"
        )
    for layer in llama.model.layers:
        read_gated(layer.mlp)


@torch.no_grad()
def to_bilinear_llama(llama: Any, tensors: Mapping[int, BilinearTensor]) -> Any:
    """A Llama with bilinear layers for MLPs: a LlamaForCausalLM with a linear gate, biases where needed.

    `tensors`: for every layer, of the sizes of its MLP, as `Approximation.tensor`. The model given
    stays as it is. Raises TypeError for another model, ValueError for missing layers.
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
