r"""The published method's arithmetic, written plainly in PyTorch as a reader of the paper would write it.

It is what the speed tables compare with, and nothing else: a module for each tensor, the clip made of two ReLUs, a
chain of residuals in ordinary autograd, gates drawn one by one with a decision on the host for each, and a penalty
for each tensor. It is written from the mathematics; no code of the authors is in it.

In two respects it is faster than what the authors published: batch norms stay layers of their own instead of being
folded into the weights by a second convolution, and random numbers are drawn on the device.

References:
    van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), sections 2.1 to 2.3.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from pyro_bbits import quantize
from pyro_bbits.cost import tensor_macs
from pyro_bbits.insertion import LayerInfo

__all__ = ["PublishedNetwork", "PublishedQuantizer", "PublishedStep", "published_quantize"]

BITS = (2, 4, 8, 16, 32)
SHRINK = 1 - 1e-7
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
NEVER_AGAIN = -2.0
"""A gate whose logit is lower is not drawn any more, and neither are the finer ones."""


class _Round(torch.autograd.Function):
    """Rounding with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _round(x: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def published_quantize(
    x: Tensor, beta: Tensor, gates: Sequence[Tensor | float], channel_gates: Tensor | None = None, *, signed: bool
) -> Tensor:
    """The gated sum of residuals, step by step; a residual is computed only while its gate and all before are above 0.

    Arguments:
        x: Any shape; `(C, *)` when `channel_gates` are given.
        beta: The range, `(1,)`.
        gates: `z4`, `z8`, `z16`, `z32`, each `(1,)` or the number 0.
        channel_gates: `z2`, `(C,)`; None means 1.
        signed: Whether the range is symmetric around zero.
    """
    high = SHRINK * beta
    low = -high if signed else torch.zeros_like(high)
    clipped = high - F.relu(high - low - F.relu(x - low))
    step = (2 * beta if signed else beta) / 3
    value = step * _round(clipped / step)
    reached, errors = value, []
    for bits, gate in zip(BITS, gates, strict=False):
        if not gate > 0:  # the host waits for the device here
            break
        step = step / (2**bits + 1)
        error = step * _round((clipped - reached) / step)
        reached = reached + error
        errors.append((gate, error))
    inner: Tensor | float = 0.0
    for gate, error in reversed(errors):
        inner = gate * (error + inner)
    value = value + inner
    return value if channel_gates is None else channel_gates.reshape(-1, *[1] * (x.dim() - 1)) * value


def _draw(logits: Tensor) -> Tensor:
    """Hard concrete gates."""
    u = torch.rand_like(logits).clamp_min(1e-7)
    s = torch.sigmoid((u.log() - (-u).log1p() + logits) / TEMPERATURE)
    return torch.clamp(s * (HIGH - LOW) + LOW, 0, 1)


class PublishedQuantizer(nn.Module):
    """Range, gates and penalty of one tensor.

    Arguments:
        beta: Initial range.
        signed: Whether it is symmetric around zero.
        macs: What the tensor's bits are priced with.
        channels: Number of channel gates; 0 for none.
    """

    def __init__(self, beta: float, signed: bool, macs: float, channels: int = 0) -> None:
        super().__init__()
        self.signed, self.macs = signed, macs
        self.beta = nn.Parameter(torch.tensor([beta]))
        self.logits = nn.ParameterList(nn.Parameter(torch.tensor([6.0])) for _ in BITS[1:])
        self.channel_logits = nn.Parameter(torch.full((channels,), 6.0)) if channels else None

    def forward(self, x: Tensor) -> Tensor:
        channel_gates = None if self.channel_logits is None else _draw(self.channel_logits)
        gates: list[Tensor] = []
        for logit in self.logits:
            if logit <= NEVER_AGAIN:  # and here
                break
            gates.append(_draw(logit))
        return published_quantize(x, self.beta, gates, channel_gates, signed=self.signed).to(x.dtype)

    def penalty(self) -> Tensor:
        """Expected price of the open gates, averaged over the channels."""
        if self.channel_logits is None:
            reach = total = torch.ones_like(self.beta)
        else:
            reach = torch.sigmoid(self.channel_logits - SHIFT)
            total = BITS[0] * self.macs * reach
        for bits, logit in zip(BITS[1:], self.logits, strict=True):
            reach = reach * torch.sigmoid(logit - SHIFT)
            total = total + bits * self.macs * reach
        return total.mean()


class _Attention(nn.Module):
    """The attention of this package's ViT with its two products written out and their operands quantized."""

    def __init__(self, inner: Any, operands: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.heads, self.q, self.k, self.v, self.out = inner.heads, inner.q, inner.k, inner.v, inner.out
        self.operands = tuple(operands)

    def forward(self, x: Tensor) -> Tensor:
        query, key, values = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        on_query, on_key, on_weights, on_values = self.operands
        scores = on_query(query) @ on_key(key).transpose(-2, -1) / math.sqrt(query.size(-1))
        y = on_weights(scores.softmax(-1)) @ on_values(values)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class PublishedNetwork(nn.Module):
    """A network with the published quantizer on the tensors that :func:`~pyro_bbits.quantize` would quantize.

    Arguments:
        net: A network of this package; it stays as it is.
        example_inputs: Inputs that set ranges and signs.
        mu: Strength of the penalty.
    """

    def __init__(self, net: nn.Module, example_inputs: Tensor, mu: float = 0.01) -> None:
        super().__init__()
        found = quantize(net, example_inputs)
        channels = {group.tensor: group.channels for group in found.layout.groups}
        ranges, macs = found.quantizers.ranges.tolist(), tensor_macs(found).tolist()
        self.net, self.mu = copy.deepcopy(net), mu
        self.quantizers = nn.ModuleList(
            PublishedQuantizer(beta, signed, price, channels.get(row, 0))
            for row, (beta, signed, price) in enumerate(zip(ranges, found.quantizers.signed, macs, strict=True))
        ).to(next(net.parameters()).device)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in found.layers:
            if not layer.is_product:
                self._equip(layer)
        self._equip_attention([layer for layer in found.layers if layer.is_product])

    def forward(self, x: Tensor) -> Tensor:
        try:
            logits: Tensor = self.net(x)
            return logits
        finally:
            self._seen.clear()

    def penalty(self) -> Tensor:
        """The sum over tensors, times `mu`."""
        return self.mu * sum((quantizer.penalty() for quantizer in self.all()), self.all()[0].beta.new_zeros(()))

    def all(self) -> list[PublishedQuantizer]:
        """The quantizers, in the order of the tensors."""
        return [quantizer for quantizer in self.quantizers if isinstance(quantizer, PublishedQuantizer)]

    def _equip(self, layer: LayerInfo) -> None:
        module, row = self.net.get_submodule(layer.name), layer.input
        register_parametrization(module, "weight", self.quantizers[layer.weight or 0])
        if row is not None:
            module.register_forward_pre_hook(lambda _, inputs: (self._quantize_once(row, inputs[0]), *inputs[1:]))

    def _equip_attention(self, products: Sequence[LayerInfo]) -> None:
        for first, second in zip(products[::2], products[1::2], strict=True):
            owner = first.name.rpartition(".")[0]
            parent, _, name = owner.rpartition(".")
            rows = (first.input, first.weight, second.input, second.weight)
            operands = [self.quantizers[row] for row in rows if row is not None]
            setattr(self.net.get_submodule(parent), name, _Attention(self.net.get_submodule(owner), operands))

    def _quantize_once(self, row: int, x: Tensor) -> Tensor:
        """A tensor that several layers read has one quantizer and is quantized once."""
        if row not in self._seen or self._seen[row][0] is not x:
            self._seen[row] = x, self.quantizers[row](x)
        return self._seen[row][1]


class PublishedStep:
    """A training step: mean cross-entropy plus penalty, and an Adam each for weights, gates and ranges.

    Arguments:
        network: The network, on its device.
        bf16: Whether it runs under bfloat16 autocast.
    """

    def __init__(self, network: PublishedNetwork, *, bf16: bool = False) -> None:
        self.network, self.bf16 = network.train(), bf16
        ranges = [quantizer.beta for quantizer in network.all()]
        gates = [p for quantizer in network.all() for p in quantizer.parameters() if p is not quantizer.beta]
        other = {id(p) for p in ranges + gates}
        weights = [p for p in network.parameters() if id(p) not in other]
        self.optimizers = [torch.optim.Adam(part, lr=1e-3) for part in (weights, gates, ranges)]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.network(x).float(), y) + self.network.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()
