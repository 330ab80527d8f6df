"""The published arithmetic, which the tables compare with, computes what our reference computes."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed.authors import PublishedQuantizer, published_quantize
from benchmarks.speed.authors_network import PublishedNetwork, PublishedStep
from pyro_bbits import quantize
from pyro_bbits.gates import GateValues
from pyro_bbits.models import LeNet5, ViT
from pyro_bbits.quantizer import residual_quantize_reference

# the clip ends 1e-7 inside the range here and two float32 steps there, which float64 tells apart
TOLERANCE = 1e-6


def both(x: Tensor, beta: Tensor, gates: Tensor, channels: Tensor | None, signed: bool) -> tuple[Tensor, Tensor]:
    ours = residual_quantize_reference(x, beta, gates, channels, signed=signed)
    return published_quantize(x, beta.reshape(1), gates.split(1), channels, signed=signed), ours


def gradient(total: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(total, [leaf], retain_graph=True, materialize_grads=True)[0]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("gates", [(0.9, 0.7, 0.5, 0.3), (1.0, 1.0, 0.0, 0.0), (0.0, 0.5, 0.5, 0.5), (1.0,) * 4])
def test_values_and_gradients_are_those_of_the_reference(signed: bool, gates: tuple[float, ...]) -> None:
    x = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    channels = torch.rand(40, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    theirs, ours = both(x, beta, z, channels, signed)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)
    weight = torch.randn_like(x)
    open_until = next((i for i, gate in enumerate(gates) if gate == 0), len(gates))
    for leaf in (x, beta, channels, z):
        got, expected = (gradient((out * weight).sum(), leaf) for out in (theirs, ours))
        if leaf is z:  # below a closed gate nothing is computed, so it and finer ones have no gradient
            got, expected = got[:open_until], expected[:open_until]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-4)


def test_penalty_is_that_of_the_paper() -> None:
    quantizer = PublishedQuantizer(1.0, True, macs=0.5, channels=3)
    reach = torch.sigmoid(torch.tensor(6.0 + 1.5986))  # P(z > 0) at a logit of 6
    expected = sum(bits * 0.5 * reach ** (i + 1) for i, bits in enumerate((2, 4, 8, 16, 32)))
    torch.testing.assert_close(quantizer.penalty(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [LeNet5, lambda: ViT(1, 10, image_size=28, patch_size=7, width=16, depth=2, heads=2)])
def test_network_with_open_gates_computes_what_ours_does(make: type[nn.Module]) -> None:
    net, x = make().eval(), torch.rand(8, 1, 28, 28)
    ours, theirs = quantize(net, x), PublishedNetwork(net, x)
    for quantizer in theirs.all():
        for logit in quantizer.parameters():
            if logit is not quantizer.beta:
                logit.data.fill_(60.0)  # every draw is 1
    layout = ours.layout
    gates = GateValues(torch.ones(layout.num_channels), torch.ones(len(layout.tensors), len(layout.ladder.residuals)))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x, gates=gates), rtol=1e-4, atol=1e-5)


def test_step_trains_every_parameter() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(32, 1, 28, 28), torch.arange(32) % 10
    network = PublishedNetwork(LeNet5(), x)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = PublishedStep(network)
    losses = [step(x, y).item() for _ in range(8)]
    assert all(not torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert losses[-1] < losses[0]


def test_float_network_stays_as_it_is() -> None:
    net = LeNet5()
    PublishedNetwork(net, torch.rand(4, 1, 28, 28))
    assert "parametrizations" not in "".join(net.state_dict()) and not net.conv2._forward_pre_hooks
