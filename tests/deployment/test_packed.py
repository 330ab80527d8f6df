"""A packed file gives back the frozen network bit by bit, or one clear error."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pyro_bbits import freeze, quantize
from pyro_bbits.configuration import BitConfiguration
from pyro_bbits.deployment import float_bytes, frozen_layers, load_packed, remove_channels, save_packed
from pyro_bbits.models import LeNet5


def check_equal(case: Any, restored: nn.Module, frozen: nn.Module) -> None:
    ours, theirs = frozen.state_dict(), restored.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(case.run(restored), case.run(frozen))
    assert not any(module.training for module in restored.modules())
    for name, layer in frozen_layers(frozen).items():
        other = frozen_layers(restored)[name]
        assert repr(layer) == repr(other)
        for key in ("bits", "signed", "weight_tensor", "norm", "kept_norm", "kept_norm_reason"):
            assert getattr(layer, key) == getattr(other, key)


def test_a_packed_network_comes_back(case: Any, tmp_path: Path) -> None:
    """With removed channels and snapped biases."""
    frozen, _ = remove_channels(freeze(case.net, case.configuration(), snap_biases=True), case.example)
    path, net = tmp_path / "net.safetensors", case.fresh()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    size = save_packed(frozen, path)
    assert size.file == path.stat().st_size
    check_equal(case, load_packed(path, net), frozen)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "it is not changed"


@pytest.mark.parametrize("name", ["lenet5", "raw-read", "language"])
def test_a_network_on_the_meta_device_is_enough(name: str, get_case: Callable[..., Any], tmp_path: Path) -> None:
    case = get_case(name)
    frozen = freeze(case.net, case.configuration())
    save_packed(frozen, tmp_path / "net.safetensors")
    check_equal(case, load_packed(tmp_path / "net.safetensors", case.fresh().to("meta")), frozen)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 15.4), (4, 7.8)])
def test_files_are_as_small_as_their_bits(bits: int, ratio: float, tmp_path: Path) -> None:
    """As measured on plain tensors of the same layers; what is missing to 16 and 8 are biases and the header."""
    net = LeNet5().eval()
    network = quantize(net, torch.rand(2, 1, 28, 28), bits=(bits, 32))
    gates = network.open_gates()
    gates.tensors.zero_()
    frozen = freeze(net, BitConfiguration.from_gates(network, gates))
    size = save_packed(frozen, tmp_path / "net.safetensors")
    weights = sum(p.numel() for p in net.parameters())
    assert size.float32 == float_bytes(net) == float_bytes(frozen) == 4 * weights
    assert ratio < size.ratio < 32 / bits
    assert str(size).endswith(f"{size.ratio:.1f} times smaller than {4 * weights:,} in float32")


def test_statistics_of_norms_count_as_float_numbers() -> None:
    assert float_bytes(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))) == 4 * (12 + 4 + 4 * 4)


@pytest.fixture
def packed(get_case: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    case, path = get_case("mlp"), tmp_path / "net.safetensors"
    save_packed(freeze(case.net, case.configuration()), path)
    return case, path


def test_files_are_the_same_each_time(packed: tuple[Any, Path], tmp_path: Path) -> None:
    case, path = packed
    restored = load_packed(path, case.fresh())
    save_packed(restored, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_changed_bit_anywhere_is_noticed(packed: tuple[Any, Path]) -> None:
    case, path = packed
    content, net = path.read_bytes(), case.fresh()
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"net\.safetensors (is|cannot be read)"):
            load_packed(path, net)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_shortened_file_is_refused(packed: tuple[Any, Path], share: float) -> None:
    case, path = packed
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"net\.safetensors cannot be read as a packed network"):
        load_packed(path, case.fresh())


def test_other_files_are_refused(packed: tuple[Any, Path], tmp_path: Path) -> None:
    case, path = packed
    with pytest.raises(ValueError, match=r"ghost\.safetensors cannot be read as a packed network: No such file"):
        load_packed(tmp_path / "ghost.safetensors", case.fresh())
    save_file(case.net.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is no packed network: it has no 'pyro-bbits'"):
        load_packed(tmp_path / "weights.safetensors", case.fresh())
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entry = json.loads(file.metadata()["pyro-bbits"])
    entry["manifest"]["version"] = 2
    save_file(tensors, path, {"pyro-bbits": json.dumps(entry)})
    with pytest.raises(ValueError, match="is no packed network, or of another version: version: Input should be 1"):
        load_packed(path, case.fresh())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(6, 8)), "the network has nothing called "),
        (
            nn.ModuleDict({"hidden": nn.Sequential(*(nn.ReLU() for _ in range(6))), "head": nn.Linear(2, 2)}),
            r"a Linear called 'hidden\.0', the network a ReLU",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(packed: tuple[Any, Path], net: nn.Module, message: str) -> None:
    _, path = packed
    with pytest.raises(ValueError, match=f"does not fit this network: .*{message}"):
        load_packed(path, net)


def test_numbers_that_the_file_lacks_are_named(packed: tuple[Any, Path]) -> None:
    case, path = packed
    net = case.fresh()
    net.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="extra is only in the network; give a float network of the class and options"):
        load_packed(path, net)


def test_only_frozen_networks_are_packed(packed: tuple[Any, Path], tmp_path: Path) -> None:
    case, path = packed
    with pytest.raises(ValueError, match="no frozen layer in this network"):
        save_packed(case.net, tmp_path / "other.safetensors")
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_cannot_be_written_leaves_the_old_one(packed: tuple[Any, Path], tmp_path: Path) -> None:
    case, path = packed
    before = path.read_bytes()
    with pytest.raises(OSError, match="File exists"):
        save_packed(load_packed(path, case.fresh()), tmp_path / "net.safetensors" / "inside")
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
