"""Evaluation with fixed gates."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_bbits.gates import GateValues
from pyro_bbits.inference.joining import in_pairs
from pyro_bbits.models import AbstractModel

__all__ = ["Evaluation", "device_of", "evaluate", "evaluation_mode", "to_device"]


@dataclass(frozen=True)
class Evaluation:
    """Quality on a data set.

    Attributes:
        samples: Number of samples.
        nll: Mean negative log-likelihood in nats per sample.
        accuracy: Share of right classes in percent; None unless the likelihood is categorical.
        rmse: Root of the mean squared error of the predicted means, over all samples and outputs, in the targets'
            units; None unless the likelihood is normal.
    """

    samples: int
    nll: float
    accuracy: float | None
    rmse: float | None = None


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a nested structure."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards each module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Score:
    """Right classes, or squared errors, summed over batches on the device; nothing if the likelihood is neither."""

    def __init__(self, device: torch.device) -> None:
        self.kinds: set[str] = set()
        self.total = torch.zeros((), dtype=torch.double, device=device)

    def add(self, distribution: Any, y: Tensor) -> None:
        while isinstance(distribution, dist.Independent):
            distribution = distribution.base_dist
        if isinstance(distribution, dist.Categorical):
            self.kinds.add("classes")
            self.total += (distribution.logits.argmax(-1) == y).sum()
        elif isinstance(distribution, dist.Normal):
            self.kinds.add("reals")
            self.total += (distribution.loc - y).double().square().sum()
        else:
            self.kinds.add("other")

    def mean(self, kind: str, targets: int) -> float | None:
        return self.total.item() / targets if self.kinds == {kind} else None


def evaluate(model: AbstractModel, loader: Iterable[Any], gates: GateValues | None = None) -> Evaluation:
    """Evaluate a model in evaluation mode, without gradient, with the gates given (all open if None).

    Arguments:
        model: A model of this package.
        loader: Batches `(x, y)`.
        gates: Hard gates, e.g. `guide.hard_gates()`.

    Returns:
        Means over all samples.

    Raises:
        ValueError: If there is no data.
    """
    device = device_of(model)
    samples, targets, score = 0, 0, _Score(device)
    log_likelihood = torch.zeros((), dtype=torch.double, device=device)
    with evaluation_mode(model):
        # a GPU is done with a batch of small pictures before the next one is launched
        for x, y in in_pairs(loader, device) if device.type == "cuda" else loader:
            x, y = to_device(x, device), y.to(device)
            predicted = model.predict(x, gates)
            log_likelihood += predicted.log_prob(y).sum()  # read once, at the end: a GPU does not wait for the host
            samples, targets = samples + len(y), targets + y.numel()
            score.add(predicted, y)
    if samples == 0:
        raise ValueError("there is no data to evaluate on: the loader gives no batch.")
    right, squares = score.mean("classes", targets), score.mean("reals", targets)
    return Evaluation(
        samples,
        nll=-log_likelihood.item() / samples,
        accuracy=None if right is None else 100 * right,
        rmse=None if squares is None else math.sqrt(squares),
    )
