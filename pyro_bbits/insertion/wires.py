"""What a run of a network has shown: what enters each multiplying layer and each product."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.insertion.layers import out_channels

__all__ = ["Key", "Operand", "Trace", "Wire", "channel_layout", "key_of", "storage_of"]

Key = tuple[int, int | torch.SymInt, int, int]


@dataclass
class Operand:
    """An activation that a layer or a product reads.

    Attributes:
        name: Name it has if it is not shared, e.g. `conv2.input` or `attention.matmul0.left`.
        keys: Identities of the tensors that were read.
        group: Name of the tensor; all that read the same one have the same. None where nothing is to be quantized: the
            network's own input, or indices.
        parameter: The parameter it is, or is a view of, if any.
        low, high: Extremes.
    """

    name: str
    keys: set[Key] = field(default_factory=set)
    group: str | None = None
    parameter: nn.Parameter | None = None
    low: float = float("inf")
    high: float = -float("inf")

    def see(self, x: Tensor) -> None:
        """Add a tensor that was read."""
        self.keys.add(key_of(x))
        if x.numel():
            self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())


@dataclass
class Wire:
    """What one forward pass tells about a multiplying layer, or a product of two activations.

    Attributes:
        name: Module path of the layer, or name of the product.
        module: The layer; None for a product.
        operands: The activation that the layer reads, or the two operands of the product.
        norm: Module path of the batch norm that alone reads its output, if any.
        macs: Multiply-accumulates per sample, all calls together.
        lookups: Numbers looked up per sample, by an embedding.
        calls: How often it was called.
        is_quantized: Whether it shall be.
        read_by: A function that reads its weight beside it, if any.
    """

    name: str
    module: Any
    operands: tuple[Operand, ...]
    norm: str | None = None
    macs: int = 0
    lookups: int = 0
    calls: int = 0
    is_quantized: bool = True
    read_by: str | None = None

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two activations."""
        return self.module is None

    @property
    def is_embedding(self) -> bool:
        """Whether it looks up vectors by index."""
        return isinstance(self.module, nn.Embedding)

    @property
    def is_channels_last(self) -> bool:
        """Whether channels are in the last dimension of what it gives out."""
        return isinstance(self.module, nn.Linear | nn.Embedding)

    @property
    def in_channels(self) -> int:
        """Input channels (or features); 1 where nothing can be pruned on that side."""
        if self.is_product or self.is_embedding:
            return 1
        return int(self.module.in_features if self.is_channels_last else self.module.in_channels)

    @property
    def out_channels(self) -> int:
        """Output channels (or features); 1 for a product, which has none that can be pruned."""
        return 1 if self.is_product else out_channels(self.module)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for everything else."""
        return 1 if self.is_product or self.is_channels_last else int(self.module.groups)

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel reads one input channel alone."""
        return self.groups > 1 and self.groups == self.in_channels


@dataclass
class Trace:
    """What one forward pass tells about a network.

    Attributes:
        wires: Its layers and products by name, in the order of their calls.
        uncounted: Multiply-accumulates per sample that belong to none of these, by the module whose code makes them.
        sizes: Lengths of all dimensions seen.
        largest: Numbers per sample in the largest tensor seen.
        network_inputs: Identities of the network's own inputs.
    """

    wires: dict[str, Wire]
    uncounted: dict[str, int]
    sizes: set[int]
    largest: int
    network_inputs: set[Key]

    def name_operands(self) -> None:
        """Give the operands that are the same tensor one name, transitively; only those of what is quantized count."""
        chosen = [wire for wire in self.wires.values() if wire.is_quantized and not wire.is_embedding]
        operands = [operand for wire in chosen for operand in wire.operands]
        rank = {operand.name: i for i, operand in enumerate(operands)}
        for wire in self.wires.values():
            for operand in wire.operands:
                operand.group = None
        for operand in operands:
            if operand.keys <= self.network_inputs:
                continue
            peers = {o.group for o in operands if o.group and o.keys & operand.keys}
            operand.group = min(peers, default=operand.name, key=rank.__getitem__)
            for other in operands:
                other.group = operand.group if other.group in peers else other.group


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory of a tensor, which all its views and parts share."""
    return tensor.untyped_storage().data_ptr()


def key_of(tensor: Tensor) -> Key:
    """Identity of a tensor now: views of it agree, an in-place change makes a new one."""
    return storage_of(tensor), tensor.storage_offset(), tensor.numel(), tensor._version


def channel_layout(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Where the channels of an activation are; a view with other channels differs."""
    return tuple(tensor.shape[:2]), tensor.stride(1)
