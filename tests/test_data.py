"""Any source gives the same rows in order, in batches of the requested size, never whole."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from data_cases import INPUTS, TARGETS, Lists, N, Samples
from modeconn.data.batches import Batches, as_batches
from modeconn.data.datasets import Images
from refused import refused


class Stream(IterableDataset):
    """The same samples, one after the other."""

    def __iter__(self):
        return iter([(INPUTS[i], int(TARGETS[i])) for i in range(N)])


def stored(folder: Path) -> tuple[np.memmap, np.memmap]:
    """Memory maps of the inputs and the targets."""
    np.save(folder / "x.npy", INPUTS.numpy())
    np.save(folder / "y.npy", TARGETS.numpy())
    return np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy", mmap_mode="r")


def mapped(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory-mapped torch tensors."""
    torch.save((INPUTS, TARGETS), folder / "data.pt")
    return torch.load(folder / "data.pt", mmap=True)


def images(folder: Path) -> Images:
    pixels = INPUTS.reshape(N, 1, 2, 3)
    return Images(
        pixels, TARGETS, name="x", split="train", classes=[str(i) for i in range(N)], scale=1.0
    )


SOURCES = {
    "tensors": lambda folder: (INPUTS, TARGETS),
    "list of tensors": lambda folder: [INPUTS, TARGETS],
    "strided tensors": lambda folder: (
        INPUTS.mT.contiguous().mT,
        TARGETS.repeat_interleave(2)[::2],
    ),
    "arrays": lambda folder: (INPUTS.numpy(), TARGETS.numpy()),
    "tensor and array": lambda folder: (INPUTS, TARGETS.numpy()),
    "reversed array": lambda folder: (
        np.flip(np.flip(INPUTS.numpy(), 0).copy(), 0),
        TARGETS.numpy(),
    ),
    "big-endian array": lambda folder: (
        INPUTS.numpy().astype(">f4"),
        TARGETS.numpy().astype(">i8"),
    ),
    "memory maps": stored,
    "views of memory maps": lambda folder: tuple(np.asarray(part)[:] for part in stored(folder)),
    "mapped tensors": mapped,
    "images": images,
    "TensorDataset": lambda folder: TensorDataset(INPUTS, TARGETS),
    "Dataset": lambda folder: Samples(),
    "Subset": lambda folder: Subset(Samples(), range(N)),
    "IterableDataset": lambda folder: Stream(),
    "DataLoader": lambda folder: DataLoader(Samples(), batch_size=5),
    "DataLoader of a stream": lambda folder: DataLoader(Stream(), batch_size=4),
    "list of batches": lambda folder: list(DataLoader(Samples(), batch_size=5)),
    "list of one batch": lambda folder: [(INPUTS, TARGETS)],
    "batches of arrays": lambda folder: [
        (INPUTS[:9].numpy(), TARGETS[:9]),
        (INPUTS[9:], TARGETS[9:].numpy()),
    ],
    "empty batches between": lambda folder: [
        (INPUTS[a:b], TARGETS[a:b]) for a, b in ((0, 0), (0, 9), (9, 9), (9, N))
    ],
    "iterable": lambda folder: Lists(),
    "generator": lambda folder: ((INPUTS[i : i + 3], TARGETS[i : i + 3]) for i in range(0, N, 3)),
}


def check_pass(batches: Batches, size: int, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """One pass gives these rows, in this order, in batches of this size."""
    given = [(x.clone(), y.clone()) for x, y in batches]
    assert [len(y) for _, y in given[:-1]] == [size] * (len(given) - 1)
    assert 1 <= len(given[-1][1]) <= size
    for part, expected in enumerate((inputs, targets)):
        found = torch.cat([batch[part] for batch in given])
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 4, 5, N, 1000])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_rows(tmp_path: Path, name: str, size: int):
    data = SOURCES[name](tmp_path)
    batches = as_batches(data, size)
    inputs = INPUTS[:, None] if name == "images" else INPUTS
    check_pass(batches, size, inputs, TARGETS)
    assert batches.samples == N
    assert batches.passes == 1
    if name == "generator":
        with refused("iterator can be read only once", "second pass", "DataLoader"):
            next(iter(batches))
    else:
        check_pass(batches, size, inputs, TARGETS)
        assert batches.passes == 2


@hypothesis.given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    size=st.integers(1, 50),
    reuse=st.booleans(),
)
def test_the_sources_batches_make_no_difference(cuts: list[int], size: int, reuse: bool):
    """Any cut of the rows into batches, also where each overwrites the one before in memory."""
    total = sum(cuts)
    inputs, targets = torch.arange(2.0 * total).reshape(total, 2), torch.arange(total)
    buffers = torch.empty(max(cuts), 2), torch.empty(max(cuts), dtype=torch.int64)

    def pieces():
        start = 0
        for rows in cuts:
            pair = inputs[start : start + rows], targets[start : start + rows]
            start += rows
            if reuse:
                pair = tuple(
                    buffer[:rows].copy_(part) for buffer, part in zip(buffers, pair, strict=True)
                )
            yield pair

    check_pass(as_batches(pieces(), size), size, inputs, targets)


# -------------------------------------------------------------------------------------------
# attributes


@pytest.mark.filterwarnings("ignore:the DataLoader leaves out the last 3 of 23 samples")
@pytest.mark.parametrize(
    ("data", "samples"),
    [
        ((INPUTS, TARGETS), N),
        (Samples(), N),
        (DataLoader(Samples(), batch_size=5), N),
        (DataLoader(Samples(), batch_size=5, drop_last=True), 20),
        (DataLoader(Samples(), batch_size=5, sampler=range(0, N, 2)), 12),
        (DataLoader(Samples(), batch_sampler=[[0, 1], [2]]), None),
        (DataLoader([(INPUTS, TARGETS)], batch_size=None), None),
        (DataLoader(Stream(), batch_size=4), None),
        (Stream(), None),
        ([(INPUTS, TARGETS)], None),
    ],
)
def test_samples_are_known_before_the_pass_where_the_source_tells(
    data: object, samples: int | None
):
    batches = as_batches(data, 4)
    assert batches.samples == samples
    seen = sum(len(targets) for _, targets in batches)
    assert batches.samples == seen
    assert samples in (None, seen)


def test_samples_that_a_loader_drops_are_warned_of():
    with pytest.warns(UserWarning, match="leaves out the last 3 of 23 samples"):
        as_batches(DataLoader(Samples(), batch_size=5, drop_last=True), 4)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_targets_in_a_dict_go_by_their_usual_names(key: str):
    for data in ({"x": INPUTS, key: TARGETS}, [{"x": INPUTS, key: TARGETS}]):
        ((inputs, targets),) = as_batches(data, N)
        assert [*inputs] == ["x"] and targets is not None
        torch.testing.assert_close(targets, torch.as_tensor(TARGETS))
    ((inputs, _),) = as_batches({"label": INPUTS, "labels": TARGETS}, N)
    assert [*inputs] == ["label"]


def test_a_pass_counts_when_it_begins():
    batches = as_batches((INPUTS, TARGETS), 4)
    assert batches.passes == 0
    next(iter(batches))
    assert batches.passes == 1
    assert sum(len(targets) for _, targets in batches) == N
    assert batches.passes == 2


def test_batches_stay_what_they_are():
    batches = as_batches((INPUTS, TARGETS), 4)
    assert as_batches(batches, 9) is batches
    assert batches.batch_size == 4


def test_order_and_randomness_are_the_users():
    """A shuffling loader is used as it is; a Dataset is read in order, without random numbers."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_pass(as_batches(Samples(), 4), 4, INPUTS, TARGETS)
    assert torch.equal(torch.get_rng_state(), before)
    loader = DataLoader(
        Samples(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    found = torch.cat([targets for _, targets in as_batches(loader, 4)])
    assert not torch.equal(found, TARGETS)
    assert torch.equal(found.sort().values, TARGETS)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_dtype_and_device_stay(dtype: torch.dtype):
    for device in ("cpu", "meta"):
        inputs = INPUTS.to(device, dtype)
        for data in ((inputs, TARGETS), [(inputs[:9], TARGETS[:9]), (inputs[9:], TARGETS[9:])]):
            for x, y in as_batches(data, 4):
                assert (x.dtype, x.device.type) == (dtype, device)
                assert (y.dtype, y.device.type) == (torch.int64, "cpu")


# ---------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize(
    "data", [(INPUTS, TARGETS), (INPUTS.numpy(), TARGETS.numpy()), [(INPUTS, TARGETS)]]
)
def test_full_batches_share_the_sources_memory(data: object):
    for i, (inputs, targets) in zip(range(N // 4), as_batches(data, 4), strict=False):
        assert inputs.data_ptr() == INPUTS[4 * i :].data_ptr()
        assert targets.data_ptr() == TARGETS[4 * i :].data_ptr()


class Watched(np.memmap):
    """A memory map that remembers its longest slice, and refuses to be read in one go."""

    longest = 0

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if isinstance(index, slice):
            Watched.longest = max(Watched.longest, len(part))
        return part

    def __array__(self, *args, **kwargs):
        pytest.fail("the whole map was read")


def test_a_memory_map_is_read_slice_by_slice(tmp_path: Path):
    rows, size = 1000, 10
    np.arange(rows * 8, dtype=np.float32).tofile(tmp_path / "x.bin")
    inputs = Watched(tmp_path / "x.bin", np.float32, "r", shape=(rows, 8))
    batches = as_batches((inputs, np.arange(rows)), size)
    assert sum(float(x.double().sum()) for x, _ in batches) == sum(range(rows * 8))
    assert Watched.longest == size


def resident() -> int:
    """This process's resident bytes, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc (Linux)"
)
@pytest.mark.parametrize("view", [lambda map_: map_, lambda map_: map_[:, 1:], np.asarray])
def test_a_long_memory_map_does_not_fill_the_memory(tmp_path: Path, view):
    rows, width, size = 1 << 15, 1024, 256  # 128 MiB in batches of 1 MiB
    whole, batch = rows * width * 4, size * width * 4
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (rows, width)).flush()
    inputs = view(np.load(tmp_path / "x.npy", mmap_mode="r"))
    batches = as_batches((inputs, np.zeros(rows, np.int64)), size)
    next(iter(batches))
    before, peak = resident(), 0
    tracemalloc.start()
    for x, _ in batches:
        assert not x.any()
        peak = max(peak, resident() - before)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert allocated < 4 * batch
    assert peak < whole / 4


def test_a_private_map_keeps_its_changes(tmp_path: Path):
    """Pages of a copy-on-write map hold what the user wrote: they are not given back."""
    np.zeros((4096, 4), np.float32).tofile(tmp_path / "x.bin")
    inputs = np.memmap(tmp_path / "x.bin", np.float32, "c", shape=(4096, 4))
    inputs[:] = 7
    batches = as_batches((inputs, np.zeros(4096)), 1024)
    for _ in range(2):
        assert all((x == 7).all() for x, _ in batches)


def test_a_writable_map_keeps_its_changes(tmp_path: Path):
    np.zeros((4096, 4), np.float32).tofile(tmp_path / "x.bin")
    inputs = np.memmap(tmp_path / "x.bin", np.float32, "r+", shape=(4096, 4))
    inputs[:] = 7
    batches = as_batches((inputs, np.zeros(4096)), 1024)
    for _ in range(2):
        assert all((x == 7).all() for x, _ in batches)
    assert (np.fromfile(tmp_path / "x.bin", np.float32) == 7).all()


@pytest.mark.parametrize(("rows", "size"), [(10, 100), (100, 10), (30, 20), (7, 7)])
def test_about_two_of_the_sources_batches_live_at_a_time(rows: int, size: int):
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    def pieces():
        nonlocal most
        for _ in range(20):
            inputs = torch.zeros(rows, 3)
            alive.add(inputs.untyped_storage())
            most = max(most, sum(1 for _ in alive))
            yield inputs, torch.zeros(rows)

    gc.disable()  # reference counts alone must do
    try:
        assert sum(len(targets) for _, targets in as_batches(pieces(), size)) == 20 * rows
    finally:
        gc.enable()
    assert most <= 3
