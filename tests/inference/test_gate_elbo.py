"""The lean ELBO has the value and gradients of Pyro's, on every way through it, and reads nothing on the host."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bbits.distributions import GateBernoulli, HardConcrete
from pyro_bbits.distributions.joint import GateBank, GateDraw, draw_gates
from pyro_bbits.inference import AbstractGateGuide, EmptyGuide, HardConcreteGuide, StraightThroughGuide, svi_pair
from pyro_bbits.inference import joint as joint_module
from pyro_bbits.inference.capture_audit import HostReads
from pyro_bbits.inference.gate_elbo import GateELBO
from pyro_bbits.models import GatedModel, PlainModel, sample_gates
from pyro_bbits.models.likelihoods import ScoredCategorical

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]

GUIDES = [HardConcreteGuide, StraightThroughGuide]


@pytest.fixture
def lean() -> Iterator[None]:
    """Validation off, as in training."""
    before = torch.distributions.Distribution._validate_args
    pyro.enable_validation(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


pytestmark = pytest.mark.usefixtures("lean")


def evaluate(elbo: TraceMeanField_ELBO, model: Any, guide: Any, data: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with the same noise every time."""
    modules = nn.ModuleList([m for m in (model, guide) if isinstance(m, nn.Module)])
    modules.zero_grad()
    pyro.set_rng_seed(11)
    loss = elbo.differentiable_loss(model, guide, *data)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in modules.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same_as_stock(model: Any, guide: Any, data: Batch, particles: int = 1) -> None:
    """Float32, with the KL summed in another order."""
    ours, stock = (
        evaluate(elbo(num_particles=particles), model, guide, data) for elbo in (GateELBO, TraceMeanField_ELBO)
    )
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, stock[1][name], rtol=1e-4, atol=1e-5, msg=name)


def randomize(guide: AbstractGateGuide) -> AbstractGateGuide:
    with torch.no_grad():
        guide.channel_logits.normal_(-1)
        guide.tensor_logits.normal_(0)
    return guide


@contextmanager
def count_priced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Records of each draw inside whether its KL was differentiated."""
    draws: list[GateDraw] = []

    def remember(*args: Any) -> GateDraw:
        draws.append(draw_gates(*args))
        if draws[-1].kl is not None:
            draws[-1].kl.register_hook(lambda _: used.append(True))
        return draws[-1]

    used: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(joint_module, "draw_gates", remember)
        yield used


# --- the same as Pyro's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("particles", [1, 3])
def test_loss_and_gradients_are_stock_pyro_s(
    make_model: MakeModel, data: Batch, guide_class: type[AbstractGateGuide], simplified: bool, particles: int
) -> None:
    model = make_model(simplified=simplified)
    model.prior.pin("2.weight", bits=4)
    model.prior.channel_strength[0] = torch.inf
    assert_same_as_stock(model, randomize(guide_class(model.prior)), data, particles)


@pytest.mark.parametrize("bits", [(8,), (2, 4)])
def test_short_ladders_are_priced_alike(make_model: MakeModel, data: Batch, bits: tuple[int, ...]) -> None:
    model = make_model(bits=bits)
    assert_same_as_stock(model, randomize(HardConcreteGuide(model.prior)), data)


def test_a_guide_s_gates_are_priced_with_their_draw(
    make_model: MakeModel, data: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with count_priced(monkeypatch) as used:
        evaluate(GateELBO(), model, HardConcreteGuide(model.prior), data)
        assert used == [True]
        evaluate(TraceMeanField_ELBO(), model, HardConcreteGuide(model.prior), data)
        assert used == [True]


class Scaled(GatedModel):
    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        with poutine.scale(scale=0.5):
            return super().forward(x, y)


class ScaledGuide(HardConcreteGuide):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        with poutine.scale(scale=0.5):
            super().forward(*args, **kwargs)


class MaskedGuide(HardConcreteGuide):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        with poutine.mask(mask=False):
            super().forward(*args, **kwargs)


class OtherPrior(GatedModel):
    """Prices of its own: no gate prior of ours."""

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        with pyro.plate("channels", 4):
            channels = pyro.sample("z2", GateBernoulli(torch.full((4,), 0.7)))
        on: Tensor = self.prior.any_on(channels)
        rungs = []
        with pyro.plate("tensors", 3):
            for site in self.prior.layout.residual_sites:
                on = pyro.sample(site, GateBernoulli(torch.full((3,), 1.5), on))
                rungs.append(on)
        output = self.net(x, gates=type(self.net.open_gates())(channels, torch.stack(rungs, 1)))
        with pyro.plate("data", self.num_data, subsample=torch.arange(len(x))):
            drawn: Tensor = pyro.sample("obs", self.likelihood(output), obs=y)
        return drawn


class OtherSize(GatedModel):
    """Samples the gate prior of another number of data points than it says."""

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        gates = sample_gates(self.prior, 7 * self.num_data)
        with pyro.plate("data", self.num_data, subsample=torch.arange(len(x))):
            drawn: Tensor = pyro.sample("obs", self.likelihood(self.net(x, gates=gates)), obs=y)
        return drawn


@pytest.mark.parametrize(
    ("model_class", "guide_class"),
    [
        (Scaled, ScaledGuide),
        (GatedModel, ScaledGuide),
        (GatedModel, MaskedGuide),
        (OtherPrior, HardConcreteGuide),
        (OtherSize, HardConcreteGuide),
    ],
)
def test_programs_that_change_the_gates_take_pyro_s_way(
    make_model: MakeModel,
    data: Batch,
    monkeypatch: pytest.MonkeyPatch,
    model_class: type[GatedModel],
    guide_class: type[HardConcreteGuide],
) -> None:
    model = make_model()
    changed, guide = model_class(model.net, model.prior, 24), randomize(guide_class(model.prior))
    with count_priced(monkeypatch) as used:
        assert_same_as_stock(changed, guide, data)
    assert used == []


def test_conditioned_gates_take_pyro_s_way(make_model: MakeModel, data: Batch) -> None:
    """A site of the model that is observed has no KL; the others keep theirs."""
    model = make_model()
    guide = randomize(HardConcreteGuide(model.prior))
    conditioned = poutine.condition(model, data={"z4": torch.tensor([1.0, 0.0, 1.0])})
    hidden = poutine.block(guide, hide=["z4"])
    assert_same_as_stock(conditioned, hidden, data)


class Noisy(GatedModel):
    """A latent scale that no gate has to do with."""

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        pyro.sample("shift", dist.Gamma(2.0, 2.0))
        return super().forward(x, y)


class NoisyGuide(HardConcreteGuide):
    """Its shift has a KL with the model's, or none that anybody registered."""

    def __init__(self, *args: Any, known: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known, self.location = known, nn.Parameter(torch.tensor(0.3))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        if self.known:
            pyro.sample("shift", dist.Gamma(self.location.exp(), 2.0))
        else:
            pyro.sample("shift", dist.LogNormal(self.location, 0.5))
            pyro.sample("side", dist.Normal(self.location, 1.0), infer={"is_auxiliary": True})
        super().forward(*args, **kwargs)


@pytest.mark.parametrize("known", [True, False])
def test_further_latent_sites_are_priced_as_in_pyro(
    make_model: MakeModel, data: Batch, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    model = make_model()
    noisy, guide = Noisy(model.net, model.prior, 24), NoisyGuide(model.prior, known=known)
    with count_priced(monkeypatch) as used:
        assert_same_as_stock(noisy, guide, data)
    assert used == [True]


def test_a_site_that_the_model_lacks_is_refused(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = NoisyGuide(model.prior, known=True)
    with pytest.raises(ValueError, match="the guide samples 'shift', which the model does not; give the site infer="):
        GateELBO().differentiable_loss(model, guide, *data)


def test_models_without_gates_are_models_too(data: Batch) -> None:
    net = nn.Linear(3, 2)
    assert_same_as_stock(PlainModel(net, 24), EmptyGuide(), data)

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ weight), obs=y.float())

    guide = AutoNormal(model)
    guide(*data)
    assert_same_as_stock(model, guide, data)


class Halved(ScoredCategorical):
    """Classes whose log-probability is not what the scores make it."""

    def log_prob(self, value: Tensor) -> Tensor:
        return 0.5 * super().log_prob(value)


class HalfSeen(PlainModel):
    """Every second sample does not count."""

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        every_second: Any = torch.arange(len(x)) % 2 == 0
        with poutine.mask(mask=every_second):
            return super().forward(x, y)


class Rescaled(PlainModel):
    """Its likelihood counts by a tensor, and once more by a number."""

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        with poutine.scale(scale=torch.tensor(0.3)), poutine.scale(scale=2.0):
            return super().forward(x, y)


@pytest.mark.parametrize("likelihood", ["categorical", Halved])
@pytest.mark.parametrize("model_class", [PlainModel, HalfSeen, Rescaled])
def test_observed_classes_count_as_in_pyro(
    data: Batch, monkeypatch: pytest.MonkeyPatch, model_class: type[PlainModel], likelihood: Any
) -> None:
    """Summed at once where they are the usual ones, counted alike, and one by one elsewhere."""
    summed, real = list[Tensor | None](), ScoredCategorical.summed_loss

    def remember(distribution: ScoredCategorical, value: Tensor) -> Tensor | None:
        summed.append(real(distribution, value))
        return summed[-1]

    monkeypatch.setattr(ScoredCategorical, "summed_loss", remember)
    assert_same_as_stock(model_class(nn.Linear(3, 2), 24, likelihood=likelihood), EmptyGuide(), data)
    assert len(summed) == (model_class is PlainModel and likelihood == "categorical")


def test_classes_at_several_positions_count_as_in_pyro(data: Batch) -> None:
    model = PlainModel(nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 4))), 24)
    assert_same_as_stock(model, EmptyGuide(), (data[0], torch.randint(2, (len(data[0]), 4))))


def test_stock_svi_trains_with_it(make_model: MakeModel, data: Batch) -> None:
    losses = {}
    for name, elbo in (("ours", GateELBO), ("stock", TraceMeanField_ELBO)):
        model = make_model()
        guide, optimizer = HardConcreteGuide(model.prior, init=0.5), PyroOptim(torch.optim.Adam, {"lr": 0.02})
        svi: Any = SVI(*svi_pair(model, guide, name), optimizer, loss=elbo())
        pyro.set_rng_seed(3)
        losses[name] = [svi.step(*data) for _ in range(4)] + [svi.evaluate_loss(*data)]
    assert all(isinstance(loss, float) for loss in losses["ours"])
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-5)


def test_under_validation_all_checks_are_made(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = randomize(HardConcreteGuide(model.prior))
    with pyro.validation_enabled(True):
        assert_same_as_stock(model, guide, data)
        with pytest.warns(UserWarning, match="Found vars in model but not guide"), pytest.raises(KeyError):
            GateELBO().differentiable_loss(Noisy(model.net, model.prior, 24), guide, *data)


# --- what it does not do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("simplified", [False, True])
def test_a_step_asks_the_host_for_nothing(
    make_model: MakeModel, data: Batch, guide_class: type[AbstractGateGuide], simplified: bool
) -> None:
    """Neither a value nor a tensor made of Python numbers, forward or backward."""
    model = make_model(simplified=simplified)
    guide = guide_class(model.prior)
    with HostReads() as ours:
        evaluate_quietly(GateELBO(), model, guide, data)
    assert [str(read) for read in ours.found] == []
    with HostReads() as stock:
        evaluate_quietly(TraceMeanField_ELBO(), model, guide, data)
    assert {read.operation for read in stock.found} == {"aten::_local_scalar_dense"}


def evaluate_quietly(elbo: TraceMeanField_ELBO, model: Any, guide: Any, data: Batch) -> None:
    elbo.differentiable_loss(model, guide, *data).backward()


FREE = (
    *("view", "expand", "select", "slice", "t", "transpose", "unbind", "unsqueeze", "squeeze", "permute", "as_strided"),
    *("_unsafe_view", "alias", "detach", "split", "split_with_sizes", "empty", "new_empty", "empty_like"),
    "arange",  # the indices of Pyro's plates, which stay on the host
)


class Count(TorchDispatchMode):
    """Counts operations that launch something; views and empty memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def add_gates(x: Tensor, gates: Any) -> Tensor:
    """Stands for the network."""
    moved: Tensor = x[:, :2] + gates.channels.sum() + gates.tensors.sum()
    return moved


class Drawn(torch.autograd.Function):
    """Stands for the fused draw: nothing but its results."""

    @staticmethod
    def forward(ctx: Any, channels: Tensor, tensors: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = channels.shape, tensors.shape
        return torch.empty_like(channels), torch.empty_like(tensors), noise.new_empty(len(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].new_empty(ctx.shapes[0]), grads[0].new_empty(ctx.shapes[1]), None


def test_little_is_left_around_the_fused_draw(
    make_model: MakeModel, data: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise, the stack of the rungs and sums, besides 4 operations of the likelihood and 4 of the stand-in network."""

    def draw(bank: GateBank, noise: Tensor, num_data: int | None) -> GateDraw:
        return GateDraw(*Drawn.apply(bank.channel_logits, bank.tensor_logits, noise))

    monkeypatch.setattr(joint_module, "draw_gates", draw)
    model = make_model()
    model.net.forward = add_gates  # type: ignore[method-assign, assignment]
    guide = HardConcreteGuide(model.prior)
    with Count() as forward:
        loss = GateELBO().differentiable_loss(model, guide, *data)
    with Count() as backward:
        loss.backward()
    assert sum(forward.calls.values()) <= 14, forward.calls
    assert sum(backward.calls.values()) <= 9, backward.calls


@pytest.mark.parametrize("simplified", [False, True])
def test_pyro_costs_a_bounded_number_of_operations(make_model: MakeModel, data: Batch, simplified: bool) -> None:
    """Guide, model, KL and likelihood, however deep the network; site by site it was 459 forward and 208 backward.

    The fused kernels make one of the draw and its KL, forward and backward, which are most of what is left.
    """
    model = make_model(simplified=simplified)
    model.net.forward = add_gates  # type: ignore[method-assign, assignment]
    guide = HardConcreteGuide(model.prior)
    with Count() as forward:
        loss = GateELBO().differentiable_loss(model, guide, *data)
    with Count() as backward:
        loss.backward()
    assert sum(forward.calls.values()) <= 82, forward.calls
    assert sum(backward.calls.values()) <= 86, backward.calls


def test_a_replayed_prior_computes_nothing_but_its_stack(make_model: MakeModel) -> None:
    prior = make_model().prior
    drawn: Any = poutine.trace(HardConcreteGuide(prior)).get_trace()
    with Count() as count:
        poutine.trace(poutine.replay(sample_gates, trace=drawn)).get_trace(prior, 24)
    assert set(count.calls) <= {"stack", "new_ones"}


# --- gates drawn together -------------------------------------------------------------------------------------------


def test_gates_are_handed_out_once(make_model: MakeModel) -> None:
    """A distribution that is sampled again draws anew, as it does within further plates."""
    guide = HardConcreteGuide(make_model(hidden=30).prior, init=0.0)
    trace: Any = poutine.trace(guide).get_trace()
    site = trace.nodes["z2"]
    assert type(site["fn"]) is HardConcrete
    assert not torch.equal(site["fn"](), site["value"])
    assert not torch.equal(site["fn"].sample(), site["value"])
    with pyro.plate("draws", 5, dim=-2):
        wide: Any = poutine.trace(guide).get_trace()
    assert wide.nodes["z2"]["value"].shape == (5, 30) and wide.nodes["z4"]["value"].shape == (5, 3)
    assert len(wide.nodes["z2"]["value"][:, 0].unique()) > 1


def test_gates_behind_a_site_that_was_set_follow_it(make_model: MakeModel) -> None:
    """Channels or a rung put in from outside close what hangs on them."""
    guide = HardConcreteGuide(make_model().prior, init=20.0)
    for site, value, closed in (("z2", torch.zeros(4), [0]), ("z8", torch.tensor([1.0, 0.0, 0.0]), [1, 2])):
        trace: Any = poutine.trace(poutine.condition(guide, data={site: value})).get_trace()
        for rung in ("z16", "z32"):
            assert trace.nodes[rung]["value"].tolist() == [0.0 if t in closed else 1.0 for t in range(3)]


def test_log_probabilities_of_sites_are_those_of_their_chain(make_model: MakeModel) -> None:
    """Deferred logits, parents and pins against a chain written out."""
    prior = make_model(bits=(2, 4, 8)).prior.pin("2.input", bits=4)
    guide = randomize(HardConcreteGuide(prior))
    trace: Any = poutine.trace(guide).get_trace()
    z2, z4 = trace.nodes["z2"]["value"], trace.nodes["z4"]["value"]
    pinned = guide.tensor_logits.clone()
    pinned[2] = torch.tensor([torch.inf, -torch.inf])
    expected = {
        "z2": HardConcrete(guide.channel_logits),
        "z4": HardConcrete(pinned[:, 0], on=prior.any_on(z2)),
        "z8": HardConcrete(pinned[:, 1], on=z4),
    }
    for name, gate in expected.items():
        site = trace.nodes[name]
        assert torch.equal(site["fn"].log_prob(site["value"]), gate.log_prob(site["value"]))
