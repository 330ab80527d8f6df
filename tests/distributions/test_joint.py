"""Gates drawn together are those drawn site by site from the same noise, and their KL is that of the sites."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_bbits.distributions import AbstractRelaxedGate, GateBernoulli, HardConcrete, StraightThroughConcrete
from pyro_bbits.distributions.joint import GateBank, draw_gates, pin_logits
from pyro_bbits.gates import any_channel, reach_probability

posteriors = pytest.mark.parametrize("posterior", [HardConcrete, StraightThroughConcrete])
simplifications = pytest.mark.parametrize("simplified", [False, True])
layouts = pytest.mark.parametrize(
    ("sizes", "rungs"), [((3, 0, 5), 4), ((0, 0), 2), ((2, 1), 0), ((1,), 1), ((5000, 1), 3)]
)

NUM_DATA = 24
DOUBLE: Any = {"dtype": torch.float64}


def bank(
    sizes: tuple[int, ...],
    rungs: int,
    *,
    posterior: type[AbstractRelaxedGate] = HardConcrete,
    simplified: bool = False,
    pins: bool = False,
) -> GateBank:
    """Random logits and prices in float64."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    size, make = torch.tensor(sizes, dtype=torch.float64), DOUBLE
    channel_strength, strength = torch.rand(len(owner), **make) / 9, torch.rand(len(sizes), rungs, **make) / 9
    if pins:
        channel_strength[:2] = torch.tensor([0.0, math.inf], **make)[: len(owner)]
        strength[0, :1], strength[-1, -1:] = 0.0, math.inf
    return GateBank(
        torch.randn(len(owner), **make).requires_grad_(),
        torch.randn(len(sizes), rungs, **make).requires_grad_(),
        channel_strength,
        strength,
        owner,
        size > 0,
        size.clamp(min=1),
        owner.int(),
        size.cumsum(0).int(),
        posterior,
        0.6,
        simplified,
    )


def site_by_site(bank: GateBank, noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Channel gates, rungs and total KL by the distributions of single sites."""
    count, tensors = len(bank.owner), len(bank.prunable)
    simplified = bank.simplified
    root = bank.posterior(pin_logits(bank.channel_logits, bank.channel_strength), temperature=bank.temperature)
    channels = bank.posterior.relax(noise[:count], root.logits, bank.temperature)
    total = kl_divergence(root, GateBernoulli(NUM_DATA * bank.channel_strength, simplified=simplified)).sum()
    reach = reach_probability(root.logit_on, bank.owner, bank.prunable, bank.group_size, simplified=simplified)
    on: Tensor = any_channel(channels, bank.owner, bank.prunable)
    rungs = []
    pinned = pin_logits(bank.tensor_logits, bank.strength).unbind(1)
    for column, strength, u in zip(
        pinned, bank.strength.unbind(1), noise[count:].view(len(pinned), tensors), strict=True
    ):
        gate = bank.posterior(column, reach, on, temperature=bank.temperature)
        total = total + kl_divergence(gate, GateBernoulli(NUM_DATA * strength, on, simplified=simplified)).sum()
        on = bank.posterior.relax(u, column, bank.temperature) * (on > 0)
        reach = reach * gate.prob_on
        rungs.append(on)
    return channels, rungs, total


def slopes(bank: GateBank, total: Tensor) -> list[Tensor]:
    leaves = [leaf for leaf in (bank.channel_logits, bank.tensor_logits) if leaf.numel()]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


@posteriors
@simplifications
@layouts
@pytest.mark.parametrize("pins", [False, True])
def test_a_joint_draw_is_the_draw_site_by_site(
    sizes: tuple[int, ...], rungs: int, posterior: type[AbstractRelaxedGate], simplified: bool, pins: bool
) -> None:
    """Values to the bit; KL and gradients up to the order of sums."""
    gates = bank(sizes, rungs, posterior=posterior, simplified=simplified, pins=pins)
    noise = torch.rand(gates.size, dtype=torch.float64)
    draw, (channels, columns, kl) = draw_gates(gates, noise, NUM_DATA), site_by_site(gates, noise)
    assert draw.kl is not None and draw.kl.shape == (len(sizes),)
    assert torch.equal(draw.channels, channels)
    assert draw.tensors.shape == (len(sizes), rungs)
    assert all(torch.equal(a, b) for a, b in zip(draw.tensors.unbind(1), columns, strict=True))
    torch.testing.assert_close(draw.kl.sum(), kl, rtol=1e-12, atol=0)
    weights = torch.linspace(1, 2, len(sizes) * rungs, dtype=torch.float64).view(rungs, len(sizes))
    loss = draw.kl.sum() + draw.channels.cos().sum() + (draw.tensors.T * weights).sum()
    expected = kl + channels.cos().sum() + sum((c * w).sum() for c, w in zip(columns, weights, strict=True))
    for a, b in zip(slopes(gates, loss), slopes(gates, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@posteriors
def test_the_kl_is_that_of_all_gate_patterns(posterior: type[AbstractRelaxedGate]) -> None:
    """Two channels that feed a chain of two, and a chain without channels: sum of q log(q / p) over 64 patterns."""
    gates = bank((2, 0), 2, posterior=posterior)
    shift = posterior.shift(gates.temperature)
    q = torch.sigmoid(torch.cat([gates.channel_logits, gates.tensor_logits.flatten()]) + shift)
    p = torch.exp(-NUM_DATA * torch.cat([gates.channel_strength, gates.strength.flatten()]))
    expected = torch.zeros((), dtype=torch.float64)
    for pattern in itertools.product((0, 1), repeat=6):
        exists = (1, 1, pattern[0] | pattern[1], pattern[2], 1, pattern[4])
        if any(value > parent for value, parent in zip(pattern, exists, strict=True)):
            continue
        on, there = torch.tensor(pattern, dtype=torch.bool), torch.tensor(exists, dtype=torch.bool)
        log_q = torch.where(on, q.log(), torch.log1p(-q))[there].sum()
        expected = expected + log_q.exp() * (log_q - torch.where(on, p.log(), torch.log1p(-p))[there].sum())
    kl = draw_gates(gates, torch.rand(gates.size, dtype=torch.float64), NUM_DATA).kl
    assert kl is not None
    torch.testing.assert_close(kl.sum(), expected, rtol=1e-12, atol=0)
    for a, b in zip(slopes(gates, kl.sum()), slopes(gates, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_pins_hold_and_cost_nothing() -> None:
    gates = bank((3, 1), 2, pins=True)
    draw = draw_gates(gates, torch.rand(gates.size, dtype=torch.float64), NUM_DATA)
    assert draw.channels[:2].tolist() == [1, 0]
    assert draw.tensors[0, 0] == 1 and draw.tensors[1, 1] == 0
    assert draw.kl is not None
    channel_slope, tensor_slope = slopes(gates, draw.kl.sum() + draw.channels.sum() + draw.tensors.sum())
    assert channel_slope[:2].tolist() == [0, 0] and channel_slope[2:].all()
    assert tensor_slope[0, 0] == tensor_slope[1, 1] == 0


def test_without_data_there_is_no_kl_and_the_same_draw() -> None:
    gates = bank((3, 0), 2)
    noise = torch.rand(gates.size, dtype=torch.float64)
    bare, priced = draw_gates(gates, noise), draw_gates(gates, noise, NUM_DATA)
    assert bare.kl is None
    assert torch.equal(bare.channels, priced.channels) and torch.equal(bare.tensors, priced.tensors)


def test_a_pruned_weight_has_no_residual_gates_and_passes_them_no_gradient() -> None:
    gates = bank((2, 0), 3)
    with torch.no_grad():
        gates.channel_logits.fill_(-40)
        gates.tensor_logits.fill_(0)
    draw = draw_gates(gates, torch.full((gates.size,), 0.4, dtype=torch.float64))
    assert not draw.channels.any() and not draw.tensors[0].any() and draw.tensors[1].all()
    _, slope = slopes(gates, draw.tensors.sum())
    assert not slope[0].any() and slope[1].any()
