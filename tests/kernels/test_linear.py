"""A linear layer that quantizes its weight in both passes: values, gradients, and what it keeps in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bbits as bb
from pyro_bbits.gates import GateValues
from pyro_bbits.kernels import linear, quantize_row, use_body
from pyro_bbits.kernels.linear import can_spare, quantized_linear, quantized_linear_plain
from pyro_bbits.ladder import BitLadder

LADDER = BitLadder((2, 4, 8))
INS, OUTS = 13, 6

Layer = Callable[..., Tensor]


@pytest.fixture(params=["plain", pytest.param("triton", id="triton")])
def layer(request: pytest.FixtureRequest) -> Layer:
    """Each body; the kernels run on a device or in the interpreter."""
    if request.param == "plain":
        return quantized_linear_plain
    request.getfixturevalue("triton_runs")
    from pyro_bbits.kernels import triton_linear

    return triton_linear.quantized_linear


def draw(device: str, lead: tuple[int, ...] = (5,), *, gated: bool = True, biased: bool = True) -> list[Tensor | None]:
    """Input, weight, row, gates and bias."""
    gate = (torch.rand(OUTS) * 1.4 - 0.2).clamp(0, 1) if gated else None
    drawn = torch.randn(*lead, INS), torch.randn(OUTS, INS), torch.tensor([1.8, 0.7, 0.4]), gate
    return [None if x is None else x.to(device) for x in (*drawn, torch.randn(OUTS) if biased else None)]


def variables(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]


def steps(given: list[Any]) -> Tensor:
    x, weight, row, gates, bias = given
    return F.linear(x, quantize_row(weight, row, gates, signed=True, ladder=LADDER), bias)


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
@pytest.mark.parametrize(("gated", "biased"), [(True, True), (False, False), (True, False)])
def test_values_and_gradients_are_those_of_the_steps_in_float64(
    layer: Layer, lead: tuple[int, ...], gated: bool, biased: bool, device: str
) -> None:
    tensors = draw(device, lead, gated=gated, biased=biased)
    given, exact = variables(tensors, torch.float32), variables(tensors, torch.float64)
    y, expected = layer(*given, ladder=LADDER), steps(exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(y, [x for x in given if x is not None], grad.float())
    wanted = torch.autograd.grad(expected, [x for x in exact if x is not None], grad)
    for a, b in zip(actual, wanted, strict=True):
        assert (a.double() - b).norm() <= 2e-4 * b.norm() + 1e-5


def test_a_narrow_input_meets_a_weight_of_its_type(layer: Layer, device: str) -> None:
    """The weight is quantized in float32 all the same: its gradient is, and the product alone is rounded."""
    x, weight, row, gates, bias = variables(draw(device), torch.float32)
    assert x is not None and weight is not None and row is not None
    y = layer(x.bfloat16(), weight, row, gates, bias, ladder=LADDER)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), steps([x, weight, row, gates, bias]), rtol=0.05, atol=0.1)
    for given, grad in zip((weight, row), torch.autograd.grad(y.sum(), (weight, row)), strict=True):
        assert grad.dtype == given.dtype == torch.float32 and grad.abs().sum() > 0


def test_only_what_is_there_anyway_is_kept(triton_runs: None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGE", 1)
    given = variables(draw(device), torch.float32)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with use_body("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        quantized_linear(*given, ladder=LADDER)  # type: ignore[arg-type]
    there = {x.data_ptr() for x in given if x is not None}
    assert kept and all(x.data_ptr() in there for x in kept)


def test_small_weights_are_kept(device: str) -> None:
    with use_body("triton"):
        assert can_spare(torch.empty(1024, 1024, device=device), LADDER)
        assert not can_spare(torch.empty(1023, 1024, device=device), LADDER)
    with use_body("eager"):
        assert not can_spare(torch.empty(1024, 1024, device=device), LADDER)


class Shared(nn.Module):
    """A layer that is used twice, and one whose input is the network's own; all outputs but the last have gates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.first(x))))
        y: Tensor = self.last(F.relu(self.again(x)))
        return y


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_computes_the_same_with_and_without(
    triton_runs: None, device: str, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    x = torch.randn(9, 6)
    network = bb.quantize(Shared(), x, bits=LADDER.bits).to(device)
    gates = GateValues(*(torch.rand_like(gate).requires_grad_() for gate in network.open_gates()))
    variables = [*gates, *network.parameters()]
    found: list[list[Tensor]] = []
    for size in (1, 10**9):
        monkeypatch.setattr(linear, "LARGE", size)
        with use_body("triton"), torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = network(x.to(device), gates=gates)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), variables)])
    spared, kept = found
    for a, b in zip(spared, kept, strict=True):
        assert a.dtype == b.dtype and a.abs().sum() > 0
        # the gradients of a weight that is used twice are added in float32 here, and in the type of products there
        assert (a - b).norm() <= (2**-8 if autocast else 1e-6) * b.norm()
