"""MACs and BOPs against the published totals, and expectations against enumeration of every gate pattern."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, GateProbabilities, GateValues, NetworkCost, QuantizedNetwork, quantize
from pyro_bbits.cost import tensor_macs
from pyro_bbits.insertion.structure import StructureSnapshot
from pyro_bbits.models import VGG7, LeNet5


@pytest.fixture(scope="module")
def lenet() -> QuantizedNetwork:
    return quantize(LeNet5().eval(), torch.rand(2, 1, 28, 28))


@pytest.fixture(scope="module")
def vgg() -> QuantizedNetwork:
    return quantize(VGG7().eval(), torch.rand(2, 3, 32, 32))


def at_width(network: QuantizedNetwork, bits: int) -> GateValues:
    gates = network.open_gates()
    gates.tensors.copy_(torch.tensor(network.layout.ladder.open_gates(bits)).float())
    return gates


def test_lenet5_has_the_published_macs(lenet: QuantizedNetwork) -> None:
    cost = NetworkCost(lenet)
    assert cost.names == ("conv1", "conv2", "fc1", "fc2")
    assert cost.macs.tolist() == [460_800, 3_276_800, 524_288, 5_120]
    assert cost.float_bops == 1024 * 4_267_008


@pytest.mark.parametrize(("bits", "percent"), [(2, 0.517), (4, 1.731), (8, 6.25), (32, 91.9)])
def test_lenet5_at_one_width_costs_what_is_published(lenet: QuantizedNetwork, bits: int, percent: float) -> None:
    places = 1 if bits == 32 else 3
    assert round(NetworkCost(lenet).relative_bops(at_width(lenet, bits)).item(), places) == percent


@pytest.mark.slow
def test_vgg7_costs_what_is_published(vgg: QuantizedNetwork) -> None:
    cost = NetworkCost(vgg)
    assert cost.float_bops == 1024 * 615_917_568
    percent = {bits: cost.relative_bops(at_width(vgg, bits)).item() for bits in (2, 4, 8, 32)}
    assert {bits: round(value, 3) for bits, value in percent.items()} == {2: 0.397, 4: 1.571, 8: 6.25, 32: 99.569}


def test_lenet5_has_the_published_tensor_weights(lenet: QuantizedNetwork) -> None:
    weights = dict(zip(lenet.layout.tensors, tensor_macs(lenet).tolist(), strict=True))
    published = {"conv1": 0.141, "conv2": 1.0, "fc1": 0.160, "fc2": 0.0016}
    for layer, m in published.items():
        assert weights[f"{layer}.weight"] == pytest.approx(m, abs=5e-4 if m > 0.01 else 5e-5)
        if layer != "conv1":
            assert weights[f"{layer}.input"] == weights[f"{layer}.weight"]


@pytest.mark.slow
def test_vgg7_has_the_published_tensor_weights(vgg: QuantizedNetwork) -> None:
    weights = dict(zip(vgg.layout.tensors, tensor_macs(vgg).tolist(), strict=True))
    convolutions = [weights[f"conv{i}.weight"] for i in range(1, 7)]
    assert convolutions == pytest.approx([0.0234, 1, 0.5, 1, 0.5, 1], abs=5e-5)
    assert weights["fc1.weight"] == pytest.approx(0.0556, abs=5e-5)
    assert weights["fc2.weight"] == pytest.approx(7e-5, abs=5e-6)


class Fork(nn.Module):
    """One tensor that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(x))
        return torch.cat([self.a(y), self.b(y)], 1)


def test_an_activation_counts_the_macs_of_all_its_consumers() -> None:
    network = quantize(Fork(), torch.randn(6, 2))
    weights = dict(zip(network.layout.tensors, tensor_macs(network).tolist(), strict=True))
    assert weights == {
        "enter.weight": pytest.approx(8 / 20),
        "a.weight": pytest.approx(12 / 20),
        "b.weight": 1.0,
        "a.input": pytest.approx(32 / 20),
    }


class Skip(nn.Module):
    """A channel of the head's input is dead only when it is dead in both layers that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        logits: Tensor = self.head(F.relu(self.inner(x)) + x)
        return logits


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv1d(4, 1, 3), nn.Flatten()
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Conv1d(3, 6, 2, groups=3), nn.ReLU(), nn.Conv1d(6, 1, 3), nn.Flatten()
    )


TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "chain": (chain, (3,), (2, 4, 8)),
    "skip": (Skip, (3,), (2, 4)),
    "grouped": (grouped, (2, 5), (2, 4)),
    "depthwise": (depthwise, (1, 5), (2, 4)),
}


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> QuantizedNetwork:
    build, shape, bits = TINY[request.param]
    return quantize(build(), torch.randn(6, *shape), bits=bits)


def alive(gates: frozenset[int], channels: tuple[int, ...]) -> bool:
    return not gates or any(channels[gate] for gate in gates)


def count_bops(network: QuantizedNetwork, channels: tuple[int, ...], tensors: tuple[tuple[int, ...], ...]) -> float:
    """One multiplication at a time: every pair of an input and an output channel that are connected and alive."""
    bits = network.layout.ladder.bits

    def width(row: int | None) -> int:
        opened = () if row is None else tensors[row]
        return 8 if row is None else bits[(*opened, 0).index(0)]

    total = 0.0
    for layer in network.layers:
        inputs, outputs = len(layer.inputs), len(layer.outputs)
        pairs = [(i, o) for i in range(inputs) for o in range(outputs)]
        connected = [(i, o) for i, o in pairs if i * layer.groups // inputs == o * layer.groups // outputs]
        kept = sum(alive(layer.inputs[i], channels) and alive(layer.outputs[o], channels) for i, o in connected)
        total += width(layer.weight) * width(layer.input) * layer.macs / len(connected) * kept
    return total


def test_hard_gates_cost_what_counting_one_by_one_gives(tiny: QuantizedNetwork) -> None:
    cost, layout = NetworkCost(tiny), tiny.layout
    for _ in range(50):
        gates = GateValues(*((torch.rand_like(g) < 0.6).float() for g in tiny.open_gates()))
        channels = tuple(int(z) for z in gates.channels)
        tensors = tuple(tuple(int(z) for z in row) for row in gates.tensors)
        expected = count_bops(tiny, channels, tensors)
        assert cost.layer_bops(gates).sum().item() == pytest.approx(expected, rel=1e-6)
        assert cost(gates).item() == pytest.approx(100 * expected / (1024 * sum(la.macs for la in tiny.layers)))
        # probabilities of 0 and 1 are the same thing
        assert torch.equal(cost.layer_bops(GateProbabilities(*gates)), cost.layer_bops(gates))
    assert layout.num_channels


def test_expected_bops_equal_enumeration_with_their_gradient(tiny: QuantizedNetwork) -> None:
    """Every pattern of all gates, weighted by its probability."""
    cost, layout = NetworkCost(tiny).double(), tiny.layout
    rows, rungs = len(layout.tensors), len(layout.ladder.residuals)
    p = (0.1 + 0.8 * torch.rand(layout.num_channels + rows * rungs, dtype=torch.double)).requires_grad_()
    channels, tensors = p[: layout.num_channels], p[layout.num_channels :].reshape(rows, rungs)
    actual = cost.layer_bops(GateProbabilities(channels, tensors)).sum()

    patterns = list(product((0, 1), repeat=len(p)))
    z = torch.tensor(patterns, dtype=torch.double)
    bops = torch.tensor(
        [
            count_bops(
                tiny,
                pattern[: layout.num_channels],
                tuple(pattern[layout.num_channels + r * rungs :][:rungs] for r in range(rows)),
            )
            for pattern in patterns
        ],
        dtype=torch.double,
    )
    expected = (z * p + (1 - z) * (1 - p)).prod(1) @ bops
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(torch.autograd.grad(actual, p), torch.autograd.grad(expected, p), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert (mine != 0).all()


def test_depthwise_macs_shrink_with_the_kept_fraction_and_not_with_its_square() -> None:
    network = quantize(depthwise(), torch.randn(6, 1, 5))
    kept = NetworkCost(network).kept_macs(torch.tensor([1.0, 0.0, 1.0]))
    assert kept.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    dense = quantize(chain(), torch.randn(6, 3))
    assert NetworkCost(dense).kept_macs(torch.tensor([1.0, 0.0])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("closed", "kept"),
    [
        ((0,), [0.5, 0.5, 1.0]),  # enter[0]: the sum still has inner[0]
        ((2,), [1.0, 0.5, 1.0]),  # inner[0]: the sum still has enter[0]
        ((0, 2), [0.5, 0.25, 0.5]),
        ((0, 3), [0.5, 0.25, 1.0]),
        ((0, 1, 2, 3), [0.0, 0.0, 0.0]),
    ],
)
def test_a_sum_loses_a_channel_only_when_every_producer_does(closed: tuple[int, ...], kept: list[float]) -> None:
    network = quantize(Skip(), torch.randn(6, 3))
    gates = network.open_gates()
    gates.channels[list(closed)] = 0.0
    assert NetworkCost(network).kept_macs(gates.channels).tolist() == kept


def test_kept_outputs_count_live_channels() -> None:
    network = quantize(depthwise(), torch.randn(6, 1, 5))
    counts = NetworkCost(network).kept_outputs(torch.tensor([1.0, 0.0, 0.25]))
    assert [count.item() for count in counts] == [1.25, 2.5, 1.0]


def test_gates_without_their_coarser_gate_do_not_count() -> None:
    network = quantize(chain(), torch.randn(6, 3), bits=(2, 4, 8))
    cost, gates = NetworkCost(network), network.open_gates()
    gates.tensors[:] = torch.tensor([0.0, 1.0])
    assert cost.expected_bits(gates.tensors).tolist() == [2.0] * 3


def test_the_configuration_reports_the_same_bops(tiny: QuantizedNetwork) -> None:
    gates = GateValues(*((torch.rand_like(g) < 0.6).float() for g in tiny.open_gates()))
    configuration, cost = BitConfiguration.from_gates(tiny, gates), NetworkCost(tiny)
    assert [layer.bops for layer in configuration.layers] == pytest.approx(cost.layer_bops(gates).tolist())
    assert configuration.relative_bops == pytest.approx(cost(gates).item())
    assert [layer.macs for layer in configuration.layers] == cost.macs.tolist()
    share = (cost.kept_macs(gates.channels) * cost.macs).sum() / cost.macs.sum()
    assert configuration.relative_macs == pytest.approx(100 * share.item())


def test_a_snapshot_costs_what_its_network_costs(tiny: QuantizedNetwork) -> None:
    gates = GateProbabilities(*(torch.rand_like(g) for g in tiny.open_gates()))
    assert torch.equal(NetworkCost(StructureSnapshot.of(tiny))(gates), NetworkCost(tiny)(gates))


def test_a_cost_has_nothing_to_save(tiny: QuantizedNetwork) -> None:
    assert not NetworkCost(tiny).state_dict()


def test_half_precision_of_the_network_does_not_round_its_cost(tiny: QuantizedNetwork) -> None:
    gates, cost = GateProbabilities(*(torch.rand_like(g) for g in tiny.open_gates())), NetworkCost(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        actual = cost(gates)
    assert torch.equal(actual, cost(gates))


def test_a_grouped_convolution_counts_group_by_group() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    network = quantize(net, torch.randn(4, 3, 5, 5))
    gates = network.open_gates()
    gates.channels[network.layout.slices["0"]] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    first, grouped, last = NetworkCost(network).kept_macs(gates.channels).tolist()
    assert (first, last) == (0.25, 1.0)
    assert grouped == 0.25  # half of one group's inputs, none of the other's
