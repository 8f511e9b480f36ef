"""Warnings of data that are read as they come, and that may not be meant so."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from modeconn.capture.graph import Graph
from modeconn.data.batches import Batches
from modeconn.data.inputs import Inputs
from modeconn.errors import warn

# Names of transforms that draw, of attributes that hold some, and how deep and how far in a list
# they are looked for.
_DRAWING = re.compile(r"^Rand(om)?[A-Z]|Jitter|^AutoAugment|^TrivialAugment|^AugMix")
_HOLDERS, _LEVELS = ("transform", "dataset", "augment"), 8
_PARTS = 50
# Fewest numbers of a sample that may be a picture (8 × 8), rows that are looked at, and what the
# brightest pixel of so many pictures has at least.
_PICTURE, _ROWS, _BRIGHT = 64, 64, 128
_PRODUCTS = ("linear", "addmm", "conv1d", "conv2d", "conv3d")
_REARRANGING = "flatten reshape view permute transpose clone alias contiguous slice pad".split()


def warn_of_data(data: Any, training: Any, recomputes: bool) -> None:
    """Warn of sources that draw or change their samples.

    Args:
        data: as for `evaluate`, or several data sets by name.
        training: data to recompute norms' statistics from, the name of one, or None for `data`.
        recomputes: whether they are recomputed.
    """
    for source in _sources(data):
        if isinstance(source, DataLoader) and _draws(source.sampler):
            warn(
                f"the DataLoader draws samples with replacement ({type(source.sampler).__name__}): "
                "results are means over that draw, and another call gives others; give one "
                "without a sampler"
            )
        dataset = source.dataset if isinstance(source, DataLoader) else source
        names = _random_transforms(dataset) if isinstance(dataset, Dataset) else []
        if names:
            _warn_of_augmentation(f"transforms its samples at random ({', '.join(names)})")
    if training is None or isinstance(training, str):
        training = data.get(training) if isinstance(data, Mapping) else data
    if recomputes and isinstance(training, DataLoader) and _shuffles(training.sampler):
        warn(
            'buffers="recompute" reads a DataLoader that shuffles: each batch gives one estimate '
            "of the statistics, so another call gives slightly others; give one with shuffle=False"
        )


def watch_draws(batches: Batches, data: Any) -> None:
    """Warn in the pass if a dataset draws random numbers from a global generator when it is read.

    Those that the processes of a DataLoader draw are not seen, nor those of own generators.

    Args:
        batches: of the data.
        data: as the user gives them.
    """
    loads = isinstance(data, DataLoader)
    dataset = data.dataset if loads else data
    if not isinstance(dataset, Dataset) or isinstance(dataset, (IterableDataset, TensorDataset)):
        return
    if not _random_transforms(dataset):  # of which the user was told already
        # A sampler that shuffles draws its seed with the first batch.
        ordered = not loads or isinstance(data.sampler, SequentialSampler)
        batches.watch(_warn_of_draws, 0 if ordered else 1)


def _warn_of_draws() -> None:
    _warn_of_augmentation("draws random numbers when it is read")


def _warn_of_augmentation(what: str) -> None:
    warn(
        f"the dataset {what}: results are for one draw of its samples, and another call gives "
        "others; give the data without augmentation"
    )


def warn_of_pixels(graph: Graph, inputs: Inputs) -> None:
    """Warn of inputs that look like unscaled pictures, and are multiplied by weights at once.

    A network that scales them itself is not warned of.

    Args:
        graph: the captured network.
        inputs: a batch as the user gives it.
    """
    for node, tensor in enumerate(graph.given(inputs)):
        if _looks_unscaled(tensor) and _multiplies_at_once(graph, node):
            warn(
                "the inputs are whole numbers up to 255, as unscaled pixels are, and the network "
                "does not scale them: expected inputs as in its training, such as x / 255"
            )
            return


def _sources(data: Any) -> Iterator[Any]:
    yield from data.values() if isinstance(data, Mapping) else [data]


def _draws(sampler: Any) -> bool:
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)):
        return bool(sampler.replacement)
    return False


def _shuffles(sampler: Any) -> bool:
    return isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))


def _random_transforms(dataset: Any) -> list[str]:
    """Names of transforms that draw, as torchvision and others call theirs, within a dataset."""
    found: list[str] = []
    level = [dataset]
    for _ in range(_LEVELS):
        level = list(itertools.chain.from_iterable(map(_parts, level)))
        found += [type(each).__name__ for each in level]
    return [name for name in dict.fromkeys(found) if _DRAWING.search(name)]


def _parts(value: Any) -> list[Any]:
    """Return what a dataset or a transform is made of: other datasets, and transforms."""
    if isinstance(value, (list, tuple)):
        return list(value[:_PARTS])
    if isinstance(value, nn.Sequential):
        return list(value)
    held = []
    for name, part in getattr(value, "__dict__", {}).items():
        if any(word in name for word in _HOLDERS):
            held.append(part)  # a comprehension would nest
    return held


def _looks_unscaled(tensor: Tensor) -> bool:
    rows = tensor[:_ROWS]
    if not tensor.is_floating_point() or tensor.is_meta or rows[:1].numel() < _PICTURE:
        return False
    low, high = (float(end) for end in rows.aminmax())
    return low >= 0 and _BRIGHT <= high <= 255 and bool((rows == rows.round()).all())


def _multiplies_at_once(graph: Graph, source: int) -> bool:
    """Whether an input goes into a product, rearranged at most."""
    reached = {source}
    for node in graph.nodes:
        if reached.isdisjoint(node.inputs):
            continue
        if node.op in _PRODUCTS:
            return True
        if node.op in _REARRANGING:
            reached.add(node.id)
    return False
