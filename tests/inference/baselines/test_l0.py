"""L0 pruning against the equations of Louizos et al. 2018."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_bbits.inference import HardConcreteGuide, fit
from pyro_bbits.inference.baselines import Baseline, l0
from pyro_bbits.inference.objective import elbo_module, gate_kl_nats
from pyro_bbits.models import GatedModel

Make = Callable[..., Baseline]
GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3


def parts(baseline: Baseline) -> tuple[GatedModel, HardConcreteGuide]:
    assert isinstance(baseline.model, GatedModel) and isinstance(baseline.guide, HardConcreteGuide)
    return baseline.model, baseline.guide


@pytest.mark.parametrize(("per_weight", "sizes"), [(True, [9.0] * 4 + [36.0] * 4), (False, [1.0] * 8)])
def test_penalty_is_the_expected_number_of_weights(per_weight: bool, sizes: list[float], make: Make) -> None:
    """Lambda times the sum of sigmoid(log alpha - beta log(-gamma / zeta)), each with its group's size."""
    model, guide = parts(make(l0, penalty=0.02, per_weight=per_weight))
    logits = torch.linspace(-3, 3, 8)
    with torch.no_grad():
        guide.channel_logits.copy_(logits)
    shift = BETA * math.log(-GAMMA / ZETA)
    expected = sum(n / (1 + math.exp(-(phi - shift))) for n, phi in zip(sizes, logits.tolist(), strict=True))
    assert gate_kl_nats(guide, model.prior, 48) / 48 == pytest.approx(0.02 * expected, rel=1e-5)


def test_loss_is_the_error_plus_the_penalty(make: Make) -> None:
    model, guide = parts(make(l0, penalty=0.02, init=50.0))  # gates are 1 for certain
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
    model.eval()
    error = -model.predict(x).log_prob(y).mean().item()
    loss = elbo_module(model, guide)(x, y).item() / 48
    assert loss == pytest.approx(error + 0.02 * (4 * 9 + 4 * 36), rel=1e-4)


def test_gates_are_stretched_and_clipped_concrete_variables() -> None:
    """As the paper writes them, from the same noise."""
    u, phi = torch.linspace(0.01, 0.99, 99), torch.tensor(0.7)
    s = torch.sigmoid((u.log() - (1 - u).log() + phi) / BETA)
    expected = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    torch.testing.assert_close(HardConcreteGuide.distribution.relax(u, phi, BETA), expected)


def test_only_channels_are_learned(make: Make) -> None:
    baseline = make(l0)
    model, guide = parts(baseline)
    assert guide.tensor_logits.numel() == 0 and guide.channel_logits.numel() == 8
    assert set(baseline.bits().values()) == {32}
    assert torch.isfinite(model.prior.channel_strength).all() and (model.prior.channel_strength > 0).all()


def test_a_high_price_closes_channels_and_the_cost_follows(make: Make, batches: list[tuple[Tensor, Tensor]]) -> None:
    baseline = make(l0, penalty=1.0, init=0.5)
    before = baseline.relative_bops()
    with pytest.warns(UserWarning, match="every channel"):
        fit(baseline.model, baseline.guide, batches, recipe=baseline.recipe, epochs=12, progress=False, seed=0)
    assert baseline.relative_bops() < before


def test_bad_penalty_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="penalty"):
        make(l0, penalty=0.0)
