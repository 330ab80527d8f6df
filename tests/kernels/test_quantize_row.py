"""All bodies compute one function: value and every gradient are those of the oracle in float64."""

import math

import pytest
import torch
from torch import Tensor

from pyro_bbits.kernels import quantize_row, use_body
from pyro_bbits.kernels.dispatch import Body
from pyro_bbits.kernels.grid import exact_ratios, half_width
from pyro_bbits.ladder import BitLadder

ULP = 2.0**-23
LADDERS = [(2, 4, 8, 16, 32), (2, 4, 8), (4, 8), (3, 6, 12)]
SHAPES = [(2, 8, 8, 4), (3, 5, 7, 9), (2, 1, 1, 1)]

bodies = pytest.mark.parametrize("body", ["reference", "eager", "compiled", "triton"])
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
channel_gates = pytest.mark.parametrize("pruned", [True, False], ids=["z2", "no-z2"])


@pytest.fixture(autouse=True)
def body_runs(request: pytest.FixtureRequest) -> None:
    """Kernels need a device or the interpreter; the other bodies do not wait for Triton."""
    if request.node.callspec.params.get("body") == "triton":
        request.getfixturevalue("triton_runs")


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 3).contiguous().transpose(0, 3)


LAYOUTS = [contiguous, channels_last, strided, transposed]
GATES = ["soft", "hard", "zeros"]


def gate_values(kind: str, count: int) -> Tensor:
    if kind == "soft":
        return torch.rand(count)
    return (torch.arange(count) < (count + 1) // 2 if kind == "hard" else torch.zeros(count)).float()


def ties_nearby(x: Tensor, beta: Tensor, signed: bool, ladder: BitLadder) -> Tensor:
    """Elements so near a rounding tie or a clip end, on any rung, that float32 and float64 may part there."""
    half = half_width(ladder.base, signed)
    t = x.double() / beta.double() * half
    slack, scale, residual = 4 * ULP * half, 1, t
    near, inside = (t.abs() - half).abs() < slack, t.abs() < half
    for ratio in (1, *exact_ratios(ladder)):
        scale, residual = scale * ratio, residual * ratio
        near |= inside & (((residual - residual.floor()) - 0.5).abs() < slack * scale)
        residual = residual - residual.round()
    return near


def draw(shape: tuple[int, ...], dtype: torch.dtype, signed: bool, ladder: BitLadder, beta: Tensor) -> Tensor:
    """A third outside the range, a few zeros; what lies on a tie is moved to a point of the coarsest grid."""
    x = (torch.randn(shape) * beta).to(dtype)
    near = ties_nearby(x, beta, signed, ladder)
    point = (beta / half_width(ladder.base, signed)).to(dtype)
    x[near] = point if not ties_nearby(point, beta, signed, ladder) else 0
    return x


def run(body: Body, leaves: list[Tensor], g: Tensor, dtype: torch.dtype | None = None, **grid: object) -> list[Tensor]:
    """Value, then the gradients of `x`, row and channel gates."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with use_body(body):
        out = quantize_row(*leaves, dtype=dtype, **grid)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]


def compare(body: Body, leaves: list[Tensor], g: Tensor, signed: bool, ladder: BitLadder) -> None:
    """Sums may be off by float32's rounding of each term; a residual by that of the value it is left of."""
    got = [v.double().cpu() for v in run(body, leaves, g, signed=signed, ladder=ladder)]
    doubles = [leaf.double().cpu() for leaf in leaves]
    want = run("reference", doubles, g.double().cpu(), signed=signed, ladder=ladder)
    beta, weight = doubles[1][0], g.abs().double().cpu()
    # half a unit in the last place; Triton's interpreter cuts bfloat16 off where the device rounds
    written = torch.finfo(leaves[0].dtype).eps / (2 if body != "triton" or leaves[0].is_cuda else 1)
    torch.testing.assert_close(got[0], want[0], rtol=written, atol=4 * ULP * beta.item())
    torch.testing.assert_close(got[1], want[1], rtol=written + 2 * ULP, atol=0)
    assert abs(got[2][0] - want[2][0]) <= 4 * ULP * weight.sum()
    assert ((got[2][1:] - want[2][1:]).abs() <= 4 * ULP * beta * weight.sum()).all()
    if len(leaves) == 3:
        assert ((got[3] - want[3]).abs() <= 4 * ULP * beta * weight.flatten(1).sum(1)).all()


@bodies
@signs
@types
@channel_gates
def test_bodies_equal_the_oracle(body: Body, signed: bool, dtype: torch.dtype, pruned: bool, device: str) -> None:
    """Each ladder in two layouts; sizes and kinds of gates take turns."""
    for i in range(8):
        bits, lay, shape, kind = LADDERS[i % 4], LAYOUTS[(i + i // 4) % 4], SHAPES[(i + i // 3) % 3], GATES[i % 3]
        ladder, beta = BitLadder(bits), torch.empty(()).uniform_(-3, 3).exp()
        x = lay(draw(shape, dtype, signed, ladder, beta).to(device))
        g = lay(torch.randn(shape).to(dtype).to(device))
        row = torch.cat([beta[None], gate_values(kind, len(bits) - 1)]).to(device)
        z2 = [gate_values(kind, shape[0]).to(device)] if pruned else []
        compare(body, [x, row, *z2], g, signed, ladder)


@bodies
@signs
@channel_gates
@pytest.mark.parametrize(("given", "written"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", None)])
def test_result_is_written_in_the_type_asked_for(
    body: Body, signed: bool, pruned: bool, given: str, written: str | None, device: str
) -> None:
    """The gradient arrives in that type, and is not rounded again."""
    x, row = torch.randn(4, 30, device=device).to(getattr(torch, given)), torch.tensor([1.1, 0.9, 0.7], device=device)
    leaves = [x, row, *([torch.rand(4, device=device)] if pruned else [])]
    kind = getattr(torch, written or given)
    g, ladder = torch.randn(4, 30, device=device).to(kind), BitLadder((2, 4, 8))
    got = run(body, leaves, g, dtype=kind if written else None, signed=signed, ladder=ladder)
    plain = run(body, [x.float(), *leaves[1:]], g.float(), signed=signed, ladder=ladder)
    assert got[0].dtype == kind and [v.dtype for v in got[1:]] == [leaf.dtype for leaf in leaves]
    cut = torch.finfo(kind).eps / (1 if body == "triton" and device == "cpu" else 2)
    torch.testing.assert_close(got[0].float(), plain[0], rtol=cut, atol=1e-7)
    torch.testing.assert_close(got[1].float(), plain[1], rtol=torch.finfo(x.dtype).eps, atol=1e-7)
    torch.testing.assert_close(got[2:], plain[2:], rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("body", ["eager", "compiled", "triton"])
@signs
def test_only_the_input_is_kept_for_backward(body: Body, signed: bool, device: str) -> None:
    x, row, z2 = (torch.rand(n, device=device, requires_grad=True) for n in ((6, 50), (5,), (6,)))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with use_body(body), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = quantize_row(x, row, z2, signed=signed, ladder=BitLadder(), dtype=torch.bfloat16)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() > 6] == [x.data_ptr()]
    out.sum().backward()
    assert x.grad is not None and row.grad is not None and z2.grad is not None


@bodies
@signs
@channel_gates
def test_nan_stays_where_it_is(body: Body, signed: bool, pruned: bool, device: str) -> None:
    """It shows in the value and in every sum it belongs to, and in no other channel."""
    x = torch.tensor([[0.3, math.nan, -0.3], [2.0, 0.4, -2.0]], device=device)
    leaves = [
        x,
        torch.tensor([1.0, 0.5], device=device),
        *([torch.tensor([1.0, 0.5], device=device)] if pruned else []),
    ]
    out, dx, drow, *dz2 = run(body, leaves, torch.ones_like(x), signed=signed, ladder=BitLadder((2, 4)))
    assert out.isnan().tolist() == [[False, True, False], [False] * 3]
    assert dx.isfinite().all() and drow.isnan().all()
    assert [v.isnan().tolist() for v in dz2] == [[True, False]] * pruned


@bodies
@pytest.mark.parametrize(("shape", "pruned"), [((0,), False), ((3, 0), True), ((0, 3), True), ((2, 0, 4), False)])
def test_empty_tensors_pass_and_leave_zero_gradients(
    body: Body, shape: tuple[int, ...], pruned: bool, device: str
) -> None:
    x, row = torch.zeros(shape, device=device), torch.rand(5, device=device)
    z2 = [torch.rand(shape[0], device=device)] if pruned else []
    out, dx, *rest = run(body, [x, row, *z2], torch.zeros_like(x), torch.bfloat16, signed=False, ladder=BitLadder())
    assert out.shape == dx.shape == shape and out.dtype == torch.bfloat16
    for gradient, leaf in zip(rest, [row, *z2], strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@bodies
@channel_gates
def test_backward_is_the_same_each_time(body: Body, pruned: bool, device: str) -> None:
    x, g = torch.randn(2, 3, 60, 60, device=device).unbind()
    leaves = [x, torch.rand(5, device=device), *([torch.rand(3, device=device)] if pruned else [])]
    first, *others = (run(body, leaves, g, signed=True, ladder=BitLadder()) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@bodies
@signs
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hard_gates_give_every_level_and_no_other(body: Body, bits: int, signed: bool, device: str) -> None:
    """2^b levels, or 2^b - 1 around zero; the same float32 numbers whatever the body."""
    ladder, beta = BitLadder((2, 4, 8)), 0.37
    row = torch.tensor([beta, *ladder.open_gates(bits)], device=device)
    x = torch.linspace(-1.2 * beta, 1.2 * beta, 20_000, device=device)
    with use_body(body):
        levels = quantize_row(x, row, signed=signed, ladder=ladder).unique()
    codes = torch.arange(-(2 ** (bits - 1)) + 1 if signed else 0, 2 ** (bits - 1) if signed else 2**bits)
    expected = codes.double() * row[0].double().cpu() / half_width(bits, signed)
    torch.testing.assert_close(levels.double().cpu(), expected, rtol=3 * ULP, atol=0)


@bodies
@signs
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_codes_never_overflow(body: Body, bits: int, signed: bool, device: str) -> None:
    """At the ends, where a signed range has its rounding ties, just around them and far outside, for many ranges."""
    ladder, top = BitLadder((2, 4, 8, 16)), 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    factors = torch.tensor([1 - ULP, 1.0, 1 + ULP, 1.5, 1e4, math.inf])
    expected = torch.tensor([[top], [-top if signed else 0]]).double().expand(2, len(factors))
    gates = torch.tensor(ladder.open_gates(bits)).float()
    with use_body(body):
        for beta in torch.empty(20 if body == "triton" else 200).uniform_(-14, 14).exp():
            x, row = torch.stack([beta * factors, -beta * factors]), torch.cat([beta[None], gates])
            out = quantize_row(x.to(device), row.to(device), signed=signed, ladder=ladder).double().cpu()
            assert torch.equal((out / beta.double() * half_width(bits, signed)).round(), expected)


@bodies
def test_pruned_channels_are_zero_and_can_come_back(body: Body, device: str) -> None:
    x, z2 = torch.full((2, 50), 0.4, device=device), torch.tensor([0.0, 1.0], device=device)
    row = torch.tensor([1.0, 1.0], device=device)
    out, dx, drow, dz2 = run(body, [x, row, z2], torch.ones_like(x), signed=False, ladder=BitLadder((2, 4)))
    assert (out[0] == 0).all() and (dx[0] == 0).all() and (dx[1] == 1).all()
    torch.testing.assert_close(dz2, torch.full_like(dz2, 20.0))
    alone = run(body, [x[1:], row, z2[1:]], torch.ones_like(x[1:]), signed=False, ladder=BitLadder((2, 4)))
    torch.testing.assert_close(drow, alone[2])


@bodies
@channel_gates
@pytest.mark.parametrize("shape", [(2, 2100), (1, 12_345), pytest.param((1030, 3), marks=pytest.mark.slow)])
def test_many_blocks_add_up(body: Body, shape: tuple[int, ...], pruned: bool, device: str) -> None:
    """Sizes that no block divides, more programs than one and more blocks than one for each."""
    x, g = torch.randn(2, *shape, device=device).unbind()
    row, ladder = torch.tensor([1.1, 0.5, 0.25], device=device), BitLadder((2, 4, 8))
    x[ties_nearby(x, row[0], True, ladder)] = 0.0
    compare(body, [x, row, *([torch.rand(len(x), device=device)] if pruned else [])], g, True, ladder)
