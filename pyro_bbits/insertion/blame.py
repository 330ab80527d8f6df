"""Find the functions that keep closed channels from arriving as zero; see :mod:`~pyro_bbits.insertion.probe`."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_bbits.insertion.experiment import ALL_OFF, ALL_ON, TOLERANCE, Experiment

__all__ = ["blame"]


def blame(experiment: Experiment, producers: Sequence[str]) -> dict[str, str]:
    """Find the first function that makes something other than zero of the zeros of a producer's closed channels.

    Arguments:
        experiment: The network on marked channels.
        producers: The layers to ask for, in the order of their calls.

    Returns:
        The function's name, for each layer where there is one.
    """
    culprits: dict[str, str] = {}
    for batch in experiment.batches(producers):
        mode = _Blame(experiment, batch)
        with contextlib.suppress(_Found), mode:
            experiment.run(experiment.singling_out(batch))
        culprits |= mode.culprits
    return culprits


class _Found(Exception):
    """Ends a pass whose question is answered."""


class _Blame(TorchFunctionMode):
    """Watches every function of a pass until each producer has its culprit."""

    def __init__(self, experiment: Experiment, producers: Sequence[str]) -> None:
        super().__init__()
        self.experiment, self.producers = experiment, producers
        self.culprits: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor):
                self._judge(func.__name__.strip("_"), result, (args, kwargs))
        return result

    def _judge(self, name: str, result: Tensor, arguments: Any) -> None:
        shifted = self._states(result)[1]
        if not shifted.any():
            return
        states = [self._states(x) for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        if states:
            zero, other = (torch.stack(state).any(0) for state in zip(*states, strict=True))
            for i in (shifted & zero & ~other).nonzero().flatten().tolist():
                self.culprits.setdefault(self.producers[i], name)
        if len(self.culprits) == len(self.producers):
            raise _Found

    def _states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For each producer, whether what depends on it is zero when all is off, and whether it is not.

        Neither holds where nothing depends on it.
        """
        if not x.is_floating_point() or not self.experiment.has_lanes(x):
            return (torch.zeros(len(self.producers), dtype=torch.bool),) * 2
        x = self.experiment.lanes_first("", x).unsqueeze(-1).flatten(1)
        but_one, _, _ = self.experiment.split(x, len(self.producers))
        depends = (x[ALL_ON] - but_one).abs() > TOLERANCE
        shifted = (depends & ~(x[ALL_OFF].abs() <= TOLERANCE)).any(1)  # NaN is none of the zeros either
        return depends.any(1) & ~shifted, shifted
