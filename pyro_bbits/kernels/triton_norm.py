"""Triton kernels of batch norm, ReLU and quantizer in one: two sweeps over the input forward, two more backward.

A tensor is seen as `(M, C)`, channels innermost. Everything is float32 inside, whatever is read and written; partial
sums are stored and added up in a fixed order, so results are the same each time. Constants of a ladder: `HALF` base steps
from zero to the range, which is cut off at `HIGH`; the `EXACT` integer `RATIOS` that float32 resolves; `RUNGS` gates.
"""

# ruff: noqa: ANN001, ANN201, ANN202  # Triton takes annotations of a kernel for types of its own
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 this large has no fraction, so adding and subtracting it rounds half to even."""


@triton.jit
def _rounded(x):
    return (x + ROUNDING) - ROUNDING


@triton.jit
def _clipped(raw, HIGH: tl.constexpr):
    t = tl.maximum(raw, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(t, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gate(row_ptr, INDEX: tl.constexpr, RUNGS: tl.constexpr):
    """Gate above rung number `INDEX`; 0 above the last."""
    if INDEX < RUNGS:
        return tl.load(row_ptr + 1 + INDEX)
    else:
        return 0.0


@triton.jit
def _reached(row_ptr, INDEX: tl.constexpr):
    """Product of the gates up to rung number `INDEX`."""
    product = 1.0
    for i in tl.static_range(INDEX):
        product = product * tl.load(row_ptr + 1 + i)
    return product


@triton.jit
def _mixture(t, row_ptr, HALF: tl.constexpr, RATIOS: tl.constexpr, EXACT: tl.constexpr, RUNGS: tl.constexpr):
    """Sum over rungs of weight times code; `t` is clipped, in base steps."""
    step = tl.div_rn(tl.load(row_ptr), HALF)
    code = _rounded(t)
    residual, scale = t - code, 1.0
    out = code * ((1.0 - _gate(row_ptr, 0, RUNGS)) * step)
    for i in tl.static_range(EXACT):
        residual = residual * RATIOS[i]
        digit = _rounded(residual)
        residual = residual - digit
        code = code * RATIOS[i] + digit
        scale = scale * RATIOS[i]
        weight = _reached(row_ptr, i + 1) * (1.0 - _gate(row_ptr, i + 1, RUNGS)) * step
        out += code * tl.div_rn(weight, scale)
    if EXACT < RUNGS:
        out += t * (_reached(row_ptr, RUNGS) * step)
    return out


@triton.jit
def _residuals(t, RATIOS: tl.constexpr, EXACT: tl.constexpr):
    """What each rung leaves, in steps of its own."""
    residual = t - _rounded(t)
    left = (residual,)
    for i in tl.static_range(EXACT):
        residual = residual * RATIOS[i]
        residual = residual - _rounded(residual)
        left = left + (residual,)
    return left


@triton.jit
def _lanes(v, BM: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr):
    """Add up the `VEC` neighbours that one thread has loaded: it then holds fewer sums."""
    return tl.sum(tl.reshape(v, [BM, BC // VEC, VEC]), axis=2)


@triton.jit
def _tile(first, M, C, BM: tl.constexpr, BC: tl.constexpr):
    """Places and mask of the tile of rows from `first` on."""
    rows = first + tl.arange(0, BM)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    places = rows[:, None].to(tl.int64) * C + channels[None, :]
    return places, (rows < M)[:, None] & (channels < C)[None, :]


@triton.jit
def _vector(ptr, C, BC: tl.constexpr):
    """The program's channels of a `(C,)` vector, as a row of a tile."""
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    return tl.load(ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def moments(y_ptr, part_ptr, M, C, P, TILES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Mean and sum of squared deviations of each channel over the rows of a program, `part` (2, P, C).

    Sums are of the distance to the program's first row, so that nothing cancels however far the mean is from zero.
    """
    p = tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    start = p * TILES * BM
    shift = _vector(y_ptr + start.to(tl.int64) * C, C, BC)
    first, second = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    for i in tl.range(TILES):
        places, live = _tile(start + i * BM, M, C, BM, BC)
        d = tl.where(live, tl.load(y_ptr + places, mask=live, other=0.0).to(tl.float32) - shift, 0.0)
        first += d
        second += d * d
    count = tl.minimum(M - start, TILES * BM).to(tl.float32)
    mean = tl.sum(first, axis=0) / count
    squares = tl.maximum(tl.sum(second, axis=0) - count * mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(part_ptr + p * C + channels, tl.sum(shift, axis=0) + mean, mask=channels < C)
    tl.store(part_ptr + (P + p) * C + channels, squares, mask=channels < C)


@triton.jit
def statistics(
    part_ptr, weight_ptr, bias_ptr, gate_ptr, mean_ptr, variance_ptr, rstd_ptr, scale_ptr, shift_ptr,
    M, C, P, chunk, eps, ROUNDS: tl.constexpr, GATED: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the moments of all programs, of `chunk` rows each; the norm is `scale * (y - mean) + shift`."""
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channels < C
    origin = tl.load(part_ptr + channels, mask=inside, other=0.0)
    first = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        live = (rows < P)[:, None] & inside[None, :]
        count = tl.minimum(M - rows * chunk, chunk).to(tl.float32)[:, None]
        mean = tl.load(part_ptr + rows[:, None] * C + channels[None, :], mask=live, other=0.0)
        first += tl.where(live, count * (mean - origin[None, :]), 0.0)
    center = origin + tl.sum(first, axis=0) / M
    second = tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        live = (rows < P)[:, None] & inside[None, :]
        count = tl.minimum(M - rows * chunk, chunk).to(tl.float32)[:, None]
        distance = tl.load(part_ptr + rows[:, None] * C + channels[None, :], mask=live, other=0.0) - center[None, :]
        squares = tl.load(part_ptr + (P + rows)[:, None] * C + channels[None, :], mask=live, other=0.0)
        second += tl.where(live, squares + count * distance * distance, 0.0)
    squares = tl.sum(second, axis=0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / M + eps))
    gate = tl.full([BC], 1.0, tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean_ptr + channels, center, mask=inside)
    tl.store(variance_ptr + channels, squares / (M - 1), mask=inside)
    tl.store(rstd_ptr + channels, rstd, mask=inside)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale_ptr + channels, rstd * weight * gate, mask=inside)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(shift_ptr + channels, bias * gate, mask=inside)


@triton.jit
def normalize(
    y_ptr, out_ptr, mean_ptr, scale_ptr, shift_ptr, row_ptr, M, C,
    HALF: tl.constexpr, HIGH: tl.constexpr, RATIOS: tl.constexpr, EXACT: tl.constexpr, RUNGS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Normalize one tile, clip it and quantize it."""
    places, live = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    y = tl.load(y_ptr + places, mask=live, other=0.0).to(tl.float32)
    x = (y - _vector(mean_ptr, C, BC)) * _vector(scale_ptr, C, BC) + _vector(shift_ptr, C, BC)
    t = _clipped(x * tl.div_rn(HALF, tl.load(row_ptr)), HIGH)
    out = _mixture(t, row_ptr, HALF, RATIOS, EXACT, RUNGS)
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def reduce(
    y_ptr, grad_ptr, mean_ptr, scale_ptr, shift_ptr, row_ptr, channel_ptr, sums_ptr, M, C, P, TILES: tl.constexpr,
    HALF: tl.constexpr, HIGH: tl.constexpr, RATIOS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """All sums of gradients over the rows of a program.

    `channel` (2, P, C): gradient inside the range, the same times distance from the mean. `sums` (EXACT + 2, programs):
    gradient above the range, gradient times what each rung leaves.
    """
    p = tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, scale, shift = _vector(mean_ptr, C, BC), _vector(scale_ptr, C, BC), _vector(shift_ptr, C, BC)
    inverse = tl.div_rn(HALF, tl.load(row_ptr))
    first, second = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    totals = ()
    for _ in tl.static_range(EXACT + 2):
        totals = totals + (tl.zeros([BM, BC // VEC], tl.float32),)
    for i in tl.range(TILES):
        places, live = _tile((p * TILES + i) * BM, M, C, BM, BC)
        distance = tl.load(y_ptr + places, mask=live, other=0.0).to(tl.float32) - mean
        grad = tl.load(grad_ptr + places, mask=live, other=0.0).to(tl.float32)
        raw = (distance * scale + shift) * inverse
        inside = tl.where((raw <= 0.0) | (raw >= HIGH), 0.0, grad)
        first += inside
        second += inside * distance
        left = _residuals(_clipped(raw, HIGH), RATIOS, EXACT)
        added = (totals[0] + _lanes(tl.where(raw >= HIGH, grad, 0.0), BM, BC, VEC),)
        for k in tl.static_range(EXACT + 1):
            added = added + (totals[k + 1] + _lanes(grad * left[k], BM, BC, VEC),)
        totals = added
    tl.store(channel_ptr + p * C + channels, tl.sum(first, axis=0), mask=channels < C)
    tl.store(channel_ptr + (P + p) * C + channels, tl.sum(second, axis=0), mask=channels < C)
    programs = P * tl.num_programs(1)
    for k in tl.static_range(EXACT + 2):
        tl.store(sums_ptr + k * programs + p * tl.num_programs(1) + tl.program_id(1), tl.sum(totals[k]))


@triton.jit
def _row_gradient(
    sums_ptr, row_ptr, drow_ptr, programs, HALF: tl.constexpr, HIGH: tl.constexpr, RATIOS: tl.constexpr,
    EXACT: tl.constexpr, RUNGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up `sums`; gradients of the range and of the gates."""
    totals = ()
    for k in tl.static_range(EXACT + 2):
        places = tl.arange(0, BLOCK)
        parts = tl.load(sums_ptr + k * programs + places, mask=places < programs, other=0.0)
        totals = totals + (tl.sum(parts),)
    noise, scale = (1.0 - _gate(row_ptr, 0, RUNGS)) * totals[1], 1.0
    left = (totals[1],)
    for k in tl.static_range(EXACT):
        scale = scale * RATIOS[k]
        left = left + (tl.div_rn(totals[k + 2], scale),)
        noise += _reached(row_ptr, k + 1) * (1.0 - _gate(row_ptr, k + 1, RUNGS)) * left[k + 1]
    left = left + (0.0,)  # a rung that float32 does not resolve leaves nothing
    tl.store(drow_ptr, (totals[0] * HIGH - noise) / HALF)
    step = tl.div_rn(tl.load(row_ptr), HALF)
    nested = 0.0
    for k in tl.static_range(RUNGS - 1, -1, -1):
        nested = step * (left[k] - left[k + 1]) + _gate(row_ptr, k + 1, RUNGS) * nested
        tl.store(drow_ptr + 1 + k, _reached(row_ptr, k) * nested)


@triton.jit
def gradients(
    channel_ptr, sums_ptr, weight_ptr, bias_ptr, gate_ptr, rstd_ptr, scale_ptr, row_ptr,
    dweight_ptr, dbias_ptr, dgate_ptr, drow_ptr, slope_ptr, offset_ptr, M, C, P, programs, ROUNDS: tl.constexpr,
    HALF: tl.constexpr, HIGH: tl.constexpr, RATIOS: tl.constexpr, EXACT: tl.constexpr, RUNGS: tl.constexpr,
    GATED: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of all that is not a tensor of activations; what `differentiate` adds is `slope * (y - mean) + offset`.

    One program more than the channels need does the row.
    """
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channels < C
    first, second = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    for i in tl.range(ROUNDS):
        rows = i * BP + tl.arange(0, BP)
        live = (rows < P)[:, None] & inside[None, :]
        first += tl.load(channel_ptr + rows[:, None] * C + channels[None, :], mask=live, other=0.0)
        second += tl.load(channel_ptr + (P + rows)[:, None] * C + channels[None, :], mask=live, other=0.0)
    rstd = tl.load(rstd_ptr + channels, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + channels, mask=inside, other=0.0)
    shifted, scaled = tl.sum(first, axis=0), tl.sum(second, axis=0) * rstd
    tl.store(slope_ptr + channels, -scale * rstd * scaled / M, mask=inside)
    tl.store(offset_ptr + channels, -scale * shifted / M, mask=inside)
    gate = tl.full([BC], 1.0, tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + channels, weight * scaled + bias * shifted, mask=inside)
    tl.store(dweight_ptr + channels, gate * scaled, mask=inside)
    tl.store(dbias_ptr + channels, gate * shifted, mask=inside)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _row_gradient(sums_ptr, row_ptr, drow_ptr, programs, HALF, HIGH, RATIOS, EXACT, RUNGS, BLOCK)


@triton.jit
def differentiate(
    y_ptr, grad_ptr, dy_ptr, mean_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, row_ptr, M, C,
    HALF: tl.constexpr, HIGH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the input."""
    places, live = _tile(tl.program_id(0) * BM, M, C, BM, BC)
    scale = _vector(scale_ptr, C, BC)
    distance = tl.load(y_ptr + places, mask=live, other=0.0).to(tl.float32) - _vector(mean_ptr, C, BC)
    grad = tl.load(grad_ptr + places, mask=live, other=0.0).to(tl.float32)
    raw = (distance * scale + _vector(shift_ptr, C, BC)) * tl.div_rn(HALF, tl.load(row_ptr))
    inside = tl.where((raw <= 0.0) | (raw >= HIGH), 0.0, grad)
    dy = scale * inside + (_vector(slope_ptr, C, BC) * distance + _vector(offset_ptr, C, BC))
    tl.store(dy_ptr + places, dy.to(dy_ptr.dtype.element_ty), mask=live)
