"""Built-in data sets: files in every usual layout, their normalisation, damaged files."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dataset_cases
from dataset_cases import labels, pixels, write_mnist
from modeconn.data import datasets
from modeconn.data.batches import as_batches
from modeconn.parameters import state
from refused import refused

# Fixtures.
fake_cifar10 = dataset_cases.fake_cifar10


@pytest.fixture(autouse=True)
def _no_folder_of_the_users(monkeypatch):
    monkeypatch.delenv("MODECONN_DATA", raising=False)


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
