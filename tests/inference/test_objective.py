"""The objective is cross-entropy plus the exact KL of the discrete gates, in known units."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

from pyro_bbits.cost import tensor_macs
from pyro_bbits.distributions import HardConcrete
from pyro_bbits.inference import (
    AbstractGateGuide,
    EmptyGuide,
    HardConcreteGuide,
    StraightThroughGuide,
    elbo_module,
    parameter_groups,
)
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import GatedModel, NormalLikelihood, PlainModel

MakeModel = Callable[..., GatedModel]
Draw = Callable[[nn.Module], Any]
Batch = tuple[Tensor, Tensor]

GUIDES = [HardConcreteGuide, StraightThroughGuide]


def blind(output: Tensor) -> Any:
    """A likelihood that the network has no influence on: what remains of the ELBO is log 2 per point and the KL."""
    return dist.Categorical(logits=torch.zeros_like(output).detach())


def randomize(guide: AbstractGateGuide) -> AbstractGateGuide:
    with torch.no_grad():
        guide.channel_logits.normal_(-1)
        guide.tensor_logits.normal_(0)
    return guide


def kl_by_elbo(model: GatedModel, guide: nn.Module, data: Batch) -> Tensor:
    """KL in nats per data set of a model with the blind likelihood."""
    loss: Tensor = elbo_module(model, guide)(*data)
    return loss - model.num_data * math.log(2)


def kl_by_enumeration(model: GatedModel, guide: AbstractGateGuide) -> Tensor:
    """Sum of q log(q / p) over all patterns of all gates, in float64."""
    prior, layout = model.prior, model.net.layout
    strength = torch.cat([t.double().flatten() for t in (prior.channel_strength, prior.strength)])
    p = torch.exp(-model.num_data * strength)
    q = torch.cat([t.double().flatten() for t in guide.expected_gates()])
    patterns = torch.tensor(list(itertools.product([0, 1], repeat=len(p))))
    channels, rungs = patterns[:, : layout.num_channels], patterns[:, layout.num_channels :]
    rungs = rungs.reshape(len(patterns), len(layout.tensors), -1)
    parents = torch.stack([layout.any_channel(channels).long(), *rungs.unbind(2)[:-1]], 2)
    parents = torch.cat([torch.ones_like(channels), parents.flatten(1)], 1)
    possible = (patterns <= parents).all(1)
    patterns, parents = patterns[possible], parents[possible].bool()

    def log_probability(on: Tensor) -> Tensor:
        each = torch.where(patterns.bool(), on.log(), torch.log1p(-on))
        return torch.where(parents, each, torch.zeros(())).sum(1)

    log_q, log_p = log_probability(q), log_probability(p)
    assert log_q.exp().sum().item() == pytest.approx(1)
    assert log_p.exp().sum().item() == pytest.approx(1)
    return (log_q.exp() * (log_q - log_p)).sum()


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("simplified", [False, True])
def test_the_loss_is_scaled_cross_entropy_of_the_sampled_gates_plus_a_constant_kl(
    make_model: MakeModel, draw: Draw, batches: list[Batch], guide_class: type[AbstractGateGuide], simplified: bool
) -> None:
    """Pyro samples the KL in silence where it finds none registered; then the difference would vary."""
    model = make_model(simplified=simplified)
    guide = randomize(guide_class(model.prior))
    elbo, (x, y) = elbo_module(model, guide), batches[0]
    differences, likelihoods = [], []
    for seed in range(8):
        pyro.set_rng_seed(seed)
        gates = draw(guide)
        likelihoods.append(24 / 8 * F.cross_entropy(model.net(x, gates=gates), y, reduction="sum").item())
        pyro.set_rng_seed(seed)
        differences.append(elbo(x, y).item() - likelihoods[-1])
    assert differences == pytest.approx([gate_kl_nats(guide, model.prior, 24)] * 8, rel=1e-5)
    assert max(likelihoods) - min(likelihoods) > 0.05


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize(("bits", "hidden"), [((2, 4), 3), ((2, 4, 8), 2)])
def test_the_kl_is_that_of_all_gate_patterns(
    make_model: MakeModel, data: Batch, guide_class: type[AbstractGateGuide], bits: tuple[int, ...], hidden: int
) -> None:
    model = make_model(0.02, bits=bits, hidden=hidden, likelihood=blind)
    guide = randomize(guide_class(model.prior))
    expected = kl_by_enumeration(model, guide)
    value = kl_by_elbo(model, guide, data)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert value.item() > 1
    logits = [guide.channel_logits, guide.tensor_logits]
    for gradient, exact in zip(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)


def test_the_kl_s_gradient_is_the_one_worked_out_by_hand(make_model: MakeModel, data: Batch) -> None:
    r"""With l the log-odds and c = kl_4 + q_4 kl_8 the cost of what a parent leads to:

    dKL/dl_4 = q_4 (1 - q_4) (l_4 - logit p_4 + kl_8), and for channel i
    dKL/dl_2i = q_i (1 - q_i) (l_i - logit p_i) + q_i prod_{j} (1 - q_j) c.
    """
    model = make_model(0.02, bits=(2, 4, 8), hidden=2, likelihood=blind)
    guide = randomize(HardConcreteGuide(model.prior))
    kl_by_elbo(model, guide, data).backward()
    q, prior = guide.probabilities(), model.prior

    def link(on: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """KL of one gate and its derivative with respect to the gate's log-odds."""
        p = torch.exp(-24 * strength)
        kl = on * (on / p).log() + (1 - on) * ((1 - on) / (1 - p)).log()
        return kl, on * (1 - on) * (on.logit() - p.logit())

    kl4, slope4 = link(q.tensors[:, 0], prior.strength[:, 0])
    kl8, slope8 = link(q.tensors[:, 1], prior.strength[:, 1])
    _, slope2 = link(q.channels, prior.channel_strength)
    q4, dead = q.tensors[:, 0], (1 - q.channels).prod()
    reach = torch.stack([1 - dead, torch.tensor(1.0), torch.tensor(1.0)])
    expected4, expected8 = reach * (slope4 + q4 * (1 - q4) * kl8), reach * q4 * slope8
    torch.testing.assert_close(guide.tensor_logits.grad, torch.stack([expected4, expected8], 1))
    torch.testing.assert_close(guide.channel_logits.grad, slope2 + q.channels * dead * (kl4 + q4 * kl8)[0])


def test_the_simplified_penalty_is_the_paper_s_regularizer(make_model: MakeModel, data: Batch) -> None:
    r"""mu times 1/C sum_c q_2c [2m + q_4 (4m + q_8 (8m))] for the prunable weight, q_4 (4m + ...) for the others."""
    model = make_model(0.3, bits=(2, 4, 8), likelihood=blind, simplified=True)
    guide = randomize(HardConcreteGuide(model.prior))
    q, m = guide.probabilities(), tensor_macs(model.net)
    chains = q.tensors[:, 0] * (4 * m + q.tensors[:, 1] * 8 * m)
    expected = 0.3 * ((q.channels * (2 * m[0] + chains[0])).mean() + chains[1:].sum())
    assert kl_by_elbo(model, guide, data).item() / 24 == pytest.approx(expected.item(), rel=1e-5)


def test_minibatch_losses_average_to_the_loss_of_all_data(
    make_model: MakeModel, batches: list[Batch], data: Batch
) -> None:
    """Batches weigh by their size; the gates are pinned, so that all losses share them."""
    model = make_model()
    model.prior.pin("*", bits=4).pin_channels()
    elbo = elbo_module(model, HardConcreteGuide(model.prior))
    losses = [elbo(x, y).item() * len(y) / 24 for x, y in batches]
    assert sum(losses) == pytest.approx(elbo(*data).item(), rel=1e-5)
    assert elbo(*data).item() == pytest.approx(F.cross_entropy(elbo_logits(model, data[0]), data[1]).item() * 24)


def elbo_logits(model: GatedModel, x: Tensor) -> Tensor:
    gates = model.net.open_gates()
    gates.tensors[:, 1:] = 0
    logits: Tensor = model.net(x, gates=gates)
    return logits


def test_the_simplified_loss_per_sample_does_not_depend_on_the_size_of_the_data(
    make_model: MakeModel, data: Batch
) -> None:
    """mu is the strength per data point, lambda / N."""
    losses = {}
    for simplified, size in itertools.product([True, False], [24, 48]):
        model = make_model(num_data=size, simplified=simplified)
        guide = HardConcreteGuide(model.prior, init=-0.5)
        pyro.set_rng_seed(0)
        losses[simplified, size] = elbo_module(model, guide)(*data).item() / size
    assert losses[True, 24] == pytest.approx(losses[True, 48], rel=1e-6)
    assert abs(losses[False, 24] - losses[False, 48]) > 0.01  # entropy counts once per data set


def test_particles_average_over_draws_of_the_gates(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = HardConcreteGuide(model.prior, init=0.0)
    pyro.set_rng_seed(3)
    singles = [elbo_module(model, guide)(*data).item() for _ in range(3)]
    pyro.set_rng_seed(3)
    assert elbo_module(model, guide, num_particles=3)(*data).item() == pytest.approx(sum(singles) / 3)
    assert len(set(singles)) == 3


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("simplified", [False, True])
def test_kl_in_nats_is_the_kl_of_the_elbo(
    make_model: MakeModel, data: Batch, guide_class: type[AbstractGateGuide], simplified: bool
) -> None:
    model = make_model(simplified=simplified, likelihood=blind)
    model.prior.pin("2.weight", bits=4)
    guide = randomize(guide_class(model.prior))
    expected = kl_by_elbo(model, guide, data).item()
    assert gate_kl_nats(guide, model.prior, 24) == pytest.approx(expected, rel=1e-5)
    assert expected > 1


def test_pinned_gates_have_no_kl(make_model: MakeModel) -> None:
    model = make_model()
    guide = randomize(HardConcreteGuide(model.prior))
    model.prior.pin_gates(guide.hard_gates())
    assert gate_kl_nats(guide, model.prior, 24) == 0


def test_no_latent_variable_means_no_kl(data: Batch) -> None:
    net = nn.Linear(3, 2)
    loss = elbo_module(PlainModel(net, 24), EmptyGuide())(*data)
    assert loss.item() == pytest.approx(F.cross_entropy(net(data[0]), data[1], reduction="sum").item(), rel=1e-6)


def names(module: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    known = {id(p): name for name, p in module.named_parameters()}
    return [known[id(p)] for p in parameters]


def test_parameter_groups_are_disjoint_and_complete(make_model: MakeModel) -> None:
    model = make_model(likelihood=NormalLikelihood())
    guide = HardConcreteGuide(model.prior)
    groups = parameter_groups(model, guide)
    assert names(guide, groups.gates) == ["channel_logits", "tensor_logits"]
    assert names(model, groups.ranges) == ["net.quantizers.log_range"]
    layers = [f"net.net.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    assert sorted(names(model, groups.weights)) == sorted(["likelihood.log_scale", *layers])
    everything = [id(p) for p in elbo_module(model, guide).parameters()]
    assert sorted(everything) == sorted(id(p) for p in groups.weights + groups.gates + groups.ranges)


def test_frozen_parameters_are_in_no_group(make_model: MakeModel) -> None:
    model = make_model()
    guide = HardConcreteGuide(model.prior)
    model.net.net[0].requires_grad_(False)  # type: ignore[index]
    model.net.quantizers.requires_grad_(False)
    guide.channel_logits.requires_grad_(False)
    groups = parameter_groups(model, guide)
    assert names(model, groups.weights) == ["net.net.2.weight", "net.net.2.bias"]
    assert groups.ranges == []
    assert names(guide, groups.gates) == ["tensor_logits"]


class Handmade(nn.Module):
    """A guide without our base class: one logit for all channels, one for all residual gates."""

    def __init__(self, model: GatedModel, logit: float) -> None:
        super().__init__()
        self.layout = model.net.layout
        self.logit = nn.Parameter(torch.tensor(logit))
        self.own = [model.prior]  # a list, so that the prior is no submodule

    def forward(self, *args: object) -> None:
        prior, everywhere = self.own[0], self.logit.expand
        with pyro.plate("channels", self.layout.num_channels):
            root = HardConcrete(everywhere(self.layout.num_channels))
            channels = pyro.sample("z2", root)
        on, reach = prior.any_on(channels), prior.reach(root.logit_on)
        with pyro.plate("tensors", len(self.layout.tensors)):
            for site in self.layout.residual_sites:
                gate = HardConcrete(everywhere(len(self.layout.tensors)), reach, on)
                on, reach = pyro.sample(site, gate), reach * gate.prob_on


def test_a_guide_written_by_hand_has_the_same_objective(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    ours, handmade = HardConcreteGuide(model.prior, init=0.3), Handmade(model, 0.3)
    losses = []
    for guide in (ours, handmade):
        pyro.set_rng_seed(5)
        losses.append(elbo_module(model, guide)(*data))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    assert ours.tensor_logits.grad is not None
    assert ours.channel_logits.grad is not None
    total = ours.tensor_logits.grad.sum() + ours.channel_logits.grad.sum()
    torch.testing.assert_close(handmade.logit.grad, total)


def test_the_gates_a_trace_replays_are_the_guide_s(make_model: MakeModel, data: Batch) -> None:
    model = make_model()
    guide = HardConcreteGuide(model.prior, init=0.0)
    drawn: Any = poutine.trace(guide).get_trace(*data)
    replayed: Any = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*data)
    sites = [site for site in drawn.stochastic_nodes if site.startswith("z")]
    assert all(torch.equal(drawn.nodes[site]["value"], replayed.nodes[site]["value"]) for site in sites)
    gates = (drawn.nodes["z2"]["value"], torch.stack([drawn.nodes[f"z{b}"]["value"] for b in (4, 8, 16, 32)], 1))
    logits = model.net(data[0], gates=type(model.net.open_gates())(*gates))
    torch.testing.assert_close(
        replayed.nodes["obs"]["fn"].log_prob(data[1]), -F.cross_entropy(logits, data[1], reduction="none")
    )
