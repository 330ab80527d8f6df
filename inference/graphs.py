"""CUDA graphs of training steps: a step is recorded once, and replayed without Python."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

__all__ = ["CudaGraphs", "Graphs", "NotCapturedError"]


class NotCapturedError(RuntimeError):
    """A step cannot be captured; the message says why."""


class Graphs(Protocol):
    """What records steps and replays them."""

    def working(self) -> Any:
        """A context in which all steps of a run are taken, recorded or not."""

    def rehearse(self, step: Callable[[], None]) -> None:
        """Take a step, and raise a :class:`NotCapturedError` afterwards if it could not be captured."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step without taking it; the result takes it. Raises a :class:`NotCapturedError`."""

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """Start to copy numbers to the host; the result waits for them."""


class CudaGraphs:
    """Records steps in CUDA graphs that share their memory; one of them runs at a time.

    Arguments:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._living: WeakSet[Any] = WeakSet()

    @contextmanager
    def working(self) -> Iterator[None]:
        """All work on the stream that steps are recorded on: gradients stay on the stream they were first made on."""
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    def rehearse(self, step: Callable[[], None]) -> None:
        """Take a step while PyTorch watches for reads on the host, which a graph cannot hold.

        Raises:
            NotCapturedError: If there was one; it names the place.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        reads = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if other not in reads and not str(other.message).startswith("Synchronization debug mode"):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if reads:
            raise NotCapturedError(f"{reads[0].filename}:{reads[0].lineno} waits for the GPU")

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step in a graph; nothing is computed yet.

        Raises:
            NotCapturedError: If PyTorch or CUDA refuses.
        """
        state = torch.cuda.get_rng_state(self.device)
        graph = torch.cuda.CUDAGraph()
        if not self._living:  # memory that graphs have left behind cannot be shared any more
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                step()
        except BaseException as error:
            torch.cuda.synchronize(self.device)
            _end_allocation(self.device, self._pool)
            _renew_generator(self.device, state)
            if not isinstance(error, Exception):
                raise
            cause = _first(error)
            raise NotCapturedError(" ".join(f"{type(cause).__name__}: {cause}".split())[:300]) from error
        self._living.add(graph)
        return graph.replay

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """Start to copy numbers to pinned memory of the host; the result waits for them."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.current_stream(self.device).record_event()

        def read() -> list[float]:
            copied.synchronize()
            return host.tolist()

        return read


def _first(error: BaseException) -> BaseException:
    """What went wrong first: a capture cannot be ended after an error, and says so in its place."""
    return error if error.__context__ is None else _first(error.__context__)


def _end_allocation(device: torch.device, pool: Any) -> None:
    """Tell the allocator that a capture is over, which a broken one does not do.

    As long as it takes one to be under way, memory that several streams have used is never free again.
    """
    try:
        torch._C._cuda_endAllocateToPool(_index(device), pool)
    except RuntimeError:  # it knows, and the graph gives the memory back
        return
    torch._C._cuda_releasePool(_index(device), pool)


def _renew_generator(device: torch.device, state: Tensor) -> None:
    """Put a fresh state behind the default generator: a capture that failed leaves the old one unusable."""
    fresh = torch.Generator(device)
    fresh.set_state(state)
    torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ].graphsafe_set_state(fresh)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
