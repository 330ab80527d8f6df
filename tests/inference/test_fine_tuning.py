"""Fine-tuning fixes the gates by pins: weights and ranges move, nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_bbits.inference import FINE_TUNING, HardConcreteGuide, Recipe, StraightThroughGuide, evaluate, fine_tune, fit
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import GatedModel

MakeModel = Callable[..., GatedModel]
Batch = tuple[Tensor, Tensor]


def trained(
    make_model: MakeModel, batches: list[Batch], kind: type[AbstractGateGuide]
) -> tuple[GatedModel, AbstractGateGuide]:
    model = make_model(0.3)
    guide = kind(model.prior, init={2: 1.0, 16: 0.5, 32: -2.0})
    with torch.no_grad():
        guide.channel_logits[2] = -4.0
    fit(model, guide, batches, epochs=2, recipe=Recipe(gate_lr=0.05), seed=0, progress=False)
    return model, guide


@pytest.mark.parametrize("kind", [HardConcreteGuide, StraightThroughGuide])
def test_only_weights_and_ranges_move(
    make_model: MakeModel, batches: list[Batch], kind: type[AbstractGateGuide]
) -> None:
    model, guide = trained(make_model, batches, kind)
    hard, layout = guide.hard_gates(), model.net.layout
    weights, logits = copy.deepcopy(model.state_dict()), copy.deepcopy([*guide.parameters()])
    recipe = Recipe(weight_lr=0.05, range_lr=0.01, weight_optimizer="sgd", schedule="cosine", anneal_ranges=True)
    history = fine_tune(model, guide, batches, batches, epochs=6, recipe=recipe, seed=0, progress=False)
    assert {record.bits for record in history} == {layout.bits(hard)}
    assert {record.kept for record in history} == {layout.kept(hard)}
    assert 2 < max(layout.bits(hard)) < 32
    assert layout.kept(hard) == (3,)
    assert {record.kl for record in history} == {0.0}
    assert all(record.bops == pytest.approx(record.expected_bops) for record in history)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), logits, strict=True))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == {n for n, _ in model.named_parameters()}
    assert history[-1].loss < history[0].loss


def test_the_loss_is_the_cross_entropy_with_the_decided_gates(make_model: MakeModel, data: Batch) -> None:
    model = make_model(0.3)
    guide = HardConcreteGuide(model.prior, init={2: 1.0, 4: 0.3, 8: -0.95})
    before = evaluate(model, [data], guide.hard_gates("threshold")).nll
    assert before != evaluate(model, [data], guide.hard_gates("map")).nll
    history = fine_tune(model, guide, [data], [data], epochs=2, rule="threshold", progress=False)
    assert history[0].loss == pytest.approx(before, rel=1e-6)
    assert history[1].loss == pytest.approx(history[0].validation_nll, rel=1e-6)


def test_the_prior_is_pinned_and_the_guide_certain(make_model: MakeModel, data: Batch) -> None:
    model = make_model(0.3)
    guide = HardConcreteGuide(model.prior, init={2: 1.0, 4: 0.3, 8: -3.0})
    hard = guide.hard_gates()
    assert guide.probabilities().tensors[0, 0] < 1
    fine_tune(model, guide, [data], epochs=1, progress=False)
    for certain, gates in zip(guide.probabilities(), hard, strict=True):
        assert torch.equal(certain, gates)
    assert torch.equal(model.prior.strength, torch.where(hard.tensors > 0, 0.0, torch.inf))
    assert torch.equal(model.prior.channel_strength, torch.where(hard.channels > 0, 0.0, torch.inf))
    assert gate_kl_nats(guide, model.prior, 24) == 0


def test_the_paper_s_rates_are_the_default(make_model: MakeModel, batches: list[Batch]) -> None:
    runs = []
    for options in ({}, {"recipe": FINE_TUNING}, {"recipe": Recipe()}):
        model = make_model(0.3)
        guide = HardConcreteGuide(model.prior, init=0.5)
        fine_tune(model, guide, batches, epochs=2, seed=0, progress=False, **options)  # type: ignore[arg-type]
        runs.append(model.net.quantizers.log_range.detach().clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.filterwarnings("ignore:every channel of:UserWarning")
def test_a_network_pruned_away_altogether_still_runs(make_model: MakeModel, data: Batch) -> None:
    model = make_model(0.3)
    guide = HardConcreteGuide(model.prior, init={2: -9.0, 4: 3.0})
    with pytest.warns(UserWarning, match="every channel of 0 is removed"):
        history = fine_tune(model, guide, [data], [data], epochs=1, progress=False)
    assert history[0].kept == (0,)
    assert history[0].bits[0] == 0
    assert history[0].kl == 0
