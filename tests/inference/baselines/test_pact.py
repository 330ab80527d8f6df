"""PACT against the equations of Choi et al. 2018, its weights against those of Zhou et al. 2016."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import QuantizedNetwork
from pyro_bbits.inference.baselines import Baseline, pact
from pyro_bbits.inference.baselines.pact import PACTActivation, dorefa_weight, pact_quantize
from pyro_bbits.inference.baselines.tensors import TensorRule
from pyro_bbits.inference.objective import elbo_module

Make = Callable[..., Baseline]


def paper(x: float, alpha: float, bits: int) -> tuple[float, float, float]:
    """Section 3 of the paper, number by number."""
    y = 0.5 * (abs(x) - abs(x - alpha) + alpha)
    levels = 2**bits - 1
    return round(y * levels / alpha) * alpha / levels, float(0 < x < alpha), float(x >= alpha)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_activation_values_and_gradients_are_the_papers(bits: int) -> None:
    x = torch.linspace(-1, 3, 317, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(317, dtype=torch.float64)
    out = pact_quantize(x, alpha, bits)
    (out * weight).sum().backward()
    expected = torch.tensor([paper(v, 1.7, bits) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(out.detach(), expected[:, 0])
    assert x.grad is not None and alpha.grad is not None
    torch.testing.assert_close(x.grad, weight * expected[:, 1])
    assert alpha.grad.item() == pytest.approx((weight * expected[:, 2]).sum().item())


def test_gradient_of_the_clip_is_one_from_the_clip_on() -> None:
    alpha = torch.tensor(1.0, requires_grad=True)
    for value, expected in ((0.99, 0.0), (1.0, 1.0), (5.0, 1.0), (-5.0, 0.0)):
        (grad,) = torch.autograd.grad(pact_quantize(torch.tensor(value), alpha, 4), alpha)
        assert grad.item() == expected


def test_signed_activations_are_mirrored() -> None:
    x = torch.linspace(0, 2, 41)
    alpha = torch.tensor(1.3)
    up, down = pact_quantize(x, alpha, 3, signed=True), pact_quantize(-x, alpha, 3, signed=True)
    torch.testing.assert_close(down, -up, rtol=0, atol=0)
    assert len(up.unique()) == 4  # 0 and 2^(3-1) - 1 levels
    free = alpha.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pact_quantize(torch.tensor(-2.0), free, 3, signed=True), free)
    assert grad.item() == -1


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_weights_are_dorefas(bits: int) -> None:
    w = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest, levels = max(abs(math.tanh(v)) for v in w.tolist()), 2**bits - 1
    expected = [2 * round(levels * (math.tanh(v) / (2 * largest) + 0.5)) / levels - 1 for v in w.tolist()]
    torch.testing.assert_close(dorefa_weight(w, bits), torch.tensor(expected, dtype=torch.float64))


def test_gradient_of_weights_is_that_of_the_unrounded_formula() -> None:
    w = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.rand(20, dtype=torch.float64)
    (found,) = torch.autograd.grad((dorefa_weight(w, 2) * weight).sum(), w)
    smooth = w.tanh() / w.tanh().abs().max()
    (expected,) = torch.autograd.grad((smooth * weight).sum(), w)
    torch.testing.assert_close(found, expected)


def rule_of(baseline: Baseline) -> TensorRule:
    network = baseline.model.net
    assert isinstance(network, QuantizedNetwork) and isinstance(network.rule, TensorRule)
    return network.rule


def test_loss_has_the_decay_of_the_clips_added(make: Make) -> None:
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
    losses = []
    for decay in (0.0, 0.5):
        baseline = make(pact, edge_bits=None, decay=decay)
        baseline.model.eval()
        losses.append(elbo_module(baseline.model, baseline.guide)(x, y).item() / 48)
    alphas = [q.alpha.item() for q in rule_of(baseline).quantizers if isinstance(q, PACTActivation)]
    assert len(alphas) == 2
    assert losses[1] - losses[0] == pytest.approx(0.25 * sum(a * a for a in alphas), rel=1e-4)


def test_scale_is_kept_or_left_to_the_formula(make: Make, net: nn.Module) -> None:
    w = net.get_submodule("3").weight
    assert isinstance(w, Tensor)
    formula = rule_of(make(pact, keep_scale=False))(1, w)
    torch.testing.assert_close(formula, dorefa_weight(w, 4))
    torch.testing.assert_close(rule_of(make(pact))(1, w), formula * w.abs().max())


def test_clips_start_at_the_largest_value_seen(make: Make) -> None:
    baseline = make(pact, edge_bits=None)
    network = baseline.model.net
    assert isinstance(network, QuantizedNetwork)
    for row in (3, 4):
        found = rule_of(baseline).quantizers[row]
        assert isinstance(found, PACTActivation)
        assert found.alpha.item() == pytest.approx(network.quantizers.ranges[row].item(), rel=1e-5)


def test_bad_decay_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="decay"):
        make(pact, decay=-1.0)
