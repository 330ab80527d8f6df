"""A linear layer that quantizes its weight in both passes: values, gradients, and what it keeps in between."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bbits as bb
from pyro_bbits.gates import GateValues
from pyro_bbits.insertion import QuantizationRule
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.kernels import linear, quantize_row, use_body
from pyro_bbits.kernels.linear import can_spare, quantized_linear
from pyro_bbits.ladder import BitLadder

LADDER = BitLadder((2, 4, 8))
INS, OUTS = 13, 6


@pytest.fixture(params=["plain", pytest.param("triton", id="triton")])
def spared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """The steps, and the kernels, which run on a device or in the interpreter; even small weights are spared there."""
    if request.param == "plain":
        yield False
        return
    request.getfixturevalue("triton_runs")
    monkeypatch.setattr(linear, "LARGE", 1)
    with use_body("triton"):
        yield True


def draw(device: str, lead: tuple[int, ...] = (5,), *, gated: bool = True, biased: bool = True) -> list[Tensor | None]:
    """Input, weight, row, gates and bias."""
    gate = (torch.rand(OUTS) * 1.4 - 0.2).clamp(0, 1) if gated else None
    drawn = torch.randn(*lead, INS), torch.randn(OUTS, INS), torch.tensor([1.8, 0.7, 0.4]), gate
    return [None if x is None else x.to(device) for x in (*drawn, torch.randn(OUTS) if biased else None)]


def variables(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]


def steps(given: list[Any]) -> Tensor:
    x, weight, row, gates, bias = given
    with use_body("reference"):
        return F.linear(x, quantize_row(weight, row, gates, signed=True, ladder=LADDER), bias)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize(("gated", "biased"), [(True, True), (False, False), (True, False)])
def test_values_and_gradients_are_those_of_the_steps_in_float64(
    spared: bool, lead: tuple[int, ...], gated: bool, biased: bool, device: str
) -> None:
    tensors = draw(device, lead, gated=gated, biased=biased)
    given, exact = variables(tensors, torch.float32), variables(tensors, torch.float64)
    assert can_spare(given[1], LADDER) == spared
    y, expected = quantized_linear(*given, ladder=LADDER), steps(exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(y, [x for x in given if x is not None], grad.float())
    wanted = torch.autograd.grad(expected, [x for x in exact if x is not None], grad)
    for a, b in zip(actual, wanted, strict=True):
        assert a.shape == b.shape and (a.double() - b).norm() <= 2e-4 * b.norm() + 1e-5


def test_a_result_of_more_dimensions_may_be_changed_in_place(spared: bool, device: str) -> None:
    given = variables(draw(device, (2, 3)), torch.float32)
    y = F.relu(quantized_linear(*given, ladder=LADDER), inplace=True)
    expected = F.relu(steps(given))
    for a, b in zip(*(torch.autograd.grad(z.sum(), given) for z in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_narrow_product_has_a_weight_of_its_type(spared: bool, device: str, autocast: bool) -> None:
    """The weight is quantized in float32 all the same: its gradient is, and the product alone is rounded."""
    x, weight, row, gates, bias = variables(draw(device), torch.float32)
    half = torch.bfloat16
    with torch.autocast(device, torch.float16 if device == "cuda" else half, enabled=autocast):
        y = quantized_linear(x.to(half), weight, row, gates, bias.to(half), ladder=LADDER, dtype=half)
    if spared:
        assert y.dtype == half
    torch.testing.assert_close(y.float(), steps([x, weight, row, gates, bias]), rtol=0.05, atol=0.1)
    for given, grad in zip((weight, row), torch.autograd.grad(y.sum(), (weight, row)), strict=True):
        assert grad.dtype == given.dtype == torch.float32 and grad.abs().sum() > 0


def test_only_what_is_there_anyway_is_kept(triton_runs: None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables(draw(device), torch.float32)
    there = {x.data_ptr() for x in given}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    for size, spared in ((1, True), (10**9, False)):
        monkeypatch.setattr(linear, "LARGE", size)
        kept.clear()
        with use_body("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            quantized_linear(*given, ladder=LADDER)
        assert kept and all(x.data_ptr() in there for x in kept) == spared


def test_large_weights_are_spared_where_there_are_kernels(device: str) -> None:
    with use_body("triton"):
        assert can_spare(torch.empty(1024, 1024, device=device), LADDER)
        assert not can_spare(torch.empty(1023, 1024, device=device), LADDER)
    with use_body("eager"):
        assert not can_spare(torch.empty(1024, 1024, device=device), LADDER)


@pytest.mark.parametrize(("which", "size", "message"), [(2, 4, "row must have"), (3, 3, "channel_gates must have")])
def test_what_does_not_fit_is_refused(spared: bool, device: str, which: int, size: int, message: str) -> None:
    given = draw(device)
    given[which] = torch.ones(size, device=device)
    with pytest.raises(ValueError, match=message):
        quantized_linear(*given, ladder=LADDER)  # type: ignore[arg-type]


class Layers(nn.Module):
    """A layer on the network's own input, one that is called twice, two with one weight, and one without gates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 8), nn.Linear(8, 8)
        self.one, self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x), inplace=True)))))
        y: Tensor = self.last(F.relu(self.other(F.relu(self.one(x)))))
        return y


class AsItIs(QuantizationRule):
    """Leaves all tensors alone."""

    def forward(self, row: int, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weights that are spared; all are large enough."""
    rows: list[int] = []
    real = PassContext.linear

    def spy(self: PassContext, row: int, *args: Any, **options: Any) -> Tensor:
        rows.append(row)
        return real(self, row, *args, **options)

    monkeypatch.setattr(PassContext, "linear", spy)
    monkeypatch.setattr(linear, "LARGE", 1)
    return rows


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lead", [(9,), (9, 4)], ids=str)
def test_a_network_computes_the_same_with_and_without(
    triton_runs: None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[int],
    autocast: bool,
    lead: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*lead, 6)
    network = bb.quantize(Layers(), x, bits=LADDER.bits).to(device)
    gates = GateValues(*(torch.rand_like(gate).requires_grad_() for gate in network.open_gates()))
    learned = [*gates, *network.parameters()]
    found: list[list[Tensor]] = []
    for size in (1, 10**9):
        monkeypatch.setattr(linear, "LARGE", size)
        with use_body("triton"), torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = network(x.to(device), gates=gates)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), learned)])
    assert [network.layout.tensors[row] for row in taken] == ["first.weight", "last.weight"]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_weight_is_spared_where_nothing_is_learned(triton_runs: None, device: str, taken: list[int]) -> None:
    x = torch.randn(9, 6)
    network = bb.quantize(Layers(), x, bits=LADDER.bits).to(device)
    with use_body("triton"):
        with torch.no_grad():
            network(x.to(device), gates=network.open_gates())
        network.rule = AsItIs()
        network(x.to(device), gates=network.open_gates())
    assert taken == []
