"""Activations that a batch norm has finished in advance, and the functions that then have nothing left to do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FinishedTensors", "SkipFinished", "Step", "first_argument", "step_of"]

Step = Literal["relu", "pool", "reshape"]
"""What may lie between a batch norm that does the work of it all and the layers that read the result."""

RELUS = frozenset({F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
POOLINGS = frozenset({F.max_pool2d, torch.max_pool2d})
RESHAPES = frozenset({torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view})

MULTIPLIERS = frozenset(
    {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.pad}
)
"""Functions that quantized layers call on what they have read."""


def first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a function is called on."""
    return args[0] if args else kwargs.get("input")


def step_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Step | None:
    """Which step a call is: a ReLU, a max pooling of 2 x 2 windows side by side, a new shape; None for all else."""
    if func in RELUS:
        return "relu"
    if func in RESHAPES:
        casts = any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values()))
        return None if casts else "reshape"
    return "pool" if func in POOLINGS and _halves(*args, **kwargs) else None


def _halves(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> bool:
    size, given = _pair(kernel_size), _pair(stride or kernel_size)
    return size == given == (2, 2) and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1) and not return_indices


def _pair(value: Any) -> tuple[int, ...]:
    """Height and width; nothing where these are no integers."""
    try:
        sides = [index(side) for side in (value if isinstance(value, list | tuple) else [value])]
    except TypeError:
        return ()
    return tuple(sides * 2 if len(sides) == 1 else sides)


def _changes(x: Tensor) -> int:
    """How often a tensor has been changed in place; PyTorch does not count it for inference tensors."""
    return 0 if x.is_inference() else x._version


@dataclass
class FinishedTensors:
    """The tensors of a pass that are pooled, through the ReLU and quantized as soon as a batch norm has written them.

    They are known by identity, and kept, so that none is used twice.
    """

    _tensors: dict[int, tuple[Tensor, int]] = field(default_factory=dict, init=False)  # with its version
    _unpooled: set[int] = field(default_factory=set, init=False)
    _unread: set[int] = field(default_factory=set, init=False)

    def __contains__(self, x: Any) -> bool:
        return bool(self._tensors) and id(x) in self._tensors  # a compiler cannot trace identities, and needs none

    def add(self, x: Tensor, pooled: bool = False) -> None:
        """Take a tensor; `pooled` if its pooling, which then is done, is still to be met."""
        self._tensors[id(x)] = x, _changes(x)
        self._unread.add(id(x))
        if pooled:
            self._unpooled.add(id(x))

    def clear(self) -> None:
        """Forget all."""
        for known in (self._tensors, self._unpooled, self._unread):
            known.clear()

    def read(self, x: Tensor) -> None:
        """A layer takes a tensor as it is.

        Raises:
            RuntimeError: If its pooling has not been met.
        """
        if id(x) in self._unpooled:
            raise _another_path("a layer reads an activation before the pooling that it passed")
        self._unread.discard(id(x))

    def is_unread(self, x: Any) -> bool:
        """Whether it is a tensor that no layer has taken yet."""
        return id(x) in self._unread

    def is_untouched(self, x: Tensor) -> bool:
        """Whether the values of a tensor are still the batch norm's, and its shape is what the network thinks it is."""
        return id(x) not in self._unpooled and self._tensors[id(x)][1] == _changes(x)

    def pool(self, x: Tensor) -> bool:
        """Whether a tensor meets the pooling that has been done already; the second it meets has not."""
        met = id(x) in self._unpooled
        self._unpooled.discard(id(x))
        return met

    def reshape(self, x: Tensor, reshaped: Tensor) -> bool:
        """Take the values in another shape, once their pooling has been met and before a layer has read them."""
        if id(x) in self._unpooled or id(x) not in self._unread:
            return False
        self._unread.discard(id(x))
        self.add(reshaped)
        return True

    def check_read(self) -> None:
        """Raise if no layer has found a tensor as it was written: what it has read instead is not known.

        Raises:
            RuntimeError: If there is such a tensor.
        """
        if self._unread:
            raise RuntimeError(
                "a batch norm has quantized an activation that did not reach the layers that read it on the example "
                "inputs: a hook has put another tensor in its place, or the network took another path. Switch this "
                "off, network.fused = False."
            )


def _another_path(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} on the example inputs, so that the batch norm before it has quantized it already. The network took "
        "another path; switch this off, network.fused = False."
    )


class SkipFinished(TorchFunctionMode):
    """While active, ReLUs and poolings return finished tensors as they are; what these are reshaped to is finished too.

    Arguments:
        finished: The tensors.
    """

    def __init__(self, finished: FinishedTensors) -> None:
        super().__init__()
        self.finished = finished

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = first_argument(args, kwargs)
        step = step_of(func, args, kwargs) if x in self.finished else None
        if step == "relu" or (step == "pool" and self.finished.pool(x)):
            return x
        result = func(*args, **kwargs)
        if step == "reshape" and self.finished.reshape(x, result):
            return result
        if func not in MULTIPLIERS or self.finished.is_unread(x):
            self._check(func, args, kwargs, result)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Raise if a function does more with a finished tensor than to look at what it is.

        It makes another tensor of it, changes it, or asks anything of one that the network thinks is not pooled yet.
        """
        given = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else (arg,))]
        finished = [x for x in given if x in self.finished]
        made = result if isinstance(result, list | tuple) else (result,)
        makes = finished and any(isinstance(x, Tensor) and x is not finished[0] for x in made)
        if makes or not all(map(self.finished.is_untouched, finished)):
            raise _another_path(f"{func.__name__} reads an activation that only quantized layers read")
