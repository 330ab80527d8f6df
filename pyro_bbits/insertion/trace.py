"""Find what enters each multiplying layer and each product by running the network once and watching it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pyro_bbits.insertion.inputs import Inputs, countable, untouched
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS
from pyro_bbits.insertion.products import WatchProducts, product_name, product_place
from pyro_bbits.insertion.wires import Key, Operand, Trace, Wire, channel_layout, key_of, storage_of

__all__ = ["trace"]


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
        self.network_inputs = {key_of(t) for t in inputs.tensors}
        self.parameters = {key_of(p): p for p in net.parameters()}
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
                self.weights.setdefault(storage_of(module.weight), []).append(name)
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
            self.made[key_of(y)] = name, channel_layout(y)
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
            operand.parameter = self.parameters.get(key_of(x), operand.parameter)
            if operand.parameter is not None:
                self.known_operands.append(operand.parameter)
            self._keep(x)
        self.open = wire, self.counter.get_total_flops()
        return left, right

    def watch_weights(self, function: Any, arguments: Any, result: Any) -> None:
        """Note the layers whose weight a function reads beside them; a view of it is no reading yet."""
        if self.inside or not isinstance(result, Tensor):
            return
        known = {storage_of(o) for o in self.known_operands}
        for x in tree_leaves(arguments):
            storage = storage_of(x) if isinstance(x, Tensor) and x.layout == torch.strided else 0
            if storage in self.weights and storage != storage_of(result) and storage not in known:
                self.read |= dict.fromkeys(self.weights[storage], function.__name__.strip("_"))
        self.known_operands.clear()

    def after_product(self) -> None:
        if self.open is not None:
            wire, before = self.open
            wire.macs += (self.counter.get_total_flops() - before) // 2
            self.open = None

    def before_norm(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], name: str) -> None:
        x = args[0] if args else kwargs["input"]
        owner, layout = self.made.get(key_of(x), (None, None))
        self.readers.setdefault(name, set()).add(owner if layout == channel_layout(x) else None)

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
