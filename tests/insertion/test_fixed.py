"""A float network at a bit configuration computes what the gated one computes, with ordinary layers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits import BitConfiguration, GateValues, QuantizedNetwork, quantize
from pyro_bbits.insertion import context
from pyro_bbits.insertion.fixed import FIXED_LAYERS, FixedLayer, FixedQuantizer
from pyro_bbits.insertion.layers import GatedNorm, QuantizedLayer
from pyro_bbits.kernels import quantize_row
from pyro_bbits.quantizer import quantize_fixed

Case = tuple[nn.Module, Mapping[str, Tensor]]


def random_gates(network: QuantizedNetwork, keep: float) -> GateValues:
    """Hard gates that agree with the chain: a rung at random per tensor, none for a weight without channels."""
    layout, gates = network.layout, network.open_gates()
    rungs = torch.randint(len(layout.ladder.bits), (len(layout.tensors), 1))
    channels = (torch.rand(layout.num_channels) < keep).float()
    tensors = (torch.arange(gates.tensors.shape[1]) < rungs) & layout.any_channel(channels)[:, None]
    return GateValues(channels, tensors.float())


def train(network: QuantizedNetwork) -> None:
    """Weights, statistics and ranges that are not those of the calibration any more."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.1 * torch.randn_like(value))


def outputs(result: Any) -> Tensor:
    return torch.cat([leaf.detach().flatten(1) for leaf in tree_leaves(result)], 1)


def check_configuration(network: QuantizedNetwork, net: nn.Module, gates: GateValues, path: Path) -> nn.Module:
    """Take gates to a file and back, and apply them to the float network."""
    configuration = BitConfiguration.from_gates(network, gates)
    configuration.save(path)
    restored = BitConfiguration.load(path)
    assert restored == configuration
    assert all(torch.equal(a, b) for a, b in zip(restored.gates(network), gates, strict=True))
    fixed = restored.apply(net)
    assert not any(module.training for module in fixed.modules())
    assert not any(isinstance(module, QuantizedLayer | GatedNorm) for module in fixed.modules())
    fixed_layers = {name for name, module in fixed.named_modules() if isinstance(module, FixedLayer)}
    expected = {layer.name for layer in network.layers if layer.input is not None and not layer.is_product}
    assert fixed_layers == expected
    return fixed


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
def test_a_configured_float_network_equals_the_gated_one(case: Case, keep: float, tmp_path: Path) -> None:
    net, example = case
    network = quantize(net, example, bits=(2, 4, 32)).eval()
    train(network)
    net.load_state_dict(network.net.state_dict())
    with torch.no_grad():
        for _ in range(4):
            gates = random_gates(network, keep)
            fixed = check_configuration(network, net.train(), gates, tmp_path / "bits.json")
            assert net.training
            assert torch.equal(outputs(fixed(**example)), outputs(network(**example, gates=gates)))


def test_at_16_bits_they_agree_but_for_rounding_ties(case: Case, tmp_path: Path) -> None:
    """About one in a thousand 16-bit values differs by a step, since float32 resolves no finer quotient.

    A coarser tensor behind it may then round to the other side, which moves few outputs, and by little.
    """
    net, example = case
    network = quantize(net, example).eval()
    train(network)
    net.load_state_dict(network.net.state_dict())
    moved = []
    with torch.no_grad():
        for _ in range(4):
            gates = random_gates(network, 0.8)
            fixed = check_configuration(network, net, gates, tmp_path / "bits.json")
            with torch.enable_grad():  # the sum of residuals, as in training
                expected = outputs(network(**example, gates=gates))
            moved.append((outputs(fixed(**example)) - expected).abs() / expected.abs().max())
    differences = torch.stack(moved)
    assert differences.max() < 0.02
    assert (differences > 1e-4).float().mean() < 0.1


def test_applying_leaves_the_float_network_alone(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classes = [type(module) for module in net.modules()]
    BitConfiguration.from_gates(network, random_gates(network, 0.5)).apply(net)
    assert classes == [type(module) for module in net.modules()]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_removed_channels_are_zero_and_kept_weights_on_their_grid(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("sigmoid-lenet")
    network = quantize(net, example)
    gates = network.open_gates()
    gates.channels[[0, 3]] = 0.0  # of conv2, the first layer that can lose channels
    gates.tensors.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    fixed = BitConfiguration.from_gates(network, gates).apply(net)
    conv2: Any = fixed.get_submodule("conv2")
    assert (conv2.weight[[0, 3]] == 0).all() and (conv2.bias[[0, 3]] == 0).all()
    kept = [1, 2, 4, 5]
    assert (conv2.weight[kept] != 0).any() and torch.equal(conv2.bias[kept], net.get_parameter("conv2.bias")[kept])
    row = network.layout.tensors.index("conv2.weight")
    codes = conv2.weight / network.quantizers.ranges[row].detach() * 7.5
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert codes.detach().abs().max() == pytest.approx(7)


def test_weights_that_were_tied_may_lose_different_channels(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("twice")
    network = quantize(net, example)
    gates = network.open_gates()
    for layer, removed in {"left": [0], "right": [1, 2]}.items():
        gates.channels[network.layout.slices[layer]] = torch.tensor([float(c not in removed) for c in range(4)])
    fixed = BitConfiguration.from_gates(network, gates).apply(net)
    left, right = fixed.get_parameter("left.weight"), fixed.get_parameter("right.weight")
    assert [(w == 0).all(1).nonzero().flatten().tolist() for w in (left, right)] == [[0], [1, 2]]
    assert torch.equal(left[3], right[3])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 32])
def test_the_fixed_quantizer_is_the_ordinary_one(bits: int, signed: bool) -> None:
    x = torch.linspace(-2, 2, 101)
    quantizer = FixedQuantizer(bits, 1.5, signed)
    assert torch.equal(quantizer(x), quantize_fixed(x, torch.tensor(1.5), bits, signed=signed))
    assert repr(quantizer) == f"FixedQuantizer(bits={bits}, beta=1.5, signed={signed})"
    assert not quantizer.state_dict()


@pytest.mark.parametrize("kind", FIXED_LAYERS)
def test_a_fixed_layer_quantizes_its_input(kind: type[nn.Module]) -> None:
    layer: Any = kind(3, 2) if kind is nn.Linear else kind(3, 2, 1)
    x = torch.randn(5, 3, *[4] * (layer.weight.dim() - 2))
    expected = layer(quantize_fixed(x, torch.tensor(1.0), 4, signed=True))
    layer.__class__ = FIXED_LAYERS[kind]
    layer.input_quantizer = FixedQuantizer(4, 1.0, True)
    assert torch.equal(layer(x), expected)


def test_decided_widths_are_read_once_and_follow_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates changed in place, other gates of the same values, and gates that do not tell whether they change."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network, x = quantize(net, torch.rand(16, 3)).eval(), torch.rand(5, 3)
    read, reads = network._widths_of, list[Tensor]()

    def count(gates: Tensor) -> tuple[int, ...] | None:
        reads.append(gates)
        return read(gates)

    monkeypatch.setattr(network, "_widths_of", count)

    def output(gates: GateValues) -> Tensor:
        expected = BitConfiguration.from_gates(network, gates).apply(net)(x)
        with torch.no_grad():
            found: Tensor = network(x, gates=gates)
        torch.testing.assert_close(found, expected)
        return found

    gates = network.open_gates()
    wide = output(gates)
    assert torch.equal(output(gates), wide) and len(reads) == 1
    gates.tensors.zero_()  # 2 bits everywhere
    narrow = output(gates)
    assert not torch.equal(narrow, wide) and len(reads) == 2
    assert torch.equal(output(network.open_gates()), wide) and len(reads) == 3
    with torch.inference_mode():
        unknown = network.open_gates()
        unknown.tensors.zero_()
        assert torch.equal(network(x, gates=unknown), narrow) and torch.equal(network(x, gates=unknown), narrow)
    assert len(reads) == 5


def test_weights_alone_give_the_memory_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: dict[tuple[int, ...], bool] = {}

    def remember(x: Tensor, *args: Any, spend_grad: bool, **options: Any) -> Tensor:
        spent[tuple(x.shape)] = spend_grad
        return quantize_row(x, *args, spend_grad=spend_grad, **options)

    monkeypatch.setattr(context, "quantize_row", remember)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network = quantize(net, torch.rand(16, 3))
    network.train()(torch.rand(5, 3), gates=network.open_gates())
    assert spent == {(4, 3): True, (2, 4): True, (5, 4): False}
