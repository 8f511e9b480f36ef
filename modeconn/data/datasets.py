"""The built-in image sets: digits, MNIST, Fashion-MNIST and CIFAR-10, from users' own files."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modeconn.errors import ModeconnError

Root = str | os.PathLike[str] | None

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_OBJECTS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_CIFAR_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR_IMAGES = 10_000  # in each file
# Bytes that one byte of a gzip file can stand for, and bytes that are read at a time.
_MOST_PACKED, _BLOCK = 1032, 1 << 20
_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label and the three colour planes


class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images, kept as bytes and normalized when they are read: (x / scale - mean) / std.

    Attributes:
        inputs: Pixels, uint8 [N, C, H, W].
        targets: Labels, int64 [N].
        name, split: What was loaded.
        classes: The classes' names; label i is classes[i].
        mean, std: Per channel, float32 [C].
        scale: The pixels' largest value.
        normalization: The formula with its numbers.
    """

    def __init__(
        self,
        inputs: Tensor | np.ndarray,
        targets: Tensor | np.ndarray,
        *,
        name: str,
        split: str,
        classes: Sequence[str],
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        scale: float = 255.0,
    ) -> None:
        """Check the arrays and keep them.

        Args:
            inputs: Pixels, uint8 [N, C, H, W].
            targets: Labels, integers [N].
            name: What messages call the set.
            split: "train", "test", or a name of the user's.
            classes: The classes' names.
            mean: Subtracted after the division by `scale`; one value, or one per channel.
            std: Divided by last; one value, or one per channel.
            scale: The pixels' largest value.

        Raises:
            ModeconnError: The shapes do not fit, a label is no class, or mean or std cannot be
                used.
        """
        self.inputs = torch.as_tensor(inputs)
        self.targets = torch.as_tensor(targets).long()
        self.name, self.split, self.classes, self.scale = name, split, tuple(classes), float(scale)
        if self.inputs.ndim != 4 or self.targets.shape != self.inputs.shape[:1]:
            shapes = f"images {list(self.inputs.shape)} and labels {list(self.targets.shape)}"
            raise ModeconnError(f"{name}: got {shapes}; expected [N, C, H, W] and [N]")
        if len(self) == 0:
            raise ModeconnError(f"{name}: holds no images; expected at least one")
        low, high = (int(value) for value in self.targets.aminmax())
        if low < 0 or high >= len(self.classes):
            raise ModeconnError(
                f"{name}: labels go from {low} to {high}; expected 0 to {len(self.classes) - 1}"
            )
        self.mean = _per_channel(mean, self.inputs.shape[1], f"{name}: mean")
        self.std = _per_channel(std, self.inputs.shape[1], f"{name}: std")
        if not (self.std > 0).all():
            raise ModeconnError(f"{name}: std is {std}; expected values above 0")
        self.normalization = f"x / {self.scale:g}"
        if self.mean.any() or (self.std != 1).any():
            self.normalization = f"({self.normalization} - {_text(self.mean)}) / {_text(self.std)}"

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, normalized, float32 [C, H, W], and its label."""
        return self._normalized(self.inputs[index]), int(self.targets[index])

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return images start to stop, normalized, float32 [B, C, H, W], and labels, int64 [B]."""
        return self._normalized(self.inputs[start:stop]), self.targets[start:stop]

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.inputs.shape[1:])
        what = f"{self.name} {self.split}: {len(self):,} of {shape}, {len(self.classes)} classes"
        return f"Images({what}, {self.normalization})"

    def _normalized(self, pixels: Tensor) -> Tensor:
        # The operations of torchvision's ToTensor and Normalize, in their order: the same to the
        # last bit.
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return pixels.to(torch.float32, copy=True).div_(self.scale).sub_(mean).div_(std)


def load(
    name: str,
    root: Root = None,
    split: str = "train",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    limit: int | None = None,
) -> Images:
    """Load one of the built-in sets, in its files' order.

    ===============  ===========  ===============  ================================================
    name             images       train / test     default normalization
    ===============  ===========  ===============  ================================================
    "digits"         [1, 8, 8]    1437 / 360       x / 16
    "mnist"          [1, 28, 28]  60,000 / 10,000  (x / 255 - 0.5) / 0.5
    "fashion-mnist"  [1, 28, 28]  60,000 / 10,000  (x / 255 - 0.5) / 0.5
    "cifar10"        [3, 32, 32]  50,000 / 10,000  (x / 255 - (0.4914, 0.4822, 0.4465))
                                                   / (0.2470, 0.2435, 0.2616)
    ===============  ===========  ===============  ================================================

    Digits are split by a fixed permutation, `np.random.RandomState(0)`: the first 1437 are the
    training set.

    Args:
        name: A name of the table.
        root: The folder that holds MNIST/raw, FashionMNIST/raw or cifar-10-batches-bin, or that
            folder itself; None: the environment variable MODECONN_DATA. Digits need none:
            scikit-learn brings them.
        split: "train" or "test".
        mean: Subtracted after the division by 255 (digits: 16); one value, or one per channel.
        std: Divided by last; one value, or one per channel.
        limit: Only that many images, the first.

    Raises:
        ModeconnError: An unknown name or split; files that are missing, truncated or of another
            format; a mean, std or limit that cannot be used.
    """
    if name not in SOURCES:
        raise ModeconnError(f"data set: {name!r} is unknown; expected one of {', '.join(SOURCES)}")
    if split not in ("train", "test"):
        raise ModeconnError(f"split: {split!r} is unknown; expected train or test")
    if limit is not None and limit < 1:
        raise ModeconnError(f"limit: {limit}; expected at least 1")
    source = SOURCES[name]
    inputs, targets = source.read(name, split, root)
    return Images(
        inputs[:limit],
        targets[:limit],
        name=name,
        split=split,
        classes=source.classes,
        mean=source.mean if mean is None else mean,
        std=source.std if std is None else std,
        scale=source.scale,
    )


# ------------------------------------------------------------------------------------------------
# sets

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 [N, C, H, W] and [N]


def _read_digits(name: str, split: str, root: Root) -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ModeconnError(
            f"{name}: comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    digits = load_digits()
    # The source's order follows its writers; RandomState's stream, unlike newer ones, is fixed for
    # good.
    order = np.random.RandomState(0).permutation(len(digits.target))
    chosen = order[:1437] if split == "train" else order[1437:]
    return digits.images[chosen, None].astype(np.uint8), digits.target[chosen]


def _read_mnist(name: str, split: str, root: Root) -> Arrays:
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    base = _folder(root, name, f"{folder}/raw/train-images-idx3-ubyte (or .gz)")
    part = "train" if split == "train" else "t10k"
    places = (base / folder / "raw", base / "raw", base)
    images_file = _find(places, f"{part}-images", "idx3-ubyte", name)
    labels_file = _find(places, f"{part}-labels", "idx1-ubyte", name)
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ModeconnError(
            f"{name}: {images_file} holds {len(images):,} images but {labels_file} "
            f"{len(labels):,} labels; expected one label per image"
        )
    return images[:, None], labels


def _read_cifar10(name: str, split: str, root: Root) -> Arrays:
    base = _folder(root, name, "cifar-10-batches-bin/data_batch_1.bin")
    files = _CIFAR_FILES[split]
    places = (base / "cifar-10-batches-bin", base)
    place = next((place for place in places if (place / files[0]).is_file()), None)
    if place is None:
        _refuse_pickles(base, name, files[0])
        raise ModeconnError(
            f"{name}: no {files[0]} in {' or '.join(map(str, places))}; expected the binary version"
        )
    records = np.concatenate([_read_cifar_file(place / file) for file in files])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _refuse_pickles(base: Path, name: str, file: str) -> None:
    """Raise a ModeconnError where CIFAR-10's Python version lies in the place of the binary one."""
    for folder in (base / "cifar-10-batches-py", base):
        if (folder / file.removesuffix(".bin")).is_file():
            raise ModeconnError(
                f"{name}: {folder} holds the python version, pickles, which can run code when "
                "read; unpack cifar-10-binary.tar.gz there instead, or pass torchvision's CIFAR10 "
                "as the data"
            )


def _read_cifar_file(file: Path) -> np.ndarray:
    expected = _CIFAR_IMAGES * _CIFAR_RECORD
    content = _content(file, 0, lambda _: (expected, f"{_CIFAR_IMAGES:,} images"))
    return np.frombuffer(content, np.uint8).reshape(_CIFAR_IMAGES, _CIFAR_RECORD)


@dataclass(frozen=True)
class _Source:
    read: Callable[[str, str, Root], Arrays]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float


SOURCES = {
    "digits": _Source(_read_digits, _DIGITS, (0.0,), (1.0,), 16.0),
    "mnist": _Source(_read_mnist, _DIGITS, (0.5,), (0.5,), 255.0),
    "fashion-mnist": _Source(_read_mnist, _CLOTHES, (0.5,), (0.5,), 255.0),
    "cifar10": _Source(
        _read_cifar10, _OBJECTS, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 255.0
    ),
}


# -----------------------------------------------------------------------------------------------
# files


def _folder(root: Root, name: str, layout: str) -> Path:
    chosen = root if root is not None else os.environ.get("MODECONN_DATA")
    if not chosen:
        raise ModeconnError(
            f"{name}: no folder given; expected root=DIR (--data-root DIR) or MODECONN_DATA=DIR "
            f"in the environment, where DIR holds {layout}"
        )
    base = Path(chosen).expanduser()
    if not base.is_dir():
        raise ModeconnError(f"{name}: there is no folder {base}; expected one that holds {layout}")
    return base


def _find(places: Sequence[Path], stem: str, ending: str, name: str) -> Path:
    # some mirrors write train-images.idx3-ubyte
    names = [f"{stem}{joint}{ending}" for joint in "-."]
    names = [names[0], f"{names[0]}.gz", names[1], f"{names[1]}.gz"]
    for place in places:
        found = next((place / each for each in names if (place / each).is_file()), None)
        if found is not None:
            return found
    raise ModeconnError(
        f"{name}: no {stem}-{ending} or {stem}-{ending}.gz in {', '.join(map(str, places))}"
    )


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes: magic number (type, dimensions), big-endian sizes, bytes."""
    start = 4 + 4 * dimensions
    content = _content(file, start, lambda header: _size_of_idx(file, header, dimensions))
    return np.frombuffer(content, np.uint8, offset=start).reshape(_shape_of_idx(content, start))


def _shape_of_idx(content: bytes | bytearray, start: int) -> list[int]:
    return [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]


def _size_of_idx(file: Path, header: bytes, dimensions: int) -> tuple[int, str]:
    """Return the bytes of an IDX file with this header, and what they are."""
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if header[:4] != magic:
        raise ModeconnError(
            f"{file}: starts with {header[:4].hex() or 'nothing'}; "
            f"expected an IDX file's {magic.hex()}"
        )
    shape = _shape_of_idx(header, start)
    sizes = " x ".join(f"{size:,}" for size in shape)
    return start + math.prod(shape), f"{sizes} values"


def _content(file: Path, start: int, size: Callable[[bytes], tuple[int, str]]) -> bytearray:
    """Read the bytes that a file's header says, unpacked if it is gzip, whatever its name is.

    Args:
        file: to read.
        start: bytes of the header.
        size: returns the bytes that a file with a header has, and what they are.
    """
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            content = bytearray(stream.read(start))  # writable, so that torch can share its memory
            expected, things = size(bytes(content))
            most = os.fstat(raw.fileno()).st_size * (_MOST_PACKED if packed else 1)
            while len(content) <= expected <= most:
                # one byte more than there should be shows that there are others
                block = stream.read(min(_BLOCK, expected + 1 - len(content)))
                if not block:
                    break
                content += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ModeconnError(f"{file}: truncated or damaged gzip file: {error}") from error
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(content) == expected:
        return content
    found = f"{len(content):,} bytes"
    if expected > most:
        found = f"at most {most:,} bytes" if packed else f"{most:,} bytes"
    elif len(content) > expected:
        found = "more bytes" if packed else f"{most:,} bytes"
    raise ModeconnError(f"{file}: {found}; expected {expected:,} for {things} (truncated?)")


# ----------------------------------------------------------------------------------------
# normalization


def _per_channel(values: Any, channels: int, what: str) -> Tensor:
    try:
        result = torch.as_tensor(values, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ModeconnError(
            f"{what} is {values!r}; expected a number, or one per channel"
        ) from None
    if len(result) not in (1, channels):
        raise ModeconnError(
            f"{what} has {len(result)} values; expected 1 or {channels}, one per channel"
        )
    if not result.isfinite().all():
        raise ModeconnError(f"{what} is {values!r}; expected finite values")
    return result.expand(channels).contiguous()


def _text(values: Tensor) -> str:
    """Format one number if all channels agree, else all: "(0.4914, 0.4822, 0.4465)"."""
    texts = [f"{value:.6g}" for value in values.tolist()]
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"
