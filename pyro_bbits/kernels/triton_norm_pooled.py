"""Triton kernels of batch norm, max pooling in windows of 2 x 2, ReLU and quantizer in one.

They work on tiles of the pooled tensor, `(M, C)` with channels innermost and `W` windows side by side, and compute the
four normal values of a window anew in each sweep: neither these nor the place of the largest is ever written.
Arithmetic and names are those of :mod:`pyro_bbits.kernels.triton_norm_forward` and its backward twin.
"""

import triton
import triton.language as tl

from pyro_bbits.kernels.triton_grid import (
    add,
    clip,
    gradient_terms,
    inverse_step,
    lane_sums,
    mix,
    rung_coefficients,
    store_sums,
    totals,
    zero_sums,
)
from pyro_bbits.kernels.triton_tile import across, read, tile

__all__ = ["differentiate_pooled", "normalize_pooled", "reduce_pooled"]


@triton.jit
def _corners(
    first: tl.tensor, M: tl.tensor, C: tl.tensor, W: tl.tensor, BM: tl.constexpr, BC: tl.constexpr
) -> tl.tensor:
    """Places of the upper left value of each window of a tile, in a tensor of twice as many rows and columns."""
    windows = first + tl.arange(0, BM)
    rows = (windows // W).to(tl.int64) * (4 * W) + 2 * (windows % W)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    return rows[:, None] * C + channels[None, :]


@triton.jit
def _distances(
    y: tl.tensor, corners: tl.tensor, mask: tl.tensor, center: tl.tensor, C: tl.tensor, W: tl.tensor
) -> tl.tuple:
    """The four values of each window, in the order of memory, less the mean."""
    upper = (read(y, corners, mask) - center, read(y, corners + C, mask) - center)
    below = corners + 2 * W * C
    return upper + (read(y, below, mask) - center, read(y, below + C, mask) - center)


@triton.jit
def _largest(distances: tl.tuple, scale: tl.tensor, shift: tl.tensor) -> tl.tuple:
    """Largest normal value of each window, its distance from the mean, and its number: the first of equals, or NaN."""
    distance = distances[0]
    value = distance * scale + shift
    winner = tl.zeros(value.shape, tl.int32)
    for i in tl.static_range(1, 4):
        other = distances[i] * scale + shift
        wins = (other > value) | (other != other)
        value = tl.where(wins, other, value)
        distance = tl.where(wins, distances[i], distance)
        winner = tl.where(wins, i, winner)
    return value, distance, winner


@triton.jit(do_not_specialize=["M", "W"], do_not_specialize_on_alignment=["row"])
def normalize_pooled(
    y: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    vectors: tl.tensor,
    row: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    W: tl.tensor,
    GRID: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Normalize the windows of one tile, and quantize the largest value of each."""
    inverse = inverse_step(row, GRID)
    coefficients = rung_coefficients(row, GRID)
    first = tl.program_id(0) * BM
    places, mask = tile(first, M, C, BM, BC)
    distances = _distances(y, _corners(first, M, C, W, BM, BC), mask, across(mean, C, BC), C, W)
    value, _, _ = _largest(distances, across(vectors + C, C, BC), across(vectors + 2 * C, C, BC))
    mixed = mix(clip(value * inverse, GRID), coefficients, GRID)
    tl.store(out + places, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "P", "W"], do_not_specialize_on_alignment=["row"])
def reduce_pooled(
    y: tl.tensor,
    grad: tl.tensor,
    mean: tl.tensor,
    vectors: tl.tensor,
    row: tl.tensor,
    parts: tl.tensor,
    partials: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    W: tl.tensor,
    GRID: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """All sums of gradients over the windows of a program; gradients reach the largest value of each window alone."""
    program = tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    inverse = inverse_step(row, GRID)
    center = across(mean, C, BC)
    scale = across(vectors + C, C, BC)
    shift = across(vectors + 2 * C, C, BC)
    first = tl.zeros([BM, BC], tl.float32)
    second = tl.zeros([BM, BC], tl.float32)
    sums = zero_sums(len(GRID) - 2, BM * BC // VECTOR)
    for i in tl.range(TILES):
        start = (program * TILES + i) * BM
        places, mask = tile(start, M, C, BM, BC)
        distances = _distances(y, _corners(start, M, C, W, BM, BC), mask, center, C, W)
        value, distance, _ = _largest(distances, scale, shift)
        inside, terms = gradient_terms(value * inverse, read(grad, places, mask), GRID, False)
        first += inside
        second += inside * distance
        sums = add(sums, lane_sums(terms, BM * BC // VECTOR, VECTOR))
    tl.store(parts + program * C + channels, tl.sum(first, axis=0), mask=channels < C)
    tl.store(parts + (P + program) * C + channels, tl.sum(second, axis=0), mask=channels < C)
    column = program * tl.num_programs(1) + tl.program_id(1)
    store_sums(partials, column, P * tl.num_programs(1), totals(sums))


@triton.jit(do_not_specialize=["M", "W"], do_not_specialize_on_alignment=["row"])
def differentiate_pooled(
    y: tl.tensor,
    grad: tl.tensor,
    dy: tl.tensor,
    mean: tl.tensor,
    vectors: tl.tensor,
    slopes: tl.tensor,
    row: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    W: tl.tensor,
    GRID: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Gradient of the windows of one tile."""
    first = tl.program_id(0) * BM
    places, mask = tile(first, M, C, BM, BC)
    corners = _corners(first, M, C, W, BM, BC)
    distances = _distances(y, corners, mask, across(mean, C, BC), C, W)
    scale = across(vectors + C, C, BC)
    value, _, winner = _largest(distances, scale, across(vectors + 2 * C, C, BC))
    value = value * inverse_step(row, GRID)
    g = read(grad, places, mask)
    inside = scale * tl.where((value <= GRID[1] * 1.0) | (value >= GRID[2] * 1.0), 0.0, g)
    slope, offset = across(slopes, C, BC), across(slopes + C, C, BC)
    for i in tl.static_range(4):
        d = tl.where(winner == i, inside, 0.0) + (slope * distances[i] + offset)
        corner = corners + (i % 2) * C + (i // 2) * 2 * W * C
        tl.store(dy + corner, d.to(dy.dtype.element_ty), mask=mask)
