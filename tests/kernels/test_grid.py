"""The numbers of the grids are those of float32, though worked out without it."""

import numpy as np
import pytest

from pyro_bbits.kernels.grid import clip_ends, exact_ratios, grid_constants, half_width
from pyro_bbits.ladder import BitLadder

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@signs
@pytest.mark.parametrize("bits", range(2, 33))
def test_clip_ends_are_two_floats_inside_the_range(bits: int, signed: bool) -> None:
    end = np.float32(half_width(bits, signed))
    for _ in range(2):
        end = np.nextafter(end, np.float32(0))
    assert clip_ends(bits, signed) == (-float(end) if signed else 0.0, float(end))


@pytest.mark.parametrize(
    ("bits", "ratios"),
    [
        ((2, 4, 8, 16, 32), (5, 17, 257)),
        ((2, 4, 8), (5, 17)),
        ((4, 8), (17,)),
        ((3, 6, 12), (9, 65)),
        ((8, 24), (65_793,)),
        ((2, 26), ()),
    ],
)
def test_ratios_end_where_float32_does(bits: tuple[int, ...], ratios: tuple[int, ...]) -> None:
    assert exact_ratios(BitLadder(bits)) == ratios


@signs
def test_constants_of_a_kernel_hold_the_whole_grid(signed: bool) -> None:
    half = 1.5 if signed else 3.0
    constants = grid_constants(BitLadder(), signed)
    assert constants == (half, *clip_ends(2, signed), 1, 5.0, 17.0, 257.0)
    assert all(np.float32(value) == value for value in constants)
