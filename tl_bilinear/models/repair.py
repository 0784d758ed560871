"""A short repair of approximated MLPs: gates, biases and output maps alone are trained.

Layers that are fitted one by one add up to more loss than each of them alone. `repair` trains the
approximations together, so that the model with all of them predicts what the original predicts: it
minimises the mean Kullback-Leibler divergence of the next token. Of each layer only the slopes and
intercepts of its gates, its biases and its output map move; the directions that neurons read, attention,
norms and embeddings stay. It is not finetuning (`tl-bilinear finetune`), which trains the model on text.

>>> found = approximate_llama(llama, tokens, in_order=True)
>>> better = repair(llama, found, tokens, steps=300)
>>> loss_added(llama, held_out, {"fitted": Replacement(found), "repaired": Replacement(better.layers)})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.models.approximation import mlp_inputs
from tl_bilinear.models.spaces import is_hooked
from tl_bilinear.results import Result
from tl_bilinear.tensor import Approximation
from tl_bilinear.tensor.gated import rescored
from tl_bilinear.tensor.registry import read_gated

Trains = Literal["gates", "gates and out"]

_WARMUP = 0.05  # of the steps
_MEASURED = 64  # rows at most that the repaired layers' fidelity is measured on


@dataclass(frozen=True, eq=False)
class Repair(Result):
    """Approximations that were trained together, and how the divergence fell.

    Attributes
    ----------
    layers: by number, as `approximate_llama` gives them; their fidelity to the layer alone is measured
        again, and may be lower: they were trained for the model, not for the layer
    divergence: [steps], nats a token, of each step's rows before the step
    trains: what was trained
    tokens: how many the steps read
    """

    layers: dict[int, Approximation]
    divergence: Float[Tensor, " steps"]
    trains: str
    tokens: int

    def __str__(self) -> str:
        n = max(1, len(self.divergence) // 10)
        first, last = self.divergence[:n].mean(), self.divergence[-n:].mean()
        return (
            f"{len(self.layers)} layers, {self.trains} trained on {self.tokens:,} tokens: divergence "
            f"from the original {first:.4f} -> {last:.4f} nats a token (first and last {n} steps)"
        )


def repair(
    llama: Any,
    approximations: Mapping[int, Approximation],
    tokens: Int[Tensor, "n pos"],
    *,
    steps: int = 300,
    batch: int = 8,
    learning_rate: float = 3e-2,
    trains: Trains = "gates and out",
    seed: int = 0,
    progress: bool = True,
) -> Repair:
    """Train approximations of a Hugging Face model's MLPs together, against its own predictions.

    Parameters
    ----------
    llama: Hugging Face causal language model; it does not change
    approximations: by layer, as `approximate_llama` gives them: any of the model's layers
    tokens: [n, pos], rows of text
    steps, batch: rows of a step; drawn anew, without repetition, in every pass over the text
    learning_rate: Adam's largest, relative to the root mean square of each matrix's or vector's
        entries; after a warm-up it falls linearly to 0
    trains: "gates" (slopes, intercepts and biases) or "gates and out"
    seed: of the order of rows. The same seed gives the same result on the same machine

    A step costs the original's forward and the replaced model's forward and backward; memory is that of
    the activations of `batch` rows, and three times the trained weights.

    Raises TypeError for a model with hooks; ValueError for nothing to train or on, naming it.
    """
    if is_hooked(llama):
        raise TypeError(f"repair takes a Hugging Face model, got a {type(llama).__name__}")
    if trains not in get_args(Trains):
        raise ValueError(f"unknown trains {trains!r}; there are {', '.join(get_args(Trains))}")
    if not approximations:
        raise ValueError("there is no approximation to repair: approximations is empty")
    if steps < 1 or not 1 <= batch <= len(tokens):
        raise ValueError(
            f"steps={steps} of batch={batch} rows cannot be taken of {len(tokens)} rows of text: "
            "steps is 1 or more, batch between 1 and the number of rows"
        )
    blocks = llama.model.layers
    own = {layer: blocks[layer].mlp for layer in approximations}
    trained = {
        layer: _Trained(one, next(own[layer].parameters()), trains)
        for layer, one in approximations.items()
    }
    frozen = [p for p in llama.parameters() if p.requires_grad]
    was_training = llama.training
    optimizer, schedule = _optimizer(trained, learning_rate, steps)
    draw = checks.generator(seed)
    order = torch.empty(0, dtype=torch.long)
    divergences = []
    try:
        llama.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for _ in (bar := tqdm(range(steps), desc="repair", disable=not progress)):
                if len(order) < batch:
                    order = torch.randperm(len(tokens), generator=draw)
                rows, order = tokens[order[:batch]].to(llama.device), order[batch:]
                with torch.no_grad():
                    _put(blocks, own)
                    target = llama(input_ids=rows).logits.float().log_softmax(-1)
                _put(blocks, trained)
                given = llama(input_ids=rows).logits.float().log_softmax(-1)
                loss = (target.exp() * (target - given)).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                divergences.append(loss.item())
                bar.set_postfix(nats=f"{divergences[-1]:.4f}")
    finally:
        _put(blocks, own)
        llama.train(was_training)
        for parameter in frozen:
            parameter.requires_grad_(True)
    some = tokens[-_MEASURED:]
    inputs = mlp_inputs(llama, some, list(approximations), progress=False)
    layers = {
        layer: rescored(
            one, read_gated(own[layer]), trained[layer].tensor(), inputs[layer], "repaired"
        )
        for layer, one in approximations.items()
    }
    return Repair(layers, torch.tensor(divergences), trains, steps * batch * tokens.shape[1])


def _put(blocks: Any, modules: Mapping[int, nn.Module]) -> None:
    for layer, module in modules.items():
        blocks[layer].mlp = module


class _Trained(nn.Module):
    """A bilinear layer whose gates, biases and output map are parameters, each in units of its size."""

    def __init__(self, one: Approximation, like: Tensor, trains: Trains) -> None:
        super().__init__()
        tensor = one.tensor.to(like.device, torch.float32)
        self.one, self.dtype, self.before = one, like.dtype, tensor
        h, d = tensor.d_hidden, tensor.d_out
        start = {
            "slope": tensor.left.new_ones(h),
            "bias_left": _or_zeros(tensor.bias_left, h, tensor.left),
            "bias_right": _or_zeros(tensor.bias_right, h, tensor.left),
            "bias_out": _or_zeros(tensor.bias_out, d, tensor.left),
        }
        if trains == "gates and out":
            start["out"] = tensor.out
        self.start = start
        self.sizes = {name: _size(value) for name, value in start.items()}
        self.moved = nn.ParameterDict({n: torch.zeros_like(v) for n, v in start.items()})

    def now(self, name: str) -> Tensor:
        return self.start[name] + self.sizes[name] * self.moved[name]

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        out = self.now("out") if "out" in self.start else self.before.out
        left = self.now("slope") * linear(x, self.before.left) + self.now("bias_left")
        right = linear(x, self.before.right, self.now("bias_right"))
        return linear(left * right, out, self.now("bias_out")).to(self.dtype)

    @torch.no_grad()
    def tensor(self) -> Any:
        return replace(
            self.before,
            left=self.now("slope")[:, None] * self.before.left,
            out=self.now("out") if "out" in self.start else self.before.out,
            bias_left=self.now("bias_left"),
            bias_right=self.now("bias_right"),
            bias_out=self.now("bias_out"),
        )


def _or_zeros(bias: Tensor | None, n: int, like: Tensor) -> Tensor:
    return like.new_zeros(n) if bias is None else bias.to(like)


def _size(value: Tensor) -> float:
    size = value.square().mean().sqrt().item()
    return size if size > 0 else 0.1


def _optimizer(
    trained: Mapping[int, _Trained], learning_rate: float, steps: int
) -> tuple[Any, Any]:
    parameters = [p for module in trained.values() for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.98))
    warm = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    return optimizer, schedule
