"""Resident batches are those of the loader, taken without a question to the host and without moving the buffers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.data.resident import ResidentBatches

OPTIONS: dict[str, Any] = {"shuffle": True, "seed": 3, "augment": True, "pad_value": (-1.0, 0.5, 2.0), "padding": 2}


def rows(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (size, 3, 6, 8), generator=generator).to(dtype), torch.arange(size)


def epoch_of(batches: ResidentBatches) -> list[tuple[Tensor, Tensor]]:
    batches.begin()
    return [batches.next(size) for size in batches.sizes]


def assert_same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for (x, y), (u, v) in zip(found, expected, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v) and x.stride() == u.stride() and x.dtype == u.dtype


class NoHost(TorchDispatchMode):
    """Refuses what reads a value on the host, or makes a tensor from one: neither can be captured."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "lift_fresh_copy", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("augment", [{"augment": False}, {}, {"mirror": False}, {"cutout": 3}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "shuffle"), [(24, True), (25, True), (30, True), (30, False), (3, True)])
def test_each_epoch_has_the_batches_of_the_loader(
    size: int, shuffle: bool, memory_format: torch.memory_format, augment: dict[str, Any]
) -> None:
    options = OPTIONS | {"shuffle": shuffle, "memory_format": memory_format} | augment
    loader = TensorLoader(*rows(size), 8, **options)
    batches = ResidentBatches(TensorLoader(*rows(size), 8, **options))
    assert len(batches) == len(loader)
    for _ in range(3):
        assert_same(epoch_of(batches), list(loader))
    assert batches.loader.epoch == loader.epoch == 3


def test_any_epoch_can_be_begun_and_begun_anew() -> None:
    loader, batches = (TensorLoader(*rows(20), 8, **OPTIONS) for _ in range(2))
    resident = ResidentBatches(batches)
    loader.set_epoch(7)
    expected = list(loader)
    resident.begin(2)
    resident.next(8)
    resident.begin(7)
    assert_same([resident.next(size) for size in resident.sizes], expected)
    with pytest.raises(ValueError, match="epochs count from 0; got -1"):
        resident.begin(-1)


@pytest.mark.parametrize("size", [24, 29, 30])
def test_ranks_have_their_parts_of_each_batch(size: int) -> None:
    whole = TensorLoader(*rows(size), 8, **OPTIONS)
    parts = [ResidentBatches(TensorLoader(*rows(size), 8, **OPTIONS, rank=r, world_size=2)) for r in range(2)]
    assert parts[0].sizes == parts[1].sizes
    for _ in range(2):
        for (x, y), *given in zip(whole, *map(epoch_of, parts), strict=True):
            kept = len(y) - len(y) % 2
            assert torch.equal(torch.cat([part[0] for part in given]), x[:kept])
            assert torch.equal(torch.cat([part[1] for part in given]), y[:kept])


@pytest.mark.parametrize("augment", [{"augment": False}, {}, {"cutout": 3}])
def test_a_step_asks_the_host_for_nothing_and_the_buffers_stay(augment: dict[str, Any]) -> None:
    batches = ResidentBatches(TensorLoader(*rows(20), 8, **OPTIONS | augment), torch.channels_last)
    held = [batches.order, batches.position] + ([] if batches.variants is None else [batches.variants])
    places = [tensor.data_ptr() for tensor in held]
    for _ in range(2):
        batches.begin()
        with NoHost():
            for size in batches.sizes:
                batches.next(size)
        assert batches.position.item() == 20
    now = [batches.order, batches.position] + ([] if batches.variants is None else [batches.variants])
    assert [tensor.data_ptr() for tensor in now] == places


def test_features_and_real_targets_are_taken_too() -> None:
    loader, same = (TensorLoader(torch.rand(9, 4), torch.rand(9, 2), 4, True) for _ in range(2))
    same.inputs, same.targets = loader.inputs, loader.targets
    assert_same(epoch_of(ResidentBatches(same)), list(loader))


def test_bytes_stay_bytes() -> None:
    options = OPTIONS | {"pad_value": None}
    loader, same = (TensorLoader(*rows(9, torch.uint8), 4, **options) for _ in range(2))
    assert_same(epoch_of(ResidentBatches(same)), list(loader))


def test_positions_can_be_taken_once_more() -> None:
    """The last ten, which lie in two batches, as they were cropped in them."""
    batches = ResidentBatches(TensorLoader(*rows(20), 8, **OPTIONS))
    x, y = (torch.cat(tensors) for tensors in zip(*epoch_of(batches), strict=True))
    position = batches.position.clone()
    again = batches.rows(10, 10)
    assert torch.equal(again[0], x[10:]) and torch.equal(again[1], y[10:])
    assert torch.equal(batches.position, position)
    for first, count in ((11, 10), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"positions 0 to 19; got first={first}, count={count}"):
            batches.rows(first, count)


def test_what_no_batch_has_is_refused() -> None:
    batches = ResidentBatches(TensorLoader(*rows(20), 8, **OPTIONS))
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"a batch has 1 to 8 rows; got {count}"):
            batches.next(count)
    with pytest.raises(ValueError, match=r"channels_last must have shape \(N, C, H, W\)"):
        ResidentBatches(TensorLoader(torch.zeros(4, 2), torch.arange(4)), torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_captured_graph_gives_the_batches_of_every_epoch(memory_format: torch.memory_format) -> None:
    loader, held = (TensorLoader(*rows(40), 8, **OPTIONS, device=device) for device in ("cpu", "cuda"))
    batches = ResidentBatches(held, memory_format)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        batches.begin(0)
        batches.next(8)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = batches.next(8)
    for epoch in range(3):
        batches.begin(epoch)
        for u, v in loader:
            graph.replay()
            assert torch.equal(x.cpu(), u) and torch.equal(y.cpu(), v)
            assert x.is_contiguous(memory_format=memory_format)
