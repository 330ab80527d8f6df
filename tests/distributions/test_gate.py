"""The prior of a gate: its probabilities, its pins, and its silence while the parent is off."""

import math
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_bbits.distributions import AbstractGate, GateBernoulli

COSTS = torch.tensor([0.0, 1e-3, 0.7, 20.0, torch.inf], dtype=torch.float64)


def test_probability_on_is_exp_of_minus_cost() -> None:
    prior = GateBernoulli(COSTS)
    assert prior.probs.tolist() == [math.exp(-cost) for cost in COSTS.tolist()]
    assert prior.probs[0] == 1 and prior.probs[-1] == 0


def test_log_prob_of_both_states_is_exact() -> None:
    """Also of a cost so small that 1 - exp(-cost) would lose its digits: log(1 - exp(-1e-12)) = log(1e-12)."""
    prior = GateBernoulli(torch.tensor([0.7, 1e-12], dtype=torch.float64))
    torch.testing.assert_close(prior.log_prob(torch.ones(2)), -prior.cost, rtol=1e-14, atol=0)
    expected = torch.tensor([math.log(1 - math.exp(-0.7)), math.log(1e-12)], dtype=torch.float64)
    torch.testing.assert_close(prior.log_prob(torch.zeros(2)), expected, rtol=1e-12, atol=0)


def test_probabilities_of_both_states_sum_to_one() -> None:
    prior = GateBernoulli(COSTS)
    total = prior.log_prob(torch.zeros(5)).exp() + prior.log_prob(torch.ones(5)).exp()
    torch.testing.assert_close(total, torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)


def test_pins_are_certain_and_never_nan() -> None:
    prior = GateBernoulli(torch.tensor([0.0, torch.inf]))
    assert prior.log_prob(torch.tensor([1.0, 0.0])).tolist() == [0, 0]
    assert prior.log_prob(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, -math.inf]
    assert (prior.sample(torch.Size([1000])) == torch.tensor([1.0, 0.0])).all()


def test_relaxed_gate_is_on_when_above_zero() -> None:
    prior = GateBernoulli(torch.tensor(0.7))
    assert prior.log_prob(torch.tensor(0.3)) == prior.log_prob(torch.tensor(1.0)) != prior.log_prob(torch.tensor(0.0))


def test_gate_of_an_off_parent_is_zero_at_no_charge() -> None:
    prior = GateBernoulli(torch.zeros(3), on=torch.tensor([0.0, 0.2, 1.0]))  # cost 0: on for certain, if at all
    assert prior.sample().tolist() == [0, 1, 1]
    prior = GateBernoulli(torch.tensor([0.7, torch.inf]), on=torch.tensor(0.0))
    assert prior.log_prob(torch.zeros(2)).tolist() == [0, 0]
    assert prior.log_prob(torch.ones(2)).tolist() == [0, 0]


def test_paths_of_a_chain_sum_to_one() -> None:
    """All patterns of four gates in which off stays off, by the sampled-parent form that a model uses."""
    costs, total = torch.rand(4, dtype=torch.float64), 0.0
    for pattern in product((0.0, 1.0), repeat=4):
        if list(pattern) == sorted(pattern, reverse=True):
            log_prob, on = torch.zeros(()), None
            for cost, value in zip(costs, pattern, strict=True):
                log_prob = log_prob + GateBernoulli(cost, on).log_prob(torch.tensor(value))
                on = torch.tensor(value)
            total += log_prob.exp().item()
    assert total == pytest.approx(1, abs=1e-12)


def test_frequencies_agree_with_log_prob() -> None:
    """Three costs, 5 standard errors: fails once in half a million seeds."""
    prior, n = GateBernoulli(torch.tensor([0.05, 0.7, 4.0], dtype=torch.float64)), 200_000
    z = prior.sample(torch.Size([n]))
    assert set(z.unique().tolist()) == {0, 1}
    p = prior.log_prob(torch.ones(3)).exp()
    assert ((z.mean(0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_cost_and_parent_broadcast() -> None:
    prior = GateBernoulli(torch.rand(3), on=torch.ones(2, 1))
    assert prior.batch_shape == (2, 3) and prior.event_shape == ()
    assert prior.sample(torch.Size([5])).shape == prior.log_prob(torch.zeros(5, 2, 3)).shape == (5, 2, 3)


@pytest.mark.parametrize("on", [None, torch.tensor(1.0), torch.tensor(0.0)])
def test_plate_keeps_type_and_options(on: Tensor | None) -> None:
    def program() -> None:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("gate", GateBernoulli(torch.tensor(0.7), on, simplified=True))

    site: Any = poutine.trace(program).get_trace().nodes["gate"]
    gate = site["fn"]
    assert type(gate) is GateBernoulli and isinstance(gate, AbstractGate)
    assert gate.batch_shape == gate.cost.shape == site["value"].shape == (4, 3)
    assert gate.simplified and (gate.cost == 0.7).all()
    parent: Any = gate.on
    assert parent is None if on is None else torch.equal(parent, (on > 0).expand(4, 3))
    lone = GateBernoulli(torch.tensor(0.7), on).log_prob(torch.zeros(()))
    assert torch.equal(gate.log_prob(torch.zeros(4, 3)), lone.expand(4, 3))


def test_expanding_keeps_validation_off() -> None:
    assert not GateBernoulli(torch.tensor(0.7), validate_args=False).expand([2])._validate_args
    assert GateBernoulli(torch.tensor(0.7), validate_args=True).expand([2])._validate_args


def test_relaxed_values_are_in_the_support() -> None:
    """Pyro's validation checks the values that the guide hands to the model."""
    values = torch.tensor([-0.1, 0.0, 0.3, 1.0, 1.1])
    assert GateBernoulli(torch.tensor(0.7)).support.check(values).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("cost", [-1e-6, -math.inf, math.nan])
def test_costs_below_zero_are_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=r"parameter cost .* of distribution GateBernoulli"):
        GateBernoulli(torch.tensor([1.0, cost]), validate_args=True)
