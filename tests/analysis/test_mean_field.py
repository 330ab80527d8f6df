"""Coordinate ascent climbs, and stops where the gradient of the ELBO is zero."""

from itertools import pairwise

import torch

from pyro_bbits.analysis.mean_field import Factor, coordinate_ascent

CHAINS = [[0], [1, 2], [3, 4]]
ROWS = torch.tensor(  # gate 0 closed takes the chain of gates 1 and 2 with it
    [
        [on, a >= 1 and on, a >= 2 and on, b >= 1, b >= 2]
        for on in (True, False)
        for a in (range(3) if on else (0,))
        for b in range(3)
    ]
)
PARENTS = torch.stack([torch.ones(12).bool(), ROWS[:, 0], ROWS[:, 1], torch.ones(12).bool(), ROWS[:, 3]], 1)
FACTORS = [Factor.of(chain, ROWS, PARENTS) for chain in CHAINS]


def elbo(p: torch.Tensor, log_joint: torch.Tensor) -> torch.Tensor:
    """By the definition, gate by gate."""
    log_q = (ROWS * p.log() + (PARENTS & ~ROWS) * torch.log1p(-p)).sum(1)
    return (log_q.exp() * (log_joint - log_q)).sum()


def test_factors_are_the_channel_and_the_widths_of_each_tensor() -> None:
    assert [len(factor.states) for factor in FACTORS] == [2, 3, 3]
    assert [sum(map(len, factor.members)) for factor in FACTORS] == [12, 9, 12]
    p = torch.rand(5).double()
    total = sum((f.spread(f.table(p)) for f in FACTORS), torch.zeros(12).double())
    torch.testing.assert_close(total.exp().sum(), torch.tensor(1.0).double())
    for factor, chain in zip(FACTORS, CHAINS, strict=True):
        torch.testing.assert_close(factor.conditional(factor.table(p)), p[chain])


def test_every_sweep_climbs_and_the_end_is_stationary() -> None:
    log_joint = 2 * torch.randn(12).double()
    start = torch.full((5,), 0.5).double()
    values = [elbo(coordinate_ascent(FACTORS, log_joint, start, n), log_joint).item() for n in range(1, 8)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))
    end = coordinate_ascent(FACTORS, log_joint, start, 1000)
    logits = torch.logit(end).requires_grad_()
    elbo(torch.sigmoid(logits), log_joint).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-4
    assert elbo(start, log_joint) < values[0] <= log_joint.logsumexp(0)


def test_impossible_configurations_are_left() -> None:
    """Configurations with gate 3 closed have probability 0 to float64."""
    log_joint = torch.where(ROWS[:, 3], torch.zeros(12), torch.full((12,), -2000.0)).double()
    end = coordinate_ascent(FACTORS, log_joint, torch.full((5,), 0.5).double(), 50)
    assert end[3] == 1 and end.isfinite().all()
    torch.testing.assert_close(end[4], torch.tensor(0.5).double())
