"""The ladder of bit widths that a quantizer can climb, one gate per rung above the first."""

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["BitLadder"]

FLOAT32_BITS = 24
"""Significand of float32: a finer grid than this cannot be told from the clipped input."""


@dataclass(frozen=True)
class BitLadder:
    r"""Bit widths whose uniform grids nest, from coarse to fine.

    A `b`-bit grid on a fixed range has step :math:`s_b \propto 1 / (2^b - 1)`. The grid of :math:`b'` bits contains
    the grid of `b` bits exactly when :math:`s_b / s_{b'} = (2^{b'} - 1) / (2^b - 1)` is an integer, that is when
    `b` divides `b'`. The ratio is then odd, so a residual never leaves its coarse cell.

    Arguments:
        bits: Widths in bits, increasing, each a multiple of the one before; from 2 to 32.

    Raises:
        TypeError: If a width is not an integer.
        ValueError: If the widths are out of range, not increasing, or their grids do not nest.

    Example:
        >>> ladder = BitLadder((2, 4, 8))
        >>> ladder.ratios
        (5, 17)
        >>> BitLadder((2, 3))
        Traceback (most recent call last):
            ...
        ValueError: each bit width must be a multiple of the one before, e.g. (2, 4, 8, 16, 32); got (2, 3), where 3 is not a multiple of 2.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.1.
    """  # noqa: E501

    bits: tuple[int, ...] = (2, 4, 8, 16, 32)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        if any(not isinstance(b, int) or isinstance(b, bool) for b in self.bits):
            raise TypeError(f"bit widths must be integers, e.g. (2, 4, 8); got {self.bits}.")
        if not self.bits or min(self.bits) < 2 or max(self.bits) > 32:
            raise ValueError(f"bit widths must lie between 2 and 32, with at least one of them; got {self.bits}.")
        for coarse, fine in pairwise(self.bits):
            if fine <= coarse:
                raise ValueError(f"bit widths must increase, e.g. (2, 4, 8); got {self.bits}.")
            if fine % coarse:
                raise ValueError(
                    "each bit width must be a multiple of the one before, e.g. (2, 4, 8, 16, 32); "
                    f"got {self.bits}, where {fine} is not a multiple of {coarse}."
                )

    @property
    def base(self) -> int:
        """The coarsest width: what a tensor has when every residual gate is closed."""
        return self.bits[0]

    @property
    def residuals(self) -> tuple[int, ...]:
        """The widths above the base, one gate each."""
        return self.bits[1:]

    @property
    def ratios(self) -> tuple[int, ...]:
        """Integer step ratios between neighbouring rungs, e.g. (5, 17, 257, 65537)."""
        return tuple((2**fine - 1) // (2**coarse - 1) for coarse, fine in pairwise(self.bits))

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width a tensor can end with, 0 (all channels removed) included."""
        return (0, *self.bits)

    def open_gates(self, bits: int) -> tuple[bool, ...]:
        """Which residual gates are open at width `bits`.

        Example:
            >>> BitLadder((2, 4, 8)).open_gates(4)
            (True, False)
        """
        if bits not in self.bits:
            raise ValueError(f"{bits} is not a width of the ladder {self.bits}.")
        return tuple(b <= bits for b in self.residuals)
