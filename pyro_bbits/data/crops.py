"""Shifted and mirrored images, cut from padded ones in one gather."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PADDING", "cut", "pad"]

PADDING = 4


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
