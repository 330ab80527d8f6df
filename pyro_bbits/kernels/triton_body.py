"""The quantizer as fused Triton kernels: one read and one write forward, two reads and one write backward."""

from functools import cache
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels.grid import grid_constants
from pyro_bbits.kernels.layout import dense, empty_like, ordered_like
from pyro_bbits.kernels.triton_channels import channels_backward, channels_finish, channels_forward
from pyro_bbits.kernels.triton_flat import flat_backward, flat_finish, flat_forward
from pyro_bbits.ladder import BitLadder

__all__ = ["backward", "forward", "quantize_row"]

WAVE = 4
"""Programs of the flat backward kernel that one multiprocessor works on at a time."""

FLAT_BYTES = 4096
"""Of input that such a program takes at a time, with the gradient of as many elements: 8 for each thread."""

CHANNELS_BLOCK = 1024
FORWARD_BLOCK, FORWARD_WARPS = 4096, 4
"""Of a tensor large enough to fill the device with such blocks twice."""

FLAT_SUM, CHANNELS_SUM = 2048, 512
"""Partials summed at a time, as each turn waits for memory once more: on an H200 all of a flat tensor's; and those of
channels by their last program, where two turns are enough."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _vector(x: Tensor) -> int:
    """Elements of a 16-byte access."""
    return 16 // x.element_size()


def _block(size: int, most: int) -> int:
    return int(min(most, max(128, triton.next_power_of_2(size))))


def _sums(count: int, at_a_time: int, grid: tuple[float, ...]) -> dict[str, Any]:
    """Sizes of what sums the partials."""
    return {"GRID": grid, "SUM": at_a_time, "SUMS": triton.cdiv(count, at_a_time)}


def forward(
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None,
    grid: tuple[float, ...],
    dtype: torch.dtype,
    counter: Tensor | None = None,
) -> Tensor:
    """Quantize, outside autograd; a counter, `(1,)` int32, is made fit for :func:`backward`."""
    per_channel = channel_gates is not None
    out = empty_like(x, per_channel, dtype)
    size = x.numel()
    if size == 0:
        return out
    source, row = dense(x, per_channel), row.contiguous()
    counts: dict[str, Any] = {"counter": row if counter is None else counter, "COUNTED": counter is not None}
    with torch.cuda.device_of(x):
        if channel_gates is not None:
            channels = len(x)
            block = _block(size // channels, 2048)
            shape = (channels, triton.cdiv(size // channels, block))
            gates = channel_gates.contiguous()
            channels_forward[shape](
                source, out, row=row, gates=gates, size=size // channels, GRID=grid, BLOCK=block, num_warps=4, **counts
            )
        else:
            large = size >= FORWARD_BLOCK * 2 * _multiprocessors(x.device)
            block, warps = (FORWARD_BLOCK, FORWARD_WARPS) if large else (1024, 4)
            flat_forward[(triton.cdiv(size, block),)](
                source, out, row=row, size=size, GRID=grid, BLOCK=block, num_warps=warps, **counts
            )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None,
    grid: tuple[float, ...],
    spend_grad: bool = False,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, row and channel gates; the last is empty where there are none.

    A counter that :func:`forward` has made fit saves the kernel that makes one.
    """
    per_channel = channel_gates is not None
    count = 0 if channel_gates is None else len(channel_gates)
    if x.numel() == 0:
        none = empty_like(x, per_channel, x.dtype)
        return none, row.new_zeros(row.shape, dtype=torch.float32), row.new_zeros(count, dtype=torch.float32)
    drow, dgates = (torch.empty(n, dtype=torch.float32, device=x.device) for n in (len(row), count))
    source, row = dense(x, per_channel), row.contiguous()
    arrived, grad = grad, ordered_like(grad, source)
    # each number of the one is read before that of the other is written in its place
    mine = (spend_grad or grad is not arrived) and grad.dtype == x.dtype
    dx = grad if mine else empty_like(x, per_channel, x.dtype)
    counter = torch.zeros(1, dtype=torch.int32, device=x.device) if counter is None else counter
    with torch.cuda.device_of(x):
        if channel_gates is None:
            _flat_backward(grad, source, row, dx, drow, counter, grid)
        else:
            _channels_backward(grad, source, row, channel_gates.contiguous(), dx, drow, dgates, counter, grid)
    return dx, drow, dgates


def _flat_backward(
    grad: Tensor, x: Tensor, row: Tensor, dx: Tensor, drow: Tensor, counter: Tensor, grid: tuple[float, ...]
) -> None:
    """As many blocks per program as keep all programs resident at once.

    Where each has one or two, there is so little to do that another kernel would cost more than counting the programs;
    where each has more, they all arrive at the counter together and wait for each other.
    """
    size, block = x.numel(), FLAT_BYTES // x.element_size()
    blocks = triton.cdiv(triton.cdiv(size, block), WAVE * _multiprocessors(x.device))
    count = triton.cdiv(size, block * blocks)
    partials = torch.empty(len(grid) - 2, count, dtype=torch.float32, device=x.device)
    sums = _sums(count, FLAT_SUM, grid)
    flat_backward[(count,)](
        x,
        grad,
        dx,
        partials,
        drow,
        counter,
        row,
        size,
        count,
        BLOCK=block,
        BLOCKS=blocks,
        VECTOR=_vector(x),
        WHOLE=blocks <= 2,
        num_warps=block // 256,
        **sums,
    )
    if blocks > 2:
        flat_finish[(1,)](partials, drow, row, count, num_warps=8, **sums)


def _channels_backward(
    grad: Tensor,
    x: Tensor,
    row: Tensor,
    gates: Tensor,
    dx: Tensor,
    drow: Tensor,
    dgates: Tensor,
    counter: Tensor,
    grid: tuple[float, ...],
) -> None:
    count, size = len(gates), x.numel() // len(gates)
    block = _block(size, CHANNELS_BLOCK)
    partials = torch.empty(len(grid) - 1, count, dtype=torch.float32, device=x.device)
    whole = count <= 2 * CHANNELS_SUM
    channels_backward[(count,)](
        x,
        grad,
        dx,
        partials,
        drow,
        dgates,
        counter,
        row,
        gates,
        size,
        count,
        BLOCK=block,
        BLOCKS=triton.cdiv(size, block),
        VECTOR=_vector(x),
        WHOLE=whole,
        num_warps=4,
        **_sums(count if whole else 0, CHANNELS_SUM, grid),
    )
    if not whole:
        sums = _sums(count, FLAT_SUM, grid)
        channels_finish[(1,)](partials, drow, dgates, row, gates, count, num_warps=8, **sums)


class _QuantizeRow(torch.autograd.Function):
    """The eager way to the kernels: half the host time of an operator. Only `x` is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row: Tensor,
        channel_gates: Tensor | None,
        grid: tuple[float, ...],
        dtype: torch.dtype,
        spend_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, row, channel_gates)
        ctx.grid, ctx.spend_grad = grid, spend_grad
        ctx.counter = torch.empty(1, dtype=torch.int32, device=x.device)
        return forward(x, row, channel_gates, grid, dtype, ctx.counter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row, channel_gates = ctx.saved_tensors
        dx, drow, dgates = backward(grad, x, row, channel_gates, ctx.grid, ctx.spend_grad, ctx.counter)
        gates = None if channel_gates is None else dgates.to(channel_gates.dtype)
        return dx, drow.to(row.dtype), gates, None, None, None


@torch.library.custom_op("pyro_bbits::quantize_row", mutates_args=())
def _quantize_op(
    x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool, bits: list[int], dtype: torch.dtype
) -> Tensor:
    return forward(x, row, channel_gates, grid_constants(BitLadder(tuple(bits)), signed), dtype)


@_quantize_op.register_fake
def _(
    x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool, bits: list[int], dtype: torch.dtype
) -> Tensor:
    return empty_like(x, channel_gates is not None, dtype)


@torch.library.custom_op("pyro_bbits::quantize_row_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool, bits: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, x, row, channel_gates, grid_constants(BitLadder(tuple(bits)), signed))


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool, bits: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    count = 0 if channel_gates is None else len(channel_gates)
    drow, dgates = (row.new_empty(n, dtype=torch.float32) for n in (len(row), count))
    return empty_like(x, channel_gates is not None, x.dtype), drow, dgates


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, row, channel_gates, ctx.signed, ctx.bits, _ = inputs
    ctx.save_for_backward(x, row, channel_gates)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, row, channel_gates = ctx.saved_tensors
    dx, drow, dgates = _backward_op(grad, x, row, channel_gates, ctx.signed, ctx.bits)
    return dx, drow.to(row.dtype), None if channel_gates is None else dgates.to(channel_gates.dtype), None, None, None


_quantize_op.register_autograd(_differentiate, setup_context=_keep)


def quantize_row(
    x: Tensor,
    row: Tensor,
    channel_gates: Tensor | None = None,
    *,
    signed: bool,
    ladder: BitLadder,
    dtype: torch.dtype | None = None,
    spend_grad: bool = False,
) -> Tensor:
    """The body in Triton: 16- and 32-bit floats, computed in float32; see :func:`pyro_bbits.kernels.quantize_row`.

    Gradients are sums in a fixed order, so they are the same bit for bit each time. Nothing waits for the device.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, _quantize_op(x, row, channel_gates, signed, list(ladder.bits), dtype or x.dtype))
    grid = grid_constants(ladder, signed)
    return cast(Tensor, _QuantizeRow.apply(x, row, channel_gates, grid, dtype or x.dtype, spend_grad))
