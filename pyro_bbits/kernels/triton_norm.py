"""Batch norm, pooling, ReLU and quantizer as fused Triton kernels: launches, and the gradient they make up."""

from functools import cache
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bbits.kernels.grid import grid_constants
from pyro_bbits.kernels.layout import ordered_like
from pyro_bbits.kernels.norm import has_windows, is_channels_innermost
from pyro_bbits.kernels.triton_norm_backward import differentiate, finish, reduce
from pyro_bbits.kernels.triton_norm_forward import moments, normalize, statistics
from pyro_bbits.ladder import BitLadder

__all__ = ["normalize_and_quantize"]

WIDTHS = (128, 64, 32, 16)
"""Channels that a program may work on at a time."""

PARTS = {"BP": 128, "BC": 16}
"""Partial sums, and channels, that are added up at a time."""


@cache
def _resident(device: torch.device) -> int:
    """Programs that run at the same time: five on each multiprocessor."""
    if device.type != "cuda":
        return 8
    return 5 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _grid(ladder: BitLadder) -> tuple[float, ...]:
    return grid_constants(ladder, signed=False)


class _Sweep:
    """How a tensor is cut into tiles, and how tiles are dealt to programs.

    Attributes:
        rows: `M`, places per channel.
        channels: `C`.
        tile: Rows and channels of a tile: as many channels as leave no more than a fifth of the lanes without one.
        down, across: Tiles one below another, and side by side.
        tiles: How many of those below one another a program sums over, so that all programs run at the same time.
        programs: Programs one below another that sum, `P`.
        rounds: In how many steps their sums are added up.
    """

    def __init__(self, rows: int, channels: int, elements: int, device: torch.device) -> None:
        self.rows, self.channels = rows, channels
        fitting = (size for size in WIDTHS if 4 * triton.cdiv(self.channels, size) * size <= 5 * self.channels)
        width = next(fitting, WIDTHS[-1])
        self.tile = {"BM": elements // width, "BC": width}
        self.down, self.across = triton.cdiv(self.rows, elements // width), triton.cdiv(self.channels, width)
        self.tiles = triton.cdiv(self.down * self.across, _resident(device))
        self.programs = triton.cdiv(self.down, self.tiles)
        self.rounds = triton.cdiv(self.programs, PARTS["BP"])

    @property
    def chunk(self) -> int:
        """Rows that a program sums over."""
        return int(self.tiles * self.tile["BM"])


@cache
def _cached(rows: int, channels: int, elements: int, device: torch.device) -> _Sweep:
    return _Sweep(rows, channels, elements, device)


def _sweep(y: Tensor, elements: int) -> _Sweep:
    """Tiles of so many elements; known sizes cost the host nothing."""
    return _cached(*_size(y), elements, y.device)


def _size(y: Tensor) -> tuple[int, int]:
    """`M` and `C`."""
    return y.numel() // y.shape[1], y.shape[1]


def _empty(y: Tensor, pooled: bool) -> Tensor:
    """An uninitialized tensor like `y`, or of a value for each 2 x 2 window."""
    if not pooled:
        return torch.empty_like(y)
    batch, channels, height, width = y.shape
    return torch.empty(
        batch, channels, height // 2, width // 2, dtype=y.dtype, device=y.device, memory_format=torch.channels_last
    )


def _float32(y: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=y.device)


def _forward(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    eps: float,
    grid: tuple[float, ...],
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, mean, unbiased variance; then 1 / standard deviation, scale and shift, `(3, C)`."""
    sweep, size = _sweep(y, 2048), _size(y)
    parts = _float32(y, 2, sweep.programs, sweep.channels)
    moments[(sweep.programs, sweep.across)](
        y, parts, *size, sweep.programs, TILES=sweep.tiles, **sweep.tile, num_warps=4
    )
    mean, variance, vectors = _float32(y, size[1]), _float32(y, size[1]), _float32(y, 3, size[1])
    statistics[(triton.cdiv(size[1], PARTS["BC"]),)](
        parts, weight, bias, weight if gate is None else gate, vectors, mean, variance,
        *size, sweep.programs, sweep.chunk, eps, ROUNDS=sweep.rounds, GATED=gate is not None, **PARTS, num_warps=4,
    )  # fmt: skip
    out = _empty(y, pooled)
    sweep, warps = (_sweep(out, 1024), 4) if pooled else (_sweep(out, 4096), 8)
    normalize[(sweep.down, sweep.across)](
        y, out, mean, vectors, row, *_size(out), out.shape[-1], GRID=grid, POOLED=pooled, **sweep.tile, num_warps=warps
    )
    return out, mean, variance, vectors


def _backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    mean: Tensor,
    vectors: Tensor,
    grid: tuple[float, ...],
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of input, weight, bias, channel gates and row."""
    sweep, size = _sweep(grad, 512 if pooled else 1024), _size(y)
    columns = sweep.programs * sweep.across
    parts, partials = _float32(y, 2, sweep.programs, size[1]), _float32(y, len(grid) - 2, columns)
    reduce[(sweep.programs, sweep.across)](
        y, grad, mean, vectors, row, parts, partials, *_size(grad), sweep.programs, grad.shape[-1],
        GRID=grid, POOLED=pooled, TILES=sweep.tiles, **sweep.tile, VECTOR=16 // y.element_size(), num_warps=4,
    )  # fmt: skip
    dweight, dbias, drow = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(row)
    dgate, slopes = None if gate is None else torch.empty_like(gate), _float32(y, 2, size[1])
    finish[(triton.cdiv(size[1], PARTS["BC"]) + 1,)](
        parts, partials, weight, bias, weight if gate is None else gate, row, vectors,
        dweight, dbias, dweight if dgate is None else dgate, drow, slopes, *size, sweep.programs, columns,
        GRID=grid, ROUNDS=sweep.rounds, GATED=gate is not None, **PARTS,
        COLUMNS=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip
    dy, (sweep, warps) = torch.empty_like(y), (_sweep(grad, 1024), 8) if pooled else (_sweep(grad, 2048), 4)
    differentiate[(sweep.down, sweep.across)](
        y, grad, dy, mean, vectors, slopes, row, *_size(grad), grad.shape[-1],
        GRID=grid, POOLED=pooled, **sweep.tile, num_warps=warps,
    )  # fmt: skip
    return dy, dweight, dbias, dgate, drow


class _FusedNorm(torch.autograd.Function):
    """Only `y` and vectors of one number per channel are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        row: Tensor,
        eps: float,
        grid: tuple[float, ...],
        pooled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(y):
            out, mean, variance, vectors = _forward(y, weight, bias, gate, row, eps, grid, pooled)
        ctx.save_for_backward(y, weight, bias, gate, row, mean, vectors)
        ctx.grid, ctx.pooled = grid, pooled
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        y, weight, bias, gate, row, mean, vectors = ctx.saved_tensors
        with torch.cuda.device_of(y):
            grad = grad.contiguous(memory_format=torch.channels_last) if ctx.pooled else ordered_like(grad, y)
            grads = _backward(grad, y, weight, bias, gate, row, mean, vectors, ctx.grid, ctx.pooled)
        return *grads, None, None, None


def normalize_and_quantize(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    *,
    eps: float,
    ladder: BitLadder,
    pooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The body in Triton of :func:`pyro_bbits.kernels.norm.normalize_and_quantize`.

    Raises:
        ValueError: If the channels are not innermost in memory, or images to be pooled have an odd height or width.
    """
    if not is_channels_innermost(y):
        raise ValueError(
            "the kernels need an [N, C] input or images in torch.channels_last format; got shape "
            f"{tuple(y.shape)} with strides {y.stride()}. Convert it, y.contiguous(memory_format=torch.channels_last)."
        )
    if pooled and not has_windows(y):
        raise ValueError(
            f"pooling in windows of 2 x 2 needs images of even height and width; got shape {tuple(y.shape)}."
        )
    vectors = [None if v is None else v.contiguous() for v in (weight, bias, gate, row)]
    grid = _grid(ladder)
    return cast(tuple[Tensor, Tensor, Tensor], _FusedNorm.apply(y, *vectors, eps, grid, pooled))
