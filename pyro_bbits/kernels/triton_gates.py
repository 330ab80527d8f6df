"""Triton kernels that draw and price all gates of a network: one program per tensor forward, elementwise backward.

Forward also writes the slope of every gate in its own logit, of its value and of its tensor's KL, so that backward is
two multiplications per gate. Sums run in a fixed order, without atomics: the same numbers give the same bits.
Logarithms near 1 are series, since the hardware's are good to an absolute error only.
"""

import triton
import triton.language as tl

__all__ = ["draw_backward", "draw_forward"]

LOW = tl.constexpr(-0.1)
HIGH = tl.constexpr(1.1)
TINY = tl.constexpr(1.1920928955078125e-07)
CERTAIN = tl.constexpr(1e4)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(y: tl.tensor) -> tl.tensor:
    """log(1 + y) for -1/2 <= y <= 1: 2 atanh(s) with s = y / (2 + y), whose square is at most 1/9."""
    s = y / (2.0 + y)
    w = s * s
    series = 1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * series)))
    return 2.0 * s * series


@triton.jit
def _complement(c: tl.tensor) -> tl.tensor:
    """1 - exp(-c) for c >= 0; below log 2 its power series."""
    small = tl.minimum(c, 1.0)
    series = 1.0 - small * (1 / 11)
    for k in tl.static_range(10, 1, -1):
        series = 1.0 - small * (1.0 / k) * series
    return tl.where(c < LOG_2, small * series, 1.0 - tl.exp(-c))


@triton.jit
def _log_complement(c: tl.tensor) -> tl.tensor:
    """log(1 - exp(-c)) for c > 0."""
    tail = tl.where(c < LOG_2, 0.0, tl.exp(-c))
    return tl.where(c < LOG_2, tl.log(_complement(c)), _log1p(-tail))


@triton.jit
def _odds(x: tl.tensor) -> tl.tuple:
    """sigmoid(x), sigmoid(-x) and log(1 + exp(-|x|)), none of which overflows."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger), _log1p(e)


@triton.jit
def _sample(
    u: tl.tensor, logit: tl.tensor, strength: tl.tensor, TEMPERATURE: tl.constexpr, STRAIGHT: tl.constexpr
) -> tl.tuple:
    """A gate whose parent is on, and its slope in the logit."""
    u = tl.minimum(tl.maximum(u, TINY), 1.0 - TINY)
    s, rest, _ = _odds((tl.log(u / (1.0 - u)) + logit) / TEMPERATURE)
    slope = s * rest / TEMPERATURE
    if STRAIGHT:
        z = tl.where(s > 0.5, 1.0, tl.where(s == s, 0.0, s))
    else:
        wide = s * (HIGH - LOW) + LOW
        z = tl.where(wide > 1.0, 1.0, tl.where(wide < 0.0, 0.0, wide))
        slope = tl.where((wide >= 0.0) & (wide <= 1.0), slope * (HIGH - LOW), 0.0)
    pinned = (strength == 0.0) | (strength == float("inf"))
    z = tl.where(pinned, tl.where(strength == 0.0, 1.0, 0.0), z)
    return z, tl.where(pinned, 0.0, slope)


@triton.jit
def _price(
    logit: tl.tensor, strength: tl.tensor, num_data: tl.tensor, SHIFT: tl.constexpr, SIMPLIFIED: tl.constexpr
) -> tl.tuple:
    """KL of a gate whose parent is on, its slope, q, log(1 - q), and the slope of q; log-odds are those of q."""
    opened, closed = strength == 0.0, strength == float("inf")
    pinned = opened | closed
    cost = tl.where(pinned, 1.0, num_data * strength)
    l = tl.where(pinned, 0.0, logit + SHIFT)
    l = tl.where(l > CERTAIN, CERTAIN, tl.where(l < -CERTAIN, -CERTAIN, l))
    on, off, soft = _odds(l)
    log_off = tl.where(l > 0, -l, 0.0) - soft
    if SIMPLIFIED:
        kl, slope = on * cost, on * off * cost
    else:
        prior_off = _log_complement(cost)
        kl = on * (log_off + l + cost) + off * (log_off - prior_off)
        slope = on * off * (l + cost + prior_off)
    kl, slope = tl.where(pinned, 0.0, kl), tl.where(pinned, 0.0, slope)
    q = tl.where(pinned, tl.where(opened, 1.0, 0.0), on)
    log_off = tl.where(pinned, tl.where(opened, -float("inf"), 0.0), log_off)
    return kl, slope, q, log_off, tl.where(pinned, 0.0, on * off)


@triton.jit
def _draw_channels(
    logits: tl.tensor,
    strength: tl.tensor,
    order: tl.tensor,
    noise: tl.tensor,
    z2: tl.tensor,
    slopes: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    num_data: tl.tensor,
    TEMPERATURE: tl.constexpr,
    SHIFT: tl.constexpr,
    STRAIGHT: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRICED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """Draw the channels of a tensor: whether any is on, their KL, and the sum of log(1 - q), or of q."""
    alive, kl, reached = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = start
    while first < end:
        lanes = first + tl.arange(0, BLOCK)
        mask = lanes < end
        gate = tl.load(order + lanes, mask=mask, other=0)
        logit = tl.load(logits + gate, mask=mask, other=0.0)
        price = tl.load(strength + gate, mask=mask, other=float("inf"))  # pinned off, a lane without gate adds nothing
        value, slope = _sample(tl.load(noise + gate, mask=mask, other=0.5), logit, price, TEMPERATURE, STRAIGHT)
        tl.store(z2 + gate, value, mask=mask)
        tl.store(slopes + gate, slope, mask=mask)
        alive = tl.maximum(alive, tl.where(value > 0, 1.0, 0.0))
        if PRICED:
            link, _, q, log_off, _ = _price(logit, price, num_data, SHIFT, SIMPLIFIED)
            kl += link
            reached += q if SIMPLIFIED else log_off
        first += BLOCK
    return tl.max(alive, 0) > 0, tl.sum(kl, 0), tl.sum(reached, 0)


@triton.jit
def _slope_channels(
    logits: tl.tensor,
    strength: tl.tensor,
    order: tl.tensor,
    slopes: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    lead: tl.tensor,
    num_data: tl.tensor,
    SHIFT: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Slope of a tensor's KL in the logits of its channels: their own, and `lead` for what they let exist."""
    first = start
    while first < end:
        lanes = first + tl.arange(0, BLOCK)
        mask = lanes < end
        gate = tl.load(order + lanes, mask=mask, other=0)
        logit = tl.load(logits + gate, mask=mask, other=0.0)
        price = tl.load(strength + gate, mask=mask, other=float("inf"))
        _, slope, q, _, q_slope = _price(logit, price, num_data, SHIFT, SIMPLIFIED)
        rise = q_slope if SIMPLIFIED else tl.where((price == 0.0) | (price == float("inf")), 0.0, q)
        tl.store(slopes + gate, slope + lead * rise, mask=mask)
        first += BLOCK


@triton.jit
def _pick(values: tl.tensor, lane: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """One lane of a block, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, LANES) == lane, values, 0.0), 0)


@triton.jit
def _put(values: tl.tensor, lane: tl.constexpr, value: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """The block with a scalar in one lane."""
    return tl.where(tl.arange(0, LANES) == lane, value, values)


@triton.jit
def _draw_chain(
    logit: tl.tensor,
    price: tl.tensor,
    noise: tl.tensor,
    z: tl.tensor,
    slopes: tl.tensor,
    parent: tl.tensor,
    RUNGS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    STRAIGHT: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Draw the residual gates of a tensor, each of which exists while the one before is on."""
    lane = tl.arange(0, LANES)
    u = tl.load(noise + lane * tl.num_programs(0), mask=lane < RUNGS, other=0.5)
    value, slope = _sample(u, logit, price, TEMPERATURE, STRAIGHT)
    exists = tl.zeros([LANES], tl.float32)
    on = tl.where(parent, 1.0, 0.0)
    for r in tl.static_range(RUNGS):
        exists = _put(exists, r, on, LANES)
        on *= tl.where(_pick(value, r, LANES) > 0, 1.0, 0.0)
    tl.store(z + lane, value * exists, mask=lane < RUNGS)
    tl.store(slopes + lane, slope * exists, mask=lane < RUNGS)


@triton.jit
def _price_chain(
    logit: tl.tensor,
    price: tl.tensor,
    slopes: tl.tensor,
    reach: tl.tensor,
    num_data: tl.tensor,
    RUNGS: tl.constexpr,
    SHIFT: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """KL of a chain given that it exists, `kl4 + q4 (kl8 + ..)`; writes the slopes of `reach` times that."""
    lane = tl.arange(0, LANES)
    kl, slope, q, _, q_slope = _price(logit, price, num_data, SHIFT, SIMPLIFIED)
    reaches, tails = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for r in tl.static_range(RUNGS):
        reaches = _put(reaches, r, reach, LANES)
        reach *= _pick(q, r, LANES)
    tail = reach * 0.0
    for r in tl.static_range(RUNGS - 1, -1, -1):
        tails = _put(tails, r, tail, LANES)
        tail = _pick(kl, r, LANES) + _pick(q, r, LANES) * tail
    tl.store(slopes + lane, reaches * (slope + q_slope * tails), mask=lane < RUNGS)
    return tail


@triton.jit(do_not_specialize=["num_data", "channels"])
def draw_forward(
    channel_logits: tl.tensor,
    tensor_logits: tl.tensor,
    channel_strength: tl.tensor,
    strength: tl.tensor,
    order: tl.tensor,
    ends: tl.tensor,
    noise: tl.tensor,
    z2: tl.tensor,
    z: tl.tensor,
    kl: tl.tensor,
    slopes: tl.tensor,
    kl_slopes: tl.tensor,
    num_data: tl.tensor,
    channels: tl.tensor,
    RUNGS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SHIFT: tl.constexpr,
    STRAIGHT: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRICED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Draw the channel gates of one tensor, then its chain of residual gates, and price them."""
    row = tl.program_id(0)
    start, end = tl.load(ends + row - 1, mask=row > 0, other=0), tl.load(ends + row)
    parent, root, reached = _draw_channels(
        channel_logits, channel_strength, order, noise, z2, slopes, start, end, num_data,
        TEMPERATURE, SHIFT, STRAIGHT, SIMPLIFIED, PRICED, BLOCK,
    )  # fmt: skip
    parent = parent | (start == end)
    lane, at = tl.arange(0, LANES), row * RUNGS
    logit = tl.load(tensor_logits + at + lane, mask=lane < RUNGS, other=0.0)
    price = tl.load(strength + at + lane, mask=lane < RUNGS, other=float("inf"))
    behind = channels + at
    _draw_chain(
        logit, price, noise + channels + row, z + at, slopes + behind, parent, RUNGS, TEMPERATURE, STRAIGHT, LANES
    )
    if PRICED:
        size = tl.maximum(end - start, 1).to(tl.float32)
        reach = reached / size if SIMPLIFIED else _complement(-reached)
        reach = tl.where(start == end, 1.0, reach)
        tail = _price_chain(logit, price, kl_slopes + behind, reach, num_data, RUNGS, SHIFT, SIMPLIFIED, LANES)
        tl.store(kl + row, root + reach * tail)
        lead = tail / size if SIMPLIFIED else tail * tl.exp(reached)
        _slope_channels(
            channel_logits, channel_strength, order, kl_slopes, start, end, lead, num_data, SHIFT, SIMPLIFIED, BLOCK
        )


@triton.jit(do_not_specialize=["channels", "size", "kl_stride"])
def draw_backward(
    slopes: tl.tensor,
    kl_slopes: tl.tensor,
    owner: tl.tensor,
    dz2: tl.tensor,
    dz: tl.tensor,
    dkl: tl.tensor,
    d_channels: tl.tensor,
    d_tensors: tl.tensor,
    channels: tl.tensor,
    size: tl.tensor,
    kl_stride: tl.tensor,
    RUNGS: tl.constexpr,
    Z2: tl.constexpr,
    Z: tl.constexpr,
    PRICED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gradient of each logit: its slopes times the gradients of its gate and of its tensor's KL."""
    gate = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    root, chain = gate < channels, (gate >= channels) & (gate < size)
    rung = gate - channels
    dvalue, grad = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if Z2:
        dvalue += tl.load(dz2 + gate, mask=root, other=0.0)
    if Z:
        dvalue += tl.load(dz + rung, mask=chain, other=0.0)
    if Z2 or Z:
        grad += dvalue * tl.load(slopes + gate, mask=gate < size, other=0.0)
    if PRICED:
        row = tl.where(root, tl.load(owner + gate, mask=root, other=0), rung // max(RUNGS, 1))
        row = tl.where(gate < size, row, 0)
        weight = tl.load(dkl + row * kl_stride, mask=gate < size, other=0.0)
        grad += weight * tl.load(kl_slopes + gate, mask=gate < size, other=0.0)
    tl.store(d_channels + gate, grad, mask=root)
    tl.store(d_tensors + rung, grad, mask=chain)
