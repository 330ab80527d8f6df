"""Batch norm, gates, ReLU and quantizer in one: value and every gradient are those of the steps in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bbits as bb
from pyro_bbits.inference.graphs import CudaGraphs
from pyro_bbits.kernels import linear, quantize_row, use_body
from pyro_bbits.kernels.norm import (
    can_fuse,
    is_channels_innermost,
    normalize_and_quantize,
    normalize_and_quantize_plain,
)
from pyro_bbits.ladder import BitLadder

SHAPES = [(33, 1), (7, 3), (3, 64, 5, 7), (2, 96, 3, 3), (3, 200, 1, 2), (41, 20)]
WINDOWS = [(3, 64, 4, 6), (2, 20, 16, 32), (2, 96, 2, 2), (3, 20, 10, 4), (5, 3, 6, 6), (2, 1, 4, 2)]
LADDERS = [(4,), (4, 8), (3, 6, 12), (8, 32)]

Norm = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=["plain", pytest.param("triton", id="triton")])
def norm(request: pytest.FixtureRequest) -> Norm:
    """Each body; the kernels run on a device or in the interpreter."""
    if request.param == "plain":
        return normalize_and_quantize_plain
    request.getfixturevalue("triton_runs")
    from pyro_bbits.kernels import triton_norm

    return triton_norm.normalize_and_quantize


def draw(shape: tuple[int, ...], device: str, pruned: bool = True) -> list[Tensor | None]:
    """Input, weight, bias and gates, a few of them 0 or 1; images have their channels last."""
    channels = shape[1]
    y = torch.randn(shape) * 1.5 + 0.3
    if y.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    gate = (torch.rand(channels) * 1.4 - 0.2).clamp(0, 1)
    drawn = y, torch.rand(channels) + 0.5, torch.randn(channels) * 0.2, gate if pruned else None
    return [None if x is None else x.to(device) for x in drawn]


def steps(given: Sequence[Tensor | None], ladder: BitLadder, pooled: bool) -> Tensor:
    """The function of input, weight, bias, gates and row in plain steps."""
    y, weight, bias, gate, row = given
    assert y is not None and row is not None
    normal = F.batch_norm(y, None, None, weight, bias, True, 0.1, 1e-5)
    if gate is not None:
        normal = normal * gate.reshape(-1, *[1] * (y.dim() - 2))
    active = F.max_pool2d(F.relu(normal), 2) if pooled else F.relu(normal)
    return quantize_row(active, row, signed=False, ladder=ladder)


def variables(tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if x is None else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def gradients(out: Tensor, given: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [x for x in given if x is not None], grad.to(out.dtype)))


def compare(
    norm: Norm,
    tensors: list[Tensor | None],
    row: Tensor,
    ladder: BitLadder,
    dtype: torch.dtype,
    pooled: bool = False,
) -> None:
    """Tolerances: rounding of the type for tensors; for gates, the part of the sum's terms that float32 leaves unsure.

    A value within a rounding error of a tie may fall on the other side, in steps of the finest rung the type resolves.
    """
    assert tensors[0] is not None
    tensors[0] = tensors[0].to(dtype)
    given, exact = variables([*tensors, row]), variables([*tensors, row], torch.float64)
    out, mean, variance = norm(*given, eps=1e-5, ladder=ladder, pooled=pooled)
    grad = torch.randn_like(out)
    assert out.dtype == dtype and is_channels_innermost(out) and (pooled or out.stride() == tensors[0].stride())
    assert not mean.requires_grad and not variance.requires_grad
    expected = steps(exact, ladder, pooled)
    ulp = torch.finfo(dtype).eps
    beta = row[0].item()
    finest = max((b for b in ladder.bits if b <= 16), default=2)
    torch.testing.assert_close(out.double(), expected, rtol=ulp, atol=beta / (2**finest - 1) * (finest >= 12) + 1e-6)
    *actual, drow = gradients(out, given, grad)
    *wanted, wanted_row = gradients(expected, exact, grad)
    for a, b in zip(actual, wanted, strict=True):
        assert (a.double() - b).norm() <= max(2 * ulp, 5e-6) * b.norm() + 1e-6
    spans = drow.new_tensor([1.0, *[beta / (2**bits - 1) for bits in ladder.bits[:-1]]])  # of what each gate adds
    assert ((drow - wanted_row).abs() <= (2e-5 * spans + 1e-6 * beta) * grad.float().abs().sum()).all()
    channels = exact[0].detach().transpose(0, 1).flatten(1)  # type: ignore[union-attr]
    torch.testing.assert_close(mean.double(), channels.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), channels.var(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_steps(norm: Norm, shape: tuple[int, ...], device: str) -> None:
    row = torch.tensor([2.1, 0.9, 0.7, 0.5, 0.3], device=device)
    compare(norm, draw(shape, device), row, BitLadder(), torch.float32)


@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_pooled_values_and_gradients_are_those_of_the_steps(norm: Norm, shape: tuple[int, ...], device: str) -> None:
    row = torch.tensor([2.1, 0.9, 0.7, 0.5, 0.3], device=device)
    compare(norm, draw(shape, device), row, BitLadder(), torch.float32, pooled=True)


def test_hard_gates_agree(norm: Norm, device: str) -> None:
    row = torch.tensor([2.1, 1.0, 0.0], device=device)
    compare(norm, draw((19, 24, 2, 3), device), row, BitLadder((2, 4, 8)), torch.float32)


def test_kernels_do_not_round_what_they_quantize_to_the_type_of_the_input(triton_runs: None, device: str) -> None:
    """In bfloat16 only input and result are rounded; the plain steps would put values near a tie on the wrong side."""
    from pyro_bbits.kernels import triton_norm

    row = torch.tensor([2.1, 1.0, 0.0], device=device)
    tensors = draw((19, 24, 2, 3), device)
    compare(triton_norm.normalize_and_quantize, tensors, row, BitLadder((2, 4, 8)), torch.bfloat16)
    tensors = draw((19, 24, 2, 4), device)
    compare(triton_norm.normalize_and_quantize, tensors, row, BitLadder((2, 4, 8)), torch.bfloat16, pooled=True)


@pytest.mark.parametrize("bits", LADDERS, ids=str)
def test_ladders_of_all_kinds_agree(norm: Norm, bits: tuple[int, ...], device: str) -> None:
    row = torch.tensor([1.7, *[0.6, 0.4][: len(bits) - 1]], device=device)
    compare(norm, draw((37, 5), device, pruned=False), row, BitLadder(bits), torch.float32)


def test_closed_channels_are_zero_and_get_no_gradient(norm: Norm, device: str) -> None:
    y, weight, bias, _ = draw((9, 4), device)
    gate = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device)
    row = torch.tensor([2.0, 1.0], device=device)
    given = variables([y, weight, bias, gate, row])
    out, *_ = norm(*given, eps=1e-5, ladder=BitLadder((2, 4)))
    *per_channel, _ = gradients(out, given, torch.ones_like(out))
    for values in (out, *per_channel):
        assert (values[..., ::2] == 0).all() and (values[..., 1::2] != 0).any()


def test_the_statistics_do_not_cancel_far_from_zero(norm: Norm, device: str) -> None:
    """Deviations of a mean 2000 of them away from zero, from the very float32 numbers."""
    y = (torch.randn(500, 3) + torch.tensor([2000.0, -2000.0, 0.0])).to(device)
    ones, zeros, row = torch.ones(3, device=device), torch.zeros(3, device=device), torch.ones(2, device=device)
    _, mean, variance = norm(y, ones, zeros, None, row, eps=1e-5, ladder=BitLadder((2, 4)))
    torch.testing.assert_close(variance.double(), y.double().var(0), rtol=2e-5, atol=0)
    torch.testing.assert_close(mean.double(), y.double().mean(0), rtol=3e-7, atol=1e-6)


def test_nan_stays_in_its_channel_and_reaches_every_gradient_of_the_row(norm: Norm, device: str) -> None:
    tensors = draw((9, 4), device)
    assert tensors[0] is not None
    tensors[0][5, 2] = float("nan")
    given = variables([*tensors, torch.tensor([2.0, 0.5, 0.5], device=device)])
    out, *_ = norm(*given, eps=1e-5, ladder=BitLadder((2, 4, 8)))
    dy, dweight, *_, drow = gradients(out, given, torch.ones_like(out))
    for values in (out, dy, dweight):
        assert values.isnan().any(0).tolist() == [False, False, True, False] if values.dim() > 1 else values[2].isnan()
    assert drow.isnan().all()


def test_the_gradient_of_a_window_reaches_the_first_of_its_largest_values(norm: Norm, device: str) -> None:
    """As that of max pooling; where the largest is below zero or above the range, none does."""
    windows = torch.tensor([[0.2, 0.4, 0.4, 0.1], [-3.0, -1.0, -2.0, -1.0], [0.1, 9.0, 0.3, 0.2], [0.0, 0.2, 0.1, 0.3]])
    y = windows.reshape(4, 1, 2, 2).to(device).contiguous(memory_format=torch.channels_last)
    y.requires_grad_()
    deviation, mean = y.detach().var(correction=0).sqrt(), y.detach().mean()
    row = torch.tensor([2.0, 1.0], device=device)  # the norm is the identity up to epsilon
    out, *_ = norm(y, deviation[None], mean[None], None, row, eps=1e-12, ladder=BitLadder((4, 8)), pooled=True)
    grad = torch.tensor([1.0, 2.0, 3.0, -1.0], device=device).reshape(out.shape)
    (dy,) = torch.autograd.grad(out, y, grad)
    reached = torch.zeros(4, 4)
    reached[0, 1], reached[3, 3] = 1.0, -1.0
    distance = ((y.detach() - mean) / deviation).reshape(4, 4).cpu()
    expected = reached - reached.mean() - distance * (reached * distance).mean()
    torch.testing.assert_close(dy.reshape(4, 4).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_nan_fills_its_window(norm: Norm, device: str) -> None:
    y, weight, bias, _ = draw((2, 4, 4, 4), device)
    assert y is not None
    y[1, 2, 3, 0] = float("nan")
    out, *_ = norm(y, weight, bias, None, torch.ones(2, device=device), eps=1e-5, ladder=BitLadder((2, 4)), pooled=True)
    assert out.isnan().any((0, 2, 3)).tolist() == [False, False, True, False]


def test_kernels_want_channels_innermost() -> None:
    ladder = BitLadder()
    images = torch.zeros(2, 3, 4, 4)
    last = images.contiguous(memory_format=torch.channels_last)
    assert not can_fuse(last, ladder) or last.is_cuda
    with use_body("triton"):
        assert can_fuse(last, ladder) and can_fuse(torch.zeros(2, 3), ladder)
        for other in (images, torch.zeros(2, 3, 4), torch.zeros(3, 2).T, torch.zeros(1, 3), last[:, :2]):
            assert not can_fuse(other, ladder)
        assert can_fuse(last, ladder, pooled=True)
        for odd in (last[:, :, :3], last[:, :, :, :3], torch.zeros(2, 4)):
            odd = odd.contiguous(memory_format=torch.channels_last) if odd.dim() == 4 else odd
            assert can_fuse(odd, ladder) and not can_fuse(odd, ladder, pooled=True)


def test_kernels_refuse_other_layouts(triton_runs: None) -> None:
    from pyro_bbits.kernels import triton_norm

    vector, row = torch.ones(3), torch.ones(5)
    with pytest.raises(ValueError, match="channels_last"):
        triton_norm.normalize_and_quantize(
            torch.zeros(2, 3, 4, 4), vector, vector, None, row, eps=1e-5, ladder=BitLadder()
        )
    odd = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"even height and width; got shape \(2, 3, 4, 5\)"):
        triton_norm.normalize_and_quantize(odd, vector, vector, None, row, eps=1e-5, ladder=BitLadder(), pooled=True)


def test_a_row_of_another_length_is_refused() -> None:
    vector = torch.ones(3)
    with pytest.raises(ValueError, match=r"row must have shape \(5,\)"):
        normalize_and_quantize(torch.rand(4, 3), vector, vector, None, torch.ones(3), eps=1e-5, ladder=BitLadder())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(),
        nn.Linear(16, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2),
    ),
    "pooling": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("spared", [False, True])
def test_a_network_trains_alike_with_and_without_fused_norms(
    triton_runs: None, device: str, name: str, spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All through kernels, so that the quantizers of both ways are the same; a linear layer may read what is fused."""
    monkeypatch.setattr(linear, "LARGE", 1 if spared else linear.LARGE)
    net = NETWORKS[name]()
    x = torch.rand(5, 1, 6, 6)
    network = bb.quantize(net, x, bits=(2, 4, 8)).to(device)
    x, gates, results = x.to(device, memory_format=torch.channels_last), network.open_gates(), []
    for fused in (True, False):
        network.fused = fused
        network.zero_grad()
        with use_body("triton"):
            y = network(x, gates=gates)
            y.square().sum().backward()
        results.append([y.detach(), *[p.grad for p in network.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")
def test_a_cuda_graph_repeats_the_kernels_bit_for_bit() -> None:
    """Captured on one input, replayed on another, and computed without a graph: sums have a fixed order."""
    device, ladder = "cuda", BitLadder()
    row = torch.tensor([2.1, 0.9, 0.7, 0.5, 0.3], device=device)
    given = variables([*draw((16, 96, 9, 7), device), row])
    grad = torch.randn_like(given[0])  # type: ignore[arg-type]

    def run() -> list[Tensor]:
        out, *_ = normalize_and_quantize(*given, eps=1e-5, ladder=ladder)  # type: ignore[arg-type]
        return [out, *gradients(out, given, grad)]

    graphs = CudaGraphs(torch.device(device))
    with graphs.working():
        run()
        captured: list[Tensor] = []
        replay = graphs.capture(lambda: captured.extend(run()))
        with torch.no_grad():
            given[0].copy_(torch.randn_like(given[0]))  # type: ignore[arg-type, union-attr]
        replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
