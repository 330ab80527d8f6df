"""Find what enters each multiplying layer and each product by running the network once and watching it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS, out_channels
from pyro_bbits.insertion.products import WatchProducts, product_name, product_place

__all__ = ["Inputs", "Operand", "Trace", "Wire", "countable", "trace"]

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
        self.keys.add(_key(x))
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


def _storage(tensor: Tensor) -> int:
    """Identity of the memory of a tensor, which all its views and parts share."""
    return tensor.untyped_storage().data_ptr()


def _key(tensor: Tensor) -> Key:
    """Identity of a tensor now: views of it agree, an in-place change makes a new one."""
    return _storage(tensor), tensor.storage_offset(), tensor.numel(), tensor._version


def _channel_layout(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Where the channels of an activation are; a view with other channels differs."""
    return tuple(tensor.shape[:2]), tensor.stride(1)


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Restore buffers (batch-norm statistics) and the random state afterwards."""
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    devices = {p.device.index for p in net.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for name, buffer in net.named_buffers():
                if name in kept:  # else the forward pass has made it
                    buffer.copy_(kept[name])


@contextmanager
def countable() -> Iterator[None]:
    """Attention in plain products, which the counter sees: not by the fast path, not by a fused kernel."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class _Frame:
    """A module whose forward is running: what has been counted before it and inside it, and its products so far."""

    name: str
    start: int
    inside: int = 0
    products: int = 0


class _Watch(WatchProducts):
    """Tells the tracer when a product is done, besides its operands."""

    def __init__(self, tracer: "_Tracer") -> None:
        super().__init__(tracer.before_product)
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunction():
            self.tracer.after_product()
            self.tracer.watch_weights(func, (args, kwargs), result)
        return result


class _Tracer:
    """Hooks that record one forward pass."""

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        self.wires: dict[str, Wire] = {}
        self.readers: dict[str, set[str | None]] = {}
        self.made: dict[Key, tuple[str, Any]] = {}
        self.alive: list[Tensor] = inputs.tensors  # kept, so that no address is used twice
        self.network_inputs = {_key(t) for t in inputs.tensors}
        self.parameters = {_key(p): p for p in net.parameters()}
        self.batch_size = inputs.batch_size
        self.stack: list[_Frame] = []
        self.counter = FlopCounterMode(display=False)
        self.open: tuple[Wire, int] | None = None
        self.own: dict[str, int] = {}  # operations by the module whose own code makes them
        self.sizes: set[int] = set()
        self.largest = 0
        self.inside = 0  # calls of layers under way
        self.weights: dict[int, list[str]] = {}
        for name, module in net.named_modules():
            if type(module) in QUANTIZED_LAYERS and isinstance(module.weight, Tensor):
                self.weights.setdefault(_storage(module.weight), []).append(name)
        self.read: dict[str, str] = {}
        self.known_operands: list[Tensor] = []

    def enter(self, module: nn.Module, args: Any, name: str) -> None:
        self.stack.append(_Frame(name, self.counter.get_total_flops()))

    def leave(self, module: nn.Module, args: Any, output: Any, name: str) -> None:
        frame = self.stack.pop()
        made = self.counter.get_total_flops() - frame.start
        self.own[name] = self.own.get(name, 0) + made - frame.inside
        if self.stack:
            self.stack[-1].inside += made
        if isinstance(module, nn.RNNBase) and not made:  # fused kernels are not counted: each weight once per step
            steps = output[0].data.numel() // output[0].data.shape[-1]
            weights = sum(p.numel() for key, p in module.named_parameters() if key.startswith("weight"))
            self.own[name] += 2 * steps * weights

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        x = args[0] if args else kwargs["input"]
        wire = self.wires.setdefault(name, Wire(name, module, (Operand(f"{name}.input"),)))
        wire.calls += 1
        wire.operands[0].see(x)
        self.inside += 1
        self._keep(x)

    def after_layer(self, module: Any, args: Any, kwargs: Any, y: Tensor, name: str) -> None:
        wire, x = self.wires[name], args[0] if args else kwargs["input"]
        if not wire.is_channels_last or y.dim() == 2:  # else a norm's channels are not the layer's features
            self.made[_key(y)] = name, _channel_layout(y)
        if wire.is_embedding:
            wire.lookups += y.numel()
        else:  # every weight of a slice times every position of the side where the slice is moved along
            moved = x if isinstance(module, nn.modules.conv._ConvTransposeNd) else y
            wire.macs += moved.numel() * module.weight[0].numel()
        self.inside -= 1
        self._keep(y)

    def before_product(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        self.after_product()
        frame = self.stack[-1]
        name = product_name(frame.name, frame.products)
        frame.products += 1
        operands = tuple(Operand(f"{name}.{side}") for side in ("left", "right"))
        wire = self.wires.setdefault(name, Wire(name, None, operands))
        wire.calls += 1
        for operand, x in zip(wire.operands, (left, right), strict=True):
            operand.see(x)
            operand.parameter = self.parameters.get(_key(x), operand.parameter)
            if operand.parameter is not None:
                self.known_operands.append(operand.parameter)
            self._keep(x)
        self.open = wire, self.counter.get_total_flops()
        return left, right

    def watch_weights(self, function: Any, arguments: Any, result: Any) -> None:
        """Note the layers whose weight a function reads beside them; a view of it is no reading yet."""
        if self.inside or not isinstance(result, Tensor):
            return
        known = {_storage(o) for o in self.known_operands}
        for x in tree_leaves(arguments):
            storage = _storage(x) if isinstance(x, Tensor) and x.layout == torch.strided else 0
            if storage in self.weights and storage != _storage(result) and storage not in known:
                self.read |= dict.fromkeys(self.weights[storage], function.__name__.strip("_"))
        self.known_operands.clear()

    def after_product(self) -> None:
        if self.open is not None:
            wire, before = self.open
            wire.macs += (self.counter.get_total_flops() - before) // 2
            self.open = None

    def before_norm(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], name: str) -> None:
        x = args[0] if args else kwargs["input"]
        owner, layout = self.made.get(_key(x), (None, None))
        self.readers.setdefault(name, set()).add(owner if layout == _channel_layout(x) else None)

    def _keep(self, x: Tensor) -> None:
        self.alive.append(x)
        self.sizes.update(x.shape)
        self.largest = max(self.largest, self._per_sample(x.numel()))

    def attach(self, net: nn.Module) -> list[Any]:
        hooks = []
        for name, module in net.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(self.enter, name=name)))
            if type(module) in QUANTIZED_LAYERS:
                hooks.append(module.register_forward_pre_hook(partial(self.before_layer, name=name), with_kwargs=True))
                hooks.append(module.register_forward_hook(partial(self.after_layer, name=name), with_kwargs=True))
            elif type(module) in GATED_NORMS:
                hooks.append(module.register_forward_pre_hook(partial(self.before_norm, name=name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(self.leave, name=name)))
        return hooks

    def uncounted(self) -> dict[str, int]:
        """What the counter saw in a module's own code, without its layers, products and children."""
        left = {name: operations // 2 for name, operations in self.own.items()}
        for wire in self.wires.values():
            left[product_place(wire.name)[0] if wire.is_product else wire.name] -= wire.macs
        return {name: self._per_sample(macs) for name, macs in left.items() if macs > 0}

    def finish(self) -> None:
        """Turn what was counted into figures per sample; what is there once for all samples counts as one at least."""
        for wire in self.wires.values():
            wire.macs, wire.lookups = self._per_sample(wire.macs), self._per_sample(wire.lookups)
            wire.read_by = self.read.get(wire.name)

    def _per_sample(self, count: int) -> int:
        return -(-count // self.batch_size)


def _assign_norms(tracer: _Tracer) -> None:
    for norm, owners in tracer.readers.items():
        owner = tracer.wires.get(next(iter(owners)) or "") if len(owners) == 1 else None
        if owner is not None and owner.calls == 1 and owner.norm is None:
            owner.norm = norm


def trace(net: nn.Module, inputs: Inputs) -> Trace:
    """Run the network once on example inputs and describe what multiplies in it.

    Buffers and the random state are left as they were.

    Arguments:
        net: The network, in the mode (train or eval) whose activations shall be seen.
        inputs: Example inputs, batch in dimension 0.

    Returns:
        One :class:`Wire` per layer and product, and what is left.
    """
    tracer = _Tracer(net, inputs)
    hooks = tracer.attach(net)
    try:
        with untouched(net), countable(), tracer.counter, _Watch(tracer):
            inputs.run(net)
    finally:
        for hook in hooks:
            hook.remove()
    _assign_norms(tracer)
    uncounted = tracer.uncounted()
    tracer.finish()
    return Trace(tracer.wires, uncounted, tracer.sizes, tracer.largest, tracer.network_inputs)
