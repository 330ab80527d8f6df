"""Bayesian Bits without a choice of widths: all of them are pinned."""

from typing import Any

from torch import nn

from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.baselines.tensors import layer_widths
from pyro_bbits.inference.guides import HardConcreteGuide
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import GatedModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName
from pyro_bbits.prior import GatePrior

__all__ = ["pruning_only"]


def pruning_only(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    mu: float = 0.1,
    bits: tuple[int, int] = (8, 8),
    simplified: bool = False,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Learned channels at fixed widths: (32, 32), (8, 8) and (4, 8) are the paper's.

    A channel is priced at the width that its layer's weights have, as the first rung of a ladder is.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        mu: Strength of the prior, see :class:`~pyro_bbits.GatePrior`.
        bits: Width of weights and of activations; one a multiple of the other. 32 is the input clipped to its range.
        simplified: Whether to use the paper's penalty in place of the KL.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    Raises:
        ValueError: If the widths make no ladder.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 4.
    """
    network = quantize(net, example_inputs, bits=sorted({*bits}))
    prior = GatePrior(network, mu, simplified=simplified)
    prior.channel_strength.mul_(bits[0] / network.layout.ladder.base)
    for name, width in zip(network.layout.tensors, layer_widths(network, bits, None), strict=True):
        prior.pin(name, bits=width)
    model = GatedModel(network, prior, num_data, likelihood)
    return Baseline("pruning-only", model, HardConcreteGuide(prior), None, StructureSnapshot.of(network))
