"""Training steps on a compiled network: its quantizers fused with what surrounds them, once the compiler has run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.inference.evaluation import evaluation_mode
from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models import AbstractModel

__all__ = ["CompiledNetwork", "pays_to_compile"]

SAVED_SECONDS = 5e-9
"""What a compiled quantizer saves for each of its elements and step, forward and backward, on two cores."""

COMPILING_SECONDS, SECONDS_PER_TENSOR = 20.0, 5.0
"""What the compiler takes, about, the first time."""


def pays_to_compile(model: AbstractModel, x: Any, steps: int) -> bool:
    """Whether a run on a CPU is so long that compiling costs less than half of what it saves.

    An estimate from the number of quantized elements, not a measurement: the same run always decides alike.

    Arguments:
        model: The model.
        x: Inputs of a batch.
        steps: Steps of the run.
    """
    network = model.net
    if not isinstance(network, QuantizedNetwork) or network.rule is not None:
        return False  # what is saved is known of the residual quantizer alone
    elements = 0

    def count(row: int, tensor: Tensor) -> None:
        nonlocal elements
        elements += tensor.numel()

    with evaluation_mode(model), network.watching(count):
        model.predict(x)
    compiling = COMPILING_SECONDS + SECONDS_PER_TENSOR * len(network.layout.tensors)
    return steps * elements * SAVED_SECONDS > 2 * compiling


class CompiledNetwork:
    """A network that runs compiled inside its context, and as it is elsewhere, as in evaluations.

    It is compiled for one batch size, that of the first batch; others run as they are. Where compiling fails, it is
    given up with a warning.

    Arguments:
        net: The network.

    Attributes:
        reason: Why it was given up; None while it works.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.reason: str | None = None
        self._rows: int | None = None
        self._call = torch.compile(net._call_impl, dynamic=False)

    @contextmanager
    def running(self, rows: int) -> Iterator[None]:
        """A context in which a call of the network with a batch of so many rows is the compiled one."""
        self._rows = rows if self._rows is None else self._rows
        if self.reason is not None or rows != self._rows:
            yield
            return
        module: Any = self.net
        module._compiled_call_impl = self._call
        try:
            yield
        finally:
            module._compiled_call_impl = None

    def give_up(self, error: Exception) -> None:
        """Run the network as it is from now on, and say why."""
        lines = str(error).strip().splitlines() or [""]
        self.reason = f"{type(error).__name__}: {lines[0]}"
        warnings.warn(
            f"the network is not compiled ({self.reason}); it runs as it is, with the same result and more slowly. "
            "compile=False says nothing of it.",
            stacklevel=7,
        )
