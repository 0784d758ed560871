"""Training image classifiers with the settings of the paper (Table 1, appendix F).

Several models of one shape train together, as one model with a leading dimension. Each has its own
generators for weights, order and noise, so that a model depends on the data and on its own settings
only, not on the models it was trained with (apart from the rounding of a batched product).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from tl_bilinear.recipes.images.augment import Augmentation
from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import ImageClassifier

RECIPE = 1
"""Version of the training, part of the name of every stored run.

Raise it by hand when the same settings and data no longer give the same model.
"""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run; the defaults are the paper's, with its published default size."""

    size: int = 256
    """Width of the embedding and of the bilinear layer."""
    bias: bool = False
    """Biases in every map."""
    noise: float = 0.4
    """Standard deviation of Gaussian noise on the pixels, which lie in [0, 1]."""
    weight_decay: float = 1.0
    """Weight decay of AdamW."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW at the start; it falls to zero along a cosine."""
    batch: int = 2048
    """Images in a step."""
    epochs: int = 20
    """Passes over the images."""
    seed: int = 0
    """Seed of the weights, the noise and the order of the images."""
    activation_noise: float = 0.0
    """Standard deviation of noise on the embedded image, the bilinear layer's input (appendix B.1)."""
    dropout: float = 0.0
    """Share of the embedded image that is dropped (appendix B.1)."""
    augment: tuple[Augmentation, ...] = ()
    """Changes of the images, in order, before the noise is added."""
    depth: int = 1
    """Bilinear layers; the paper's models have one."""

    def __post_init__(self) -> None:
        for name in ("size", "batch", "epochs", "depth"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} must be less than {2**31:,}, got {getattr(self, name)}")
        for name in ("noise", "weight_decay", "learning_rate", "activation_noise", "dropout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate must be at most 1, got {self.learning_rate}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed}")
        if not self.dropout < 1:
            raise ValueError(f"dropout is a share of the embedding below 1, got {self.dropout}")

    @property
    def shape(self) -> tuple[int, bool, int, int, int]:
        """(size, bias, batch, epochs, depth): models that agree in it can train together."""
        return (self.size, self.bias, self.batch, self.epochs, self.depth)

    def __str__(self) -> str:
        """The settings in a sentence."""
        parts = [
            f"size {self.size}",
            f"input noise {self.noise:g}",
            f"weight decay {self.weight_decay:g}",
            f"{self.epochs} epochs",
            f"learning rate {self.learning_rate:g}",
            f"batch {self.batch}",
            f"seed {self.seed}",
        ]
        if self.depth > 1:
            parts.append(f"{self.depth} layers")
        if self.bias:
            parts.append("with biases")
        if self.activation_noise:
            parts.append(f"activation noise {self.activation_noise:g}")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        return ", ".join([*parts, *map(str, self.augment)])


def config_for(
    data: ImageData, base: TrainingConfig = TrainingConfig(), **given: Any
) -> TrainingConfig:
    """`base`, adapted to the number of images, with the settings that are `given` (not None).

    Below 20,000 images batches are of 256 and there are at least 60 epochs: at the paper's batch of
    2,048 a few thousand images would make two steps an epoch.
    """
    few: dict[str, Any] = {}
    if len(data.train_labels) < 20_000:
        few = {"batch": 256, "epochs": max(60, base.epochs)}
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(base, **few | chosen)


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """A trained model, with its training loss and clean test accuracy after each epoch."""

    model: ImageClassifier
    config: TrainingConfig
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


def train_classifier(
    data: ImageData,
    config: TrainingConfig = TrainingConfig(),
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TrainingResult:
    """Train a classifier; the same seed gives the same model on the same machine.

    Validation is on clean test images.
    """
    return train_classifiers(data, [config], device=device, progress=progress)[0]


def train_classifiers(
    data: ImageData,
    configs: Sequence[TrainingConfig],
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[TrainingResult]:
    """Train several classifiers of one shape at once, in the order of `configs`.

    The images are one tensor. A batch is an index into it, copied to the same memory at every step: at
    these sizes a DataLoader and fresh memory would cost as much as the model. Memory: about
    ``batch (pixels + 12 size)`` numbers for each model.

    Raises ValueError for configurations whose `shape` differs, and for a loss that is no longer finite.
    """
    if len({config.shape for config in configs}) > 1:
        raise ValueError(
            f"models that train together must agree in (size, bias, batch, epochs, depth), got "
            f"{sorted({config.shape for config in configs})}; train each shape on its own"
        )
    if not configs:
        return []
    first, count = configs[0], len(configs)
    generators = [Generator().manual_seed(config.seed) for config in configs]
    draws = [Generator(device=device).manual_seed(config.seed) for config in configs]
    models = [
        ImageClassifier(
            data.pixels, len(data.classes), first.size, first.bias, generator, first.depth
        ).to(device)
        for generator in generators
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(m.parameters()), "lr": c.learning_rate, "weight_decay": c.weight_decay}
            for m, c in zip(models, configs, strict=True)
        ],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=first.epochs)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    test = data.test_images.to(device), data.test_labels.to(device)
    batch = min(first.batch, len(images))
    inputs = images.new_empty(count, batch, data.pixels)
    noise = torch.empty_like(inputs[0])
    losses: list[list[float]] = []
    accuracies: list[list[float]] = []
    with tqdm(range(first.epochs), unit="epoch", disable=not progress) as epochs:
        for _ in epochs:
            orders = [torch.randperm(len(images), generator=g).to(device) for g in generators]
            total = torch.zeros(count, device=device)
            for index in torch.stack(orders).split(batch, dim=1):
                part = inputs[:, : index.shape[1]]
                for row, config, draw, own in zip(part, configs, draws, index, strict=True):
                    torch.index_select(images, 0, own, out=row)
                    for augmentation in config.augment:
                        row.copy_(augmentation(row, data.size, draw))
                    if config.noise:
                        own_noise = noise[: len(row)].normal_(generator=draw)
                        row.add_(own_noise, alpha=config.noise)
                logits = _forward(models, part, configs, draws)
                each = cross_entropy(
                    logits.flatten(0, 1), labels[index].flatten(), reduction="none"
                )
                means = each.view(index.shape).mean(1)
                optimizer.zero_grad(set_to_none=True)
                means.sum().backward()
                optimizer.step()
                total += means.detach() * index.shape[1]
            schedule.step()
            losses.append((total / len(images)).tolist())
            for config, loss in zip(configs, losses[-1], strict=True):
                if not math.isfinite(loss):
                    raise ValueError(
                        f"training diverged: the loss is {loss} in epoch {len(losses)} of {config}. "
                        "Choose a smaller learning rate"
                    )
            accuracies.append([accuracy(model, *test) for model in models])
            epochs.set_postfix(
                loss=f"{sum(losses[-1]) / count:.3f}", accuracy=f"{sum(accuracies[-1]) / count:.3f}"
            )
    return [
        TrainingResult(model.eval(), config, loss, reached)
        for model, config, loss, reached in zip(
            models, configs, zip(*losses, strict=True), zip(*accuracies, strict=True), strict=True
        )
    ]


def _forward(
    models: Sequence[ImageClassifier],
    inputs: Float[Tensor, "models n pixels"],
    configs: Sequence[TrainingConfig],
    draws: Sequence[Generator],
) -> Float[Tensor, "models n classes"]:
    """Every model on its own images, with dropout and noise on the embedding."""
    x = _linear(inputs, [model.embed for model in models])
    # A model without dropout or noise draws none, whatever the others do.
    if any(config.dropout for config in configs):
        kept = [_kept(x[0], c.dropout, g) for c, g in zip(configs, draws, strict=True)]
        x = x * torch.stack(kept)
    if any(config.activation_noise for config in configs):
        noise = [_noise(x[0], c.activation_noise, g) for c, g in zip(configs, draws, strict=True)]
        x = x + torch.stack(noise)
    for layers in zip(*(model.layers for model in models), strict=True):
        left = _linear(x, [layer.left for layer in layers])
        right = _linear(x, [layer.right for layer in layers])
        x = _linear(left * right, [layer.out for layer in layers])
    return x


def _kept(like: Tensor, share: float, draw: Generator) -> Tensor:
    if not share:
        return torch.ones_like(like)
    return torch.empty_like(like).bernoulli_(1 - share, generator=draw) / (1 - share)


def _noise(like: Tensor, std: float, draw: Generator) -> Tensor:
    return torch.empty_like(like).normal_(0, std, generator=draw) if std else torch.zeros_like(like)


def _linear(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    weight = torch.stack([linear.weight for linear in linears]).mT
    if linears[0].bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(torch.stack([linear.bias for linear in linears])[:, None], x, weight)


@torch.no_grad()
def accuracy(model: ImageClassifier, images: Float[Tensor, "n pixels"], labels: Tensor) -> float:
    """Share of images whose largest logit is their label's."""
    guesses = model(images).argmax(-1)
    return float((guesses == labels.to(guesses.device)).float().mean())
