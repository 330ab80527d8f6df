"""Which channels of a frozen network go together, by Torch-Pruning, and their removal."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyro_bbits.deployment.frozen import FrozenLayer, frozen_layers
from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.layers import out_channels

__all__ = ["CoupledChannels"]

MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RNNBase, nn.MultiheadAttention)
"""What reads channels together, so that one less changes the others."""


class CoupledChannels:
    """A frozen network from which dead channels are removed, with all that is coupled with them.

    Arguments:
        network: The network, which is changed.
        inputs: Example inputs.
        multiple_of: What the number of channels is kept a multiple of.

    Raises:
        ImportError: If Torch-Pruning is not installed.

    Attributes:
        origin: The number that each output channel of a layer had at first.
        masked: Why a layer keeps dead channels.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, multiple_of: int) -> None:
        _torch_pruning()
        self.network, self.inputs, self.multiple_of = network, inputs.map(lambda x: x[:2]), multiple_of
        self.origin = {name: list(range(out_channels(layer))) for name, layer in frozen_layers(network).items()}
        self.masked: dict[str, str] = {}

    def remove(self, names: Sequence[str]) -> None:
        """Remove what can be removed of the dead channels of some layers.

        Raises:
            Exception: Whatever Torch-Pruning makes of a network that it cannot handle.
        """
        self.network.requires_grad_(True)  # the dependencies are followed along gradients
        try:
            graph = self._graph()
            for name in names:
                _Root(self, graph, name).remove()
        finally:
            self.network.requires_grad_(False)

    def _graph(self) -> Any:
        arguments = dict(self.inputs.kwargs) or self.inputs.args
        with warnings.catch_warnings(action="ignore"), torch.enable_grad():
            return _torch_pruning().DependencyGraph().build_dependency(self.network, arguments, verbose=False)


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "removing channels needs Torch-Pruning; install it with: pip install 'pyro-bbits[deploy]'"
        ) from error
    return torch_pruning


class _Root:
    """The dead channels of one layer, and what is coupled with them."""

    def __init__(self, coupled: CoupledChannels, graph: Any, name: str) -> None:
        self.coupled, self.graph, self.name = coupled, graph, name
        self.layer: Any = coupled.network.get_submodule(name)
        self.names = {module: path for path, module in coupled.network.named_modules()}

    def remove(self) -> None:
        """Remove those that are dead wherever they are written; note why others stay."""
        if self.layer not in self.graph.module2node:
            self.coupled.masked[self.name] = "Torch-Pruning does not find it in the network's graph"
            return
        channels = self.layer.dead.nonzero().flatten().tolist()
        while channels and (blocked := dict(self._blocked(self._group(channels)))):
            channels = [channel for channel in channels if channel not in blocked]
            self.coupled.masked[self.name] = next(iter(blocked.values()))
        channels = self._round(channels)
        if channels:
            self._prune(channels)

    def _group(self, channels: Sequence[int]) -> Any:
        function = self.graph.get_pruner_of_module(self.layer).prune_out_channels
        return self.graph.get_pruning_group(self.layer, function, list(channels))

    def _blocked(self, group: Any) -> Iterator[tuple[int, str]]:
        """Channels of the layer that cannot go, with the reason."""
        for item in group:
            module, writes = item.dep.target.module, self._writes(item)
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                reason = self._reason(module, writes, channel)
                if reason:
                    yield root, reason

    def _reason(self, module: Any, writes: bool, channel: int) -> str | None:
        name = self.names.get(module, "")
        if type(module).__name__ == "_OutputOp":
            return "they feed the network's output"
        if isinstance(module, MIXING):
            return f"{name} reads all channels together"
        if not isinstance(module, _ConvNd | nn.Linear | nn.Embedding):
            return None
        if channel >= (out_channels(module) if writes else _in_channels(module)):
            return f"they do not match the channels of {name}"
        if isinstance(module, _ConvNd) and module.groups > 1 and not _is_depthwise(module):
            return f"{name} has groups, which would lose their equal size"
        if writes and not (isinstance(module, FrozenLayer) and module.dead[channel]):
            return f"they are coupled with channels of {name} that are in use"
        return None

    def _round(self, channels: Sequence[int]) -> Sequence[int]:
        """As many as may go."""
        count, multiple = out_channels(self.layer), self.coupled.multiple_of
        kept = min(count, max(1, -(-(count - len(channels)) // multiple)) * multiple)
        chosen = list(channels)[: count - kept]
        while chosen and not self.graph.check_pruning_group(self._group(chosen)):  # a coupled layer would be empty
            chosen.pop()
        if len(chosen) < len(channels):
            why = f"the number of channels is kept a multiple of {multiple}" if multiple > 1 else "one channel is kept"
            self.coupled.masked.setdefault(self.name, why)
        return chosen

    def _prune(self, channels: Sequence[int]) -> None:
        group = self._group(channels)
        steps = [(item.dep.target.module, self._writes(item), list(item.idxs)) for item in group]
        depthwise: set[Any] = {
            module for module, _, _ in steps if isinstance(module, _ConvNd) and _is_depthwise(module)
        }
        group.prune()
        for module, writes, gone in steps:
            if isinstance(module, FrozenLayer):
                self._shrink(module, writes, gone, module in depthwise)

    def _shrink(self, layer: Any, writes: bool, gone: Sequence[int], is_depthwise: bool) -> None:
        """Let codes, scales and the rest follow the weight."""
        axis = 0 if is_depthwise else _axis(layer, writes)
        if layer.codes is not None:
            layer.codes = _without(layer.codes, gone, axis)
        if not writes:
            return
        layer.dead = _without(layer.dead, gone, 0)
        if layer.scale is not None and layer.scale.dim():
            layer.scale = _without(layer.scale, gone, 0)
        if layer.bias_codes is not None:
            layer.bias_codes = _without(layer.bias_codes, gone, 0)
        origin, name = self.coupled.origin, self.names[layer]
        origin[name] = [number for i, number in enumerate(origin[name]) if i not in set(gone)]

    def _writes(self, item: Any) -> bool:
        """Whether a step of a group takes a layer's output channels, rather than its input channels."""
        return bool(self.graph.is_out_channel_pruning_fn(item.dep.handler))


def _is_depthwise(conv: _ConvNd) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels > 1


def _in_channels(layer: Any) -> int:
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _axis(layer: nn.Module, writes: bool) -> int:
    """Dimension of a weight that holds its output or its input channels."""
    if isinstance(layer, nn.Embedding):
        return 1
    return int(writes) if isinstance(layer, _ConvTransposeNd) else int(not writes)


def _without(values: Tensor, gone: Sequence[int], axis: int) -> Tensor:
    kept = torch.ones(values.shape[axis], dtype=torch.bool, device=values.device)
    kept[list(gone)] = False
    return values[(slice(None),) * axis + (kept,)]
