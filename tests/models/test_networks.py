"""The reference networks have the layers and the cost that the paper's comparisons rest on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.mlp import MLP
from pyro_bbits.models.mobilenetv2 import MobileNetV2
from pyro_bbits.models.registry import NETWORKS, build_network, default_network, network_options
from pyro_bbits.models.resnet18 import ResNet18
from pyro_bbits.models.resnet20 import ResNet20
from pyro_bbits.models.vgg7 import VGG7
from pyro_bbits.models.vit import ViT

CountMacs = Callable[[nn.Module, tuple[int, ...]], dict[str, int]]

SHAPES: dict[str, tuple[int, ...]] = {
    "digits-net": (1, 8, 8),
    "lenet5": (1, 28, 28),
    "vgg7": (3, 32, 32),
    "resnet20": (3, 32, 32),
    "resnet18": (3, 224, 224),
    "mobilenetv2": (3, 224, 224),
    "vit": (3, 32, 32),
    "mlp": (13,),
}

OUTPUTS = {"resnet18": 1000, "mobilenetv2": 1000}

# what a network can be shrunk to without losing a kind of layer
SMALL: dict[str, dict[str, Any]] = {
    "vgg7": {"width": 4},
    "resnet20": {"width": 4},
    "resnet18": {"width": 4},
    "mobilenetv2": {"width": 0.1},
    "vit": {"width": 12, "depth": 2, "heads": 2, "patch_size": 8},
}

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
    "mlp": {"hidden.0": 13 * 128, "hidden.2": 128 * 128, "head": 1280},
}


def resnet18_macs() -> dict[str, int]:
    """From the table of the paper: sides 112, 56, 28, 14, 7."""
    macs = {"conv1": 112**2 * 64 * 3 * 7**2, "fc": 512 * 1000}
    for stage, (side, channels) in enumerate([(56, 64), (28, 128), (14, 256), (7, 512)], 1):
        full = side**2 * channels**2 * 3**2
        macs |= {f"layer{stage}.{block}.conv{i}": full for block in (0, 1) for i in (1, 2)}
        if stage > 1:  # half as many channels come in
            macs |= {f"layer{stage}.0.conv1": full // 2, f"layer{stage}.0.downsample.0": full // 2 // 3**2}
    return macs


def resnet20_macs() -> dict[str, int]:
    macs = {"conv1": 32**2 * 16 * 3 * 3**2, "fc": 64 * 10}
    for stage, (side, channels) in enumerate([(32, 16), (16, 32), (8, 64)], 1):
        full = side**2 * channels**2 * 3**2
        macs |= {f"layer{stage}.{block}.conv{i}": full for block in range(3) for i in (1, 2)}
        macs |= {f"layer{stage}.0.conv1": full // 2} if stage > 1 else {}
    return macs


def mobilenetv2_macs() -> dict[str, int]:
    """Block by block: what comes in, what goes out, side before and after."""
    blocks = [(16, 24, 112, 56), (24, 24, 56, 56), (24, 32, 56, 28), (32, 32, 28, 28), (32, 32, 28, 28)]
    blocks += [(32, 64, 28, 14), (64, 64, 14, 14), (64, 64, 14, 14), (64, 64, 14, 14)]
    blocks += [(64, 96, 14, 14), (96, 96, 14, 14), (96, 96, 14, 14)]
    blocks += [(96, 160, 14, 7), (160, 160, 7, 7), (160, 160, 7, 7), (160, 320, 7, 7)]
    macs = {"features.0.0": 112**2 * 32 * 3 * 3**2, "features.18.0": 7**2 * 320 * 1280, "classifier.1": 1280 * 1000}
    macs |= {"features.1.conv.0.0": 112**2 * 32 * 3**2, "features.1.conv.1": 112**2 * 32 * 16}
    for index, (entering, leaving, before, after) in enumerate(blocks, 2):
        inner = 6 * entering
        macs[f"features.{index}.conv.0.0"] = before**2 * entering * inner
        macs[f"features.{index}.conv.1.0"] = after**2 * inner * 3**2
        macs[f"features.{index}.conv.2"] = after**2 * inner * leaving
    return macs


def vit_macs() -> dict[str, int]:
    tokens, width = 1 + 8 * 8, 192
    macs = {"patches": 8 * 8 * width * 3 * 4 * 4, "head": width * 10}
    for block in range(6):
        macs |= {f"blocks.{block}.attention.{layer}": tokens * width**2 for layer in ("q", "k", "v", "out")}
        macs |= {f"blocks.{block}.fc{i}": tokens * 4 * width**2 for i in (1, 2)}
    return macs


TABLES = {"resnet18": resnet18_macs, "resnet20": resnet20_macs, "mobilenetv2": mobilenetv2_macs, "vit": vit_macs}

TOTALS = {
    "digits-net": 1_821_952,
    "lenet5": 4_267_008,
    "vgg7": 615_917_568,
    "resnet20": 40_551_040,
    "resnet18": 1_814_073_344,
    "mobilenetv2": 300_774_272,
    "vit": 173_115_264,
    "mlp": 19_328,
}

PARAMETERS = {"resnet20": 269_722, "resnet18": 11_689_512, "mobilenetv2": 3_504_872}


def small(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A small network of this name, and the shape of what it takes."""
    shape = (3, 32, 32) if SHAPES[name][-1] > 32 else SHAPES[name]
    return build_network(name, shape, 10, **SMALL.get(name, {})), shape


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_per_layer_are_the_published_ones(name: str, count_macs: CountMacs) -> None:
    with torch.device("meta"):
        network = build_network(name, SHAPES[name], OUTPUTS.get(name, 10))
    expected = TABLES[name]() if name in TABLES else MACS[name]
    assert count_macs(network, SHAPES[name]) == expected
    assert sum(expected.values()) == TOTALS[name]


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_are_as_many_as_published(name: str, count: int) -> None:
    with torch.device("meta"):
        network = build_network(name, SHAPES[name], OUTPUTS.get(name, 10))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("width", "millions"), [(0.35, 59), (0.5, 97), (0.75, 209), (1.4, 582)])
def test_mobilenetv2_of_other_widths_costs_what_is_published(
    width: float, millions: int, count_macs: CountMacs
) -> None:
    with torch.device("meta"):
        network = MobileNetV2(width=width)
    assert round(sum(count_macs(network, (3, 224, 224)).values()) / 1e6) == millions


def test_mobilenetv2_widths_lose_no_more_than_a_tenth_by_rounding() -> None:
    with torch.device("meta"):
        convolutions = [m for m in MobileNetV2(width=0.35).features.modules() if isinstance(m, nn.Conv2d)]
    # 35 % of 32, 16, 24, 32, 64, 96, 160, 320; of the last 1280 nothing is taken away
    bottlenecks = [m.out_channels for m in convolutions if m.kernel_size == (1, 1) and m.out_channels < m.in_channels]
    assert sorted(set(bottlenecks)) == [8, 16, 24, 32, 56, 112]
    assert convolutions[0].out_channels == 16 and convolutions[-1].out_channels == 1280


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
    """A reader of the layers finds them in the order of the computation."""
    network, shape = small(name)
    ran: list[str] = []
    for child, module in network.eval().named_children():
        module.register_forward_hook(lambda *_, child=child: ran.append(child))
    network(torch.zeros(1, *shape))
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
    build: Callable[[], nn.Module], by_hand: Callable[[nn.Module], nn.Module], shape: tuple[int, ...]
) -> None:
    # In training mode, since a fresh normalization in evaluation mode commutes with ReLU.
    network, x = build(), torch.randn(4, *shape)
    torch.testing.assert_close(network(x), by_hand(network)(x), rtol=0, atol=0)
    assert network(x).shape == (4, 10)


def test_resnet_blocks_without_their_convolutions_are_shortcuts() -> None:
    """With a last scale of 0 a block is the rectified shortcut: the input, or half of its pixels and new channels."""
    x = torch.rand(2, 4, 6, 6)
    blocks = ResNet20(width=4)
    for block in (blocks.layer1[0], blocks.layer2[0], ResNet18(width=4).layer1[1]):
        nn.init.zeros_(block.get_parameter("bn2.weight"))
    assert torch.equal(blocks.layer1[0](x), x)
    halved = blocks.layer2[0](x)
    assert halved.shape == (2, 8, 3, 3)
    assert torch.equal(halved[:, :4], x[:, :, ::2, ::2]) and not halved[:, 4:].any()
    projected = ResNet18(width=4).layer2[0]
    nn.init.zeros_(projected.get_parameter("bn2.weight"))
    assert torch.equal(projected(x), F.relu(projected.get_submodule("downsample")(x)))


def test_mobilenetv2_adds_the_input_where_the_shape_stays() -> None:
    network = MobileNetV2(width=0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    blocks = list(network.features)[1:-1]
    adding = [block for block in blocks if torch.equal(block(x := torch.randn(2, *_in(block))), x)]
    silent = [block for block in blocks if not block(torch.randn(2, *_in(block))).any()]
    assert (len(adding), len(silent)) == (10, 7)  # in each of the seven stages all but the first


def _in(layer: nn.Module) -> tuple[int, int, int]:
    first = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    return first.in_channels, 4, 4


def test_vit_blocks_are_the_pre_norm_encoder_layers_of_torch() -> None:
    vit = ViT(width=12, depth=1, heads=3, image_size=8)
    block = vit.blocks[0]
    torch.nn.init.normal_(block.get_parameter("norm1.bias"))
    reference = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    own = {name.removeprefix("attention."): tensor for name, tensor in block.state_dict().items()}
    joined = {
        f"self_attn.in_proj_{kind}": torch.cat([own[f"{name}.{kind}"] for name in "qkv"]) for kind in ("weight", "bias")
    }
    names = {"out": "self_attn.out_proj", "fc1": "linear1", "fc2": "linear2", "norm1": "norm1", "norm2": "norm2"}
    renamed = {f"{new}.{kind}": own[f"{old}.{kind}"] for old, new in names.items() for kind in ("weight", "bias")}
    reference.load_state_dict(joined | renamed)
    x = torch.randn(4, 5, 12)
    torch.testing.assert_close(block(x), reference(x))


def test_vit_sees_where_a_patch_is() -> None:
    vit = ViT(width=12, depth=1, heads=3, image_size=8).eval()
    x = torch.randn(1, 3, 8, 8)
    turned = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert not torch.allclose(vit(x), vit(turned))
    nn.init.zeros_(vit.positions)
    torch.testing.assert_close(vit(x), vit(turned))


def test_small_stems_keep_the_pixels_of_small_images() -> None:
    sides: list[int] = []
    for stem in ("imagenet", "small"):
        for network in (ResNet18(width=4, stem=stem), MobileNetV2(width=0.1, stem=stem)):
            last = network.layer4 if isinstance(network, ResNet18) else network.features
            last.register_forward_hook(lambda *event: sides.append(event[2].shape[-1]))
            network.eval()(torch.rand(1, 3, 32, 32))
    assert sides == [1, 1, 4, 4]


def test_mlp_is_linear_without_hidden_layers_and_normalizes_if_asked() -> None:
    linear = MLP(5, 2, widths=())
    x = torch.randn(3, 5)
    torch.testing.assert_close(linear(x), x @ linear.head.weight.T + linear.head.bias)
    normalized = MLP(12, 2, widths=(7, 6), batch_norm=True)
    assert [type(m) for m in normalized.hidden] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2
    assert [n for n, _ in normalized.named_parameters() if n.endswith("bias")] == [
        "hidden.1.bias",
        "hidden.4.bias",
        "head.bias",
    ]
    images = torch.randn(4, 3, 2, 2)
    assert torch.equal(normalized(images), normalized(images.flatten(1)))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name: str) -> None:
    network, shape = small(name)
    network(torch.randn(4, *shape)).square().sum().backward()
    # a shift of all keys leaves the attention as it is
    parameters = {n: p for n, p in network.named_parameters() if not n.endswith("attention.k.bias")}
    assert [n for n, p in parameters.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_a_few_steps_lower_the_loss(name: str) -> None:
    network, shape = small(name)
    x, y = torch.randn(16, *shape), torch.arange(16) % 10
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: LeNet5(2, 3, image_size=16), (2, 16, 16)),
        (lambda: LeNet5(1, 3, image_size=33), (1, 33, 33)),
        (lambda: VGG7(1, 3, width=2, image_size=8), (1, 8, 8)),
        (lambda: VGG7(3, 3, width=2, image_size=27), (3, 27, 27)),
        (lambda: DigitsNet(3, 3), (3, 8, 8)),
        (lambda: build_network("lenet5", (3, 32, 32), 3), (3, 32, 32)),
        (lambda: build_network("resnet20", (1, 17, 9), 3, width=2), (1, 17, 9)),
        (lambda: build_network("resnet18", (3, 33, 40), 3, width=2, stem="small"), (3, 33, 40)),
        (lambda: build_network("mobilenetv2", (1, 28, 28), 3, width=0.1, dropout=0.0), (1, 28, 28)),
        (lambda: build_network("vit", (1, 28, 28), 3, width=8, depth=1, heads=2), (1, 28, 28)),
        (lambda: build_network("mlp", (1, 4, 4), 3, batch_norm=True), (1, 4, 4)),
        (lambda: build_network("mlp", (6,), 3, widths=(4,)), (6,)),
    ],
)
def test_other_sizes_fit_where_they_can(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
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
        (lambda: build_network("lenet", (1, 28, 28), 10), "'lenet'; choose one of digits-net, lenet5, vgg7, resnet20"),
        (lambda: build_network("resnet18", (13,), 10), r"resnet18 needs images.*shape \(13,\).*'mlp'"),
        (lambda: build_network("mlp", (3, 4), 10), r"input_shape must be .*; got \(3, 4\)"),
        (lambda: build_network("mlp", (), 10), r"input_shape must be .*; got \(\)"),
        (lambda: build_network("resnet20", (3, 8, 8), 10, depth=3), "resnet20 has no option 'depth'; .* are width"),
        (lambda: build_network("lenet5", (1, 28, 28), 10, num_classes=3), "no option 'num_classes'; it has none"),
        (lambda: build_network("vit", (3, 30, 30), 10), "image_size must be a multiple of patch_size=4; got 30"),
        (lambda: ViT(width=10), "width must be a multiple of heads=3; got 10"),
        (lambda: ViT(depth=0), "all counts to be at least 1; .*depth=0"),
        (lambda: ResNet20(width=0), "at least one channel .*width=0"),
        (lambda: ResNet18(num_classes=0), "at least one channel .*num_classes=0"),
        (lambda: ResNet18(stem="cifar"), "stem must be 'imagenet' or 'small'; got 'cifar'"),  # type: ignore[arg-type]
        (lambda: MobileNetV2(stem="x"), "stem must be 'imagenet' or 'small'; got 'x'"),  # type: ignore[arg-type]
        (lambda: MobileNetV2(width=0.0), "a width above 0; .*width=0.0"),
        (lambda: MobileNetV2(dropout=1.0), "dropout must be at least 0 and below 1; got 1.0"),
        (lambda: MLP(0, 1), "at least one feature.*in_features=0"),
        (lambda: MLP(2, 1, widths=(3, 0)), r"at least one feature.*widths=\(3, 0\)"),
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


def test_options_are_what_a_network_takes_beside_the_shapes() -> None:
    assert {name: set(network_options(name)) for name in NETWORKS} == {
        "digits-net": set(),
        "lenet5": set(),
        "vgg7": {"width"},
        "resnet20": {"width"},
        "resnet18": {"width", "stem"},
        "mobilenetv2": {"width", "stem", "dropout"},
        "vit": {"patch_size", "width", "depth", "heads"},
        "mlp": {"widths", "batch_norm"},
    }
    assert build_network("vgg7", (1, 8, 8), 3, width=2).get_parameter("fc2.weight").shape == (3, 16)
    with pytest.raises(ValueError, match="no network is called 'vgg'"):
        network_options("vgg")
