"""Triton kernels for a tensor without channel gates: its memory is one stretch, whose layout they never look at."""

import triton
import triton.language as tl

from pyro_bbits.kernels.triton_grid import (
    add,
    clip,
    gradient_terms,
    inverse_step,
    is_last,
    lane_sums,
    mix,
    rung_coefficients,
    store_row_gradient,
    store_sums,
    totals,
    zero_sums,
)

__all__ = ["flat_backward", "flat_finish", "flat_forward"]

TAIL = tl.constexpr(16)
"""Elements past the last multiple of this are read on their own, so that all others keep their 16-byte accesses."""


@triton.jit
def _write(
    x: tl.tensor,
    out: tl.tensor,
    lanes: tl.tensor,
    mask: tl.tensor,
    inverse: tl.tensor,
    coefficients: tl.tuple,
    GRID: tl.constexpr,
) -> None:
    values = tl.load(x + lanes, mask=mask, other=0.0).to(tl.float32)
    mixed = mix(clip(values * inverse, GRID), coefficients, GRID)
    tl.store(out + lanes, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["row", "counter"])
def flat_forward(
    x: tl.tensor,
    out: tl.tensor,
    counter: tl.tensor,
    row: tl.tensor,
    size: tl.tensor,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
) -> None:
    """Quantize `size` values, `BLOCK` per program; `COUNTED` sets the counter of the backward kernel to 0."""
    inverse = inverse_step(row, GRID)
    coefficients = rung_coefficients(row, GRID)
    whole = size // TAIL * TAIL
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _write(x, out, lanes, lanes < whole, inverse, coefficients, GRID)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tail = whole + tl.arange(0, TAIL)
        _write(x, out, tail, tail < size, inverse, coefficients, GRID)
        if COUNTED:
            tl.store(counter, 0)


@triton.jit
def _read(x: tl.tensor, grad: tl.tensor, lanes: tl.tensor, mask: tl.tensor) -> tl.tuple:
    return tl.load(x + lanes, mask=mask, other=0.0), tl.load(grad + lanes, mask=mask, other=0.0)


@triton.jit
def _differentiate(
    given: tl.tuple, dx: tl.tensor, lanes: tl.tensor, mask: tl.tensor, inverse: tl.tensor, GRID: tl.constexpr
) -> tl.tuple:
    """Write the gradient of the input; return the terms of all other gradients. `given` are input and gradient."""
    values, g = given[0].to(tl.float32), given[1].to(tl.float32)
    inside, terms = gradient_terms(values * inverse, g, GRID, False)
    tl.store(dx + lanes, inside.to(dx.dtype.element_ty), mask=mask)
    return terms


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["row"])
def flat_finish(
    partials: tl.tensor,
    drow: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    GRID: tl.constexpr,
    SUM: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Sum the partials in a fixed order, `SUM` at a time, and write the gradient of the row."""
    sums = ()
    for i in tl.static_range(len(GRID) - 2):
        term = tl.zeros([SUM], tl.float32)
        for turn in tl.range(SUMS):
            columns = turn * SUM + tl.arange(0, SUM)
            mask = columns < count
            term += tl.load(partials + i * count + columns, mask=mask, other=0.0, cache_modifier=".cg")
        sums = sums + (tl.sum(term),)
    store_row_gradient(drow, row, sums, GRID)


@triton.jit(do_not_specialize=["size", "count"], do_not_specialize_on_alignment=["row", "counter"])
def flat_backward(
    x: tl.tensor,
    grad: tl.tensor,
    dx: tl.tensor,
    partials: tl.tensor,
    drow: tl.tensor,
    counter: tl.tensor,
    row: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTOR: tl.constexpr,
    SUM: tl.constexpr,
    SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Write the gradient of the input and, into column `program` of `(terms, count)` partials, sums of the terms.

    The next block is on its way from memory while one is computed.
    `WHOLE`, the last of the `count` programs adds up the partials and writes the gradient of the row.
    """
    inverse = inverse_step(row, GRID)
    whole = size // TAIL * TAIL
    program = tl.program_id(0)
    start = program.to(tl.int64) * (BLOCK * BLOCKS)
    end = tl.minimum(start + BLOCK * BLOCKS, whole)
    sums = zero_sums(len(GRID) - 2, BLOCK // VECTOR)
    lanes = start + tl.arange(0, BLOCK)
    ahead = _read(x, grad, lanes, lanes < end)
    for _ in tl.range(BLOCKS):
        given, here = ahead, lanes
        lanes = here + BLOCK
        ahead = _read(x, grad, lanes, lanes < end)
        terms = _differentiate(given, dx, here, here < end, inverse, GRID)
        sums = add(sums, lane_sums(terms, BLOCK // VECTOR, VECTOR))
    sums = totals(sums)
    if program == count - 1:
        tail = whole + tl.arange(0, TAIL)
        given = _read(x, grad, tail, tail < size)
        sums = add(sums, totals(_differentiate(given, dx, tail, tail < size, inverse, GRID)))
    store_sums(partials, program, count, sums)
    if WHOLE:  # noqa: SIM102, known before anything runs
        if is_last(counter, count):
            flat_finish(partials, drow, row, count, GRID, SUM, SUMS)
