"""Refined gates are at the optimum that enumeration finds, wherever they start."""

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from pyro_bbits import GateProbabilities
from pyro_bbits.analysis import ExactPosterior
from pyro_bbits.inference import (
    BernoulliGuide,
    HardConcreteGuide,
    StraightThroughGuide,
    elbo_module,
    refine_gates,
)
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.models import GatedModel

Batch = tuple[Tensor, Tensor]
MakeModel = Callable[..., GatedModel]


@pytest.mark.parametrize("guide_class", [HardConcreteGuide, StraightThroughGuide, BernoulliGuide])
@pytest.mark.parametrize("init", [4.0, -2.0])
def test_refined_gates_are_nearly_the_best_mean_field(
    make_model: MakeModel, data: Batch, guide_class: type[AbstractGateGuide], init: float
) -> None:
    """Two channels and three tensors; a few hundredths of a nat are left to the draws."""
    model = make_model(0.02, hidden=2, bits=(2, 4, 8))
    exact, guide = ExactPosterior.from_model(model, [data]), guide_class(model.prior, init=init)
    best, before = exact.gap(exact.best_mean_field()), exact.gap(guide.probabilities())
    refine_gates(model, guide, progress=False, data=[data], draws=30, channels=True)
    after = exact.gap(guide.probabilities())
    assert before > best + 0.5
    assert best - 1e-9 <= after < best + 0.05


def test_gates_without_a_signal_get_exactly_their_prior(make_model: MakeModel) -> None:
    """The likelihood is the same for all gates, so nothing depends on the draws; one sweep is enough for tensors."""
    model = make_model(
        0.02,
        hidden=3,
        bits=(2, 4, 8),
        likelihood=lambda output: pyro.distributions.Normal(torch.zeros(len(output)), 1.0),
    )
    guide = HardConcreteGuide(model.prior)
    refine_gates(model, guide, progress=False, data=[(torch.rand(24, 3), torch.zeros(24))], draws=1, channels=True)
    found = guide.probabilities()
    torch.testing.assert_close(found.channels, torch.exp(-24 * model.prior.channel_strength))
    torch.testing.assert_close(found.tensors, torch.exp(-24 * model.prior.strength))


def test_closed_gates_stop_short_in_training_and_not_here(make_model: MakeModel, data: Batch) -> None:
    """Adam leaves gates of 48 and of 480 nats at nearly the same probability; the optimum tells them apart."""
    left = {}
    for nats in (48, 480):
        model = make_model(0.0, bits=(2, 4)).requires_grad_(False)
        model.prior.pin_channels().strength.fill_(nats / 24)
        guide = HardConcreteGuide(model.prior)
        elbo, optimizer = elbo_module(model, guide), torch.optim.Adam(guide.parameters(), lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            (elbo(*data) / 24).backward()
            optimizer.step()
        left[nats] = guide.probabilities().tensors
        refine_gates(model, guide, progress=False, data=[data], draws=2)
        log_odds = guide.log_odds()[1]
        assert ((log_odds + nats).abs() < 20).all(), "prior odds, and what the data are worth"
    assert (left[48] < 0.05).all() and (left[480] > 1e-4).all()
    assert (left[48] / left[480] < 3).all()


def test_pinned_gates_and_unasked_channels_stay(make_model: MakeModel, data: Batch) -> None:
    model = make_model(0.02, hidden=3, bits=(2, 4, 8))
    model.prior.pin("2.input", bits=4)
    model.prior.channel_strength[0] = 0.0
    guide = HardConcreteGuide(model.prior, init=0.3)
    before = guide.log_odds()
    refine_gates(model, guide, progress=False, data=[data], draws=3)
    after = guide.log_odds()
    row = model.prior.layout.tensors.index("2.input")
    assert after[1][row].tolist() == [math.inf, -math.inf]
    torch.testing.assert_close(after[0], before[0])
    assert not torch.isclose(after[1][:2], before[1][:2]).any()
    assert all(p.isfinite().all() for p in guide.parameters())


def test_partly_pinned_chains_come_to_their_optimum(make_model: MakeModel, data: Batch) -> None:
    """One tensor may have 4 or 8 bits, one 2 or 4, one is free; nothing else is random."""
    model = make_model(0.01, bits=(2, 4, 8, 16))
    prior = model.prior.pin_channels()
    prior.strength[0, 0], prior.strength[0, 2] = 0.0, math.inf
    prior.strength[1, 1] = math.inf
    exact, guide = ExactPosterior.from_model(model, [data]), HardConcreteGuide(prior, init=-1.0)
    assert len(exact) == 2 * 2 * 4
    refine_gates(model, guide, progress=False, data=[data], draws=20, sweeps=3)
    assert exact.gap(guide.probabilities()) < exact.gap(exact.best_mean_field()) + 0.02


def test_batches_stand_for_the_whole_data_set(make_model: MakeModel, data: Batch) -> None:
    """The same points three times over, in batches, for a model of three times as many."""
    results, parts = [], list(zip(*(d.split(8) for d in data), strict=True))
    for num_data, loader in ((24, [data]), (72, [data]), (72, 3 * parts)):
        model = make_model(0.02, num_data=num_data, hidden=2, bits=(2, 4)).train()
        guide = HardConcreteGuide(model.prior)
        refine_gates(model, guide, progress=False, data=loader, draws=4)
        assert model.training
        results.append(guide.log_odds()[1])
    torch.testing.assert_close(results[1], results[2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(results[0], results[1], atol=0.1)


def test_refinement_is_reproducible(make_model: MakeModel, data: Batch) -> None:
    def run(seed: int) -> GateProbabilities:
        model = make_model(0.02, hidden=2, bits=(2, 4))
        guide = HardConcreteGuide(model.prior, init=-1.0)
        refine_gates(model, guide, progress=False, data=[data], draws=2, seed=seed)
        return guide.probabilities()

    first, again, other = (torch.cat([p.flatten() for p in run(seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_cannot_be_refined_is_refused(make_model: MakeModel, data: Batch) -> None:
    model = make_model(0.1)
    guide = HardConcreteGuide(model.prior)
    with pytest.raises(ValueError, match="draws and sweeps must be at least 1; got 0 and 2"):
        refine_gates(model, guide, [data], draws=0)
    with pytest.raises(ValueError, match="the refinement data are empty"):
        refine_gates(model, guide, [])
    with pytest.raises(ValueError, match="another prior"):
        refine_gates(model, HardConcreteGuide(make_model(0.1).prior), [data])
    simple = make_model(0.1, simplified=True)
    with pytest.raises(ValueError, match="simplified penalty is no KL"):
        refine_gates(simple, HardConcreteGuide(simple.prior), [data])
