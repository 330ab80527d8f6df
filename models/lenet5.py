"""The LeNet-5 of the MNIST experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LeNet5"]


class LeNet5(nn.Module):
    """32C5 - MP2 - 64C5 - MP2 - 512FC - classes: convolutions without padding, ReLU, no batch normalization.

    At 28x28 the sides are 28, 24, 12, 8, 4: 1024 features are flattened, and one image costs 4 267 008 MACs.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image in pixels, at least 16.

    Raises:
        ValueError: If the image is too small for two unpadded 5x5 convolutions with pooling, or another count
            is below 1.

    References:
        LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.
        van Baalen et al.: Bayesian Bits, 2020, arXiv:2005.07093 (the widths used here).
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 16:
            raise ValueError(f"LeNet5 needs images of at least 16x16 pixels; got image_size={image_size}.")
        if min(in_channels, num_classes) < 1:
            raise ValueError(f"LeNet5 needs at least one channel and class; got {in_channels=}, {num_classes=}.")
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 32, 5)
        self.conv2 = nn.Conv2d(32, 64, 5)
        self.fc1 = nn.Linear(64 * side * side, 512)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Arguments:
            x: Shape `(N, in_channels, image_size, image_size)`.

        Returns:
            Logits of shape `(N, num_classes)`.
        """
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
