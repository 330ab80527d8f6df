"""Which rows of an epoch form which batch, on one process or shared by several."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BatchLoader", "EpochPlan", "random_state"]


@dataclass(frozen=True)
class EpochPlan:
    """Cuts an epoch into global batches, and each of them into one part per rank.

    The order of epoch `k` depends on `seed` and `k` only. Rank `r` of `world_size` takes the `r`-th run of rows of
    each global batch: the parts of all ranks, one after the other, are the batch that a single process would take.
    So `m` ranks with equal parts and averaged gradients take the steps of one process with `batch_size`.

    Every batch but the last has `batch_size` rows. The last one is cut as follows.

    * With `shuffle` (training), all ranks get parts of one size. If the `t` rows left over do not divide evenly, the
      last `t mod world_size` rows of this epoch's order are left out; the next epoch's order leaves out others.
      Parts of a single row, on which batch normalization cannot train, are avoided by merging a last batch with less
      than two rows per rank into the batch before it.
    * Without (evaluation), no row is left out: the parts differ by at most one row, and ranks for which no row is
      left have one batch less.

    Arguments:
        num_data: Rows of the data set.
        batch_size: Rows of a global batch, over all ranks.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the order.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer rows than ranks, `batch_size` is below 1 or not a multiple of `world_size`, or
            `rank` is not below it.

    Example:
        >>> [EpochPlan(10, 4, rank=rank, world_size=2).parts for rank in range(2)]
        [[(0, 2), (4, 6), (8, 9)], [(2, 4), (6, 8), (9, 10)]]
    """

    num_data: int
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_data < 1:
            raise ValueError("a loader needs at least one row; got none.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, world_size); got rank {self.rank} of world_size {self.world_size}.")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size counts the rows of all {self.world_size} processes and must be a multiple of their "
                f"number; got {self.batch_size}."
            )
        if self.num_data < self.world_size:
            raise ValueError(f"{self.world_size} processes need at least a row each; got {self.num_data}.")

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First and last-plus-one position, in the epoch's order, of each batch of this rank."""
        start, parts = 0, []
        for size in self._sizes():
            share, extra = divmod(size, self.world_size)
            low = start + self.rank * share + min(self.rank, extra)
            high = low + share + (self.rank < extra)
            if high > low:
                parts.append((low, high))
            start += size
        return parts

    def order(self, epoch: int) -> Tensor:
        """Row at each position of an epoch: int64 of shape `(num_data,)` on the CPU."""
        if self.shuffle:
            return torch.randperm(self.num_data, generator=self.generator(epoch), device="cpu")
        return torch.arange(self.num_data, device="cpu")

    def generator(self, epoch: int, purpose: str = "") -> torch.Generator:
        """A generator of this seed and epoch; other purposes have other numbers."""
        return torch.Generator().manual_seed(random_state(self.seed, epoch, *([purpose] if purpose else [])))

    def _sizes(self) -> list[int]:
        """Rows of each global batch."""
        full, rest = divmod(self.num_data, self.batch_size)
        if self.shuffle:
            rest -= rest % self.world_size
            if full and 0 < rest < 2 * self.world_size:
                return [self.batch_size] * (full - 1) + [self.batch_size + rest]
        return [self.batch_size] * full + ([rest] if rest else [])


class BatchLoader(ABC):
    """What the loaders of this package have in common: a pass is an epoch of a plan.

    Starting a pass, even one that is left early, moves the loader on to the next epoch; `set_epoch` goes to a given
    one.

    Arguments:
        plan: Which rows form which batch.
    """

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan
        self._epoch = 0

    @property
    def num_data(self) -> int:
        """Rows of the whole data set, the `N` that scales a batch to it, on every rank."""
        return self.plan.num_data

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next pass gives, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch the next pass gives.

        Arguments:
            epoch: Number of the epoch, from 0.

        Raises:
            ValueError: If it is negative.
        """
        if epoch < 0:
            raise ValueError(f"epochs count from 0; got {epoch}.")
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, on this rank."""
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of inputs and targets."""
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self._batches(epoch)

    @abstractmethod
    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch."""


def random_state(*parts: object) -> int:
    """A seed of 32 bits, all that torch's CPU generator uses, from seed, epoch and whatever else decides.

    Hashed, because in `seed + epoch` neighbouring seeds would share epochs.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")
