"""A network with a norm, a plain layer and a head, and data that it can learn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits.inference.baselines import Baseline

Batch = tuple[Tensor, Tensor]


def images() -> Batch:
    """48 images whose class is which half is brighter."""
    x = torch.rand(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(48) % 2
    x[y == 0, :, :3] += 1.0
    x[y == 1, :, 3:] += 1.0
    return x, y


@pytest.fixture
def data() -> Batch:
    """All data."""
    return images()


@pytest.fixture
def batches(data: Batch) -> list[Batch]:
    """The data in three batches."""
    x, y = data
    return list(zip(x.split(16), y.split(16), strict=True))


@pytest.fixture
def net() -> nn.Module:
    """MACs 1296, 5184 and 288; rows conv1.weight, conv2.weight, head.weight, conv2.input, head.input."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 2),
        )


@pytest.fixture
def make(net: nn.Module) -> Callable[..., Baseline]:
    """Calls a method on the network."""

    def build(method: Callable[..., Baseline], **options: object) -> Baseline:
        return method(net, images()[0][:16], 48, **options)

    return build


MACS = (1296, 5184, 288)


@pytest.fixture
def count() -> Callable[..., float]:
    """Relative BOPs by hand, from the widths of three weights and two inputs; the network's input has 8 bit."""

    def bops(weights: tuple[float, float, float], inputs: tuple[float, float]) -> float:
        widths = zip(weights, (8, *inputs), strict=True)
        return 100 * sum(m * w * a for m, (w, a) in zip(MACS, widths, strict=True)) / (1024 * sum(MACS))

    return bops
