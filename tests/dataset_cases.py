"""Small files in the formats of MNIST and CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

CIFAR_RECORD = 3073


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file, written from its definition."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8) % 10


def write_mnist(folder: Path, split: str = "train", count: int = 12, seed: int = 0) -> Path:
    """A small set in the published format; returns the images' file."""
    folder.mkdir(parents=True, exist_ok=True)
    part = {"train": "train", "test": "t10k"}[split]
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels(count)))
    file = folder / f"{part}-images-idx3-ubyte"
    file.write_bytes(idx(pixels(count, seed)))
    return file


def write_cifar10(folder: Path) -> np.ndarray:
    """Write random records in all files of the binary version; return the training set's."""
    folder.mkdir(parents=True, exist_ok=True)
    records = np.random.default_rng(0).integers(0, 256, (50_000, CIFAR_RECORD), dtype=np.uint8)
    records[:, 0] = np.arange(50_000) % 10
    for i, part in enumerate(np.split(records, 5), 1):
        (folder / f"data_batch_{i}.bin").write_bytes(part.tobytes())
    (folder / "test_batch.bin").write_bytes(records[40_000:].tobytes())
    return records


@pytest.fixture(scope="module")
def fake_cifar10(tmp_path_factory) -> tuple[Path, np.ndarray]:
    root = tmp_path_factory.mktemp("cifar10")
    return root, write_cifar10(root / "cifar-10-batches-bin")
