"""A linear layer that quantizes its weight in both passes, by the Triton kernels."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels import triton_body
from pyro_bbits.kernels.grid import grid_constants
from pyro_bbits.ladder import BitLadder

__all__ = ["quantized_linear"]


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        row: Tensor,
        channel_gates: Tensor | None,
        bias: Tensor | None,
        grid: tuple[float, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, row, channel_gates)
        ctx.grid = grid
        return F.linear(x, triton_body.forward(weight, row, channel_gates, grid, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row, channel_gates = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grad @ triton_body.forward(weight, row, channel_gates, ctx.grid, x.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        dquantized = flat.t() @ x.reshape(-1, x.shape[-1])  # only now, when the quantized weight is gone
        dweight, drow, dgates = triton_body.backward(dquantized, weight, row, channel_gates, ctx.grid, True)
        dbias = flat.sum(0) if ctx.needs_input_grad[4] else None
        return dx, dweight, drow.to(row.dtype), None if channel_gates is None else dgates, dbias, None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    row: Tensor,
    channel_gates: Tensor | None,
    bias: Tensor | None,
    *,
    ladder: BitLadder,
    signed: bool = True,
) -> Tensor:
    """The layer by kernels; see :func:`pyro_bbits.kernels.linear.quantized_linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    grid = grid_constants(ladder, signed)
    return cast(Tensor, _QuantizedLinear.apply(x, weight, row, channel_gates, bias, grid))
