"""Figures that answer the reviewers' questions: shares of the saving, calibration, ensembles."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bbits.configuration import BitConfiguration
from pyro_bbits.inference.evaluation import device_of, evaluation_mode
from pyro_bbits.models import AbstractModel

__all__ = ["Predictions", "Saving", "calibration_error", "pooled", "predict", "saving_of"]


class Saving(NamedTuple):
    """Relative BOPs in percent, with all that was chosen and with half of it.

    Attributes:
        both: Of the configuration.
        widths_only: Of its widths, all channels kept.
        pruning_only: Of its channels, at 32 x 32 bits.
    """

    both: float
    widths_only: float
    pruning_only: float

    @property
    def pruning_share(self) -> float:
        r"""Share of the saving that is due to pruning, 0 to 1; the rest is due to bit widths.

        Savings multiply, so shares are those of the logarithm. What pruning saves depends on the widths wherever layers
        differ; both orders are averaged:

        .. math::
            \frac{\tfrac12 \big[\log \tfrac{100}{P} + \log \tfrac{W}{B}\big]}{\log \tfrac{100}{B}}
        """
        if not 0 < self.both < 100:
            return 0.0
        alone, then = math.log(100 / self.pruning_only), math.log(self.widths_only / self.both)
        return 0.5 * (alone + then) / math.log(100 / self.both)


def saving_of(configuration: BitConfiguration) -> Saving:
    """The saving of a configuration."""
    return Saving(configuration.relative_bops, configuration.unpruned_bops, configuration.relative_macs)


class Predictions(NamedTuple):
    """Predicted probabilities with the labels.

    Attributes:
        probabilities: `(N, K)`, float64, on the CPU.
        targets: `(N,)`.
    """

    probabilities: Tensor
    targets: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right classes in percent."""
        return 100 * (self.probabilities.argmax(1) == self.targets).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats per sample."""
        right = self.probabilities.gather(1, self.targets[:, None])
        return -right.clamp(min=1e-300).log().mean().item()

    @property
    def calibration_error(self) -> float:
        """See :func:`calibration_error`."""
        return calibration_error(self.probabilities, self.targets)


def predict(model: AbstractModel, loader: Iterable[Any]) -> Predictions:
    """Run data through a model without gates."""
    device, probabilities, targets = device_of(model), [], []
    with evaluation_mode(model):
        for x, y in loader:
            probabilities.append(model.predict(x.to(device)).logits.double().softmax(1).cpu())
            targets.append(y.cpu())
    return Predictions(torch.cat(probabilities), torch.cat(targets))


def pooled(members: Iterable[Predictions]) -> Predictions:
    """The ensemble: the mean of its members' probabilities."""
    members = list(members)
    return Predictions(torch.stack([m.probabilities for m in members]).mean(0), members[0].targets)


def calibration_error(probabilities: Tensor, targets: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error in percentage points.

    .. math::
        \sum_b \frac{n_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    over bins of equal width of the highest probability.

    Arguments:
        probabilities: `(N, K)`.
        targets: `(N,)`.
        bins: Number of bins.

    References:
        Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks, 2017.
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == targets).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    zeros = confidence.new_zeros(bins)
    gap = zeros.index_add(0, place, right) - zeros.index_add(0, place, confidence)
    return 100 * gap.abs().sum().item() / len(targets)
