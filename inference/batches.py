"""Where the batches of a captured step come from: tensors that keep their place in memory."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pyro_bbits.data import TensorLoader
from pyro_bbits.data.prefetch import Prefetcher
from pyro_bbits.data.resident import ResidentBatches
from pyro_bbits.inference.joining import joined_batches
from pyro_bbits.inference.norms import RecentBatches, recent_batches

__all__ = ["BatchSource", "ResidentSource", "StreamedSource", "batch_source"]

Check = Callable[[Any, Tensor], None]

MOST_KINDS = 8
"""Kinds of batches that get memory of their own, and so a graph; further ones pass through."""

CHECKED_ROWS = 1000
"""Rows that lie on the device and are looked at together, after the first batch."""


class BatchSource(Protocol):
    """Gives the batches of an epoch to a step that a graph may hold."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def begin(self, check: Check | None) -> Iterator[Hashable]:
        """Go through an epoch: yields the kind of each batch once it can be taken; equal kinds, equal graphs.

        A batch of kind None lies somewhere else each time, and has no graph.
        """

    def take(self, kind: Hashable) -> tuple[Any, Tensor]:
        """The batch that was announced; part of the step, and so asks the host for nothing."""

    def recent(self) -> Iterable[tuple[Any, Tensor]]:
        """The last samples of the epoch, for statistics."""


class ResidentSource:
    """Batches gathered and augmented on the device, within the step.

    Arguments:
        loader: Its rows lie on the device.
        samples: How many samples are recent.
        memory_format: How images lie in memory; None for that of the loader.
        together: How many of the recent batches are given out as one.
    """

    def __init__(
        self,
        loader: TensorLoader,
        samples: int,
        memory_format: torch.memory_format | None = None,
        together: int = 2,
    ) -> None:
        self.loader, self.samples, self.together = loader, samples, together
        self.batches = ResidentBatches(loader, memory_format)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.batches)

    def begin(self, check: Check | None) -> Iterator[Hashable]:
        """Write the epoch's order to the device; a check sees all rows once, first as many as in a batch."""
        if check is not None:
            # the network sees the first part, which takes no more memory than a step
            ends = tuple(range(max(self.batches.sizes), len(self.loader.targets), CHECKED_ROWS))
            parts = (rows.tensor_split(ends) for rows in (self.loader.inputs, self.loader.targets))
            for x, y in zip(*parts, strict=True):
                check(x, y)
        self.batches.begin()
        yield from self.batches.sizes

    def take(self, kind: Hashable) -> tuple[Tensor, Tensor]:
        """The rows at the present position, which moves on."""
        assert isinstance(kind, int)
        return self.batches.next(kind)

    def recent(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The last batches of the epoch, joined."""
        sizes = self.batches.sizes
        last = sizes[len(sizes) - recent_batches(sizes, self.samples) :]
        first = sum(sizes) - sum(last)
        for group in joined_batches(last, self.together):
            rows = sum(last[group.start : group.stop])
            yield self.batches.rows(first, rows)
            first += rows


class StreamedSource:
    """Batches of any loader, each copied into tensors that keep their place; the next one is already on its way.

    Of the first kinds of batches, that is: where there are ever new ones, as with names of files in them, the others
    are handed over as they come.

    Arguments:
        loader: Gives batches `(x, y)`.
        device: Where they are wanted.
        samples: How many samples are recent.
        together: How many of the recent batches are given out as one.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, samples: int, together: int = 2) -> None:
        self.loader = Prefetcher(loader, device)
        self._held: dict[Hashable, tuple[Any, Tensor]] = {}
        self._passing: tuple[Any, Tensor] | None = None
        self._recent = RecentBatches(samples, together)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)

    def begin(self, check: Check | None) -> Iterator[Hashable]:
        """Go through the loader; a check sees each batch before it is taken."""
        self._recent = RecentBatches(self._recent.samples, self._recent.together)
        for x, y in self.loader:
            if check is not None:
                check(x, y)
            self._recent.add(x, y)
            yield self._hold(x, y)
        self._passing = None

    def _hold(self, x: Any, y: Tensor) -> Hashable:
        kind = batch_signature(x, y)
        if kind in self._held:
            _copy_into(self._held[kind], (x, y))
        elif len(self._held) < MOST_KINDS:
            self._held[kind] = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (x, y))
        else:
            self._passing = x, y
            return None
        return kind

    def take(self, kind: Hashable) -> tuple[Any, Tensor]:
        """The tensors that hold batches of this kind."""
        if kind is None:
            assert self._passing is not None
            return self._passing
        return self._held[kind]

    def recent(self) -> Iterable[tuple[Any, Tensor]]:
        """The last batches."""
        return self._recent


def batch_signature(x: Any, y: Tensor) -> Hashable:
    """What two batches must share for one captured step: structure, shapes, strides, types, and all that is no tensor.

    Example:
        >>> batch_signature(torch.ones(2), torch.ones(1)) == batch_signature(torch.zeros(2), torch.zeros(1))
        True
    """
    leaves, structure = tree_flatten((x, y))
    return str(structure), tuple(
        (tuple(t.shape), t.stride(), t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves
    )


def _copy_into(held: Any, batch: Any) -> None:
    for target, source in zip(tree_flatten(held)[0], tree_flatten(batch)[0], strict=True):
        if isinstance(target, Tensor):
            target.copy_(source, non_blocking=True)


def batch_source(
    loader: Iterable[Any],
    device: torch.device,
    samples: int,
    memory_format: torch.memory_format | None = None,
    together: int = 2,
) -> BatchSource:
    """The source for a loader: rows that lie on the device are gathered there, others are streamed.

    Arguments:
        loader: The loader.
        device: Where batches are wanted.
        samples: How many samples are recent.
        memory_format: How images that lie on the device are gathered.
        together: How many of the recent batches are given out as one.
    """
    if isinstance(loader, TensorLoader) and loader.inputs.device == device == loader.targets.device:
        return ResidentSource(loader, samples, memory_format if loader.inputs.dim() == 4 else None, together)
    return StreamedSource(loader, device, samples, together)
