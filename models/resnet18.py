"""The ResNet-18 of the ImageNet experiments."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet18"]

Stem = Literal["imagenet", "small"]


class ResNet18(nn.Module):
    """64C7/2 - MP3/2 - four stages of two residual blocks - global average - classes, for the default `width` of 64.

    A block is two 3x3 convolutions, each with batch normalization; what enters it is added to what they make. From the
    second stage on, the first block halves the sides and doubles the channels, and a 1x1 convolution with batch
    normalization brings its input to that shape. At 224x224 one image costs 1 814 073 344 MACs; there are 11 689 512
    parameters. Module paths are torchvision's, so that its published weights load.

    Any image size is taken. With the stem `imagenet` an image of 32x32 pixels has shrunk to 8x8 before the first
    block; `small` is a 3x3 convolution that keeps all pixels.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        width: Channels of the first stage; all other widths are multiples of it.
        stem: The first layer: `imagenet` (7x7, stride 2, then pooling) or `small` (3x3, for small images).

    Raises:
        ValueError: If a count is below 1 or there is no such stem.

    References:
        He, Zhang, Ren, Sun: Deep residual learning for image recognition, 2016, arXiv:1512.03385 (table 1; shortcuts
        of type B).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 1000, width: int = 64, stem: Stem = "imagenet") -> None:
        super().__init__()
        if min(in_channels, num_classes, width) < 1:
            raise ValueError(
                f"ResNet18 needs at least one channel and class; got {in_channels=}, {num_classes=}, {width=}."
            )
        if stem not in get_args(Stem):
            raise ValueError(f"stem must be 'imagenet' or 'small'; got {stem!r}.")
        self.pools = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False) if self.pools else _conv3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_Block(width, width), _Block(width, width))
        self.layer2 = nn.Sequential(_Block(width, 2 * width, 2), _Block(2 * width, 2 * width))
        self.layer3 = nn.Sequential(_Block(2 * width, 4 * width, 2), _Block(4 * width, 4 * width))
        self.layer4 = nn.Sequential(_Block(4 * width, 8 * width, 2), _Block(8 * width, 8 * width))
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Arguments:
            x: Shape `(N, in_channels, height, width)`.

        Returns:
            Logits of shape `(N, num_classes)`.
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.pools else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = _conv3(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _conv3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
