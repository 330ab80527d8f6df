"""Ternary weights against the rule of Li, Zhang, Liu 2016."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import QuantizedNetwork
from pyro_bbits.inference.baselines import Baseline, ternary
from pyro_bbits.inference.baselines.ternary import ternarize

Make = Callable[..., Baseline]


def test_threshold_and_scale_by_hand() -> None:
    w = torch.tensor([1.0, -2.0, 0.5, -0.5, 0.0, 2.0])  # mean magnitude 1, threshold 0.7
    torch.testing.assert_close(ternarize(w), 5 / 3 * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 1.0]))


def test_scale_is_the_best_one_for_its_signs() -> None:
    """Least squares: the scale is the projection of the weight on the signs."""
    w = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = ternarize(w)
    signs = out.sign()
    assert out.abs().max().item() == pytest.approx(((w * signs).sum() / signs.square().sum()).item())


def test_threshold_is_near_the_best_for_normal_weights() -> None:
    w = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = (w - ternarize(w)).square().mean().item()

    def at(threshold: float) -> float:
        kept = w.abs() > threshold
        return (w - w.sign() * kept * w.abs()[kept].mean()).square().mean().item()

    assert error < 1.01 * min(at(t / 20) for t in range(1, 40))


def test_gradient_is_passed_straight_through() -> None:
    w, weight = torch.randn(30, requires_grad=True), torch.rand(30)
    (grad,) = torch.autograd.grad((ternarize(w) * weight).sum(), w)
    torch.testing.assert_close(grad, weight, rtol=0, atol=0)


def test_all_zero_weights_stay_zero() -> None:
    assert not ternarize(torch.zeros(4)).any()


def test_weights_are_ternary_and_activations_stay_float(make: Make, net: nn.Module) -> None:
    network = make(ternary).model.net
    assert isinstance(network, QuantizedNetwork) and network.rule is not None
    weight = net.get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert len(network.rule(1, weight).unique()) == 3
    x = torch.rand(7)
    assert network.rule(3, x) is x
