"""Training is plain PyTorch on the ELBO: reproducible, comparable with a loop by hand, and faithfully recorded."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bbits import GatePrior, NetworkCost, QuantizedNetwork, quantize
from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.distributions import HardConcrete
from pyro_bbits.inference import (
    EmptyGuide,
    EpochRecord,
    HardConcreteGuide,
    History,
    Recipe,
    StraightThroughGuide,
    evaluate,
    fit,
)
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import AbstractModel, GatedModel, NormalLikelihood, PlainModel

# tiny networks on a few points lose whole layers, which is beside the point here
pytestmark = pytest.mark.filterwarnings("ignore:every channel of:UserWarning")

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]

# The automatic rate of the gates would close all of them in a run of a few steps.
SLOW_GATES = Recipe(gate_lr=0.05)


def state(*modules: nn.Module) -> State:
    return copy.deepcopy(nn.ModuleList(modules).state_dict())


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history: History) -> list[EpochRecord]:
    return [replace(record, seconds=0.0) for record in history]


@pytest.mark.parametrize("guide_class", [HardConcreteGuide, StraightThroughGuide])
def test_a_seed_fixes_the_whole_run(
    make_model: MakeModel, batches: list[Batch], data: Batch, guide_class: type[HardConcreteGuide]
) -> None:
    def run(seed: int) -> tuple[list[EpochRecord], State]:
        model = make_model()
        guide = guide_class(model.prior, init=1.0)
        loader = TensorLoader(*data, batch_size=8, shuffle=True)
        history = fit(model, guide, loader, batches, epochs=3, recipe=SLOW_GATES, seed=seed, progress=False)
        return timeless(history), state(model, guide)

    (history, end), (again, same_end), (other, other_end) = run(1), run(1), run(2)
    assert history == again
    assert same(end, same_end)
    assert history != other
    assert not same(end, other_end)


def test_without_a_seed_the_generator_is_left_alone(make_model: MakeModel, data: Batch) -> None:
    def run(model: GatedModel) -> float:
        guide = HardConcreteGuide(model.prior, init=0.0)
        return fit(model, guide, [data], epochs=1, recipe=SLOW_GATES, progress=False)[0].loss

    losses = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        model = make_model()
        losses.append(run(model))
    losses.append(run(make_model()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("schedule", ["tail", "constant"])
def test_a_plain_model_trains_as_a_loop_written_by_hand(data: Batch, schedule: Any) -> None:
    """Same start, same batches: what remains of the method is Adam on the cross-entropy.

    In float64, since Adam makes much of the last bits of a small gradient.
    """
    epochs, (images, labels) = 7, data
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 2)).double()
    by_hand = copy.deepcopy(net)

    def loader() -> TensorLoader:
        return TensorLoader(images.double(), labels, batch_size=7, shuffle=True, seed=4)

    recipe = Recipe(weight_lr=0.01, schedule=schedule)
    history = fit(PlainModel(net, 24), EmptyGuide(), loader(), epochs=epochs, recipe=recipe, seed=11, progress=False)

    torch.manual_seed(11)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    tail = int(2 * epochs / 3) if schedule == "tail" else epochs
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 1.0 if epoch <= tail else (epochs - epoch) / (epochs - tail)
    )
    batches, losses = loader(), []
    for _ in range(epochs):
        epoch_losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(by_hand(x), y)
            loss.backward()
            optimizer.step()
            epoch_losses.append(loss.item())
        rates.step()
        losses.append(sum(epoch_losses) / len(epoch_losses))
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-6)
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)


def test_gated_training_is_a_loop_of_three_optimizers_on_the_elbo(make_model: MakeModel, batches: list[Batch]) -> None:
    recipe = Recipe(weight_lr=0.02, gate_lr=0.1, range_lr=0.005, weight_optimizer="sgd", schedule="constant")
    model, other = make_model(), make_model()
    guide, other_guide = (HardConcreteGuide(m.prior, init=1.0) for m in (model, other))
    fit(model, guide, batches, epochs=2, recipe=recipe, seed=6, progress=False)

    elbo: Any = TraceMeanField_ELBO()(other, other_guide)
    ranges = other.net.quantizers.log_range
    weights = [p for p in other.parameters() if p is not ranges]
    optimizers = [
        torch.optim.SGD(weights, lr=0.02, momentum=0.9, nesterov=True),
        torch.optim.Adam(other_guide.parameters(), lr=0.1),
        torch.optim.Adam([ranges], lr=0.005),
    ]
    pyro.set_rng_seed(6)
    for _ in range(2):
        for x, y in batches:
            loss = elbo(x, y) / 24
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        elbo.guide()  # the KL of the record is read off a run of the guide
    trained, expected = state(model, guide), state(other, other_guide)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def test_every_record_says_what_the_gates_were(make_model: MakeModel, batches: list[Batch]) -> None:
    model = make_model(0.3)
    guide = HardConcreteGuide(model.prior, init={2: 1.0, 4: 2.0, 8: 0.5})
    with torch.no_grad():
        guide.channel_logits[0] = 9.0  # one channel stays
    cost, layout = NetworkCost(model.net), model.net.layout
    seen: list[EpochRecord] = []

    def compare(record: EpochRecord) -> None:
        seen.append(record)
        hard = guide.hard_gates()
        assert record.epoch == len(seen)
        assert record.bits == layout.bits(hard)
        assert record.kept == layout.kept(hard)
        assert record.bops == cost(hard).item()
        assert record.expected_bops == cost(guide.probabilities()).item()
        assert record.kl == gate_kl_nats(guide, model.prior, 24) / 24
        validation = evaluate(model, batches[:2], hard)
        assert (record.validation_nll, record.validation_accuracy) == (validation.nll, validation.accuracy)

    recipe = Recipe(gate_lr=0.2)
    history = fit(model, guide, batches, batches[:2], epochs=8, recipe=recipe, seed=0, progress=False, on_epoch=compare)
    assert history.epochs == seen
    assert (history.tensors, history.layers) == (layout.tensors, ("0",))
    assert (
        len({record.bits for record in history}) > 1 < len({record.kept for record in history})
    )  # otherwise the comparison could miss a stale record
    assert evaluate(model, batches[:2]).nll != seen[-1].validation_nll  # hard gates differ from open ones
    assert [r.seconds for r in history] == sorted(r.seconds for r in history)
    assert len(history.frame()) == 8


def test_the_rule_decides_the_recorded_gates(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = StraightThroughGuide(model.prior, init=0.6)  # P = 0.65: open by the mode of a channel, not by the paper
    with torch.no_grad():
        guide.channel_logits[0] = 4.0
    recipe = Recipe(gate_lr=1e-9)
    kept = {
        rule: fit(model, guide, [data], epochs=1, recipe=recipe, rule=rule, progress=False)[0].kept
        for rule in ("map", "threshold")
    }
    assert kept == {"map": (4,), "threshold": (1,)}


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(batches: list[Batch]) -> None:
    net = nn.Linear(3, 2)
    expected = sum(F.cross_entropy(net(x), y).item() for x, y in batches) / 4
    recipe = Recipe(weight_lr=1e-12)
    history = fit(PlainModel(net, 24), EmptyGuide(), batches, epochs=2, recipe=recipe, progress=False)
    assert [record.loss for record in history] == pytest.approx([expected] * 2, rel=1e-5)


def test_a_plain_run_has_no_gates_to_record(batches: list[Batch]) -> None:
    history = fit(PlainModel(nn.Linear(3, 2), 24), EmptyGuide(), batches, batches, epochs=2, progress=False)
    assert all((r.kl, r.bops, r.expected_bops, r.bits, r.kept) == (None, None, None, (), ()) for r in history)
    assert all(r.validation_nll is not None and r.validation_accuracy is not None for r in history)
    assert history.frame()["epoch"].tolist() == [1, 2]


def test_pretrained_weights_are_the_start_and_the_original_is_untouched(batches: list[Batch]) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    fit(PlainModel(net, 24), EmptyGuide(), batches, epochs=30, recipe=Recipe(weight_lr=0.05), progress=False)
    trained = state(net)
    pretrained = evaluate(PlainModel(net, 24), batches)
    network = quantize(net, batches[0][0])
    model = GatedModel(network, GatePrior(network, mu=1e-6), 24)
    assert evaluate(model, batches).nll == pytest.approx(pretrained.nll, rel=1e-4)
    fit(model, HardConcreteGuide(model.prior), batches, epochs=1, recipe=Recipe(weight_lr=1e-4), progress=False)
    assert same(state(net), trained)
    for name, value in net.state_dict().items():  # Adam moves a weight by at most 4 steps of 1e-4 and a little
        torch.testing.assert_close(network.net.state_dict()[name], value, rtol=0, atol=5e-4)
        assert not torch.equal(network.net.state_dict()[name], value)


def test_a_short_run_can_close_gates_unless_told_to_go_slowly(make_model: MakeModel, batches: list[Batch]) -> None:
    """From logit 6 with the paper's rate of 1e-3 no gate can close in 40 steps; the automatic rate does it."""
    bits = {}
    for gate_lr in (None, 1e-3):
        model = make_model(1.0)
        model.prior.pin_channels()
        guide = HardConcreteGuide(model.prior)
        history = fit(model, guide, batches, epochs=10, recipe=Recipe(gate_lr=gate_lr), seed=0, progress=False)
        bits[gate_lr] = history[-1].bits
    assert bits[1e-3] == (32, 32, 32)
    assert max(bits[None]) < 32


def test_a_layer_that_lost_every_channel_is_warned_of(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = HardConcreteGuide(model.prior, init={2: -9.0})
    with pytest.warns(UserWarning, match=r"every channel of 0 is removed; .* A smaller mu or a lower gate") as caught:
        fit(model, guide, [data], epochs=2, recipe=SLOW_GATES, progress=False)
    assert [warning.filename for warning in caught] == [__file__]
    with torch.no_grad():
        guide.channel_logits[1] = 9.0  # warnings are errors: one channel left is silent
    assert fit(model, guide, [data], epochs=1, recipe=SLOW_GATES, progress=False)[0].kept == (1,)


def test_training_ends_in_training_mode_and_moves_every_kind_of_parameter(
    make_model: MakeModel, batches: list[Batch]
) -> None:
    model = make_model().eval()
    guide = HardConcreteGuide(model.prior)
    before = state(model, guide)
    fit(model, guide, batches, epochs=1, recipe=SLOW_GATES, progress=False)
    after, trainable = state(model, guide), {name for name, _ in nn.ModuleList([model, guide]).named_parameters()}
    assert {name for name in after if not torch.equal(after[name], before[name])} == trainable
    assert model.training


def test_frozen_parameters_stay(make_model: MakeModel, batches: list[Batch]) -> None:
    model = make_model()
    guide = HardConcreteGuide(model.prior)
    model.net.net.requires_grad_(False)
    before, gates = state(model.net.net), guide.tensor_logits.detach().clone()
    fit(model, guide, batches, epochs=1, recipe=SLOW_GATES, progress=False)
    assert same(state(model.net.net), before)
    assert not torch.equal(guide.tensor_logits, gates)


def test_torch_s_own_loader_and_nested_inputs_work(data: Batch) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.first(x).relu())
            return logits

    network = quantize(Named(), {"x": data[0]})
    model = GatedModel(network, GatePrior(network, mu=0.01), 24)
    guide = HardConcreteGuide(model.prior)
    loader = DataLoader(TensorDataset(*data), batch_size=8)

    class Dictionaries:
        def __len__(self) -> int:
            return len(loader)

        def __iter__(self) -> Any:
            return (({"x": x}, y) for x, y in loader)

    recipe = Recipe(weight_lr=0.05)
    history = fit(model, guide, Dictionaries(), epochs=15, recipe=recipe, seed=0, progress=False)
    assert history[-1].loss < history[0].loss - 0.05


class OneLogit(nn.Module):
    """A guide written by hand, straight from the distributions: one logit for each kind of gate."""

    def __init__(self, prior: GatePrior) -> None:
        super().__init__()
        self.prior, self.logits = prior, nn.Parameter(torch.full((5,), 3.0))

    def forward(self, *args: object) -> None:
        layout, tensors = self.prior.layout, len(self.prior.layout.tensors)
        root = HardConcrete(self.logits[0].expand(layout.num_channels))
        with pyro.plate("channels", layout.num_channels):
            on = self.prior.any_on(pyro.sample("z2", root))
        reach = self.prior.reach(root.logit_on)
        with pyro.plate("tensors", tensors):
            for site, logit in zip(layout.residual_sites, self.logits[1:], strict=True):
                gate = HardConcrete(logit.expand(tensors), reach, on)
                on, reach = pyro.sample(site, gate), reach * gate.prob_on


def test_a_guide_and_a_likelihood_of_ones_own_are_trained(batches: list[Batch]) -> None:
    def bernoulli(output: Tensor) -> Any:
        return dist.Bernoulli(logits=output.squeeze(1))

    loader = [(x, y.float()) for x, y in batches]
    network = quantize(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), batches[0][0])
    model = GatedModel(network, GatePrior(network, mu=0.01), 24, bernoulli)
    guide = OneLogit(model.prior)
    recipe = Recipe(weight_lr=0.03, gate_lr=0.1)
    history = fit(model, guide, loader, loader, epochs=20, recipe=recipe, seed=0, progress=False)
    assert history[-1].loss < history[0].loss - 0.1
    assert guide.logits[-1] < 0 < guide.logits[0]  # the dearest gate closes, the cheapest stays open
    assert history[-1].validation_nll is not None
    assert all((r.kl, r.bops, r.bits, r.validation_accuracy) == (None, None, (), None) for r in history)
    assert len(history.frame()) == 20


def test_regression_learns_its_noise_with_the_weights() -> None:
    """y = x_0 - x_1 + 0.1 noise: the scale goes from 1 to the noise, within the error of 200 residuals."""
    x = torch.rand(200, 2)
    y = x[:, :1] - x[:, 1:] + 0.1 * torch.randn(200, 1)
    model = PlainModel(nn.Linear(2, 1), 200, "normal")
    fit(model, EmptyGuide(), [(x, y)], epochs=300, recipe=Recipe(weight_lr=0.05), progress=False)
    assert isinstance(model.likelihood, NormalLikelihood)
    residual = (y - model.net(x)).square().mean().sqrt().item()
    assert model.likelihood.log_scale.exp().item() == pytest.approx(residual, rel=0.01)
    assert residual == pytest.approx(0.1, rel=5 / 400**0.5)


class Conjugate(AbstractModel):
    """y ~ N(m, 1), m ~ N(0, 1): no network, no gates, no parameter of its own."""

    def __init__(self, num_data: int) -> None:
        super().__init__(nn.Identity(), num_data, lambda mean: dist.Normal(mean, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", self.num_data, subsample=torch.arange(len(x))):
            drawn: Tensor = pyro.sample("obs", self.likelihood(mean.expand(len(x))), obs=y)
        return drawn

    def predict(self, x: Tensor, gates: object = None) -> Any:
        return self.likelihood(torch.zeros(len(x)))


class NormalGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, *args: object) -> None:
        pyro.sample("mean", dist.Normal(self.loc, self.log_scale.exp()))


def test_a_model_of_ones_own_finds_its_exact_posterior() -> None:
    """20 points: the posterior is N(sum / 21, 1 / 21). The mean over 200 steps leaves a few percent of noise."""
    y, tail = torch.randn(20) + 1.5, []
    model, guide = Conjugate(20), NormalGuide()
    fit(
        model,
        guide,
        [(torch.zeros(20), y)],
        epochs=600,
        recipe=Recipe(gate_lr=0.02),
        seed=0,
        progress=False,
        on_epoch=lambda record: tail.append((guide.loc.item(), guide.log_scale.exp().item())),
    )
    loc, scale = torch.tensor(tail[400:]).mean(0).tolist()
    assert loc == pytest.approx(y.sum().item() / 21, abs=0.05)
    assert scale == pytest.approx(21**-0.5, rel=0.15)


class WithScale(AbstractModel):
    """A quantized network inside a larger one, under a gate guide: allowed, though not recorded."""

    def __init__(self, network: QuantizedNetwork, prior: GatePrior, num_data: int) -> None:
        super().__init__(nn.ModuleDict({"quantized": network, "head": nn.Linear(2, 2)}), num_data, "categorical")
        self.prior, self.inner = prior, GatedModel(network, prior, num_data)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.inner(x, y)  # type: ignore[no-any-return]

    def predict(self, x: Tensor, gates: Any = None) -> Any:
        return self.inner.predict(x, gates)


def test_a_model_around_a_quantized_network_trains_under_a_gate_guide(
    make_model: MakeModel, batches: list[Batch]
) -> None:
    inner = make_model()
    model = WithScale(inner.net, inner.prior, 24)
    guide = HardConcreteGuide(inner.prior)
    history = fit(model, guide, batches, batches, epochs=2, progress=False)
    assert history[-1].bits == ()
    assert history[-1].validation_nll == evaluate(inner, batches, guide.hard_gates()).nll


def test_the_run_is_reported_under_its_title(
    make_model: MakeModel, batches: list[Batch], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    recipe = Recipe(gate_lr=1e-3)
    history = fit(model, HardConcreteGuide(model.prior), batches, batches, epochs=2, recipe=recipe, title="tiny")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["tiny", f"{i}/2", "loss"] for i in (1, 2)]
    assert f"accuracy {history[-1].validation_accuracy:6.2f} %" in lines[-1]
    assert "bits 32b x3" in lines[-1]
    fit(model, HardConcreteGuide(model.prior), batches, epochs=1, recipe=recipe, progress=False)
    assert capsys.readouterr().out == ""


def test_checks_of_the_first_epoch_do_not_count_as_training(data: Batch) -> None:
    """One step in, running statistics have seen one batch."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    network = quantize(net.eval(), data[0])
    model = GatedModel(network, GatePrior(network, mu=0.01), 24)
    fit(model, HardConcreteGuide(model.prior), [data], [data], epochs=1, recipe=SLOW_GATES, progress=False)
    counts = [int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts == [1]


def test_epochs_run_over_a_loader_as_often_as_asked(batches: list[Batch]) -> None:
    class Counting:
        passes = itertools.count()

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Any:
            next(self.passes)
            return iter(batches)

    loader = Counting()
    fit(PlainModel(nn.Linear(3, 2), 24), EmptyGuide(), loader, epochs=3, progress=False)
    assert next(loader.passes) == 3


def test_a_layer_without_channels_is_told_of(make_model: MakeModel, batches: list[Batch]) -> None:
    model = make_model(100.0)
    with pytest.warns(UserWarning, match=r"every channel of 0 is removed.*smaller mu"):
        history = fit(model, HardConcreteGuide(model.prior), batches, epochs=10, seed=0, progress=False)
    assert history[-1].kept == (0,)
