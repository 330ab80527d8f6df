"""Batches that are put through the network together where nothing is learned from them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_groups", "in_pairs", "joined_batches"]

JOINED_ROWS = 512
"""No more rows are joined, of however large batches."""


def joined_batches(sizes: Sequence[int], together: int = 2) -> list[range]:
    """Consecutive batches that are put through the network as one, in as few passes as a training step's memory holds.

    A pass without gradients holds the output of one layer beside its input, a training step those of all; so about two
    batches take no more memory than the step did, or one if the step computed in bfloat16.

    Arguments:
        sizes: Rows of each batch.
        together: How many of the largest may be joined.

    Example:
        >>> joined_batches([300, 300, 300, 100])
        [range(0, 1), range(1, 2), range(2, 4)]
        >>> joined_batches([128, 128, 128, 128])
        [range(0, 2), range(2, 4)]
        >>> joined_batches([128, 128, 60, 60], together=1)
        [range(0, 1), range(1, 2), range(2, 4)]
    """
    groups, start, held = [], 0, 0
    most = min(together * max(sizes, default=0), JOINED_ROWS)
    for index, size in enumerate(sizes):
        if index > start and held + size > most:
            groups.append(range(start, index))
            start, held = index, 0
        held += size
    return [*groups, range(start, len(sizes))] if sizes else []


def _joined(batches: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """One batch, if all inputs are tensors with a row for each target; else the batches themselves."""
    if len(batches) == 1:
        return batches
    first_x, first_y = batches[0]
    for x, y in batches:
        if not isinstance(x, Tensor) or len(x) != len(y):
            return batches
        if x.shape[1:] != first_x.shape[1:] or y.shape[1:] != first_y.shape[1:]:
            return batches
    return [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]


def in_groups(batches: list[tuple[Any, Tensor]], together: int = 2) -> Iterator[tuple[Any, Tensor]]:
    """The batches, joined as :func:`joined_batches` says where they fit together."""
    for group in joined_batches([len(y) for _, y in batches], together):
        yield from _joined(batches[group.start : group.stop])


def in_pairs(loader: Iterable[tuple[Any, Tensor]], device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """The batches of a loader, two of them as one where both lie on the device and are small: half the launches.

    Example:
        >>> batches = [(torch.ones(n, 3), torch.ones(n)) for n in (4, 4, 300, 300, 2)]
        >>> [len(y) for _, y in in_pairs(batches, torch.device("cpu"))]
        [8, 300, 300, 2]
    """
    batches = iter(loader)
    for first in batches:
        pair = [first, *islice(batches, 1)]
        there = all(getattr(x, "device", None) == y.device == device for x, y in pair)
        yield from in_groups(pair) if there else pair
