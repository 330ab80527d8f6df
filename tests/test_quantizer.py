"""The quantizer equals the paper's sum, ordinary rounding, and its own derivative worked out by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_bbits.kernels.grid import half_width
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import (
    Quantizers,
    integer_codes,
    quantize_fixed,
    residual_quantize,
    residual_quantize_reference,
)

WIDTHS = (2, 4, 8, 16)
LADDERS = [(2, 4, 8, 16, 32), (2, 4, 8), (2, 8), (3, 6), (4, 8, 16), (2,), (2, 4, 20)]
ULP = 2.0**-23

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
widths = pytest.mark.parametrize("bits", WIDTHS)


def open_gates(bits: int, ladder: BitLadder | None = None) -> Tensor:
    return torch.tensor((ladder or BitLadder()).open_gates(bits)).float()


def top_code(bits: int, signed: bool) -> int:
    return (1 << bits - 1) - 1 if signed else (1 << bits) - 1


def quantize_hard(x: Tensor, beta: Tensor, bits: int, signed: bool) -> Tensor:
    return residual_quantize(x, beta, open_gates(bits), signed=signed)


def codes_of(x_q: Tensor, beta: Tensor, bits: int, signed: bool) -> Tensor:
    return (x_q.double() / beta.double() * half_width(bits, signed)).round()


def clip(x: Tensor, beta: Tensor, signed: bool) -> Tensor:
    return torch.maximum(torch.minimum(x, beta), -beta if signed else torch.zeros_like(beta))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signed", "x", "expected"),
    [
        (False, 0.05, (0, 0.066667, 0.050980, 0.050004)),
        (False, 0.2, (0.333333, 0.2, 0.2, 0.2)),
        (False, 0.4, (0.333333, 0.4, 0.4, 0.4)),
        (False, 0.77, (0.666667, 0.8, 0.768627, 0.770001)),
        (False, 1.3, (1, 1, 1, 1)),
        (False, -0.2, (0, 0, 0, 0)),
        (True, -0.9, (-0.666667, -0.933333, -0.901961, -0.900008)),
        (True, 0.05, (0, 0, 0.047059, 0.049989)),
        (True, 0.34, (0.666667, 0.4, 0.337255, 0.340002)),
        (True, 0.6, (0.666667, 0.666667, 0.603922, 0.600015)),
        (True, 1.2, (0.666667, 0.933333, 0.996078, 0.999985)),
    ],
)
def test_hard_gates_give_the_papers_values(signed: bool, x: float, expected: tuple[float, ...]) -> None:
    """All printed digits, at range 1. Direct rounding agrees but for ties of the finer grids: 0.6 * 7.5 = 4.5."""
    value, beta = torch.tensor([x]), torch.tensor(1.0)
    for bits, printed in zip(WIDTHS, expected, strict=True):
        by_sum = quantize_hard(value, beta, bits, signed)
        by_reference = residual_quantize_reference(
            value.double(), beta.double(), open_gates(bits).double(), signed=signed
        )
        by_rounding = quantize_fixed(value, beta, bits, signed=signed)
        assert by_sum.item() == pytest.approx(printed, abs=6e-7)
        assert by_reference.item() == pytest.approx(printed, abs=6e-7)
        if x != 0.6 or bits == 2:
            assert by_rounding.item() == pytest.approx(printed, abs=6e-7)


@pytest.mark.parametrize("quantize", [residual_quantize, residual_quantize_reference])
def test_soft_gates_give_the_papers_value(quantize: Callable[..., Tensor]) -> None:
    gates = torch.tensor([0.5, 0.25, 0.0, 0.0])
    assert quantize(torch.tensor([0.34]), torch.tensor(1.0), gates, signed=True).item() == pytest.approx(
        0.525490, abs=6e-7
    )


def test_ties_round_to_even() -> None:
    """Step 1 at 2 bits, 0.2 at 4: 0.5 is a tie of both grids, 0 and then 2.5 steps of 0.2."""
    x, beta = torch.tensor([0.5, 1.5, 2.5]), torch.tensor(3.0)
    assert quantize_hard(x, beta, 2, signed=False).tolist() == [0, 2, 2]
    torch.testing.assert_close(quantize_hard(x, beta, 4, signed=False), torch.tensor([0.4, 1.6, 2.4]))
    assert quantize_fixed(x, beta, 2, signed=False).tolist() == [0, 2, 2]


@signs
@widths
def test_hard_gates_equal_direct_rounding(bits: int, signed: bool) -> None:
    """Two million values: the same codes, but for one step where float32 cannot tell the side of a rounding tie."""
    allowed, half = {2: 0.0, 4: 1e-6, 8: 7.5e-6, 16: 1.4e-3}[bits], half_width(bits, signed)
    differ, total = 0, 0
    for beta in torch.empty(10).uniform_(-5, 5).exp():
        x = torch.randn(200_000).mul(0.7 * beta)
        exact = clip(x, beta, signed).double() / beta.double() * half
        by_sum = codes_of(quantize_hard(x, beta, bits, signed), beta, bits, signed)
        by_rounding = integer_codes(x, beta, bits, signed=signed)
        for codes in (by_sum, by_rounding):
            assert (codes - exact).abs().max() <= 0.5 + ULP * half
        other = by_sum != by_rounding
        differ, total = differ + int(other.sum()), total + other.numel()
        assert (by_sum - by_rounding).abs().max() <= 1
    assert differ <= allowed * total


@signs
@widths
def test_fixed_quantizer_is_code_times_step(bits: int, signed: bool) -> None:
    x, beta = torch.randn(1000), torch.tensor(0.8)
    codes = integer_codes(x, beta, bits, signed=signed)
    expected = codes.double() * beta.double() / half_width(bits, signed)
    torch.testing.assert_close(quantize_fixed(x, beta, bits, signed=signed).double(), expected, rtol=2 * ULP, atol=0)


@signs
@widths
def test_codes_never_overflow(bits: int, signed: bool) -> None:
    """Inputs at the ends, just around them and far outside, for 400 ranges.

    The top code itself must be met: clipping the codes too early would lose it.
    """
    top = top_code(bits, signed)
    factors = torch.tensor([1 - ULP, 1.0, 1 + ULP, 1.5, 1e4, math.inf])
    expected = torch.tensor([[top], [-top if signed else 0]]).double().expand(2, len(factors))
    for beta in torch.empty(400).uniform_(-14, 14).exp():
        x = torch.stack([beta * factors, -beta * factors])
        assert torch.equal(codes_of(quantize_hard(x, beta, bits, signed), beta, bits, signed), expected)
        assert torch.equal(integer_codes(x, beta, bits, signed=signed).double(), expected)


@signs
@widths
def test_every_code_is_reached_and_is_a_fixed_point(bits: int, signed: bool) -> None:
    top, beta = top_code(bits, signed), torch.tensor(0.37)
    codes = torch.arange(-top if signed else 0, top + 1, dtype=torch.int32)
    x = (codes.double() * beta.double() / half_width(bits, signed)).float()
    assert torch.equal(integer_codes(x, beta, bits, signed=signed), codes)
    by_sum = quantize_hard(x, beta, bits, signed)
    assert torch.equal(codes_of(by_sum, beta, bits, signed), codes.double())
    assert torch.equal(quantize_hard(by_sum, beta, bits, signed), by_sum)
    by_rounding = quantize_fixed(x, beta, bits, signed=signed)
    assert torch.equal(quantize_fixed(by_rounding, beta, bits, signed=signed), by_rounding)


@signs
def test_finest_rung_is_the_clipped_input(signed: bool) -> None:
    x, beta = torch.randn(10_000), torch.tensor(0.9)
    clipped = clip(x, beta, signed)
    assert torch.equal(quantize_fixed(x, beta, 32, signed=signed), clipped)
    torch.testing.assert_close(quantize_hard(x, beta, 32, signed), clipped, rtol=4 * ULP, atol=0)


@signs
def test_mean_error_is_a_quarter_of_a_step(signed: bool) -> None:
    """A uniform input is off by 0 to half a step, evenly: so the error falls with each rung, by the ratio of steps."""
    beta = torch.tensor(1.3)
    x = torch.linspace(-1.3 if signed else 0, 1.3, 1_000_001)
    for bits in (2, 4, 8):
        error = (quantize_hard(x, beta, bits, signed) - x).abs().mean().item()
        assert error == pytest.approx(1.3 / half_width(bits, signed) / 4, rel=1e-3)


@signs
@pytest.mark.parametrize("bits", LADDERS)
def test_soft_gates_mix_the_rungs(bits: tuple[int, ...], signed: bool) -> None:
    """x_q is the sum of w_b x_b, with x_b the value under hard gates and w_b the probability of the rung."""
    ladder, beta, x = BitLadder(bits), torch.tensor(2.1), torch.randn(1000) * 2
    gates = torch.rand(len(ladder.residuals))
    mixture, reached = torch.zeros_like(x), torch.ones(())
    for width, z in zip(bits, [*gates, torch.zeros(())], strict=True):
        hard = residual_quantize(x, beta, open_gates(width, ladder), signed=signed, ladder=ladder)
        mixture += reached * (1 - z) * hard
        reached = reached * z
    soft = residual_quantize(x, beta, gates, signed=signed, ladder=ladder)
    torch.testing.assert_close(soft, mixture, rtol=0, atol=1e-6)


# --- two forms agree ------------------------------------------------------------------------------------------------


def ties_nearby(x: Tensor, beta: Tensor, signed: bool, ladder: BitLadder) -> Tensor:
    """Elements so near a rounding tie or a clip end, on any rung, that float32 and float64 may part there."""
    half = half_width(ladder.base, signed)
    t = x.double() / beta.double() * half
    slack, scale = 4 * ULP * half, 1
    near, inside, residual = (t.abs() - half).abs() < slack, t.abs() < half, t
    for bits, ratio in zip(ladder.bits, (1, *ladder.ratios), strict=True):
        if bits <= 24:
            scale, residual = scale * ratio, residual * ratio
            near |= inside & (((residual - residual.floor()) - 0.5).abs() < slack * scale)
            residual = residual - residual.round()
    return near


def compare_with_reference(
    x: Tensor, beta: Tensor, gates: Tensor, z2: Tensor | None, signed: bool, ladder: BitLadder, noise: Tensor
) -> None:
    """Values and all gradients; `noise` is the error that each gate's residual may have, in units of the range."""
    g = torch.randn_like(x)

    def run(quantize: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [v.detach().to(dtype).requires_grad_() for v in (x, beta, gates, *([] if z2 is None else [z2]))]
        x_q = quantize(*leaves, signed=signed, ladder=ladder)
        grads = torch.autograd.grad(x_q, leaves, g.to(dtype), materialize_grads=True)
        return [v.detach().double() for v in (x_q, *grads)]

    fast, slow = run(residual_quantize, torch.float32), run(residual_quantize_reference, torch.float64)
    weight, size = g.abs().double(), beta.double()
    torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=4 * ULP * size.item())
    torch.testing.assert_close(fast[1], slow[1], rtol=2 * ULP, atol=0)
    assert abs(fast[2] - slow[2]) <= 4 * ULP * weight.sum()
    assert ((fast[3] - slow[3]).abs() <= 4 * noise * size * weight.sum()).all()
    if z2 is not None:
        assert ((fast[4] - slow[4]).abs() <= 4 * ULP * size * weight.flatten(1).sum(1)).all()


agreement = pytest.mark.parametrize("bits", LADDERS)
channel_gates = pytest.mark.parametrize("pruned", [True, False], ids=["z2", "no-z2"])


@signs
@agreement
@channel_gates
def test_gradients_equal_the_reference(bits: tuple[int, ...], signed: bool, pruned: bool) -> None:
    """Any range, a third of the inputs outside it; values on a rounding boundary are moved to a grid point."""
    ladder, beta = BitLadder(bits), torch.empty(()).uniform_(-3, 3).exp()
    x = torch.randn(16, 8, 3, 3) * beta
    near = ties_nearby(x, beta, signed, ladder)
    x[near] = beta / half_width(ladder.base, signed)
    assert near.float().mean() < 0.9 and (x > beta).any() and (x < -beta).any()
    gates, z2 = torch.rand(len(bits) - 1), torch.rand(16) if pruned else None
    compare_with_reference(x, beta, gates, z2, signed, ladder, noise=torch.full((len(bits) - 1,), ULP))


@signs
@agreement
@channel_gates
def test_gradients_equal_the_reference_where_float32_is_exact(
    bits: tuple[int, ...], signed: bool, pruned: bool
) -> None:
    """With step 1 and inputs in odd 64ths no residual is rounded or tied: even the finest gate must agree."""
    ladder = BitLadder(bits)
    half = half_width(ladder.base, signed)
    x = (2 * torch.randint(-int(half * 32) if signed else 0, int(half * 32), (16, 8, 3, 3)) + 1) / 64
    gates, z2 = torch.rand(len(bits) - 1), torch.rand(16) if pruned else None
    steps = torch.tensor([1 / half_width(b, signed) for b in bits[:-1]]).double()
    compare_with_reference(x, torch.tensor(half), gates, z2, signed, ladder, noise=ULP * steps)


@signs
def test_reference_is_the_papers_recipe(signed: bool) -> None:
    """Written out term by term, nothing shared between the rungs: steps of the full range, clip just inside it."""
    x, beta = torch.randn(500, dtype=torch.float64) * 1.5, torch.tensor(1.1, dtype=torch.float64)
    z4, z8, z16, z32 = gates = torch.rand(4, dtype=torch.float64)
    s2, s4, s8, s16 = (beta * (2 if signed else 1) / (2**bits - 1) for bits in WIDTHS)
    v = clip(x, beta * (1 - 1e-7), signed)
    x2 = s2 * torch.round(v / s2)
    e4 = s4 * torch.round((v - x2) / s4)
    e8 = s8 * torch.round((v - x2 - e4) / s8)
    e16 = s16 * torch.round((v - x2 - e4 - e8) / s16)
    e32 = v - x2 - e4 - e8 - e16
    expected = x2 + z4 * (e4 + z8 * (e8 + z16 * (e16 + z32 * e32)))
    far = ~ties_nearby(x, beta, signed, BitLadder())
    result = residual_quantize_reference(x, beta, gates, signed=signed)
    torch.testing.assert_close(result[far], expected[far], rtol=0, atol=1e-6)


@signs
def test_gate_gradients_of_the_reference_are_derivatives(signed: bool) -> None:
    """The sum is linear in each gate, so no straight-through estimate is involved: finite differences must agree."""
    x, beta = torch.randn(3, 5, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    gates = torch.rand(4, dtype=torch.float64, requires_grad=True)
    z2 = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def quantize(gates: Tensor, z2: Tensor) -> Tensor:
        return residual_quantize_reference(x, beta, gates, z2, signed=signed)

    assert torch.autograd.gradcheck(quantize, (gates, z2))


# --- gradients by hand ----------------------------------------------------------------------------------------------


def gradients(
    x: float, beta: float, gates: list[float], signed: bool, upstream: float = 1.0
) -> tuple[float, float, list[float]]:
    leaves = torch.tensor([x]), torch.tensor(beta), torch.tensor(gates)
    for leaf in leaves:
        leaf.requires_grad_()
    x_q = residual_quantize(*leaves, signed=signed)
    dx, dbeta, dgates = torch.autograd.grad(x_q, leaves, torch.tensor([upstream]))
    return dx.item(), dbeta.item(), dgates.tolist()


def test_gradients_inside_an_unsigned_range() -> None:
    """Range 3, so the steps are 1, 1/5, 1/85, 1/21845. x = 1.35 is 1 + 2/5 - 4/85 - 64/21845 + (the rest).

    1.35 / 1 rounds to 1, 0.35 * 5 = 1.75 to 2, (1.75 - 2) * 17 = -4.25 to -4, (-4.25 + 4) * 257 = -64.25 to -64.
    """
    e4, e8, e16 = 2 / 5, -4 / 85, -64 / 21845
    rest = 1.35 - 1 - e4 - e8 - e16
    x_q = 1 + 0.5 * (e4 + 0.25 * (e8 + 0.75 * (e16 + 0.2 * rest)))
    dx, dbeta, dgates = gradients(1.35, 3.0, [0.5, 0.25, 0.75, 0.2], signed=False, upstream=2.0)
    assert dx == 2
    assert dbeta == pytest.approx(2 * (x_q - 1.35) / 3, rel=1e-6)
    assert dgates[0] == pytest.approx(2 * (e4 + 0.25 * (e8 + 0.75 * (e16 + 0.2 * rest))), rel=1e-6)
    assert dgates[1] == pytest.approx(2 * 0.5 * (e8 + 0.75 * (e16 + 0.2 * rest)), rel=1e-5)
    assert dgates[2] == pytest.approx(2 * 0.5 * 0.25 * (e16 + 0.2 * rest), rel=1e-4)
    assert dgates[3] == pytest.approx(2 * 0.5 * 0.25 * 0.75 * rest, abs=2 * ULP)


def test_gradients_outside_an_unsigned_range() -> None:
    """Above, x_q = beta on every rung: d/dbeta is 1 and no residual is left. Below, x_q = 0 whatever beta is."""
    dx, dbeta, dgates = gradients(4.0, 3.0, [0.5, 0.25, 0.75, 0.2], signed=False)
    assert dx == 0 and dbeta == pytest.approx(1, rel=1e-6) and dgates == pytest.approx([0] * 4, abs=4 * ULP)
    assert gradients(-0.5, 3.0, [0.5, 0.25, 0.75, 0.2], signed=False) == (0, 0, [0] * 4)


def test_gradients_inside_a_signed_range() -> None:
    """Range 1.5, so the steps are again 1, 1/5, 1/85: x = -0.86 is -1 + 1/5 - 5/85 + (the rest).

    0.14 * 5 = 0.7 rounds to 1, (0.7 - 1) * 17 = -5.1 to -5.
    """
    e4, e8 = 1 / 5, -5 / 85
    x_q = -1 + 0.5 * (e4 + 0.25 * e8)
    dx, dbeta, dgates = gradients(-0.86, 1.5, [0.5, 0.25, 0.0, 0.0], signed=True)
    assert dx == 1
    assert dbeta == pytest.approx((x_q + 0.86) / 1.5, rel=1e-6)
    assert dgates[:2] == pytest.approx([e4 + 0.25 * e8, 0.5 * e8], rel=1e-5)


@pytest.mark.parametrize("side", [1, -1])
def test_gradients_outside_a_signed_range(side: int) -> None:
    """Just inside 1.5: 1 + 2/5 + 8/85, since 0.5 * 5 = 2.5 falls to 2 and 0.5 * 17 = 8.5 to 8."""
    e4, e8 = side * 2 / 5, side * 8 / 85
    x_q = side + 0.5 * (e4 + 0.25 * e8)
    dx, dbeta, dgates = gradients(9.0 * side, 1.5, [0.5, 0.25, 0.0, 0.0], signed=True)
    assert dx == 0
    assert dbeta == pytest.approx(x_q / 1.5, rel=1e-5)
    assert dgates[:2] == pytest.approx([e4 + 0.25 * e8, 0.5 * e8], rel=1e-5)


def test_gradients_of_channel_gates() -> None:
    """Rows (1.35, 4) and (-1, 0.3), range 3, z4 = 0.5, gradient 1 everywhere; the second row is half kept.

    Row 1: 1 + 0.5 * 0.4 = 1.2 and 3. Row 2: 0 and, as 0.3 * 5 = 1.5 ties to 2, 0.5 * 0.4 = 0.2. So dz2 = (4.2, 0.2),
    dz4 = 0.4 + 0.5 * 0.4, dbeta = (1.2 - 1.35) / 3 + 1 + 0.5 * (0.2 - 0.3) / 3, and dx is z2 inside.
    """
    x = torch.tensor([[1.35, 4.0], [-1.0, 0.3]], requires_grad=True)
    beta, gates = torch.tensor(3.0, requires_grad=True), torch.tensor([0.5, 0, 0, 0], requires_grad=True)
    z2 = torch.tensor([1.0, 0.5], requires_grad=True)
    x_q = residual_quantize(x, beta, gates, z2, signed=False)
    torch.testing.assert_close(x_q, torch.tensor([[1.2, 3.0], [0.0, 0.1]]))
    dx, dbeta, dgates, dz2 = torch.autograd.grad(x_q.sum(), (x, beta, gates, z2))
    assert dx.tolist() == [[1, 0], [0, 0.5]]
    assert dbeta.item() == pytest.approx(-0.05 + 1 - 0.05 / 3, rel=1e-6)
    assert dgates[0].item() == pytest.approx(0.6, rel=1e-6)
    assert dz2.tolist() == pytest.approx([4.2, 0.2], rel=1e-6)


@signs
def test_gradients_have_the_papers_closed_form(signed: bool) -> None:
    """dx = inside; dbeta sums (x_q - x) / beta inside and x_q / beta outside, whatever the gates."""
    x, beta = (torch.randn(5000) * 1.2).requires_grad_(), torch.tensor(0.9, requires_grad=True)
    gates, g = torch.rand(4), torch.randn(5000)
    x_q = residual_quantize(x, beta, gates, signed=signed)
    dx, dbeta = torch.autograd.grad(x_q, (x, beta), g)
    inside = (x < beta) & (x > (-beta if signed else 0))
    assert torch.equal(dx, g * inside)
    per_element = torch.where(inside, x_q - x, x_q) / beta
    assert dbeta.item() == pytest.approx((g * per_element).sum().item(), abs=1e-4)


def test_unsigned_clip_acts_as_relu() -> None:
    """Zero is no inner point: like ReLU, the clip passes no gradient there."""
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 0.5], requires_grad=True)
    residual_quantize(x, torch.tensor(1.0), torch.ones(4), signed=False).sum().backward()
    reference = x.detach().double().requires_grad_()
    residual_quantize_reference(
        reference, torch.tensor(1.0).double(), torch.ones(4).double(), signed=False
    ).sum().backward()
    assert x.grad is not None and reference.grad is not None
    assert x.grad.tolist() == reference.grad.tolist() == [0, 0, 0, 1, 1]


@signs
@pytest.mark.parametrize("closed", range(4))
def test_gates_past_a_closed_one_get_exactly_no_gradient(closed: int, signed: bool) -> None:
    gates = torch.rand(4) + 0.1
    gates[closed] = 0
    gates.requires_grad_()
    x_q = residual_quantize(torch.randn(200), torch.tensor(1.0), gates, signed=signed)
    (grad,) = torch.autograd.grad(x_q, gates, torch.randn(200))
    assert (grad[closed + 1 :] == 0).all()
    assert (grad[: closed + 1] != 0).all()


@signs
def test_pruned_channels_are_exactly_zero_and_pass_nothing(signed: bool) -> None:
    x, z2 = torch.randn(3, 50, requires_grad=True), torch.tensor([1.0, 0.0, 0.5], requires_grad=True)
    gates = torch.rand(4, requires_grad=True)
    x_q = residual_quantize(x, torch.tensor(1.0), gates, z2, signed=signed)
    assert (x_q[1] == 0).all() and (x_q[0] != 0).any()
    dx, dgates = torch.autograd.grad(x_q[1].sum(), (x, gates), retain_graph=True)
    assert (dx == 0).all() and (dgates == 0).all()
    (dz2,) = torch.autograd.grad(x_q.sum(), z2)
    assert dz2[1] != 0  # so that it can come back


def test_channel_gates_of_a_vector_are_one_per_element() -> None:
    x, z2 = torch.tensor([0.34, 0.34]), torch.tensor([1.0, 0.5], requires_grad=True)
    x_q = residual_quantize(x, torch.tensor(1.0), torch.ones(4), z2, signed=True)
    (dz2,) = torch.autograd.grad(x_q.sum(), z2)
    torch.testing.assert_close(x_q, torch.tensor([0.34, 0.17]))
    torch.testing.assert_close(dz2, torch.tensor([0.34, 0.34]))


def test_reference_has_second_derivatives() -> None:
    """d2 x_q / dz4 dz8 = e_8 = -4/85 for x = 1.35 on the range 3; the closed form refuses."""
    x, beta = torch.tensor([1.35]).double(), torch.tensor(3.0).double()
    gates = torch.rand(4, dtype=torch.float64).requires_grad_()
    gates.data[2] = 0
    (first,) = torch.autograd.grad(residual_quantize_reference(x, beta, gates, signed=False), gates, create_graph=True)
    (second,) = torch.autograd.grad(first[0], gates)
    assert second[1].item() == pytest.approx(-4 / 85)
    fast = residual_quantize(x.float(), beta, gates, signed=False).square()
    (first,) = torch.autograd.grad(fast, gates, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].backward()


# --- memory, types, layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@channel_gates
def test_only_the_input_is_kept_for_backward(dtype: torch.dtype, pruned: bool) -> None:
    x = torch.randn(4, 64, dtype=dtype, requires_grad=True)
    beta, gates = torch.tensor(1.0, requires_grad=True), torch.rand(4, requires_grad=True)
    z2 = torch.rand(4, requires_grad=True) if pruned else None
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_q = residual_quantize(x, beta, gates, z2, signed=True)
    large = [tensor for tensor in saved if tensor.numel() > 1 + len(gates)]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]
    x_q.sum().backward()  # and it is enough
    assert x.grad is not None and gates.grad is not None


@signs
@channel_gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_computed_in_float32(dtype: torch.dtype, signed: bool, pruned: bool) -> None:
    def run(kind: torch.dtype) -> tuple[Tensor, ...]:
        x = rows.to(dtype).to(kind).requires_grad_()
        leaves = [x, *(v.clone().requires_grad_() for v in scalars)]
        x_q = residual_quantize(*leaves, signed=signed)
        assert x_q.dtype == kind
        return x_q, *torch.autograd.grad(x_q, leaves, g.to(dtype).to(kind))

    rows, g = torch.randn(8, 100), torch.randn(8, 100)
    scalars = [torch.tensor(1.1), torch.rand(4), *([torch.rand(8)] if pruned else [])]
    low, full = run(dtype), run(torch.float32)
    assert torch.equal(low[0], full[0].to(dtype)) and torch.equal(low[1], full[1].to(dtype))
    for by_low, by_full in zip(low[2:], full[2:], strict=True):
        assert by_low.dtype == torch.float32 and torch.equal(by_low, by_full)


@signs
def test_double_is_computed_in_double(signed: bool) -> None:
    half = half_width(2, signed)
    x = (torch.rand(100, dtype=torch.float64) * half).requires_grad_()
    beta, gates = torch.tensor(half, requires_grad=True), torch.rand(4, requires_grad=True)
    leaves = (x, beta, gates)
    x_q = residual_quantize(*leaves, signed=signed)
    expected = residual_quantize_reference(*leaves, signed=signed)
    assert x_q.dtype == torch.float64 and torch.equal(x_q, expected)
    assert not torch.equal(x_q, residual_quantize(x.float(), beta, gates, signed=signed).double())
    for by_one, by_other in zip(
        torch.autograd.grad(x_q.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert by_one.dtype == by_other.dtype and torch.equal(by_one, by_other)


def test_parameters_keep_their_own_type() -> None:
    parameters = [torch.tensor(1.1), torch.rand(4), torch.rand(3)]
    leaves = [p.to(torch.bfloat16).requires_grad_() for p in parameters]
    x_q = residual_quantize(torch.randn(3, 20), *leaves, signed=True)
    assert x_q.dtype == torch.float32
    x_q.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.bfloat16] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [8, 32])
def test_fixed_quantizer_keeps_the_type(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(100).to(dtype)
    x_q = quantize_fixed(x, torch.tensor(1.1), bits, signed=True)
    assert x_q.dtype == dtype
    assert torch.equal(x_q, quantize_fixed(x.float(), torch.tensor(1.1), bits, signed=True).to(dtype))


@signs
@pytest.mark.parametrize("bits", [2, 16, 32])
def test_nan_stays_where_it_is(bits: int, signed: bool) -> None:
    x, beta = torch.tensor([0.3, math.nan, -0.3]), torch.tensor(1.0)
    for x_q in (quantize_hard(x, beta, bits, signed), quantize_fixed(x, beta, bits, signed=signed)):
        assert x_q.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("shape", "pruned"), [((0,), False), ((3, 0), True), ((0, 3), True), ((2, 0, 4), False)])
def test_empty_tensors_pass_and_leave_zero_gradients(shape: tuple[int, ...], pruned: bool) -> None:
    x, beta = torch.zeros(shape, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    gates, z2 = torch.rand(4, requires_grad=True), torch.rand(shape[0], requires_grad=True) if pruned else None
    x_q = residual_quantize(x, beta, gates, z2, signed=False)
    assert x_q.shape == shape
    x_q.sum().backward()
    for leaf in (beta, gates, *([] if z2 is None else [z2])):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 3).contiguous().transpose(0, 3)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def sliced(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x), x])[len(x) :]


@signs
@channel_gates
@pytest.mark.parametrize("lay", [channels_last, transposed, strided, sliced])
def test_memory_layout_does_not_matter(lay: Callable[[Tensor], Tensor], signed: bool, pruned: bool) -> None:
    def run(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_(), *(v.clone().requires_grad_() for v in scalars)]
        x_q = residual_quantize(*leaves, signed=signed)
        return x_q, *torch.autograd.grad(x_q, leaves, g)

    values, g = torch.randn(6, 5, 4, 3), torch.randn(6, 5, 4, 3)
    scalars = [torch.tensor(1.1), torch.rand(4), *([torch.rand(6)] if pruned else [])]
    other = lay(values)
    assert other.stride() != values.stride() or other.storage_offset() > 0
    plain = run(values, g)
    for result in (run(other, g), run(lay(values), lay(g))):
        assert torch.equal(result[0], plain[0]) and torch.equal(result[1], plain[1])
        torch.testing.assert_close(result[2:], plain[2:], rtol=1e-5, atol=1e-5)


def test_result_can_be_written_in_another_type() -> None:
    x, beta, gates = torch.randn(50), torch.tensor(1.1), torch.rand(4)
    x_q = residual_quantize(x, beta, gates, signed=True, dtype=torch.bfloat16)
    assert x_q.dtype == torch.bfloat16
    assert torch.equal(x_q, residual_quantize(x, beta, gates, signed=True).bfloat16())


def test_number_of_gates_must_match_the_ladder() -> None:
    with pytest.raises(ValueError, match=r"gates must have shape \(4,\).*got \(3,\)"):
        residual_quantize(torch.zeros(2), torch.tensor(1.0), torch.ones(3), signed=True)


@pytest.mark.parametrize("bits", [1, 25, 32])
def test_integer_codes_refuse_widths_without_codes(bits: int) -> None:
    with pytest.raises(ValueError, match=f"integer codes exist from 2 to 24 bits; got {bits}"):
        integer_codes(torch.zeros(1), torch.tensor(1.0), bits, signed=True)


def test_integer_codes_are_int32_of_the_same_shape() -> None:
    codes = integer_codes(torch.randn(2, 3, 4), torch.tensor(1.0), 24, signed=False)
    assert codes.dtype == torch.int32 and codes.shape == (2, 3, 4)
    assert integer_codes(torch.tensor([9.0]), torch.tensor(1.0), 24, signed=False).item() == 2**24 - 1


# --- properties -----------------------------------------------------------------------------------------------------

betas = st.floats(2.0**-10, 2.0**10, width=32).map(torch.tensor)
fractions = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30).map(torch.tensor)
unit = st.floats(0, 1, width=32)
relaxed = st.lists(unit, min_size=4, max_size=4).map(torch.tensor)
properties = settings(deadline=None)


@properties
@given(betas, fractions, st.sampled_from(WIDTHS), st.booleans())
def test_hard_values_lie_on_the_grid_at_half_a_step_at_most(
    beta: Tensor, fraction: Tensor, bits: int, signed: bool
) -> None:
    x = fraction * beta
    for x_q in (quantize_hard(x, beta, bits, signed), quantize_fixed(x, beta, bits, signed=signed)):
        steps = x_q.double() / beta.double() * half_width(bits, signed)
        assert (steps - steps.round()).abs().max() <= 3 * ULP * half_width(bits, signed)
        assert steps.round().abs().max() <= top_code(bits, signed)
        error = (x_q.double() - clip(x, beta, signed).double()).abs() / beta.double()
        assert error.max() <= 0.5 / half_width(bits, signed) + 4 * ULP


@properties
@given(betas, fractions, st.sampled_from((*WIDTHS, 32)), st.booleans())
def test_quantizing_twice_changes_nothing(beta: Tensor, fraction: Tensor, bits: int, signed: bool) -> None:
    once = quantize_hard(fraction * beta, beta, bits, signed)
    twice = quantize_hard(once, beta, bits, signed)
    if bits == 32:
        torch.testing.assert_close(twice, once, rtol=2 * ULP, atol=0)
    else:
        assert torch.equal(twice, once)


@properties
@given(betas, fractions, relaxed)
def test_signed_quantizer_is_odd(beta: Tensor, fraction: Tensor, gates: Tensor) -> None:
    x = fraction * beta
    assert torch.equal(residual_quantize(-x, beta, gates, signed=True), -residual_quantize(x, beta, gates, signed=True))


@properties
@given(betas, fractions, st.sampled_from(WIDTHS), st.booleans())
def test_hard_quantizer_is_monotone(beta: Tensor, fraction: Tensor, bits: int, signed: bool) -> None:
    x_q = quantize_hard(fraction.sort().values * beta, beta, bits, signed)
    assert (x_q.diff() >= 0).all()


@properties
@given(betas, fractions, relaxed, st.booleans())
def test_soft_values_lie_between_the_rungs(beta: Tensor, fraction: Tensor, gates: Tensor, signed: bool) -> None:
    x = fraction * beta
    rungs = torch.stack([quantize_hard(x, beta, bits, signed) for bits in (*WIDTHS, 32)])
    x_q = residual_quantize(x, beta, gates, signed=signed)
    slack = 4 * ULP * beta
    assert (x_q >= rungs.amin(0) - slack).all() and (x_q <= rungs.amax(0) + slack).all()


@properties
@given(betas, fractions, relaxed, unit, st.booleans())
def test_channel_gate_scales_its_channel(
    beta: Tensor, fraction: Tensor, gates: Tensor, z2: float, signed: bool
) -> None:
    x = fraction[None] * beta
    expected = residual_quantize(x, beta, gates, signed=signed) * z2
    assert torch.equal(residual_quantize(x, beta, gates, torch.tensor([z2]), signed=signed), expected)


# --- the module -----------------------------------------------------------------------------------------------------


def test_module_quantizes_each_row_with_its_range_and_sign() -> None:
    module, x, gates = Quantizers([0.5, 2.0], [True, False], BitLadder((2, 4))), torch.randn(50), torch.tensor([0.7])
    for row, (beta, signed) in enumerate([(0.5, True), (2.0, False)]):
        expected = residual_quantize(x, torch.tensor(beta), gates, signed=signed, ladder=BitLadder((2, 4)))
        torch.testing.assert_close(module(row, x, gates), expected, rtol=1e-6, atol=1e-6)
    assert repr(module) == "Quantizers(tensors=2, bits=(2, 4))"


def test_module_learns_relative_changes() -> None:
    """d beta / d log beta = beta: a clipped input passes the range itself."""
    module = Quantizers([0.5, 2.0], [False, False])
    module(1, torch.tensor([9.0]), torch.ones(4)).sum().backward()
    assert module.log_range.grad is not None
    torch.testing.assert_close(module.log_range.grad, torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("direction", [1, -1])
def test_ranges_stay_positive_and_finite_under_a_violent_optimizer(direction: int) -> None:
    module, x = Quantizers([1e-6, 1.0, 1e6], [True, False, True]), torch.tensor([-2.0, 0.0, 0.5, 3.0])
    for optimizer in (torch.optim.Adam(module.parameters(), lr=20.0), torch.optim.SGD(module.parameters(), lr=1e8)):
        for _ in range(20):
            optimizer.zero_grad()
            (direction * module.ranges.log().sum()).backward()
            optimizer.step()
            assert (module.ranges > 0).all() and module.ranges.isfinite().all()
            assert all(module(row, x, torch.rand(4)).isfinite().all() for row in range(3))


def test_state_dict_restores_ranges_and_signs() -> None:
    saved = Quantizers([0.5, 2.0, 3.0], [True, False, True])
    loaded = Quantizers([1.0, 1.0, 1.0], [False, False, False])
    loaded.load_state_dict(saved.state_dict())
    assert loaded.signed == (True, False, True)
    assert torch.equal(loaded.ranges, saved.ranges)
    torch.testing.assert_close(loaded.ranges.detach(), torch.tensor([0.5, 2.0, 3.0]))
    assert all(isinstance(value, Tensor) for value in saved.state_dict().values())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-60])
def test_module_refuses_ranges_that_are_not_positive_and_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="ranges must be positive and finite; got"):
        Quantizers([1.0, bad], [True, True])


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_chunks_do_not_change_the_result(chunk: int, pruned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(6, 5, 3, 2), torch.randn(6, 5, 3, 2)
    scalars = [torch.tensor(1.1), torch.rand(4), *([torch.rand(6)] if pruned else [])]

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *scalars)]
        out = residual_quantize(*leaves, signed=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, g)]

    whole = run()
    monkeypatch.setattr("pyro_bbits.kernels.eager.CPU_CHUNK", chunk)
    parts = run()
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[2:], whole[2:], rtol=1e-5, atol=1e-5)  # sums in another order
