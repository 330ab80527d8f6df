"""Tiles of a tensor seen as `(M, C)`, channels innermost; the second axis of programs goes along the channels."""

import triton
import triton.language as tl

__all__ = ["across", "channel_gates", "read", "tile"]


@triton.jit
def tile(first: tl.tensor, M: tl.tensor, C: tl.tensor, BM: tl.constexpr, BC: tl.constexpr) -> tl.tuple:
    """Places and mask of the tile of rows from `first` on."""
    rows = first + tl.arange(0, BM)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    places = rows[:, None].to(tl.int64) * C + channels[None, :]
    return places, (rows < M)[:, None] & (channels < C)[None, :]


@triton.jit
def read(x: tl.tensor, places: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Values in float32; 0 where there are none."""
    return tl.load(x + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def across(vector: tl.tensor, C: tl.tensor, BC: tl.constexpr) -> tl.tensor:
    """The program's channels of a `(C,)` vector, as a row of a tile."""
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    return read(vector, channels, channels < C)[None, :]


@triton.jit
def channel_gates(
    gate: tl.tensor, channels: tl.tensor, C: tl.tensor, GATED: tl.constexpr, BC: tl.constexpr
) -> tl.tensor:
    """Gates of some channels; 1 where there are none."""
    values = tl.full([BC], 1.0, tl.float32)
    if GATED:
        values = read(gate, channels, channels < C)
    return values
