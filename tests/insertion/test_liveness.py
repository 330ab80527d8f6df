"""Closed channels are exactly zero where the wiring says so, and nowhere else.

The check knows nothing of operators: it runs the real network with random hard gates on many random weights and inputs,
and compares what enters each layer with what :attr:`LayerInfo.inputs` predicts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import GateValues, QuantizedNetwork, quantize

Case = tuple[nn.Module, Mapping[str, Tensor]]


def scramble(net: nn.Module) -> None:
    """Random weights of either sign; variances stay positive."""
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    for name, tensor in net.named_buffers():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_()


@contextmanager
def nonzero_inputs(network: QuantizedNetwork) -> Iterator[dict[str, Tensor]]:
    """Which input channels of each layer have been anything but zero so far."""
    layers = [layer for layer in network.layers if not layer.is_product and layer.kind != "Embedding"]
    found = {layer.name: torch.zeros(len(layer.inputs), dtype=torch.bool) for layer in layers}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Mapping[str, Tensor]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            x = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
            found[name] |= (x != 0).flatten(0, -2).any(0)

        return hook

    hooks = [
        network.net.get_submodule(layer.name).register_forward_pre_hook(look(layer.name), with_kwargs=True)
        for layer in layers
    ]
    yield found
    for hook in hooks:
        hook.remove()


def random_channels(network: QuantizedNetwork, keep: float) -> GateValues:
    gates = network.open_gates()
    return gates._replace(channels=(torch.rand(network.layout.num_channels) < keep).float())


def predicted(network: QuantizedNetwork, channels: Tensor) -> dict[str, list[bool]]:
    """Written as loops, independent of the library's own Liveness."""
    return {
        layer.name: [not gates or any(channels[g] > 0 for g in gates) for gates in layer.inputs]
        for layer in network.layers
        if not layer.is_product and layer.kind != "Embedding"
    }


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.0])
def test_dead_channels_are_zero_and_live_ones_are_not(
    case: Case, draw_like: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]], keep: float
) -> None:
    net, example = case
    network = quantize(net, example)
    gates = random_channels(network, keep)
    with nonzero_inputs(network) as found, torch.no_grad():
        for _ in range(12):
            scramble(network.net)
            network(**draw_like(example, 32), gates=gates)
    assert {name: channels.tolist() for name, channels in found.items()} == predicted(network, gates.channels)
