"""The bodies of our quantizer under one signature, as far as they run here."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pyro_bbits import BitLadder, residual_quantize

__all__ = ["OURS"]

Body = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]

LADDER = BitLadder()


def _plain(x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool) -> Tensor:
    return residual_quantize(x, row[0], row[1:], channel_gates, signed=signed)


def _bodies() -> dict[str, Body]:
    if find_spec("pyro_bbits.kernels") is None:
        return {"eager": _plain, "compiled": torch.compile(_plain, dynamic=False)}
    kernels: Any = import_module("pyro_bbits.kernels")

    def call(x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool) -> Tensor:
        quantized: Tensor = kernels.quantize_row(x, row, channel_gates, signed=signed, ladder=LADDER)
        return quantized

    def force(name: str, function: Body) -> Body:
        def run(x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool) -> Tensor:
            with kernels.use_body(name):
                return function(x, row, channel_gates, signed)

        return run

    bodies = {"eager": force("eager", call), "compiled": force("compiled", torch.compile(call, dynamic=False))}
    if torch.cuda.is_available() and find_spec("triton") is not None:
        bodies["triton"] = force("triton", call)
    return bodies


OURS = _bodies()
"""Each takes a tensor, the row `[beta, z4, z8, z16, z32]`, channel gates or None, and whether it is signed."""
