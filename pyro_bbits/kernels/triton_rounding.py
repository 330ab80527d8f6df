"""A Triton kernel that rounds to an ordinary grid in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_bbits.kernels.layout import dense, empty_like
from pyro_bbits.kernels.triton_grid import round_even

__all__ = ["round_to_grid"]

BLOCK, WARPS = 2048, 4


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["step"])
def round_flat(
    x: tl.tensor,
    out: tl.tensor,
    step: tl.tensor,
    size: tl.tensor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Round `size` values, `BLOCK` per program; clamped first: that changes no code and keeps what is rounded small."""
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.load(step)
    v = tl.div_rn(tl.load(x + lanes, mask=lanes < size, other=0.0).to(tl.float32), unit)
    v = tl.maximum(v, LOW * 1.0, propagate_nan=tl.PropagateNan.ALL)
    v = tl.minimum(v, HIGH * 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + lanes, (round_even(v) * unit).to(out.dtype.element_ty), mask=lanes < size)


def round_to_grid(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The body in Triton of :func:`pyro_bbits.kernels.rounding.round_to_grid`."""
    out = empty_like(x, False, x.dtype)
    if x.numel():
        source, programs = dense(x, False), triton.cdiv(x.numel(), BLOCK)
        with torch.cuda.device_of(x):
            round_flat[(programs,)](source, out, step, x.numel(), LOW=low, HIGH=high, BLOCK=BLOCK, num_warps=WARPS)
    return out
