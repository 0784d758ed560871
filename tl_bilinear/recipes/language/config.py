"""The settings of every language recipe, with their defaults and what they mean.

The command line takes its options, defaults and help from these classes, so a setting is written once,
here. Nothing heavy is imported: `tl-bilinear --help` reads this module.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINYSTORIES = "roneneldan/TinyStories"

# The nonlinearity on the gate as transformers names it, by the name of the unit that it makes.
ACTIVATIONS = {"bilinear": "linear", "reglu": "relu", "swiglu": "silu", "geglu": "gelu"}
ATTENTIONS = ("softmax", "product", "squared")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PATHS = ("affine", "beta", "closed", "none")
SCHEDULES = ("linear", "cosine", "even", "layers")
POINTS = ("mlp_in", "resid_mid", "mlp_out", "resid_pre", "resid_post", "attn_out")


_PAPER_TOKENS = 150_000_000  # of an SAE
_MOST = 2**31  # counts of tokens, rows and steps are kept in 32 bits


def _require_counts(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value is not None and value >= _MOST:
            raise ValueError(f"{name} must be less than {_MOST:,}, got {value}")


def _require_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def _require_rates(config: Any, *names: str) -> None:
    _require_not_negative(config, *names)
    for name in names:
        if getattr(config, name) > 1:
            raise ValueError(
                f"{name} must be at most 1, got {getattr(config, name)}: a step of AdamW moves every "
                "weight by as much"
            )


def _require_shares(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")


def _require_known(config: Any, **known: tuple[str, ...]) -> None:
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"unknown {name} {getattr(config, name)!r}; there are {', '.join(values)}"
            )


# ---------------------------------------------------------------------- text


@dataclass(frozen=True)
class TokenizerConfig:
    """How a tokenizer is trained."""

    size: int = 4096
    """Entries of the vocabulary."""
    limit: int | None = None
    """Read at most this many stories."""

    def __post_init__(self) -> None:
        _require_counts(self, "size", "limit")


@dataclass(frozen=True)
class TextConfig:
    """How text becomes rows of tokens."""

    n_ctx: int = 256
    """Tokens in a row."""
    validation: float | str | Path = 0.01
    """The share of stories to hold out, or a source of its own, whose stories are kept out of training.
    Which stories are held out depends on a hash of each story, so every run holds out the same ones."""
    limit: int | None = None
    """Read at most this many stories."""
    split: str = "train"
    """The split to read, of a data set on the Hugging Face hub."""
    column: str = "text"
    """The column that holds the text, of a data set on the hub."""

    def __post_init__(self) -> None:
        _require_counts(self, "limit", "n_ctx")
        if self.n_ctx < 2:
            raise ValueError(f"n_ctx must be at least 2, got {self.n_ctx}")
        if isinstance(self.validation, float | int) and not 0 < self.validation < 1:
            raise ValueError(
                f"validation must be a share between 0 and 1, or a source; got {self.validation}"
            )


# ---------------------------------------------------------------------- training


@dataclass(frozen=True)
class RunOptions:
    """How a run computes. The result stays the same, up to rounding."""

    micro_batch: int | None = None
    """Rows that one process computes at once; gradients are summed over a whole batch. Default: as many
    as divide it, up to 64."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16. auto takes bf16 for matrix products where the hardware computes in it
    (weights and optimiser stay in fp32), and fp32 elsewhere."""
    device: str | None = None
    """cpu keeps the run off an accelerator; by default it uses what is there."""
    report_to: tuple[str, ...] = ()
    """Where to log: tensorboard, wandb or others that transformers knows."""

    def __post_init__(self) -> None:
        _require_known(self, precision=PRECISIONS)
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"device is 'cpu' or left out, got {self.device!r}: CUDA_VISIBLE_DEVICES chooses among "
                "GPUs"
            )
        for name in self.report_to:
            if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
                raise ImportError(f"report_to={name!r} needs {name}: pip install {name}")


@dataclass(frozen=True)
class LoopConfig:
    """The settings of the training loop; the defaults are the paper's (Table 2)."""

    learning_rate: float = 1e-3
    """Largest learning rate; it falls linearly to zero."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises."""
    batch: int = 512
    """Rows in a step, over all processes."""
    epochs: float = 5.0
    """Passes over the text."""
    steps: int | None = None
    """Steps; takes the place of epochs."""
    seed: int = 0
    """Seed of weights and order."""

    def __post_init__(self) -> None:
        _require_counts(self, "batch", "steps")
        _require_rates(self, "learning_rate")
        _require_not_negative(self, "weight_decay", "epochs")
        _require_shares(self, "warmup", "beta1", "beta2")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over a data set of `rows` rows."""
        if self.batch > rows:
            raise ValueError(
                f"a batch of {self.batch} rows is more than the {rows} rows of text: choose batch <= "
                f"{rows}"
            )
        return self.steps or max(1, round(self.epochs * (rows // self.batch)))


@dataclass(frozen=True)
class LanguageConfig(LoopConfig):
    """A language model and its training loop; the defaults are the paper's (Table 2)."""

    n_layers: int = 6
    """Layers."""
    d_model: int = 512
    """Width of the residual stream."""
    d_mlp: int = 2048
    """Hidden neurons of an MLP."""
    n_heads: int = 8
    """Attention heads in a layer."""
    activation: str = "bilinear"
    """Of the gate: bilinear (none), reglu, swiglu or geglu."""
    bias: bool = False
    """Biases on the three maps of each MLP."""
    attention: str = "softmax"
    """softmax (a Llama), or a tensor transformer's: product (of two scores, no softmax) or squared."""
    norm: bool = True
    """Norms. Without them a model of product attention is one polynomial of its embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_counts(self, "n_layers", "d_model", "d_mlp", "n_heads")
        self._require_family()
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads of an even "
                "width, which rotary positions need"
            )
        _require_known(self, activation=tuple(ACTIVATIONS))

    def _require_family(self) -> None:
        _require_known(self, attention=ATTENTIONS)
        if self.attention == "softmax":
            if not self.norm:
                raise ValueError("norm=False needs attention='product': a Llama has norms")
            return
        d, h = self.d_model, self.d_mlp
        if self.activation not in ("bilinear", "swiglu") or self.bias or h % d:
            raise ValueError(
                f"attention={self.attention!r} makes a tensor transformer: its activation is bilinear "
                "or swiglu, its only bias that of the MLP's output (bias=False), and its d_mlp a "
                f"multiple of d_model; got {self.activation}, bias={self.bias}, {h} and {d}"
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


def choose_config(name: str, **changes: Any) -> LanguageConfig:
    """A config of `CONFIGS` by its name, with some settings changed."""
    if name not in CONFIGS:
        raise ValueError(f"unknown config {name!r}; there are {', '.join(CONFIGS)}")
    return dataclasses.replace(CONFIGS[name], **changes)


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """How a gated model is made bilinear. The learning rate is the paper's, for 1.1B parameters."""

    learning_rate: float = 3e-5
    """Largest learning rate; it falls linearly to zero. Small models take 10 to 100 times as much."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises."""
    batch: int = 16
    """Rows in a step, over all processes."""
    epochs: float = 1.0
    """Passes over the text."""
    path: str = "affine"
    """How the gate becomes affine: affine, beta (the paper's), closed (at once) or none."""
    schedule: str = "linear"
    """How the gates move along the path: linear (the paper's), cosine, even or layers."""
    anneal: float = 0.3
    """Share of the steps in which the gates change."""
    fit_rows: int = 64
    """Rows of text that affine gates, closed forms and the even schedule are fitted on."""
    extra: int = 0
    """Hidden neurons that path closed adds to each layer at its start, in closed form (with d_model
    linear ones): a larger model that starts nearer."""
    distill: float = 0.0
    """Share of the loss, from 0 to 1, that is the divergence from a teacher; the rest is the text's
    cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_known(self, path=PATHS, schedule=SCHEDULES)
        _require_counts(self, "fit_rows")
        _require_shares(self, "anneal")
        _require_not_negative(self, "extra")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must lie in [0, 1], got {self.distill}")

    @property
    def anneals(self) -> bool:
        """Whether the gates change during the run, rather than before it or not at all."""
        return self.path in ("affine", "beta")


@dataclass(frozen=True)
class SAETrainingConfig:
    """SAEs around the layers of a model; the defaults are the paper's (Table 3)."""

    points: tuple[str, ...] = ("mlp_in", "resid_mid", "mlp_out")
    """Where, separated by commas: mlp_in (what the MLP reads, after the norm), resid_mid, mlp_out,
    resid_pre, resid_post, attn_out."""
    layers: tuple[int, ...] | None = None
    """Layers, counted from 0 and separated by commas; all by default."""
    k: int = 30
    """Features active on a token."""
    expansion: float = 4.0
    """Features for each dimension of the activations."""
    tokens: int | None = None
    """Tokens to train on, in all; by default two for each weight of the model, at most 150 million."""
    batch: int = 4096
    """Tokens in a step."""
    learning_rate: float = 1e-4
    """Where the cosine of the learning rate starts."""
    final_learning_rate: float = 2e-5
    """Where the cosine of the learning rate ends."""
    aux_loss: float = 0.0
    """Weight of SAELens's auxiliary loss, which revives dead features; worth trying with few tokens."""
    buffer: int = 16
    """Batches of activations that are shuffled together."""
    seed: int = 0
    """Seed of weights and order."""

    def __post_init__(self) -> None:
        for name in ("points", "layers"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) < len(given)):
                raise ValueError(f"{name} must name at least one, each once, got {given}")
        if unknown := sorted(set(self.points) - set(POINTS)):
            raise ValueError(f"unknown points {', '.join(unknown)}; there are {', '.join(POINTS)}")
        _require_counts(self, "k", "batch", "buffer")
        _require_rates(self, "learning_rate", "final_learning_rate")
        for name in ("expansion", "learning_rate", "final_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _require_not_negative(self, "aux_loss")
        if self.tokens is not None and self.tokens < self.batch:
            raise ValueError(f"{self.tokens} tokens do not make one batch of {self.batch}")

    def for_weights(self, count: int) -> SAETrainingConfig:
        """These settings with the tokens that a model of so many weights has by default."""
        if self.tokens is not None:
            return self
        return dataclasses.replace(self, tokens=max(self.batch, min(_PAPER_TOKENS, 2 * count)))
