"""Running statistics for decided gates are those of the data under these gates, and nothing else changes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateValues, quantize
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, Recipe, evaluate, fit, recalibrate_norms, recorder
from pyro_bbits.inference.checkpoint import Checkpoints
from pyro_bbits.inference.norms import RecentBatches, norm_statistics
from pyro_bbits.models import GatedModel, PlainModel

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def data() -> list[Batch]:
    """200 points of two classes, in batches of 32, 32, ..., 8."""
    x = torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > x[:, 1]).long()
    return list(zip(x.split(32), y.split(32), strict=True))


def gated(data: list[Batch], **norm: Any) -> GatedModel:
    """Channels of layer 0 have gates; the batch norm behind layer 2 sees how many of them are open."""
    torch.manual_seed(3)
    layers = [nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32, **norm), nn.ReLU(), nn.Linear(32, 2)]
    network = quantize(nn.Sequential(*layers), data[0][0])
    prior = GatePrior(network, 1e-9)
    return GatedModel(network, prior, 200)


def half_closed(model: GatedModel) -> GateValues:
    gates = model.net.open_gates()
    gates.channels[:16] = 0
    gates.tensors[:, 3:] = 0
    return gates


def by_hand(model: GatedModel, batches: list[Batch], gates: GateValues) -> tuple[Tensor, Tensor]:
    """What comes into the batch norm, averaged over the batches by their sizes."""
    norm, seen = model.net.net[3], []  # type: ignore[index]
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in batches:
            model.eval().predict(x, gates)
    handle.remove()
    sizes = torch.tensor([float(len(s)) for s in seen])
    mean = (torch.stack([s.mean(0) for s in seen]) * sizes[:, None]).sum(0) / sizes.sum()
    var = (torch.stack([s.var(0) for s in seen]) * sizes[:, None]).sum(0) / sizes.sum()
    return mean, var


@pytest.mark.filterwarnings("ignore:.* more than 8 bits wide")
@pytest.mark.parametrize(("precision", "rows"), [("float32", 64), ("bf16", 32)])
@pytest.mark.parametrize("streamed", [False, True])
def test_statistics_take_no_more_rows_at_a_time_than_a_step_has_memory_for(
    data: list[Batch], precision: Any, rows: int, streamed: bool
) -> None:
    """A pass without gradients takes two batches, or one where it computes in float32 and the step in half as wide."""
    model, seen = gated(data), []
    model.net.net[3].register_forward_pre_hook(  # type: ignore[index]
        lambda _, args: None if torch.is_grad_enabled() else seen.append(len(args[0]))
    )
    loader = TensorLoader(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]), 32)
    fit(model, undecided(model), data if streamed else loader, epochs=1, precision=precision, progress=False)
    assert max(seen) == rows


@pytest.mark.parametrize("momentum", [0.1, None, 0.7])
def test_statistics_are_those_of_the_data_under_the_gates(data: list[Batch], momentum: float | None) -> None:
    model = gated(data, momentum=momentum)
    gates = half_closed(model)
    norm: Any = model.net.net[3]  # type: ignore[index]
    norm.running_mean.fill_(77.0)
    recalibrate_norms(model, data, gates)
    mean, var = by_hand(model, data, gates)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-5, atol=1e-6)
    first = norm_statistics(model)
    recalibrate_norms(model, data, gates, batches=2)
    mean, _ = by_hand(model, data[:2], gates)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(first["net.net.3.running_mean"], norm.running_mean)


def test_nothing_but_the_statistics_changes(data: list[Batch]) -> None:
    model = gated(data)
    norm: Any = model.net.net[3]  # type: ignore[index]
    model.train()
    norm.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    recalibrate_norms(model, data, half_closed(model))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"net.net.3.running_mean", "net.net.3.running_var"}
    assert norm.momentum == 0.1 and not norm.training and model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not norm._forward_pre_hooks


def test_a_norm_used_twice_averages_both_uses(data: list[Batch]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            y: Tensor = self.norm(3 * x)
            return y

    model = PlainModel(Twice(), 200)
    recalibrate_norms(model, data)
    every = torch.cat([x for x, _ in data])
    torch.testing.assert_close(model.net.norm.running_mean, 2 * every.mean(0))  # type: ignore[union-attr]


def test_a_batch_of_one_row_has_no_say(data: list[Batch]) -> None:
    model, other = gated(data), gated(data)
    gates = half_closed(model)
    recalibrate_norms(model, [*data, (data[0][0][:1], data[0][1][:1])], gates)
    recalibrate_norms(other, data, gates)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_without_data_there_is_nothing_to_estimate_on(data: list[Batch]) -> None:
    model = gated(data)
    before = norm_statistics(model)
    with pytest.raises(ValueError, match="the loader gives no batch"):
        recalibrate_norms(model, [])
    assert all(torch.equal(value, before[name]) for name, value in norm_statistics(model).items())
    recalibrate_norms(gated(data, track_running_stats=False), [])  # nothing to do


def test_the_last_samples_are_held() -> None:
    recent = RecentBatches(10)
    for size in (8, 8, 5, 4, 3):
        recent.add(size, torch.zeros(size))
    assert [x for x, _ in recent] == [5, 4, 3]
    assert len(recent) == 3


# --- in training ------------------------------------------------------------------------------------------------------


def undecided(model: GatedModel) -> HardConcreteGuide:
    """Channel gates that are open with probability 0.6, and stay so: sampled half open, decided open."""
    guide = HardConcreteGuide(model.prior, init={2: -1.2})
    with torch.no_grad():
        guide.channel_logits.fill_(-1.2)
    assert 0.5 < guide.probabilities().channels[0] < 0.66
    return guide


def trained(data: list[Batch], **options: Any) -> tuple[GatedModel, HardConcreteGuide, Any]:
    model = gated(data)
    guide = undecided(model)
    recipe = Recipe(weight_lr=0.02, gate_lr=1e-9)
    history = fit(model, guide, data, data, epochs=12, recipe=recipe, seed=0, progress=False, **options)
    return model, guide, history


@pytest.mark.filterwarnings("ignore:channel gates are undecided:UserWarning")
def test_decided_gates_are_evaluated_with_their_own_statistics(data: list[Batch]) -> None:
    """With those of the training the same weights are worth far less."""
    own: list[dict[str, Tensor]] = []
    model = gated(data)
    guide, recipe = undecided(model), Recipe(weight_lr=0.02, gate_lr=1e-9)
    history = fit(
        model, guide, data, data, epochs=12, recipe=recipe, seed=0, progress=False,
        on_epoch=lambda _: own.append(norm_statistics(model)),
    )  # fmt: skip
    assert evaluate(model, data, guide.hard_gates()).nll == history[-1].validation_nll, "they stay in the network"
    model.load_state_dict(model.state_dict() | own[-1])
    bad = evaluate(model, data, guide.hard_gates())
    assert bad.nll > 2 * (history[-1].validation_nll or 0.0) and (history[-1].validation_accuracy or 0.0) > 95


@pytest.mark.filterwarnings("ignore:channel gates are undecided:UserWarning")
def test_evaluation_does_not_disturb_the_training(data: list[Batch]) -> None:
    """The same weights with and without a held-out set."""
    model = gated(data)
    guide = undecided(model)
    recipe = Recipe(weight_lr=0.02, gate_lr=1e-9)
    fit(model, guide, data, epochs=12, recipe=recipe, seed=0, progress=False)
    other, _, _ = trained(data)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore:channel gates are undecided:UserWarning")
@pytest.mark.parametrize(("held_out", "every", "expected"), [(False, None, 1), (False, 3, 3), (True, None, 7)])
def test_statistics_are_estimated_where_somebody_reads_them(
    data: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held_out: bool,
    every: int | None,
    expected: int,
) -> None:
    """For an evaluation, a checkpoint, and the trained network; seven epochs."""
    calls: list[int] = []
    monkeypatch.setattr(recorder, "recalibrate_norms", lambda *_: calls.append(1))
    checkpoints = None if every is None else Checkpoints(tmp_path, every=every)
    model = gated(data)
    options: dict[str, Any] = {"epochs": 7, "progress": False, "checkpoints": checkpoints}
    fit(model, undecided(model), data, data if held_out else None, **options)
    assert len(calls) == expected


def test_undecided_channels_are_told_of(data: list[Batch]) -> None:
    with pytest.warns(UserWarning, match=r"channel gates are undecided: 0 keeps 32 of 32 channels where \d+\.\d are"):
        trained(data)


@pytest.mark.filterwarnings("ignore:every channel of", "ignore:channel gates are undecided")
def test_a_loss_of_accuracy_by_deciding_is_told_of(data: list[Batch]) -> None:
    """At the logit where gates are more often closed than open, all are decided closed."""
    model = gated(data)
    guide = HardConcreteGuide(model.prior)
    with torch.no_grad():
        guide.channel_logits.fill_(-1.9)
    recipe = Recipe(weight_lr=0.02, gate_lr=1e-9)
    with pytest.warns(UserWarning, match="with gates drawn from the guide") as caught:
        fit(model, guide, data, data, epochs=12, recipe=recipe, seed=0, progress=False)
    assert {warning.filename for warning in caught} == {__file__}


def test_frozen_norms_keep_their_statistics(data: list[Batch]) -> None:
    model = gated(data)
    norm: Any = model.net.net[3]  # type: ignore[index]
    recalibrate_norms(model, data, model.net.open_gates())
    before = norm_statistics(model)
    guide, scale = HardConcreteGuide(model.prior), norm.weight.detach().clone()
    history = fit(
        model, guide, data, data, epochs=2, recipe=Recipe(gate_lr=1e-9), seed=0, progress=False, freeze_norms=True
    )
    assert all(torch.equal(value, before[name]) for name, value in norm_statistics(model).items())
    assert not norm.training and model.training
    assert not torch.equal(norm.weight, scale), "scale and shift are trained"
    assert evaluate(model, data, guide.hard_gates()).nll == history[-1].validation_nll


def test_the_float_network_keeps_its_own_statistics(data: list[Batch]) -> None:
    """They are those of its training: moving averages, as in any PyTorch loop."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    expected = nn.BatchNorm1d(3)
    for x, _ in data:
        expected(x)
    fit(PlainModel(net, 200), EmptyGuide(), data, data, epochs=1, progress=False)
    norm: Any = net[0]
    assert torch.equal(norm.running_mean, expected.running_mean)  # type: ignore[arg-type]
