"""Shifted and mirrored images, cut from padded ones in one gather, and images with a part painted over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bbits.settings import Augmentation

__all__ = ["AUGMENTATIONS", "PADDING", "augmentation", "cut", "erase", "pad"]

PADDING = 4

AUGMENTATIONS: Mapping[Augmentation, Mapping[str, Any]] = {
    "none": {"augment": False},
    "crop": {"augment": True, "mirror": False},
    "crop-flip": {"augment": True, "mirror": True},
    "crop-flip-cutout": {"augment": True, "mirror": True, "cutout": True},
}
"""What the names mean, as fields of a data set."""


def augmentation(data: Any) -> str:
    """What the augmentation of a data set is called."""
    if not data.augment:
        return "none"
    parts = {"crop": True, "flip": data.mirror, "cutout": getattr(data, "cutout", False)}
    return "-".join(part for part, there in parts.items() if there)


def pad(images: Tensor, padding: int = PADDING, pad_value: Tensor | None = None) -> Tensor:
    """Images with a border on all sides, channels last, as :func:`cut` takes them.

    Arguments:
        images: Shape `(N, C, H, W)`.
        padding: Pixels added on each side.
        pad_value: Their value for each channel, shape `(C,)`; `None` for 0.

    Returns:
        Shape `(N, H + 2 padding, W + 2 padding, C)`, contiguous.
    """
    count, channels, height, width = images.shape
    padded = images.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
    if pad_value is not None:
        padded += pad_value
    padded[:, padding : padding + height, padding : padding + width] = images.movedim(1, -1)
    return padded


def cut(padded: Tensor, images: Tensor, corners: Tensor, flipped: Tensor, padding: int = PADDING) -> Tensor:
    r"""Cut chosen images back to their size, each at its own place, and mirror some of them left to right.

    Pixel `(i, j)` of a crop with the corner `(top, left)` is pixel `(top + i, left + j)` of the padded image, and
    `(top + i, left + W - 1 - j)` if it is mirrored: one gather, whatever is chosen. Nothing is read on the host.

    Arguments:
        padded: All images with their border, from :func:`pad`.
        images: Number of the image behind each crop, int64 of shape `(n,)`.
        corners: First padded row and column that are kept, int64 of shape `(2, n)` in `[0, 2 padding]`; `padding` is
            centred.
        flipped: Which crops are mirrored, bool of shape `(n,)`.
        padding: Pixels of the border on each side.

    Returns:
        Shape `(n, C, H, W)`, in the memory format channels last.
    """
    height, width = (size - 2 * padding for size in padded.shape[1:3])
    down, right = (torch.arange(size, device=padded.device) for size in (height, width))
    across = torch.where(flipped[:, None], width - 1 - right, right)  # (n, W)
    rows, columns = corners[0, :, None] + down, corners[1, :, None] + across
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def erase(images: Tensor, centres: Tensor, size: int, value: Tensor | None = None) -> Tensor:
    """Paint a square of each image over, so that a network learns not to rely on one part (cutout).

    Row `i` of an image is in its square if `-(size // 2) <= i - centre < size - size // 2`, and columns alike: parts of
    a square that is near the edge lie outside. Nothing is read on the host.

    Arguments:
        images: Shape `(n, C, H, W)`.
        centres: Row and column of each square's middle, int64 of shape `(2, n)`.
        size: Side of the squares, in pixels.
        value: What they are painted with, shape `(C,)`; `None` for 0.

    Returns:
        Shape `(n, C, H, W)`.

    References:
        DeVries and Taylor: Improved regularization of convolutional neural networks with cutout, 2017,
        arXiv:1708.04552.
    """
    along = (
        torch.arange(length, device=images.device) - centre[:, None] + size // 2
        for length, centre in zip(images.shape[2:], centres, strict=True)
    )
    down, across = ((places >= 0) & (places < size) for places in along)
    hole = down[:, None, :, None] & across[:, None, None, :]
    paint = images.new_zeros(()) if value is None else value[:, None, None]
    return torch.where(hole, paint, images)
