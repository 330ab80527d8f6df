"""Windows of a tensor that a batch norm reads: one value, or the four of 2 x 2 of which max pooling takes the largest.

A tile is one of windows, `(M, C)` with channels innermost. Pooled, `W` windows lie side by side, and their four normal
values are computed anew in each sweep: neither these nor the place of the largest is ever written.
"""

import triton
import triton.language as tl

from pyro_bbits.kernels.triton_tile import read

__all__ = ["corners", "distances", "largest", "place"]


@triton.jit
def corners(
    first: tl.tensor, C: tl.tensor, W: tl.tensor, POOLED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
) -> tl.tensor:
    """Places of the first value of each window of a tile; pooled, in a tensor of twice as many rows and columns."""
    windows = first + tl.arange(0, BM)
    rows = windows.to(tl.int64)
    if POOLED:
        rows = (windows // W).to(tl.int64) * (4 * W) + 2 * (windows % W)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    return rows[:, None] * C + channels[None, :]


@triton.jit
def place(corner: tl.tensor, i: tl.constexpr, C: tl.tensor, W: tl.tensor) -> tl.tensor:
    """Place of value number `i` of a window, in the order of memory."""
    return corner + (i % 2) * C + (i // 2) * 2 * W * C


@triton.jit
def distances(
    y: tl.tensor,
    corner: tl.tensor,
    mask: tl.tensor,
    center: tl.tensor,
    C: tl.tensor,
    W: tl.tensor,
    POOLED: tl.constexpr,
) -> tl.tuple:
    """The values of each window, less the mean."""
    values = (read(y, corner, mask) - center,)
    if POOLED:
        for i in tl.static_range(1, 4):
            values = values + (read(y, place(corner, i, C, W), mask) - center,)
    return values


@triton.jit
def largest(values: tl.tuple, scale: tl.tensor, shift: tl.tensor) -> tl.tuple:
    """Largest normal value of each window, its distance from the mean, and its number: the first of equals, or NaN."""
    distance = values[0]
    value = distance * scale + shift
    winner = tl.zeros(value.shape, tl.int32)
    for i in tl.static_range(1, len(values)):
        other = values[i] * scale + shift
        wins = (other > value) | (other != other)
        value = tl.where(wins, other, value)
        distance = tl.where(wins, values[i], distance)
        winner = tl.where(wins, i, winner)
    return value, distance, winner
