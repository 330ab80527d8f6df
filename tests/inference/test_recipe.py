"""Learning rates, schedules and optimizers of a recipe."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from pyro_bbits.inference import FINE_TUNING, Recipe
from pyro_bbits.inference.objective import ParameterGroups
from pyro_bbits.inference.recipe import Optimizers, Schedule


def groups(logit: float = 6.0) -> ParameterGroups:
    weights, gates, ranges = (nn.Parameter(torch.tensor([value])) for value in (1.0, logit, 0.0))
    return ParameterGroups([weights], [gates], [ranges])


def run(recipe: Recipe, parameters: ParameterGroups, epochs: int, steps: int) -> list[list[float]]:
    """Learning rates of every step, one list per optimizer, for a loss with gradient 1 everywhere."""
    optimizers = Optimizers(recipe, parameters, epochs, steps)
    everything = parameters.weights + parameters.gates + parameters.ranges
    rates: list[list[float]] = [[] for _ in optimizers.all]
    for epoch in range(epochs):
        for index in range(steps):
            optimizers.step(torch.stack([p.sum() for p in everything]).sum(), epoch, index)
            for seen, optimizer in zip(rates, optimizers.all, strict=True):
                seen.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        # constant through epoch int(2E / 3), counted from 0, then linear towards zero
        (9, [1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]),
        (10, [1, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (2, [1, 1]),
        (1, [1]),
    ],
)
def test_tail_is_constant_for_two_thirds_then_linear(epochs: int, expected: list[float]) -> None:
    factors = [Recipe().factor(epoch, epochs, step) for step in (0.0, 0.9) for epoch in range(epochs)]
    assert factors == pytest.approx(expected * 2)


def test_cosine_falls_from_one_to_zero_with_every_step() -> None:
    recipe = Recipe(schedule="cosine")
    factors = [recipe.factor(epoch, 4, step / 5) for epoch in range(4) for step in range(5)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)])
    assert recipe.factor(3, 4, 1.0) == pytest.approx(0, abs=1e-12)


def test_steps_are_tenths_after_each_third() -> None:
    factors = [Recipe(schedule="steps").factor(epoch, 30, 0.5) for epoch in (0, 9, 10, 19, 20, 29)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    rates = run(Recipe(gate_lr=0.2, schedule="steps", anneal_gates=True, anneal_ranges=True), groups(), 3, 1)
    assert rates == [pytest.approx([rate, rate / 10, rate / 100]) for rate in (1e-3, 0.2, 1e-3)]


def test_constant_never_changes() -> None:
    assert {Recipe(schedule="constant").factor(epoch, 7, 0.5) for epoch in range(7)} == {1.0}


def test_weights_follow_the_schedule_and_gates_and_ranges_do_not() -> None:
    weights, gates, ranges = run(Recipe(weight_lr=0.1, gate_lr=0.2, range_lr=0.3), groups(), 3, 2)
    assert weights == pytest.approx([0.1] * 6)  # of three epochs, the first three are constant
    weights, gates, ranges = run(Recipe(weight_lr=0.1, gate_lr=0.2, range_lr=0.3), groups(), 6, 1)
    assert weights == pytest.approx([0.1] * 5 + [0.05])
    assert gates == [0.2] * 6
    assert ranges == [0.3] * 6


def test_ranges_follow_the_schedule_when_asked_to() -> None:
    recipe = Recipe(schedule="cosine", gate_lr=0.2, range_lr=0.3, anneal_ranges=True)
    _, gates, ranges = run(recipe, groups(), 2, 1)
    assert gates == [0.2, 0.2]
    assert ranges == pytest.approx([0.3, 0.15])


def test_every_group_has_the_optimizer_of_the_recipe() -> None:
    parameters = groups()
    adam = Optimizers(Recipe(), parameters, 1, 1)
    assert [type(o) for o in adam.all] == [torch.optim.Adam] * 3
    sgd = Optimizers(Recipe(weight_optimizer="sgd", weight_lr=0.5), parameters, 1, 1)
    assert [type(o) for o in sgd.all] == [torch.optim.SGD, torch.optim.Adam, torch.optim.Adam]
    options = sgd.all[0].param_groups[0]
    assert (options["lr"], options["momentum"], options["nesterov"], options["weight_decay"]) == (0.5, 0.9, True, 0)
    assert [o.param_groups[0]["params"] for o in sgd.all] == [parameters.weights, parameters.gates, parameters.ranges]
    assert Optimizers(Recipe(), ParameterGroups([], [], []), 1, 1).all == []


def test_steps_do_not_add_up_gradients() -> None:
    """Nesterov with unit gradients: steps of 1.9, then 1 + 0.9 * 1.9."""
    parameters = groups()
    run(Recipe(weight_optimizer="sgd", weight_lr=0.1, schedule="constant"), parameters, 1, 2)
    assert parameters.weights[0].item() == pytest.approx(1 - 0.1 * (1.9 + 2.71))


@pytest.mark.parametrize(("optimizer", "factor"), [("adam", 1.0), ("sgd", 1.9)])
def test_weights_decay_by_a_share_per_unit_of_rate_and_nothing_else_does(optimizer: Any, factor: float) -> None:
    """Without gradients: Adam's decay is beside it, SGD's goes through momentum, 1.9 of it in the first step."""
    matrix, bias = nn.Parameter(torch.full((2, 3), 4.0)), nn.Parameter(torch.full((3,), 5.0))
    others = groups()
    parameters = ParameterGroups([matrix, bias], others.gates, others.ranges)
    recipe = Recipe(weight_optimizer=optimizer, weight_lr=0.1, weight_decay=0.2, schedule="constant")
    optimizers = Optimizers(recipe, parameters, 1, 1)
    everything = [matrix, bias, *others.gates, *others.ranges]
    before = [parameter.detach().clone() for parameter in everything]
    optimizers.step(torch.stack([0 * parameter.sum() for parameter in everything]).sum(), 0, 0)
    assert torch.allclose(matrix, before[0] * (1 - 0.1 * 0.2 * factor), rtol=1e-6)
    assert all(torch.equal(now, then) for now, then in zip(everything[1:], before[1:], strict=True))
    assert [group["lr"] for group in optimizers.all[0].param_groups] == [0.1, 0.1]


def test_the_automatic_gate_rate_is_the_paper_s_in_long_runs_and_closes_a_gate_in_short_ones() -> None:
    recipe = Recipe()
    assert recipe.resolved_gate_lr(groups(), 100_000) == 1e-3
    assert recipe.resolved_gate_lr(groups(), 4) == 0.25
    for steps in (200, 1000, 4000):
        parameters = groups()
        rate = recipe.resolved_gate_lr(parameters, steps)
        run(Recipe(gate_lr=rate), parameters, 1, steps // 5)
        assert parameters.gates[0].item() == pytest.approx(-1.6, abs=1e-2)  # P(z > 0) is 1/2 at -1.5986
    assert recipe.resolved_gate_lr(ParameterGroups([], [], []), 100_000) == 1e-3


def test_an_explicit_gate_rate_is_respected() -> None:
    assert Recipe(gate_lr=1e-5).resolved_gate_lr(groups(), 1) == 1e-5
    assert run(Recipe(gate_lr=1e-5), groups(), 1, 3)[1] == [1e-5] * 3


def test_fine_tuning_is_the_paper_s() -> None:
    expected = Recipe(1e-4, None, 1e-4, "sgd", "cosine", True)
    assert expected == FINE_TUNING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_lr": 0.0}, "weight_lr must be a finite number above 0; got 0.0"),
        ({"gate_lr": -1e-3}, "gate_lr must be a finite number above 0; got -0.001"),
        ({"range_lr": math.inf}, "range_lr must be a finite number above 0; got inf"),
        ({"weight_lr": math.nan}, "weight_lr must be a finite number above 0; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number, 0 or above; got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number, 0 or above; got inf"),
        ({"weight_optimizer": "lbfgs"}, "weight_optimizer must be 'adam' or 'sgd'; got 'lbfgs'"),
        ({"schedule": "step"}, "schedule must be one of tail, cosine, steps, constant; got 'step'"),
    ],
)
def test_impossible_recipes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


@pytest.mark.parametrize("schedule", ["tail", "cosine", "constant"])
def test_no_schedule_ever_raises_the_rate_or_ends_it_early(schedule: Schedule) -> None:
    recipe = Recipe(schedule=schedule)
    factors = [recipe.factor(epoch, 30, step / 4) for epoch in range(30) for step in range(4)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1
    assert factors[-1] > 0
