"""Bayesian Bits without pruning: all channels are pinned."""

from typing import Any

from torch import nn

from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.guides import HardConcreteGuide
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import GatedModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName
from pyro_bbits.prior import GatePrior

__all__ = ["quantization_only"]


def quantization_only(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    mu: float = 0.1,
    bits: tuple[int, ...] = (2, 4, 8, 16, 32),
    simplified: bool = False,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Learned widths of weights and activations, and every channel kept.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        mu: Strength of the prior, see :class:`~pyro_bbits.GatePrior`.
        bits: The ladder.
        simplified: Whether to use the paper's penalty in place of the KL.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 4.
    """
    network = quantize(net, example_inputs, bits=bits)
    prior = GatePrior(network, mu, simplified=simplified).pin_channels()
    model = GatedModel(network, prior, num_data, likelihood)
    return Baseline("quantization-only", model, HardConcreteGuide(prior), None, StructureSnapshot.of(network))
