"""The bodies of our quantizer under one signature, as far as they are installed here."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bbits import residual_quantize

__all__ = ["OURS"]

Body = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def _eager(x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool) -> Tensor:
    return residual_quantize(x, row[0], row[1:], channel_gates, signed=signed)


OURS: dict[str, Body] = {"eager": _eager, "compiled": torch.compile(_eager, dynamic=False)}
"""Each takes a tensor, the row `[beta, z4, z8, z16, z32]`, channel gates or None, and whether it is signed."""
