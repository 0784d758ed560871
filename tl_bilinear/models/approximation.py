"""Models with gated MLPs, and the bilinear layer nearest to each of theirs.

    found = approximate_llama(llama, tokens)                            # {layer: Approximation}
    fidelity_table(found)                                               # how far to trust each
    loss_added(llama, held_out, {"all layers": Replacement(found)})     # of tl_bilinear.hooks
    tensors = {layer: one.tensor for layer, one in found.items()}
    bilinear = to_bilinear_llama(llama, tensors)                        # hidden_act="linear"

Models of Hugging Face are read, and HookedTransformers and TransformerBridges: the tensors have the
spaces of their hooks, so that `ReplaceLayer` and everything else takes them. The mathematics is in
`tl_bilinear.tensor.gated`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_bilinear.models.spaces import is_hooked, layer_spaces, llama_spaces
from tl_bilinear.tensor import Approximation, BilinearTensor, approximate
from tl_bilinear.tensor.fidelity import Massive
from tl_bilinear.tensor.gated import WARN_BELOW, Fit, Weights
from tl_bilinear.tensor.registry import read_gated

if TYPE_CHECKING:
    import pandas as pd


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
    """What the MLPs of a model read, by layer: [tokens, d_model].

    Parameters
    ----------
    tokens: [n, pos]
    layers: default: all
    drop_first: leave out position 0, whose activations are often like no other's
    batch_size: sequences a forward
    """
    blocks = _blocks(llama)
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
            _run(llama, some)
    return {layer: torch.cat(inputs) for layer, inputs in found.items()}


def approximate_llama(
    llama: Any,
    tokens: Int[Tensor, "n pos"] | Mapping[str, Int[Tensor, "_ pos"]],
    layers: Sequence[int] | None = None,
    *,
    fit: Fit = "refit",
    weights: Weights = "ordinary",
    extra: int = 0,
    in_order: bool = False,
    warn_below: float = WARN_BELOW,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[int, Approximation]:
    """The bilinear approximations of several layers, on the inputs that they have in `tokens`.

    Parameters
    ----------
    llama: a Hugging Face model whose MLPs are gated, a HookedTransformer or a TransformerBridge
    tokens: [n, pos], or by group of text {name: [n, pos]}: the fidelity is then given for each
    layers: default: all
    fit, weights, extra: those of `approximate`
    in_order: bool
        Fit each layer to its inputs in the model with the layers before it replaced already (a forward
        of the text for each layer). By default, to those in the model as it is.
    batch_size: sequences a forward

    Position 0 is left out. Massive tokens are named by their sequence and position in `tokens` (of the
    groups one after the other). Warns once, naming each layer whose worst score lies below
    `warn_below`, and what it is the score of.

    Raises TypeError where `in_order` is asked of a model that is not of Hugging Face.
    """
    if in_order and is_hooked(llama):
        raise TypeError(
            "in_order replaces layers of a Hugging Face model, got a "
            f"{type(llama).__name__}: pass the model that it was made from"
        )
    groups = {"": tokens} if isinstance(tokens, Tensor) else dict(tokens)
    chosen = list(range(len(_blocks(llama))) if layers is None else layers)
    found: dict[int, Approximation] = {}
    inputs: dict[str, dict[int, Tensor]] = {}
    bar = tqdm(chosen, desc="layers fitted", disable=not progress)
    for layer in bar:
        if in_order or not inputs:
            with Replacement(found).applied(llama) if in_order else nullcontext():
                inputs = {
                    name: mlp_inputs(
                        llama,
                        some,
                        [layer] if in_order else chosen,
                        batch_size=batch_size,
                        progress=progress and not in_order,
                    )
                    for name, some in groups.items()
                }
        by_group = {name: some.pop(layer) for name, some in inputs.items()}
        reads, writes = _spaces(llama, layer)
        one = approximate(
            _blocks(llama)[layer].mlp,
            by_group if len(groups) > 1 else next(iter(by_group.values())),
            fit=fit,
            weights=weights,
            extra=extra,
            warn_below=-math.inf,  # one warning for all of them, below
            input_space=reads,
            output_space=writes,
        )
        places = _places(one.fidelity.massive, [some.shape for some in groups.values()])
        found[layer] = replace(one, fidelity=replace(one.fidelity, massive=places))
    low = {n: one for n, one in found.items() if not one.worst[1] >= warn_below}
    if low:
        listed = ", ".join(f"{n} ({_why(one)})" for n, one in low.items())
        warnings.warn(
            f"the bilinear approximation explains less than {warn_below:.0%} of the output's variance "
            f"in layer {listed}: measure the loss added, or finetune (`tl-bilinear finetune`)",
            stacklevel=2,
        )
    return found


def _why(one: Approximation) -> str:
    name, worst = one.worst
    massive = one.fidelity.massive
    below = ", worse than the mean" if worst < 0 else ""
    apart = f"; massive tokens carry {massive.share:.0%}" if len(massive) else ""
    return f"{worst:.1%} of {name}{below}{apart}"


def _places(massive: Massive, shapes: Sequence[Sequence[int]]) -> Massive:
    """The massive tokens by sequence and position, position 0 having been left out of the inputs."""
    every, before = [], 0
    for n, pos in shapes:
        sequences = torch.arange(before, before + n)[:, None].expand(n, pos - 1)
        positions = torch.arange(1, pos).expand(n, pos - 1)
        every.append(torch.stack([sequences, positions], -1).flatten(0, 1))
        before += n
    return replace(massive, places=torch.cat(every)[massive.rows.cpu()])


def fidelity_table(approximations: Mapping[int, Approximation]) -> pd.DataFrame:
    """How far to trust each layer, a row for each; the first column to look at is `worst`.

    Columns: layer, worst and worst_of (the lowest of the scores, and of what), overall, ordinary, median
    (see `Fidelity`), a column for each group, massive (their number), massive_share (of the variance),
    loss_added (NaN where it was not measured).
    """
    import pandas as pd

    rows = []
    for layer, one in approximations.items():
        score = one.fidelity
        name, worst = score.worst
        rows.append(
            {
                "layer": layer,
                "worst": worst,
                "worst_of": name,
                "overall": score.overall,
                "ordinary": score.ordinary,
                "median": score.median,
                **score.groups,
                "massive": len(score.massive),
                "massive_share": score.massive.share,
                "loss_added": math.nan if score.loss_added is None else score.loss_added,
            }
        )
    return pd.DataFrame(rows)


def _blocks(model: Any) -> Any:
    if is_hooked(model):
        return model.blocks
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise TypeError(
            f"expected a model with model.layers[n].mlp (Llama, Mistral, Qwen, Gemma, Phi-3), a "
            f"HookedTransformer or a TransformerBridge, got {type(model).__name__}. Single layers are "
            "read by approximate"
        )
    return layers


def _run(model: Any, tokens: Tensor) -> None:
    tokens = tokens.to(next(model.parameters()).device)
    if is_hooked(model):
        model(tokens, return_type=None)
    else:
        model.model(input_ids=tokens)


def _spaces(model: Any, layer: int) -> tuple[str, str]:
    """Where the MLP reads and writes, in the words of the hooks' checks."""
    found = layer_spaces(model, layer) if is_hooked(model) else None
    return found or llama_spaces(_blocks(model)[layer], layer)


@dataclass(frozen=True)
class Replacement:
    """An edit of a Hugging Face model for `tl_bilinear.hooks.loss_added`: MLPs replaced.

    approximations: by layer, what `approximate_llama` gives or some of it
    keep_massive: tokens whose own output is massive (`Massive.limit`) keep it, which costs the layer
        itself as well. It says what the others lose
    """

    approximations: Mapping[int, Approximation]
    keep_massive: bool = False

    @contextmanager
    def applied(self, llama: Any) -> Iterator[None]:
        """The model with these MLPs replaced, while the context is open."""
        if is_hooked(llama):
            raise TypeError(
                f"Replacement swaps the MLPs of a Hugging Face model, got a {type(llama).__name__}: "
                "there take Chain(*[ReplaceLayer(one.tensor, layer=n) for n, one in found.items()])"
            )
        blocks = _blocks(llama)
        before = {layer: blocks[layer].mlp for layer in self.approximations}
        try:
            for layer, one in self.approximations.items():
                kept = before[layer] if self.keep_massive else None
                weight = next(before[layer].parameters())
                blocks[layer].mlp = _Evaluates(one.to(weight.device), weight.dtype, kept)
            yield
        finally:
            for layer, mlp in before.items():
                blocks[layer].mlp = mlp


class _Evaluates(nn.Module):
    """An approximation where the model has a module, with the module for massive tokens."""

    def __init__(self, one: Approximation, dtype: torch.dtype, massive: nn.Module | None) -> None:
        super().__init__()
        self.one, self.dtype, self.massive = one, dtype, massive

    def forward(self, x: Tensor) -> Tensor:
        y = self.one.tensor(x).to(self.dtype)
        if self.massive is None:
            return y
        own = self.massive(x)
        return torch.where(self.one.fidelity.massive.beyond(own)[..., None], own, y)


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

    `tensors` holds one for every layer, all of one width: `Approximation.tensor`, say. The model given
    does not change.

    Raises TypeError for another kind of model, ValueError for missing layers, and for several widths.
    """
    from transformers import LlamaForCausalLM

    require_gated_llama(llama)
    if missing := sorted(set(range(len(llama.model.layers))) - tensors.keys()):
        raise ValueError(f"a bilinear Llama needs a bilinear layer everywhere; missing: {missing}")
    config = copy.deepcopy(llama.config)
    config.hidden_act = "linear"
    widths = {tensor.d_hidden for tensor in tensors.values()}
    if len(widths) > 1:
        raise ValueError(f"a Llama's layers have one width, these have {sorted(widths)} neurons")
    (config.intermediate_size,) = widths
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
