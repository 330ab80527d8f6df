"""Initial ranges of least squared error."""

import pytest
import torch
from torch import nn

from pyro_bbits import QuantizedNetwork, quantize
from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.ranges import best_range, set_mse_ranges
from pyro_bbits.quantizer import quantize_fixed


@pytest.fixture
def network() -> QuantizedNetwork:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return quantize(net, torch.rand(16, 3), bits=(2, 4, 8, 16))


def test_the_best_range_has_the_least_error() -> None:
    x = torch.randn(2000)
    x[0] = 30.0  # an outlier that the largest magnitude would follow

    def error(beta: float) -> float:
        return (quantize_fixed(x, torch.tensor(beta), 4, signed=True) - x).square().sum().item()

    found = best_range(x, 4, signed=True)
    candidates = [0.05 * k * 30.0 for k in range(1, 21)]
    assert error(found) == min(map(error, candidates)) and found < 30
    assert best_range(torch.zeros(5), 4, signed=False) == 1.0


def test_all_ranges_of_a_network_are_set(network: QuantizedNetwork) -> None:
    before = network.quantizers.ranges.detach().clone()
    weight = network.net.get_submodule("0").weight
    with torch.no_grad():
        weight[0, 0] = 50.0  # type: ignore[operator]
    set_mse_ranges(network, Inputs.of(torch.rand(16, 3)))
    after = network.quantizers.ranges
    assert after[0].item() == pytest.approx(best_range(weight, 4, signed=True))  # type: ignore[arg-type]
    assert (after[1:] <= 100 * before[1:]).all() and not torch.equal(after, before)


def test_quantize_takes_ranges_from_what_it_has_seen_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 3)
    with torch.no_grad():
        net.get_parameter("0.weight")[0, 0] = 9.0
    largest, best = quantize(net, x), quantize(net, x, ranges="mse")
    seen: dict[int, float] = {}

    def look(row: int, tensor: torch.Tensor) -> None:
        seen[row] = best_range(tensor, 4, signed=best.quantizers.signed[row])

    with torch.no_grad(), largest.watching(look):
        largest(x, gates=largest.open_gates())
    assert best.quantizers.ranges.tolist() == pytest.approx([seen[row] for row in sorted(seen)])
    assert (best.quantizers.ranges < largest.quantizers.ranges).any()
    norm = best.net.get_submodule("1")
    assert norm.training and norm.num_batches_tracked == 0 and not norm.running_mean.any()  # type: ignore[operator]
    with pytest.raises(ValueError, match="ranges must be one of max, mse; got 'min'"):
        quantize(net, x, ranges="min")  # type: ignore[arg-type]
