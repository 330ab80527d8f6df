"""A snapshot is the network's structure, apart from the network, and survives JSON."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyro_bbits import BitConfiguration, NetworkCost, QuantizedNetwork
from pyro_bbits.insertion import StructureSnapshot

MakeNetwork = Callable[..., QuantizedNetwork]


@pytest.fixture
def snapshot(make_network: MakeNetwork) -> StructureSnapshot:
    return StructureSnapshot.of(make_network("depthwise"))


@pytest.mark.parametrize(
    ("kind", "bits"), [("chain", (2, 4, 8)), ("unprunable", (8,)), ("depthwise", (3, 6)), ("deep", (2, 4, 8, 16, 32))]
)
def test_json_keeps_everything(make_network: MakeNetwork, kind: str, bits: tuple[int, ...]) -> None:
    network = make_network(kind, bits)
    snapshot = StructureSnapshot.of(network)
    read = StructureSnapshot.from_json(snapshot.to_json(), snapshot.quantizers.log_range)
    for structure in (snapshot, read):
        assert structure.layout == network.layout
        assert structure.layers == tuple(network.layers)
        assert structure.quantizers.signed == network.quantizers.signed
        assert structure.quantizers.ladder == network.quantizers.ladder
        assert torch.equal(structure.quantizers.log_range, network.quantizers.log_range)


def test_snapshot_serves_cost_and_configuration_as_the_network_does(make_network: MakeNetwork) -> None:
    network = make_network("depthwise")
    snapshot, gates = StructureSnapshot.of(network), network.open_gates()
    gates.channels[0] = 0.0
    assert NetworkCost(snapshot)(gates).item() == NetworkCost(network)(gates).item()
    assert BitConfiguration.from_gates(snapshot, gates) == BitConfiguration.from_gates(network, gates)


def test_snapshot_is_independent_of_the_network(make_network: MakeNetwork) -> None:
    network = make_network("depthwise")
    snapshot = StructureSnapshot.of(network)
    before = snapshot.quantizers.ranges.clone()
    with torch.no_grad():
        network.quantizers.log_range.add_(2.0)
    network.quantizers.signed = tuple(not s for s in network.quantizers.signed)
    assert torch.equal(snapshot.quantizers.ranges, before)
    assert snapshot.quantizers.signed != network.quantizers.signed
    assert not snapshot.quantizers.log_range.requires_grad


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layout"), "layout"),
        (without("layers"), "layers"),
        (without("signed"), "signed"),
        (changed("layout", 3), "not subscriptable"),
        (changed("layers", [{"name": "conv"}]), "inputs"),
        (changed("layers", 3), "not iterable"),
        (changed("signed", None), "not iterable"),
        (lambda content: content["layout"]["groups"][0].pop("tensor"), "tensor"),
        (lambda content: content["layers"][0].update(colour="red"), "colour"),
    ],
)
def test_json_of_something_else_is_refused(
    snapshot: StructureSnapshot, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = json.loads(snapshot.to_json())
    change(content)
    with pytest.raises(ValueError, match=f"this does not describe a quantized network: .*{message}"):
        StructureSnapshot.from_json(json.dumps(content), snapshot.quantizers.log_range)


def test_a_ladder_that_does_not_nest_is_refused(snapshot: StructureSnapshot) -> None:
    content = json.loads(snapshot.to_json())
    content["layout"]["ladder"]["bits"] = [2, 3]
    with pytest.raises(ValueError, match="each bit width must be a multiple of the one before"):
        StructureSnapshot.from_json(json.dumps(content), snapshot.quantizers.log_range)


@pytest.mark.parametrize("text", ["", "not json", '{"layout": '])
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        StructureSnapshot.from_json(text, torch.zeros(1))


@pytest.mark.parametrize("log_range", [torch.zeros(6), torch.zeros(7, 1), torch.full((7,), float("nan"))])
def test_ranges_that_do_not_fit_are_refused(snapshot: StructureSnapshot, log_range: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="7 quantized tensors need as many finite ranges"):
        StructureSnapshot.from_json(snapshot.to_json(), log_range)
