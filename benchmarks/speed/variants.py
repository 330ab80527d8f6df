"""The bodies of our quantizer under one signature, as far as they run here."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from pyro_bbits import BitLadder
from pyro_bbits.kernels import quantize_row, use_body
from pyro_bbits.kernels.dispatch import Body

__all__ = ["OURS"]

Call = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def _quantize(x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool) -> Tensor:
    return quantize_row(x, row, channel_gates, signed=signed, ladder=BitLadder())


@cache
def _compiled() -> Call:
    return torch.compile(_quantize, dynamic=False)


def _run(body: Body, x: Tensor, row: Tensor, channel_gates: Tensor | None, signed: bool) -> Tensor:
    call = _compiled() if body == "compiled" else _quantize
    with use_body(body):
        return call(x, row, channel_gates, signed)


_HERE: tuple[Body, ...] = ("eager", "compiled")
if torch.cuda.is_available() and find_spec("triton") is not None:
    _HERE = (*_HERE, "triton")

OURS: dict[str, Call] = {body: partial(_run, body) for body in _HERE}
"""Each takes a tensor, the row `[beta, z4, z8, z16, z32]`, channel gates or None, and whether it is signed."""
