"""Small networks that the insertion has to get right, and fixtures that build them.

Each is written as a user would write it; none follows a convention of the library.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """An identity skip added in place, a projection skip, functional and in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 6, 3)
        self.a1, self.a2 = conv_norm(6, 6, 3), conv_norm(6, 6, 3)
        self.b1, self.b2, self.shortcut = conv_norm(6, 8, 3, 2), conv_norm(8, 8, 3), conv_norm(6, 8, 1, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        y = self.a2(F.relu(self.a1(x)))
        y += x
        x = F.relu(y)
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.shortcut(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Inverted(nn.Module):
    """Inverted residuals: expand, depthwise with a bias of its own, project; one with a skip, one strided."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand1, self.project1 = conv_norm(3, 4, 3), conv_norm(4, 8, 1), conv_norm(8, 4, 1)
        self.depth1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.expand2, self.project2 = conv_norm(4, 6, 1), conv_norm(12, 5, 1)
        self.depth2 = nn.Conv2d(6, 12, 3, 2, 1, groups=6)  # two outputs per channel, a bias, no batch norm
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.project1(F.relu6(self.depth1(F.relu6(self.expand1(x)))))
        x = self.project2(F.relu6(self.depth2(F.relu6(self.expand2(x)))))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(F.hardswish(x), 1).flatten(1))
        return logits


class Waves(nn.Module):
    """One dimension: grouped convolutions, one batch norm without scale, and a linear layer with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8)
        self.conv2, self.norm2 = nn.Conv1d(8, 12, 3, 2, groups=4), nn.BatchNorm1d(12, affine=False)
        self.conv3 = nn.Conv1d(12, 6, 3, groups=2)
        self.fc1, self.norm3, self.fc2 = nn.Linear(30, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        x = torch.tanh(self.norm2(self.conv2(x)))
        x = F.gelu(self.conv3(x)).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.norm3(self.fc1(x))))
        return logits


class Concat(nn.Module):
    """An encoder and decoder with a concatenated skip; the output is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.up = conv_norm(3, 5, 3), conv_norm(5, 6, 3, 2), nn.Conv2d(6, 4, 1)
        self.merge, self.mask, self.score = conv_norm(9, 5, 3), nn.Conv2d(5, 1, 1), nn.Linear(6, 2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine = F.relu(self.down1(image))
        coarse = F.relu(self.down2(fine))
        raised = F.relu(self.up(F.interpolate(coarse, scale_factor=2)))
        merged = F.relu(self.merge(torch.cat([raised, fine], 1)))
        return {"mask": self.mask(merged), "score": self.score(coarse.amax((2, 3)))}


class Twice(nn.Module):
    """One module called on its own output, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(5, 6), nn.Linear(6, 6)
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        x = F.relu(self.again(F.relu(self.again(x))))
        logits: Tensor = self.head(F.relu(self.left(x)) + F.relu(self.right(x.roll(1, 1))))
        return logits


class SigmoidLeNet(nn.Module):
    """A closed channel of the first layer would arrive as sigmoid(0) = 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.conv1(x))
        x = F.max_pool2d(F.relu_(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class SqueezeExcite(nn.Module):
    """The excitation multiplies the channels of the main path, which then joins a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_norm(3, 6, 3), conv_norm(6, 6, 3)
        self.squeeze, self.excite, self.head = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        y = F.silu(self.conv(x))
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.head((y * weight + x).mean((2, 3)))
        return logits


class Branchy(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        if float(x.detach().sum()) > 0:
            x = x * 2
        for _ in range(1 + (len(x) > 2)):
            x = x + 0.5 * F.relu(x)
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class LayerNormed(nn.Module):
    """A token stream with layer norm; only the inner layer of the feed-forward part can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.inner, self.outer, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.outer(F.gelu(self.inner(self.norm(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class SumToDepthwise(nn.Module):
    """A depthwise layer that reads the sum of two layers, so its gates are those of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), conv_norm(2, 6, 3)
        self.depth, self.norm = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.point, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)) + F.relu(self.b(x))
        x = F.relu(self.point(F.relu(self.norm(self.depth(x)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class RawRead(nn.Module):
    """The output of a convolution is read by its batch norm and, raw, by another convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.normed, self.raw, self.head = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 3, 1), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.cat([self.normed(F.relu(self.norm(y))), self.raw(F.relu(y))], 1)
        logits: Tensor = self.head(F.relu(y).mean((2, 3)))
        return logits


class RawDepthwise(nn.Module):
    """The same with a depthwise convolution, whose bias stays when its input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depth, self.norm = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5)
        self.normed, self.raw, self.head = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 3, 1), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(F.relu(self.conv(x)))
        y = torch.cat([self.normed(F.relu(self.norm(y))), self.raw(y)], 1)
        logits: Tensor = self.head(F.relu(y).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Self-attention of two heads written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Modulated(nn.Module):
    """Feature-wise modulation: a product of two layers plus a third, from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.shift = nn.Conv2d(2, 5, 3), nn.Linear(3, 5), nn.Linear(3, 5)
        self.read, self.head = nn.Conv2d(5, 4, 1), nn.Linear(4, 2)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        x = self.conv(image) * self.scale(condition)[..., None, None] + self.shift(condition)[..., None, None]
        logits: Tensor = self.head(F.relu(self.read(F.relu(x))).mean((2, 3)))
        return logits


class Difference(nn.Module):
    """A rectified difference, and a threshold that may have either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)
        self.read, self.other, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 2)
        self.threshold = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        b, c = self.b(x), self.c(x)
        x = self.read(F.relu(self.a(x) - b)) + self.other(b) + self.other(F.relu(c - self.threshold / 4))
        logits: Tensor = self.head(F.relu(x).mean(1))
        return logits


class DepthwiseInstanceNorm(nn.Module):
    """A norm over positions: it would hide values that are the same at all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
        self.depth, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.InstanceNorm2d(4)
        self.read, self.also, self.head = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        x = self.read(self.norm(self.depth(a)) + b) + self.also(F.relu(a))
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


class SharedDepthwise(nn.Module):
    """A depthwise layer called on two tensors: its bias stays while one of the two channels it reads is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.depth = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.left, self.right, self.head = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.depth(F.relu(self.a(x)))) + self.right(self.depth(F.relu(self.b(x))))
        logits: Tensor = self.head(F.relu(y).mean((2, 3)))
        return logits


class Projected(nn.Module):
    """A generator: a linear layer whose output is reshaped to images before it is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(4, 24), nn.BatchNorm2d(6)
        self.conv, self.flat, self.head = nn.Conv2d(6, 3, 1), nn.BatchNorm1d(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.project(x).view(-1, 6, 2, 2)))
        logits: Tensor = self.head(F.relu(self.flat(self.conv(x).flatten(1))))
        return logits


class UNet(nn.Module):
    """Transposed convolutions, one grouped, one with an output size that is asked for; skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down2, self.down3 = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 10, 3, 2, 1)
        self.up2, self.norm2 = nn.ConvTranspose2d(10, 8, 2, 2, groups=2, bias=False), nn.BatchNorm2d(8)
        self.up1, self.mask = nn.ConvTranspose2d(16, 6, 3, 2, 1), nn.Conv2d(12, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = F.relu(self.norm1(self.down1(image)))
        middle = F.relu(self.down2(fine))
        coarse = F.relu(self.down3(middle))
        raised = F.relu(self.norm2(self.up2(input=coarse)))
        raised = F.relu(self.up1(torch.cat([raised, middle], 1), output_size=fine.shape[-2:]))
        mask: Tensor = self.mask(torch.cat([raised, fine], 1))
        return mask


class Video(nn.Module):
    """Three dimensions, down and up again, and a one-dimensional transposed layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.depth, self.down = nn.Conv3d(6, 6, 3, 1, 1, groups=6), nn.Conv3d(6, 4, 2, 2)
        self.up = nn.ConvTranspose3d(4, 5, 2, 2)
        self.wave, self.head = nn.ConvTranspose1d(5, 4, 3, 2, groups=1), nn.Linear(4, 2)

    def forward(self, clip: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(clip)))
        x = F.relu(self.up(F.relu(self.down(F.relu(self.depth(x))))))
        x = F.relu(self.wave(x.mean((-2, -1))))
        logits: Tensor = self.head(x.amax(2))
        return logits


class TransposedDepthwise(nn.Module):
    """A transposed convolution of as many groups as channels, two outputs for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 8, 3, groups=4)
        self.point, self.head = nn.Conv1d(8, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(F.relu(self.up(F.relu(self.conv(x))))))
        logits: Tensor = self.head(x.mean(2))
        return logits


class Language(nn.Module):
    """Embeddings of tokens and of positions, torch's attention with a padding mask, and a head tied by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.attention(x, x, x, key_padding_mask=tokens == 0)[0]
        x = x + self.outer(F.gelu(self.inner(self.norm(x))))
        logits: Tensor = x.mean(1) @ self.token.weight.T
        return logits


class Bags(nn.Module):
    """An embedding whose channels go into a layer as they are, so that they can be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.inner(F.relu(self.token(tokens)).sum(1))))
        return logits


class Encoder(nn.Module):
    """torch's own encoder, sequences first, so that the batch is in dimension 1 inside."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.enter, self.encoder = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.enter(tokens).transpose(0, 1))
        logits: Tensor = self.head(x.mean(0))
        return logits


class CrossAttention(nn.Module):
    """Queries that attend to values of another width, with a causal mask, and its weights read."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, kdim=4, vdim=4, bias=False, batch_first=True)
        self.query, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        x, weights = self.attention(self.query(tokens), tokens * 1, tokens * 1, attn_mask=mask)
        return self.head(x.mean(1)), weights


class Windows(nn.Module):
    """Attention within windows, which are folded into the batch; einsum and torch's fused function; grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(4, 24), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.unflatten(1, (2, -1)).flatten(0, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        x = torch.einsum("bhqk,bhkd->bhqd", scores, v)
        x = x + F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)
        x = x + torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).tanh().unflatten(0, (-1, 2)) @ v
        x = F.relu(self.out(x.transpose(1, 2).flatten(2)))
        logits: Tensor = self.head(x.unflatten(0, (-1, 2)).mean((1, 2)))
        return logits


class TimeMajor(nn.Module):
    """Folds time into the batch in the order that puts the samples of one time together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.inner(tokens.transpose(0, 1).flatten(0, 1)))
        logits: Tensor = self.head(x.unflatten(0, (tokens.shape[1], -1)).mean(0))
        return logits


class GroupNormed(nn.Module):
    """A norm over groups of channels, and a list of modules in a loop whose length depends on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks[: x.shape[-1] - 1]:
            x = x + F.relu(block(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


IMAGE, SIGNAL, TOKENS, WORDS = (3, 8, 8), (2, 16), (6, 4), "words"

NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...] | str]]] = {
    "residual": (Residual, {"x": IMAGE}),
    "inverted": (Inverted, {"x": IMAGE}),
    "waves": (Waves, {"x": SIGNAL}),
    "concat": (Concat, {"image": IMAGE}),
    "twice": (Twice, {"x": (5,)}),
    "sigmoid-lenet": (SigmoidLeNet, {"x": (1, 8, 8)}),
    "squeeze-excite": (SqueezeExcite, {"x": IMAGE}),
    "branchy": (Branchy, {"x": (5,)}),
    "layer-norm": (LayerNormed, {"tokens": TOKENS}),
    "sum-to-depthwise": (SumToDepthwise, {"x": (2, 6, 6)}),
    "raw-read": (RawRead, {"x": (2, 6, 6)}),
    "raw-depthwise": (RawDepthwise, {"x": (2, 6, 6)}),
    "attention": (Attention, {"tokens": TOKENS}),
    "modulated": (Modulated, {"image": (2, 6, 6), "condition": (3,)}),
    "difference": (Difference, {"x": TOKENS}),
    "depthwise-instance-norm": (DepthwiseInstanceNorm, {"x": (2, 6, 6)}),
    "shared-depthwise": (SharedDepthwise, {"x": (2, 6, 6)}),
    "projected": (Projected, {"x": (4,)}),
    "u-net": (UNet, {"image": IMAGE}),
    "video": (Video, {"clip": (2, 4, 4, 4)}),
    "transposed-depthwise": (TransposedDepthwise, {"x": SIGNAL}),
    "language": (Language, {"tokens": WORDS}),
    "bags": (Bags, {"tokens": WORDS}),
    "encoder": (Encoder, {"tokens": TOKENS}),
    "cross-attention": (CrossAttention, {"tokens": TOKENS}),
    "windows": (Windows, {"tokens": TOKENS}),
    "time-major": (TimeMajor, {"tokens": TOKENS}),
    "group-norm": (GroupNormed, {"x": (2, 6, 6)}),
}


def draw(shape: tuple[int, ...] | str, count: int) -> Tensor:
    """Random inputs; words are seven indices below 11, the last one padding, 0."""
    if isinstance(shape, str):
        return F.pad(torch.randint(1, 11, (count, 6)), (0, 1))
    return torch.randn(count, *shape)


Case = tuple[nn.Module, Mapping[str, Tensor]]


def shake(module: Any) -> None:
    """Weights, shifts and statistics under which no channel of a layer or norm is silent."""
    if type(module) in QUANTIZED_LAYERS:
        nn.init.kaiming_normal_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.bias, 0.0, 0.5)
    elif type(module) in GATED_NORMS:
        nn.init.normal_(module.running_mean, std=0.3)
        nn.init.uniform_(module.running_var, 0.5, 1.5)
        if module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.5)


def build(name: str) -> Case:
    """A fresh network in evaluation mode, no channel of it silent, and example inputs by keyword."""
    make, shapes = NETS[name]
    torch.manual_seed(sum(map(ord, name)))
    net = make().eval()
    for module in net.modules():
        shake(module)
    return net, {key: draw(shape, 6) for key, shape in shapes.items()}


@pytest.fixture
def build_case() -> Callable[[str], Case]:
    """Build a network of this folder, and its example inputs, by name."""
    return build


@pytest.fixture
def draw_like() -> Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]:
    """Draw so many other inputs of the same kind."""
    return lambda example, count: {
        key: draw(WORDS if x.dtype == torch.int64 else tuple(x.shape[1:]), count) for key, x in example.items()
    }


@pytest.fixture(params=NETS)
def case(request: Any) -> Case:
    """Each network of this folder in turn, with its example inputs."""
    return build(request.param)
