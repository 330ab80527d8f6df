"""The structure of a network survives as JSON and does not follow the network afterwards."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import quantize
from pyro_bbits.insertion.structure import StructureSnapshot

Case = tuple[nn.Module, Mapping[str, Tensor]]


def test_a_snapshot_is_read_back_equal(case: Case) -> None:
    net, example = case
    network = quantize(net, example)
    snapshot = StructureSnapshot.of(network)
    restored = StructureSnapshot.from_json(snapshot.to_json(), network.quantizers.log_range.detach())
    for structure in (snapshot, restored):
        assert structure.layout == network.layout
        assert structure.layers == network.layers
        assert structure.quantizers.signed == network.quantizers.signed
        assert torch.equal(structure.quantizers.log_range, network.quantizers.log_range)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_a_snapshot_does_not_follow_its_network() -> None:
    network = quantize(small(), torch.rand(6, 4))
    snapshot = StructureSnapshot.of(network)
    before = network.quantizers.ranges.detach().clone()
    with torch.no_grad():
        network.quantizers.log_range.add_(1.0)
    assert torch.equal(snapshot.quantizers.ranges, before)
    assert not any(parameter.requires_grad for parameter in snapshot.quantizers.parameters())


@pytest.mark.parametrize("lost", ["layout", "layers", "signed"])
def test_incomplete_descriptions_are_refused(lost: str) -> None:
    network = quantize(small(), torch.rand(6, 4))
    content: dict[str, Any] = json.loads(StructureSnapshot.of(network).to_json())
    del content[lost]
    with pytest.raises(ValueError, match="does not describe a quantized network"):
        StructureSnapshot.from_json(json.dumps(content), network.quantizers.log_range.detach())


@pytest.mark.parametrize("log_range", [torch.zeros(2), torch.zeros(3, 1), torch.tensor([0.0, 0.0, torch.inf])])
def test_ranges_that_do_not_fit_are_refused(log_range: Tensor) -> None:
    text = StructureSnapshot.of(quantize(small(), torch.rand(6, 4))).to_json()
    with pytest.raises(ValueError, match="3 quantized tensors need as many finite ranges"):
        StructureSnapshot.from_json(text, log_range)
