"""The VGG-7 of the CIFAR-10 experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VGG7"]


class VGG7(nn.Module):
    """2x(128C3) - MP2 - 2x(256C3) - MP2 - 2x(512C3) - MP2 - 1024FC - classes, for the default `width` of 128.

    Convolutions have padding 1. Batch normalization follows every convolution and the 1024 linear layer, so
    only the classifier has a bias. At 32x32 one image costs 615 917 568 MACs.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        width: Channels of the first two convolutions; all other widths are multiples of it.
        image_size: Height and width of an image in pixels, at least 8.

    Raises:
        ValueError: If the image is too small to be pooled three times, or another count is below 1.

    References:
        Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition, 2014,
        arXiv:1409.1556.
        van Baalen et al.: Bayesian Bits, 2020, arXiv:2005.07093 (the widths used here).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 128, image_size: int = 32) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"VGG7 needs images of at least 8x8 pixels; got image_size={image_size}.")
        if min(in_channels, num_classes, width) < 1:
            raise ValueError(
                f"VGG7 needs at least one channel and class; got {in_channels=}, {num_classes=}, {width=}."
            )
        self.conv1, self.norm1 = _conv3(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv3(width, width), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = _conv3(width, 2 * width), nn.BatchNorm2d(2 * width)
        self.conv4, self.norm4 = _conv3(2 * width, 2 * width), nn.BatchNorm2d(2 * width)
        self.conv5, self.norm5 = _conv3(2 * width, 4 * width), nn.BatchNorm2d(4 * width)
        self.conv6, self.norm6 = _conv3(4 * width, 4 * width), nn.BatchNorm2d(4 * width)
        self.fc1 = nn.Linear(4 * width * (image_size // 8) ** 2, 8 * width, bias=False)
        self.norm7 = nn.BatchNorm1d(8 * width)
        self.fc2 = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Arguments:
            x: Shape `(N, in_channels, image_size, image_size)`; `N` above 1 in training mode.

        Returns:
            Logits of shape `(N, num_classes)`.
        """
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.norm3(self.conv3(x)))
        x = F.max_pool2d(F.relu(self.norm4(self.conv4(x))), 2)
        x = F.relu(self.norm5(self.conv5(x)))
        x = F.max_pool2d(F.relu(self.norm6(self.conv6(x))), 2)
        x = F.relu(self.norm7(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(x)
        return logits


def _conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
