"""Training a language model with gated MLPs, bilinear or not (Pearce et al. 2025, Table 2).

The model is Hugging Face's ``LlamaForCausalLM`` and the loop ``transformers.Trainer``: mixed
precision, gradient accumulation and several processes (``accelerate launch``, ``torchrun``) are its.

>>> data = LanguageData.load("data")                           # as `tl-bilinear data` writes it
>>> run = train_language_model(data, CONFIGS["small"], folder="runs/small")
>>> run.loss, run.hooked()                                     # a HookedBilinearTransformer

A run lives in a folder. Started again with the same settings it goes on from its last checkpoint, and
when it is finished it is only read:

    run.json        settings: what a later start is compared with
    checkpoint-N/   all that is needed to go on from step N
    model/          the trained model, an ordinary Hugging Face checkpoint with its tokenizer
    result.json     loss, time and the curve
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.models.files import read_table, write_table
from tl_bilinear.models.huggingface import no_file_bars, save_llama
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.runs import RESULT, SETTINGS, enter_run, require_finished

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "tl_bilinear language run"
MODEL, WRITING, SECONDS = "model", ".writing", "seconds.json"
Run = TypeVar("Run", bound="LanguageRun")
# The nonlinearity on the gate, by the name of the unit that it makes, as transformers calls it.
ACTIVATIONS = {"bilinear": "linear", "reglu": "relu", "swiglu": "silu", "geglu": "gelu"}

_COMMAND = "tl-bilinear train lm"
_CHECKPOINTS = 10  # evenly spaced over a run; the last two are kept
_CHECKPOINTS_KEPT = 2
_LARGEST_MICRO_BATCH = 64
_EPS = 1e-8  # of the norms, in the published models
_STD = 0.02  # of initial weights (GPT-2)
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_PROMPT, _SAMPLE_TOKENS = "once upon a time", 80


@dataclass(frozen=True)
class LoopConfig:
    """The settings of the loop, those of the paper's Table 2 by default.

    `batch` counts rows a step, over all processes. The learning rate falls linearly to zero, after
    rising over the first `warmup` share of the steps. `steps`, where given, goes before `epochs`.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: float = 0.0
    batch: int = 512
    epochs: float = 5.0
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._require_positive("batch")
        for name in ("learning_rate", "weight_decay", "epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.steps is not None:
            self._require_positive("steps")
        self._require_shares("warmup", "beta1", "beta2")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _require_shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over a data set of so many rows."""
        if self.batch > rows:
            raise ValueError(
                f"a batch of {self.batch} rows is more than the {rows} rows of text: choose batch <= "
                f"{rows}"
            )
        return self.steps or max(1, round(self.epochs * (rows // self.batch)))


@dataclass(frozen=True)
class LanguageConfig(LoopConfig):
    """The settings that decide the result; the defaults are the paper's (Table 2).

    `activation` is a key of `ACTIVATIONS`; `bias` puts biases on the three maps of each MLP. The
    settings of the loop are those of `LoopConfig`.
    """

    n_layers: int = 6
    d_model: int = 512
    d_mlp: int = 2048
    n_heads: int = 8
    activation: str = "bilinear"
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("n_layers", "d_model", "d_mlp", "n_heads")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads of an even "
                "width, which rotary positions need"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}"
            )


CONFIGS = {
    "paper": LanguageConfig(),
    "small": LanguageConfig(n_layers=4, d_model=256, d_mlp=1024, batch=64, warmup=0.02),
    "nano": LanguageConfig(
        n_layers=2,
        d_model=64,
        d_mlp=256,
        n_heads=4,
        batch=16,
        epochs=1,
        learning_rate=4e-3,
        warmup=0.02,
    ),
}


def choose_config(name: str, **overrides: Any) -> LanguageConfig:
    """A config of `CONFIGS` by its name; overrides that are None are left out."""
    if name not in CONFIGS:
        raise ValueError(f"unknown config {name!r}; there are {', '.join(CONFIGS)}")
    given = {field: value for field, value in overrides.items() if value is not None}
    return dataclasses.replace(CONFIGS[name], **given)


@dataclass(frozen=True, eq=False)
class LanguageRun:
    """A finished run: `loss` is the validation loss in nats a token, [BOS] not counted.

    `history` holds what was logged: step, epoch, loss, eval_loss, learning_rate, grad_norm. `seconds`
    is the time of the steps alone. `sample` continues "once upon a time".
    """

    folder: Path
    config: LanguageConfig
    loss: float
    parameters: int
    steps: int
    tokens: int
    seconds: float
    sample: str
    history: tuple[Mapping[str, float], ...]

    _config_type: ClassVar[type] = LanguageConfig

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def model_folder(self) -> Path:
        """An ordinary Hugging Face checkpoint, tokenizer included."""
        return self.folder / MODEL

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.config.activation}, {self.parameters:,} parameters, "
            f"{self.tokens:,} tokens in {self.seconds:.0f} s ({self.tokens_per_second:,.0f} a second)\n"
            f"validation loss {self.loss:.3f} nats a token\n"
            f"{self.sample}"
        )

    def llama(self) -> Any:
        """The trained LlamaForCausalLM."""
        from transformers import LlamaForCausalLM

        with no_file_bars():
            return LlamaForCausalLM.from_pretrained(self.model_folder)

    def hooked(self, **options: Any) -> Any:
        """The trained model as a `HookedBilinearTransformer`; options are those of `from_hf`."""
        from tl_bilinear.models import HookedBilinearTransformer

        with no_file_bars():
            return HookedBilinearTransformer.from_hf(self.model_folder, **options)

    def to_pandas(self) -> pd.DataFrame:
        """The curve, one row for each step that was logged."""
        import pandas as pd

        return pd.DataFrame(self.history).groupby("step", as_index=False).first()

    @classmethod
    def load(cls: type[Run], folder: str | PathLike[str]) -> Run:
        """Read a finished run.

        Raises FileNotFoundError for a folder without one, ValueError for a damaged one.
        """
        folder = Path(folder).expanduser()
        stored = require_finished(folder, _COMMAND)
        try:
            config = cls._config_type(**read_table(folder / SETTINGS)["config"])
            return cls(folder, config, **{**stored, "history": tuple(stored["history"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} was not written by this version of `{_COMMAND}`: {error}"
            ) from error


# ---------------------------------------------------------------------- the model


def build_llama(config: LanguageConfig, tokenizer: Any, n_ctx: int) -> Any:
    """The untrained model: GPT-2's initialisation, norms without weights, rotary positions.

    A norm's weight is fixed at one. The maps that write to the residual stream start smaller by
    sqrt(2 n_layers). The caller's random numbers stay as they are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    llama_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        max_position_embeddings=n_ctx,
        hidden_act=ACTIVATIONS[config.activation],
        mlp_bias=config.bias,
        initializer_range=_STD,
        rms_norm_eps=_EPS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # No pad_token_id: it is [EOS], whose embedding Llama would then not train.
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        llama = LlamaForCausalLM(llama_config)
    with torch.no_grad():
        for layer in llama.model.layers:
            for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writes.weight.div_(math.sqrt(2 * config.n_layers))
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)
    return llama


class Collate:
    """Rows of a data set as what a Llama takes. [BOS] is given, never predicted: no label."""

    def __init__(self, bos: int) -> None:
        self.bos = bos

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
        return {"input_ids": ids, "labels": ids.masked_fill(ids == self.bos, -100)}


@torch.no_grad()
def language_loss(llama: Any, rows: Any, bos: int, batch: int = 32) -> float:
    """Mean cross-entropy in nats a token over a data set of rows, [BOS] not counted."""
    collate, device = Collate(bos), llama.device
    rows = rows.with_format("numpy")
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]["input_ids"]
        inputs = collate([{"input_ids": ids} for ids in chosen])
        labels = inputs["labels"][:, 1:].to(device)
        logits = llama(input_ids=inputs["input_ids"].to(device)).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="sum")
        total, count = total + losses.item(), count + int((labels != -100).sum())
    return total / count


def sample_text(llama: Any, tokenizer: Any, prompt: str = _PROMPT, seed: int = 0) -> str:
    """A continuation of a prompt, the same for the same seed; the caller's random numbers stay."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(llama.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(
                1, min(_SAMPLE_TOKENS, llama.config.max_position_embeddings - ids.shape[1])
            ),
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


@torch.no_grad()
def sample_stories(
    llama: Any,
    tokenizer: Any,
    count: int,
    *,
    prompts: Sequence[str] = ("",),
    temperature: float = 0.8,
    batch: int = 64,
    seed: int = 0,
) -> list[str]:
    """Whole stories, up to [EOS], from each prompt in turn; those that do not end in time are left out.

    Raises ValueError where hardly any ends, as with a model that has not learned to.
    """
    eos = tokenizer.eos_token_id
    stories: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(4 * -(-count // batch)):
            prompt = prompts[start % len(prompts)]
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(llama.device)
            written = llama.generate(
                ids.expand(batch, -1),
                attention_mask=ids.new_ones(batch, ids.shape[1]),
                max_length=llama.config.max_position_embeddings,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                pad_token_id=eos,
            )
            ended = [row for row in written.tolist() if eos in row]
            stories += [tokenizer.decode(row, skip_special_tokens=True) for row in ended]
            if len(stories) >= count:
                return stories[:count]
    raise ValueError(
        f"only {len(stories)} of {count} stories came to an end: train the model longer"
    )


# ---------------------------------------------------------------------- the run


@dataclass(frozen=True, eq=False)
class Distillation:
    """A frozen language model of the same vocabulary that teaches another, beside the text.

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
        """KL(teacher || model), summed over the tokens that `inputs`, as `Collate` makes it, labels."""
        with torch.no_grad():
            taught = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
        each = torch.nn.functional.kl_div(
            logits[:, :-1].float().log_softmax(-1),
            taught.float().log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        return each.masked_fill(inputs["labels"][:, 1:] == -100, 0).sum()


def train_language_model(
    data: LanguageData | str | PathLike[str],
    config: LanguageConfig = CONFIGS["paper"],
    *,
    folder: str | PathLike[str],
    micro_batch: int | None = None,
    precision: str = "auto",
    device: str | None = None,
    report_to: Sequence[str] = (),
    progress: bool = True,
) -> LanguageRun:
    """Train, or go on with a run that was interrupted, or read one that is finished.

    Parameters
    ----------
    folder:
        Where the run lives. Two runs of different settings need two folders.
    micro_batch:
        Rows that one process computes at once; `config.batch` is reached by accumulating gradients.
        Default: as many as divide it, up to 64. It does not change the result, and nor do the number
        of processes and where it is interrupted (to rounding).
    precision:
        "auto" is bf16 (matrix products; weights and optimiser stay fp32) where the accelerator or
        the processor computes in it, and fp32 otherwise.
    device:
        "cpu" keeps the run from an accelerator; by default it takes what is there.
    report_to:
        "tensorboard", "wandb" or others that transformers knows; nothing by default.

    Raises ValueError for settings that contradict the data, the folder or each other;
    FileExistsError for a folder that holds something else; OSError where a checkpoint cannot be
    written (the ones before it are whole).
    """
    from transformers import LlamaForCausalLM

    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    complete_run(
        folder,
        config,
        data,
        build=lambda: build_llama(config, data.tokenizer, data.n_ctx),
        restore=LlamaForCausalLM.from_pretrained,
        micro_batch=micro_batch,
        precision=precision,
        device=device,
        report_to=report_to,
        progress=progress,
    )
    return LanguageRun.load(folder)


def complete_run(
    folder: str | PathLike[str],
    config: LoopConfig,
    data: LanguageData,
    *,
    build: Callable[[], Any],
    restore: Callable[[Path], Any],
    callbacks: Callable[[Any], Sequence[Any]] = lambda llama: (),
    distillation: Distillation | None = None,
    micro_batch: int | None,
    precision: str,
    device: str | None,
    report_to: Sequence[str],
    progress: bool,
) -> None:
    """Bring the run in a folder to its end, from wherever it stands; see `train_language_model`.

    `build` makes the Llama to train, `callbacks` those of Trainer that go with it, `distillation` what
    it learns from beside the text; `restore` makes the final model from the last checkpoint.
    """
    folder = Path(folder).expanduser().resolve()
    steps = config.total_steps(len(data.train))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = _micro_batch(config.batch, world, micro_batch)
    if precision not in _PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(_PRECISIONS)}")
    if device not in (None, "cpu"):
        raise ValueError(
            f"device is 'cpu' or left out, got {device!r}: CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
    _require_reporters(report_to)
    arguments = _arguments(
        folder, config, steps, micro_batch, world, precision, device, report_to, progress
    )
    if is_first_process():
        made_from = {
            "fingerprint": data.fingerprint,
            "n_ctx": data.n_ctx,
            "vocabulary": len(data.tokenizer),
        }
        enter_run(folder, FORMAT, dataclasses.asdict(config), made_from, _COMMAND)
    _everyone()
    if (folder / RESULT).is_file():
        return

    with _own_random_numbers(), _fresh_place_to_write(folder), no_file_bars():
        # Trainer, started at the last step in the middle of an epoch, would take one step more.
        if _step_of(_last_checkpoint(folder)) < steps:
            llama = build()
            trainer, clock = _make_trainer(
                folder, llama, data, arguments, callbacks(llama), distillation
            )
            _train(folder, trainer, clock)
        last = _last_checkpoint(folder)
        assert last is not None  # training ends with one
        _finish(folder, last, restore(last), config, data, arguments)


def _micro_batch(batch: int, world: int, wanted: int | None) -> int:
    if batch % world:
        raise ValueError(f"a batch of {batch} rows does not divide among {world} processes")
    share = batch // world
    if wanted is None:
        return max(m for m in range(1, min(share, _LARGEST_MICRO_BATCH) + 1) if share % m == 0)
    if wanted < 1 or share % wanted:
        raise ValueError(
            f"micro_batch={wanted} does not divide the {share} rows that each of {world} processes "
            f"takes of a batch of {batch}"
        )
    return wanted


def _require_reporters(report_to: Sequence[str]) -> None:
    for name in report_to:
        if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
            raise ImportError(f"report_to={name!r} needs {name}: pip install {name}")


def _arguments(
    folder: Path,
    config: LoopConfig,
    steps: int,
    micro_batch: int,
    world: int,
    precision: str,
    device: str | None,
    report_to: Sequence[str],
    progress: bool,
) -> Any:
    from transformers import TrainingArguments

    if "tensorboard" in report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    every = math.ceil(steps / _CHECKPOINTS)
    # Said outright: transformers refuses bf16 on a processor that it was not told to use.
    use_cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerated = not use_cpu and torch.cuda.is_available()
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if accelerated else _processor_has_bf16()
        precision = "bf16" if fast else "fp32"
    arguments = TrainingArguments(
        # Trainer writes where nobody looks, and what is whole is moved out of there.
        output_dir=str(folder / WRITING),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=config.batch // (micro_batch * world),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup * steps),
        optim="adamw_torch_fused",
        seed=config.seed,
        data_seed=config.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=use_cpu,
        ddp_backend="gloo" if world > 1 and not accelerated else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=accelerated,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=max(1, steps // 100),
        prediction_loss_only=True,
        report_to=list(report_to) or "none",
        disable_tqdm=not progress,
    )
    # One process uses one GPU: left to itself Trainer gives each of them a batch (nn.DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _train(folder: Path, trainer: Any, clock: Any) -> None:
    """From the last checkpoint, or the beginning, to the checkpoint of the last step."""
    last = _last_checkpoint(folder)
    if last is not None:
        clock.seconds = read_table(last / SECONDS)["seconds"]
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except KeyboardInterrupt:
        step = _step_of(_last_checkpoint(folder))
        raise KeyboardInterrupt(
            f"interrupted; the same command goes on from step {step} of {trainer.args.max_steps}"
        ) from None


def _processor_has_bf16() -> bool:
    """In hardware: emulated it is slower than fp32. An older PyTorch does not tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _make_trainer(
    folder: Path,
    llama: Any,
    data: LanguageData,
    arguments: Any,
    callbacks: Sequence[Any],
    distillation: Distillation | None,
) -> tuple[Any, Any]:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class RecipeTrainer(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            # What is evaluated is the cross-entropy, whatever the model learns from.
            if distillation is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            with self.accelerator.autocast():
                divergence = distillation.divergence(outputs.logits, inputs)
            # Trainer's loss is a mean over the tokens of a step, in all micro batches and processes;
            # gradients are then averaged over processes.
            divergence *= self.accelerator.num_processes / num_items_in_batch
            loss = torch.lerp(loss, divergence, distillation.share)
            return (loss, outputs) if return_outputs else loss

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:  # torch, safetensors and Python each have their own kind
                raise OSError(
                    f"the checkpoint of step {self.state.global_step} cannot be written to {folder}: "
                    f"{error}. Make room and start again: the checkpoints before it are whole"
                ) from error

    class Clock(TrainerCallback):
        """Seconds of the steps alone, and checkpoints that have their name only when they are whole."""

        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._mark = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds, self._mark = self.seconds + now - self._mark, now

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            self._mark = time.perf_counter()

        def on_save(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            _everyone()
            if is_first_process():
                _keep_checkpoint(folder, f"checkpoint-{state.global_step}", self.seconds)
            _everyone()
            self._mark = time.perf_counter()

    # Whole batches only, so that each step is the same for one process and for many.
    batch = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    rows = len(data.train) // batch * batch
    clock = Clock()
    if distillation is not None:
        distillation.teacher.to(arguments.device)
    trainer = RecipeTrainer(
        llama,
        arguments,
        data_collator=Collate(data.tokenizer.bos_token_id),
        train_dataset=data.train.with_format("numpy").select(range(rows)),
        eval_dataset=data.validation.with_format("numpy"),
        callbacks=[clock, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def _keep_checkpoint(folder: Path, name: str, seconds: float) -> None:
    written = folder / WRITING / name
    write_table(written / SECONDS, {"seconds": seconds})
    for path in written.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut leaves the new name on empty files
    written.rename(folder / name)
    for old in _checkpoints(folder)[:-_CHECKPOINTS_KEPT]:
        # Renamed first: what has the name of a checkpoint is whole at every moment.
        old.rename(folder / WRITING / old.name)
        shutil.rmtree(folder / WRITING / old.name)


def _finish(
    folder: Path, last: Path, llama: Any, config: LoopConfig, data: LanguageData, arguments: Any
) -> None:
    """Measure what the last checkpoint holds; write it as the model, and the result."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    llama = llama.to(arguments.device)
    bos, batch = data.tokenizer.bos_token_id, arguments.per_device_eval_batch_size
    loss = language_loss(llama, data.validation, bos, batch)
    if is_first_process():
        result = {
            "loss": loss,
            "parameters": sum(p.numel() for n, p in llama.named_parameters() if "norm" not in n),
            "steps": state.global_step,
            "tokens": state.global_step * config.batch * data.n_ctx,
            "seconds": read_table(last / SECONDS)["seconds"],
            "sample": sample_text(llama, data.tokenizer),
            "history": _history(state.log_history),
        }
        llama.config.use_cache = True  # which Trainer turned off
        save_llama(llama.cpu(), data.tokenizer, folder / MODEL)
        write_table(folder / RESULT, result)
    _everyone()


def _history(logged: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    names = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    entries = [{name: entry[name] for name in names if name in entry} for entry in logged]
    return [entry for entry in entries if "loss" in entry or "eval_loss" in entry]


# ---------------------------------------------------------------------- the folder


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=_step_of)


def _last_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.partition("-")[2]) if checkpoint else 0


@contextmanager
def _fresh_place_to_write(folder: Path) -> Iterator[None]:
    """An empty folder for what is being written, gone afterwards, whatever a killed run left in it."""
    if is_first_process():
        shutil.rmtree(folder / WRITING, ignore_errors=True)
        (folder / WRITING).mkdir()
    _everyone()
    try:
        yield
    finally:
        if is_first_process():
            shutil.rmtree(folder / WRITING, ignore_errors=True)


def is_first_process() -> bool:
    """Whether this is the process that speaks and writes, among those of a run."""
    return os.environ.get("RANK", "0") == "0"


def _everyone() -> None:
    """Wait for the other processes of the run, if there are any."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Trainer seeds every generator there is; afterwards they are the caller's again."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()  # noqa: NPY002  what Trainer seeds
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)  # noqa: NPY002
