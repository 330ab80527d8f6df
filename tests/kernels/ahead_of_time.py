"""Compile the kernels for an H100 or H200, as they would be launched there; print their assembly as JSON.

Arguments: type of the input, type of the result, elements per channel, bit widths (2,4,8).
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyro_bbits.kernels import quantize_row, triton_body, triton_rounding, use_body
from pyro_bbits.kernels.rounding import round_to_grid
from pyro_bbits.ladder import BitLadder

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
KERNELS = [
    *(f"{kind}_{way}" for kind in ("flat", "channels") for way in ("forward", "backward")),
    "flat_finish",
    "channels_finish",
]


class Recorder:
    """Stands in for a kernel: remembers what it is launched with."""

    def __init__(self, kernel: Any, launches: dict[str, tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | options
        self.launches[self.kernel.__name__] = self.kernel, values


def compile_ahead(kernel: Any, values: dict[str, Any]) -> str:
    """Build for an H100 or H200 what the launch would, and return its assembly."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
            aligned = not parameter.do_not_specialize_on_alignment
        elif parameter.is_constexpr:
            signature[parameter.name], constants[(i,)], aligned = "constexpr", value, False
        else:
            signature[parameter.name], aligned = "i32", not parameter.do_not_specialize and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": values["num_warps"]})
    return str(built.asm["ptx"])


def main(given: str, written: str, channel: str, bits: str) -> None:
    launches: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in KERNELS:
        setattr(triton_body, name, Recorder(getattr(triton_body, name), launches))
    triton_rounding.round_flat = Recorder(triton_rounding.round_flat, launches)
    ladder = BitLadder(tuple(map(int, bits.split(","))))
    x = torch.zeros(2, int(channel), dtype=getattr(torch, given), requires_grad=True)
    row, gates = torch.rand(len(ladder.bits), requires_grad=True), torch.rand(2, requires_grad=True)
    for channel_gates in (None, gates):
        with use_body("triton"):
            out = quantize_row(
                x, row, channel_gates, signed=channel_gates is None, ladder=ladder, dtype=getattr(torch, written)
            )
        out.backward(torch.zeros_like(out))
    with use_body("triton"), torch.no_grad():
        round_to_grid(x, row[0], -7, 7)
    print(json.dumps({name: compile_ahead(*launch) for name, launch in launches.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
