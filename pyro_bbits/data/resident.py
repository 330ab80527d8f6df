"""Batches of rows that lie on the device, in a form that a CUDA graph can capture."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bbits.data.loader import TensorLoader, check_format

__all__ = ["ResidentBatches"]


class ResidentBatches:
    """The batches of a :class:`~pyro_bbits.data.TensorLoader`, taken by a step that asks the host for nothing.

    The order and the random numbers of an epoch lie in tensors that keep their place in memory. :meth:`begin` writes
    an epoch into them; :meth:`next` gathers the rows at `position` and moves it on, both on the device. A CUDA graph
    that captured `next` therefore gives another batch at each replay, and those of the next epoch after `begin`. The
    batches of epoch `k` are the loader's, row for row and pixel for pixel.

    Once captured, nobody counts: after the last batch of the epoch comes `begin`, not another replay.

    Arguments:
        loader: Whose batches, on the device where they are wanted. Its images are padded once, if they are augmented.
        memory_format: How inputs lie in memory; `None` for that of the loader.

    Attributes:
        order: Row of the data at each position of the epoch, of this rank: int64 of shape `(M,)`.
        variants: What the loader has drawn for it: int64 of shape `(V, M)`; `None` without augmentation.
        position: The next one: int64 without dimensions.
        sizes: Rows of each batch of an epoch, of this rank; all but the last are equal.

    Raises:
        ValueError: If the inputs cannot lie in memory like that.

    Example:
        >>> batches = ResidentBatches(TensorLoader(torch.zeros(5, 2), torch.arange(5), batch_size=2))
        >>> batches.begin()
        >>> [batches.next(rows)[1].tolist() for rows in batches.sizes]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, loader: TensorLoader, memory_format: torch.memory_format | None = None) -> None:
        self.memory_format = loader.memory_format if memory_format is None else memory_format
        check_format(self.memory_format, loader.inputs)
        self.loader, device = loader, loader.inputs.device
        loader.hold_padded()
        parts = loader.plan.parts
        self.sizes = [high - low for low, high in parts]
        # this rank's positions among those of all ranks
        self._kept = torch.cat([torch.arange(low, high, device="cpu") for low, high in parts])
        count = len(self._kept)
        self.order = torch.zeros(count, dtype=torch.int64, device=device)
        drawn = loader.variants(0)
        self.variants = None if drawn is None else torch.zeros(len(drawn), count, dtype=torch.int64, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = torch.arange(max(self.sizes), device=device)

    def __len__(self) -> int:
        """Batches of an epoch, on this rank."""
        return len(self.sizes)

    def begin(self, epoch: int | None = None) -> None:
        """Write an epoch into the tensors, in place, and go to its first position.

        The loader moves on to the epoch after it, as by a pass.

        Arguments:
            epoch: Number of the epoch, from 0; `None` for the one that the loader would give.

        Raises:
            ValueError: If it is negative.
        """
        epoch = self.loader.epoch if epoch is None else epoch
        self.loader.set_epoch(epoch)
        self.order.copy_(self.loader.plan.order(epoch)[self._kept])
        drawn = self.loader.variants(epoch)
        if self.variants is not None and drawn is not None:
            self.variants.copy_(drawn[:, self._kept])
        self.position.zero_()
        self.loader.set_epoch(epoch + 1)

    def next(self, rows: int) -> tuple[Tensor, Tensor]:
        """The inputs and targets at the next positions; `position` moves on.

        Arguments:
            rows: How many, at most `max(sizes)`. The same number in every replay of a graph.

        Raises:
            ValueError: If there are more than in any batch, or none.
        """
        if not 1 <= rows <= len(self._steps):
            raise ValueError(f"a batch has 1 to {len(self._steps)} rows; got {rows}.")
        at = self._steps[:rows] + self.position
        self.position.add_(rows)
        variants = None if self.variants is None else self.variants.index_select(1, at)
        return self.loader.take(self.order.index_select(0, at), variants, self.memory_format)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The inputs and targets at given positions of the epoch, once more; `position` stays.

        Arguments:
            first: The first position, from 0.
            count: How many.

        Raises:
            ValueError: If the epoch does not have them.
        """
        if not 0 <= first < first + count <= len(self.order):
            raise ValueError(f"the epoch has the positions 0 to {len(self.order) - 1}; got {first=}, {count=}.")
        variants = None if self.variants is None else self.variants[:, first : first + count]
        return self.loader.take(self.order[first : first + count], variants, self.memory_format)
