"""Memory order of tensors: the bodies work on dense memory, whatever the order of dimensions in it."""

import torch
from torch import Tensor

__all__ = ["dense", "empty_like", "is_dense", "ordered_like"]


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_ready(x: Tensor, per_channel: bool) -> bool:
    if not is_dense(x):
        return False
    return not per_channel or x.shape[0] <= 1 or x.stride(0) * x.shape[0] == x.numel()


def dense(x: Tensor, per_channel: bool) -> Tensor:
    """The tensor itself if it has no gaps and, `per_channel`, each slice of dimension 0 is one stretch; else a copy."""
    if _is_ready(x, per_channel):
        return x
    return x.contiguous() if per_channel else torch.empty_like(x).copy_(x)


def empty_like(x: Tensor, per_channel: bool, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor in the memory order that :func:`dense` gives `x`."""
    keep = not per_channel or _is_ready(x, per_channel)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.preserve_format if keep else torch.contiguous_format)


def ordered_like(x: Tensor, other: Tensor) -> Tensor:
    """`x`, or a copy of it, in the memory order of a dense tensor of the same shape."""
    sizes = zip(x.shape, x.stride(), other.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in sizes):
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)
