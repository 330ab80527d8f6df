"""The reference networks have the layers and the cost that the paper's comparisons rest on."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.registry import NETWORKS, build_network, default_network
from pyro_bbits.models.vgg7 import VGG7

SHAPES = {"digits-net": (1, 8, 8), "lenet5": (1, 28, 28), "vgg7": (3, 32, 32)}

MACS = {
    "digits-net": {"conv1": 18_432, "conv2": 1_179_648, "conv3": 589_824, "fc1": 32_768, "fc2": 1_280},
    "lenet5": {"conv1": 460_800, "conv2": 3_276_800, "fc1": 524_288, "fc2": 5_120},
    "vgg7": {
        "conv1": 3_538_944,
        "conv2": 150_994_944,
        "conv3": 75_497_472,
        "conv4": 150_994_944,
        "conv5": 75_497_472,
        "conv6": 150_994_944,
        "fc1": 8_388_608,
        "fc2": 10_240,
    },
}

TOTALS = {"digits-net": 1_821_952, "lenet5": 4_267_008, "vgg7": 615_917_568}


def count_macs(network: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Count the multiply-accumulates of each layer for one image; the counter reports two operations each."""
    network = network.to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"))
    prefix = f"{type(network).__name__}."
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    layers = {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}
    return {name: count for name, count in layers.items() if count}


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_per_layer_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        network = build_network(name, SHAPES[name], 10)
    assert count_macs(network, SHAPES[name]) == MACS[name]
    assert sum(MACS[name].values()) == TOTALS[name]


def test_lenet5_has_biases_and_no_normalization() -> None:
    network = LeNet5()
    assert [type(layer) for layer in network.children()] == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear]
    assert [name for name, _ in network.named_parameters() if name.endswith("bias")] == [
        "conv1.bias",
        "conv2.bias",
        "fc1.bias",
        "fc2.bias",
    ]
    assert network.fc1.in_features == 1024


def test_vgg7_normalizes_every_layer_but_the_classifier_which_alone_has_a_bias() -> None:
    with torch.device("meta"):
        network = VGG7()
    widths = [128, 128, 256, 256, 512, 512, 1024]
    norms = [network.get_parameter(f"norm{index}.weight") for index in range(1, 8)]
    assert [len(scale) for scale in norms] == widths
    layers = {name: layer for name, layer in network.named_children() if name.startswith(("conv", "fc"))}
    assert [name for name, layer in layers.items() if layer.bias is not None] == ["fc2"]
    assert network.fc1.in_features == 8192


@pytest.mark.parametrize("name", NETWORKS)
def test_children_are_listed_in_the_order_they_run(name: str) -> None:
    """Pruning takes the input channels of a layer from the layer before it."""
    network = build_network(name, SHAPES[name], 10).eval()
    ran: list[str] = []
    for child, module in network.named_children():
        module.register_forward_hook(lambda *_, child=child: ran.append(child))
    network(torch.zeros(1, *SHAPES[name]))
    assert ran == [child for child, _ in network.named_children()]


def lenet5_by_hand(network: LeNet5) -> nn.Module:
    return nn.Sequential(
        *(network.conv1, nn.ReLU(), nn.MaxPool2d(2), network.conv2, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), network.fc1, nn.ReLU(), network.fc2),
    )


def vgg7_by_hand(network: VGG7) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(1, 7):
        layers += [network.get_submodule(f"conv{index}"), network.get_submodule(f"norm{index}"), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if index % 2 == 0 else []
    return nn.Sequential(*layers, nn.Flatten(), network.fc1, network.norm7, nn.ReLU(), network.fc2)


def digits_net_by_hand(network: DigitsNet) -> nn.Module:
    return nn.Sequential(
        *(network.conv1, network.norm1, nn.ReLU()),
        *(network.conv2, network.norm2, nn.ReLU(), nn.MaxPool2d(2)),
        *(network.conv3, network.norm3, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), network.fc1, nn.ReLU(), network.fc2),
    )


@pytest.mark.parametrize(
    ("build", "by_hand", "shape"),
    [
        (LeNet5, lenet5_by_hand, (1, 28, 28)),
        (lambda: VGG7(width=4), vgg7_by_hand, (3, 32, 32)),
        (DigitsNet, digits_net_by_hand, (1, 8, 8)),
    ],
)
def test_forward_is_the_described_chain(
    build: Callable[[], nn.Module], by_hand: Callable[[nn.Module], nn.Module], shape: tuple[int, int, int]
) -> None:
    # In training mode, since a fresh normalization in evaluation mode commutes with ReLU.
    network, x = build(), torch.randn(4, *shape)
    torch.testing.assert_close(network(x), by_hand(network)(x), rtol=0, atol=0)
    assert network(x).shape == (4, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name: str) -> None:
    network = VGG7(width=4) if name == "vgg7" else build_network(name, SHAPES[name], 10)
    network(torch.randn(4, *SHAPES[name])).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: LeNet5(2, 3, image_size=16), (2, 16, 16)),
        (lambda: LeNet5(1, 3, image_size=33), (1, 33, 33)),
        (lambda: VGG7(1, 3, width=2, image_size=8), (1, 8, 8)),
        (lambda: VGG7(3, 3, width=2, image_size=27), (3, 27, 27)),
        (lambda: DigitsNet(3, 3), (3, 8, 8)),
        (lambda: build_network("lenet5", (3, 32, 32), 3), (3, 32, 32)),
    ],
)
def test_other_sizes_fit_where_they_can(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> None:
    logits = build()(torch.randn(2, *shape))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LeNet5(image_size=15), "at least 16x16 pixels; got image_size=15"),
        (lambda: VGG7(image_size=7), "at least 8x8 pixels; got image_size=7"),
        (lambda: LeNet5(in_channels=0), "at least one channel .*in_channels=0"),
        (lambda: VGG7(width=0), "at least one channel .*width=0"),
        (lambda: DigitsNet(num_classes=0), "at least one channel .*num_classes=0"),
        (lambda: build_network("digits-net", (1, 28, 28), 10), "takes 8x8 images only; got 28x28"),
        (lambda: build_network("lenet5", (1, 28, 30), 10), "square images; got 28x30"),
        (lambda: build_network("lenet", (1, 28, 28), 10), "'lenet'; choose one of digits-net, lenet5, vgg7"),
        (lambda: default_network("svhn"), "'svhn'; choose one of digits, mnist, cifar10"),
    ],
)
def test_impossible_networks_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("data", "network"), [("digits", DigitsNet), ("mnist", LeNet5), ("cifar10", VGG7)])
def test_each_data_set_has_its_network(data: str, network: type[nn.Module]) -> None:
    name = default_network(data)
    with torch.device("meta"):
        assert type(build_network(name, SHAPES[name], 10)) is network
