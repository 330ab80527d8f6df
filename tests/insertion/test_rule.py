"""A rule takes the place of the gated quantizer, in training and in evaluation, for all tensors."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import GateValues, quantize
from pyro_bbits.insertion import QuantizationRule, QuantizedNetwork
from pyro_bbits.kernels import use_body


class Halve(QuantizationRule):
    """Halves weights, leaves the rest, and notes what it is given."""

    def __init__(self, network: QuantizedNetwork) -> None:
        super().__init__()
        self.weights = [layer.weight for layer in network.layers]
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.seen: list[tuple[int, torch.dtype]] = []

    def forward(self, row: int, x: Tensor) -> Tensor:
        self.seen.append((row, x.dtype))
        return x * self.factor if row in self.weights else x


@pytest.fixture
def network() -> QuantizedNetwork:
    """Rows 0.weight, 2.weight, 2.input; three channel gates."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    network = quantize(net, torch.rand(16, 4))
    network.rule = Halve(network)
    return network


def expected(network: QuantizedNetwork, x: Tensor, gate: Tensor) -> Tensor:
    first, last = network.net[0], network.net[2]  # type: ignore[index]
    hidden = (x @ (first.weight * 0.5 * gate[:, None]).T + first.bias * gate).relu()
    result: Tensor = hidden @ (last.weight * 0.5).T + last.bias
    return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_rule_quantizes_and_channel_gates_still_count(network: QuantizedNetwork, training: bool, grad: bool) -> None:
    x, channels = torch.randn(5, 4), torch.tensor([1.0, 0.0, 1.0])
    network.train(training)
    for rungs in (0.0, 0.5, 1.0):  # residual gates have no effect
        gates = GateValues(channels, torch.full((3, 4), rungs))
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(network(x, gates=gates), expected(network, x, channels))


def test_parameters_of_a_rule_are_trained_and_saved_with_the_network(network: QuantizedNetwork) -> None:
    network(torch.randn(5, 4), gates=network.open_gates()).square().sum().backward()
    assert isinstance(network.rule, Halve)
    assert network.rule.factor.grad is not None and network.rule.factor.grad != 0
    assert network.quantizers.log_range.grad is None or not network.quantizers.log_range.grad.any()
    assert "rule.factor" in network.state_dict()
    copied = copy.deepcopy(network)
    assert copied.rule is not network.rule


def test_a_network_without_a_rule_has_nothing_more_to_save() -> None:
    network = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(16, 4))
    assert not any("rule" in key for key in network.state_dict())
    assert network.rule is None


def test_a_rule_computes_in_float32_whatever_autocast_does(network: QuantizedNetwork) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(5, 4), gates=network.open_gates())
    assert out.dtype == torch.bfloat16
    assert isinstance(network.rule, Halve)
    assert {dtype for _, dtype in network.rule.seen} == {torch.float32}


def test_removing_the_rule_brings_the_gates_back(network: QuantizedNetwork) -> None:
    x = torch.rand(5, 4)
    reference = copy.deepcopy(network)
    reference.rule = None
    network.rule = None
    gates = network.open_gates()
    torch.testing.assert_close(network(x, gates=gates), reference(x, gates=gates), rtol=0, atol=0)


def test_a_rule_switches_fused_norms_off() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    network = quantize(net, torch.rand(16, 4)).train()
    with use_body("triton"):  # as on a GPU; nothing is computed here
        assert network._fuses()
        network.rule = Halve(network)
        assert not network._fuses()
