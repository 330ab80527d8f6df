"""Draws of all gates of a network by the fused Triton kernels, as one differentiable operation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels.availability import triton_runs
from pyro_bbits.kernels.dispatch import forced_body

__all__ = ["GateTables", "Options", "draw", "usable"]

BLOCK = 512
"""Most channels that one program takes at a time, one per thread: the chain of operations on each is long."""


class Options(NamedTuple):
    """What the kernels are compiled for, and the number of data points.

    Attributes:
        temperature: Temperature of the relaxation.
        shift: Log-odds of an open gate whose logit is 0.
        straight: Binary gates with straight-through gradients instead of hard concrete ones.
        simplified: The paper's penalty instead of the KL.
        num_data: Number of data points that multiplies the costs; None leaves the KL out.
    """

    temperature: float
    shift: float
    straight: bool
    simplified: bool
    num_data: int | None


class GateTables(NamedTuple):
    """What a draw reads besides logits and noise.

    Attributes:
        channel_strength: `(C,)` costs per data point.
        strength: `(T, R)` costs per data point.
        owner: `(C,)` int64, each channel's tensor.
        order: `(C,)` int32, channels sorted by tensor.
        ends: `(T,)` int32, where each tensor's channels end in that order.
    """

    channel_strength: Tensor
    strength: Tensor
    owner: Tensor
    order: Tensor
    ends: Tensor


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32 on CUDA with Triton installed, or if :func:`use_body` says so."""
    forced = forced_body()
    if forced is not None:
        return forced == "triton"
    return all(t.is_cuda and t.dtype == torch.float32 for t in tensors) and triton_runs(tensors[0].device)


def draw(
    channel_logits: Tensor, tensor_logits: Tensor, noise: Tensor, tables: GateTables, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Channel gates `(C,)`, residual gates `(T, R)` and KL `(T,)` in nats per data set, or None.

    Arguments:
        channel_logits: `(C,)`.
        tensor_logits: `(T, R)`, at least one tensor.
        noise: `(C + R T,)` uniform numbers in [0, 1): channels, then rung by rung.
        tables: Costs and channels of each tensor.
        options: The rest.
    """
    drawn = _Draw.apply(channel_logits, tensor_logits, noise, tables, options)
    complete: tuple[Tensor, Tensor, Tensor | None] = drawn if options.num_data is not None else (*drawn, None)
    return complete


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, channel_logits: Tensor, tensor_logits: Tensor, noise: Tensor, tables: GateTables, options: Options
    ) -> tuple[Tensor, ...]:
        from pyro_bbits.kernels.triton_gates import draw_forward  # Triton is optional

        channel_logits, tensor_logits = channel_logits.contiguous(), tensor_logits.contiguous()
        priced, (rows, rungs) = options.num_data is not None, tensor_logits.shape
        z2, z = torch.empty_like(channel_logits), torch.empty_like(tensor_logits)
        kl, slopes, kl_slopes = noise.new_empty(rows), torch.empty_like(noise), torch.empty_like(noise)
        with torch.cuda.device_of(noise):
            draw_forward[(rows,)](
                channel_logits,
                tensor_logits,
                tables.channel_strength,
                tables.strength,
                tables.order,
                tables.ends,
                noise,
                z2,
                z,
                kl,
                slopes,
                kl_slopes,
                float(options.num_data or 0),
                len(z2),
                RUNGS=rungs,
                TEMPERATURE=options.temperature,
                SHIFT=options.shift,
                STRAIGHT=options.straight,
                SIMPLIFIED=options.simplified,
                PRICED=priced,
                BLOCK=(block := _block(len(z2))),
                LANES=_power(rungs),
                num_warps=block // 32,
            )
        ctx.save_for_backward(slopes, kl_slopes, tables.owner)
        ctx.rungs = rungs
        ctx.set_materialize_grads(False)
        return (z2, z, kl) if priced else (z2, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from pyro_bbits.kernels.triton_gates import draw_backward

        slopes, kl_slopes, owner = ctx.saved_tensors
        channels, size = len(owner), len(slopes)
        dz2, dz, dkl = (*(g if g is None else g.contiguous() for g in grads[:2]), grads[2] if grads[2:] else None)
        d_channels, d_tensors = slopes.new_empty(channels), slopes.new_empty(size - channels)
        block = _block(size)
        with torch.cuda.device_of(slopes):
            draw_backward[(-(-size // block),)](
                slopes,
                kl_slopes,
                owner,
                slopes if dz2 is None else dz2,
                slopes if dz is None else dz,
                slopes if dkl is None else dkl,
                d_channels,
                d_tensors,
                channels,
                size,
                0 if dkl is None else dkl.stride(0),
                RUNGS=ctx.rungs,
                Z2=dz2 is not None,
                Z=dz is not None,
                PRICED=dkl is not None,
                BLOCK=block,
                num_warps=4,
            )
        return d_channels, d_tensors.view(-1, ctx.rungs) if ctx.rungs else None, None, None, None


def _block(size: int) -> int:
    """A block that holds `size` gates, or part of them."""
    return min(BLOCK, max(128, _power(size)))


def _power(size: int) -> int:
    """The least power of two from `size` on."""
    return 1 << max(0, size - 1).bit_length()
