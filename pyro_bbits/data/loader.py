"""Batches from tensors in memory, shuffled, augmented and shared between processes reproducibly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_bbits.data.crops import PADDING, cut, erase, pad
from pyro_bbits.data.plan import BatchLoader, EpochPlan

__all__ = ["TensorLoader", "check_format"]


class TensorLoader(BatchLoader):
    """Iterates over inputs and targets in batches.

    Each pass is one epoch. The order and the augmentation of epoch `k` depend on `seed` and `k` only, not on
    torch's global generator, the device, the number of processes, or what was iterated before. Starting a pass, even
    one that is left early, moves the loader on to the next epoch; `set_epoch` goes to a given one.

    Rows, order and augmentation live on the device: an epoch copies its order and random numbers there once, and its
    batches are cut, cropped and mirrored there.

    In one process every row comes once an epoch and the last batch may be smaller. With `shuffle`, a last batch of a
    single row is merged into the batch before it, because batch normalization cannot train on one row; only
    `batch_size=1` or a data set of one row still give such a batch. In distributed training each process makes a
    loader with its `rank` and gets its part of every global batch; :class:`~pyro_bbits.data.EpochPlan` says which.

    Arguments:
        inputs: Shape `(N, ...)`; `(N, C, H, W)` if they are augmented.
        targets: Shape `(N, ...)`.
        batch_size: Rows in a batch, over all processes.
        shuffle: Whether each epoch has an order of its own; otherwise rows keep their order.
        seed: Seed of the order and of the augmentation.
        augment: Whether images are padded by `padding` pixels on each side, cropped at random back to their size, and
            mirrored.
        device: Where the tensors are moved to, once; `None` leaves them where they are.
        pad_value: What augmented images are padded with: a number for each channel, such as the value of black,
            `-mean / std`, in images normalized by their mean. `None` pads with 0.
        padding: Pixels added on each side, at least 0.
        mirror: Whether images that are augmented are mirrored left to right with probability 1/2, which digits and
            letters do not bear.
        cutout: Side in pixels of a square that is painted over with `pad_value` in images that are augmented, around a
            random pixel, so that part of it may lie outside; 0 paints none. :func:`~pyro_bbits.data.crops.erase`.
        memory_format: How images lie in memory, in the loader and in its batches: `torch.channels_last`, or
            `torch.contiguous_format`.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If the lengths differ, images to augment or in `channels_last` are not `(N, C, H, W)`, `pad_value`
            has not one number for each channel, or as for :class:`~pyro_bbits.data.EpochPlan`.

    Example:
        >>> loader = TensorLoader(torch.zeros(5, 1, 8, 8), torch.arange(5), batch_size=2)
        >>> [labels.tolist() for _, labels in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        augment: bool = False,
        device: torch.device | str | None = None,
        *,
        pad_value: Sequence[float] | None = None,
        padding: int = PADDING,
        mirror: bool = True,
        cutout: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"inputs and targets must have the same length; got {len(inputs)} inputs and {len(targets)} targets."
            )
        super().__init__(EpochPlan(len(targets), batch_size, shuffle, seed, rank, world_size))
        if augment and inputs.ndim != 4:
            raise ValueError(f"images to augment must have shape (N, C, H, W); got {tuple(inputs.shape)}.")
        if augment and pad_value is not None and len(pad_value) != inputs.shape[1]:
            raise ValueError(
                f"pad_value must hold a number for each of the {inputs.shape[1]} channels; got {len(pad_value)}."
            )
        if padding < 0 or cutout < 0:
            raise ValueError(f"padding and cutout must be at least 0; got {padding=}, {cutout=}.")
        check_format(memory_format, inputs)
        self.memory_format = memory_format
        self.inputs = inputs.to(device)
        if memory_format is torch.channels_last:
            self.inputs = self.inputs.contiguous(memory_format=memory_format)
        self.targets = targets.to(device)
        self.augment = augment
        self.padding, self.mirror, self.cutout = padding, mirror, cutout
        self.pad_value = None if pad_value is None else inputs.new_tensor(pad_value).to(self.inputs.device)
        self._padded: Tensor | None = None
        if self.inputs.device.type != "cpu":
            self.hold_padded()

    def take(
        self, rows: Tensor, variants: Tensor | None, memory_format: torch.memory_format | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of given rows: gathered, cropped and mirrored on the device, without asking the host.

        Arguments:
            rows: Their numbers, int64 of shape `(n,)`, on the device of the loader.
            variants: What :meth:`variants` says of them, of shape `(V, n)` and there too; `None` leaves them as they
                are.
            memory_format: How the inputs lie in memory; `None` for that of the loader.
        """
        inputs = self._plain(rows) if variants is None else self._varied(rows, variants)
        inputs = inputs.contiguous(memory_format=memory_format or self.memory_format)
        return inputs, self.targets.index_select(0, rows)

    def variants(self, epoch: int) -> Tensor | None:
        """What is drawn for each position of an epoch; `None` without augmentation.

        Returns:
            Corner (top, left), mirroring (0 or 1) and, if there is one, the middle (row, column) of the painted square:
            int64 of shape `(V, num_data)`, `V` 3 or 5, drawn on the CPU so that all devices see the same.
        """
        if not self.augment:
            return None
        generator = self.plan.generator(epoch, "augmentation")
        span, (height, width) = 2 * self.padding + 1, self.inputs.shape[2:]
        limits = [span, span, 2 if self.mirror else 1, *((height, width) if self.cutout else ())]
        drawn = [torch.randint(limit, (self.num_data,), generator=generator, device="cpu") for limit in limits]
        return torch.stack(drawn)

    def hold_padded(self) -> None:
        """Pad all rows once, in place of each batch anew; other devices than the CPU do so from the start."""
        if not self.augment or self._padded is not None:
            return
        self._padded = pad(self.inputs, self.padding, self.pad_value)
        height, width = self.inputs.shape[2:]
        inside = self._padded.narrow(1, self.padding, height).narrow(2, self.padding, width)
        self.inputs = inside.movedim(-1, 1)  # a view, so that they are not held twice

    def _plain(self, rows: Tensor) -> Tensor:
        if self.memory_format is torch.channels_last:
            return self.inputs.movedim(1, -1).index_select(0, rows).movedim(-1, 1)
        return self.inputs.index_select(0, rows)

    def _varied(self, rows: Tensor, variants: Tensor) -> Tensor:
        padded = self._padded
        if padded is None:
            padded = pad(self._plain(rows), self.padding, self.pad_value)
            rows = torch.arange(len(rows), device=rows.device)
        images = cut(padded, rows, variants[:2], variants[2].bool(), self.padding)
        return erase(images, variants[3:], self.cutout, self.pad_value) if self.cutout else images

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        device, variants = self.inputs.device, self.variants(epoch)
        order = self.plan.order(epoch).to(device)
        variants = None if variants is None else variants.to(device)
        for low, high in self.plan.parts:
            yield self.take(order[low:high], None if variants is None else variants[:, low:high])


def check_format(memory_format: torch.memory_format, inputs: Tensor) -> None:
    """Refuse a memory format in which batches of these inputs cannot lie.

    Raises:
        ValueError: If it is neither `torch.contiguous_format` nor, for images `(N, C, H, W)`, `torch.channels_last`.
    """
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be torch.contiguous_format or torch.channels_last; got {memory_format}.")
    if memory_format is torch.channels_last and inputs.ndim != 4:
        raise ValueError(f"images in channels_last must have shape (N, C, H, W); got {tuple(inputs.shape)}.")
