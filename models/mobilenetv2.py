"""The MobileNetV2 of the ImageNet experiments."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

__all__ = ["MobileNetV2"]

Stem = Literal["imagenet", "small"]

# expansion, channels, blocks, stride of the first block: table 2 of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """32C3/2 - seven stages of inverted residual blocks - 1280C1 - global average - classes, for a `width` of 1.

    A block widens its input by a 1x1 convolution, filters each channel by a depthwise 3x3 one, and narrows again by a
    1x1 one; batch normalization follows each, ReLU6 the first two. Where the shape stays, the input is added. At
    224x224 one image costs 300 774 272 MACs; there are 3 504 872 parameters. Module paths are torchvision's, so that
    its published weights load.

    Any image size is taken. With the stem `imagenet` sides shrink 32 times; `small` leaves out the first two halvings,
    for images such as CIFAR's, and changes no weight's shape.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        width: Factor on all channel counts, which are rounded to multiples of 8; the last 1280 only grow.
        stem: `imagenet` or `small`.
        dropout: Probability with which a feature is dropped before the classifier in training.

    Raises:
        ValueError: If a count is below 1, the width not above 0, the dropout not in `[0, 1)`, or the stem unknown.

    References:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: inverted residuals and linear bottlenecks, 2018,
        arXiv:1801.04381 (table 2).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: float = 1.0,
        stem: Stem = "imagenet",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if min(in_channels, num_classes) < 1 or not width > 0:
            raise ValueError(
                "MobileNetV2 needs at least one channel and class, and a width above 0; got "
                f"{in_channels=}, {num_classes=}, {width=}."
            )
        if stem not in get_args(Stem):
            raise ValueError(f"stem must be 'imagenet' or 'small'; got {stem!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}.")
        channels, last = _round_to_8(32 * width), _round_to_8(1280 * max(1.0, width))
        first_strides = 1 if stem == "small" else 2
        layers: list[nn.Module] = [_conv_norm(in_channels, channels, 3, first_strides)]
        for stage, (expansion, out, blocks, stride) in enumerate(STAGES):
            first = first_strides if stage == 1 else stride
            for block in range(blocks):
                layers.append(_Block(channels, _round_to_8(out * width), first if block == 0 else 1, expansion))
                channels = _round_to_8(out * width)
        self.features = nn.Sequential(*layers, _conv_norm(channels, last))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # by what enters: what leaves is counted over all groups, which would all but silence depthwise layers
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Arguments:
            x: Shape `(N, in_channels, height, width)`.

        Returns:
            Logits of shape `(N, num_classes)`.
        """
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *([_conv_norm(in_channels, inner)] if expansion > 1 else []),
            _conv_norm(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


def _conv_norm(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


def _round_to_8(channels: float) -> int:
    """The nearest multiple of 8, or the next one where that would lose more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
