"""Making a gated Llama bilinear by finetuning (Pearce et al. 2025, appendix H).

While the model trains, the activation on its gates turns into an affine function of the gate's
pre-activation g, and at the end that function is folded into weights and biases: the result is a plain
Llama with ``hidden_act="linear"``. With s the share of the way that is done, the gate is on

- ``path="beta"``, the paper's: ``act(beta g) / beta`` with beta = 1 - s, for SiLU ``g sigmoid(beta g)``,
  which ends at ``act'(0) g``, half of g;
- ``path="affine"``: ``(1 - s) act(g) + s (a + b g)`` with the a and b of each neuron that are best for
  the layer's output (`tl_bilinear.tensor.gated`); a is trained on as the gate's bias;
- ``path="closed"``: bilinear from the first step. Each layer is replaced by its closed form, output
  map refitted, and the rest of the run recovers what that lost;
- ``path="none"``: as it was. The baseline.

s goes from 0 to 1 over the first `anneal` share of the steps, by a `schedule`:

- ``"linear"``, the paper's, or ``"cosine"``;
- ``"even"``: at every step the gates change equally much, in the mean square over the gates' own
  pre-activations (on the path of beta most of the change is at small beta; "affine" is even by itself);
- ``"layers"``: linear, one layer after the other, the first one first.

With ``distill`` a frozen teacher adds its predictions to what the model learns (`Distillation`): the
model as it was, or, in a comparison, the finished baseline, which knows the text as well.

>>> data = LanguageData.load("data")                  # `tl-bilinear data ... --tokenizer MODEL`
>>> compared = compare_finetuning("MODEL", data, {"affine": FinetuneConfig()}, folder="runs/finetune")
>>> compared.gaps, compared.runs["affine"].hooked()   # a HookedBilinearTransformer
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from tl_bilinear.models.approximation import (
    approximate_llama,
    mlp_inputs,
    require_gated_llama,
    to_bilinear_llama,
)
from tl_bilinear.models.files import write_table
from tl_bilinear.models.huggingface import no_file_bars
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.train import (
    Distillation,
    LanguageRun,
    LoopConfig,
    complete_run,
    is_first_process,
    language_loss,
)
from tl_bilinear.tensor.readers import read_gated
from tl_bilinear.tensor.storage import digest_of

if TYPE_CHECKING:
    import pandas as pd

PATHS = ("affine", "beta", "closed", "none")
SCHEDULES = ("linear", "cosine", "even", "layers")
BASELINE = "baseline"
_TABLE = "comparison.json"
_SMALLEST_BETA = 1e-3  # below, act(beta g) / beta is its limit to float32's precision
_GRID, _POOL = 256, 50_000  # of the even schedule: betas, pre-activations


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """The settings that decide the result; those of the loop are as in `LoopConfig`.

    `distill`: the share of the loss that is the divergence from a teacher, in [0, 1]; the rest is the
    text's cross-entropy. `fit_rows`: rows of text that the affine gates, or the even schedule, are
    fitted on. The learning rate is the paper's for a model of 1.1B parameters; small models take 10 to
    100 times as much. `model` and `teacher` tell the weights of either from others; `finetune` fills
    them in.
    """

    learning_rate: float = 3e-5
    warmup: float = 0.02
    batch: int = 16
    epochs: float = 1.0
    path: str = "affine"
    schedule: str = "linear"
    anneal: float = 0.3
    fit_rows: int = 64
    distill: float = 0.0
    model: str = ""
    teacher: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("path", PATHS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; there are {', '.join(known)}"
                )
        self._require_positive("fit_rows")
        self._require_shares("anneal")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must lie in [0, 1], got {self.distill}")

    @property
    def anneals(self) -> bool:
        """Whether the gates change during the run, rather than before it or not at all."""
        return self.path in ("affine", "beta")


@dataclass(frozen=True, eq=False)
class FinetuneRun(LanguageRun):
    """A finished run, as `LanguageRun`; the model in it is bilinear unless its path is "none"."""

    config: FinetuneConfig  # type: ignore[assignment]  # its settings, in place of a whole model's

    _config_type: ClassVar[type] = FinetuneConfig

    def __str__(self) -> str:
        path, schedule, anneal = (getattr(self.config, n) for n in ("path", "schedule", "anneal"))
        how = f"path {path!r}" + (f", {schedule} over {anneal:.0%}" if self.config.anneals else "")
        how += f", distilled {self.config.distill:.0%}" if self.config.distill else ""
        return (
            f"{self.folder}: {how}; {self.tokens:,} tokens in {self.seconds:.0f} s\n"
            f"validation loss {self.loss:.4f} nats a token"
        )


@dataclass(frozen=True, eq=False)
class FinetuneComparison:
    """Runs that make a model bilinear, beside the same finetuning of the model as it was (Fig. 22).

    `start_loss` is the model's validation loss before any of it, in nats a token.
    """

    start_loss: float
    baseline: FinetuneRun
    runs: Mapping[str, FinetuneRun]

    @property
    def gaps(self) -> dict[str, float]:
        """By how much each run's loss lies above the baseline's, in nats a token."""
        return {name: run.loss - self.baseline.loss for name, run in self.runs.items()}

    def to_pandas(self) -> pd.DataFrame:
        """One row for each run: its settings, loss, gap and tokens."""
        import pandas as pd

        runs = {BASELINE: self.baseline, **self.runs}
        rows = [
            {
                "run": name,
                **{f: getattr(run.config, f) for f in ("path", "schedule", "anneal", "distill")},
                "loss": run.loss,
                "gap": run.loss - self.baseline.loss,
                "tokens": run.tokens,
                "seconds": run.seconds,
            }
            for name, run in runs.items()
        ]
        return pd.DataFrame(rows).set_index("run")

    def __str__(self) -> str:
        table = self.to_pandas().to_string(float_format="{:.4f}".format)
        return f"loss before finetuning {self.start_loss:.4f} nats a token\n{table}"


# ---------------------------------------------------------------------- the gate


class AnnealedGate(nn.Module):
    """An activation on its way to an affine function; `share` of it is done.

    bias, slope: [d_hidden], the a and b of ``a + b g`` at the end of the way. Only on the "affine" path
    is the bias a parameter, and trained.
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
        # The affine part takes its share of 0 too: several processes need every gradient.
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


def _folded(llama: Any, path: str, checkpoint: Path) -> Any:
    """The bilinear Llama of the last checkpoint, `llama` being the model that the run started from."""
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
    llama: Any, config: FinetuneConfig, rows: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """The affine functions (a, b) that the gates of each layer end at.

    Raises ValueError for an activation that the path does not lead away from.
    """
    if config.path == "affine":
        fitted = approximate_llama(llama, rows, fit="output", warn_below=-math.inf)
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
    """How much of the way the gates of each layer have gone, after a share of the annealing.

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
    """The progress at which each share of the path of beta is due if the gate changes evenly.

    The length of the path so far, in the root mean square over pre-activations g, relative to all of it.
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


# ---------------------------------------------------------------------- the run


def finetune(
    model: str | PathLike[str],
    data: LanguageData | str | PathLike[str],
    config: FinetuneConfig = FinetuneConfig(),
    *,
    folder: str | PathLike[str],
    teacher: str | PathLike[str] | None = None,
    micro_batch: int | None = None,
    precision: str = "auto",
    device: str | None = None,
    report_to: Sequence[str] = (),
    progress: bool = True,
) -> FinetuneRun:
    """Finetune a gated Llama until it is bilinear, or go on with such a run, or read a finished one.

    Parameters
    ----------
    model:
        A folder with a Hugging Face Llama (any activation on the gate, grouped-query attention, tied
        embeddings), or its name on the hub.
    data:
        Rows of its own tokenizer: `tl-bilinear data SOURCE --tokenizer MODEL`.
    teacher:
        With `config.distill`: a causal language model of the same vocabulary, a folder or a name.
        Default: the model as it was, which knows of the text only what it was trained on.
    folder, micro_batch, precision, device, report_to, progress:
        As for `train_language_model`, and errors as there.

    Raises TypeError for a model that is no Llama; ValueError for text of another tokenizer or longer
    rows than the model or the teacher reads, or an activation that the path does not lead away from.
    """
    from transformers import LlamaForCausalLM

    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    start = _load_for(model, data)  # refused, if it is, before the folder is claimed
    config = dataclasses.replace(config, model=_digest(start), teacher="")
    distillation: Distillation | None = None
    if config.distill:
        teaches = start if teacher is None else _load_teacher(teacher, start, data)
        config = dataclasses.replace(config, teacher=_digest(teaches))
        distillation = Distillation(teaches, config.distill)
    rows = torch.tensor(data.train[: config.fit_rows]["input_ids"])
    even: dict[str, Tensor] = {}

    def build() -> Any:
        llama = _load_for(model, data)
        if config.path == "none":
            return llama
        if config.path == "closed":
            fitted = approximate_llama(llama, rows, warn_below=-math.inf)
            return to_bilinear_llama(llama, {n: one.tensor for n, one in fitted.items()}).train()
        gates = final_gates(llama, config, rows)
        if config.schedule == "even" and config.path == "beta":
            even["progress"] = even_progress(
                llama.model.layers[0].mlp.act_fn, _gate_pool(llama, rows)
            )
        install_gates(llama, config.path, gates)
        return llama.train()

    def restore(checkpoint: Path) -> Any:
        if not config.anneals:
            return LlamaForCausalLM.from_pretrained(checkpoint)
        return _folded(_load_for(model, data), config.path, checkpoint)

    complete_run(
        folder,
        config,
        data,
        build=build,
        restore=restore,
        callbacks=lambda llama: [_anneal(llama, config, even.get("progress"))],
        distillation=distillation,
        micro_batch=micro_batch,
        precision=precision,
        device=device,
        report_to=report_to,
        progress=progress,
    )
    return FinetuneRun.load(folder)


def compare_finetuning(
    model: str | PathLike[str],
    data: LanguageData | str | PathLike[str],
    configs: Mapping[str, FinetuneConfig],
    *,
    folder: str | PathLike[str],
    **options: Any,
) -> FinetuneComparison:
    """Finetune with each config, and once with the gates as they were: equal tokens, equal order.

    The baseline has the settings of the first config, learns from the text alone, and then teaches the
    runs that distil. Each run has a folder of its own in `folder`, and one that is there is read or
    continued; options are those of `finetune`.

    Raises ValueError for configs whose tokens differ, before anything is trained.
    """
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    folder = Path(folder).expanduser()
    if not configs or BASELINE in configs:
        raise ValueError(
            f"give one config or more, none of them named {BASELINE!r}, got {list(configs)}"
        )
    tokens = {n: (c.total_steps(len(data.train)) * c.batch, c.seed) for n, c in configs.items()}
    if len(set(tokens.values())) > 1:
        raise ValueError(f"these configs do not see the same text: (rows, seed) are {tokens}")
    first = dataclasses.replace(
        next(iter(configs.values())), path="none", schedule="linear", distill=0.0
    )
    baseline = finetune(model, data, first, folder=folder / BASELINE, **options)
    options = {"teacher": baseline.model_folder, **options}
    runs = {
        name: finetune(model, data, config, folder=folder / name, **options)
        for name, config in configs.items()
    }
    before = _load_for(model, data)
    start = language_loss(before, data.validation, data.tokenizer.bos_token_id)
    compared = FinetuneComparison(start, baseline, runs)
    if is_first_process():
        write_table(
            folder / _TABLE,
            {"start_loss": start, "runs": compared.to_pandas().to_dict(orient="index")},
        )
    return compared


def _anneal(llama: Any, config: FinetuneConfig, even: Tensor | None) -> Any:
    from transformers import TrainerCallback

    class Anneal(TrainerCallback):
        """Moves the gates on before each step: a run that goes on from a checkpoint finds its place."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not config.anneals:
                return
            length = config.anneal * state.max_steps
            progress = state.global_step / length if length else 1.0
            blocks = llama.model.layers
            for block, share in zip(
                blocks, shares(config.schedule, progress, len(blocks), even), strict=True
            ):
                block.mlp.act_fn.share = share

    return Anneal()


@torch.no_grad()
def _gate_pool(llama: Any, rows: Tensor) -> Float[Tensor, " n"]:
    """Pre-activations of all the gates, thinned out."""
    found = []
    for layer, x in mlp_inputs(llama, rows).items():
        g = llama.model.layers[layer].mlp.gate_proj(x).flatten()
        found.append(g[:: max(1, len(g) * len(llama.model.layers) // _POOL)])
    return torch.cat(found)


def _digest(llama: Any) -> str:
    return digest_of(llama.state_dict(), {"hidden_act": getattr(llama.config, "hidden_act", None)})


def _source(model: str | PathLike[str]) -> str:
    """A folder, or else a name on the hub."""
    folder = Path(model).expanduser()
    return str(folder if folder.exists() else model)


def _load_teacher(teacher: str | PathLike[str], llama: Any, data: LanguageData) -> Any:
    from transformers import AutoModelForCausalLM

    with no_file_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(_source(teacher), dtype=torch.float32)
    vocabulary = loaded.config.vocab_size
    longest = getattr(loaded.config, "max_position_embeddings", data.n_ctx)  # some have no limit
    if vocabulary != llama.config.vocab_size or longest < data.n_ctx:
        raise ValueError(
            f"the teacher {teacher} has a vocabulary of {vocabulary} and reads {longest} tokens; "
            f"it must have the model's tokenizer, of {llama.config.vocab_size}, and read rows of "
            f"{data.n_ctx}"
        )
    return loaded


def _load_for(model: str | PathLike[str], data: LanguageData) -> Any:
    """The Llama to finetune, fit for this text."""
    from transformers import AutoConfig, LlamaForCausalLM

    source = _source(model)
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "llama":
        raise ValueError(
            f"{model} is a {config.model_type!r} model; only a Llama can be stored with a linear gate. "
            "BilinearTensor.approximate reads single layers of other gated models"
        )
    if config.hidden_act in ("linear", "identity"):
        raise ValueError(f"{model} is bilinear already (hidden_act={config.hidden_act!r})")
    if len(data.tokenizer) > config.vocab_size or data.n_ctx > config.max_position_embeddings:
        raise ValueError(
            f"the text has a vocabulary of {len(data.tokenizer)} and rows of {data.n_ctx} tokens, "
            f"{model} takes {config.vocab_size} and {config.max_position_embeddings}: prepare the text "
            "with the model's tokenizer (`tl-bilinear data SOURCE --tokenizer MODEL --context N`)"
        )
    with no_file_bars():
        llama: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    require_gated_llama(llama)
    return llama
