"""The kernels of the fused norm compile for a GPU where there is none."""

import os
import subprocess
import sys
from typing import Any

import pytest

from pyro_bbits.kernels.grid import grid_constants
from pyro_bbits.ladder import BitLadder

TILE = {"BM": 8, "BC": 128}
POOLED = {"BM": 4, "BC": 128}
SUMS = {"BP": 128, "BC": 16, "ROUNDS": 2, "GATED": True}
GRID = {"GRID": grid_constants(BitLadder((4, 8, 32)), signed=False)}

CONSTANTS: dict[str, list[dict[str, Any]]] = {
    "moments": [{**TILE, "TILES": 3}],
    "statistics": [SUMS],
    "normalize": [{**TILE, **GRID, "POOLED": pooled} for pooled in (False, True)],
    "reduce": [
        {**tile, **GRID, "POOLED": pooled, "TILES": 3, "VECTOR": 8} for pooled, tile in ((False, TILE), (True, POOLED))
    ],
    "finish": [{**SUMS, **GRID, "COLUMNS": 256}],
    "differentiate": [{**tile, **GRID, "POOLED": pooled} for pooled, tile in ((False, TILE), (True, POOLED))],
}

ACTIVATIONS = {"y", "out", "grad", "dy"}


def kind(argument: str, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument == "eps":
        return "fp32"
    if argument in ("M", "C", "P", "W", "chunk", "count"):
        return "i32"
    return "*bf16" if argument in ACTIVATIONS else "*fp32"


def compile_all() -> None:
    """For an H100 or H200, compute capability 9.0; registers spilt to local memory would show in the assembly."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pyro_bbits.kernels import triton_norm_backward, triton_norm_forward

    modules = triton_norm_forward, triton_norm_backward
    kernels = {name: getattr(module, name) for module in modules for name in module.__all__}
    assert CONSTANTS.keys() == kernels.keys()
    for name, constants in ((name, constants) for name, several in CONSTANTS.items() for constants in several):
        signature = {argument: kind(argument, constants) for argument in kernels[name].arg_names}
        source = ASTSource(kernels[name], signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]


def test_kernels_compile_ahead_of_time() -> None:
    """In a process of its own: the interpreter leaves its traces in Triton's library."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


if __name__ == "__main__":
    compile_all()
