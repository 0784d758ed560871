"""Changes of training images before the model sees them (Pearce et al. 2025, appendix B).

An augmentation is a small frozen object that is called with a batch of flat images. It draws random
numbers only from the generator it is given, so that a seed determines a training run. Dense Gaussian
noise, which the paper settles on, is `TrainingConfig.noise`. Noise on activations and dropout act
inside the model and are settings there too.

>>> config = TrainingConfig(noise=0.3, augment=(Translation(3), Blur(0.7)))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor


@runtime_checkable
class Augmentation(Protocol):
    """A frozen dataclass (so that a run can be stored by its settings) that changes images."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(
        self, images: Float[Tensor, "n pixels"], size: tuple[int, int], generator: Generator
    ) -> Float[Tensor, "n pixels"]:
        """The images, each changed by a draw of its own; the memory of `images` may be reused."""
        ...


@dataclass(frozen=True)
class SaltAndPepper:
    """A share of the pixels set to 0 or 1, either with equal chance."""

    share: float

    def __post_init__(self) -> None:
        _require(
            0 <= self.share <= 1, "share", "a share of the pixels, between 0 and 1", self.share
        )

    def __call__(self, images: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        draw = _uniform(images.shape, images, generator)
        images = images.masked_fill(draw < self.share / 2, 0.0)
        return images.masked_fill((draw >= self.share / 2) & (draw < self.share), 1.0)


@dataclass(frozen=True)
class Perlin:
    """Smooth patches: gradient noise on a grid of `cells` x `cells`, of standard deviation `std`.

    Perlin noise is linear in the random gradients at the grid's nodes, so a batch of it is one matrix
    product. `std` is taken over gradients and pixels together.
    """

    std: float
    cells: int = 4

    def __post_init__(self) -> None:
        _require(self.std >= 0, "std", "a standard deviation of at least 0", self.std)
        _require(self.cells >= 1, "cells", "at least 1 cell a side", self.cells)

    def __call__(self, images: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        basis = _perlin_basis(size, self.cells).to(images)
        angles = 2 * torch.pi * _uniform((len(images), len(basis) // 2), images, generator)
        gradients = torch.cat([angles.cos(), angles.sin()], 1)
        return images + self.std * (gradients @ basis)


@dataclass(frozen=True)
class Translation:
    """A uniform shift of up to `pixels` in each direction; what leaves the image is lost."""

    pixels: float

    def __post_init__(self) -> None:
        _require(self.pixels >= 0, "pixels", "a shift of at least 0 pixels", self.pixels)

    def __call__(self, images: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        shifts = self.pixels * (2 * _uniform((len(images), 2), images, generator) - 1)
        return _warped("translate", images, size, shifts)


@dataclass(frozen=True)
class Rotation:
    """A uniform rotation about the centre by up to `degrees` either way."""

    degrees: float

    def __post_init__(self) -> None:
        _require(self.degrees >= 0, "degrees", "an angle of at least 0 degrees", self.degrees)

    def __call__(self, images: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        angles = self.degrees * (2 * _uniform((len(images),), images, generator) - 1)
        return _warped("rotate", images, size, angles)


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur of standard deviation `sigma` pixels, the same for every image."""

    sigma: float

    def __post_init__(self) -> None:
        _require(self.sigma > 0, "sigma", "a width above 0 pixels", self.sigma)

    def __call__(self, images: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        kernel = 2 * max(1, round(3 * self.sigma)) + 1
        blur = _kornia().filters.gaussian_blur2d
        pictures = images.view(-1, 1, *size)
        return blur(pictures, (kernel, kernel), (self.sigma, self.sigma)).flatten(1)


def _warped(name: str, images: Tensor, size: tuple[int, int], parameters: Tensor) -> Tensor:
    warp: Callable[..., Tensor] = getattr(_kornia().geometry.transform, name)
    return warp(images.view(-1, 1, *size), parameters).flatten(1)


def _kornia() -> Any:
    try:
        import kornia
    except ImportError as error:
        raise ImportError(
            "translation, rotation and blur come from kornia: pip install 'tl-bilinear[vision]'"
        ) from error
    return kornia


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)


@lru_cache(maxsize=8)
def _perlin_basis(size: tuple[int, int], cells: int) -> Float[Tensor, "gradients pixels"]:
    """What a gradient component at each node adds to each pixel: x components, then y components.

    It is scaled so that unit gradients of random direction make noise whose mean variance over the
    pixels is 1.
    """
    places = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * cells for n in size]
    nodes = torch.arange(cells + 1, dtype=torch.float64)
    offsets = [place[None] - nodes[:, None] for place in places]  # [nodes, pixels of a side]
    # Perlin's quintic fade, 1 at a node and 0 at its neighbours.
    near = [(1 - o.abs()).clamp_min(0) for o in offsets]
    fades = [t**3 * (10 + t * (6 * t - 15)) for t in near]
    weight = torch.einsum("ay,bx->abyx", *fades)
    along_y = weight * offsets[0][:, None, :, None]
    along_x = weight * offsets[1][None, :, None, :]
    basis = torch.cat([along_x.flatten(0, 1), along_y.flatten(0, 1)]).flatten(1)
    variance = basis.square().sum(0).mean() / 2  # a random unit gradient has E[cos^2] = 1/2
    return (basis / variance.sqrt()).float()


def _require(holds: bool, name: str, meaning: str, value: float) -> None:
    if not holds:
        raise ValueError(f"{name} must be {meaning}, got {value}")
