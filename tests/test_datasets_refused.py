"""Built-in data sets that are missing or damaged: named, with what is expected."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

import dataset_cases
from dataset_cases import CIFAR_RECORD, idx, labels, pixels, write_mnist
from modeconn.data import datasets
from refused import refused

# Fixtures.
fake_cifar10 = dataset_cases.fake_cifar10


@pytest.fixture(autouse=True)
def _no_folder_of_the_users(monkeypatch):
    monkeypatch.delenv("MODECONN_DATA", raising=False)


# -------------------------------------------------------------------------------------------- bad
# input


def test_an_unknown_name_lists_the_known():
    with refused("'imagenet'", "digits, mnist, fashion-mnist, cifar10"):
        datasets.load("imagenet")


@pytest.mark.parametrize(
    ("name", "layout"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("cifar10", "cifar-10-")],
)
def test_a_missing_folder_says_what_is_expected(tmp_path: Path, name: str, layout: str):
    with refused(f"{name}: no folder given", "root=DIR", "--data-root", "MODECONN_DATA", layout):
        datasets.load(name)
    with refused(f"{name}: there is no folder {tmp_path / 'x'}", layout):
        datasets.load(name, tmp_path / "x")
    with refused(f"{name}: no ", str(tmp_path)):
        datasets.load(name, tmp_path)


def test_a_missing_labels_file_is_named(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with refused("no train-labels-idx1-ubyte", str(tmp_path)):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], ["9,423 bytes", "9,424", "12 x 28 x 28", "truncated"]),
        (lambda content: content + b"x", ["9,425 bytes", "9,424"]),
        (lambda content: content[:6], ["6 bytes"]),
        (lambda content: content[:16], ["16 bytes", "9,424"]),
        (lambda content: b"", ["starts with nothing", "00000803"]),
        (lambda content: idx(labels(12)), ["starts with 00000801", "00000803"]),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", ["starts with 76657273"]),
        (lambda content: gzip.compress(content)[:-20], ["gzip"]),
        (lambda content: b"\x1f\x8b" + b"x" * 50, ["gzip"]),
        (lambda content: idx(pixels(11)), ["11 images", "12 labels"]),
        (lambda content: idx(pixels(0)), ["0 images"]),
    ],
)
def test_damaged_idx_files(tmp_path: Path, damage, words: list[str]):
    file = write_mnist(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with refused(str(file), *words):
        datasets.load("mnist", tmp_path)


def test_labels_out_of_range_are_refused(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(12, 37, np.uint8)))
    with refused("mnist", "labels go from 37 to 37", "0 to 9"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("change", [-CIFAR_RECORD, -1, 1])
def test_damaged_cifar10_files(tmp_path: Path, fake_cifar10, change: int):
    shutil.copy(fake_cifar10[0] / "cifar-10-batches-bin" / "test_batch.bin", tmp_path)
    size = 10_000 * CIFAR_RECORD
    with (tmp_path / "test_batch.bin").open("r+b") as stream:
        stream.truncate(size + change)
    with refused(str(tmp_path / "test_batch.bin"), f"{size + change:,} bytes", f"{size:,}"):
        datasets.load("cifar10", tmp_path, "test")


def test_a_missing_file_of_cifar10_is_named(tmp_path: Path, fake_cifar10):
    shutil.copy(fake_cifar10[0] / "cifar-10-batches-bin" / "data_batch_1.bin", tmp_path)
    with refused(str(tmp_path / "data_batch_2.bin"), "cannot be read", "No such file"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("place", ["cifar-10-batches-py", ""])
def test_the_python_version_of_cifar10_is_refused_with_what_to_do(tmp_path: Path, place: str):
    (tmp_path / place).mkdir(exist_ok=True)
    for file in ("data_batch_1", "test_batch"):
        (tmp_path / place / file).write_bytes(b"\x80\x02}q\x01.")
    for split in ("train", "test"):
        with refused(
            str(tmp_path / place), "run code", "cifar-10-binary.tar.gz", "torchvision's CIFAR10"
        ):
            datasets.load("cifar10", tmp_path, split)
