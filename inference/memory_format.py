"""The order in which images lie in memory while a network trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["channels_last", "has_images", "match_memory"]


def has_images(module: nn.Module) -> bool:
    """Whether a network convolves images."""
    return any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in module.modules())


@contextmanager
def channels_last(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep the weights of two-dimensional convolutions in channels-last order, which the matrix units of GPUs prefer.

    Values, shapes and names stay; the usual order comes back at the end.

    Arguments:
        module: The module.
        enabled: Whether to do so.
    """
    weights = [p for p in module.parameters() if p.dim() == 4 and p.is_contiguous()] if enabled else []
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


def match_memory(state: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A state of an optimizer in the memory order of its parameter, as fused optimizers demand."""
    if state.shape != parameter.shape or state.stride() == parameter.stride():
        return state
    return torch.empty_like(parameter, dtype=state.dtype).copy_(state)
