"""Tensors that nobody may ask for: worked out when they are first read."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["Deferred", "DeferredAttribute", "read"]


class Deferred:
    """A tensor of known shape that is computed when it is first read.

    A gate distribution takes one in place of a tensor. In a training step the values of the gates come from the guide
    and the KL from one fused call, so most parameters of the sites are never looked at.

    Arguments:
        shape: Shape of the tensor.
        compute: Makes it; called at most once with and once without gradients.

    Example:
        >>> twice = Deferred((2,), lambda: 2 * torch.ones(2))
        >>> twice.shape
        torch.Size([2])
        >>> twice.read()
        tensor([2., 2.])
    """

    def __init__(self, shape: Any, compute: Callable[[], Tensor]) -> None:
        self.shape, self._compute = torch.Size(shape), compute
        self._value: Tensor | None = None
        self._followed = False

    def read(self) -> Tensor:
        """The tensor; with its graph where gradients are recorded now."""
        if self._value is None or torch.is_grad_enabled() > self._followed:
            self._value, self._followed = self._compute(), torch.is_grad_enabled()
        return self._value


def read(value: Tensor | Deferred) -> Tensor:
    """The tensor itself, deferred or not."""
    return value.read() if isinstance(value, Deferred) else value


class DeferredAttribute:
    """An attribute of a distribution that may be set deferred, and is read as a tensor of the batch shape."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "DeferredAttribute": ...
    @overload
    def __get__(self, instance: Any, owner: type) -> Tensor: ...
    def __get__(self, instance: Any, owner: type) -> "Tensor | DeferredAttribute":
        """The attribute, broadcast; a view."""
        if instance is None:
            return self
        value = read(instance.__dict__[self.name])
        return value if value.shape == instance.batch_shape else value.expand(instance.batch_shape)

    def __set__(self, instance: Any, value: Tensor | Deferred) -> None:
        """Keep the attribute as it came."""
        instance.__dict__[self.name] = value
