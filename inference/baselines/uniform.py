"""Uniform quantization at fixed widths with learned ranges: our own quantizer, its gates pinned."""

from typing import Any

from torch import nn

from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.baselines.tensors import layer_widths
from pyro_bbits.inference.guides import HardConcreteGuide
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import GatedModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName
from pyro_bbits.prior import GatePrior

__all__ = ["uniform"]


def uniform(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    bits: tuple[int, int] = (4, 4),
    edge_bits: int | None = None,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Quantization-aware training at fixed widths: everything is pinned, so nothing is random and the KL is 0.

    The ladder holds the widths asked for and no other, so that no residual is computed in vain.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        bits: Width of weights and of activations; one a multiple of the other.
        edge_bits: Width of the first and last layer; None for that of all others.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    Raises:
        ValueError: If the widths make no ladder.
    """
    asked = {*bits} if edge_bits is None else {*bits, edge_bits}
    network = quantize(net, example_inputs, bits=sorted(asked))
    prior = GatePrior(network, mu=1.0).pin_channels()
    for name, width in zip(network.layout.tensors, layer_widths(network, bits, edge_bits), strict=True):
        prior.pin(name, bits=width)
    model = GatedModel(network, prior, num_data, likelihood)
    return Baseline("uniform", model, HardConcreteGuide(prior), None, StructureSnapshot.of(network))
