"""LSQ against the equations of Esser et al. 2020."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import QuantizedNetwork
from pyro_bbits.inference.baselines import Baseline, lsq
from pyro_bbits.inference.baselines.lsq import LSQTensor, lsq_quantize
from pyro_bbits.inference.baselines.tensors import TensorRule
from pyro_bbits.inference.objective import parameter_groups

Make = Callable[..., Baseline]
Batch = tuple[Tensor, Tensor]


def paper(v: float, s: float, qn: int, qp: int) -> tuple[float, float, float]:
    """Value, derivatives in the input and in the step as in section 2, number by number."""
    ratio = v / s
    if ratio <= -qn:
        return -qn * s, 0.0, -qn
    if ratio >= qp:
        return qp * s, 0.0, qp
    return round(ratio) * s, 1.0, round(ratio) - ratio


@pytest.mark.parametrize(("qn", "qp"), [(0, 3), (2, 1), (8, 7), (128, 127), (0, 255)])
def test_values_and_gradients_are_the_papers(qn: int, qp: int) -> None:
    x = torch.linspace(-2, 2, 401, dtype=torch.float64).requires_grad_()
    step = torch.tensor(3.1 / (qn + qp), dtype=torch.float64, requires_grad=True)
    weight = torch.rand(401, dtype=torch.float64)
    scale = 0.37
    out = lsq_quantize(x, step, qn, qp, scale)
    (out * weight).sum().backward()
    expected = torch.tensor([paper(v, step.item(), qn, qp) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(out.detach(), expected[:, 0])
    assert x.grad is not None and step.grad is not None
    torch.testing.assert_close(x.grad, weight * expected[:, 1])
    assert step.grad.item() == pytest.approx(scale * (weight * expected[:, 2]).sum().item())


def test_step_gradient_outside_the_grid_is_the_true_one() -> None:
    """Where the input is clipped the output is a multiple of the step, so that finite differences hold."""
    x = torch.tensor([-9.0, 5.0, 7.0], dtype=torch.float64)

    def total(step: Tensor) -> Tensor:
        return lsq_quantize(x, step, 2, 1).sum()

    assert torch.autograd.gradcheck(total, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))


def quantizer(baseline: Baseline, row: int) -> LSQTensor:
    network = baseline.model.net
    assert isinstance(network, QuantizedNetwork) and isinstance(network.rule, TensorRule)
    found = network.rule.quantizers[row]
    assert isinstance(found, LSQTensor)
    return found


def test_initial_step_and_gradient_scale(make: Make, net: nn.Module) -> None:
    baseline = make(lsq, bits=(3, 4))
    weight, activation = quantizer(baseline, 1), quantizer(baseline, 3)
    w = net.get_submodule("3").weight
    assert isinstance(w, Tensor)
    assert (weight.negative, weight.positive) == (4, 3)
    assert weight.step.item() == pytest.approx(2 * w.abs().mean().item() / math.sqrt(3))
    assert weight.scale == pytest.approx(1 / math.sqrt(w.numel() * 3))
    assert (activation.negative, activation.positive) == (0, 15)
    assert activation.scale == pytest.approx(1 / math.sqrt(4 * 6 * 6 * 15))


def test_activation_step_comes_from_what_the_float_network_shows(make: Make, net: nn.Module, data: Batch) -> None:
    """In the mode that the network is in, here training, and without a trace of the pass in its batch norm."""
    baseline = make(lsq, bits=(2, 4))
    x = data[0][:16]
    hidden = copy.deepcopy(net)[:3](x)  # type: ignore[index]
    assert quantizer(baseline, 3).step.item() == pytest.approx(2 * hidden.mean().item() / math.sqrt(15), rel=1e-5)
    norm = baseline.model.net.get_submodule("net.1")
    assert not norm.running_mean.any()  # type: ignore[operator]


def test_network_computes_with_quantized_weights_in_both_modes(make: Make) -> None:
    baseline = make(lsq, bits=(2, 32))
    head = quantizer(baseline, 2)
    network = baseline.model.net
    x = torch.rand(5, 1, 6, 6)
    seen: list[Tensor] = []
    last = network.get_submodule("net.6")
    assert isinstance(last, nn.Linear)
    last.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    network.eval()
    baseline.model.predict(x)
    with torch.no_grad():
        baseline.model.predict(x)
    step = head.step.detach()
    weight = (last.weight / step).clamp(-2, 1).round() * step
    expected = torch.nn.functional.linear(seen[0], weight, last.bias)
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(seen[3], seen[1].detach(), rtol=0, atol=0)


def test_a_step_below_zero_comes_back(make: Make) -> None:
    found = quantizer(make(lsq, bits=(4, 4)), 0)
    x = torch.randn(50)
    with torch.no_grad():
        positive = found(x)
        found.step.neg_()
        torch.testing.assert_close(found(x), positive, rtol=0, atol=0)


def test_steps_are_trained_with_the_weights(make: Make) -> None:
    baseline = make(lsq)
    groups = parameter_groups(baseline.model, baseline.guide)
    steps = {id(quantizer(baseline, row).step) for row in range(5)}
    assert steps <= {id(p) for p in groups.weights}


def test_one_bit_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="from 2 bits"):
        make(lsq, bits=(1, 4))
