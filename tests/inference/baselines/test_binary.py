"""Binary weights against the equations of Rastegari et al. 2016."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import QuantizedNetwork
from pyro_bbits.inference.baselines import Baseline, binary
from pyro_bbits.inference.baselines.binary import binarize

Make = Callable[..., Baseline]


def test_values_by_hand() -> None:
    w = torch.tensor([[1.0, -3.0], [0.0, 0.5]])
    torch.testing.assert_close(binarize(w), torch.tensor([[2.0, -2.0], [0.25, 0.25]]))
    torch.testing.assert_close(binarize(w, per_channel=False), 1.125 * torch.tensor([[1.0, -1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("per_channel", [True, False])
def test_no_other_scale_is_nearer(per_channel: bool) -> None:
    w = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = binarize(w, per_channel=per_channel)
    best = (w - out).square().sum()
    for factor in (0.97, 1.03):
        assert (w - factor * out).square().sum() > best


def test_gradient_is_the_chain_rule() -> None:
    w = torch.tensor([[0.5, -1.5, 0.25]], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, 2.0, -4.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad((binarize(w) * g).sum(), w)
    scale, signs = 0.75, [1.0, -1.0, 1.0]
    along = (1.0 * 1 - 2.0 * 1 - 4.0 * 1) / 3  # mean of g sign(w)
    terms = zip(signs, [1.0, 2.0, -4.0], [True, False, True], strict=True)  # the second weight is beyond 1
    expected = [sign * along + scale * upstream * inside for sign, upstream, inside in terms]
    torch.testing.assert_close(grad, torch.tensor([expected], dtype=torch.float64))


def test_gradient_of_the_scale_is_the_true_one() -> None:
    """Beyond 1 the sign passes no gradient, and what remains is smooth."""
    w = torch.tensor([[1.5, -2.0], [3.0, 1.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(binarize, (w,))


@pytest.mark.parametrize(("per_channel", "magnitudes"), [(True, 4), (False, 1)])
def test_scales_per_channel_or_tensor(per_channel: bool, magnitudes: int, make: Make, net: nn.Module) -> None:
    network = make(binary, per_channel=per_channel).model.net
    assert isinstance(network, QuantizedNetwork) and network.rule is not None
    weight = net.get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert len(network.rule(1, weight).abs().unique()) == magnitudes
