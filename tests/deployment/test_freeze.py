"""A frozen network computes what the configured float network computes, with integer codes in ordinary layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, freeze, quantize
from pyro_bbits.deployment import FrozenLayer, FrozenQuantizer, code_dtype, frozen_layers, kept_norms
from pyro_bbits.deployment.frozen import scale_outputs
from pyro_bbits.insertion.layers import GatedNorm, QuantizedLayer
from pyro_bbits.quantizer import integer_codes


class Recorder:
    """What each layer of a configured network reads, and what it or its norm gives out; copies of both."""

    def __init__(self, net: nn.Module, pairs: dict[str, str]) -> None:
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        for name, end in pairs.items():
            net.get_submodule(name).register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self.inputs.setdefault(name, []).append(
                    copy.deepcopy((args, kwargs))
                ),
                with_kwargs=True,
            )
            net.get_submodule(end).register_forward_hook(
                lambda module, args, y, name=name: self.outputs.setdefault(name, []).append(y.clone())
            )


@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_each_layer_computes_what_the_configured_one_computes(case: Any, keep: float) -> None:
    """Layers get the same input, so that a sum in another order cannot flip a code further on."""
    configuration = case.configuration(keep)
    fixed, frozen = configuration.apply(case.net), freeze(case.net, configuration)
    layers = frozen_layers(frozen)
    assert layers.keys() == {layer.name for layer in configuration.layers if not layer.is_product}
    record = Recorder(fixed, {name: layer.norm or name for name, layer in layers.items()})
    expected = case.run(fixed)
    for name, layer in layers.items():
        for (args, kwargs), y in zip(record.inputs[name], record.outputs[name], strict=True):
            largest = y.abs().max().item()
            torch.testing.assert_close(layer(*args, **kwargs), y, rtol=0, atol=3e-6 * largest, msg=name)
    differences = (case.run(frozen) - expected).abs() / expected.abs().max().clamp(min=1e-6)
    assert differences.max() < 0.02, "a flipped code moves little"
    assert (differences > 1e-4).float().mean() < 0.2
    assert any(layer.norm for layer in layers.values()) or not differences.any(), "without folding bit by bit"


def test_codes_are_those_of_the_trained_weights(case: Any) -> None:
    configuration = case.configuration(0.5)
    tensors = {tensor.name: tensor for tensor in configuration.tensors}
    frozen = freeze(case.net, configuration)
    expanded = configuration.apply(case.net)  # names of attention's own layers
    for layer in configuration.layers:
        if layer.is_product:
            continue
        assert layer.weight is not None
        entry, found = tensors[layer.weight], frozen_layers(frozen)[layer.name]
        assert (found.signed, found.weight_tensor) == (entry.signed, layer.weight)
        if found.kept_norm is None:
            assert found.dead.nonzero().flatten().tolist() == list(layer.removed)
        assert not scale_outputs(found, found.weight, found.dead.float()).any(), "dead channels are exactly zero"
        assert found.bias is None or not found.bias[found.dead].any()
        if entry.bits > 24:
            assert found.codes is None and found.scale is None and found.bits == entry.bits
            continue
        assert found.codes.dtype == code_dtype(found.bits, found.signed)
        assert torch.equal(scale_outputs(found, found.codes.float(), found.scale), found.weight)
        assert (found.scale != 0).all() and (found.scale.dim() == 0 or found.scale.shape == (layer.channels,))
        codes = integer_codes(
            expanded.get_submodule(layer.name).weight,
            torch.tensor(entry.beta),
            found.bits,
            signed=entry.signed,
        )
        open_channels = scale_outputs(found, torch.ones_like(codes), (~found.dead).int())
        assert torch.equal(found.codes.int().abs(), codes.abs() * open_channels)


@pytest.mark.parametrize("name", ["residual", "u-net", "language", "encoder", "windows", "vit"])
def test_a_frozen_network_is_plain(name: str, get_case: Callable[..., Any]) -> None:
    case = get_case(name)
    configuration, net = case.configuration(), copy.deepcopy(case.net).train()
    frozen = freeze(net, configuration)
    assert net.training and not any(module.training for module in frozen.modules())
    assert type(frozen) is type(case.net) or isinstance(frozen, FrozenLayer)
    for module in frozen.modules():
        assert not isinstance(module, QuantizedLayer | GatedNorm)
        assert not (module._forward_hooks or module._forward_pre_hooks)
    for name, layer in frozen_layers(frozen).items():
        plain = type(layer).__mro__[2]
        assert plain.__module__.startswith("torch.nn.modules"), name
    products = [layer for layer in configuration.layers if layer.is_product]
    expected = {f"{p.name}_{side}" for p in products for side, t in (("left", p.input), ("right", p.weight)) if t}
    found = {name for name, module in frozen.named_modules() if isinstance(module, FrozenQuantizer)}
    assert {name for name in found if not name.endswith(".input_quantizer")} == expected
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("residual", {}),
        ("waves", {}),
        ("resnet18", {}),
        ("raw-read", {"norm": "something else reads its layer as well"}),
        ("projected", dict.fromkeys(("norm", "flat"), "no quantized layer stands right before it")),
    ],
)
def test_norms_right_behind_their_layer_are_folded(
    name: str, kept: dict[str, str], get_case: Callable[..., Any]
) -> None:
    case = get_case(name)
    frozen = freeze(case.net, case.configuration())
    assert kept_norms(frozen) == kept
    for layer in frozen_layers(frozen).values():
        assert layer.norm is None or isinstance(frozen.get_submodule(layer.norm), nn.Identity)


def _open(network: Any) -> BitConfiguration:
    return BitConfiguration.from_gates(network, network.open_gates())


def small_net(gamma: Tensor) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    norm: Any = net[1]
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return net


@pytest.mark.parametrize("signed", [True, False])
def test_signs_of_norms_go_into_signed_codes(signed: bool) -> None:
    net = small_net(torch.tensor([2.0, -1.0, 0.0]))
    layer: Any = net[0]
    if not signed:
        layer.weight.data.abs_()
    network = quantize(net, torch.rand(8, 4), bits=(2, 4, 8))
    frozen: Any = freeze(net, _open(network))
    codes = integer_codes(layer.weight, network.quantizers.ranges[0].detach(), 8, signed=signed)
    signs = torch.tensor([1, -1 if signed else 1, 0])
    assert torch.equal(frozen[0].codes.int(), codes * signs[:, None])
    assert frozen[0].scale.sign().tolist() == [1, 1 if signed else -1, 1]
    assert frozen[0].bias[2] == pytest.approx(0.3), "what the norm gives out is all shift"
    x = torch.rand(8, 4)
    torch.testing.assert_close(frozen(x), _open(network).apply(net)(x))


def test_snapped_biases_lie_on_the_grid_of_integer_sums(get_case: Callable[..., Any]) -> None:
    """Then the layer is integer arithmetic: codes times codes plus codes of the bias, and one scale per channel."""
    case = get_case("lenet5", (2, 4, 8))
    configuration = case.configuration(1.0)
    frozen: Any = freeze(case.net, configuration, snap_biases=True)
    plain: Any = freeze(case.net, configuration)
    assert frozen.conv1.bias_codes is None and torch.equal(frozen.conv1.bias, plain.conv1.bias), "it reads floats"
    for name in ("conv2", "fc1", "fc2"):
        layer, before = getattr(frozen, name), getattr(plain, name)
        assert before.bias_codes is None and layer.bias_codes.dtype == torch.int32
        step = layer.input_quantizer.scale * layer.scale
        assert torch.equal(layer.bias_scale, step.expand(len(layer.bias)))
        assert (layer.bias - before.bias).abs().max() <= 0.5001 * step
        torch.testing.assert_close(layer.bias, layer.bias_codes * step, rtol=1e-6, atol=0)
    x = torch.rand(5, 512)
    layer = frozen.fc2
    read = (layer.input_quantizer(x) / layer.input_quantizer.scale).round().long()
    sums = read @ layer.codes.long().T + layer.bias_codes
    torch.testing.assert_close(layer(x), sums * layer.bias_scale, rtol=1e-5, atol=1e-5)


def test_biases_too_large_for_int32_stay() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    network = quantize(net, torch.rand(8, 2), bits=(2, 4, 8, 16))
    layer: Any = net[2]
    layer.bias.data.fill_(1e6)
    frozen: Any = freeze(net, _open(network), snap_biases=True)
    assert frozen[2].bias_codes is None and (frozen[2].bias == 1e6).all()


def test_networks_that_do_not_fit_are_refused(get_case: Callable[..., Any]) -> None:
    case = get_case("lenet5")
    with pytest.raises(TypeError, match=r"needs the float network, not the quantized one; load its weights first"):
        freeze(case.network, case.configuration())
    with pytest.raises(ValueError, match="a Conv2d called 'conv1', the network nothing of that name"):
        freeze(nn.Sequential(nn.Linear(3, 2)), case.configuration())
    with pytest.raises(ValueError, match="the network FrozenConv2d; apply it to a float network"):
        freeze(freeze(case.net, case.configuration()), case.configuration())
