"""Find what enters each multiplying layer by running the network once and watching it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS

__all__ = ["Inputs", "Wire", "trace"]

Key = tuple[int, int | torch.SymInt, int, int]


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a network: positional and keyword arguments.

    Raises:
        ValueError: If no tensor is among them, a tensor is empty, or a value is NaN or infinite.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """A tensor is the single argument, a tuple or list the arguments, a mapping the keyword arguments."""
        if isinstance(example, Mapping):
            return cls((), dict(example))
        return cls(tuple(example) if isinstance(example, Sequence) else (example,), {})

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError(
                f"example_inputs must hold at least one tensor; got {type(self.args).__name__} {self.args!r}."
            )
        for tensor in self.tensors:
            if tensor.numel() == 0:
                raise ValueError(
                    f"example_inputs are empty: a tensor has shape {tuple(tensor.shape)}; give a few real examples."
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(
                    "example_inputs hold NaN or infinite values; the ranges cannot be calibrated from them."
                )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """Length of dimension 0 of the first tensor."""
        return self.tensors[0].shape[0]

    def map(self, change: Any) -> "Inputs":
        """The same arguments with a function applied to each tensor."""
        changed = tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, (self.args, dict(self.kwargs)))
        return Inputs(*changed)

    def run(self, net: nn.Module) -> Any:
        """Call a network."""
        return net(*self.args, **self.kwargs)


@dataclass
class Wire:
    """What one forward pass tells about a multiplying layer.

    Attributes:
        name: Module path of the layer.
        module: The layer.
        keys: Identities of the tensors that entered it.
        group: Name of its input tensor; layers that read the same tensor have the same one. None for the network input.
        norm: Module path of the batch norm that alone reads its output, if any.
        low, high: Extremes of its input.
        macs: Multiply-accumulates per sample, all calls together.
        calls: How often it was called.
    """

    name: str
    module: Any
    keys: set[Key] = field(default_factory=set)
    group: str | None = None
    norm: str | None = None
    low: float = float("inf")
    high: float = -float("inf")
    macs: int = 0
    calls: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether channels are in the last dimension."""
        return isinstance(self.module, nn.Linear)

    @property
    def in_channels(self) -> int:
        """Input channels (or features)."""
        return int(self.module.in_features if self.is_linear else self.module.in_channels)

    @property
    def out_channels(self) -> int:
        """Output channels (or features)."""
        return int(self.module.out_features if self.is_linear else self.module.out_channels)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a linear layer."""
        return 1 if self.is_linear else int(self.module.groups)

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel reads one input channel alone."""
        return self.groups > 1 and self.groups == self.in_channels


def _key(tensor: Tensor) -> Key:
    """Identity of a tensor now: views of it agree, an in-place change makes a new one."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel(), tensor._version


def _channel_layout(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Where the channels of an activation are; a view with other channels differs."""
    return tuple(tensor.shape[:2]), tensor.stride(1)


@contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    """Restore buffers (batch-norm statistics) and the random state afterwards."""
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
            for name, buffer in net.named_buffers():
                if name in kept:  # else the forward pass has made it
                    buffer.copy_(kept[name])


class _Tracer:
    """Hooks that record one forward pass."""

    def __init__(self, inputs: Inputs) -> None:
        self.wires: dict[str, Wire] = {}
        self.readers: dict[str, set[str | None]] = {}
        self.made: dict[Key, tuple[str, Any]] = {}
        self.alive: list[Tensor] = inputs.tensors  # kept, so that no address is used twice
        self.network_inputs = {_key(t) for t in inputs.tensors}
        self.batch_size = inputs.batch_size

    def before_layer(self, module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        x = args[0]
        wire = self.wires.setdefault(name, Wire(name, module))
        wire.keys.add(_key(x))
        wire.calls += 1
        wire.low, wire.high = min(wire.low, x.min().item()), max(wire.high, x.max().item())
        self.alive.append(x)

    def after_layer(self, module: Any, args: tuple[Tensor, ...], y: Tensor, name: str) -> None:
        if not self.wires[name].is_linear or y.dim() == 2:  # else a norm's channels are not the layer's features
            self.made[_key(y)] = name, _channel_layout(y)
        # a linear weight (out, in) and a convolution weight (out, in / groups, *kernel) alike
        self.wires[name].macs += y.numel() // self.batch_size * module.weight[0].numel()
        self.alive.append(y)

    def before_norm(self, module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        owner, layout = self.made.get(_key(args[0]), (None, None))
        self.readers.setdefault(name, set()).add(owner if layout == _channel_layout(args[0]) else None)

    def attach(self, net: nn.Module) -> list[Any]:
        hooks = []
        for name, module in net.named_modules():
            if type(module) in QUANTIZED_LAYERS:
                hooks.append(module.register_forward_pre_hook(partial(self.before_layer, name=name)))
                hooks.append(module.register_forward_hook(partial(self.after_layer, name=name)))
            elif type(module) in GATED_NORMS:
                hooks.append(module.register_forward_pre_hook(partial(self.before_norm, name=name)))
        return hooks


def _assign_norms(tracer: _Tracer) -> None:
    for norm, owners in tracer.readers.items():
        owner = tracer.wires.get(next(iter(owners)) or "") if len(owners) == 1 else None
        if owner is not None and owner.calls == 1 and owner.norm is None:
            owner.norm = norm


def _assign_groups(wires: dict[str, Wire], network_inputs: set[Key]) -> None:
    """Layers that read the same tensor share its name, transitively."""
    for wire in wires.values():
        if wire.keys <= network_inputs:
            continue
        peers = {w.group for w in wires.values() if w.group and w.keys & wire.keys}
        name = min(peers, default=f"{wire.name}.input", key=lambda g: list(wires).index(g.removesuffix(".input")))
        wire.group = name
        for other in wires.values():
            other.group = name if other.group in peers else other.group


def trace(net: nn.Module, inputs: Inputs) -> dict[str, Wire]:
    """Run the network once on example inputs and describe its multiplying layers in the order of their calls.

    Buffers and the random state are left as they were.

    Arguments:
        net: The network, in the mode (train or eval) whose activations shall be seen.
        inputs: Example inputs, batch in dimension 0.

    Returns:
        One :class:`Wire` per layer, by module path.
    """
    tracer = _Tracer(inputs)
    hooks = tracer.attach(net)
    try:
        with _untouched(net):
            inputs.run(net)
    finally:
        for hook in hooks:
            hook.remove()
    _assign_norms(tracer)
    _assign_groups(tracer.wires, tracer.network_inputs)
    return tracer.wires
