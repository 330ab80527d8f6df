"""Whole networks, and their training step, with the published arithmetic of :mod:`benchmarks.speed.authors`.

Batch norms stay layers of their own. The authors fold them into the weights before quantizing, which costs a second
convolution for each layer and step; what is measured here is faster by that much.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.speed.authors import PublishedQuantizer
from pyro_bbits import quantize
from pyro_bbits.cost import tensor_macs
from pyro_bbits.insertion import LayerInfo

__all__ = ["PublishedNetwork", "PublishedStep"]


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
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()
