"""DQ against the equations of Uhlich et al. 2020."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_bbits import QuantizedNetwork
from pyro_bbits.inference import Recipe, fit
from pyro_bbits.inference.baselines import Baseline, dq
from pyro_bbits.inference.baselines.dq import DQRule, DQTensor, dq_quantize, dq_width
from pyro_bbits.inference.objective import elbo_module, parameter_groups

Make = Callable[..., Baseline]


def paper(x: float, d: float, q: float) -> tuple[float, float, float, float]:
    """Value, and derivatives in input, step and range, number by number."""
    sign = math.copysign(1.0, x)
    if abs(x) > q:
        return sign * q, 0.0, 0.0, sign
    value = sign * d * math.floor(abs(x) / d + 0.5)
    return value, 1.0, (value - x) / d, 0.0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("d", "q"), [(0.3, 0.9), (0.11, 1.0), (0.02, 1.4)])
def test_values_and_gradients_are_the_papers(d: float, q: float, signed: bool) -> None:
    x = torch.linspace(-2, 2, 301, dtype=torch.float64).requires_grad_()
    step, top = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (d, q))
    weight = torch.rand(301, dtype=torch.float64)
    out = dq_quantize(x, step, top, signed=signed)
    (out * weight).sum().backward()
    expected = torch.tensor([paper(v, d, q) for v in x.tolist()], dtype=torch.float64)
    if not signed:
        expected[x.detach() < 0] = 0
    torch.testing.assert_close(out.detach(), expected[:, 0])
    assert x.grad is not None and step.grad is not None and top.grad is not None
    torch.testing.assert_close(x.grad, weight * expected[:, 1])
    assert step.grad.item() == pytest.approx((weight * expected[:, 2]).sum().item())
    assert top.grad.item() == pytest.approx((weight * expected[:, 3]).sum().item())


def test_gradient_of_the_range_is_the_true_one() -> None:
    x = torch.tensor([-3.0, 2.0, 5.0, 0.4], dtype=torch.float64)
    step = torch.tensor(0.25, dtype=torch.float64)

    def weighted(top: Tensor) -> Tensor:
        return (dq_quantize(x, step, top, signed=True) * torch.tensor([1.0, 2.0, 5.0, 7.0])).sum()

    assert torch.autograd.gradcheck(weighted, torch.tensor(1.1, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("signed", [True, False])
def test_width_of_whole_numbers_of_levels(signed: bool) -> None:
    for bits in range(2, 17):
        levels = 2 ** (bits - signed) - 1
        step = torch.tensor(0.0371)
        assert dq_width(step, step * levels, signed=signed).item() == bits
        assert dq_width(step, step * levels * 1.001, signed=signed).item() == bits + 1


def test_gradient_of_the_width_is_that_before_rounding() -> None:
    step, top = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 1.0))
    found = torch.autograd.grad(dq_width(step, top, signed=True), (step, top))
    ratio = 1.0 / 0.1
    slope = 1 / (math.log(2) * (ratio + 1))
    assert found[0].item() == pytest.approx(-slope * ratio / 0.1)
    assert found[1].item() == pytest.approx(slope / 0.1)


def rule_of(baseline: Baseline) -> DQRule:
    network = baseline.model.net
    assert isinstance(network, QuantizedNetwork) and isinstance(network.rule, DQRule)
    return network.rule


def test_penalty_is_the_square_of_what_exceeds_the_budget(make: Make, count: Callable[..., float]) -> None:
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
    baseline = make(dq, bits=(8, 4), budget=1.5, strength=0.3)
    excess = count((8, 8, 8), (4, 4)) - 1.5
    penalty = rule_of(baseline).penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.3 * excess**2, rel=1e-5)
    baseline.model.eval()
    elbo = elbo_module(baseline.model, baseline.guide)
    loss = elbo(x, y).item()
    rule_of(baseline).strength = 0.0
    assert loss - elbo(x, y).item() == pytest.approx(48 * 0.3 * excess**2, rel=1e-4)
    rule_of(baseline).budget = 100.0
    below = rule_of(baseline).penalty()
    assert below is not None and below.item() == 0


def test_widths_stay_within_bounds_and_come_back(make: Make) -> None:
    found = rule_of(make(dq)).quantizers[1]
    assert isinstance(found, DQTensor)
    x = torch.linspace(-1, 1, 50)
    for shift, bits in ((9.0, 2), (-30.0, 16)):
        with torch.no_grad():
            found.log_step.copy_(found.log_top + shift)
        assert found.width().item() == bits
        assert len(found(x).unique()) <= 2**bits
        (grad,) = torch.autograd.grad((found(x) * torch.rand(50)).sum(), found.log_step)
        assert grad != 0


def test_training_comes_near_its_budget(make: Make, batches: list[tuple[Tensor, Tensor]]) -> None:
    baseline = make(dq, budget=2.0, strength=1.0)
    assert baseline.relative_bops() > 5
    recipe = Recipe(range_lr=0.05)
    fit(baseline.model, baseline.guide, batches, recipe=recipe, epochs=30, progress=False)
    assert baseline.relative_bops() < 2.4
    rule_of(baseline).powers_of_two = True
    assert all(bits in (2, 4, 8, 16) for bits in baseline.bits().values())


def test_steps_and_ranges_have_a_rate_of_their_own(make: Make) -> None:
    baseline = make(dq)
    groups = parameter_groups(baseline.model, baseline.guide)
    ranges = {id(p) for p in groups.ranges}
    assert {id(p) for p in rule_of(baseline).parameters()} <= ranges
    assert not ranges & {id(p) for p in groups.weights}


def test_bad_settings_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="budget"):
        make(dq, budget=-1.0)
    with pytest.raises(ValueError, match="strength"):
        make(dq, strength=math.inf)
    with pytest.raises(ValueError, match="2 to 16"):
        make(dq, bits=(17, 8))
