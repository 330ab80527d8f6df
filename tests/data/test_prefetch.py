"""A prefetcher changes when batches are copied, and neither what comes nor in which order."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_bbits.data import prefetch
from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.data.prefetch import Prefetcher

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


class Log:
    """Stands for the copying stream, and writes down what happens in which order."""

    def __init__(self, *_: Any) -> None:
        self.events = list[str]()

    def send(self, batch: Any) -> Any:
        self.events.append(f"send {batch}")
        return batch

    def deliver(self, batch: Any) -> Any:
        self.events.append(f"deliver {batch}")
        return batch


class Loader:
    """Gives the numbers below `count`, then raises if told to; says when it is closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.closed = count, error, 0

    def __iter__(self) -> Iterator[int]:
        try:
            yield from range(self.count)
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1

    def __len__(self) -> int:
        return self.count


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(prefetch, "_Courier", lambda device: log)
    return log


def test_the_next_batch_is_sent_before_one_is_handed_over(log: Log) -> None:
    for batch in Prefetcher(Loader(3), "cuda"):
        log.events.append(f"step {batch}")
    expected = ["send 0", "send 1", "deliver 0", "step 0", "send 2", "deliver 1", "step 1", "deliver 2", "step 2"]
    assert log.events == expected


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_batches_come_in_order_each_pass(log: Log, device: str, count: int) -> None:
    loader = Loader(count)
    prefetcher = Prefetcher(loader, device)
    assert len(prefetcher) == count
    assert list(prefetcher) == list(prefetcher) == list(range(count))
    assert loader.closed == 2


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_exception_comes_after_the_batches_before_it(log: Log, device: str, count: int) -> None:
    loader = Loader(count, KeyError("broken"))
    iteration = iter(Prefetcher(loader, device))
    assert [next(iteration) for _ in range(count)] == list(range(count))
    with pytest.raises(KeyError, match="broken") as caught:
        next(iteration)
    assert caught.value is loader.error and loader.closed == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_leaving_early_closes_the_loader(log: Log, device: str) -> None:
    loader = Loader(5)
    iteration = iter(Prefetcher(loader, device))
    assert next(iteration) == 0
    assert loader.closed == 0
    iteration.close()  # type: ignore[attr-defined]
    assert loader.closed == 1
    assert list(Prefetcher(loader, device)) == list(range(5))


class Pair(NamedTuple):
    x: Tensor
    name: str


@pytest.mark.parametrize("device", DEVICES)
def test_structures_are_kept_and_other_things_pass_through(device: str) -> None:
    marker = object()
    batches: list[Any] = [
        torch.arange(3),
        (torch.zeros(2, 3), [torch.ones(1), "text"]),
        {"ids": torch.arange(4), "mask": {"inner": torch.ones(2, dtype=torch.bool)}, "note": marker, "none": None},
        Pair(torch.full((2,), 7.0), "named"),
        torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ]
    found = list(Prefetcher(batches, device))
    assert found[0].tolist() == [0, 1, 2] and found[0].device.type == device
    assert found[1][0].shape == (2, 3) and found[1][1][1] == "text" and isinstance(found[1], tuple)
    assert found[2]["note"] is marker and found[2]["none"] is None
    assert found[2]["mask"]["inner"].device.type == device
    assert isinstance(found[3], Pair) and found[3].x.tolist() == [7.0, 7.0] and found[3].name == "named"
    assert torch.equal(found[4].cpu(), batches[4]) and found[4].is_contiguous(memory_format=torch.channels_last)


def test_what_the_loader_has_the_prefetcher_has() -> None:
    loader = TensorLoader(torch.arange(10), torch.arange(10), 4, shuffle=True)
    prefetcher = Prefetcher(loader, "cpu")
    assert (len(prefetcher), prefetcher.num_data, prefetcher.epoch) == (3, 10, 0)
    first = [y.tolist() for _, y in prefetcher]
    assert prefetcher.epoch == loader.epoch == 1
    prefetcher.set_epoch(0)
    assert [y.tolist() for _, y in prefetcher] == first
    assert not hasattr(prefetcher, "sampler")
    with pytest.raises(TypeError, match="len"):
        len(Prefetcher(iter([1]), "cpu"))


def test_samplers_and_data_sets_are_those_of_the_loader() -> None:
    data = TensorDataset(torch.arange(8))
    sampler: Any = DistributedSampler(data, 2, 0, shuffle=True)
    loader = DataLoader(data, 2, sampler=sampler)
    prefetcher = Prefetcher(loader, "cpu")
    assert prefetcher.dataset is data and prefetcher.sampler is sampler
    prefetcher.sampler.set_epoch(3)
    assert torch.equal(*(torch.cat([x for (x,) in batches]) for batches in (prefetcher, loader)))


@needs_gpu
def test_batches_arrive_whole_while_the_gpu_is_busy() -> None:
    """Long steps on the batch before, which is let go of at once: neither stream takes the other's memory."""
    batches = [torch.full((1 << 20,), float(i)) for i in range(40)]
    busy, totals = torch.rand(2048, 2048, device="cuda"), []
    for batch in Prefetcher(batches, "cuda"):
        for _ in range(5):
            busy = torch.tanh(busy @ busy)
        totals.append(batch.aminmax())
    assert [(low.item(), high.item()) for low, high in totals] == [(float(i), float(i)) for i in range(40)]
