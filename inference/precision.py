"""The arithmetic of a training run: float32, TF32 or bfloat16."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch

__all__ = ["FINEST_BITS", "Precision", "autocast", "check_precision_name", "matrix_arithmetic"]

Precision = Literal["float32", "tf32", "bf16"]
"""How matrix products are computed in training.

`float32` is exact to 24 bits. `tf32` rounds their operands to 11 bits on the matrix units of a GPU. `bf16` runs the
network under autocast in bfloat16, which has 8; quantizers, gates, likelihood, weights and optimizers stay float32.
"""

FINEST_BITS = 8
"""Widest codes that TF32 and bfloat16 still tell apart: all of the 8-bit ones in TF32, 235 of the 256 unsigned ones in
bfloat16, and of the 65,536 16-bit ones some 7,000 and 1,300. Gates above 8 bits see only noise there."""


def check_precision_name(precision: Precision | None) -> None:
    """Raise a ValueError for an unknown name; None leaves PyTorch's own settings alone."""
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))} or None; got {precision!r}.")


@contextmanager
def matrix_arithmetic(precision: Precision | None) -> Iterator[None]:
    """Set how float32 products and convolutions are computed on a GPU, and put it back afterwards.

    Arguments:
        precision: The arithmetic; bf16 takes TF32 for what autocast leaves in float32. None changes nothing.
    """
    if precision is None:
        yield
        return
    put_back = _settings()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    for backend in _backends():
        backend.fp32_precision = "ieee" if precision == "float32" else "tf32"
    try:
        yield
    finally:
        put_back()


def _backends() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _settings() -> Callable[[], None]:
    """What puts PyTorch's settings back, those of the older names and those of each backend."""
    each = [backend.fp32_precision for backend in _backends()]
    products = _answer(torch.get_float32_matmul_precision)
    convolutions = _answer(lambda: torch.backends.cudnn.allow_tf32)

    def put_back() -> None:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for backend, value in zip(_backends(), each, strict=True):
            backend.fp32_precision = value

    return put_back


def _answer(ask: Callable[[], Any]) -> Any:
    """What an older name says; None once the newer ones have said something else, after which it raises."""
    try:
        return ask()
    except RuntimeError:
        return None


def autocast(precision: Precision | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast of a training step; nothing unless the precision is bf16."""
    if precision != "bf16":
        return nullcontext()
    # weights are quantized anew in each step: a cache of casts would only keep them
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
