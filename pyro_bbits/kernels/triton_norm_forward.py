"""Triton kernels of batch norm, pooling, ReLU and quantizer in one, forward: two sweeps over the input, one written.

Everything is float32 inside, whatever is read and written. Partial sums are stored and added up in a fixed order, so
results are the same each time. `GRID` is :func:`pyro_bbits.kernels.grid.grid_constants` of an unsigned grid, whose clip
is the ReLU.
"""

import triton
import triton.language as tl

from pyro_bbits.kernels.triton_grid import clip, inverse_step, mix, rung_coefficients
from pyro_bbits.kernels.triton_tile import across, channel_gates, read, tile
from pyro_bbits.kernels.triton_window import corners, distances, largest

__all__ = ["moments", "normalize", "statistics"]


@triton.jit(do_not_specialize=["M", "P"])
def moments(
    y: tl.tensor,
    parts: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Mean, and sum of squared deviations, of each channel over the rows of a program; `parts` is `(2, P, C)`.

    Sums are of the distance to the program's first row, so that nothing cancels however far the mean is from zero.
    """
    program = tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    start = program * TILES * BM
    origin = across(y + start.to(tl.int64) * C, C, BC)
    first = tl.zeros([BM, BC], tl.float32)
    second = tl.zeros([BM, BC], tl.float32)
    for i in tl.range(TILES):
        places, mask = tile(start + i * BM, M, C, BM, BC)
        distance = tl.where(mask, read(y, places, mask) - origin, 0.0)
        first += distance
        second += distance * distance
    count = tl.minimum(M - start, TILES * BM).to(tl.float32)
    mean = tl.sum(first, axis=0) / count
    squares = tl.sum(second, axis=0) - count * mean * mean
    squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(parts + program * C + channels, tl.sum(origin, axis=0) + mean, mask=channels < C)
    tl.store(parts + (P + program) * C + channels, squares, mask=channels < C)


@triton.jit(do_not_specialize=["M", "P", "chunk"], do_not_specialize_on_alignment=["gate"])
def statistics(
    parts: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gate: tl.tensor,
    vectors: tl.tensor,
    mean: tl.tensor,
    variance: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    chunk: tl.tensor,
    eps: tl.tensor,
    ROUNDS: tl.constexpr,
    GATED: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Merge the moments of all programs, of `chunk` rows each; the norm is `scale * (y - mean) + shift`.

    `vectors` is `(3, C)`: 1 / standard deviation, scale, shift.
    """
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    live = channels < C
    origin = read(parts, channels, live)
    first = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        mask = (rows < P)[:, None] & live[None, :]
        count = tl.minimum(M - rows * chunk, chunk).to(tl.float32)[:, None]
        distance = read(parts, rows[:, None] * C + channels[None, :], mask) - origin[None, :]
        first += tl.where(mask, count * distance, 0.0)
    center = origin + tl.sum(first, axis=0) / M
    second = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        mask = (rows < P)[:, None] & live[None, :]
        count = tl.minimum(M - rows * chunk, chunk).to(tl.float32)[:, None]
        distance = read(parts, rows[:, None] * C + channels[None, :], mask) - center[None, :]
        squares = read(parts, (P + rows)[:, None] * C + channels[None, :], mask)
        second += tl.where(mask, squares + count * distance * distance, 0.0)
    total = tl.sum(second, axis=0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(total / M + eps))
    z = channel_gates(gate, channels, C, GATED, BC)
    tl.store(mean + channels, center, mask=live)
    tl.store(variance + channels, total / (M - 1), mask=live)
    tl.store(vectors + channels, rstd, mask=live)
    tl.store(vectors + C + channels, rstd * read(weight, channels, live) * z, mask=live)
    tl.store(vectors + 2 * C + channels, read(bias, channels, live) * z, mask=live)


@triton.jit(do_not_specialize=["M", "W"], do_not_specialize_on_alignment=["row"])
def normalize(
    y: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    vectors: tl.tensor,
    row: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    W: tl.tensor,
    GRID: tl.constexpr,
    POOLED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Normalize one tile of windows, take the largest value of each, clip it and quantize it."""
    inverse = inverse_step(row, GRID)
    coefficients = rung_coefficients(row, GRID)
    first = tl.program_id(0) * BM
    places, mask = tile(first, M, C, BM, BC)
    corner = corners(first, C, W, POOLED, BM, BC)
    values = distances(y, corner, mask, across(mean, C, BC), C, W, POOLED)
    normal, _, _ = largest(values, across(vectors + C, C, BC), across(vectors + 2 * C, C, BC))
    mixed = mix(clip(normal * inverse, GRID), coefficients, GRID)
    tl.store(out + places, mixed.to(out.dtype.element_ty), mask=mask)
