"""Triton kernels run on the device if there is one, and otherwise through Triton's interpreter, on the CPU."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

import pyro_bbits.kernels as kernels

PREFIX = "pyro_bbits.kernels.triton_"


def swap_modules(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put other copies of the kernels' modules in place (none: the next import makes new ones); return the old."""
    old = {name: module for name, module in sys.modules.items() if name.startswith(PREFIX)}
    for name in old:
        del sys.modules[name]
        vars(kernels).pop(name.rpartition(".")[2], None)
    for name, module in modules.items():
        sys.modules[name] = module
        setattr(kernels, name.rpartition(".")[2], module)
    return old


def interpret_language(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter into Triton's own library too, which is jitted already if Triton has been imported."""
    import triton.language as tl
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    for module in (tl, tl.standard):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                patch.setattr(module, name, InterpretedFunction(function.fn))


@contextmanager
def interpreter() -> Iterator[None]:
    """Inside, the kernels are Python. Triton decides when it decorates a function, so their modules are imported anew.

    Each time, since the operators are those of the module imported last.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        interpret_language(patch)
        compiled = swap_modules({})
        importlib.import_module("pyro_bbits.kernels.triton_body")
        try:
            yield
        finally:
            swap_modules(compiled)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def triton_runs(device: str) -> Iterator[None]:
    """For tests that launch kernels, which are skipped without Triton."""
    pytest.importorskip("triton")
    if device == "cuda":
        yield
    else:
        with interpreter():
            yield
