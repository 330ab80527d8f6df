"""A small vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ViT"]


class ViT(nn.Module):
    """Patches - `depth` pre-norm transformer blocks - the class token's features - classes.

    A convolution turns each patch into a token; a class token is put in front, and learned positions are added. A block
    adds attention over its normalized tokens, then a GELU network of one hidden layer. Queries, keys, values and output
    of the attention are linear layers of their own. At 32x32 with the defaults one image costs 173 115 264 MACs in
    layers and 9 734 400 in the products of queries, keys and values.

    Arguments:
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        width: Features of a token, a multiple of `heads`; the hidden layer has four times as many.
        depth: Number of blocks.
        heads: Number of attention heads.

    Raises:
        ValueError: If the image is not a whole number of patches, the width not a multiple of the heads, or a count is
            below 1.

    References:
        Dosovitskiy et al.: An image is worth 16x16 words: transformers for image recognition at scale, 2021,
        arXiv:2010.11929 (section 3.1; width and heads of its tiny variant, half the depth).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        if min(in_channels, num_classes, image_size, patch_size, width, depth, heads) < 1:
            raise ValueError(
                f"ViT needs all counts to be at least 1; got {in_channels=}, {num_classes=}, {image_size=}, "
                f"{patch_size=}, {width=}, {depth=}, {heads=}."
            )
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size={patch_size}; got {image_size}.")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}; got {width}.")
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Arguments:
            x: Shape `(N, in_channels, image_size, image_size)`.

        Returns:
            Logits of shape `(N, num_classes)`.
        """
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + y


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, tokens, width / heads)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out
