"""Recipes: learning rates, optimizers and schedule of a training run."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from pyro_bbits.inference.adam import SpreadAdam
from pyro_bbits.inference.objective import ParameterGroups

__all__ = ["FINE_TUNING", "Optimizers", "Recipe", "Schedule", "set_rate"]

Schedule = Literal["tail", "cosine", "steps", "constant"]

GATE_LR = 1e-3
LARGEST_GATE_LR = 0.25
SHARE_TO_CLOSE = 0.2


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's, for runs as long as the paper's.

    Attributes:
        weight_lr: Learning rate of weights, biases and norms.
        gate_lr: Learning rate of the gate logits; None takes the paper's 1e-3, or more where the run is so short that a
            gate could not close: enough for the largest logit to reach even odds within a fifth of the steps, up to
            0.25.
        range_lr: Learning rate of the logarithms of the ranges.
        weight_optimizer: `adam`, or `sgd` with Nesterov momentum 0.9.
        schedule: Of the weights: `tail` is constant for two thirds of the epochs, then linear to zero; `cosine` falls
            to zero per step; `steps` is a tenth after each third of the epochs; `constant`.
        anneal_ranges: Whether ranges follow the schedule too.
        anneal_gates: Whether gates do.
        weight_decay: What a step takes away from weights, but not from biases and norms, as a share of their value per
            unit of learning rate; with `sgd` through the gradient, so that momentum carries it on.

    Raises:
        ValueError: If a rate is not positive, the decay is negative, or a name is unknown.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), appendix; fine-tuning as in its section 4. Decay
        beside Adam: Loshchilov and Hutter, Decoupled weight decay regularization, 2019 (arXiv 1711.05101).
    """

    weight_lr: float = 1e-3
    gate_lr: float | None = None
    range_lr: float = 1e-3
    weight_optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Schedule = "tail"
    anneal_ranges: bool = False
    anneal_gates: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight_lr", "gate_lr", "range_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be a finite number above 0; got {rate}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, 0 or above; got {self.weight_decay}.")
        if self.weight_optimizer not in ("adam", "sgd"):
            raise ValueError(f"weight_optimizer must be 'adam' or 'sgd'; got {self.weight_optimizer!r}.")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}; got {self.schedule!r}.")

    def resolved_gate_lr(self, groups: ParameterGroups, steps: int) -> float:
        """The gate learning rate of a run of so many steps."""
        if self.gate_lr is not None:
            return self.gate_lr
        largest = max((p.detach().max().item() for p in groups.gates if p.numel()), default=0.0)
        # Adam moves a logit by about one learning rate per step; P(z > 0) = 1/2 at a logit of -1.6
        needed = (largest + 1.6) / (SHARE_TO_CLOSE * max(steps, 1))
        return min(max(GATE_LR, needed), LARGEST_GATE_LR)

    def factor(self, epoch: int, epochs: int, step: float) -> float:
        """Multiple of the initial learning rate in epoch `epoch` (from 0), at the fraction `step` of that epoch."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch + step) / epochs)))
        if self.schedule == "steps":
            return 0.1 ** (3 * epoch // epochs)
        tail = int(2 * epochs / 3)
        return 1.0 if self.schedule == "constant" or epoch <= tail else (epochs - epoch) / (epochs - tail)


FINE_TUNING = Recipe(weight_lr=1e-4, range_lr=1e-4, weight_optimizer="sgd", schedule="cosine", anneal_ranges=True)
"""The paper's fine-tuning with fixed gates: Nesterov SGD on weights, Adam on ranges, both 1e-4 with cosine to zero."""


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group; one that is a tensor keeps its place in memory."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class Optimizers:
    """One optimizer per parameter group, and their schedule.

    On a GPU they are fused, and their learning rates and step counts are tensors there, so that a step can be captured
    in a CUDA graph.

    Arguments:
        recipe: The recipe.
        groups: Parameters by kind; empty kinds have no optimizer.
        epochs: Length of the run.
        steps: Steps per epoch.
    """

    def __init__(self, recipe: Recipe, groups: ParameterGroups, epochs: int, steps: int) -> None:
        self.recipe, self.epochs, self.steps = recipe, epochs, steps
        self.gate_lr = recipe.resolved_gate_lr(groups, epochs * steps)
        self.annealed: list[tuple[Optimizer, float]] = []
        self.all: list[Optimizer] = []
        self._factor: float | None = None
        if groups.weights:
            self._add(self._weight_optimizer(groups), recipe.weight_lr, anneal=True)
        if groups.gates:
            self._add(_adam(groups.gates, self.gate_lr), self.gate_lr, anneal=recipe.anneal_gates)
        if groups.ranges:
            self._add(_adam(groups.ranges, recipe.range_lr), recipe.range_lr, anneal=recipe.anneal_ranges)

    def _weight_optimizer(self, groups: ParameterGroups) -> Optimizer:
        lr, decay = self.recipe.weight_lr, self.recipe.weight_decay
        if self.recipe.weight_optimizer == "adam":
            return _adam(groups.weights, lr, decay)
        apart, rate = _apart(groups.weights, decay), _rate(groups.weights, lr)
        fused = True if _on_gpu(groups.weights) else None
        return SGD(apart, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=fused)

    def _add(self, optimizer: Optimizer, lr: float, *, anneal: bool) -> None:
        self.all.append(optimizer)
        if anneal:
            self.annealed.append((optimizer, lr))

    def step(self, loss: Tensor, epoch: int, index: int) -> None:
        """One update from a loss at step `index` of epoch `epoch`."""
        self.schedule(epoch, index)
        self.update(loss)

    def schedule(self, epoch: int, index: int) -> None:
        """Set the learning rates of step `index` of epoch `epoch`, where they have changed."""
        factor = self.recipe.factor(epoch, self.epochs, index / self.steps)
        if factor == self._factor:
            return
        self._factor = factor
        for optimizer, lr in self.annealed:
            for group in optimizer.param_groups:
                set_rate(group, lr * factor)

    def update(self, loss: Tensor) -> None:
        """One update from a loss, at the rates that are set."""
        self.forget_gradients()
        loss.backward()
        for optimizer in self.all:
            optimizer.step()

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def _on_gpu(parameters: list[nn.Parameter]) -> bool:
    return all(p.device.type == "cuda" for p in parameters)


def _rate(parameters: list[nn.Parameter], lr: float) -> float | Tensor:
    return torch.tensor(lr, device=parameters[0].device) if _on_gpu(parameters) else lr


def _adam(parameters: list[nn.Parameter], lr: float, decay: float = 0.0) -> Adam:
    make = SpreadAdam if _on_gpu(parameters) else Adam
    groups, rate = _apart(parameters, decay), _rate(parameters, lr)
    return make(groups, lr=rate, weight_decay=decay, decoupled_weight_decay=True)


def _apart(parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights, which decay, and vectors, biases and norms, which do not; one if there is no decay."""
    weights = [parameter for parameter in parameters if decay and parameter.ndim > 1]
    others = [parameter for parameter in parameters if not decay or parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
