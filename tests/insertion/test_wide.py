"""Wide and deep networks: every channel is followed by its number, and many layers in one pass."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import QuantizedNetwork, quantize
from pyro_bbits.cost import NetworkCost
from pyro_bbits.insertion import experiment
from pyro_bbits.insertion.probe import _origins

Case = tuple[nn.Module, Mapping[str, Tensor]]

WIDTH = 5000


class Shuffled(nn.Module):
    """Two wide layers are added, one of them in another order of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.order = torch.randperm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.a(x)) + F.relu(self.b(x))[:, self.order])
        return logits


@pytest.fixture
def shuffled() -> tuple[Shuffled, QuantizedNetwork]:
    net = Shuffled()
    return net, quantize(net, torch.randn(6, 3))


def test_each_of_thousands_of_channels_is_told_apart(shuffled: tuple[Shuffled, QuantizedNetwork]) -> None:
    net, network = shuffled
    a, b, head = network.layers
    assert a.outputs == tuple(frozenset([c]) for c in range(WIDTH))
    assert b.outputs == tuple(frozenset([WIDTH + c]) for c in range(WIDTH))
    assert head.inputs == tuple(frozenset([j, WIDTH + c]) for j, c in enumerate(net.order.tolist()))
    assert head.outputs == (frozenset[int](),) * 2


def test_cost_of_thousands_of_channels_is_that_of_the_kept_ones(shuffled: tuple[Shuffled, QuantizedNetwork]) -> None:
    net, network = shuffled
    gates = network.open_gates()
    gates.channels.copy_((torch.rand(2 * WIDTH) < 0.3).float())
    a, b = gates.channels.split(WIDTH)
    either = ((a + b[net.order]) > 0).float().mean()
    expected = torch.stack([a.mean(), b.mean(), either])
    torch.testing.assert_close(NetworkCost(network).kept_macs(gates.channels), expected)


def test_each_layer_of_a_long_chain_reads_the_one_before() -> None:
    layers = [layer for _ in range(250) for layer in (nn.Linear(4, 4), nn.ReLU())]
    network = quantize(nn.Sequential(*layers, nn.Linear(4, 2)), torch.rand(6, 4))
    assert len(network.layout.tensors) == 501
    for i, layer in enumerate(network.layers):
        assert layer.inputs == tuple(frozenset([4 * (i - 1) + c] if i else []) for c in range(4))
    assert [layer.name for layer in network.layers if layer.refused] == ["500"]


def test_layers_followed_together_are_those_followed_one_by_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for room in (1, 2**22):
        monkeypatch.setattr(experiment, "ROOM", room)
        found.append(quantize(*case).layers)
    assert found[0] == found[1]


@pytest.mark.parametrize("channels", [1, 2, 6, 37])
def test_origins_are_the_channels_whose_every_bit_has_been_seen(channels: int) -> None:
    bits = channels.bit_length()
    shown = torch.rand(2 * bits, 200) < 0.8
    with_bit, without_bit = shown.chunk(2)
    expected = [
        {c for c in range(channels) if all((with_bit if c >> k & 1 else without_bit)[k, j] for k in range(bits))}
        for j in range(200)
    ]
    found = list(_origins(shown, channels))
    assert [set(f) for f in found] == expected
    assert all(len(set(f)) == len(f) for f in found)


def test_numbers_of_channels_are_recovered_from_their_bits() -> None:
    numbers, bits = torch.arange(WIDTH), torch.arange(WIDTH.bit_length())
    has_bit = (numbers >> bits[:, None] & 1).bool()
    assert list(_origins(torch.cat([has_bit, ~has_bit]), WIDTH)) == [[c] for c in range(WIDTH)]
