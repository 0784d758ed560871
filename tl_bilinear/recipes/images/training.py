"""Training an image classifier with the settings of the paper (Table 1, appendix F)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from tl_bilinear.recipes.images.data import ImageData
from tl_bilinear.recipes.images.model import ImageClassifier


@dataclass(frozen=True)
class TrainingConfig:
    """Settings; the defaults are the paper's, with its published default size.

    `noise` is the standard deviation of dense Gaussian noise on the pixels, on their scale of [0, 1].
    """

    size: int = 256
    bias: bool = False
    noise: float = 0.4
    weight_decay: float = 1.0
    learning_rate: float = 1e-3
    batch: int = 2048
    epochs: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise", "weight_decay", "learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """A trained model, and how it got there: loss and clean test accuracy after each epoch."""

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

    The images lie in one tensor and a batch is an index into it: at these sizes a DataLoader would
    cost more than the model. Validation is on clean test images.
    """
    generator = torch.Generator().manual_seed(config.seed)
    noise_generator = torch.Generator(device=device).manual_seed(config.seed)
    model = ImageClassifier(data.pixels, len(data.classes), config.size, config.bias, generator)
    model.to(device)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    losses, accuracies = [], []
    with tqdm(range(config.epochs), unit="epoch", disable=not progress) as epochs:
        for _ in epochs:
            order = torch.randperm(len(images), generator=generator).to(device)
            total = 0.0
            for index in order.split(config.batch):
                batch = images[index]
                if config.noise:
                    noise = torch.empty_like(batch).normal_(generator=noise_generator)
                    batch = batch.add_(noise, alpha=config.noise)
                loss = cross_entropy(model(batch), labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(index)
            schedule.step()
            losses.append(total / len(images))
            accuracies.append(accuracy(model, data.test_images.to(device), data.test_labels))
            epochs.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.3f}")
    return TrainingResult(model.eval(), config, tuple(losses), tuple(accuracies))


@torch.no_grad()
def accuracy(model: ImageClassifier, images: Float[Tensor, "n pixels"], labels: Tensor) -> float:
    """Share of images whose largest logit is their label's."""
    guesses = model(images).argmax(-1)
    return float((guesses == labels.to(guesses.device)).float().mean())
