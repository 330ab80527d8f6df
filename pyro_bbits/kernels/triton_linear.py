"""A linear layer that quantizes its weight in both passes, by the Triton kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels import triton_body

__all__ = ["SparedLinear"]


class SparedLinear(torch.autograd.Function):
    """:func:`pyro_bbits.kernels.linear.quantized_linear` of rows, `(N, in)`; nothing but what it is given is kept.

    The product is of the type of its operands in both passes, whatever autocast says.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        row: Tensor,
        channel_gates: Tensor | None,
        bias: Tensor | None,
        grid: tuple[float, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, row, channel_gates)
        ctx.grid, ctx.dtype = grid, dtype
        ctx.counter = torch.empty(1, dtype=torch.int32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, triton_body.forward(weight, row, channel_gates, grid, dtype, ctx.counter), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row, channel_gates = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = None
            if ctx.needs_input_grad[0]:
                dx = grad @ triton_body.forward(weight, row, channel_gates, ctx.grid, ctx.dtype)
            dquantized = grad.t() @ x  # only now, when the quantized weight is gone
        given = dquantized, weight, row, channel_gates, ctx.grid
        dweight, drow, dgates = triton_body.backward(*given, spend_grad=True, counter=ctx.counter)
        gates = None if channel_gates is None else dgates.to(channel_gates.dtype)
        return dx, dweight, drow.to(row.dtype), gates, grad.sum(0) if ctx.needs_input_grad[4] else None, None, None
