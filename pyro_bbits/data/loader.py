"""Batches from tensors in memory, shuffled and augmented reproducibly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TensorLoader", "crop_at", "mirror"]

PADDING = 4


class TensorLoader:
    """Iterates over images and labels in batches.

    Each pass is one epoch. The order and the augmentation of epoch `k` depend on `seed` and `k` only, not on
    torch's global generator, the device, or what was iterated before. Starting a pass, even one that is left
    early, moves the loader on to the next epoch; `set_epoch` goes to a given one.

    Every row comes once an epoch and the last batch may be smaller. With `shuffle`, a last batch of a single
    row is merged into the batch before it, because batch normalization cannot train on one row; only
    `batch_size=1` or a data set of one row still give such a batch.

    Arguments:
        images: Shape `(N, ...)`; `(N, C, H, W)` if they are augmented.
        labels: Shape `(N,)`.
        batch_size: Rows in a batch.
        shuffle: Whether each epoch has an order of its own; otherwise rows keep their order.
        seed: Seed of the order and of the augmentation.
        augment: Whether images are padded by 4 pixels, cropped at random back to their size, and mirrored
            left to right with probability 1/2. The padding is 0, which is the mean colour, not black, where
            images were normalized by their mean.
        device: Where the tensors are moved to, once; `None` leaves them where they are.
        rank: Number of this process, which gets its part of every batch.
        world_size: Number of processes.

    Raises:
        ValueError: If `batch_size` is below 1, there are no rows, the lengths differ, or images to augment
            are not `(N, C, H, W)`.

    Example:
        >>> loader = TensorLoader(torch.zeros(5, 1, 8, 8), torch.arange(5), batch_size=2)
        >>> [labels.tolist() for _, labels in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        augment: bool = False,
        device: torch.device | str | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_rows(images, labels)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if augment and images.ndim != 4:
            raise ValueError(f"images to augment must have shape (N, C, H, W); got {tuple(images.shape)}.")
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.rank, self.world_size = rank, world_size
        self._epoch = 0

    @property
    def num_data(self) -> int:
        """Number of rows in one epoch, the `N` that scales a batch to the data set."""
        return len(self.labels)

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
        return len(self._sizes())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = _generator(self.seed, self._epoch)
        self._epoch += 1
        return self._batches(generator)

    def _batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order(generator).to(self.labels.device)
        for rows in torch.split(order, self._sizes()):
            images = self.images[rows]
            images = _augment(images, generator) if self.augment else images
            part = slice(*(len(rows) * (self.rank + i) // self.world_size for i in (0, 1)))
            yield images[part], self.labels[rows][part]

    def _order(self, generator: torch.Generator) -> Tensor:
        if self.shuffle:
            return torch.randperm(self.num_data, generator=generator, device="cpu")
        return torch.arange(self.num_data, device="cpu")

    def _sizes(self) -> list[int]:
        full, rest = divmod(self.num_data, self.batch_size)
        sizes = [self.batch_size] * full + ([rest] if rest else [])
        if self.shuffle and rest == 1 and full:
            sizes[-2:] = [self.batch_size + 1]
        return sizes


def crop_at(images: Tensor, top: Tensor, left: Tensor, padding: int = PADDING) -> Tensor:
    """Pad images with zeros on all sides and cut each back to its size at its own place.

    Arguments:
        images: Shape `(N, C, H, W)`.
        top: First padded row that is kept, int64 of shape `(N,)` in `[0, 2 * padding]`; `padding` is centred.
        left: First padded column that is kept, likewise.
        padding: Pixels added on each side.

    Returns:
        The crops, of the shape of `images`.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    image = torch.arange(len(images), device=images.device)[:, None, None]
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


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU so that every device sees the same crops.
    shape = (2, len(images))
    corner = torch.randint(2 * PADDING + 1, shape, generator=generator, device="cpu").to(images.device)
    flipped = torch.randint(2, shape[1:], generator=generator, device="cpu").bool().to(images.device)
    return mirror(crop_at(images, corner[0], corner[1]), flipped)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Hashed to 32 bits, all that torch's CPU generator uses; seed + epoch would make neighbours share epochs.
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _check_rows(images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels):
        raise ValueError(
            f"images and labels must have the same length; got {len(images)} images and {len(labels)} labels."
        )
    if len(labels) == 0:
        raise ValueError("a loader needs at least one row; got none.")
