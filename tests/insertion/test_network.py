"""A quantized network computes what the float one does, leaves it alone, and can be saved, copied and refused."""

import copy
import pickle
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits import GateValues, QuantizedNetwork, quantize
from pyro_bbits.files import save_tensors_atomically
from pyro_bbits.insertion import FloatLayer
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.insertion.layers import GatedNorm, QuantizedLayer
from pyro_bbits.models import LeNet5

Case = tuple[nn.Module, Mapping[str, Tensor]]


def outputs(result: Any) -> Tensor:
    """All output tensors in one, those of a dictionary too."""
    return torch.cat([leaf.detach().flatten() for leaf in tree_leaves(result)])


def agree(actual: Any, expected: Any, relative: float = 1e-5) -> bool:
    difference, scale = outputs(actual) - outputs(expected), outputs(expected).abs().max()
    return bool(scale > 1e-3 and difference.abs().max() <= relative * scale)


def random_gates(network: QuantizedNetwork) -> GateValues:
    layout = network.layout
    return GateValues(
        (torch.rand(layout.num_channels) < 0.7).float(),
        (torch.rand(len(layout.tensors), len(layout.ladder.residuals)) < 0.7).float().cumprod(1),
    )


@pytest.mark.parametrize("training", [False, True])
def test_open_gates_give_the_float_network(case: Case, training: bool) -> None:
    net, example = case
    net.train(training)
    network = quantize(net, example)
    assert agree(network(**example, gates=network.open_gates()), net(**example))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(network.net.state_dict()[name], value, msg=name)  # norms have seen the same batch


def test_quantizing_leaves_the_float_network_alone(case: Case) -> None:
    net, example = case
    net.train()
    net.get_submodule("head" if hasattr(net, "head") else next(iter(dict(net.named_children())))).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classes, modes = [type(m) for m in net.modules()], [m.training for m in net.modules()]
    given, state = {key: x.clone() for key, x in example.items()}, torch.get_rng_state()
    network = quantize(net, example)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in net.modules()] == classes and [m.training for m in net.modules()] == modes
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(x, given[key]) for key, x in example.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not {id(t) for t in net.state_dict(keep_vars=True).values()} & {id(p) for p in network.parameters()}
    # the copy starts where the original stands
    for name, value in network.net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.net.modules())


class Noisy(nn.Module):
    """Draws random numbers in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.fc(x)), 0.5, training=True)
        logits: Tensor = self.head(y + 0.1 * torch.randn_like(y))
        return logits


def test_quantizing_leaves_the_random_state_alone() -> None:
    net, x = Noisy().eval(), torch.randn(6, 3)
    state = torch.get_rng_state()
    quantize(net, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
def test_a_quantized_network_keeps_the_mode(build_case: Callable[[str], Case], training: bool) -> None:
    net, example = build_case("residual")
    network = quantize(net.train(training), example)
    assert network.training == network.net.training == training


def test_float_state_dicts_load_into_the_network_and_back(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    assert sorted(network.net.state_dict()) == sorted(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.9)
    network.net.load_state_dict(net.state_dict())
    assert agree(network(**example, gates=network.open_gates()), net(**example))
    with torch.no_grad():
        for parameter in network.net.parameters():
            parameter.mul_(0.9)
    net.load_state_dict(network.net.state_dict())
    assert agree(network(**example, gates=network.open_gates()), net(**example))


def test_state_dicts_pass_through_a_file_signs_included(case: Case, tmp_path: Path) -> None:
    net, example = case
    network, path = quantize(net, example), tmp_path / "weights.safetensors"
    save_tensors_atomically(path, network.state_dict())
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.abs_()
    restored = quantize(other, {key: x.abs() for key, x in example.items()})
    assert restored.quantizers.signed != network.quantizers.signed
    restored.load_state_dict(load_file(path))
    assert restored.quantizers.signed == network.quantizers.signed
    gates = random_gates(network)
    with torch.no_grad():
        assert torch.equal(outputs(restored(**example, gates=gates)), outputs(network(**example, gates=gates)))


def contexts(network: QuantizedNetwork) -> set[int]:
    layers = [m for m in network.modules() if isinstance(m, QuantizedLayer | GatedNorm)]
    assert layers
    return {id(layer.context) for layer in layers} | {id(network._context)}


def test_copies_have_a_context_of_their_own(case: Case) -> None:
    net, example = case
    network, gates = quantize(net, example), None
    copied = copy.deepcopy(network)
    assert len(contexts(network)) == len(contexts(copied)) == 1
    assert contexts(network) != contexts(copied)
    gates = random_gates(network)
    assert torch.equal(outputs(network(**example, gates=gates)), outputs(copied(**example, gates=gates)))


def test_networks_can_be_pickled() -> None:
    x = torch.rand(6, 1, 16, 16)
    network = quantize(LeNet5(image_size=16), x)
    gates = random_gates(network)
    restored = pickle.loads(pickle.dumps(network))
    assert len(contexts(restored)) == 1 and contexts(restored) != contexts(network)
    assert torch.equal(outputs(restored(x, gates=gates)), outputs(network(x, gates=gates)))
    assert restored.layout == network.layout and restored.layers == network.layers


def test_the_inner_network_cannot_be_called_without_gates(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    with pytest.raises(RuntimeError, match=r"call the QuantizedNetwork itself, network\(x, gates=\.\.\.\)"):
        network.net(**example)


def test_nothing_of_a_pass_is_left_behind(build_case: Callable[[str], Case]) -> None:
    """Neither after a pass nor after one that fails: a leftover could not be copied and would answer the next pass."""
    net, example = build_case("attention")
    network = quantize(net, example)
    gates = network.open_gates()._replace(channels=torch.ones(network.layout.num_channels, requires_grad=True))
    for bad in (example, {"tokens": torch.randn(6, 5, 7)}):
        if bad is example:
            network(**bad, gates=gates)
        else:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                network(**bad, gates=gates)
        assert vars(network._context) == vars(PassContext())
        with pytest.raises(RuntimeError, match="without gate values"):
            network.net(**example)
        copy.deepcopy(network)
    assert agree(network(**example, gates=gates), net(**example))


def test_an_evaluation_holds_no_activation_that_is_read_no_more() -> None:
    """Otherwise it takes the memory of a training step, or more."""
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())))
    network = quantize(net, torch.randn(16, 8))
    living: list[int] = []
    read: list[weakref.ref[Tensor]] = []

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(weakref.ref(args[0]))
        living.append(sum(one() is not None for one in read))

    for layer in network.net.modules():
        if isinstance(layer, QuantizedLayer):
            layer.register_forward_pre_hook(look)
    x = torch.randn(16, 8)
    with torch.no_grad():
        network.eval()(x, gates=network.open_gates())
    assert living == [1, 2, 2, 2]  # the example itself, and what the layer at hand reads


def test_a_failure_within_the_network_clears_the_context_too(build_case: Callable[[str], Case]) -> None:
    net, example = build_case("attention")
    network = quantize(net, example)

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError("half way")

    handle = network.net.get_submodule("o").register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="half way"):
        network(**example, gates=network.open_gates())
    handle.remove()
    assert vars(network._context) == vars(PassContext())
    assert agree(network(**example, gates=network.open_gates()), net(**example))


@pytest.mark.parametrize("change", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_gates_of_another_shape_are_refused(build_case: Callable[[str], Case], change: tuple[int, int, int]) -> None:
    net, example = build_case("twice")
    network = quantize(net, example)
    channels, tensors = (g.shape for g in network.open_gates())
    a, b, c = change
    gates = GateValues(torch.ones(channels[0] + a), torch.ones(tensors[0] + b, tensors[1] + c))
    expected = rf"gates must have shapes \(\({channels[0]},\), \({tensors[0]}, {tensors[1]}\)\).*got"
    with pytest.raises(ValueError, match=expected):
        network(**example, gates=gates)


def test_a_closed_gate_closes_its_channel_and_a_narrow_tensor_lies_on_its_grid() -> None:
    one, two, x = nn.Linear(4, 3), nn.Linear(3, 2), torch.randn(32, 4)
    network = quantize(nn.Sequential(one, nn.ReLU(), two), x, bits=(2, 4))
    gates = GateValues(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3, 1))
    beta = network.quantizers.ranges.detach()
    first = (one.weight.detach() / beta[0] * 1.5).round().clamp(-1, 1) * beta[0] / 1.5
    first_bias = one.bias.detach() * gates.channels
    hidden = F.relu(F.linear(x, first * gates.channels[:, None], first_bias))
    hidden = (hidden / beta[2] * 3).round().clamp(0, 3) * beta[2] / 3
    second = (two.weight.detach() / beta[1] * 1.5).round().clamp(-1, 1) * beta[1] / 1.5
    torch.testing.assert_close(network(x, gates=gates), F.linear(hidden, second, two.bias))


@pytest.mark.parametrize("example", ["tensor", "tuple", "list", "mapping"])
def test_examples_come_as_tensor_arguments_or_keywords(example: str) -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(6, 4)
    forms: dict[str, Any] = {"tensor": x, "tuple": (x,), "list": [x], "mapping": {"input": x}}
    assert quantize(net, forms[example]).layout == quantize(net, x).layout


class Conv2dOfMyOwn(nn.Conv2d):
    """A subclass may compute something else."""


class WithSubclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.special, self.conv, self.unused = Conv2dOfMyOwn(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.conv(F.relu(self.special(x)))).mean((2, 3)))
        return logits


def test_layers_left_in_float_are_listed_with_the_reason() -> None:
    net, x = WithSubclass(), torch.randn(6, 1, 5, 5)
    with (
        pytest.warns(UserWarning, match=r"80\.2 % .* stay in float: special \(its class Conv2dOfMyOwn is not supp"),
        pytest.warns(UserWarning, match="^unused stay in float: not called on the example inputs"),
    ):
        network = quantize(net, x, exclude=("he*",))
    assert network.float_layers == (
        FloatLayer("head", "Linear", 4, "excluded by 'he*'", True),
        FloatLayer("special", "Conv2dOfMyOwn", 162, "its class Conv2dOfMyOwn is not supported"),
        FloatLayer("unused", "Linear", 0, "it is not called on the example inputs"),
    )
    assert [layer.name for layer in network.layers] == ["conv"]
    for name, kind in {"special": Conv2dOfMyOwn, "unused": nn.Linear, "head": nn.Linear}.items():
        assert type(network.net.get_submodule(name)) is kind
    assert agree(network(x, gates=network.open_gates()), net(x))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def broken_weights() -> nn.Module:
    net = small()
    with torch.no_grad():
        net.get_parameter("2.weight")[0, 0] = torch.nan
    return net


GOOD = torch.ones(6, 4)


@pytest.mark.parametrize(
    ("net", "example", "options", "message"),
    [
        (small(), torch.ones(0, 4), {}, r"example_inputs are empty: a tensor has shape \(0, 4\)"),
        (small(), (), {}, "example_inputs must hold at least one tensor; got tuple"),
        (small(), {"input": 1.0}, {}, "example_inputs must hold at least one tensor"),
        (small(), GOOD * torch.nan, {}, "example_inputs hold NaN or infinite values"),
        (small(), GOOD * torch.inf, {}, "example_inputs hold NaN or infinite values"),
        (small(), torch.ones(6, 5), {}, r"could not be run on example_inputs \(RuntimeError: .* give inputs"),
        (small(), {"image": GOOD}, {}, r"could not be run on example_inputs \(TypeError"),
        (small(), torch.tensor(1.0), {}, r"could not be run on example_inputs \(IndexError"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), GOOD, {}, "no layer to quantize; supported are Linear, Conv1d, Conv2d"),
        (small(), GOOD, {"exclude": ("*",)}, r"include \('\*',\) and exclude \('\*',\) leave nothing to quantize"),
        (small(), GOOD, {"include": ()}, r"include \(\) and exclude \(\) leave nothing to quantize"),
        (small(), GOOD, {"exclude": ("0", "fc*")}, r"exclude pattern 'fc\*' matches nothing; layers are 0, 2"),
        (small(), GOOD, {"bits": (2, 3)}, "each bit width must be a multiple of the one before"),
        (small(), GOOD, {"bits": ()}, "with at least one of them"),
        (broken_weights(), GOOD, {}, "parameter '2.weight' holds NaN or infinite values"),
        (nn.Sequential(nn.LazyLinear(3)), GOOD, {}, "parameter '0.weight' is not initialized yet"),
    ],
)
def test_what_cannot_be_quantized_is_refused(net: nn.Module, example: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(net, example, **options)


def test_a_quantized_network_is_not_quantized_again() -> None:
    network = quantize(small(), GOOD)
    with pytest.raises(TypeError, match="is quantized already"):
        quantize(network, GOOD)
    with pytest.raises(TypeError, match="is quantized already"):
        quantize(network.net, GOOD)


def test_gradients_reach_weights_ranges_and_gates(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    layout = network.layout
    gates = GateValues(
        torch.full((layout.num_channels,), 0.9, requires_grad=True),
        torch.full((len(layout.tensors), len(layout.ladder.residuals)), 0.5, requires_grad=True),
    )
    result = tree_leaves(network(**example, gates=gates))
    sum(leaf.square().sum() for leaf in result).backward()
    assert gates.tensors.grad is not None and (gates.tensors.grad[:, 0] != 0).all()
    assert (gates.tensors.grad != 0).float().mean() > 0.9
    assert network.quantizers.log_range.grad is not None and (network.quantizers.log_range.grad != 0).all()
    for name, parameter in network.net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if layout.num_channels:
        assert gates.channels.grad is not None and (gates.channels.grad != 0).float().mean() > 0.5
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_extra_weights_are_one_range_per_tensor(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    extra = set(network.state_dict()) - {f"net.{name}" for name in net.state_dict()}
    assert extra == {"quantizers.log_range", "quantizers._extra_state"}
    assert network.quantizers.log_range.shape == (len(network.layout.tensors),)


def test_a_single_exclude_pattern_may_be_a_bare_string() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    network = quantize(net, torch.rand(16, 4), exclude="2")
    assert [layer.name for layer in network.layers] == ["0"]
