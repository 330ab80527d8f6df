"""The kernel that rounds to a grid gives PyTorch's numbers, and is used where it may be."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_bbits.kernels import use_body
from pyro_bbits.kernels.rounding import _has_kernel, round_to_grid
from pyro_bbits.quantizer import quantize_fixed

pytestmark = pytest.mark.usefixtures("triton_runs")

LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: torch.stack([x, x], -1)[..., 0],
    lambda x: x[:, :, :0],
    lambda x: x[:1, :1, :1, :1],
]


def both(x: Tensor, beta: Tensor, bits: int, signed: bool) -> list[Tensor]:
    results = []
    for body in ("eager", "triton"):
        with use_body(body), torch.no_grad():
            results.append(quantize_fixed(x, beta, bits, signed=signed))
    return results


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_kernel_and_pytorch_agree_to_the_last_bit(
    layout: int, dtype: torch.dtype, bits: int, signed: bool, device: str
) -> None:
    x = LAYOUTS[layout](torch.randn(3, 8, 9, 21, device=device).mul(1.5).to(dtype))
    plain, kernel = both(x, torch.tensor(1.3, device=device), bits, signed)
    # Triton's interpreter cuts off the digits that bfloat16 does not hold, where a GPU rounds
    ulp = 2.0**-7 if dtype == torch.bfloat16 and device == "cpu" else 0.0
    torch.testing.assert_close(kernel, plain, rtol=ulp, atol=0.0)
    assert kernel.dtype == dtype
    if layout < 2:
        assert kernel.stride() == x.stride()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_ties_ends_and_what_is_no_number(signed: bool, device: str) -> None:
    """All ties of a grid of 8 bits, values far outside it, infinities and NaN."""
    ties = torch.arange(-300, 300, device=device) + 0.5
    odd = torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, 1e-40], device=device)
    x, step = torch.cat([ties * 0.25, odd]), torch.tensor(0.25, device=device)
    low, high = (-127, 127) if signed else (0, 255)
    with use_body("triton"), torch.no_grad():
        found = round_to_grid(x, step, low, high)
        missing = round_to_grid(torch.tensor([math.nan], device=device), step, low, high)
    assert torch.equal(found, (x / 0.25).round().clamp(low, high) * 0.25)
    assert missing.isnan().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_the_kernel_is_left_out_where_it_cannot_serve() -> None:
    """With gradients, beyond the widths whose rounding it knows, for another body, mapped over rows, and traced."""
    x, step = torch.ones(3, requires_grad=True), torch.tensor(0.5)
    with use_body("triton"):
        assert not _has_kernel(x, step, 3)
        round_to_grid(x, step, -3, 3).sum().backward()
        with torch.no_grad():
            assert _has_kernel(x, step, 2**16 - 1) and not _has_kernel(x, step, 2**16)
            rows = x.detach().expand(2, 3) * torch.tensor([[0.2], [0.9]])
            mapped = torch.func.vmap(lambda row: round_to_grid(row, step, -3, 3))(rows)
            traced = torch.jit.trace(lambda row: round_to_grid(row, step, -3, 3), rows, check_trace=False)(rows)
        assert mapped.tolist() == traced.tolist() == [[0.0] * 3, [1.0] * 3]
    with use_body("eager"), torch.no_grad():
        assert not _has_kernel(x, step, 3)
    assert x.grad is not None
