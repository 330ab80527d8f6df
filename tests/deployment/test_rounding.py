"""Channel counts become multiples by opening the most probable closed gates, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyro_bbits import BitConfiguration, GateValues, freeze
from pyro_bbits.deployment import remove_channels, round_channels


def closed_gates(case: Any, keep: float) -> tuple[GateValues, torch.Tensor]:
    probabilities = torch.rand(case.network.layout.num_channels)
    gates = case.network.open_gates()
    return gates._replace(channels=(probabilities > 1 - keep).float()), probabilities


@pytest.mark.parametrize("name", ["residual", "concat", "difference", "resnet20", "vit"])
def test_only_closed_gates_are_opened_and_only_once(name: str, get_case: Callable[..., Any]) -> None:
    case = get_case(name)
    gates, probabilities = closed_gates(case, 0.5)
    rounded = round_channels(case.network, gates, probabilities, 4)
    assert torch.equal(rounded.tensors, gates.tensors)
    assert (rounded.channels >= gates.channels).all()
    again = round_channels(case.network, rounded, probabilities, 4)
    assert torch.equal(again.channels, rounded.channels)
    assert torch.equal(round_channels(case.network, gates, probabilities, 1).channels, gates.channels)


@pytest.mark.parametrize("multiple", [2, 8])
@pytest.mark.parametrize("name", ["lenet5", "resnet18"])
def test_what_is_left_after_removal_is_a_multiple(name: str, multiple: int, get_case: Callable[..., Any]) -> None:
    case = get_case(name)
    gates, probabilities = closed_gates(case, 0.3)
    rounded = round_channels(case.network, gates, probabilities, multiple)
    _, report = remove_channels(freeze(case.net, BitConfiguration.from_gates(case.network, rounded)), case.example)
    for name, part in case.network.layout.slices.items():
        count, left = report.channels[name]
        is_empty = left == 1 and not rounded.channels[part].any()
        assert left % multiple == 0 or left == count or is_empty, name
    assert any(left < count for count, left in report.channels.values())


def test_the_most_probable_channels_come_back(get_case: Callable[..., Any]) -> None:
    case = get_case("lenet5")
    gates, probabilities = closed_gates(case, 0.3)
    rounded = round_channels(case.network, gates, probabilities, 16)
    for part in case.network.layout.slices.values():
        kept, p = rounded.channels[part] > 0, probabilities[part]
        assert p[kept].min() > p[~kept].max(), "as if the threshold were lower"
        assert int(kept.sum()) == -(-int(gates.channels[part].sum()) // 16) * 16


def test_a_layer_without_channels_gets_none(get_case: Callable[..., Any]) -> None:
    case = get_case("lenet5")
    gates, probabilities = closed_gates(case, 0.0)
    assert not round_channels(case.network, gates, probabilities, 8).channels.any()
    with pytest.raises(ValueError, match="multiple_of must be at least 1; got 0"):
        round_channels(case.network, gates, probabilities, 0)
