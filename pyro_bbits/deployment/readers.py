"""Which layers have no reader but their batch norm, seen by running the network once."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_bbits.insertion.inputs import Inputs

__all__ = ["Readers"]

ASKS = frozenset({"__get__", "__len__", "dim", "get_device", "is_contiguous", "is_floating_point", "numel", "size"})
"""Functions that ask a tensor for its form alone, if they return no tensor."""


class Readers(TorchFunctionMode):
    """While active, notes which functions read the outputs and numbers of layers that have a batch norm behind them.

    Arguments:
        net: The network.
        norms: Path of the batch norm behind a layer, by the path of the layer.
    """

    def __init__(self, net: nn.Module, norms: Mapping[str, str]) -> None:
        super().__init__()
        self.net, self.norms = net, norms
        self.calls = dict.fromkeys((*norms, *norms.values()), 0)
        self.running: list[str] = []  # layers and norms under way
        self.read: set[str] = set()
        self.owner: dict[int, tuple[str, str]] = {}  # of a tensor: its layer, and the module that may read it
        self.alive: list[Tensor] = []  # so that no identity is used twice
        for layer, norm in norms.items():
            for name in (layer, norm):
                module = net.get_submodule(name)
                self.owner |= {id(t): (layer, name) for t in (*module.parameters(), *module.buffers())}

    def alone(self, inputs: Inputs) -> set[str]:
        """Run the network on examples; layers that are called once, and whose output goes into their norm alone."""
        hooks = []
        for layer, norm in self.norms.items():
            for name in (layer, norm):
                module = self.net.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(partial(self._enter, name=name)))
                hooks.append(module.register_forward_hook(partial(self._leave, name=name, norm=self.norms.get(name))))
        try:
            with torch.no_grad(), self:
                result = inputs.run(self.net)
        finally:
            for hook in hooks:
                hook.remove()
        self._note(tree_leaves(result))
        return {layer for layer, norm in self.norms.items() if self._is_alone(layer, norm)}

    def _is_alone(self, layer: str, norm: str) -> bool:
        return layer not in self.read and self.calls[layer] == self.calls[norm] == 1

    def _enter(self, module: nn.Module, args: Any, name: str) -> None:
        self.running.append(name)
        self.calls[name] += 1

    def _leave(self, module: nn.Module, args: Any, y: Tensor, name: str, norm: str | None) -> None:
        self.running.pop()
        if norm is not None:
            self.owner[id(y)] = name, norm
            self.alive.append(y)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            asks = func.__name__ in ASKS and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
            if not asks:
                self._note(tree_leaves((args, kwargs)))
        return result

    def _note(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            layer, reader = self.owner.get(id(tensor), (None, None))
            if layer is not None and reader not in self.running:
                self.read.add(layer)
