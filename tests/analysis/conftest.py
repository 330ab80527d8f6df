"""Posteriors over networks small enough to enumerate, and a network that trains in a moment."""

from collections.abc import Callable, Iterator
from itertools import product

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import GateProbabilities, GateValues, QuantizedNetwork, quantize
from pyro_bbits.analysis import GatePosterior
from pyro_bbits.insertion import StructureSnapshot
from pyro_bbits.models.registry import NETWORKS

mpl.use("Agg")

Pattern = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


class Depthwise(nn.Module):
    """A convolution whose channels a depthwise one reads, a pointwise one, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.depth = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.point = nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depth(F.relu(self.norm(self.conv(x)))))
        logits: Tensor = self.head(F.relu(self.point(x)).mean((2, 3)))
        return logits


class Deep(nn.Module):
    """Fifty linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(49))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        logits: Tensor = self.head(x)
        return logits


class TinyNet(nn.Module):
    """A perceptron on averaged pixels of 8x8 images."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16 * in_channels, 12), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(F.relu(self.fc1(F.avg_pool2d(x, 2).flatten(1))))
        return logits


def _network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(11)
    if kind == "chain":  # tensors 0.weight, 2.weight, 2.input; two channels of layer 0 can go
        return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), torch.rand(16, 3)
    if kind == "unprunable":
        return nn.Sequential(nn.Linear(3, 4)), torch.rand(16, 3)
    if kind == "depthwise":
        return Depthwise().eval(), torch.rand(16, 1, 3, 3)
    return Deep(), torch.rand(16, 4)


@pytest.fixture
def make_network() -> Callable[..., QuantizedNetwork]:
    """Builds the quantized networks `chain`, `unprunable`, `depthwise` and `deep`."""

    def build(kind: str, bits: tuple[int, ...] = (2, 4, 8)) -> QuantizedNetwork:
        net, examples = _network(kind)
        return quantize(net, examples, bits=bits)

    return build


@pytest.fixture
def make_posterior(make_network: Callable[..., QuantizedNetwork]) -> Callable[..., GatePosterior]:
    """Builds posteriors over these networks with random probabilities, or given ones."""

    def build(
        kind: str,
        bits: tuple[int, ...] = (2, 4, 8),
        *,
        channels: list[float] | None = None,
        tensors: list[list[float]] | None = None,
        seed: int = 0,
    ) -> GatePosterior:
        structure = StructureSnapshot.of(make_network(kind, bits))
        generator = torch.Generator().manual_seed(seed)
        random = (torch.rand(g.shape, generator=generator) * 0.9 + 0.05 for g in structure.layout.open_gates())
        given = (None if values is None else torch.tensor(values) for values in (channels, tensors))
        chosen = (r if g is None else g for r, g in zip(random, given, strict=True))
        return GatePosterior(structure, GateProbabilities(*chosen))

    return build


@pytest.fixture
def enumerate_patterns() -> Callable[[GatePosterior], Iterator[tuple[float, GateValues]]]:
    """Goes through every pattern of open and closed gates of a posterior, with its probability.

    Gates behind a closed one are there too, and idle.
    """

    def patterns(posterior: GatePosterior) -> Iterator[tuple[float, GateValues]]:
        channels, tensors = (p.double() for p in posterior.probabilities)
        on = torch.cat([channels, tensors.flatten()])
        for bits in product((0.0, 1.0), repeat=len(on)):
            pattern = torch.tensor(bits)
            probability = torch.where(pattern == 1, on, 1 - on).prod().item()
            yield probability, GateValues(pattern[: len(channels)], pattern[len(channels) :].reshape(tensors.shape))

    return patterns


@pytest.fixture(scope="module")
def tiny_network() -> Iterator[str]:
    """Name under which a network that trains in a moment is registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", TinyNet)
        yield "tiny"


@pytest.fixture(autouse=True)
def no_open_figures() -> Iterator[None]:
    """No figure stays behind in pyplot."""
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert not left, "a figure was left open in pyplot"
