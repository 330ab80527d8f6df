"""Initial ranges by the least squared error of a quantizer, in place of the largest magnitude."""

import torch
from torch import Tensor

from pyro_bbits.insertion.inputs import Inputs, untouched
from pyro_bbits.insertion.network import QuantizedNetwork
from pyro_bbits.quantizer import quantize_fixed

__all__ = ["best_range", "set_mse_ranges"]

SHARES = [0.05 * k for k in range(1, 21)]
"""Candidates, as shares of the largest magnitude."""

VALUES = 100_000


def best_range(x: Tensor, bits: int, *, signed: bool) -> float:
    """The range of least squared error of a `bits`-bit quantizer, of twenty up to the largest magnitude.

    Arguments:
        x: The tensor to be quantized.
        bits: The width.
        signed: Whether the grid is symmetric.
    """
    values = x.detach().flatten().float()
    values = values[:: max(1, len(values) // VALUES)]
    largest = values.abs().max()
    if not largest > 0:
        return 1.0
    errors = [(quantize_fixed(values, s * largest, bits, signed=signed) - values).square().sum() for s in SHARES]
    return SHARES[int(torch.stack(errors).argmin())] * largest.item()


def set_mse_ranges(network: QuantizedNetwork, inputs: Inputs, bits: int = 4) -> None:
    """Set every range of a network to the best one on what the tensor holds when all gates are open.

    Arguments:
        network: The quantized network, its weights set.
        inputs: Example inputs.
        bits: The width that the error is counted at.
    """
    ranges = network.quantizers.ranges.detach().clone()

    def look(row: int, x: Tensor) -> None:
        ranges[row] = best_range(x, bits, signed=network.quantizers.signed[row])

    with untouched(network), network.watching(look):
        network(*inputs.args, **inputs.kwargs, gates=network.open_gates())
    with torch.no_grad():
        network.quantizers.log_range.copy_(ranges.log())
