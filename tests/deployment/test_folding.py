"""Folding a batch norm changes nothing, and is not done where it would."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, freeze, quantize
from pyro_bbits.deployment import kept_norms
from pyro_bbits.deployment.folding import READ, fold_factors, unfoldable
from pyro_bbits.insertion.inputs import Inputs


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_factor_and_shift_repeat_the_norm(affine: bool, bias: bool) -> None:
    layer, norm = nn.Linear(3, 5, bias).double(), nn.BatchNorm1d(5, affine=affine).double().eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    factor, shift = fold_factors(norm, layer.bias)
    x = torch.randn(7, 3).double()
    torch.testing.assert_close(F.linear(x, layer.weight) * factor + shift, norm(layer(x)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.norm(self.layer(x))))


class ReadTwice(Chain):
    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.head(self.norm(y) + y)


class ReadsWeight(Chain):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + F.linear(x, self.layer.weight).mean()


class CalledTwice(Chain):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.layer(x)) + self.layer(x).detach())


class Branches(Chain):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.layer(x))
        return self.head(y if float(x.sum()) > 0 else -y)


class NoStatistics(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)


class Looked(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(3, 4)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Chain(), None),
        (ReadTwice(), "something else reads its layer as well"),
        (ReadsWeight(), "the network's code reads its numbers, or its layer's, beside calling them"),
        (CalledTwice(), "its layer is called 2 times and it 1 times"),
        (Branches(), "the network's code cannot be followed symbolically ("),
        (NoStatistics(), "it has no running statistics, so it depends on the batch"),
        (Looked(), "an embedding has no bias to take its shift"),
    ],
)
def test_only_a_norm_that_alone_reads_its_layer_is_folded(net: nn.Module, reason: str | None) -> None:
    found = unfoldable(net, {"layer": "norm"})
    assert found.keys() == ({"layer"} if reason else set())
    assert reason is None or found["layer"].startswith(reason)
    assert net.training, "the network is left as it is"
    assert unfoldable(net, {}) == {}


class BranchesTwice(Branches):
    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        z = self.norm(y).view(y.shape)  # asking for a shape is no reading
        return self.head(z + y if float(x.sum()) > 0 else z - y)


class BranchesOnLayer(Branches):
    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.head(self.norm(y) if y.max().item() > 0 else -self.norm(y))


class BranchesOnWeight(Branches):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.norm.weight.sum()


class BranchesOut(Branches):
    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.head(self.norm(y)) if float(x.sum()) > 0 else None, {"raw": y}


class BranchesAgain(Branches):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + super().forward(x + 1)


@pytest.mark.parametrize(
    ("net", "is_folded"),
    [
        (Branches(), True),
        (BranchesTwice(), False),
        (BranchesOnLayer(), False),
        (BranchesOnWeight(), False),
        (BranchesOut(), False),
        (BranchesAgain(), False),
    ],
)
def test_code_that_depends_on_values_is_watched_on_example_inputs(net: nn.Module, is_folded: bool) -> None:
    inputs = Inputs.of(torch.rand(5, 3))
    assert unfoldable(net, {"layer": "norm"}, inputs) == ({} if is_folded else {"layer": READ})


def test_example_inputs_let_norms_of_such_networks_be_folded() -> None:
    net, x = Branches().eval(), torch.rand(5, 3)
    network = quantize(net, x, bits=(2, 4, 8))
    configuration = BitConfiguration.from_gates(network, network.open_gates())
    assert kept_norms(freeze(net, configuration)).keys() == {"norm"}
    frozen = freeze(net, configuration, example_inputs=x)
    assert kept_norms(frozen) == {}
    torch.testing.assert_close(frozen(x), configuration.apply(net)(x))
