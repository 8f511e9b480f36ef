"""Built-in data sets: files in every usual layout, their normalisation, damaged files."""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from modeconn.data import datasets
from modeconn.data.batches import as_batches
from modeconn.parameters import state
from refused import refused

CIFAR_RECORD = 3073


@pytest.fixture(autouse=True)
def _no_folder_of_the_users(monkeypatch):
    monkeypatch.delenv("MODECONN_DATA", raising=False)


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


# ------------------------------------------------------------------------------------------ real
# files


def test_mnist_is_the_published_set(mnist_root: Path):
    train = datasets.load("mnist", mnist_root)
    assert train.inputs.shape == (60_000, 1, 28, 28)
    assert train.targets.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    scaled = train.inputs.double() / 255
    # as published
    assert (round(float(scaled.mean()), 4), round(float(scaled.std()), 4)) == (0.1307, 0.3081)
    test = datasets.load("mnist", mnist_root, "test")
    assert test.inputs.shape == (10_000, 1, 28, 28)
    assert test.targets.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert test.targets[:5].tolist() == [7, 2, 1, 0, 4]


def test_mnist_packed_is_mnist_unpacked(mnist_root: Path, shared: Path):
    for split in ("train", "test"):
        plain = datasets.load("mnist", mnist_root, split)
        packed = datasets.load("mnist", shared / "data" / "mnist", split)
        assert torch.equal(plain.inputs, packed.inputs)
        assert torch.equal(plain.targets, packed.targets)


def test_the_normalisation_is_the_one_that_the_networks_were_trained_with(
    mnist_root: Path, shared: Path
):
    """Zero training error, as their description says; another normalisation gives errors."""
    sizes = [784, *[245] * 10, 10]
    layers = [layer for i in range(11) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    network = nn.Sequential(*layers[:-1])
    network.load_state_dict(
        state.load(shared / "checkpoints" / "mnist-fcn-10x245-seed1.safetensors")
    )

    def errors(**normalisation: float) -> int:
        inputs, targets = datasets.load("mnist", mnist_root, limit=6000, **normalisation).slice(
            0, 6000
        )
        with torch.no_grad():
            return int((network(inputs.flatten(1)).argmax(1) != targets).sum())

    assert errors() == 0
    assert errors(mean=0.1307, std=0.3081) > 0


def test_cifar10_is_the_published_set(cifar10_root: Path):
    train, test = (datasets.load("cifar10", cifar10_root, split) for split in ("train", "test"))
    assert train.inputs.shape == (50_000, 3, 32, 32)
    assert test.inputs.shape == (10_000, 3, 32, 32)
    assert train.targets.bincount().tolist() == [5000] * 10
    assert test.targets.bincount().tolist() == [1000] * 10
    # The published statistics; the files here were re-encoded, so to three digits.
    inputs = torch.cat([inputs for inputs, _ in as_batches(train, 10_000)])
    assert inputs.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=5e-3)
    assert inputs.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-2)


# ----------------------------------------------------------------------------------------------
# digits


def test_digits_need_no_files():
    train, test = datasets.load("digits"), datasets.load("digits", split="test")
    assert (train.inputs.shape, test.inputs.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    inputs, targets = train.slice(0, len(train))
    assert inputs.dtype == torch.float32
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)
    assert train.normalization == "x / 16"
    both = torch.cat([train.targets, test.targets]).bincount().tolist()
    assert both == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # scikit-learn's description
    assert min(train.targets.bincount().tolist()) > 130  # the permutation mixes the classes
    assert targets.dtype == torch.int64


def test_the_split_of_digits_is_fixed_and_complete():
    from sklearn.datasets import load_digits

    train, test = datasets.load("digits"), datasets.load("digits", split="test")
    assert test.targets[:12].tolist() == datasets.load("digits", split="test").targets[:12].tolist()
    assert train.targets[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    rows = torch.cat([train.inputs, test.inputs]).flatten(1).to(torch.float64)
    original = torch.as_tensor(load_digits().data)
    assert sorted(rows.tolist()) == sorted(original.tolist())


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with refused("digits", "pip install scikit-learn"):
        datasets.load("digits")


# -------------------------------------------------------------------------------------------
# layouts


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("place", ["MNIST/raw", "raw", ""])
@pytest.mark.parametrize(
    "form", ["plain", "gz", "both", "dotted", "packed without .gz", "plain with .gz"]
)
def test_every_layout_of_mnist(tmp_path: Path, split: str, place: str, form: str):
    images = write_mnist(tmp_path / place, split)
    for file in (images, images.with_name(images.name.replace("images-idx3", "labels-idx1"))):
        content = file.read_bytes()
        if form in ("gz", "both"):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(content))
        if form in ("gz", "dotted", "plain with .gz"):
            file.unlink()
        if form == "dotted":
            file.with_name(file.name.replace("-idx", ".idx")).write_bytes(content)
        if form == "packed without .gz":
            file.write_bytes(gzip.compress(content))
        if form == "plain with .gz":
            file.with_name(file.name + ".gz").write_bytes(content)
    found = datasets.load("mnist", tmp_path, split)
    assert torch.equal(found.inputs, torch.as_tensor(pixels(12)[:, None]))
    assert found.targets.tolist() == labels(12).tolist()


def test_the_environment_names_the_folder_unless_root_does(tmp_path: Path, monkeypatch):
    write_mnist(tmp_path / "a", seed=1)
    write_mnist(tmp_path / "b", seed=2)
    monkeypatch.setenv("MODECONN_DATA", str(tmp_path / "a"))
    assert torch.equal(datasets.load("mnist").inputs[:, 0], torch.as_tensor(pixels(12, 1)))
    assert torch.equal(
        datasets.load("mnist", str(tmp_path / "b")).inputs[:, 0], torch.as_tensor(pixels(12, 2))
    )


def test_fashion_mnist_has_a_folder_of_its_own(tmp_path: Path):
    write_mnist(tmp_path / "MNIST" / "raw", seed=1)
    with refused(
        "fashion-mnist: no train-images-idx3-ubyte", str(tmp_path / "FashionMNIST" / "raw")
    ):
        datasets.load("fashion-mnist", tmp_path)
    write_mnist(tmp_path / "FashionMNIST" / "raw", seed=2)
    found = datasets.load("fashion-mnist", tmp_path)
    assert torch.equal(found.inputs[:, 0], torch.as_tensor(pixels(12, 2)))
    assert (found.classes[1], found.classes[9], len(found.classes)) == ("trouser", "ankle boot", 10)
    assert found.normalization == "(x / 255 - 0.5) / 0.5"


def test_cifar10_in_both_layouts(fake_cifar10):
    root, records = fake_cifar10
    for place in (root, root / "cifar-10-batches-bin"):
        train, test = datasets.load("cifar10", place), datasets.load("cifar10", place, "test")
        assert train.targets.tolist() == records[:, 0].tolist()
        # A record is the label, then the red, the green and the blue plane, each row by row.
        assert train.inputs[123, 2, 4, 5] == records[123, 1 + 2 * 1024 + 4 * 32 + 5]
        assert torch.equal(
            train.inputs[40_000:].reshape(10_000, -1), torch.as_tensor(records[40_000:, 1:])
        )
        assert torch.equal(test.inputs, train.inputs[40_000:])


# ----------------------------------------------------------------------------------------
# normalisation


def reference(images: datasets.Images, mean: list[float], std: list[float]) -> torch.Tensor:
    """What torchvision's ToTensor and Normalize do."""
    scaled = images.inputs.to(torch.float32).div(255)
    return scaled.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))


def test_default_normalisations(tmp_path: Path, fake_cifar10):
    write_mnist(tmp_path)
    mnist = datasets.load("mnist", tmp_path)
    assert torch.equal(mnist.slice(0, 12)[0], reference(mnist, [0.5], [0.5]))
    assert mnist.normalization == "(x / 255 - 0.5) / 0.5"
    cifar10 = datasets.load("cifar10", fake_cifar10[0], "test", limit=50)
    expected = reference(cifar10, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert torch.equal(cifar10.slice(0, 50)[0], expected)
    assert cifar10.normalization == "(x / 255 - (0.4914, 0.4822, 0.4465)) / (0.247, 0.2435, 0.2616)"


def test_normalisation_can_be_set(fake_cifar10):
    found = datasets.load(
        "cifar10", fake_cifar10[0], "test", mean=0.5, std=[0.5, 0.25, 1.0], limit=20
    )
    assert torch.equal(found.slice(0, 20)[0], reference(found, [0.5] * 3, [0.5, 0.25, 1.0]))
    assert found.normalization == "(x / 255 - 0.5) / (0.5, 0.25, 1)"
    plain = datasets.load("cifar10", fake_cifar10[0], "test", mean=0, std=1, limit=20)
    assert plain.normalization == "x / 255"
    assert torch.equal(plain.slice(0, 20)[0], plain.inputs / 255)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": [0.5, 0.5]}, ["mean has 2 values", "1 or 3"]),
        ({"std": [1.0] * 4}, ["std has 4 values", "1 or 3"]),
        ({"std": 0}, ["std is 0", "above 0"]),
        ({"std": [0.5, -0.5, 0.5]}, ["std is [0.5, -0.5, 0.5]"]),
        ({"mean": float("nan")}, ["mean is nan", "finite"]),
        ({"std": float("inf")}, ["std is inf", "finite"]),
        ({"mean": "half"}, ["mean is 'half'"]),
        ({"limit": 0}, ["limit: 0"]),
        ({"limit": -3}, ["limit: -3"]),
        ({"split": "validation"}, ["'validation'", "train or test"]),
    ],
)
def test_options_that_cannot_be_used(fake_cifar10, options: dict, words: list[str]):
    with refused(*words):
        datasets.load("cifar10", fake_cifar10[0], **{"split": "test", **options})


# ----------------------------------------------------------------------------------------------
# images


def test_images_are_a_dataset(tmp_path: Path):
    write_mnist(tmp_path)
    found = datasets.load("mnist", tmp_path)
    inputs, targets = found.slice(0, len(found))
    assert (len(found), inputs.shape, inputs.dtype, targets.dtype) == (
        12,
        (12, 1, 28, 28),
        torch.float32,
        torch.int64,
    )
    for index in (0, 5, -1):
        image, label = found[index]
        assert torch.equal(image, inputs[index])
        assert (type(label), label) == (int, int(targets[index]))
    with pytest.raises(IndexError):
        found[12]
    loaded = list(DataLoader(found, batch_size=5))
    assert torch.equal(torch.cat([x for x, _ in loaded]), inputs)
    assert torch.equal(torch.cat([y for _, y in loaded]), targets)
    assert repr(found) == "Images(mnist train: 12 of 1x28x28, 10 classes, (x / 255 - 0.5) / 0.5)"
    assert (found.name, found.split, found.classes) == ("mnist", "train", tuple("0123456789"))


def test_reading_leaves_the_pixels_alone(tmp_path: Path):
    write_mnist(tmp_path)
    found = datasets.load("mnist", tmp_path)
    before = found.inputs.clone()
    found.slice(0, 12)[0].zero_()
    assert torch.equal(found.inputs, before)
    floats = datasets.Images(
        before.float(), labels(12), name="x", split="train", classes=range(10), scale=1.0
    )
    floats.slice(0, 12)[0].fill_(-1)
    floats[0][0].fill_(-1)
    assert torch.equal(floats.inputs, before.float())


@pytest.mark.parametrize("limit", [1, 5, 12, 1000])
def test_limit_takes_the_first(tmp_path: Path, limit: int):
    write_mnist(tmp_path)
    whole, found = datasets.load("mnist", tmp_path), datasets.load("mnist", tmp_path, limit=limit)
    assert len(found) == min(limit, 12)
    assert torch.equal(found.inputs, whole.inputs[:limit])
    assert torch.equal(found.targets, whole.targets[:limit])


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (torch.zeros(3, 28, 28), torch.zeros(3), ["[3, 28, 28]", "[N, C, H, W]"]),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2), ["[3, 1, 8, 8]", "[2]"]),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0), ["no images"]),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]), ["labels go from 0 to 10", "0 to 9"]),
        (torch.zeros(2, 1, 8, 8), torch.tensor([-1, 3]), ["labels go from -1 to 3"]),
    ],
)
def test_arrays_that_are_no_images(inputs: torch.Tensor, targets: torch.Tensor, words: list[str]):
    with refused("mine: ", *words):
        datasets.Images(inputs, targets, name="mine", split="train", classes=range(10))


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
