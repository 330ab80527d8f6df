"""Weights from files: torchvision's names fit, and what does not fit is said before anything is changed."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyro_bbits.models import MLP, MobileNetV2, ResNet18, load_pretrained, read_state_dict

HERE = Path(__file__).parent
State = dict[str, Tensor]


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's published weights, in their order."""
    lines = [line.split() for line in (HERE / f"torchvision_{name}.txt").read_text(encoding="utf-8").splitlines()]
    return {entry: tuple(int(n) for n in shape.split("x") if n != "scalar") for entry, shape in lines}


@pytest.mark.parametrize(("build", "name", "entries"), [(ResNet18, "resnet18", 122), (MobileNetV2, "mobilenetv2", 314)])
def test_names_and_shapes_are_those_of_the_published_weights(
    build: Callable[[], nn.Module], name: str, entries: int
) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    assert {entry: tuple(tensor.shape) for entry, tensor in state.items()} == published(name)
    assert list(state) == list(published(name)) and len(state) == entries


def test_small_stems_need_no_other_names() -> None:
    with torch.device("meta"):
        mobile, residual = MobileNetV2(stem="small").state_dict(), ResNet18(stem="small").state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in mobile.items()} == published("mobilenetv2")
    assert {n: tuple(t.shape) for n, t in residual.items()} == published("resnet18") | {"conv1.weight": (64, 3, 3, 3)}


def trained_resnet() -> ResNet18:
    """A small network whose every entry differs from a fresh one's."""
    torch.manual_seed(7)
    net = ResNet18(width=2, num_classes=5)
    net(torch.randn(8, 3, 32, 32))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def nested(state: State, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)


def from_data_parallel(state: State, path: Path) -> None:
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)


def from_compile(state: State, path: Path) -> None:
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, path)


def legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def without_counters(state: State, path: Path) -> None:
    torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)


SAVED: list[Callable[[State, Path], Any]] = [
    torch.save,
    save_file,
    nested,
    from_data_parallel,
    from_compile,
    legacy,
    without_counters,
]


@pytest.mark.parametrize("save", SAVED, ids=lambda save: save.__name__)
def test_saved_weights_come_back(save: Callable[[State, Path], Any], tmp_path: Path) -> None:
    net = trained_resnet()
    save(dict(net.state_dict()), tmp_path / "weights")
    fresh = ResNet18(width=2, num_classes=5)
    load_pretrained(fresh, tmp_path / "weights")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    counters = {n for n in net.state_dict() if n.endswith("num_batches_tracked")} if save is without_counters else set()
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in fresh.state_dict().items() if n not in counters)


def test_a_prefix_is_taken_off_where_all_names_have_it(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2), "module.weight": torch.ones(1)}
    for save in (from_data_parallel, torch.save):
        save(state, tmp_path / "weights.pth")
        assert list(read_state_dict(tmp_path / "weights.pth")) == list(state)


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    net = MLP(3, 2, widths=(4,))
    torch.save({name: tensor.half() for name, tensor in net.state_dict().items()}, tmp_path / "half.pth")
    fresh = MLP(3, 2, widths=(4,))
    load_pretrained(fresh, tmp_path / "half.pth")
    assert fresh.head.weight.dtype == torch.float32
    assert torch.equal(fresh.head.weight, net.head.weight.half().float())


@pytest.mark.parametrize("build", [lambda n: ResNet18(width=2, num_classes=n), lambda n: MobileNetV2(3, n, width=0.1)])
def test_another_number_of_classes_keeps_the_body_if_asked(build: Callable[[int], nn.Module], tmp_path: Path) -> None:
    source, net = build(7), build(4)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    head = "fc" if isinstance(net, ResNet18) else "classifier.1"
    before = copy.deepcopy(net.state_dict())
    advice = rf"its head '{head}' has 7 outputs, that of the network 4; .*head='reset'"
    with pytest.raises(ValueError, match=rf"weights\.pth does not fit {type(net).__name__}: {advice}"):
        load_pretrained(net, tmp_path / "weights.pth")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "nothing was changed"
    load_pretrained(net, tmp_path / "weights.pth", head="reset")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith(f"{head}.") else source.state_dict())[name])


def test_a_reset_head_need_not_be_in_the_file_and_is_reset_when_it_fits(tmp_path: Path) -> None:
    source, net = MLP(3, 2, widths=(4,)), MLP(3, 2, widths=(4,))
    before = net.head.weight.clone()
    for state in (source.state_dict(), source.hidden.state_dict(prefix="hidden.")):
        torch.save(state, tmp_path / "weights.pth")
        load_pretrained(net, tmp_path / "weights.pth", head="reset")
        assert torch.equal(net.head.weight, before)
        assert torch.equal(net.get_parameter("hidden.0.weight"), source.get_parameter("hidden.0.weight"))


def changed(state: State, name: str, value: Tensor | None) -> State:
    others = {key: tensor for key, tensor in state.items() if key != name}
    return others if value is None else others | {name: value}


NET = MLP(3, 2, widths=(4, 4, 4), batch_norm=True)
STATE = NET.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(STATE, "hidden.0.weight", None), r"does not fit MLP: it lacks hidden\.0\.weight\.$"),
        (changed(STATE, "extra", torch.ones(1)), r"it has extra, which the network does not\.$"),
        (changed(STATE, "hidden.1.running_var", None), r"it lacks hidden\.1\.running_var\.$"),
        ({"w": torch.ones(1)}, r"it lacks hidden\.0\.weight, hidden\.1\.weight, hidden\.1\.bias and 14 more; it has"),
        (
            changed(STATE, "hidden.0.weight", torch.ones(4, 5)),
            r"hidden\.0\.weight is \(4, 5\), in the network \(4, 3\)",
        ),
        (changed(STATE, "head.weight", torch.ones(2, 9)), r"head\.weight is \(2, 9\), in the network \(2, 4\)\.$"),
        (changed(STATE, "head.bias", torch.ones(3)), r"head\.bias is \(3,\), in the network \(2,\)\.$"),
        (changed(STATE, "head.bias", torch.tensor([1, torch.nan])), r"holds NaN or infinite weights: head\.bias\.$"),
        (
            changed(STATE, "hidden.1.running_var", torch.full((4,), torch.inf)),
            r"infinite weights: hidden\.1\.run",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(state: State, message: str, tmp_path: Path) -> None:
    net = copy.deepcopy(NET)
    for save in (torch.save, save_file):
        save(state, tmp_path / "weights")
        with pytest.raises(ValueError, match=message) as caught:
            load_pretrained(net, tmp_path / "weights")
        assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, STATE[name]) for name, tensor in net.state_dict().items())


class Harmful:
    """What a pickle may do to its reader."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    with (tmp_path / "harmful.pkl").open("wb") as file:
        pickle.dump({"a": Harmful(victim)}, file)
    torch.save({"a": Harmful(victim)}, tmp_path / "harmful.pth")
    for name in ("harmful.pkl", "harmful.pth"):
        with pytest.raises(ValueError, match=rf"the weights .*{name} cannot be read: they are neither safetensors nor"):
            read_state_dict(tmp_path / name)
    assert not victim.exists()
    pickle.loads((tmp_path / "harmful.pkl").read_bytes())
    assert victim.exists(), "the same file does harm when it is unpickled"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no more of it", b"hello world, what is this", bytes(100)])
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"the weights .*weights\.pth cannot be read"):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_files_that_were_cut_off_are_refused(save: Callable[[State, Path], Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"the weights .*weights cannot be read"):
        read_state_dict(tmp_path / "weights")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the weights .*none\.pth cannot be read: .*No such file"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"the weights .* cannot be read"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "must be tensors by name, a state dict; got list"),
        ({}, "must be tensors by name, a state dict; got dict"),
        ({"a": 3}, "'a' holds int. Save net.state_dict"),
        ({1: torch.ones(1)}, "1 holds Tensor"),
    ],
)
def test_contents_of_another_kind_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "weights.pth")


def test_an_unknown_wish_for_the_head_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="head must be 'keep' or 'reset'; got 'drop'"):
        load_pretrained(NET, tmp_path / "weights.pth", head="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Conv2d has no linear layer"):
        load_pretrained(nn.Conv2d(1, 1, 1), tmp_path / "weights.pth", head="reset")
