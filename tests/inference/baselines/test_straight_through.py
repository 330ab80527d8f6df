"""Straight-through gates are those of Jang et al. 2017 for two classes."""

from collections.abc import Callable

import torch

from pyro_bbits.distributions import StraightThroughConcrete
from pyro_bbits.inference import StraightThroughGuide
from pyro_bbits.inference.baselines import Baseline, straight_through

Make = Callable[..., Baseline]


def test_a_gate_is_the_straight_through_gumbel_softmax_of_two_classes() -> None:
    temperature = 0.5
    gumbels = -(-torch.rand(2, 200, dtype=torch.float64).log()).log()
    phi = torch.linspace(-2, 2, 200, dtype=torch.float64).requires_grad_()
    soft = torch.softmax((torch.stack([phi, torch.zeros_like(phi)]) + gumbels) / temperature, 0)[0]
    (expected,) = torch.autograd.grad(soft.sum(), phi)
    u = torch.sigmoid(gumbels[0] - gumbels[1])  # the difference of two Gumbel variables is logistic
    hard = StraightThroughConcrete.relax(u, phi, temperature)
    (found,) = torch.autograd.grad(hard.sum(), phi)
    torch.testing.assert_close(hard.detach(), (soft > 0.5).double())
    torch.testing.assert_close(found, expected)


def test_the_guide_draws_zeros_and_ones(make: Make) -> None:
    baseline = make(straight_through, temperature=0.5)
    assert isinstance(baseline.guide, StraightThroughGuide) and baseline.guide.temperature == 0.5
    with torch.no_grad():
        baseline.guide.channel_logits.zero_()
    torch.testing.assert_close(baseline.guide.probabilities().channels, torch.full((8,), 0.5))
