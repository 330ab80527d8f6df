"""A ladder accepts exactly the widths whose grids nest, and its step ratios are what the quantizer relies on."""

import math
from itertools import combinations

import pytest

from pyro_bbits.ladder import BitLadder

LADDERS = [(2, 4, 8, 16, 32), (2, 4, 8), (2, 8), (3, 6), (4, 8, 16), (2,), (2, 4, 20), (5, 15, 30), (32,)]


@pytest.mark.parametrize("bits", LADDERS)
def test_ratios_are_odd_and_multiply_to_the_number_of_steps(bits: tuple[int, ...]) -> None:
    ladder = BitLadder(bits)
    assert all(ratio % 2 == 1 for ratio in ladder.ratios)
    for rung, width in enumerate(bits):
        assert (2**ladder.base - 1) * math.prod(ladder.ratios[:rung]) == 2**width - 1


def test_default_ladder_has_the_ratios_of_the_paper() -> None:
    assert BitLadder().bits == (2, 4, 8, 16, 32)
    assert BitLadder().ratios == (2**2 + 1, 2**4 + 1, 2**8 + 1, 2**16 + 1)


def test_accepted_pairs_are_those_whose_grids_nest() -> None:
    """The coarse grid lies in the fine one when the fine grid has a whole number of steps in each coarse step."""
    for coarse, fine in combinations(range(2, 33), 2):
        nests = (2**fine - 1) % (2**coarse - 1) == 0
        try:
            BitLadder((coarse, fine))
        except ValueError:
            assert not nests, (coarse, fine)
        else:
            assert nests, (coarse, fine)


@pytest.mark.parametrize("bits", LADDERS)
def test_parts_put_the_ladder_together(bits: tuple[int, ...]) -> None:
    ladder = BitLadder(bits)
    assert (ladder.base, *ladder.residuals) == bits
    assert ladder.widths == (0, *bits)
    assert len(ladder.ratios) == len(ladder.residuals) == len(bits) - 1


@pytest.mark.parametrize("bits", LADDERS)
def test_open_gates_count_the_rungs_climbed(bits: tuple[int, ...]) -> None:
    ladder = BitLadder(bits)
    for rung, width in enumerate(bits):
        assert ladder.open_gates(width) == (True,) * rung + (False,) * (len(bits) - 1 - rung)


def test_open_gates_refuses_a_width_that_is_no_rung() -> None:
    with pytest.raises(ValueError, match=r"6 is not a width of the ladder \(2, 4, 8\)"):
        BitLadder((2, 4, 8)).open_gates(6)
    with pytest.raises(ValueError, match="0 is not a width"):
        BitLadder((2, 4, 8)).open_gates(0)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((2, 3), r"multiple of the one before.*got \(2, 3\), where 3 is not a multiple of 2"),
        ((2, 4, 6), "where 6 is not a multiple of 4"),
        ((4, 2), r"must increase.*got \(4, 2\)"),
        ((2, 2), r"must increase.*got \(2, 2\)"),
        ((), r"between 2 and 32, with at least one of them; got \(\)"),
        ((1, 2), r"between 2 and 32.*got \(1, 2\)"),
        ((0, 2), "between 2 and 32"),
        ((33,), r"between 2 and 32.*got \(33,\)"),
        ((2, 64), "between 2 and 32"),
    ],
)
def test_ladder_refuses_widths_that_do_not_nest(bits: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitLadder(bits)


@pytest.mark.parametrize("bits", [(2.0, 4.0), (2, 4.5), ("2", "4"), (True, 2)])
def test_ladder_refuses_widths_that_are_no_integers(bits: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match="bit widths must be integers"):
        BitLadder(bits)


def test_ladders_are_values() -> None:
    from_list = BitLadder([2, 4, 8])  # type: ignore[arg-type]
    assert from_list == BitLadder((2, 4, 8))
    assert hash(from_list) == hash(BitLadder((2, 4, 8)))
    assert from_list != BitLadder((2, 4))
