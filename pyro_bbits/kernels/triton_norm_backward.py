"""Triton kernels of batch norm, pooling, ReLU and quantizer in one, backward: two sweeps over input and gradient.

Arithmetic and names are those of :mod:`pyro_bbits.kernels.triton_norm_forward`.
"""

import triton
import triton.language as tl

from pyro_bbits.kernels.triton_grid import (
    add,
    gradient_terms,
    inverse_step,
    lane_sums,
    store_row_gradient,
    store_sums,
    totals,
    zero_sums,
)
from pyro_bbits.kernels.triton_tile import across, channel_gates, read, tile
from pyro_bbits.kernels.triton_window import corners, distances, largest, place

__all__ = ["differentiate", "finish", "reduce"]


@triton.jit(do_not_specialize=["M", "P", "W"], do_not_specialize_on_alignment=["row"])
def reduce(
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
    POOLED: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """All sums of gradients over the windows of a program; they reach the largest value of each alone.

    `parts` (2, P, C) takes the gradient inside the range, and the same times distance from the mean; `partials`, one
    column per program, the terms of the gradient of the row.
    """
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
        corner = corners(start, C, W, POOLED, BM, BC)
        value, distance, _ = largest(distances(y, corner, mask, center, C, W, POOLED), scale, shift)
        inside, terms = gradient_terms(value * inverse, read(grad, places, mask), GRID, False)
        first += inside
        second += inside * distance
        sums = add(sums, lane_sums(terms, BM * BC // VECTOR, VECTOR))
    tl.store(parts + program * C + channels, tl.sum(first, axis=0), mask=channels < C)
    tl.store(parts + (P + program) * C + channels, tl.sum(second, axis=0), mask=channels < C)
    column = program * tl.num_programs(1) + tl.program_id(1)
    store_sums(partials, column, P * tl.num_programs(1), totals(sums))


@triton.jit
def _finish_row(
    partials: tl.tensor, drow: tl.tensor, row: tl.tensor, count: tl.tensor, GRID: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    columns = tl.arange(0, COLUMNS)
    terms: tl.tuple = ()
    for i in tl.static_range(len(GRID) - 2):
        terms = terms + (read(partials, i * count + columns, columns < count),)
    store_row_gradient(drow, row, totals(terms), GRID)


@triton.jit(do_not_specialize=["M", "P", "count"], do_not_specialize_on_alignment=["gate", "row"])
def finish(
    parts: tl.tensor,
    partials: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gate: tl.tensor,
    row: tl.tensor,
    vectors: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dgate: tl.tensor,
    drow: tl.tensor,
    slopes: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    count: tl.tensor,
    GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    GATED: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gradients of everything but the input; one program more than the channels need does the row.

    Through mean and variance, the gradient of the input gains a line in the distance from the mean: slope and offset,
    `slopes` (2, C).
    """
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    live = channels < C
    first = tl.zeros([BP, BC], tl.float32)
    second = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        mask = (rows < P)[:, None] & live[None, :]
        first += read(parts, rows[:, None] * C + channels[None, :], mask)
        second += read(parts, (P + rows)[:, None] * C + channels[None, :], mask)
    rstd = read(vectors, channels, live)
    scale = read(vectors + C, channels, live)
    shifted = tl.sum(first, axis=0)
    scaled = tl.sum(second, axis=0) * rstd
    tl.store(slopes + channels, -scale * rstd * scaled / M, mask=live)
    tl.store(slopes + C + channels, -scale * shifted / M, mask=live)
    z = channel_gates(gate, channels, C, GATED, BC)
    tl.store(dweight + channels, z * scaled, mask=live)
    tl.store(dbias + channels, z * shifted, mask=live)
    if GATED:
        dz = read(weight, channels, live) * scaled + read(bias, channels, live) * shifted
        tl.store(dgate + channels, dz, mask=live)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _finish_row(partials, drow, row, count, GRID, COLUMNS)


@triton.jit(do_not_specialize=["M", "W"], do_not_specialize_on_alignment=["row"])
def differentiate(
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
    POOLED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Gradient of the windows of one tile."""
    first = tl.program_id(0) * BM
    places, mask = tile(first, M, C, BM, BC)
    corner = corners(first, C, W, POOLED, BM, BC)
    values = distances(y, corner, mask, across(mean, C, BC), C, W, POOLED)
    scale = across(vectors + C, C, BC)
    value, _, winner = largest(values, scale, across(vectors + 2 * C, C, BC))
    value = value * inverse_step(row, GRID)
    g = read(grad, places, mask)
    inside = scale * tl.where((value <= GRID[1] * 1.0) | (value >= GRID[2] * 1.0), 0.0, g)
    slope, offset = across(slopes, C, BC), across(slopes + C, C, BC)
    for i in tl.static_range(len(values)):
        d = tl.where(winner == i, inside, 0.0) + (slope * values[i] + offset)
        tl.store(dy + place(corner, i, C, W), d.to(dy.dtype.element_ty), mask=mask)
