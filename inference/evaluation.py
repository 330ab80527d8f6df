"""Evaluation with fixed gates."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_bbits.gates import GateValues
from pyro_bbits.models import AbstractModel

__all__ = ["Evaluation", "device_of", "evaluate", "evaluation_mode", "to_device"]


@dataclass(frozen=True)
class Evaluation:
    """Quality on a data set.

    Attributes:
        samples: Number of samples.
        nll: Mean negative log-likelihood in nats per sample.
        accuracy: Share of right classes in percent; None unless the likelihood is categorical.
    """

    samples: int
    nll: float
    accuracy: float | None


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


def _classes(distribution: Any) -> Tensor | None:
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution.logits.argmax(-1) if isinstance(distribution, dist.Categorical) else None


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
    samples, targets, right, log_likelihood = 0, 0, 0.0, 0.0
    known = True
    with evaluation_mode(model):
        for x, y in loader:
            x, y = to_device(x, device), y.to(device)
            predicted = model.predict(x, gates)
            log_likelihood += predicted.log_prob(y).sum().item()
            samples, targets = samples + len(y), targets + y.numel()
            classes = _classes(predicted)
            known = known and classes is not None
            right += 0.0 if classes is None else (classes == y).sum().item()
    if samples == 0:
        raise ValueError("there is no data to evaluate on: the loader gives no batch.")
    return Evaluation(samples, -log_likelihood / samples, 100 * right / targets if known else None)
