"""How long a call takes, and how much memory: medians over bursts, all candidates in turn, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Timing", "captured", "clock", "copy_bandwidth", "peak_mb", "time_interleaved"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, smallest and largest of several bursts."""

    ms: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Timing":
        """Summarize the milliseconds per call of each burst."""
        return cls(statistics.median(values), min(values), max(values))


def clock(device: torch.device) -> float:
    """Seconds on a clock that has waited for everything queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_interleaved(
    calls: Mapping[str, Call], device: torch.device, *, bursts: int = 7, seconds: float = 0.1, warm: int = 3
) -> dict[str, Timing]:
    """Time several calls in turn, A, B, A, B, ..., so that drift of clocks and temperature meets all of them.

    On a GPU bursts are timed by events on the device, on a CPU by the wall clock.

    Arguments:
        calls: What to time, by name.
        device: Where it runs.
        bursts: Bursts of each call; the median is over them.
        seconds: About how long one burst lasts; it holds at least one call.
        warm: Calls of each before the first burst.
    """
    for call in calls.values():
        for _ in range(warm):
            call()
    sizes = {name: _burst_size(call, device, seconds) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(bursts):
        for name, call in calls.items():
            taken[name].append(_burst(call, sizes[name], device))
    return {name: Timing.of(values) for name, values in taken.items()}


def _burst_size(call: Call, device: torch.device, seconds: float) -> int:
    start = clock(device)
    call()
    return max(1, int(seconds / max(clock(device) - start, 1e-6)))


def _burst(call: Call, count: int, device: torch.device) -> float:
    """Milliseconds per call over `count` calls."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - start) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / count


def captured(call: Call) -> Call:
    """The kernels of a call as a replay of one CUDA graph; its inputs and outputs stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mb(call: Call, device: torch.device) -> float | None:
    """Most memory that a call holds above what is held before it, in MB; None on a CPU, which does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def copy_bandwidth(device: torch.device, elements: int, *, bursts: int = 7) -> float:
    """Bytes per second that a copy of so many float32 numbers reads and writes."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, device, bursts=bursts)["copy"]
    return 2 * source.nbytes / (timing.ms / 1e3)
