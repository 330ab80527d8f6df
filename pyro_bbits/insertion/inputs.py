"""Example inputs of a network, and how it is run on them without a trace of it left."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Inputs", "countable", "untouched"]


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a network: positional and keyword arguments.

    Raises:
        ValueError: If no tensor is among them, a tensor is empty, or a value is NaN or infinite.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """A tensor is the single argument, a tuple or list the arguments, a mapping the keyword arguments."""
        if isinstance(example, Mapping):
            return cls((), dict(example))
        return cls(tuple(example) if isinstance(example, Sequence) else (example,), {})

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError(
                f"example_inputs must hold at least one tensor; got {type(self.args).__name__} {self.args!r}."
            )
        for tensor in self.tensors:
            if tensor.numel() == 0:
                raise ValueError(
                    f"example_inputs are empty: a tensor has shape {tuple(tensor.shape)}; give a few real examples."
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(
                    "example_inputs hold NaN or infinite values; the ranges cannot be calibrated from them."
                )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """Length of dimension 0 of the first tensor."""
        return self.tensors[0].shape[0]

    def map(self, change: Any) -> "Inputs":
        """The same arguments with a function applied to each tensor."""
        changed = tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, (self.args, dict(self.kwargs)))
        return Inputs(*changed)

    def run(self, net: nn.Module) -> Any:
        """Call a network."""
        return net(*self.args, **self.kwargs)


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Restore buffers (batch-norm statistics) and the random state afterwards."""
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    devices = {p.device.index for p in net.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for name, buffer in net.named_buffers():
                if name in kept:  # else the forward pass has made it
                    buffer.copy_(kept[name])


@contextmanager
def countable() -> Iterator[None]:
    """Attention in plain products, which the counter sees: not by the fast path, not by a fused kernel."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
