"""A network without its dead channels computes the same, with fewer multiplications."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, GateValues, QuantizedNetwork, freeze, quantize
from pyro_bbits.cost import NetworkCost
from pyro_bbits.deployment import count_macs, frozen_layers, removal, remove_channels
from pyro_bbits.deployment.frozen import scale_outputs
from pyro_bbits.deployment.rounding import channel_numbers
from pyro_bbits.insertion.layers import out_channels
from pyro_bbits.models import VGG7, LeNet5, MobileNetV2, ResNet18, ResNet20, ViT


def check_codes(frozen: nn.Module, smaller: nn.Module, removed: dict[str, tuple[int, ...]]) -> None:
    """Codes, scales and biases are those of before, but for what was removed."""
    for name, layer in frozen_layers(smaller).items():
        before = frozen_layers(frozen)[name]
        kept = [c for c in range(out_channels(before)) if c not in removed.get(name, ())]
        assert out_channels(layer) == len(kept)
        assert layer.codes is None or torch.equal(
            scale_outputs(layer, layer.codes.to(layer.weight.dtype), layer.scale), layer.weight
        )
        for key in ("dead", "bias", "bias_codes", "scale"):
            value, old = getattr(layer, key), getattr(before, key)
            assert (value is None) == (old is None)
            if value is not None and value.dim():
                assert torch.equal(value, old[kept])


def kept_macs(configuration: BitConfiguration) -> float:
    quantized = sum(layer.kept_macs * layer.macs for layer in configuration.layers)
    return quantized + sum(layer.macs for layer in configuration.float_layers)


def check_removal(case: Any, keep: float) -> None:
    configuration = case.configuration(keep)
    frozen = freeze(case.net, configuration, snap_biases=keep > 0)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    smaller, report = remove_channels(frozen, case.example)
    assert report.error <= 1e-6, "in float64"
    expected = case.run(frozen)
    differences = (case.run(smaller) - expected).abs() / expected.abs().max().clamp(min=1e-6)
    assert differences.max() < 0.02 and (differences > 1e-6).float().mean() < 0.2, "in float32 a code may flip"
    check_codes(frozen, smaller, report.removed)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    kept = sum(la.kept_macs * la.macs for la in configuration.layers) + sum(
        la.macs for la in configuration.float_layers
    )
    assert kept - 0.5 <= report.macs_after <= report.macs_before
    for name, layer in frozen_layers(smaller).items():
        assert (name in report.masked) == bool(layer.dead.any())
        assert out_channels(layer) >= 1


def test_the_smaller_network_computes_the_same(case: Any) -> None:
    check_removal(case, 0.6)


@pytest.mark.parametrize("name", ["residual", "squeeze-excite", "language", "vgg7", "resnet20"])
def test_layers_without_a_channel_keep_one_dead_one(name: str, get_case: Callable[..., Any]) -> None:
    check_removal(get_case(name), 0.0)


def closed_everywhere(network: QuantizedNetwork, share: float) -> GateValues:
    """Gates that close a channel in every layer that adds into it."""
    numbers, gates = torch.tensor(channel_numbers(network)), network.open_gates()
    closed = torch.rand(len(numbers)) < share
    return gates._replace(channels=(~closed[numbers]).float())


@pytest.mark.parametrize("name", ["lenet5", "vgg7", "resnet18", "vit", "mlp", "residual", "video", "bags"])
def test_multiplications_are_those_that_the_configuration_counts(name: str, get_case: Callable[..., Any]) -> None:
    case = get_case(name)
    torch.manual_seed(2)
    gates = closed_everywhere(case.network, 0.4)
    for part in case.network.layout.slices.values():
        gates.channels[part.start] = 1.0  # one channel would stay all the same
    numbers = channel_numbers(case.network)
    for gate, number in enumerate(numbers):
        gates.channels[gate] = max(gates.channels[gate], gates.channels[number])
    gates = gates._replace(channels=gates.channels[torch.tensor(numbers)])
    configuration = BitConfiguration.from_gates(case.network, gates)
    _, report = remove_channels(freeze(case.net, configuration), case.example)
    kept = sum(la.kept_macs * la.macs for la in configuration.layers) + sum(
        la.macs for la in configuration.float_layers
    )
    assert report.masked == {} and report.macs_after < report.macs_before
    assert report.macs_after == pytest.approx(kept, abs=0.5)
    removed = {layer.name: layer.removed for layer in configuration.layers if layer.removed}
    assert report.removed == removed
    assert str(report).endswith("% of the MACs are left")


def test_channels_are_kept_as_zeros_to_make_a_multiple(get_case: Callable[..., Any]) -> None:
    case = get_case("lenet5")
    frozen = freeze(case.net, case.configuration(0.4))
    smaller, report = remove_channels(frozen, case.example, multiple_of=16)
    assert all(left % 16 == 0 for _, left in list(report.channels.values())[:-1])
    assert "the number of channels is kept a multiple of 16" in report.masked.values()
    check_codes(frozen, smaller, report.removed)


class Fixed(nn.Module):
    """The size of what is flattened stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        logits: Tensor = self.head(x.view(-1, 24))
        return logits


def test_channels_that_the_code_counts_on_stay_masked() -> None:
    net, x = Fixed().eval(), torch.randn(4, 1, 6, 6)
    network = quantize(net, x, bits=(2, 4, 8))
    gates = network.open_gates()
    gates.channels[[1, 5]] = 0.0  # one of each layer
    frozen = freeze(net, BitConfiguration.from_gates(network, gates))
    smaller, report = remove_channels(frozen, x)
    assert report.removed == {"a": (1,)}
    assert report.masked == {"b": "without these channels the network would not run, or would compute something else"}
    torch.testing.assert_close(smaller(x), frozen(x))
    assert "b: still masked, without these channels" in str(report)


def test_a_difference_is_an_error(get_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = get_case("lenet5")
    monkeypatch.setattr(removal, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="deploy the frozen network as it is"):
        remove_channels(freeze(case.net, case.configuration()), case.example)


def test_what_cannot_work_is_refused(get_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = get_case("mlp")
    frozen = freeze(case.net, case.configuration())
    with pytest.raises(ValueError, match="no frozen layer in this network"):
        remove_channels(case.net, case.example)
    with pytest.raises(ValueError, match="multiple_of must be at least 1; got 0"):
        remove_channels(frozen, case.example, 0)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-bbits\[deploy\]'"):
        remove_channels(frozen, case.example)


def test_macs_of_products_are_counted() -> None:
    net = ViT(image_size=8, width=12, depth=2, heads=3).eval()
    tokens, width = 5, 12
    products = 2 * 2 * tokens * tokens * width
    layers = 4 * 3 * 16 * width + 2 * tokens * (4 * width * width + 8 * width * width) + width * 10
    assert count_macs(net, torch.randn(3, 3, 8, 8)) == products + layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (LeNet5(), (1, 28, 28)),
        (VGG7(), (3, 32, 32)),
        (ResNet20(), (3, 32, 32)),
        (ResNet18(), (3, 64, 64)),
        (MobileNetV2(), (3, 224, 224)),
        (ViT(depth=2), (3, 32, 32)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reference_networks_of_full_size(net: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape)
    network = quantize(net.eval(), x, bits=(2, 4, 8))
    gates = closed_everywhere(network, 0.5)
    configuration = BitConfiguration.from_gates(network, gates)
    frozen = freeze(net, configuration)
    smaller, report = remove_channels(frozen, x)
    shares = NetworkCost(network).double().kept_macs(gates.channels.double())
    kept = sum(share * layer.macs for share, layer in zip(shares.tolist(), network.layers, strict=True))
    kept += sum(layer.macs for layer in network.float_layers)
    assert kept_macs(configuration) == pytest.approx(kept, rel=1e-6), "of shares in float32"
    assert report.error <= 1e-6 and report.macs_after < report.macs_before
    if not report.masked:
        assert report.macs_after == pytest.approx(kept, abs=0.5)
    else:
        assert isinstance(net, ResNet20), "new channels of a stage are padded with a fixed number of zeros"
    check_codes(frozen, smaller, report.removed)
