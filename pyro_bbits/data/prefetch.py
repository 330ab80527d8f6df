"""Batches that are on their way to the device while the step before is computed."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["Prefetcher"]


class Prefetcher:
    """Iterates over a loader and hands its batches over on a device, on a GPU with the next one already on its way.

    On a GPU each batch is copied by a stream of its own, from pinned memory, before the batch before it is handed over:
    the copy runs while that one is computed with, and nobody waits for it on the host. The batches, their number and
    their order are the loader's; an exception of the loader comes after the batches before it. On other devices it is
    the plain iteration. What is no tensor passes through.

    The loader is asked for a batch one step early. It must not write to a batch that it gave away, and workers of a
    :class:`~torch.utils.data.DataLoader` are what makes its batches in the meantime.

    Whatever else the loader has (`num_data`, `epoch`, `set_epoch`, `sampler`, `dataset`, ...) it has too.

    Arguments:
        loader: Gives batches: tensors, or tuples, lists and dictionaries of them.
        device: Where they are wanted.

    Example:
        >>> loader = [(torch.zeros(2), "a"), (torch.ones(2), "b")]
        >>> [(x.sum().item(), name) for x, name in Prefetcher(loader, "cpu")]
        [(0.0, 'a'), (2.0, 'b')]
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str) -> None:
        self.loader = loader
        self.device = torch.device(device)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, in a copy under way
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """The batches of the loader, on the device."""
        batches = iter(self.loader)
        return _ahead(batches, _Courier(self.device)) if self.device.type == "cuda" else _plain(batches, self.device)


class _Parcel(NamedTuple):
    """A batch under way, and when it has arrived."""

    batch: Any
    arrived: Any
    sent: list[Tensor]  # those of its tensors that are copied


class _Courier:
    """Copies batches to a GPU on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, batch: Any) -> _Parcel:
        """Start copying what lies in the memory of the host, which goes on meanwhile."""
        sent: list[Tensor] = []

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.device.type != "cpu":
                return leaf
            pinned = leaf if leaf.is_pinned() else leaf.pin_memory()
            sent.append(pinned.to(self.device, non_blocking=True))
            return sent[-1]

        with torch.cuda.stream(self.stream):
            return _Parcel(tree_map(copy, batch), self.stream.record_event(), sent)

    def deliver(self, parcel: _Parcel) -> Any:
        """A batch that the current stream waits for; the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(parcel.arrived)
        for tensor in parcel.sent:
            tensor.record_stream(current)  # or the next copy would take its memory while it is still read
        return _moved(parcel.batch, self.device)


def _ahead(batches: Iterator[Any], courier: _Courier) -> Iterator[Any]:
    """Each batch once the next one is under way; what a loader raises comes when its batch would have."""
    problem, waiting = None, None
    with _closing(batches):
        while True:
            try:
                following = courier.send(next(batches))
            except StopIteration:
                following = None
            except Exception as error:
                following, problem = None, error
            if waiting is not None:
                yield courier.deliver(waiting)
            if following is None:
                break
            waiting = following
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame, and so the iterator and its workers


def _plain(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    with _closing(batches):
        for batch in batches:
            yield _moved(batch, device)


@contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[None]:
    """Let a loader that is a generator clean up at once, also if the iteration is left early."""
    try:
        yield
    finally:
        if isinstance(batches, Generator):
            batches.close()


def _moved(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
