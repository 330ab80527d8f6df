"""A frozen network with what exports have to get right, its rows, and its master graph, made once."""

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, freeze, quantize
from pyro_bbits.analysis.export import HeldOut
from pyro_bbits.analysis.export.graph import master_graph

WIDTHS = {
    "first.weight": 4,
    "second.weight": 2,
    "second.input": 4,
    "third.weight": 8,
    "third.input": 8,
    "fourth.weight": 16,
    "fourth.input": 8,
    "head.weight": 8,
    "head.input": 8,
    "last.weight": 4,
    "last.input": 4,
}


class Mixed(nn.Module):
    """Scales per channel, pooling after a float and an integer layer, a skip, signed and unsigned inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.third, self.fourth = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.relu(F.max_pool2d(self.norm2(self.second(x)), 2))
        x = F.relu(self.third(x))
        x = F.relu(x + self.fourth(x)).mean((2, 3))
        logits: Tensor = self.last(torch.tanh(self.head(x)))
        return logits


def frozen_mixed() -> tuple[nn.Module, BitConfiguration, Tensor]:
    torch.manual_seed(5)
    net, x = Mixed(), torch.randn(96, 1, 14, 14)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(20):
            net(x)
    network = quantize(net.eval(), x)
    configuration = BitConfiguration.from_gates(network, network.open_gates()).with_bits(WIDTHS)
    float_net = Mixed()
    float_net.load_state_dict(network.net.state_dict())
    return freeze(float_net.eval(), configuration), configuration, x


@pytest.fixture(scope="session")
def mixed() -> tuple[nn.Module, BitConfiguration, HeldOut]:
    """Network, configuration and rows; the targets are the network's own choices, but for every tenth."""
    net, configuration, x = frozen_mixed()
    with torch.no_grad():
        targets = net(x).argmax(1)
    targets[::10] = (targets[::10] + 1) % 5
    return net, configuration, HeldOut(x, targets)


@pytest.fixture(scope="session")
def _master_bytes(mixed: tuple[nn.Module, BitConfiguration, HeldOut]) -> bytes:
    net, _, rows = mixed
    content: bytes = ir.to_proto(master_graph(net, rows.inputs[:3], opset=25)).SerializeToString()
    return content


@pytest.fixture
def master(_master_bytes: bytes) -> Callable[[], ir.Model]:
    """Fresh copies of the master graph at opset 25."""
    return lambda: ir.from_proto(onnx.load_model_from_string(_master_bytes))
