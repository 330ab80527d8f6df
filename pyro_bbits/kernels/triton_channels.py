"""Triton kernels for a tensor with channel gates: each slice of dimension 0 is one stretch of memory with one gate."""

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
    weighted_noise,
    zero_sums,
)

__all__ = ["channels_backward", "channels_finish", "channels_forward"]


@triton.jit(do_not_specialize_on_alignment=["row", "gates", "counter"])
def channels_forward(
    x: tl.tensor,
    out: tl.tensor,
    counter: tl.tensor,
    row: tl.tensor,
    gates: tl.tensor,
    size: tl.tensor,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
) -> None:
    """Quantize channels of `size` values, `BLOCK` of one channel per program; a pruned channel is not read.

    `COUNTED` sets the counter of the backward kernel to 0.
    """
    channel = tl.program_id(0)
    if COUNTED and channel == 0:
        tl.store(counter, 0)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < size
    start = channel.to(tl.int64) * size
    gate = tl.load(gates + channel).to(tl.float32)
    if gate == 0.0:
        tl.store(out + start + lanes, tl.zeros([BLOCK], dtype=tl.float32).to(out.dtype.element_ty), mask=mask)
    else:
        values = tl.load(x + start + lanes, mask=mask, other=0.0).to(tl.float32)
        t = clip(values * inverse_step(row, GRID), GRID)
        mixed = gate * mix(t, rung_coefficients(row, GRID), GRID)
        tl.store(out + start + lanes, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["row", "gates"])
def channels_finish(
    partials: tl.tensor,
    drow: tl.tensor,
    dgates: tl.tensor,
    row: tl.tensor,
    gates: tl.tensor,
    count: tl.tensor,
    GRID: tl.constexpr,
    SUM: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Write the gradients of the channel gates, and that of the row from sums in a fixed order, `SUM` at a time."""
    step = tl.div_rn(tl.load(row).to(tl.float32), GRID[0] * 1.0)
    sums = zero_sums(len(GRID) - 2, SUM)
    for turn in tl.range(SUMS):
        columns = turn * SUM + tl.arange(0, SUM)
        mask = columns < count
        gate = tl.load(gates + columns, mask=mask, other=0.0).to(tl.float32)
        terms = ()
        weighted = ()
        for i in tl.static_range(len(GRID) - 2):
            term = tl.load(partials + i * count + columns, mask=mask, other=0.0, cache_modifier=".cg")
            terms = terms + (term,)
            weighted = weighted + (gate * term,)
        inner = tl.load(partials + (len(GRID) - 2) * count + columns, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(dgates + columns, step * (inner - weighted_noise(row, terms, GRID)), mask=mask)
        sums = add(sums, weighted)
    store_row_gradient(drow, row, totals(sums), GRID)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["row", "gates", "counter"])
def channels_backward(
    x: tl.tensor,
    grad: tl.tensor,
    dx: tl.tensor,
    partials: tl.tensor,
    drow: tl.tensor,
    dgates: tl.tensor,
    counter: tl.tensor,
    row: tl.tensor,
    gates: tl.tensor,
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
    """Write the gradient of one channel's input and, into its column of `(terms, count)` partials, its sums.

    `WHOLE`, the last of the `count` programs makes the gradients of row and gates of them.
    """
    channel = tl.program_id(0)
    start = channel.to(tl.int64) * size
    gate = tl.load(gates + channel).to(tl.float32)
    inverse = inverse_step(row, GRID)
    sums = zero_sums(len(GRID) - 1, BLOCK // VECTOR)
    for block in tl.range(BLOCKS):
        lanes = block * BLOCK + tl.arange(0, BLOCK)
        mask = lanes < size
        values = tl.load(x + start + lanes, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + start + lanes, mask=mask, other=0.0).to(tl.float32)
        inside, terms = gradient_terms(values * inverse, g, GRID, True)
        tl.store(dx + start + lanes, (gate * inside).to(dx.dtype.element_ty), mask=mask)
        sums = add(sums, lane_sums(terms, BLOCK // VECTOR, VECTOR))
    store_sums(partials, channel, count, totals(sums))
    if WHOLE:  # noqa: SIM102, known before anything runs
        if is_last(counter, count):
            channels_finish(partials, drow, dgates, row, gates, count, GRID, SUM, SUMS)
