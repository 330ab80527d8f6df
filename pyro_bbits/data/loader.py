"""Batches from tensors in memory, shuffled, augmented and shared between processes reproducibly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_bbits.data.plan import BatchLoader, EpochPlan

__all__ = ["TensorLoader", "crop_at", "mirror"]

PADDING = 4


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
            mirrored left to right with probability 1/2.
        device: Where the tensors are moved to, once; `None` leaves them where they are.
        pad_value: What augmented images are padded with: a number for each channel, such as the value of black,
            `-mean / std`, in images normalized by their mean. `None` pads with 0.
        padding: Pixels added on each side, at least 0.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If the lengths differ, images to augment are not `(N, C, H, W)`, `pad_value` has not one
            number for each channel, or as for :class:`~pyro_bbits.data.EpochPlan`.

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
        if padding < 0:
            raise ValueError(f"padding must be at least 0; got {padding}.")
        self.inputs = inputs.to(device)
        self.targets = targets.to(device)
        self.augment = augment
        self.padding = padding
        self.pad_value = None if pad_value is None else inputs.new_tensor(pad_value).to(self.inputs.device)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.plan.order(epoch).to(self.inputs.device)
        variants = self._variants(epoch).to(self.inputs.device) if self.augment else None
        for low, high in self.plan.parts:
            rows = order[low:high]
            inputs = self.inputs[rows]
            if variants is not None:
                top, left, flipped = variants[:, low:high]
                inputs = mirror(crop_at(inputs, top, left, self.padding, self.pad_value), flipped.bool())
            yield inputs, self.targets[rows]

    def _variants(self, epoch: int) -> Tensor:
        """Corner and mirroring at each position of an epoch; drawn on the CPU so that all devices see the same."""
        generator = self.plan.generator(epoch, "augmentation")
        corners = torch.randint(2 * self.padding + 1, (2, self.num_data), generator=generator, device="cpu")
        return torch.cat([corners, torch.randint(2, (1, self.num_data), generator=generator, device="cpu")])


def crop_at(
    images: Tensor, top: Tensor, left: Tensor, padding: int = PADDING, pad_value: Tensor | None = None
) -> Tensor:
    """Pad images on all sides and cut each back to its size at its own place.

    Arguments:
        images: Shape `(N, C, H, W)`.
        top: First padded row that is kept, int64 of shape `(N,)` in `[0, 2 * padding]`; `padding` is centred.
        left: First padded column that is kept, likewise.
        padding: Pixels added on each side.
        pad_value: Their value for each channel, shape `(C,)`; `None` for 0.

    Returns:
        The crops, of the shape of `images`.
    """
    count, channels, height, width = images.shape
    padded = images.new_zeros(count, channels, height + 2 * padding, width + 2 * padding)
    if pad_value is not None:
        padded += pad_value[:, None, None]
    padded[..., padding : padding + height, padding : padding + width] = images
    image = torch.arange(count, device=images.device)[:, None, None]
    rows = top[:, None] + torch.arange(height, device=images.device)  # (N, H)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (N, W)
    crops = padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return crops.movedim(-1, 1).contiguous()


def mirror(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Arguments:
        images: Shape `(N, C, H, W)`.
        flipped: Which images to mirror, bool of shape `(N,)`.

    Returns:
        The images, of the same shape.
    """
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)
