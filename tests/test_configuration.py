"""The bit configuration and its file: read off gates, saved, restored, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyro_bbits import BitConfiguration, GateValues, QuantizedNetwork, quantize
from pyro_bbits.insertion.structure import StructureSnapshot


def float_net(hidden: int = 4, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, hidden, bias), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 3)).eval()


@pytest.fixture
def network() -> QuantizedNetwork:
    return quantize(float_net(), torch.randn(6, 5), bits=(2, 4, 8))


@pytest.fixture
def gates(network: QuantizedNetwork) -> GateValues:
    """`0.weight` at 4 bits without channels 1 and 2, `3.weight` at 8 bits, `3.input` at 2."""
    return GateValues(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))


@pytest.fixture
def configuration(network: QuantizedNetwork, gates: GateValues) -> BitConfiguration:
    return BitConfiguration.from_gates(network, gates)


def test_the_configuration_says_what_the_gates_say(network: QuantizedNetwork, configuration: BitConfiguration) -> None:
    assert configuration.ladder == (2, 4, 8)
    assert configuration.bits() == {"0.weight": 4, "3.weight": 8, "3.input": 2}
    assert configuration.kept() == {"0": 2, "3": 3}
    assert [tensor.kind for tensor in configuration.tensors] == ["weight", "weight", "activation"]
    assert [tensor.signed for tensor in configuration.tensors] == [True, True, False]
    assert [tensor.beta for tensor in configuration.tensors] == network.quantizers.ranges.tolist()
    first, last = configuration.layers
    assert (first.name, first.kind, first.weight, first.input, first.norm) == ("0", "Linear", "0.weight", None, "1")
    assert (last.name, last.kind, last.weight, last.input, last.norm) == ("3", "Linear", "3.weight", "3.input", None)
    assert (first.channels, first.removed, first.macs) == (4, (1, 2), 20)
    assert (last.channels, last.removed, last.macs) == (3, (), 12)
    assert (first.bops, last.bops) == (8 * 4 * 10, 2 * 8 * 6)
    assert configuration.relative_bops == pytest.approx(100 * (320 + 96) / (1024 * 32))


def test_a_weight_without_channels_has_0_bits(network: QuantizedNetwork, gates: GateValues) -> None:
    gates.channels.zero_()
    configuration = BitConfiguration.from_gates(network, gates)
    assert configuration.bits()["0.weight"] == 0
    assert configuration.kept()["0"] == 0
    assert [layer.bops for layer in configuration.layers] == [0.0, 0.0]
    fixed: Any = configuration.apply(float_net())
    assert not fixed[1].weight.any() and not fixed[1].bias.any()


def test_files_are_read_back_equal(configuration: BitConfiguration, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bits.json"
    configuration.save(path)
    assert BitConfiguration.load(path) == configuration
    assert BitConfiguration.load(str(path)) == configuration
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["schema"] == "pyro-bbits/bit-configuration" and content["version"] == 1
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert list(path.parent.iterdir()) == [path]


def test_gates_come_back_from_the_configuration(
    network: QuantizedNetwork, gates: GateValues, configuration: BitConfiguration
) -> None:
    for structure in (network, StructureSnapshot.of(network)):
        restored = configuration.gates(structure)
        assert torch.equal(restored.channels, gates.channels) and torch.equal(restored.tensors, gates.tensors)


def test_finer_gates_without_their_coarser_one_are_not_kept(network: QuantizedNetwork) -> None:
    gates = network.open_gates()
    gates.tensors[:] = torch.tensor([0.0, 1.0])
    configuration = BitConfiguration.from_gates(network, gates)
    assert set(configuration.bits().values()) == {2}
    assert not configuration.gates(network).tensors.any()


def test_a_snapshot_has_the_configuration_of_its_network(
    network: QuantizedNetwork, gates: GateValues, configuration: BitConfiguration
) -> None:
    assert BitConfiguration.from_gates(StructureSnapshot.of(network), gates) == configuration


@pytest.mark.parametrize("value", [0.5, -1.0, torch.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_only_gates_of_0_and_1_make_a_configuration(network: QuantizedNetwork, value: float, which: int) -> None:
    gates = network.open_gates()
    gates[which].flatten()[0] = value
    with pytest.raises(ValueError, match=r"needs gates of 0 and 1; decide them first, e\.g\. guide\.hard_gates\(\)"):
        BitConfiguration.from_gates(network, gates)


def test_gates_with_a_gradient_are_taken_at_their_values(
    network: QuantizedNetwork, gates: GateValues, configuration: BitConfiguration
) -> None:
    learned = GateValues(*(g.clone().requires_grad_() for g in gates))
    assert BitConfiguration.from_gates(network, learned) == configuration


def edit(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one entry of the file."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop(content: dict[str, Any]) -> None:
    del content["ladder"]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "schema": (edit("schema", value="other"), "schema: Input should be 'pyro-bbits/bit-configuration'"),
    "version": (edit("version", value=2), r"\(version 1\): version: Input should be 1"),
    "extra": (edit("extra", value=1), "extra: Extra inputs are not permitted"),
    "extra-tensor-key": (edit("tensors", 0, "scale", value=1), r"tensors\.0\.scale: Extra inputs are not permitted"),
    "missing": (drop, "ladder: Field required"),
    "nan-beta": (edit("tensors", 0, "beta", value=float("nan")), r"tensors\.0\.beta: Input should be"),
    "zero-beta": (edit("tensors", 1, "beta", value=0.0), r"tensors\.1\.beta: Input should be greater than 0"),
    "text-bits": (edit("tensors", 0, "bits", value="8"), r"tensors\.0\.bits: Input should be a valid integer"),
    "odd-bits": (edit("tensors", 0, "bits", value=3), r"3 bits of '0\.weight' are no width of the ladder \(2, 4, 8\)"),
    "no-activation": (edit("tensors", 2, "bits", value=0), r"activation '3\.input' has 0 bits"),
    "kind": (edit("tensors", 0, "kind", value="bias"), r"tensors\.0\.kind: Input should be 'weight' or 'activation'"),
    "same-name": (edit("tensors", 0, "name", value="3.weight"), "tensor names must be unique"),
    "dangling": (
        edit("layers", 1, "input", value="ghost"),
        r"layer '3' names tensors that are not listed: \['ghost'\]",
    ),
    "not-removable": (edit("layers", 0, "removed", value=[4]), "removed channels of '0' must ascend and lie below 4"),
    "unsorted": (edit("layers", 0, "removed", value=[2, 1]), "removed channels of '0' must ascend"),
    "twice": (edit("layers", 0, "removed", value=[1, 1]), "removed channels of '0' must ascend"),
    "negative": (edit("layers", 0, "removed", value=[-1]), r"layers\.0\.removed\.0: Input should be greater than"),
    "ladder": (edit("ladder", value=[2, 3]), "each bit width must be a multiple of the one before"),
    "bops": (edit("relative_bops", value=-1.0), "relative_bops: Input should be greater than or equal to 0"),
    "other-bops": (edit("relative_bops", value=0.5), r"relative_bops is 0\.5, the layers make it "),
    "other-layer-bops": (edit("layers", 0, "bops", value=1.0), r"bops of layer '0' are 1, its widths make them"),
    "other-bits": (edit("tensors", 1, "bits", value=4), r"bops of layer '3' .*with_bits changes widths"),
    "all-gone": (edit("tensors", 0, "bits", value=0), r"'0\.weight' has 0 bits, .* all its channels .* some are not"),
    "missing-layer": (lambda content: content["layers"].pop(), r"no layer uses '3\.input'; a layer is missing"),
    "layer-twice": (lambda content: content["layers"].append(content["layers"][0]), "layer names must be unique"),
    "swapped": (
        edit("layers", 1, "weight", value="3.input"),
        r"layer '3' uses the activation '3\.input' as its weight",
    ),
    "no-weight": (edit("layers", 1, "weight", value=None), r"layer '3' has no weight"),
    "kept": (edit("layers", 0, "kept_macs", value=1.5), "kept_macs: Input should be less than or equal to 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_were_changed_are_refused(configuration: BitConfiguration, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    path = tmp_path / "bits.json"
    configuration.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bits\.json is not a valid bit configuration .*{message}"):
        BitConfiguration.load(path)


def test_other_widths_make_other_bops(network: QuantizedNetwork, configuration: BitConfiguration) -> None:
    bits = {"0.weight": 2, "3.input": 8}
    changed = configuration.with_bits(bits)
    assert changed.bits() == configuration.bits() | bits
    assert changed == BitConfiguration.from_gates(network, changed.gates(network))
    with pytest.raises(ValueError, match=r"no tensor 'ghost'; there are 0\.weight, 3\.weight"):
        configuration.with_bits({"ghost": 2})
    with pytest.raises(ValueError, match=r"5 bits of '0\.weight' are no width of the ladder"):
        configuration.with_bits({"0.weight": 5})


@pytest.mark.parametrize("text", ["", "{", '{"schema": "pyro-bbits/bit', "[]", "null"])
def test_files_that_are_no_json_object_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bits.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is not a valid bit configuration"):
        BitConfiguration.load(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ghost\.json cannot be read: .*No such file"):
        BitConfiguration.load(tmp_path / "ghost.json")
    with pytest.raises(ValueError, match=r"cannot be read: .*directory"):
        BitConfiguration.load(tmp_path)
    path = tmp_path / "bits.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot be read: .*can't decode"):
        BitConfiguration.load(path)


def test_saving_to_an_impossible_place_is_an_os_error(configuration: BitConfiguration, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        configuration.save(tmp_path / "file" / "bits.json")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "quantized tensors .* differ: 2.input, 2.weight"),
        (float_net(hidden=6), "layers of network and configuration differ: 0 with 4 channels, 0 with 6 channels"),
    ],
)
def test_gates_of_another_network_are_refused(configuration: BitConfiguration, other: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.gates(quantize(other, torch.randn(6, 5)))


def test_gates_of_another_ladder_are_refused(configuration: BitConfiguration, network: QuantizedNetwork) -> None:
    with pytest.raises(ValueError, match=r"ladder is \(2, 4, 16\), the configuration's \(2, 4, 8\)"):
        configuration.gates(quantize(float_net(), torch.randn(6, 5), bits=(2, 4, 16)))


def test_channels_that_the_network_keeps_cannot_be_closed(
    configuration: BitConfiguration, network: QuantizedNetwork
) -> None:
    layers = (configuration.layers[0], configuration.layers[1].model_copy(update={"removed": (0,)}))
    with pytest.raises(ValueError, match="removes channels of '3', which this network keeps: it feeds the network's"):
        configuration.model_copy(update={"layers": layers}).gates(network)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), "a Linear called '3', the network nothing of that name"),
        (nn.Sequential(nn.Conv1d(5, 4, 1)), "a Linear called '0', the network Conv1d; apply it to a float network"),
        (float_net(hidden=6), "layer '0' has 6 output channels, the configuration 4"),
        (
            nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 3)),
            "a batch norm called '1', the network has none",
        ),
    ],
)
def test_float_networks_of_another_form_are_refused(
    configuration: BitConfiguration, other: nn.Module, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.apply(other)


def test_only_a_float_network_can_be_configured(configuration: BitConfiguration, network: QuantizedNetwork) -> None:
    with pytest.raises(ValueError, match="a Linear called '0', the network QuantizedLinear; apply it to a float"):
        configuration.apply(network.net)
    fixed = configuration.apply(float_net())
    with pytest.raises(ValueError, match="a Linear called '3', the network FixedLinear"):
        configuration.apply(fixed)


def test_configurations_cannot_be_changed(configuration: BitConfiguration) -> None:
    with pytest.raises(ValueError, match="frozen"):
        configuration.relative_bops = 0.0  # type: ignore[misc]
