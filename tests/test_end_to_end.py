"""The whole path on networks that the library does not ship: quantize, train, configure, save, load, apply."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bbits as bb
from pyro_bbits.analysis import GatePosterior
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import HardConcreteGuide, Recipe, StraightThroughGuide, evaluate, fit
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.models import GatedModel, PlainModel


class SmallResNet(nn.Module):
    """A skip connection with a projection, an in-place sum and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        head: Tensor = self.head(F.relu(y).mean((2, 3)))
        return head


class GroupedConv1d(nn.Module):
    """A one-dimensional network with grouped and depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 8, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(8, 16, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, stride=2, padding=1, groups=16, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.body(x).amax(2))
        return head


def _stripes(samples: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Noisy waves of four frequencies, as signals or as images."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) % 4
    phase = 6.3 * torch.rand(samples, 1, generator=generator)
    waves = torch.sin((labels[:, None] + 1) * torch.linspace(0, 6.3, 16) + phase)[:, None]
    waves = waves if dimensions == 1 else waves[..., None, :].expand(-1, -1, 16, -1)
    return waves + 0.1 * torch.randn(waves.shape, generator=generator), labels


@pytest.mark.parametrize(
    ("net", "dimensions", "guide_type"),
    [(SmallResNet, 2, StraightThroughGuide), (GroupedConv1d, 1, HardConcreteGuide)],
    ids=["residual", "grouped 1-d"],
)
def test_a_strange_network_is_trained_configured_and_applied(
    net: type[nn.Module], dimensions: int, guide_type: type[AbstractGateGuide], tmp_path: Path
) -> None:
    inputs, labels = _stripes(256, dimensions)
    train = TensorLoader(inputs[:192], labels[:192], batch_size=32, shuffle=True)
    held_out = TensorLoader(inputs[192:], labels[192:], batch_size=64)
    network = bb.quantize(net(), inputs[:32])
    prior = bb.GatePrior(network, mu=0.03)
    model, guide = GatedModel(network, prior, num_data=192), guide_type(prior)
    history = fit(model, guide, train, held_out, epochs=40, recipe=Recipe(weight_lr=5e-3), seed=0, progress=False)

    configuration = GatePosterior.from_guide(guide, network).map_configuration()
    configuration.save(tmp_path / "bits.json")
    fresh = net()
    fresh.load_state_dict(network.net.state_dict())
    applied = bb.BitConfiguration.load(tmp_path / "bits.json").apply(fresh)

    network.eval()
    gated = network(inputs, gates=guide.hard_gates())
    torch.testing.assert_close(applied(inputs), gated, rtol=1e-4, atol=1e-5)
    assert history[-1].bops is not None
    assert history[-1].bops < 5  # from 100 % at the start: widths have moved
    accuracy = evaluate(PlainModel(applied, 1), held_out).accuracy
    assert accuracy == history[-1].validation_accuracy
    assert accuracy is not None
    assert accuracy > 90  # four classes, noise far below the signal
