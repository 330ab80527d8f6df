"""Tracing tells which tensors are one and the same, what they range over, and what each layer costs."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyro_bbits import BitConfiguration, GatePrior, QuantizedNetwork, quantize
from pyro_bbits.insertion import LayerInfo, context
from pyro_bbits.insertion.layers import QUANTIZED_LAYERS
from pyro_bbits.kernels import quantize_row

Case = tuple[nn.Module, Mapping[str, Tensor]]


def layers_of(network: QuantizedNetwork) -> dict[str, LayerInfo]:
    return {layer.name: layer for layer in network.layers}


def agree(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= relative * expected.abs().max())


def test_macs_are_half_the_operations_that_torch_counts(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net.train()(**example)  # in evaluation mode, attention takes a path that is not counted
    assert sum(layer.macs for layer in network.layers) == counter.get_total_flops() / 2 / 6
    assert not network.float_layers
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    for layer in network.layers:
        path = f"{type(net).__name__}.{layer.name}"
        if type(dict(net.named_modules()).get(layer.name)) in QUANTIZED_LAYERS and path in counts:
            assert layer.macs == counts[path] / 2 / 6


def test_layers_are_listed_in_the_order_of_their_calls(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("residual")
    names = ["stem.0", "a1.0", "a2.0", "b1.0", "b2.0", "shortcut.0", "head"]
    network = quantize(net, example)
    assert [layer.name for layer in network.layers] == names
    assert network.layout.tensors == (
        *(f"{name}.weight" for name in names),
        *(f"{name}.input" for name in ("a1.0", "a2.0", "b1.0", "b2.0", "head")),
    )


def test_layers_that_read_one_tensor_share_its_quantizer(build_case: Callable[[str], Case]) -> None:
    residual = layers_of(quantize(*build_case("residual")))
    assert residual["b1.0"].input == residual["shortcut.0"].input
    attention = layers_of(quantize(*build_case("attention")))
    assert attention["q"].input == attention["k"].input == attention["v"].input != attention["o"].input
    assert len({layer.input for layer in residual.values()}) == 6
    assert len({layer.weight for layer in attention.values() if not layer.is_product}) == 6


@pytest.mark.parametrize("name", ["attention", "residual", "twice"])
def test_each_tensor_is_quantized_once_per_pass(
    build_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The doubly called layer reads two tensors under one quantizer, so it alone needs one more."""
    net, example = build_case(name)
    network, ranges = quantize(net, example), []

    def spy(x: Tensor, values: Tensor, *args: Tensor, **options: Any) -> Tensor:
        ranges.append(values[0])
        return quantize_row(x, values, *args, **options)

    monkeypatch.setattr(context, "quantize_row", spy)
    network(**example, gates=network.open_gates())
    assert len(ranges) == len(network.layout.tensors) + (name == "twice")


class Views(nn.Module):
    """Two views of one tensor, a slice of it, and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat, self.pixels = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), nn.Linear(4, 3)
        self.part, self.copy = nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        pixels = self.pixels(y.flatten(2)).sum(1)
        copied, part = y.flatten(1).clone(), y[:, 0].flatten(1)
        logits: Tensor = self.flat(y.flatten(1)) + self.copy(copied) + self.part(part) + pixels
        return logits


def test_views_share_a_quantizer_and_slices_and_copies_do_not() -> None:
    layers = layers_of(quantize(Views(), torch.randn(6, 1, 4, 4)))
    assert layers["flat"].input == layers["pixels"].input
    assert len({layers[name].input for name in ("flat", "part", "copy")}) == 3


class ChangedInPlace(nn.Module):
    """One object, but two tensors: it is changed between its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(x))
        first = self.a(y)
        y.mul_(-2)
        return torch.cat([first, self.b(y), self.a(y)], 1)


def test_a_tensor_changed_in_place_is_not_taken_for_the_old_one() -> None:
    net, x = ChangedInPlace(), torch.randn(6, 4)
    network = quantize(net, x)
    layers = layers_of(network)
    assert layers["a"].input == layers["b"].input  # by way of `a`, which reads it before and after
    with torch.no_grad():
        assert agree(network(x, gates=network.open_gates()), net(x))


class ReadsItsInput(nn.Module):
    """The network's input, plain, reshaped, scaled, and both plain and changed by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.shaped, self.scaled, self.both = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x) + self.shaped(x.reshape(-1, 2, 2).flatten(1)) + self.scaled(x / 2)
        result: Tensor = self.both(F.relu(self.both(x) + y))
        return result


def test_the_input_of_the_network_is_left_alone() -> None:
    layers = layers_of(quantize(ReadsItsInput(), torch.randn(6, 4)))
    assert layers["plain"].input is None and layers["shaped"].input is None
    assert layers["scaled"].input is not None and layers["both"].input is not None


def test_all_inputs_of_a_network_are_left_alone(build_case: Callable[[str], Case]) -> None:
    layers = layers_of(quantize(*build_case("modulated")))
    assert [name for name, layer in layers.items() if layer.input is None] == ["conv", "scale", "shift"]


def test_tied_weights_share_a_row_and_a_module_called_twice_has_one(build_case: Callable[[str], Case]) -> None:
    network = quantize(*build_case("twice"))
    layers = layers_of(network)
    assert layers["left"].weight == layers["right"].weight
    assert [layer.name for layer in network.layers].count("again") == 1
    assert layers["again"].macs == 2 * 36
    assert network.layout.tensors.count("again.input") == 1
    # its inputs are what `enter` and what it gives out itself
    enter, again = network.layout.slices["enter"], network.layout.slices["again"]
    assert layers["again"].inputs == tuple(frozenset({enter.start + c, again.start + c}) for c in range(6))


class Bridge(nn.Module):
    """Two tensors with readers of their own, and a layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b, self.both = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(x))
        z = 3 * y
        logits: Tensor = self.a(y) + self.b(z) + self.both(y) + self.both(z)
        return logits


def test_a_layer_that_reads_two_tensors_joins_all_their_readers() -> None:
    net, x = Bridge(), torch.randn(6, 3)
    network = quantize(net, x)
    assert network.layout.tensors[-1] == "a.input"
    assert [layer.input for layer in network.layers] == [None, 4, 4, 4]
    torch.testing.assert_close(network.quantizers.ranges[4], 3 * F.relu(net.enter(x)).max())
    with torch.no_grad():
        assert agree(network(x, gates=network.open_gates()), net(x))


def test_ranges_are_the_largest_magnitudes_seen_and_signs_those_of_the_smallest_values() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2])
    x = torch.randn(64, 2)
    with torch.no_grad():
        layers[1].weight.copy_(torch.tensor([[0.5, 0.25], [0.125, 2.0]]))  # no negative weight
        read = [net[:2](x), net[:4](x)]
    network = quantize(net, x)
    rows = [f"{i}.weight" for i in (0, 2, 4)] + ["2.input", "4.input"]
    assert network.layout.tensors == tuple(rows)
    tensors = [layer.weight for layer in layers] + read
    torch.testing.assert_close(network.quantizers.ranges, torch.stack([t.abs().max() for t in tensors]))
    assert network.quantizers.signed == (True, False, True, False, True)


def test_a_shared_tensor_ranges_over_all_its_calls(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("twice")
    seen = []
    again = net.get_submodule("again")
    handle = again.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    net(**example)
    handle.remove()
    network = quantize(net, example)
    row = network.layout.tensors.index("again.input")
    torch.testing.assert_close(network.quantizers.ranges[row], torch.stack(seen).max())


def test_a_tensor_of_zeros_gets_an_ordinary_range() -> None:
    first = nn.Linear(2, 2)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        first.weight.zero_()
        first.bias.fill_(-1.0)
    assert quantize(net, torch.randn(6, 2)).quantizers.ranges.tolist()[::2] == [1.0, 1.0]


class LazyTable(nn.Module):
    """Makes a buffer in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(4))
        result: Tensor = self.head(F.relu(self.fc(x)) * self.get_buffer("table"))
        return result


def test_buffers_made_in_the_first_pass_are_no_obstacle() -> None:
    net, x = LazyTable(), torch.randn(6, 3)
    network = quantize(net, x)
    assert not hasattr(net, "table")
    with torch.no_grad():
        assert agree(network(x, gates=network.open_gates()), net(x))


class TiedByFunction(nn.Module):
    """Reads a layer's weight beside the layer, in a function or in part."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.enter, self.middle = form, nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.enter(x))))
        weight = self.enter.weight
        if self.form == "linear":
            return F.linear(x, weight.t())
        return x[:, 1:] @ weight[1:] if self.form == "part" else x @ weight


@pytest.mark.parametrize(("form", "function"), [("linear", "linear"), ("part", "matmul")])
@pytest.mark.filterwarnings("ignore:.* of the multiplications stay in float")
def test_a_layer_whose_weight_is_read_beside_it_stays_in_float(form: str, function: str) -> None:
    net, x = TiedByFunction(form), torch.randn(6, 4)
    network = quantize(net, x)
    assert "enter" not in layers_of(network)
    reasons = {layer.name: layer.reason for layer in network.float_layers}
    assert reasons["enter"] == f"its weight is also read by {function}, beside the layer"
    gates = network.open_gates()
    gates.tensors.zero_()
    with torch.no_grad():
        fixed = BitConfiguration.from_gates(network, gates).apply(net)
        assert torch.equal(fixed(x), network.eval()(x, gates=gates))


def test_a_weight_that_a_product_reads_whole_has_one_quantizer() -> None:
    net, x = TiedByFunction("whole"), torch.randn(6, 4)
    network = quantize(net, x)
    layers = layers_of(network)
    assert layers["matmul0"].weight == layers["enter"].weight
    gates = network.open_gates()
    gates.tensors.zero_()
    with torch.no_grad():
        fixed = BitConfiguration.from_gates(network, gates).apply(net)
        assert torch.equal(fixed(x), network.eval()(x, gates=gates))


class ForAllSamples(nn.Module):
    """A layer on a parameter, the same for all samples, and one on tensors that may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.shared = nn.Parameter(torch.randn(1, 3)), nn.Linear(3, 4)
        self.enter, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x) + self.shared(self.code)
        y = y + self.expert(input=y[:0]).sum(0)
        logits: Tensor = self.head(y)
        return logits


def test_what_is_there_once_for_all_samples_has_a_price() -> None:
    network = quantize(ForAllSamples(), torch.randn(64, 4))
    layers = layers_of(network)
    assert layers["shared"].macs == 1
    assert not [layer for layer in network.float_layers if layer.macs]
    prior = GatePrior(network, 0.1)
    assert (prior.strength[layers["shared"].weight] > 0).all()


def test_excluded_layers_do_not_name_what_others_read() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.enter(x))
            total: Tensor = self.a(y) + self.b(y)
            return total

    assert "a.input" in quantize(Two(), torch.randn(6, 4)).layout.tensors
    assert quantize(Two(), torch.randn(6, 4), exclude="a").layout.tensors == ("enter.weight", "b.weight", "b.input")


def test_a_computed_weight_stays_in_float() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(6, 4)
    torch.nn.utils.spectral_norm(net[0])
    with pytest.warns(UserWarning, match="0 .its weight is no parameter but computed from others"):
        network = quantize(net, x)
    assert list(layers_of(network)) == ["2"]


@pytest.mark.filterwarnings("ignore:.* stay in float", "ignore:The PyTorch API of nested tensors")
def test_fast_paths_of_torch_do_not_lead_past_the_layers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    net, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(6, 5, 8)
    network = quantize(net, x, exclude=("layers.0.self_attn",))
    assert "layers.0.linear1" in layers_of(network)
    gates = network.open_gates()
    gates.tensors.zero_()
    with torch.no_grad():
        quantized = network(x, gates=gates)
        assert not agree(quantized, net(x), 1e-3)
        assert torch.equal(BitConfiguration.from_gates(network, gates).apply(net)(x), quantized)
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[0, 3:] = True
    whole = quantize(net, {"src": x, "src_key_padding_mask": padding})
    with torch.no_grad():
        padded = whole(src=x, src_key_padding_mask=padding, gates=whole.open_gates())
        assert agree(padded[~padding], net(src=x, src_key_padding_mask=padding)[~padding])
