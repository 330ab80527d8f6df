"""The states of the random generators that a training run may draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GeneratorStates", "undisturbed"]


@dataclass(frozen=True)
class GeneratorStates:
    """States of the global generators of PyTorch (CPU, and the GPU in use), Python and NumPy.

    Attributes:
        tensors: `torch`, and `cuda` where a GPU is in use; bytes.
        values: `python` and `numpy`, as JSON can hold them.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> "GeneratorStates":
        """The states at this moment."""
        tensors = {"torch": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  (the generator that others draw from)
        return cls(tensors, {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]})  # type: ignore[union-attr]

    def restore(self, device: torch.device) -> None:
        """Put the generators back; the state of a GPU is left out where there is none in use."""
        torch.set_rng_state(self.tensors["torch"])
        if device.type == "cuda" and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"], device)
        version, internal, gauss = self.values["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = self.values["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were, whatever is drawn inside."""
    states = GeneratorStates.now(device)
    try:
        yield
    finally:
        states.restore(device)
