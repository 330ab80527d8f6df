"""Launches of the kernels of :mod:`pyro_bbits.kernels.triton_norm`, and the gradient they make up."""

from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels import triton_norm as kernels
from pyro_bbits.kernels.norm import is_channels_innermost
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import _exact_ratios, clip_ends, half_width

__all__ = ["fused_norm"]

CHANNELS = (128, 64, 32, 16)
"""Channels that a program may work on."""

PARTS = 128
"""Partial sums that are added up at a time."""


def _constants(ladder: BitLadder) -> dict[str, Any]:
    ratios = tuple(float(r) for r in _exact_ratios(ladder))
    return {
        "HALF": half_width(ladder.base, False),
        "HIGH": clip_ends(ladder.base, False)[1],
        "RATIOS": ratios,
        "EXACT": len(ratios),
    }


def _channels(count: int) -> int:
    """Channels per program: as many as possible that leave the fewest lanes without one."""
    return min(CHANNELS, key=lambda size: triton.cdiv(count, size) * size)


def _resident(device: torch.device) -> int:
    """Programs that run at the same time: five on each processor."""
    return 5 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


class _Sweep:
    """How a tensor is cut into tiles, and tiles are dealt to programs.

    Attributes:
        rows: `M`, places per channel.
        channels: `C`.
        size: Tile, rows by channels.
        across, down: Tiles side by side, and one below another.
        tiles: How many of the latter a program sums over, so that all programs run at once.
        programs: Programs one below another that sum, `P`.
        rounds: In how many blocks of rows their sums are added up.
    """

    def __init__(self, y: Tensor, elements: int) -> None:
        self.channels = y.shape[1]
        self.rows = y.numel() // self.channels
        width = _channels(self.channels)
        self.size = {"BM": elements // width, "BC": width}
        self.across = triton.cdiv(self.channels, width)
        down = triton.cdiv(self.rows, self.size["BM"])
        self.tiles = triton.cdiv(down * self.across, _resident(y.device))
        self.down, self.programs = down, triton.cdiv(down, self.tiles)
        self.rounds = triton.cdiv(self.programs, PARTS)


def _statistics(
    y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean, unbiased variance, 1 / standard deviation, and scale and shift of the gated norm; `(C,)` each."""
    sweep = _Sweep(y, 2048)
    part = y.new_empty((2, sweep.programs, sweep.channels), dtype=torch.float32)
    size = sweep.rows, sweep.channels, sweep.programs
    kernels.moments[(sweep.programs, sweep.across)](y, part, *size, TILES=sweep.tiles, **sweep.size, num_warps=4)
    mean, variance, rstd, scale, shift = (y.new_empty(sweep.channels, dtype=torch.float32) for _ in range(5))
    kernels.statistics[(triton.cdiv(sweep.channels, 16),)](
        part, weight, bias, weight if gate is None else gate, mean, variance, rstd, scale, shift,
        *size, sweep.tiles * sweep.size["BM"], eps, ROUNDS=sweep.rounds, GATED=gate is not None, BP=PARTS, BC=16, num_warps=4,
    )  # fmt: skip
    return mean, variance, rstd, scale, shift


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        row: Tensor,
        eps: float,
        ladder: BitLadder,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance, rstd, scale, shift = _statistics(y, weight, bias, gate, eps)
        out, sweep = torch.empty_like(y), _Sweep(y, 4096)
        kernels.normalize[(sweep.down, sweep.across)](
            y, out, mean, scale, shift, row, sweep.rows, sweep.channels,
            **_constants(ladder), RUNGS=len(ladder.residuals), **sweep.size, num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(y, weight, bias, gate, row, mean, rstd, scale, shift)
        ctx.ladder = ladder
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        y, weight, bias, gate, row, mean, rstd, scale, shift = ctx.saved_tensors
        constants = _constants(ctx.ladder)
        if grad.stride() != y.stride():
            grad = torch.empty_like(y).copy_(grad)
        sweep = _Sweep(y, 1024)
        programs = sweep.programs * sweep.across
        channel = torch.empty((2, sweep.programs, sweep.channels), dtype=torch.float32, device=y.device)
        sums = torch.empty((constants["EXACT"] + 2, programs), dtype=torch.float32, device=y.device)
        kernels.reduce[(sweep.programs, sweep.across)](
            y, grad, mean, scale, shift, row, channel, sums, sweep.rows, sweep.channels, sweep.programs,
            TILES=sweep.tiles, **constants, **sweep.size, VEC=16 // y.element_size(), num_warps=4,
        )  # fmt: skip
        dweight, dbias, drow = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(row)
        dgate = None if gate is None else torch.empty_like(gate)
        slope, offset = torch.empty_like(mean), torch.empty_like(mean)
        kernels.gradients[(triton.cdiv(sweep.channels, 16) + 1,)](
            channel, sums, weight, bias, weight if gate is None else gate, rstd, scale, row,
            dweight, dbias, dweight if dgate is None else dgate, drow, slope, offset,
            sweep.rows, sweep.channels, sweep.programs, programs, ROUNDS=sweep.rounds, **constants, RUNGS=len(ctx.ladder.residuals),
            GATED=gate is not None, BP=PARTS, BC=16, BLOCK=triton.next_power_of_2(programs), num_warps=4,
        )  # fmt: skip
        dy, sweep = torch.empty_like(y), _Sweep(y, 2048)
        kernels.differentiate[(sweep.down, sweep.across)](
            y, grad, dy, mean, scale, shift, slope, offset, row, sweep.rows, sweep.channels,
            HALF=constants["HALF"], HIGH=constants["HIGH"], **sweep.size, num_warps=4,
        )  # fmt: skip
        return dy, dweight, dbias, dgate, drow, None, None


def fused_norm(
    y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, row: Tensor, eps: float, ladder: BitLadder
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~pyro_bbits.kernels.norm.normalize_and_quantize` by kernels.

    Raises:
        ValueError: If the channels are not innermost in memory.
    """
    if not is_channels_innermost(y):
        raise ValueError(
            "the kernels need an [N, C] input or images in torch.channels_last format; got shape "
            f"{tuple(y.shape)} with strides {y.stride()}. Convert it, y.contiguous(memory_format=torch.channels_last)."
        )
    vectors = [None if v is None else v.contiguous() for v in (weight, bias, gate, row)]
    return cast(tuple[Tensor, Tensor, Tensor], _FusedNorm.apply(y, *vectors, eps, ladder))
