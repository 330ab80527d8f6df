"""Finds what keeps a training step from being captured in a CUDA graph: reads on the host, and tensors made there."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HostRead", "HostReadError", "HostReads"]

READS = {
    "aten::_local_scalar_dense": "a value is read on the host (item, float, bool, if)",
    "aten::is_nonzero": "a value is read on the host (bool, if)",
    "aten::equal": "two tensors are compared on the host (torch.equal)",
    "aten::nonzero": "the size of the result is known only to the device (nonzero, where, a mask as index)",
    "aten::masked_select": "the size of the result is known only to the device (masked_select)",
    "aten::bincount": "the size of the result is known only to the device (bincount)",
    "aten::repeat_interleave": "the size of the result is known only to the device (repeat_interleave)",
    "aten::_unique2": "the size of the result is known only to the device (unique)",
    "aten::unique_dim": "the size of the result is known only to the device (unique)",
    "aten::lift_fresh": "a tensor is made from Python numbers (torch.tensor, new_tensor, as_tensor)",
    "aten::lift_fresh_copy": "a tensor is made from Python numbers (torch.tensor, new_tensor, as_tensor)",
}
"""Operations that a stream capture does not allow, and what they mean in a program."""

MOVES = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
LIBRARIES = ("torch", "pyro", "contextlib")


class HostRead(NamedTuple):
    """One operation that a capture does not allow.

    Attributes:
        operation: Name of the ATen operation, e.g. `aten::_local_scalar_dense`.
        reason: What it means.
        place: File, line and function of the program that asked for it, outside PyTorch and Pyro.
    """

    operation: str
    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.operation} at {self.place}: {self.reason}"


class HostReadError(RuntimeError):
    """A step did what no CUDA graph can hold."""


class HostReads(TorchDispatchMode):
    """Records, or refuses, operations that wait for the device or bring numbers from the host.

    Works on every device: a step can be looked at on the CPU. There nothing moves between devices, so that such moves
    are seen on a GPU only. An index is taken for a mask by its type.

    Arguments:
        refuse: Raise at the first one.

    Attributes:
        found: What was found so far.

    Raises:
        HostReadError: With `refuse`, naming the operation and the line that asked for it.

    Example:
        >>> with HostReads() as audit:
        ...     size = torch.ones(3).sum().item()
        >>> [read.operation for read in audit.found]
        ['aten::_local_scalar_dense']
    """

    def __init__(self, *, refuse: bool = False) -> None:
        super().__init__()
        self.refuse = refuse
        self.found: list[HostRead] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at an operation, then run it."""
        options = dict(kwargs or {})
        reason = _reason(func._schema.name, args, options)
        if reason is not None:
            self.found.append(HostRead(func._schema.name, reason, _place()))
            if self.refuse:
                raise HostReadError(f"a CUDA graph cannot hold this step: {self.found[-1]}.")
        return func(*args, **options)


def _reason(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    if name in MOVES and _crosses(args, options):
        return "numbers move between host and device (to, copy_)"
    if name in INDEXING and any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])):
        return READS["aten::nonzero"]
    return READS.get(name)


def _crosses(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    devices = {leaf.device.type for leaf in args if isinstance(leaf, Tensor)}
    if options.get("device") is not None:
        devices.add(torch.device(options["device"]).type)
    return len(devices) > 1


def _place() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    code = frame.f_code
    return f"{frame.f_globals.get('__name__', code.co_filename)}, line {frame.f_lineno}, in {code.co_name}"
