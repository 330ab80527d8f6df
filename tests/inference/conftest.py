"""Networks small enough to enumerate, and data for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateValues, quantize
from pyro_bbits.models import GatedModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def make_model() -> Callable[..., GatedModel]:
    """Builds 3 - hidden - outputs perceptrons: tensors 0.weight, 2.weight, 2.input; layer 0 prunable."""

    def build(
        mu: float = 0.1,
        *,
        num_data: int = 24,
        hidden: int = 4,
        outputs: int = 2,
        bits: tuple[int, ...] = (2, 4, 8, 16, 32),
        likelihood: LikelihoodName | Likelihood = "categorical",
        **options: Any,
    ) -> GatedModel:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            net = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        network = quantize(net, torch.rand(16, 3, generator=torch.Generator().manual_seed(8)), bits=bits)
        return GatedModel(network, GatePrior(network, mu, **options), num_data, likelihood)

    return build


@pytest.fixture
def batches() -> list[Batch]:
    """24 points in 4 batches of unequal size, of two classes with a boundary in the middle."""
    x = torch.rand(24, 3, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > x[:, 1]).long()
    return list(zip(x.split([8, 8, 5, 3]), y.split([8, 8, 5, 3]), strict=True))


@pytest.fixture
def data(batches: list[Batch]) -> Batch:
    """All points in one batch."""
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.fixture
def draw() -> Callable[[nn.Module], GateValues]:
    """Draws gates from a guide."""

    def sample(guide: nn.Module) -> GateValues:
        trace: Any = poutine.trace(guide).get_trace()
        layout: Any = guide.prior.layout
        channels = trace.nodes[layout.channel_site]["value"] if layout.num_channels else torch.ones(0)
        rungs = [trace.nodes[site]["value"] for site in layout.residual_sites]
        return GateValues(channels, torch.stack(rungs, 1))

    return sample
