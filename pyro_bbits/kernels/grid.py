r"""Numbers of a ladder's nested grids, and the sums of the residual quantizer, which every body shares.

All bodies work in units of the base step :math:`s = \beta / h`: with :math:`t` the clipped input in these units and
:math:`\rho_b = t - x_b / s` the residual left at rung `b`, the output is :math:`z_2 s (t - \sum_b w_b \rho_b)`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from pyro_bbits.ladder import FLOAT32_BITS, BitLadder

__all__ = [
    "TRITON_BASE_BITS",
    "clip_ends",
    "exact_ratios",
    "gate_gradients",
    "grid_constants",
    "half_width",
    "row_gradient",
    "rung_weights",
]

TRITON_BASE_BITS = 16
"""Widest base of a ladder for the Triton kernels, whose way of rounding ends at 2^22 steps."""


def half_width(bits: int, signed: bool) -> float:
    """Steps between zero and the end of the range: 2^b - 1 on one side, or half of it on each."""
    return (2**bits - 1) / 2 if signed else float(2**bits - 1)


def clip_ends(bits: int, signed: bool) -> tuple[float, float]:
    """Ends of the clip in units of the base step, two float32 ulps inside the range.

    A signed range ends half a step off the grid, on a rounding tie of every rung; just inside it no code can
    overflow. This takes the place of the factor 1 - 1e-7 of the authors' code, which float32 hardly resolves.
    Plain arithmetic, so that a compiler can trace it.
    """
    power = bits - 1 if signed else bits
    end = half_width(bits, signed) if bits <= FLOAT32_BITS else 2.0**power
    high = end - 2 * 2.0 ** (power - FLOAT32_BITS)
    return (-high if signed else 0.0), high


def exact_ratios(ladder: BitLadder) -> tuple[int, ...]:
    """Step ratios of the rungs that float32 can resolve."""
    return tuple(r for bits, r in zip(ladder.residuals, ladder.ratios, strict=True) if bits <= FLOAT32_BITS)


def grid_constants(ladder: BitLadder, signed: bool) -> tuple[float, ...]:
    """What a GPU kernel has to know of a grid when it is compiled.

    Returns:
        Half width, low end, high end, rungs that are the clipped input (0 or 1), and the exact step ratios.
    """
    ratios = exact_ratios(ladder)
    clipped = len(ladder.residuals) - len(ratios)
    return (half_width(ladder.base, signed), *clip_ends(ladder.base, signed), clipped, *map(float, ratios))


def rung_weights(gates: Tensor) -> list[Tensor]:
    """Mixture weight of each rung, base first: w_b = (product of the gates up to b) (1 - next gate)."""
    weights, reached = [], gates.new_ones(())
    for z in gates.unbind():
        weights.append(reached * (1 - z))
        reached = reached * z
    return [*weights, reached]


def gate_gradients(gates: Tensor, errors: list[Tensor]) -> list[Tensor]:
    """Gradients of the gates from errors[i] = sum of gradient times e_b of rung i + 1, by nested sums."""
    inner, nested = gates.new_zeros(()), []
    for i in reversed(range(len(errors))):
        inner = errors[i] + (gates[i + 1] * inner if i + 1 < len(errors) else 0.0)
        nested.append(inner)
    reached, gradients = gates.new_ones(()), []
    for z, value in zip(gates.unbind(), reversed(nested), strict=True):
        gradients.append(reached * value)
        reached = reached * z
    return gradients


def row_gradient(row: Tensor, share: Tensor, residuals: list[Tensor], ladder: BitLadder, signed: bool) -> Tensor:
    r"""Gradient of a packed row :math:`[\beta, z_1, \dots, z_R]` from sums over the tensor.

    Arguments:
        row: `(1 + R,)`, float32.
        share: Sum of the gradient above the range, minus that below it.
        residuals: For each rung, base first, the sum of gradient times residual; 0 for a rung that leaves none.
        ladder: The bit widths.
        signed: Whether the range is symmetric around zero.

    Returns:
        `(1 + R,)`, float32.
    """
    half, (_, high) = half_width(ladder.base, signed), clip_ends(ladder.base, signed)
    step, gates = row[0] / half, row[1:]
    noise = sum((w * s for w, s in zip(rung_weights(gates), residuals, strict=True)), torch.zeros_like(share))
    errors = [step * (coarse - fine) for coarse, fine in pairwise(residuals)]
    return torch.stack([(share * high - noise) / half, *gate_gradients(gates, errors)])
