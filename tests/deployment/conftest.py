"""Quantized networks to freeze: the odd ones of the insertion's tests, and the reference networks, small."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits import BitConfiguration, GateValues, QuantizedNetwork, quantize
from pyro_bbits.models import build_network


def _odd() -> Any:
    path = Path(__file__).parents[1] / "insertion" / "conftest.py"
    spec = importlib.util.spec_from_file_location("odd_networks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["odd_networks"] = module
    spec.loader.exec_module(module)
    return module


ODD = _odd()

SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "lenet5": ((1, 16, 16), {}),
    "vgg7": ((3, 8, 8), {"width": 4}),
    "resnet20": ((3, 12, 12), {"width": 4}),
    "resnet18": ((3, 32, 32), {"width": 4}),
    "mobilenetv2": ((3, 32, 32), {"width": 0.1}),
    "vit": ((3, 8, 8), {"width": 12, "depth": 2, "heads": 3}),
    "mlp": ((6,), {"widths": (8, 5), "batch_norm": True}),
}

Run = Callable[[nn.Module], Tensor]


def outputs(result: Any) -> Tensor:
    return torch.cat([leaf.detach().flatten(1) for leaf in tree_leaves(result)], 1)


@dataclass
class Trained:
    """A float network with weights that are no longer those of the calibration, and its quantized form."""

    name: str
    net: nn.Module
    network: QuantizedNetwork
    example: Any

    def run(self, net: nn.Module) -> Tensor:
        """Outputs on the examples."""
        with torch.no_grad():
            return outputs(net(**self.example) if isinstance(self.example, dict) else net(self.example))

    def gates(self, keep: float) -> GateValues:
        """Hard gates at random: a width per tensor, channels kept with a probability."""
        layout, gates = self.network.layout, self.network.open_gates()
        rungs = torch.randint(len(layout.ladder.bits), (len(layout.tensors), 1))
        channels = (torch.rand(layout.num_channels) < keep).float()
        tensors = (torch.arange(gates.tensors.shape[1]) < rungs) & layout.any_channel(channels)[:, None]
        return GateValues(channels, tensors.float())

    def configuration(self, keep: float = 0.7) -> BitConfiguration:
        """A configuration at random."""
        return BitConfiguration.from_gates(self.network, self.gates(keep))

    def fresh(self) -> nn.Module:
        """Another network of the class, its weights those of the start."""
        net, _ = ODD.build(self.name) if self.name in ODD.NETS else _reference(self.name)
        made: nn.Module = net
        return made


def _reference(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    shape, options = SMALL[name]
    net, x = build_network(name, shape, 5, **options), torch.randn(6, *shape)
    with torch.no_grad():
        for _ in range(10):
            net(x)
    return net.eval(), x


@cache
def trained(name: str, bits: tuple[int, ...] = (2, 4, 8, 16, 32)) -> Trained:
    net, example = ODD.build(name) if name in ODD.NETS else _reference(name)
    network = quantize(net, example, bits=bits).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, value in network.named_buffers():
            if key.endswith("running_mean"):
                value.add_(0.1 * torch.randn_like(value))
    net.load_state_dict(network.net.state_dict())
    return Trained(name, net, network, example)


@pytest.fixture(params=[*ODD.NETS, *(name for name in SMALL if name != "mobilenetv2")])  # it takes long to quantize
def case(request: Any) -> Trained:
    """Each network in turn."""
    made = trained(request.param)
    torch.manual_seed(1)
    return made


@pytest.fixture
def get_case() -> Callable[..., Trained]:
    """A network by name."""
    return trained
