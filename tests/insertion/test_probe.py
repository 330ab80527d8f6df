"""Layers that must keep their channels are refused with the reason; depthwise layers take their producers' gates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import QuantizedNetwork, quantize
from pyro_bbits.insertion import probe as probe_module

Case = tuple[nn.Module, Mapping[str, Tensor]]

PRODUCT = "it multiplies two activations"
OUTPUT = "it feeds the network's output"
DEPTHWISE = "it is depthwise and takes the gates of the channels it reads"


def multiplies(reader: str, culprit: str = "") -> str:
    return f"it multiplies other channels on the way to {reader}" + f": it passes {culprit}" * bool(culprit)


def not_zero(reader: str, culprit: str = "") -> str:
    return f"a channel that is off does not arrive as zero at {reader}" + f": it passes {culprit}" * bool(culprit)


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def attention(prefix: str, projections: Sequence[str]) -> dict[str, str]:
    """A head keeps its channels: queries and keys enter the first product, values the second."""
    query, key, value = (f"{prefix}{name}" for name in projections)
    first, second = (f"{prefix}matmul{index}" for index in (0, 1))
    feeds = {query: first, key: first, value: second}
    return {name: f"it feeds the product {product}" for name, product in feeds.items()} | {
        first: PRODUCT,
        second: PRODUCT,
    }


REFUSED = {
    "residual": {"head": OUTPUT},
    "inverted": {"depth1.0": DEPTHWISE, "depth2": DEPTHWISE, "head": OUTPUT},
    "waves": {"fc2": OUTPUT},
    "concat": {"mask": OUTPUT, "score": OUTPUT},
    "twice": {"head": OUTPUT},
    "sigmoid-lenet": {"conv1": not_zero("conv2", "sigmoid"), "fc2": OUTPUT},
    "squeeze-excite": {"excite": multiplies("head", "sigmoid"), "head": OUTPUT},
    "branchy": {"fc3": OUTPUT},
    "layer-norm": {"embed": not_zero("inner", "layer_norm"), "head": OUTPUT},
    "sum-to-depthwise": {"depth": DEPTHWISE, "head": OUTPUT},
    "raw-read": {"conv": not_zero("raw"), "head": OUTPUT},
    "raw-depthwise": {"conv": not_zero("raw"), "depth": DEPTHWISE, "head": OUTPUT},
    "attention": {**attention("", "qkv"), "head": OUTPUT},
    "modulated": {"conv": multiplies("read"), "scale": multiplies("read"), "head": OUTPUT},
    "difference": {"b": multiplies("read"), "c": not_zero("other"), "head": OUTPUT},
    "depthwise-instance-norm": {"depth": DEPTHWISE, "head": OUTPUT},
    "shared-depthwise": {"a": not_zero("left"), "b": not_zero("right"), "depth": DEPTHWISE, "head": OUTPUT},
    "projected": {"project": not_zero("conv", "batch_norm"), "conv": not_zero("head", "batch_norm"), "head": OUTPUT},
    "u-net": {"mask": OUTPUT},
    "video": {"depth": DEPTHWISE, "head": OUTPUT},
    "transposed-depthwise": {"up": DEPTHWISE, "head": OUTPUT},
    "language": {
        **attention("attention.", PROJECTIONS),
        **dict.fromkeys(["token", "attention.out_proj", "outer"], OUTPUT),
        "position": "some of its channels enter no multiplying layer as themselves",
        "matmul0": PRODUCT,
    },
    "bags": {"head": OUTPUT},
    "encoder": {
        "enter": not_zero("encoder.layers.0.linear1", "layer_norm"),
        **attention("encoder.layers.0.self_attn.", PROJECTIONS),
        "encoder.layers.0.self_attn.out_proj": not_zero("encoder.layers.0.linear1", "layer_norm"),
        "encoder.layers.0.linear2": not_zero("encoder.layers.1.self_attn.q_proj", "add"),
        **attention("encoder.layers.1.self_attn.", PROJECTIONS),
        "encoder.layers.1.self_attn.out_proj": not_zero("encoder.layers.1.linear1", "add"),
        "encoder.layers.1.linear2": not_zero("head", "add"),
        "head": OUTPUT,
    },
    "cross-attention": {
        **attention("attention.", PROJECTIONS),
        **dict.fromkeys(["attention.q_proj", "attention.k_proj", "head"], OUTPUT),  # the weights are given out
    },
    "windows": {
        "qkv": "it feeds the product matmul0",
        **{f"matmul{i}": PRODUCT for i in range(6)},
        "head": OUTPUT,
    },
    "time-major": {"inner": not_zero("inner", "unflatten"), "head": OUTPUT},
    "group-norm": {
        "stem": not_zero("blocks.0", "group_norm"),
        "blocks.0": not_zero("blocks.1", "add"),
        "blocks.1": not_zero("blocks.2", "add"),
        "blocks.2": not_zero("head", "add"),
        "head": OUTPUT,
    },
}


def layer_names(network: QuantizedNetwork) -> list[str]:
    return [layer.name for layer in network.layers]


def gate_names(network: QuantizedNetwork, gates: frozenset[int]) -> set[str]:
    return {network.layout.channel_names[gate] for gate in gates}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_are_refused_with_their_reason(build_case: Callable[[str], Case], name: str) -> None:
    net, example = build_case(name)
    network = quantize(net, example)
    assert {layer.name: layer.refused for layer in network.layers if layer.refused} == REFUSED[name]


def test_gated_layers_are_those_not_refused(case: Case) -> None:
    network = quantize(*case)
    prunable = [layer for layer in network.layers if layer.refused is None]
    assert [(g.layer, g.channels) for g in network.layout.groups] == [(la.name, len(la.outputs)) for la in prunable]
    for layer in prunable:
        gates = network.layout.slices[layer.name]
        assert [set(output) for output in layer.outputs] == [{gate} for gate in range(gates.start, gates.stop)]
    for layer in network.layers:
        if layer.refused and not layer.depthwise:
            assert not any(layer.outputs)


def test_channels_keep_their_identity_from_producer_to_reader(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("concat")
    network = quantize(net, example)
    merge = next(layer for layer in network.layers if layer.name == "merge.0")
    assert [gate_names(network, gates) for gates in merge.inputs] == [
        *({f"up[{c}]"} for c in range(4)),
        *({f"down1.0[{c}]"} for c in range(5)),
    ]


def test_flattened_channels_spread_over_their_positions(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("sigmoid-lenet")
    network = quantize(net, example)
    fc1 = next(layer for layer in network.layers if layer.name == "fc1")
    assert [gate_names(network, gates) for gates in fc1.inputs] == [{f"conv2[{i // 4}]"} for i in range(24)]


def test_sums_are_alive_through_every_producer(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("residual")
    network = quantize(net, example)
    inputs = {layer.name: layer.inputs for layer in network.layers}
    for reader, producers in {
        "a1.0": ["stem.0"],
        "b1.0": ["stem.0", "a2.0"],
        "shortcut.0": ["stem.0", "a2.0"],
        "head": ["b2.0", "shortcut.0"],
    }.items():
        expected = [{f"{p}[{c}]" for p in producers} for c in range(len(inputs[reader]))]
        assert [gate_names(network, gates) for gates in inputs[reader]] == expected


def test_depthwise_layers_carry_the_gates_of_what_they_read(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("inverted")
    layers = {layer.name: layer for layer in quantize(net, example).layers}
    assert layers["depth1.0"].outputs == layers["depth1.0"].inputs == layers["expand1.0"].outputs
    assert layers["depth2"].outputs == tuple(gates for gates in layers["expand2.0"].outputs for _ in range(2))
    assert layers["project2.0"].inputs == layers["depth2"].outputs


def test_a_sum_into_a_depthwise_layer_gives_it_the_gates_of_both(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("sum-to-depthwise")
    network = quantize(net, example)
    depth = next(layer for layer in network.layers if layer.name == "depth")
    assert [gate_names(network, gates) for gates in depth.outputs] == [{f"a[{c}]", f"b.0[{c}]"} for c in range(6)]


def test_a_batch_norm_carries_the_gates_only_of_the_layer_it_alone_reads(build_case: Callable[[str], Case]) -> None:
    norms = {
        name: {layer.name: layer.norm for layer in quantize(*build_case(name)).layers}
        for name in ("residual", "waves", "projected")
    }
    assert norms["residual"] == {
        **{f"{block}.0": f"{block}.1" for block in ("stem", "a1", "a2", "b1", "b2", "shortcut")},
        "head": None,
    }
    assert norms["waves"] == {"conv1": "norm1", "conv2": "norm2", "conv3": None, "fc1": "norm3", "fc2": None}
    assert norms["projected"] == {"project": None, "conv": None, "head": None}


class SharedNorm(nn.Module):
    """One batch norm after two layers, and one layer before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.shared, self.one, self.two, self.head = (*(nn.BatchNorm1d(4) for _ in range(3)), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(F.relu(self.shared(self.a(x))) + F.relu(self.shared(self.b(x))))
        logits: Tensor = self.head(F.relu(self.one(y)) + F.relu(self.two(y)))
        return logits


def test_a_shared_batch_norm_carries_no_gates() -> None:
    layers = {layer.name: layer for layer in quantize(SharedNorm().eval(), torch.randn(6, 3)).layers}
    assert layers["a"].norm is layers["b"].norm is None
    assert layers["a"].refused == layers["b"].refused == not_zero("c", "batch_norm")
    assert layers["c"].refused == not_zero("head")


class NormAfterOneCall(nn.Module):
    """A layer called twice, once before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x))) + F.relu(self.a(x.flip(1)))
        logits: Tensor = self.head(F.relu(self.b(y)))
        return logits


def test_a_layer_called_twice_keeps_its_gates_before_the_norm() -> None:
    layers = {layer.name: layer for layer in quantize(NormAfterOneCall().eval(), torch.randn(6, 3)).layers}
    assert layers["a"].norm is None and layers["a"].refused == not_zero("b", "batch_norm")
    assert layers["b"].inputs == (frozenset(),) * 3


class OneChannelDifferences(nn.Module):
    """Rectified differences of single numbers: nothing but their signs tells that the second one can pass."""

    def __init__(self) -> None:
        super().__init__()
        self.producers = nn.ModuleList(nn.Linear(2, 1) for _ in range(7))
        self.readers = nn.ModuleList(nn.Linear(1, 1) for _ in range(6))
        self.all, self.head = nn.Linear(7, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [producer(x) for producer in self.producers]
        y = self.all(torch.cat([first, *others], 1))
        for reader, other in zip(self.readers, others, strict=True):
            y = y + reader(F.relu(first - other))
        logits: Tensor = self.head(F.relu(y))
        return logits


def test_what_passes_with_one_sign_only_keeps_its_reader_alive() -> None:
    network = quantize(OneChannelDifferences(), torch.randn(6, 2))
    readers = [layer for layer in network.layers if layer.name.startswith("readers.")]
    assert len(readers) == 6
    assert all(layer.inputs == (frozenset(),) for layer in readers)


class ScaledOutput(nn.Module):
    """The output is a product, one factor of which goes on into the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner, self.head = nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        logits: Tensor = self.head(F.relu(self.inner(F.relu(scale)))) * scale
        return logits


def test_a_factor_of_the_output_feeds_the_output() -> None:
    network = quantize(ScaledOutput(), torch.randn(6, 3))
    assert {layer.name: layer.refused for layer in network.layers} == {"scale": OUTPUT, "inner": None, "head": OUTPUT}


class Tied(nn.Module):
    """Two layers with one weight, of which one gives the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(F.relu(self.inner(x)))
        return y


def test_a_weight_that_one_layer_uses_whole_is_pruned_nowhere() -> None:
    network = quantize(Tied(), torch.randn(6, 4))
    assert {layer.name: layer.refused for layer in network.layers} == {
        "inner": "it shares its weight with outer, which keeps all channels",
        "outer": OUTPUT,
    }


def test_a_float_layer_loses_input_channels_and_its_own_always_live() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    network = quantize(net, torch.randn(6, 3), exclude=("2",))
    assert layer_names(network) == ["0", "4"]
    assert [network.layers[0].refused, network.layers[1].inputs] == [None, (frozenset(),) * 5]


class Gated(nn.Module):
    """One half of a layer's channels multiplies the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.read, self.head = nn.Linear(3, 8), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.enter(x).chunk(2, -1)
        logits: Tensor = self.head(F.relu(self.read(y * torch.sigmoid(gate))))
        return logits


def test_a_layer_whose_channels_gate_each_other_is_refused() -> None:
    network = quantize(Gated(), torch.randn(6, 3))
    assert network.layers[0].refused == "some of its channels enter no multiplying layer as themselves"
    assert network.layers[1].inputs == (frozenset(),) * 4


class Bytes(nn.Module):
    """Takes integer images and converts them, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.conv(x.float() / 255)).mean((2, 3)))
        return logits


def test_networks_that_convert_their_input_are_probed() -> None:
    images = torch.randint(256, (6, 1, 6, 6), dtype=torch.uint8)
    network = quantize(Bytes(), images)
    assert [layer.refused for layer in network.layers] == [None, OUTPUT]
    assert network.layers[0].input is not None  # the scaled image is not the network's input any more


class TimeDistributed(nn.Module):
    """Folds time into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.inner(x.flatten(0, 1)))
        logits: Tensor = self.head(y.unflatten(0, x.shape[:2]).mean(1))
        return logits


def test_time_folded_into_the_batch_is_followed() -> None:
    inner, head = quantize(TimeDistributed(), torch.randn(6, 5, 3)).layers
    assert (inner.refused, head.inputs) == (None, tuple(frozenset({c}) for c in range(4)))


class LargeImages(nn.Module):
    """Takes images of any size, or of 96 pixels only."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 5, 7, 4), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, 2)
        self.head = nn.Linear(4 * 11 * 11 if fixed else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.norm(self.stem(x)))))
        logits: Tensor = self.head(x.flatten(1) if self.head.in_features > 4 else x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("fixed", [False, True])
def test_large_images_are_cut_where_the_network_allows_it(monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    seen, record = set(), probe_module._Findings.record

    def spy(self: Any, producers: Sequence[str], layer: str, x: Tensor) -> None:
        seen.add((layer, x.shape[1] * x.shape[2]))
        record(self, producers, layer, x)

    monkeypatch.setattr(probe_module._Findings, "record", spy)
    network = quantize(LargeImages(fixed), torch.randn(3, 3, 96, 96))
    assert dict(seen)["head"] == (4 * 121 if fixed else 4)
    assert dict(seen)["stem"] == (96 * 96 * 3 if fixed else 64 * 64 * 3)
    assert [layer.macs for layer in network.layers][:2] == [5 * 3 * 49 * 23**2, 4 * 5 * 9 * 11**2]
    assert [layer.refused for layer in network.layers] == [None, None, OUTPUT]


class ConvolvedOverBatch(nn.Module):
    """A convolution along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Conv1d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.inner(x.permute(1, 2, 0))).mean(0).T)
        return logits


def test_convolutions_without_the_batch_in_dimension_0_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer 'inner' .* dimension 0 is not the batch .* exclude=\('inner',\)"):
        quantize(ConvolvedOverBatch(), torch.randn(6, 5, 3))
    assert layer_names(quantize(ConvolvedOverBatch(), torch.randn(6, 5, 3), exclude=("inner",))) == ["head"]


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(x).abs().mul(0.01).exp().pow(1e5).clamp(max=torch.inf))
        return logits


def test_values_that_overflow_are_named() -> None:
    with pytest.raises(ValueError, match=r"head\.input is infinite or NaN on the example inputs"):
        quantize(Overflowing(), torch.zeros(6, 3))


class Shares(nn.Module):
    """Divides by a sum that is zero when all channels are off."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.softplus(self.inner(x)) - 0.6931471805599453
        logits: Tensor = self.head(F.relu(self.read(y.abs() / y.abs().sum(1, keepdim=True))))
        return logits


def test_what_is_undefined_when_channels_are_off_keeps_them() -> None:
    layers = quantize(Shares(), torch.randn(6, 3)).layers
    assert layers[0].refused is not None and layers[0].refused.startswith("values at read are undefined")
    assert [layer.refused for layer in layers[1:]] == [None, OUTPUT]


@dataclass
class Result:
    """What some networks return."""

    logits: Tensor
    hidden: list[Tensor]


class Reporting(nn.Module):
    """Returns its hidden layer in an object, tokens and batch in one dimension, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Result, Tensor]:
        hidden = F.relu(self.inner(x))
        logits: Tensor = self.head(F.relu(self.middle(hidden)))
        return Result(logits.view(-1, 2), [hidden]), torch.arange(3.0)


def test_outputs_in_objects_and_constant_ones_are_told_apart() -> None:
    layers = quantize(Reporting(), torch.randn(6, 5, 3)).layers
    assert [layer.refused for layer in layers] == [OUTPUT, None, OUTPUT]


class OwnPrecision(nn.Module):
    """Makes tensors of its own, and asks for single precision by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.recurrent = nn.Linear(3, 4), nn.LayerNorm(4), nn.LSTM(4, 4, batch_first=True)
        self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inner(x).type(torch.float32)).float().to(torch.float32)
        state = torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4)
        x = torch.tril(torch.ones(x.shape[1], x.shape[1])) @ self.recurrent(x, state)[0]
        logits: Tensor = self.head(F.relu(self.read(x.sum(1))))
        return logits


def test_precision_that_a_network_asks_for_is_no_obstacle() -> None:
    with pytest.warns(UserWarning, match="recurrent .its class LSTM is not supported"):
        network = quantize(OwnPrecision(), torch.randn(6, 5, 3))
    refused = {layer.name: layer.refused for layer in network.layers}
    assert refused["read"] is None
    assert refused["inner"] is not None


class Scalar(nn.Module):
    """Returns a number for the whole batch, so nothing can be told about its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(F.relu(self.inner(x)))).sum()


def test_networks_without_a_batch_in_the_output_keep_all_channels() -> None:
    network = quantize(Scalar(), torch.randn(6, 3))
    assert {layer.refused for layer in network.layers} == {OUTPUT}
    assert network.layout.num_channels == 0
