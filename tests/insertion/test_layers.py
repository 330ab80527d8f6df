"""Folded gates equal gates that multiply the output, in value, gradient and running statistics."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitLadder, GateValues, quantize
from pyro_bbits.gates import LivenessBank
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS, GatedBatchNorm2d, QuantizedConv2d
from pyro_bbits.quantizer import residual_quantize_reference

LADDER = BitLadder((2, 4, 8))
CHANNELS = 5


def gated(norm: nn.Module) -> Any:
    """A gated copy of a batch norm, each channel with a gate of its own."""
    copied: Any = copy.deepcopy(norm)
    copied.__class__ = GATED_NORMS[type(norm)]
    copied.context = PassContext()
    copied.output_gate = 0
    return copied


def column(gate: Tensor, x: Tensor) -> Tensor:
    return gate.reshape(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, CHANNELS), (6, CHANNELS, 4), (6, CHANNELS, 3, 2)])
def test_a_gated_norm_is_the_norm_times_the_gate(
    shape: tuple[int, ...], affine: bool, track: bool, momentum: float | None, training: bool
) -> None:
    """Three batches, so that statistics accumulate; the gate of a channel is 0, 1 or between."""
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    plain = kind(CHANNELS, momentum=momentum, affine=affine, track_running_stats=track)
    if affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    plain.double().train(training)
    mine = gated(plain)
    gates = [torch.tensor([0.0, 1.0, 0.3, 0.9, 0.5], dtype=torch.double, requires_grad=True) for _ in range(2)]
    mine.context.alive = (gates[0],)
    for _ in range(3):
        x, direction = torch.randn(shape, dtype=torch.double) * 2 + 1, torch.randn(shape, dtype=torch.double)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        actual, expected = mine(inputs[0]), plain(inputs[1]) * column(gates[1], x)
        torch.testing.assert_close(actual, expected)
        assert (actual[:, 0] == 0).all()
        for result in (actual, expected):
            (result * direction).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(gates[0].grad, gates[1].grad)
    for (name, a), (_, b) in zip(mine.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert mine.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, msg=name)
    if track and training:
        assert mine.num_batches_tracked == 3


def test_a_gated_norm_refuses_what_the_norm_refuses() -> None:
    norm = gated(nn.BatchNorm2d(CHANNELS))
    norm.context.alive = (torch.ones(CHANNELS),)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(6, CHANNELS))


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, CHANNELS), (6, 4)),
    (nn.Linear(4, CHANNELS, bias=False), (6, 3, 4)),
    (nn.Conv1d(4, CHANNELS, 3, stride=2, padding=1), (6, 4, 7)),
    (nn.Conv2d(4, CHANNELS, (3, 1), dilation=(2, 1), padding=2, padding_mode="reflect"), (6, 4, 5, 6)),
    (nn.Conv2d(5, CHANNELS, 3, groups=5, bias=False), (6, 5, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_gated_layer_is_the_layer_times_the_gate(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Against the reference quantizer in plain autograd: values and gradients of all that is learned."""
    mine: Any = copy.deepcopy(layer)
    mine.__class__ = QUANTIZED_LAYERS[type(layer)]
    mine.context, mine.weight_row, mine.input_row, mine.reusable = PassContext(), 1, 0, True
    mine.output_gate, bank = 0, LivenessBank([[[0], [1], [], [0, 1], [2]]], [3])
    x = torch.randn(shape).relu()
    learned = [
        [t.clone().requires_grad_() for t in (torch.tensor([0.0, 0.4, 1.0]), torch.tensor([[0.8, 0.3], [0.6, 0.9]]))]
        + [torch.tensor([1.5, 0.4], requires_grad=True), x.clone().requires_grad_()]
        for _ in range(2)
    ]
    channels, tensors, ranges, x = learned[0]
    mine.context.fill(GateValues(channels, tensors), ranges, (False, True), LADDER, bank(channels))
    actual = mine(x)

    channels, tensors, ranges, x = learned[1]
    plain: Any = copy.deepcopy(layer)
    xq = residual_quantize_reference(x, ranges[0], tensors[0], signed=False, ladder=LADDER)
    wq = residual_quantize_reference(plain.weight, ranges[1], tensors[1], signed=True, ladder=LADDER)
    output = torch.func.functional_call(plain, {"weight": wq}, (xq,))
    a, b, c = channels.unbind()
    gate = torch.stack([a, b, torch.ones(()), 1 - (1 - a) * (1 - b), c])
    expected = output * (gate if isinstance(layer, nn.Linear) else column(gate, output))

    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    for result in (actual, expected):
        (result * direction).sum().backward()
    for mine_learned, plain_learned in zip(*learned, strict=True):
        torch.testing.assert_close(mine_learned.grad, plain_learned.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.weight.grad, plain.weight.grad)
    if layer.bias is not None:
        torch.testing.assert_close(mine.bias.grad, plain.bias.grad)


def composed(net: nn.Sequential, x: Tensor, gates: GateValues, ranges: Tensor, signed: Sequence[bool]) -> Tensor:
    """Convolution, norm, ReLU, convolution, in plain autograd: the channel gate multiplies after the norm."""

    def quantized(row: int, t: Tensor) -> Tensor:
        return residual_quantize_reference(t, ranges[row], gates.tensors[row], signed=signed[row], ladder=LADDER)

    first, norm, last = cast(nn.Conv2d, net[0]), net[1], cast(nn.Conv2d, net[3])
    y = norm(F.conv2d(x, quantized(0, first.weight), first.bias))
    y = F.relu(y * column(gates.channels, y))
    return F.conv2d(quantized(2, y), quantized(1, last.weight), last.bias)


@pytest.mark.parametrize("training", [True, False])
def test_a_quantized_network_equals_its_composition_in_plain_autograd(training: bool) -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias, 0.3, 0.2)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 3, 2)).train(training)
    x = torch.randn(8, 2, 6, 6)
    network = quantize(net, x, bits=LADDER)
    assert network.layout.tensors == ("0.weight", "3.weight", "3.input")
    gates = GateValues(*(torch.rand_like(g) for g in network.open_gates()))
    mine = GateValues(*(g.clone().requires_grad_() for g in gates))
    plain = GateValues(*(g.clone().requires_grad_() for g in gates))
    log_range = network.quantizers.log_range.detach().clone().requires_grad_()

    actual = network(x, gates=mine)
    expected = composed(net, x, plain, log_range.exp(), network.quantizers.signed)
    torch.testing.assert_close(actual, expected)

    target = torch.randn_like(expected)
    for result in (actual, expected):
        F.mse_loss(result, target).backward()
    torch.testing.assert_close(mine.channels.grad, plain.channels.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.tensors.grad, plain.tensors.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.quantizers.log_range.grad, log_range.grad, rtol=1e-4, atol=1e-6)
    for (name, a), (_, b) in zip(network.net.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(network.net.state_dict()[name], value, msg=name)


def test_quantized_layers_are_still_what_they_were() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    network = quantize(net.eval(), torch.randn(4, 1, 4, 4))
    conv, norm, *_ = network.net.children()
    assert isinstance(conv, nn.Conv2d) and type(conv) is QuantizedConv2d
    assert isinstance(norm, nn.BatchNorm2d) and type(norm) is GatedBatchNorm2d
    assert "QuantizedLinear(in_features=8, out_features=2" in repr(network)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_output_has_the_type_of_the_network(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval().to(dtype)
    x = torch.randn(4, 1, 4, 4, dtype=dtype)
    network = quantize(net, x)
    y = network(x, gates=network.open_gates())
    assert y.dtype == dtype
    torch.testing.assert_close(y, net(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
