"""Parts of the Triton kernels: clip, codes, residuals and the mixture of rungs, for one block of values.

`GRID` is :func:`pyro_bbits.kernels.grid.grid_constants`: half width, low, high, clipped rungs, ratios. `row` points to
`[beta, z_1, .., z_R]` in float32. Blocks are float32; scalars of one kind travel as tuples, one entry per rung.
Divisions are IEEE ones, so that the grid is bit for bit that of the other bodies.
"""

import triton
import triton.language as tl

__all__ = [
    "add",
    "clip",
    "gradient_terms",
    "inverse_step",
    "is_last",
    "lane_sums",
    "mix",
    "residuals",
    "round_even",
    "rung_coefficients",
    "store_row_gradient",
    "store_sums",
    "totals",
    "weighted_noise",
    "zero_sums",
]

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: at this size float32 has no fraction left


@triton.jit
def round_even(v: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, ties to even, for |v| < 2^22: two additions, where rint is a slow conversion."""
    return (v + MAGIC) - MAGIC


@triton.jit
def inverse_step(row: tl.tensor, GRID: tl.constexpr) -> tl.tensor:
    """Steps per unit: half width / beta."""
    return tl.div_rn(GRID[0] * 1.0, tl.load(row).to(tl.float32))


@triton.jit
def clip(v: tl.tensor, GRID: tl.constexpr) -> tl.tensor:
    """Clip values in units of the base step; NaN stays NaN."""
    v = tl.maximum(v, GRID[1] * 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, GRID[2] * 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rung_weights(row: tl.tensor, GRID: tl.constexpr) -> tl.tuple:
    """Mixture weight of each rung, base first; the clipped rung, if any, comes last."""
    GATES: tl.constexpr = len(GRID) - 4 + GRID[3]
    weights = ()
    reached = 1.0
    for i in tl.static_range(GATES):
        z = tl.load(row + 1 + i).to(tl.float32)
        weights = weights + (reached * (1.0 - z),)
        reached = reached * z
    return weights + (reached,)


@triton.jit
def rung_coefficients(row: tl.tensor, GRID: tl.constexpr) -> tl.tuple:
    """What multiplies the code of each rung in the output: weight times step; the clipped rung has the base step."""
    step = tl.div_rn(tl.load(row).to(tl.float32), GRID[0] * 1.0)
    weights = rung_weights(row, GRID)
    coefficients = (weights[0] * step,)
    scale = 1.0
    for i in tl.static_range(4, len(GRID)):
        scale = scale * GRID[i]
        coefficients = coefficients + (tl.div_rn(weights[i - 3] * step, scale),)
    if GRID[3] > 0:
        coefficients = coefficients + (weights[len(GRID) - 3] * step,)
    return coefficients


@triton.jit
def mix(t: tl.tensor, coefficients: tl.tuple, GRID: tl.constexpr) -> tl.tensor:
    """Sum over the rungs of coefficient times integer code, for clipped values in units of the base step."""
    code = round_even(t)
    residual = t - code
    mixed = coefficients[0] * code
    for i in tl.static_range(4, len(GRID)):
        scaled = residual * GRID[i]
        digit = round_even(scaled)
        residual = scaled - digit
        code = code * GRID[i] + digit
        mixed += coefficients[i - 3] * code
    if GRID[3] > 0:
        mixed += coefficients[len(GRID) - 3] * t
    return mixed


@triton.jit
def residuals(t: tl.tensor, GRID: tl.constexpr) -> tl.tuple:
    """What each exact rung leaves of a clipped value, in units of that rung's own step."""
    residual = t - round_even(t)
    left = (residual,)
    for i in tl.static_range(4, len(GRID)):
        scaled = residual * GRID[i]
        residual = scaled - round_even(scaled)
        left = left + (residual,)
    return left


@triton.jit
def gradient_terms(v: tl.tensor, g: tl.tensor, GRID: tl.constexpr, INNER: tl.constexpr) -> tl.tuple:
    """Gradient of the input, and what is to be summed for all other gradients, from values in base steps.

    The terms are the clipped share, gradient times residual of each exact rung and, with `INNER`, gradient times value.
    """
    t = clip(v, GRID)
    above = v >= GRID[2] * 1.0
    below = v <= GRID[1] * 1.0
    share = tl.where(above, g, 0.0)
    if GRID[1] < 0:
        share = tl.where(below, -g, share)
    terms = (share,)
    left = residuals(t, GRID)
    for i in tl.static_range(len(left)):
        terms = terms + (g * left[i],)
    if INNER:
        terms = terms + (g * t,)
    return tl.where(above | below, 0.0, g), terms


@triton.jit
def zero_sums(COUNT: tl.constexpr, LANES: tl.constexpr) -> tl.tuple:
    """Accumulators: `COUNT` float32 blocks of zeros."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LANES], dtype=tl.float32),)
    return sums


@triton.jit
def add(sums: tl.tuple, terms: tl.tuple) -> tl.tuple:
    """Add two tuples entry by entry."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + terms[i],)
    return added


@triton.jit
def lane_sums(terms: tl.tuple, LANES: tl.constexpr, VECTOR: tl.constexpr) -> tl.tuple:
    """Sum neighbours that live in one thread, so that an accumulator costs a register per lane and not per value."""
    sums = ()
    for i in tl.static_range(len(terms)):
        sums = sums + (tl.sum(tl.reshape(terms[i], [LANES, VECTOR]), axis=1),)
    return sums


@triton.jit
def totals(sums: tl.tuple) -> tl.tuple:
    """Sum each block to a scalar."""
    scalars = ()
    for i in tl.static_range(len(sums)):
        scalars = scalars + (tl.sum(sums[i]),)
    return scalars


@triton.jit
def store_sums(partials: tl.tensor, index: tl.tensor, count: tl.tensor, sums: tl.tuple) -> None:
    """Write one program's scalars to column `index` of `(len(sums), count)` partials."""
    for i in tl.static_range(len(sums)):
        tl.store(partials + i * count + index, sums[i])


@triton.jit
def is_last(counter: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Whether all `count` programs have come here, this one as the last; it sees what the others have stored before.

    The counter is 0 before and after.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def weighted_noise(row: tl.tensor, sums: tl.tuple, GRID: tl.constexpr) -> tl.tensor:
    """Weight times residual sum over the exact rungs, in base steps; `sums` as in :func:`gradient_terms`."""
    weights = rung_weights(row, GRID)
    noise = weights[0] * sums[1]
    scale = 1.0
    for i in tl.static_range(4, len(GRID)):
        scale = scale * GRID[i]
        noise += weights[i - 3] * tl.div_rn(sums[i - 2], scale)
    return noise


@triton.jit
def rung_errors(row: tl.tensor, sums: tl.tuple, GRID: tl.constexpr) -> tl.tuple:
    """Gradient times what each rung above the base adds, summed over the tensor."""
    step = tl.div_rn(tl.load(row).to(tl.float32), GRID[0] * 1.0)
    errors = ()
    coarse = sums[1]
    scale = 1.0
    for i in tl.static_range(4, len(GRID)):
        scale = scale * GRID[i]
        fine = tl.div_rn(sums[i - 2], scale)
        errors = errors + (step * (coarse - fine),)
        coarse = fine
    if GRID[3] > 0:
        errors = errors + (step * coarse,)
    return errors


@triton.jit
def store_row_gradient(out: tl.tensor, row: tl.tensor, sums: tl.tuple, GRID: tl.constexpr) -> None:
    """Write the gradient of `[beta, z_1, .., z_R]` from the totals of the terms of :func:`gradient_terms`."""
    tl.store(out, tl.div_rn(sums[0] * GRID[2] - weighted_noise(row, sums, GRID), GRID[0] * 1.0))
    errors = rung_errors(row, sums, GRID)
    reached = (1.0,)
    for i in tl.static_range(1, len(errors)):
        reached = reached + (reached[i - 1] * tl.load(row + i).to(tl.float32),)
    inner = 0.0
    for i in tl.static_range(len(errors) - 1, -1, -1):
        if i + 1 < len(errors):
            inner = errors[i] + tl.load(row + 2 + i).to(tl.float32) * inner
        else:
            inner = errors[i]
        tl.store(out + 1 + i, reached[i] * inner)
