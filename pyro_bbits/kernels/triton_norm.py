"""Triton kernels of batch norm, ReLU and quantizer in one: two sweeps over the input forward, two more backward.

A tensor is seen as `(M, C)`, channels innermost. Everything is float32 inside, whatever is read and written; partial
sums are stored and added up in a fixed order, so results are the same each time. `GRID` is
:func:`pyro_bbits.kernels.grid.grid_constants` of an unsigned grid: its clip is the ReLU.
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
    store_row_gradient,
    store_sums,
    totals,
    zero_sums,
)

__all__ = ["differentiate", "finish", "moments", "normalize", "reduce", "statistics"]


@triton.jit
def _tile(first: tl.tensor, M: tl.tensor, C: tl.tensor, BM: tl.constexpr, BC: tl.constexpr) -> tl.tuple:
    """Places and mask of the tile of rows from `first` on."""
    rows = first + tl.arange(0, BM)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    places = rows[:, None].to(tl.int64) * C + channels[None, :]
    return places, (rows < M)[:, None] & (channels < C)[None, :]


@triton.jit
def _read(x: tl.tensor, places: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(x + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _across(vector: tl.tensor, C: tl.tensor, BC: tl.constexpr) -> tl.tensor:
    """The program's channels of a `(C,)` vector, as a row of a tile."""
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    return _read(vector, channels, channels < C)[None, :]


@triton.jit
def _gate(gate: tl.tensor, channels: tl.tensor, C: tl.tensor, GATED: tl.constexpr, BC: tl.constexpr) -> tl.tensor:
    values = tl.full([BC], 1.0, tl.float32)
    if GATED:
        values = _read(gate, channels, channels < C)
    return values


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
    origin = _across(y + start.to(tl.int64) * C, C, BC)
    first = tl.zeros([BM, BC], tl.float32)
    second = tl.zeros([BM, BC], tl.float32)
    for i in tl.range(TILES):
        places, mask = _tile(start + i * BM, M, C, BM, BC)
        distance = tl.where(mask, _read(y, places, mask) - origin, 0.0)
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
    origin = _read(parts, channels, live)
    first = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        mask = (rows < P)[:, None] & live[None, :]
        count = tl.minimum(M - rows * chunk, chunk).to(tl.float32)[:, None]
        distance = _read(parts, rows[:, None] * C + channels[None, :], mask) - origin[None, :]
        first += tl.where(mask, count * distance, 0.0)
    center = origin + tl.sum(first, axis=0) / M
    second = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        mask = (rows < P)[:, None] & live[None, :]
        count = tl.minimum(M - rows * chunk, chunk).to(tl.float32)[:, None]
        distance = _read(parts, rows[:, None] * C + channels[None, :], mask) - center[None, :]
        squares = _read(parts, (P + rows)[:, None] * C + channels[None, :], mask)
        second += tl.where(mask, squares + count * distance * distance, 0.0)
    total = tl.sum(second, axis=0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(total / M + eps))
    z = _gate(gate, channels, C, GATED, BC)
    tl.store(mean + channels, center, mask=live)
    tl.store(variance + channels, total / (M - 1), mask=live)
    tl.store(vectors + channels, rstd, mask=live)
    tl.store(vectors + C + channels, rstd * _read(weight, channels, live) * z, mask=live)
    tl.store(vectors + 2 * C + channels, _read(bias, channels, live) * z, mask=live)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["row"])
def normalize(
    y: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    vectors: tl.tensor,
    row: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    GRID: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Normalize one tile, clip it and quantize it."""
    inverse = inverse_step(row, GRID)
    coefficients = rung_coefficients(row, GRID)
    places, mask = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    distance = _read(y, places, mask) - _across(mean, C, BC)
    normal = distance * _across(vectors + C, C, BC) + _across(vectors + 2 * C, C, BC)
    mixed = mix(clip(normal * inverse, GRID), coefficients, GRID)
    tl.store(out + places, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "P"], do_not_specialize_on_alignment=["row"])
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
    GRID: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """All sums of gradients over the rows of a program.

    `parts` (2, P, C) takes the gradient inside the range, and the same times distance from the mean; `partials`, one
    column per program, the terms of the gradient of the row.
    """
    program = tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    inverse = inverse_step(row, GRID)
    center = _across(mean, C, BC)
    scale = _across(vectors + C, C, BC)
    shift = _across(vectors + 2 * C, C, BC)
    first = tl.zeros([BM, BC], tl.float32)
    second = tl.zeros([BM, BC], tl.float32)
    sums = zero_sums(len(GRID) - 2, BM * BC // VECTOR)
    for i in tl.range(TILES):
        places, mask = _tile((program * TILES + i) * BM, M, C, BM, BC)
        distance = _read(y, places, mask) - center
        inside, terms = gradient_terms((distance * scale + shift) * inverse, _read(grad, places, mask), GRID, False)
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
    terms = ()
    for i in tl.static_range(len(GRID) - 2):
        terms = terms + (_read(partials, i * count + columns, columns < count),)
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
        first += _read(parts, rows[:, None] * C + channels[None, :], mask)
        second += _read(parts, (P + rows)[:, None] * C + channels[None, :], mask)
    rstd = _read(vectors, channels, live)
    scale = _read(vectors + C, channels, live)
    shifted = tl.sum(first, axis=0)
    scaled = tl.sum(second, axis=0) * rstd
    tl.store(slopes + channels, -scale * rstd * scaled / M, mask=live)
    tl.store(slopes + C + channels, -scale * shifted / M, mask=live)
    z = _gate(gate, channels, C, GATED, BC)
    tl.store(dweight + channels, z * scaled, mask=live)
    tl.store(dbias + channels, z * shifted, mask=live)
    if GATED:
        dz = _read(weight, channels, live) * scaled + _read(bias, channels, live) * shifted
        tl.store(dgate + channels, dz, mask=live)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _finish_row(partials, drow, row, count, GRID, COLUMNS)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["row"])
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
    GRID: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Gradient of one tile of the input."""
    places, mask = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    distance = _read(y, places, mask) - _across(mean, C, BC)
    scale = _across(vectors + C, C, BC)
    value = (distance * scale + _across(vectors + 2 * C, C, BC)) * inverse_step(row, GRID)
    g = _read(grad, places, mask)
    inside = tl.where((value <= GRID[1] * 1.0) | (value >= GRID[2] * 1.0), 0.0, g)
    d = scale * inside + (_across(slopes, C, BC) * distance + _across(slopes + C, C, BC))
    tl.store(dy + places, d.to(dy.dtype.element_ty), mask=mask)
