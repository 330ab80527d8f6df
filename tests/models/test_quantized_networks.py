"""What becomes of the reference networks when they are quantized: the same function, gates, and the published cost."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import GateValues, NetworkCost, QuantizedNetwork, quantize
from pyro_bbits.insertion import StructureSnapshot
from pyro_bbits.models import MLP, NETWORKS, build_network

CountMacs = Callable[[nn.Module, tuple[int, ...]], dict[str, int]]

SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "digits-net": ((1, 8, 8), {}),
    "lenet5": ((1, 16, 16), {}),
    "vgg7": ((3, 8, 8), {"width": 4}),
    "resnet20": ((3, 12, 12), {"width": 4}),
    "resnet18": ((3, 32, 32), {"width": 4}),
    "mobilenetv2": ((3, 32, 32), {"width": 0.1}),
    "vit": ((3, 8, 8), {"width": 12, "depth": 2, "heads": 3}),
    "mlp": ((6,), {"widths": (8, 5), "batch_norm": True}),
}


def used_network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with running statistics and shifts that are no longer a fresh one's, in evaluation mode; and inputs."""
    torch.manual_seed(3)
    shape, options = SMALL[name]
    net, x = build_network(name, shape, 5, **options), torch.randn(8, *shape)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(20):
            net(x)
    return net.eval(), x


@pytest.fixture(scope="module")
def quantized() -> dict[str, QuantizedNetwork]:
    return {name: quantize(*used_network(name)) for name in SMALL}


def test_every_network_is_here() -> None:
    assert set(SMALL) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_open_gates_change_nothing(name: str, quantized: dict[str, QuantizedNetwork]) -> None:
    net, x = used_network(name)
    network = quantized[name]
    with torch.no_grad():
        expected, actual = net(x), network(x, gates=network.open_gates())
        coarse = network(x, gates=at_width(network, 2))
    assert expected.std(0).min() > 0.01, "the samples differ"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)  # float32 through up to 53 layers; outputs near 1
    assert not torch.allclose(coarse, expected, rtol=0.05), "two bits are seen"


def at_width(network: QuantizedNetwork, bits: int) -> GateValues:
    gates = network.open_gates()
    gates.tensors.copy_(torch.tensor(network.layout.ladder.open_gates(bits)).float())
    return gates


OUTPUT = "it feeds the network's output"
DEPTHWISE = "it is depthwise and takes the gates of the channels it reads"


@pytest.mark.parametrize("name", ["digits-net", "lenet5", "vgg7", "resnet20", "resnet18", "mlp"])
def test_all_layers_but_the_last_are_prunable(name: str, quantized: dict[str, QuantizedNetwork]) -> None:
    *layers, last = quantized[name].layers
    assert [layer.refused for layer in layers] == [None] * len(layers) and last.refused == OUTPUT
    assert not any(last.outputs) and all(all(layer.outputs) for layer in layers)
    assert all(layer.input is None or all(layer.inputs) for layer in (*layers, last)), "all inputs can die"


def test_depthwise_layers_of_mobilenetv2_take_the_gates_of_their_producers(
    quantized: dict[str, QuantizedNetwork],
) -> None:
    layers = quantized["mobilenetv2"].layers
    assert [layer.refused for layer in layers if layer.depthwise] == [DEPTHWISE] * 17
    assert [layer.refused for layer in layers if not layer.depthwise] == [None] * 35 + [OUTPUT]
    for before, layer in pairwise(layers):
        if layer.depthwise:
            assert layer.outputs == layer.inputs == before.outputs


def test_hidden_units_of_a_vit_are_prunable(quantized: dict[str, QuantizedNetwork]) -> None:
    """Its stream is not: a LayerNorm mixes all features. A head of attention keeps its size."""
    network = quantized["vit"]
    refused = {layer.name: layer.refused for layer in network.layers}
    for block in (0, 1):
        prefix, follower = f"blocks.{block}", "blocks.1.attention.q" if block == 0 else "head"
        product = f"it feeds the product {prefix}.attention.matmul"
        assert refused.pop(f"{prefix}.fc1") is None
        assert [refused.pop(f"{prefix}.attention.{name}") for name in "qkv"] == [f"{product}{i}" for i in (0, 0, 1)]
        assert {refused.pop(f"{prefix}.attention.matmul{i}") for i in (0, 1)} == {"it multiplies two activations"}
        lost = "a channel that is off does not arrive as zero at {}: it passes {}"
        assert refused.pop(f"{prefix}.attention.out") == lost.format(f"{prefix}.fc1", "add")
        assert refused.pop(f"{prefix}.fc2") == lost.format(follower, "add")
    assert refused == {"patches": lost.format("blocks.0.attention.q", "add"), "head": OUTPUT}
    by_name = {layer.name: layer for layer in network.layers}
    assert by_name["blocks.0.fc2"].inputs == by_name["blocks.0.fc1"].outputs
    assert len({by_name[f"blocks.0.attention.{name}"].input for name in "qkv"}) == 1, "one tensor, one quantizer"


def test_hidden_units_of_a_wider_vit_are_prunable_too() -> None:
    """There the products differ by rounding from one sample to the next."""
    network = quantize(build_network("vit", (3, 32, 32), 5, width=48, depth=1).eval(), torch.rand(2, 3, 32, 32))
    assert network.layout.slices.keys() == {"blocks.0.fc1"}


def test_residual_sums_of_resnet18_live_while_one_summand_does(quantized: dict[str, QuantizedNetwork]) -> None:
    network = quantized["resnet18"]
    slices, layers = network.layout.slices, {layer.name: layer for layer in network.layers}

    def gates(channel: int, *names: str) -> frozenset[int]:
        return frozenset(slices[name].start + channel for name in names)

    assert layers["layer1.0.conv1"].inputs[2] == gates(2, "conv1")
    assert layers["layer1.0.conv2"].inputs[2] == gates(2, "layer1.0.conv1"), "inside a block there is one producer"
    first = ("conv1", "layer1.0.conv2")
    assert layers["layer1.1.conv1"].inputs[2] == gates(2, *first)
    assert layers["layer2.0.conv1"].inputs[2] == gates(2, *first, "layer1.1.conv2")
    assert layers["layer2.0.downsample.0"].inputs == layers["layer2.0.conv1"].inputs
    assert layers["layer2.0.downsample.0"].input == layers["layer2.0.conv1"].input, "they share a quantizer"
    assert layers["fc"].inputs[9] == gates(9, "layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv2")


def test_new_channels_of_resnet20_come_from_the_convolution_alone(quantized: dict[str, QuantizedNetwork]) -> None:
    """The shortcut of a wider stage has zeros there."""
    network = quantized["resnet20"]
    layers = {layer.name: layer for layer in network.layers}
    start = network.layout.slices["layer2.0.conv2"].start
    inputs = layers["layer2.1.conv1"].inputs
    assert [len(gates) for gates in inputs] == [5] * 4 + [1] * 4  # conv1, three blocks of stage 1, and this one
    assert inputs[4:] == tuple(frozenset({start + channel}) for channel in range(4, 8))


@pytest.mark.parametrize("name", NETWORKS)
def test_dead_channels_are_dead_in_the_network(name: str, quantized: dict[str, QuantizedNetwork]) -> None:
    """With random channels closed, an input channel is zero for all samples where the wiring says so."""
    network = copy.deepcopy(quantized[name])
    _, x = used_network(name)
    gates = network.open_gates()
    gates.channels.copy_((torch.rand_like(gates.channels) < 0.4).float())
    seen: dict[str, Tensor] = {}
    layers = [layer for layer in network.layers if not layer.is_product]
    for layer in layers:
        network.net.get_submodule(layer.name).register_forward_pre_hook(
            lambda module, args, name=layer.name: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        network(x, gates=gates)
    dead = 0
    for layer in layers:
        entered = seen[layer.name].movedim(1, -1) if layer.kind == "Conv2d" else seen[layer.name]
        lives = entered.reshape(-1, len(layer.inputs)).any(0)
        claimed = torch.tensor([not g or any(bool(gates.channels[i]) for i in g) for g in layer.inputs])
        assert not (lives & ~claimed).any(), f"{layer.name}: a channel that is said to be dead lives"
        dead += int((~claimed).sum())
    assert dead > 0


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_of_layers_are_those_of_the_flop_counter(
    name: str, quantized: dict[str, QuantizedNetwork], count_macs: CountMacs
) -> None:
    net, x = used_network(name)
    counted = count_macs(net, tuple(x.shape[1:]))
    assert {layer.name: layer.macs for layer in quantized[name].layers if not layer.is_product} == counted


def structure_at(name: str, side: int, count_macs: CountMacs) -> StructureSnapshot:
    """The full network at the full size."""
    network = quantize(build_network(name, (3, side, side), 1000).eval(), torch.rand(1, 3, side, side))
    macs = count_macs(build_network(name, (3, side, side), 1000), (3, side, side))
    assert {layer.name: layer.macs for layer in network.layers} == macs
    return StructureSnapshot.of(network)


PUBLISHED = {
    "resnet18": (1_814_073_344, {2: 0.467, 4: 1.664, 8: 6.25, 16: 24.19}),
    "mobilenetv2": (300_774_272, {2: 0.433, 4: 1.619, 8: 6.25, 16: 24.55}),
}


def percent(cost: NetworkCost, structure: StructureSnapshot, bits: list[int]) -> float:
    """Relative BOPs with every tensor at a width of its own."""
    rungs = torch.tensor([structure.layout.ladder.open_gates(b) for b in bits]).float()
    return float(cost(GateValues(torch.ones(structure.layout.num_channels), rungs)))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenetv2", marks=pytest.mark.slow)])
def test_imagenet_networks_cost_what_is_published(name: str, count_macs: CountMacs) -> None:
    structure = structure_at(name, 224, count_macs)
    cost, (total, rows) = NetworkCost(structure), PUBLISHED[name]
    tensors = structure.layout.tensors
    assert cost.float_bops == 1024 * total
    for bits, published in rows.items():
        places = 2 if bits == 16 else 3
        assert round(percent(cost, structure, [bits] * len(tensors)), places) == published
    if name == "resnet18":
        ends = ("conv1.weight", "fc.weight", "fc.input")
        for bits, published in {2: 0.773, 4: 1.869, 8: 6.25}.items():
            assert round(percent(cost, structure, [8 if t in ends else bits for t in tensors]), 3) == published
        for bits, published, places in ((2, 2.02, 3), (4, 3.115, 3), (8, 7.5, 2)):  # float but for the network's input
            assert round(percent(cost, structure, [32 if t in ends else bits for t in tensors]), places) == published
        mixed = [4 if t.endswith(".weight") else 8 for t in tensors]
        assert round(percent(cost, structure, mixed), 3) == 3.125


def test_three_bits_cost_what_is_published() -> None:
    network = quantize(build_network("resnet18", (3, 224, 224), 1000).eval(), torch.rand(1, 3, 224, 224), bits=(3,))
    assert round(float(NetworkCost(network)(network.open_gates())), 3) == 0.974


def test_pruning_half_of_a_blocks_channels_halves_two_layers(quantized: dict[str, QuantizedNetwork]) -> None:
    """Inside a block a closed channel is an output of one convolution and an input of the next."""
    network = quantized["resnet18"]
    cost, gates = NetworkCost(network), network.open_gates()
    gates.channels[network.layout.slices["layer3.1.conv1"]][::2] = 0
    kept = dict(zip(cost.names, cost.kept_macs(gates.channels).tolist(), strict=True))
    assert {name for name, fraction in kept.items() if fraction != 1} == {"layer3.1.conv1", "layer3.1.conv2"}
    assert kept["layer3.1.conv1"] == kept["layer3.1.conv2"] == 0.5


def test_an_mlp_for_features_is_quantized_in_training_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = x[:, :1] * x[:, 1:2]
    net = MLP(5, 1, widths=(16, 16), batch_norm=True)
    network = quantize(net, x)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (network(x, gates=network.open_gates()) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
