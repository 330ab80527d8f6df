"""Which batch norms may quantize their own output, and that the network computes the same when they do."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits.gates import GateValues
from pyro_bbits.inference.capture_audit import HostReads
from pyro_bbits.insertion import QuantizedNetwork, context, network, quantize
from pyro_bbits.insertion.fusion import Fusion, find_fusions
from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.layers import GATED_NORMS
from pyro_bbits.kernels.norm import has_windows, normalize_and_quantize_plain
from pyro_bbits.models import VGG7, ResNet18
from pyro_bbits.models.mobilenetv2 import MobileNetV2

pytestmark = pytest.mark.filterwarnings("ignore:.*stay in float")  # where a way leaves layers out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fuses without kernels, by the plain steps; holds the inputs' numbers of dimensions of the norms that do so."""
    seen: list[int] = []

    def spy(y: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(y.dim())
        return normalize_and_quantize_plain(y, *args, **options)

    monkeypatch.setattr(context, "normalize_and_quantize", spy)
    monkeypatch.setattr(context, "can_fuse", lambda y, ladder, pooled: not pooled or has_windows(y))
    monkeypatch.setattr(network, "choose_body", lambda x, ladder: "triton")
    return seen


def fusions(net: QuantizedNetwork) -> dict[str, str]:
    """Name of the tensor that each norm may quantize, by the name of the norm."""
    rows = {name: getattr(module, "output_row", None) for name, module in net.net.named_modules()}
    return {name: net.layout.tensors[row] for name, row in rows.items() if row is not None}


class Block(nn.Module):
    """A convolution and its norm, a layer that may read them, and a way between that the test chooses."""

    def __init__(self, between: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.other, self.head, self.relu = nn.Conv2d(4, 4, 1), nn.Linear(4, 2), nn.ReLU()
        self.relu_inplace, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6()
        self.pool, self.flat, self.small = nn.MaxPool2d(2), nn.Linear(64, 4), nn.Linear(16, 4)
        self.between, self.kept, self.two = between, torch.zeros(()), np.int64(2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self, self.conv(x)).mean((2, 3)))
        return logits

    def keep(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 2, 6, 6)


FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda net, y: net.read(F.relu(net.norm(y))),
    "function in place": lambda net, y: net.read(F.relu(net.norm(y), inplace=True)),
    "torch": lambda net, y: net.read(torch.relu(net.norm(y))),
    "torch in place": lambda net, y: net.read(torch.relu_(net.norm(y))),
    "method": lambda net, y: net.read(net.norm(y).relu()),
    "method in place": lambda net, y: net.read(net.norm(y).relu_()),
    "module": lambda net, y: net.read(net.relu(net.norm(y))),
    "module in place": lambda net, y: net.read(net.relu_inplace(net.norm(y))),
    "by name": lambda net, y: net.read(input=F.relu(input=net.norm(y))),
    "two layers": lambda net, y: (lambda r: net.read(r) + net.other(r))(F.relu(net.norm(y))),
    "shape only": lambda net, y: (lambda r: net.read(r) / r.shape[1])(F.relu(net.norm(y))),
}

POOLED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pooled": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), 2)),
    "pooled first": lambda net, y: net.read(F.relu(F.max_pool2d(net.norm(y), 2))),
    "pooled first, in place": lambda net, y: net.read(net.relu_inplace(net.pool(net.norm(y)))),
    "pooled by a module": lambda net, y: net.read(net.pool(net.relu(net.norm(y)))),
    "pooled by torch": lambda net, y: net.read(torch.max_pool2d(net.norm(y).relu(), (2, 2), stride=(2, 2))),
    "pooled by name": lambda net, y: net.read(F.max_pool2d(input=F.relu(net.norm(y)), kernel_size=2, stride=[2])),
    "size after pooling": lambda net, y: (lambda r: net.read(r) / r.shape[2])(net.pool(F.relu(net.norm(y)))),
    "pooled by another integer": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), net.two)),
    "pooled for two": lambda net, y: (lambda r: net.read(r) + net.other(r))(F.max_pool2d(F.relu(net.norm(y)), 2)),
}

FLAT: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "flatten": ("flat", lambda net, y: net.flat(F.relu(net.norm(y)).flatten(1))[:, :, None, None]),
    "torch.flatten": ("flat", lambda net, y: net.flat(torch.flatten(F.relu(net.norm(y)), 1))[:, :, None, None]),
    "view": ("flat", lambda net, y: net.flat(F.relu(net.norm(y)).view(len(y), -1))[:, :, None, None]),
    "reshape twice": ("flat", lambda net, y: net.flat(F.relu(net.norm(y)).flatten(2).flatten(1))[:, :, None, None]),
    "pooled, flat": ("small", lambda net, y: net.small(net.pool(F.relu(net.norm(y))).flatten(1))[:, :, None, None]),
}

NOT_FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu6": lambda net, y: net.read(net.relu6(net.norm(y))),
    "clamp": lambda net, y: net.read(net.norm(y).clamp(min=0)),
    "no relu": lambda net, y: net.read(net.norm(y)),
    "pooling by 3": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), 3, 1)),
    "overlapping": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), 2, 1)),
    "padded": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), 2, padding=1)),
    "stretched": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), 2, dilation=2)),
    "with places": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)), 2, return_indices=True)[0]),
    "odd": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y[:, :, 1:])), 2)),
    "mean": lambda net, y: net.read(F.avg_pool2d(F.relu(net.norm(y)), 2)),
    "pooled twice": lambda net, y: net.read(F.max_pool2d(F.max_pool2d(F.relu(net.norm(y)), 2), 2)),
    "pooled without relu": lambda net, y: net.read(F.max_pool2d(net.norm(y), 2)),
    "pooled and read": lambda net, y: (lambda r: net.read(F.max_pool2d(r, 2)) + r[:, :, ::2, ::2])(F.relu(net.norm(y))),
    "read, then pooled": lambda net, y: (lambda r: net.other(r)[:, :, :2, :2] + net.read(F.max_pool2d(r, 2)))(
        F.relu(net.norm(y))
    ),
    "size before pooling": lambda net, y: (lambda r: net.read(F.max_pool2d(r, 2)) / r.shape[2])(F.relu(net.norm(y))),
    "size of the norm": lambda net, y: (lambda n: net.read(F.relu(F.max_pool2d(n, 2))) * n.size(2))(net.norm(y)),
    "number of values": lambda net, y: (lambda r: net.read(F.max_pool2d(r, 2)) / r.numel())(F.relu(net.norm(y))),
    "as large as before": lambda net, y: (lambda r: F.interpolate(net.read(net.pool(r)), size=r.shape[2:]))(
        F.relu(net.norm(y))
    ),
    "flat before the relu": lambda net, y: net.flat(F.relu(net.norm(y).flatten(1)))[:, :, None, None],
    "flat and pooled": lambda net, y: net.read(F.max_pool2d(F.relu(net.norm(y)).flatten(2)[:, :, None], 2, 1, (1, 0))),
    "flat and read": lambda net, y: (lambda r: net.flat(r.flatten(1))[:, :, None, None] + r)(F.relu(net.norm(y))),
    "another type": lambda net, y: net.read(F.relu(net.norm(y)).view(torch.int32).view(torch.float32)),
    "slice": lambda net, y: net.read(F.relu(net.norm(y))[:, :, 1:]),
    "skip": lambda net, y: (lambda r: net.read(r) + r)(F.relu(net.norm(y))),
    "sum before": lambda net, y: net.read(F.relu(net.norm(y) + y)),
    "norm read": lambda net, y: (lambda n: net.read(F.relu(n)) + n)(net.norm(y)),
    "two relus": lambda net, y: (lambda n: net.read(F.relu(n)) + net.other(F.relu(n)))(net.norm(y)),
    "norm read by a layer": lambda net, y: (lambda n: net.read(F.relu(n)) + net.other(n))(net.norm(y)),
    "excitation": lambda net, y: (lambda r: net.read(r) * torch.sigmoid(r.mean((2, 3), keepdim=True)))(
        F.relu(net.norm(y))
    ),
    "statistic": lambda net, y: (lambda r: net.read(r) if float(r.sum()) > 0 else net.other(r))(F.relu(net.norm(y))),
    "kept": lambda net, y: net.read(net.keep(F.relu(net.norm(y)))),
    "norm kept": lambda net, y: net.read(F.relu(net.keep(net.norm(y)))),
    "norm twice": lambda net, y: net.read(F.relu(net.norm(F.relu(net.norm(y))))),
    "only training": lambda net, y: (lambda r: net.read(r) + r if net.training else net.read(r))(F.relu(net.norm(y))),
}


@pytest.mark.parametrize("way", FUSED)
def test_a_norm_read_by_a_relu_that_layers_read_is_found(way: str) -> None:
    assert fusions(quantize(Block(FUSED[way]).eval(), images())) == {"norm": "read.input"}


@pytest.mark.parametrize("way", POOLED)
def test_a_pooling_beside_the_relu_is_found(way: str) -> None:
    network = quantize(Block(POOLED[way]).eval(), images())
    assert fusions(network) == {"norm": "read.input"} and network.net.norm.output_pooled is True  # type: ignore[union-attr]


@pytest.mark.parametrize("way", FLAT)
def test_another_shape_behind_them_is_found(way: str) -> None:
    reader, between = FLAT[way]
    assert fusions(quantize(Block(between).eval(), images())) == {"norm": f"{reader}.input"}


@pytest.mark.parametrize("way", NOT_FUSED)
def test_a_norm_that_anything_else_reads_is_not(way: str) -> None:
    assert fusions(quantize(Block(NOT_FUSED[way]).eval(), images())) == {}


class Returned(nn.Module):
    """Gives out the activation as well, in an object that nothing can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 4)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        x = F.relu(self.norm(self.conv(x)))
        return iter([self.read(x), x])


def test_an_activation_that_is_given_out_is_not_fused() -> None:
    net = Returned()
    assert find_fusions(net, Inputs.of(images())) == {}
    net.forward = lambda x: net.read(F.relu(net.norm(net.conv(x))))  # type: ignore[method-assign]
    assert find_fusions(net, Inputs.of(images())) == {"norm": Fusion(frozenset({"read"}))}


def test_a_reader_that_stays_in_float_wants_the_activation() -> None:
    net = Block(FUSED["two layers"]).eval()
    assert fusions(quantize(net, images(), exclude="other")) == {}


def test_networks_are_fused_where_they_can_be() -> None:
    inputs = Inputs.of(torch.rand(2, 3, 32, 32))
    readers = ("conv2", "conv3", "conv4", "conv5", "conv6", "fc1", "fc2")
    vgg = {f"norm{i}": Fusion(frozenset({readers[i - 1]}), pooled=i in (2, 4, 6)) for i in range(1, 8)}
    assert find_fusions(VGG7(width=4).eval(), inputs) == vgg
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    resnet = {f"{block}.bn1": Fusion(frozenset({f"{block}.conv2"})) for block in blocks}
    assert find_fusions(ResNet18(width=4, stem="small"), inputs) == resnet
    assert find_fusions(MobileNetV2(width=0.1, stem="small"), inputs) == {}


def test_finding_them_leaves_modes_and_statistics_alone() -> None:
    net = Block(FUSED["function"])
    net.norm.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    quantized = quantize(net, images())
    assert {name: module.training for name, module in quantized.net.named_modules()} == modes
    assert quantized.net.norm.num_batches_tracked == 0 and not quantized.net.norm.running_mean.any()  # type: ignore[union-attr, operator]


def soft_gates(net: QuantizedNetwork) -> GateValues:
    opened = net.open_gates()
    gates = GateValues(*(torch.rand_like(g) for g in opened))
    gates.channels[::3] = 0.0
    return GateValues(*(g.requires_grad_() for g in gates))


def step(net: QuantizedNetwork, x: Tensor, gates: GateValues) -> dict[str, Tensor]:
    """Everything that a training step computes: outputs, gradients, statistics."""
    y = net(x, gates=gates)
    variables = {**dict(net.named_parameters()), "channels": gates.channels, "tensors": gates.tensors}
    grads = torch.autograd.grad(y.square().sum(), list(variables.values()), materialize_grads=True)
    return {"output": y.detach(), **dict(zip(variables, grads, strict=True)), **dict(net.net.named_buffers())}


def random_affine(net: nn.Module) -> None:
    for module in net.modules():
        if type(module) in GATED_NORMS:
            nn.init.uniform_(module.weight, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(module.bias, std=0.2)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vgg": lambda: (VGG7(width=4, image_size=16), torch.rand(6, 3, 16, 16)),
    "resnet": lambda: (ResNet18(width=4, stem="small"), torch.rand(4, 3, 16, 16)),
    **{way: lambda way=way: (Block(FUSED[way]), images()) for way in FUSED},  # type: ignore[misc]
    **{way: lambda way=way: (Block(POOLED[way]), images()) for way in POOLED},  # type: ignore[misc]
    **{way: lambda way=way: (Block(FLAT[way][1]), images()) for way in FLAT},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_training_step_is_the_unfused_one(calls: list[int], name: str) -> None:
    net, x = NETWORKS[name]()
    random_affine(net)
    fused = quantize(net, x)
    gates = soft_gates(fused)
    unfused = copy.deepcopy(fused)
    unfused.fused = False
    actual = step(fused, x, gates)
    assert len(calls) == len(fusions(fused)) > 0
    expected = step(unfused, x, gates)
    assert len(calls) == len(fusions(fused))
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=f"{key} differs")


def test_a_norm_without_gates_quantizes_too(calls: list[int]) -> None:
    """The layer before it is not quantized, so nothing but the fusion turns this norm into another class."""
    net, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(16, 3)
    network, results = quantize(net, x, exclude="0"), []
    assert fusions(network) == {"1": "3.input"} and network.net[1].output_gate is None  # type: ignore[index]
    for fused in (True, False):
        network.fused = fused
        results.append(network(x, gates=network.open_gates()))
    assert calls == [2]
    torch.testing.assert_close(*results)


def test_the_relu_hands_the_finished_tensor_on(calls: list[int]) -> None:
    """The very tensor that the norm has written is what the layer multiplies."""
    net = quantize(Block(FUSED["module"]), images())
    inner: Any = net.net
    seen: list[Any] = []
    inner.relu.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    inner.read.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    multiply = inner.read._multiply

    def spy(x: Tensor, *args: Any) -> Any:
        seen.append(x)
        return multiply(x, *args)

    inner.read._multiply = spy
    net(images(), gates=net.open_gates())
    assert len(seen) == 4 and all(x is seen[0] for x in seen)


@pytest.mark.parametrize("change", ["evaluation", "frozen", "average", "off", "hook", "no statistics"])
def test_other_passes_are_not_fused(calls: list[int], change: str) -> None:
    net = quantize(Block(FUSED["function"]), images())
    norm: Any = net.net.norm
    if change == "evaluation":
        net.eval()
    elif change == "frozen":
        norm.eval()
    elif change == "average":
        norm.momentum = None
    elif change == "off":
        net.fused = False
    elif change == "hook":
        norm.register_full_backward_hook(lambda module, *gradients: None)
    else:
        norm.track_running_stats = False
    net(images(), gates=net.open_gates())
    assert not calls


def test_a_watcher_sees_the_activation_before_it_is_quantized(calls: list[int]) -> None:
    net = quantize(Block(FUSED["function"]), images())
    seen: dict[int, Tensor] = {}
    with net.watching(seen.__setitem__):
        net(images(), gates=GateValues(*(torch.zeros_like(g) + (i == 0) for i, g in enumerate(net.open_gates()))))
    x = seen[net.layout.tensors.index("read.input")]
    assert not calls and len(x.unique()) > 4  # 2 bits would leave four values


def test_state_and_copies_stay_what_they_are(calls: list[int]) -> None:
    net = Block(FUSED["function"])
    network = quantize(net, images())
    assert network.net.state_dict().keys() == net.state_dict().keys()
    copied = copy.deepcopy(network)
    copied(images(), gates=copied.open_gates())
    assert calls == [4] and copied.net.norm.context is not network.net.norm.context  # type: ignore[union-attr]
    assert not copied._context.finished._tensors


def test_a_path_that_the_examples_did_not_take_is_an_error(calls: list[int]) -> None:
    """It would read a quantized activation in place of the activation."""
    net = Block(lambda net, y: (lambda r: net.read(r) + (r.sum() if net.kept.any() else 0))(F.relu(net.norm(y))))
    network = quantize(net, images())
    inner: Any = network.net
    inner.kept = torch.ones(())
    with pytest.raises(RuntimeError, match="sum reads an activation"):
        network(images(), gates=network.open_gates())
    network.fused = False
    network(images(), gates=network.open_gates())


def test_a_finished_tensor_that_no_layer_reads_is_an_error(calls: list[int]) -> None:
    """The layer may have read a copy of it, which it would have quantized a second time."""
    net = Block(lambda net, y: (lambda r: net.read(y if net.kept.any() else r))(F.relu(net.norm(y))))
    network = quantize(net, images())
    inner: Any = network.net
    inner.kept = torch.ones(())
    with pytest.raises(RuntimeError, match="did not reach the layers"):
        network(images(), gates=network.open_gates())


ANOTHER_PATH: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "not pooled": (lambda net, r: net.read(r), "a layer reads an activation before the pooling"),
    "pooled twice": (lambda net, r: net.read(net.pool(net.pool(r))), "max_pool2d reads an activation"),
    "read before pooling": (
        lambda net, r: net.other(r)[:, :, ::2, ::2] + net.read(net.pool(r)),
        "a layer reads an activation before the pooling",
    ),
    "read by a function": (
        lambda net, r: F.conv2d(r, torch.ones(4, 4, 2, 2), stride=2) + net.read(net.pool(r)),
        "conv2d reads an activation",
    ),
    "size before pooling": (lambda net, r: net.read(net.pool(r / r.shape[2])), "__get__ reads an activation"),
    "changed in place": (lambda net, r: net.read(net.pool(r).mul_(2)), "mul_ reads an activation"),
    "pooled by the mean": (lambda net, r: net.read(F.avg_pool2d(r, 2)), "avg_pool2d reads an activation"),
}


@pytest.mark.parametrize("way", ANOTHER_PATH)
def test_another_way_to_the_layers_than_on_the_examples_is_an_error(calls: list[int], way: str) -> None:
    """They would be given quantized and pooled values in place of what they ask for."""
    between, error = ANOTHER_PATH[way]
    network = quantize(Block(POOLED["pooled for two"]), images())
    network(images(), gates=network.open_gates())
    network.net.between = lambda net, y: between(net, F.relu(net.norm(y)))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=error):
        network(images(), gates=network.open_gates())


def test_a_tensor_reshaped_after_a_layer_has_read_it_is_an_error(calls: list[int]) -> None:
    """Before, it is what the layer reads; after, somebody else would get quantized values."""
    network = quantize(Block(FUSED["function"]), images())
    network.net.between = lambda net, y: (lambda r: net.read(r) + r.flatten(1).sum())(F.relu(net.norm(y)))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="flatten reads an activation"):
        network(images(), gates=network.open_gates())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_training_pass_without_gradients_is_fused_too(calls: list[int], mode: Any) -> None:
    network, results = quantize(Block(POOLED["pooled"]), images()), []
    for fused in (True, False):
        network.fused = fused
        with mode():
            torch.manual_seed(0)
            results.append(network(images(), gates=network.open_gates()))
    assert calls == [4]
    torch.testing.assert_close(*results)


def test_images_that_windows_do_not_cover_take_the_steps_one_by_one(calls: list[int]) -> None:
    """Windows covered the example inputs."""
    network, odd = quantize(Block(POOLED["pooled"]), images()), torch.rand(8, 2, 7, 7)
    assert network(odd, gates=network.open_gates()).shape == (8, 2) and not calls


def test_a_fused_step_asks_the_host_for_nothing(calls: list[int]) -> None:
    """So that a CUDA graph can hold it."""
    network = quantize(Block(FUSED["module"]), images())
    gates, x = network.open_gates(), images()
    with HostReads(refuse=True):
        network(x, gates=gates).sum().backward()
    assert calls == [4]
