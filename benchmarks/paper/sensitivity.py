"""The search without training that the paper compares its post-training mode with."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from pyro_bbits.cost import NetworkCost
from pyro_bbits.gates import GateValues
from pyro_bbits.inference import evaluate
from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models import GatedModel

__all__ = ["Point", "gates_at", "sensitivity_curve"]

START, CANDIDATES = 16, (8, 4)


class Point(NamedTuple):
    """A step of the search.

    Attributes:
        widths: Width of each tensor.
        relative_bops: In percent.
        accuracy: On the validation rows, in percent.
    """

    widths: tuple[int, ...]
    relative_bops: float
    accuracy: float


def gates_at(network: QuantizedNetwork, widths: Iterable[int]) -> GateValues:
    """Hard gates of given widths, all channels kept."""
    gates, ladder = network.open_gates(), network.layout.ladder
    for row, bits in enumerate(widths):
        gates.tensors[row] = torch.tensor(ladder.open_gates(bits), dtype=torch.float32)
    return gates


def sensitivity_curve(model: GatedModel, train: Iterable[Any], validation: Iterable[Any]) -> list[Point]:
    """Lower the width of one tensor after the other, the least harmful first.

    All tensors start at 16 bits. Each is set to 8 and to 4 bits alone, and the accuracy measured on training rows.
    Sorted by it, all these steps are taken, one upon the other; one that would raise a width again is left out, where
    the published code takes it.

    Arguments:
        model: A gated model with trained weights; batch norms keep their statistics.
        train: Training rows, a part of them at best.
        validation: Rows that the curve is drawn on.

    Returns:
        The start, and a point after each step.

    References:
        van Baalen et al., Bayesian Bits, 2020, as its published code does it.
    """
    network, cost = model.net, NetworkCost(model.net)
    start = (START,) * len(network.layout.tensors)

    def accuracy(widths: tuple[int, ...], rows: Iterable[Any]) -> float:
        found = evaluate(model, rows, gates_at(network, widths)).accuracy
        assert found is not None
        return found

    def point(widths: tuple[int, ...]) -> Point:
        return Point(widths, cost(gates_at(network, widths)).item(), accuracy(widths, validation))

    steps = [(row, bits) for row in range(len(start)) for bits in CANDIDATES]
    harmless = sorted(steps, key=lambda step: -accuracy(_lowered(start, *step), train))
    points = [point(start)]
    for row, bits in harmless:
        widths = _lowered(points[-1].widths, row, bits)
        if widths != points[-1].widths:
            points.append(point(widths))
    return points


def _lowered(widths: tuple[int, ...], row: int, bits: int) -> tuple[int, ...]:
    return (*widths[:row], min(bits, widths[row]), *widths[row + 1 :])
