"""A small network for the 8x8 digits, which trains in seconds on a CPU."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DigitsNet"]


class DigitsNet(nn.Module):
    """32C3 - 64C3 - MP2 - 64C3 - MP2 - 128FC - classes, for images of 8x8 pixels.

    Convolutions have padding 1, no bias, and batch normalization. One image costs 1 821 952 MACs with one
    channel and ten classes.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.

    Raises:
        ValueError: If a count is below 1.
    """

    image_size: ClassVar[int] = 8

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        if min(in_channels, num_classes) < 1:
            raise ValueError(f"DigitsNet needs at least one channel and class; got {in_channels=}, {num_classes=}.")
        self.conv1, self.norm1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(64 * 2 * 2, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Arguments:
            x: Shape `(N, in_channels, 8, 8)`.

        Returns:
            Logits of shape `(N, num_classes)`.
        """
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
