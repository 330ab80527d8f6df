"""The ResNet-20 of the CIFAR experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet20"]


class ResNet20(nn.Module):
    """16C3 - three stages of three residual blocks - global average - classes, for the default `width` of 16.

    A block is two 3x3 convolutions, each with batch normalization; what enters it is added to what they make. The
    first blocks of the second and third stage halve the sides and double the channels: there the sum gets every second
    pixel, and zeros for the new channels, so that shortcuts have no weights. At 32x32 one image costs 40 551 040 MACs;
    there are 269 722 parameters.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        width: Channels of the first stage; all other widths are multiples of it.

    Raises:
        ValueError: If a count is below 1.

    References:
        He, Zhang, Ren, Sun: Deep residual learning for image recognition, 2016, arXiv:1512.03385 (section 4.2;
        shortcuts of type A).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if min(in_channels, num_classes, width) < 1:
            raise ValueError(
                f"ResNet20 needs at least one channel and class; got {in_channels=}, {num_classes=}, {width=}."
            )
        self.conv1, self.bn1 = _conv3(in_channels, width), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(_Block(width, width) for _ in range(3)))
        self.layer2 = nn.Sequential(*(_Block(width if i == 0 else 2 * width, 2 * width) for i in range(3)))
        self.layer3 = nn.Sequential(*(_Block(2 * width if i == 0 else 4 * width, 4 * width) for i in range(3)))
        self.fc = nn.Linear(4 * width, num_classes)
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
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions and a shortcut; more channels out than in mean half the sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = (1 if in_channels == out_channels else 2), out_channels - in_channels
        self.conv1, self.bn1 = _conv3(in_channels, out_channels, self.stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = _conv3(out_channels, out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + x)


def _conv3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
