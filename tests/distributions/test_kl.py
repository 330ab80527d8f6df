"""The KL of a gate chain equals enumeration of every gate pattern, and Pyro's mean-field ELBO really uses it."""

import math
from itertools import product

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.kl import _dispatch_kl

from pyro_bbits.distributions import AbstractRelaxedGate, GateBernoulli, HardConcrete, StraightThroughConcrete, gate_kl

posteriors = pytest.mark.parametrize("posterior", [HardConcrete, StraightThroughConcrete])


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_bernoulli(p: Tensor, value: int) -> Tensor:
    return torch.log(p if value else 1 - p)


def enumerated_kl(q: list[Tensor], p: list[Tensor]) -> Tensor:
    """KL between two chains of independent gates per level, over all patterns of all gates.

    A level exists while any gate of the level before is on; past that, patterns with a gate on have probability 0.
    """
    total = torch.zeros((), dtype=torch.float64)
    for levels in product(*(tuple(product((0, 1), repeat=len(level))) for level in q)):
        log_q, log_p, on = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), True
        for q_level, p_level, values in zip(q, p, levels, strict=True):
            if on:
                log_q = log_q + sum(log_bernoulli(a, v) for a, v in zip(q_level, values, strict=True))
                log_p = log_p + sum(log_bernoulli(a, v) for a, v in zip(p_level, values, strict=True))
            elif any(values):
                log_q = torch.tensor(-math.inf, dtype=torch.float64)
            on = on and any(values)
        if log_q > -math.inf:
            total = total + log_q.exp() * (log_q - log_p)
    return total


def chain(
    posterior: type[AbstractRelaxedGate], logits: list[Tensor], costs: list[Tensor], *, simplified: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Sum of the links' KL, each weighted by the probability that a gate of the level before is on; and those q."""
    total, reach, q = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), []
    for level, cost in zip(logits, costs, strict=True):
        gate = posterior(level, reach)
        total = total + gate_kl(gate, GateBernoulli(cost, simplified=simplified)).sum()
        reach = reach * (1 - torch.prod(1 - gate.prob_on))
        q.append(gate.prob_on)
    return total, q


@posteriors
def test_chain_kl_equals_enumeration(posterior: type[AbstractRelaxedGate]) -> None:
    """200 random chains of 1 to 5 gates: value, and gradient in every logit."""
    for index in range(200):
        length = index % 5 + 1
        logits = [torch.empty(1, dtype=torch.float64).uniform_(-4, 4).requires_grad_() for _ in range(length)]
        costs = [torch.empty(1, dtype=torch.float64).uniform_(-3, 2).exp() for _ in range(length)]
        kl, q = chain(posterior, logits, costs)
        expected = enumerated_kl(q, [torch.exp(-cost) for cost in costs])
        torch.testing.assert_close(kl, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(kl, logits, retain_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, logits), rtol=0, atol=1e-12)


@posteriors
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_kl_of_channels_that_feed_a_tensor_equals_enumeration(
    posterior: type[AbstractRelaxedGate], channels: int
) -> None:
    """Per-channel z2 before per-tensor z4 and z8, which exist while any channel is on."""
    for _ in range(10):
        logits = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (channels, 1, 1)]
        costs = [torch.rand(n, dtype=torch.float64) * 2 + 0.01 for n in (channels, 1, 1)]
        kl, q = chain(posterior, logits, costs)
        expected = enumerated_kl(q, [torch.exp(-cost) for cost in costs])
        torch.testing.assert_close(kl, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(kl, logits, retain_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, logits), rtol=0, atol=1e-12)


@posteriors
def test_simplified_kl_is_the_papers_penalty(posterior: type[AbstractRelaxedGate]) -> None:
    """Sum over the rungs of cost times the product of all q up to there: no entropy, no charge for staying off."""
    logits = [torch.randn(1, dtype=torch.float64) for _ in range(4)]
    costs = [torch.rand(1, dtype=torch.float64) * 10 for _ in range(4)]
    kl, q = chain(posterior, logits, costs, simplified=True)
    on = torch.cat(q).cumprod(0)
    torch.testing.assert_close(kl, (torch.cat(costs) * on).sum(), rtol=1e-14, atol=0)


@posteriors
def test_kl_by_hand(posterior: type[AbstractRelaxedGate]) -> None:
    """q = 1/2 and p = 1/4: 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3); reached with probability 0.3."""
    zero = posterior(double(0.0)).logit_on  # where the log-odds of being on are for a logit of 0
    gate, prior = posterior(-zero, 0.3), GateBernoulli(double(math.log(4)))
    assert gate.prob_on.item() == pytest.approx(0.5)
    assert gate_kl(gate, prior).item() == pytest.approx(0.3 * 0.5 * math.log(4 / 3), abs=1e-15)


@settings(deadline=None)
@given(st.floats(-30, 30), st.floats(2.0**-20, 50))
def test_kl_is_positive_and_zero_at_the_prior(logit: float, cost: float) -> None:
    prior = GateBernoulli(double(cost))
    assert gate_kl(StraightThroughConcrete(double(logit)), prior) >= -1e-14
    same = StraightThroughConcrete(-torch.log(torch.expm1(prior.cost)))  # sigmoid of it is exp(-cost)
    assert abs(gate_kl(same, prior).item()) <= 1e-13


@posteriors
@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("logit", [-2.0, 3.0, math.inf, -math.inf])
def test_pinned_gates_cost_nothing_and_pass_no_gradient(
    posterior: type[AbstractRelaxedGate], simplified: bool, logit: float
) -> None:
    """Next to a free gate, whose gradient they must not disturb."""
    logits = torch.tensor([logit, logit, 0.4], requires_grad=True)
    reach = torch.full((3,), 0.5, requires_grad=True)
    prior = GateBernoulli(torch.tensor([0.0, math.inf, 1.3]), simplified=simplified)
    kl = gate_kl(posterior(logits, reach), prior)
    assert kl[:2].tolist() == [0, 0] and kl[2] > 0
    kl.sum().backward()
    for leaf in (logits, reach):
        assert leaf.grad is not None and leaf.grad[:2].tolist() == [0, 0]
        assert leaf.grad[2].isfinite() and leaf.grad[2] != 0


@posteriors
def test_certain_posterior_pays_the_prior_of_its_state(posterior: type[AbstractRelaxedGate]) -> None:
    """A gate that is on costs lambda, one that is off -log(1 - exp(-lambda)): 0 log 0 is 0, not NaN."""
    logits = torch.tensor([math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    kl = gate_kl(posterior(logits), GateBernoulli(double(1.3, 1.3)))
    torch.testing.assert_close(kl, double(1.3, -math.log(1 - math.exp(-1.3))))
    kl.sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [0, 0]


@posteriors
@pytest.mark.parametrize("simplified", [True, False])
def test_large_costs_stay_finite_in_float32(posterior: type[AbstractRelaxedGate], simplified: bool) -> None:
    """The scale of mu = 0.1 on 60 000 images; up to the entropy, at most log 2, the KL is then cost times q."""
    logits = torch.tensor([-40.0, -6.0, 0.0, 6.0, 40.0], requires_grad=True)
    gate = posterior(logits)
    kl = gate_kl(gate, GateBernoulli(torch.full((5,), 6000.0), simplified=simplified))
    torch.testing.assert_close(kl, 6000 * gate.prob_on, rtol=1e-6, atol=0 if simplified else math.log(2))
    kl.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[1:4] > 0).all()


@posteriors
@pytest.mark.parametrize("simplified", [True, False])
def test_torch_finds_the_registered_kl(posterior: type[AbstractRelaxedGate], simplified: bool) -> None:
    assert _dispatch_kl(posterior, GateBernoulli) is gate_kl
    q, p = posterior(torch.randn(3), 0.4), GateBernoulli(torch.rand(3), simplified=simplified)
    assert torch.equal(kl_divergence(q, p), gate_kl(q, p))
    assert torch.equal(kl_divergence(q.expand([2, 3]), p.expand([2, 3])), gate_kl(q, p).expand(2, 3))


class Program:
    """Three channels whose gates feed two residual gates of one tensor; nothing is observed, so the loss is the KL."""

    def __init__(self, posterior: type[AbstractRelaxedGate], *, simplified: bool = False) -> None:
        self.posterior, self.simplified = posterior, simplified
        self.costs = [double(0.3, 1.0, 2.0), double(0.8), double(1.5)]
        self.logits = [double(1.0, -0.5, 0.2).requires_grad_(), double(0.7).requires_grad_(), double(-0.3)]

    def model(self) -> None:
        on = None
        for name, cost in zip(("z2", "z4", "z8"), self.costs, strict=True):
            with pyro.plate(f"{name}_plate", len(cost)):
                gate = pyro.sample(name, GateBernoulli(cost, on, simplified=self.simplified))
            on = (gate > 0).any().double()

    def guide(self) -> None:
        on, reach = None, torch.ones((), dtype=torch.float64)
        for name, logits in zip(("z2", "z4", "z8"), self.logits, strict=True):
            q = self.posterior(logits, reach, on)
            with pyro.plate(f"{name}_plate", len(logits)):
                gate = pyro.sample(name, q)
            on, reach = (gate > 0).any().double(), reach * (1 - torch.prod(1 - q.prob_on))


@posteriors
@pytest.mark.parametrize("simplified", [True, False])
def test_mean_field_elbo_is_the_analytic_kl_without_noise(
    posterior: type[AbstractRelaxedGate], simplified: bool
) -> None:
    program = Program(posterior, simplified=simplified)
    expected, q = chain(posterior, program.logits, program.costs, simplified=simplified)
    if not simplified:
        torch.testing.assert_close(
            expected, enumerated_kl(q, [torch.exp(-c) for c in program.costs]), rtol=0, atol=1e-12
        )
    leaves = program.logits[:2]
    expected_grads = torch.autograd.grad(expected, leaves, retain_graph=True)
    for _ in range(5):
        loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected_grads, rtol=0, atol=1e-12)


def test_sampled_elbo_is_noisy_and_wrong_for_the_hard_concrete() -> None:
    """What a missing registration would silently fall back to: densities against probabilities is no KL."""
    program = Program(HardConcrete)
    expected = chain(HardConcrete, program.logits, program.costs)[0].item()
    losses = torch.tensor([Trace_ELBO().loss(program.model, program.guide) for _ in range(300)])
    assert losses.std() > 0.1
    assert abs(losses.mean() - expected) > 5 * losses.std() / math.sqrt(300)


def test_sampled_elbo_of_binary_gates_agrees_on_average() -> None:
    """Straight-through gates have probabilities, so sampling is noise alone: 5 standard errors, 1 seed in a million."""
    program = Program(StraightThroughConcrete)
    expected = chain(StraightThroughConcrete, program.logits, program.costs)[0].item()
    losses = torch.tensor([Trace_ELBO().loss(program.model, program.guide) for _ in range(500)])
    assert losses.std() > 0.1
    assert abs(losses.mean() - expected) <= 5 * losses.std() / math.sqrt(500)
