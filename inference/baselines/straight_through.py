"""Bayesian Bits with straight-through Gumbel-softmax gates in place of hard concrete ones."""

from typing import Any

from torch import nn

from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.guides import StraightThroughGuide
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import GatedModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName
from pyro_bbits.prior import GatePrior

__all__ = ["straight_through"]


def straight_through(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    mu: float = 0.1,
    bits: tuple[int, ...] = (2, 4, 8, 16, 32),
    temperature: float = 2 / 3,
    simplified: bool = False,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    r"""Exact 0/1 gates in the forward pass, and the gradient of their relaxation.

    Each gate is the straight-through Gumbel-softmax of two classes with logits :math:`(\phi, 0)`: the difference of two
    Gumbel variables is logistic, so with :math:`l = \log u - \log(1 - u)`

    .. math::
        \mathrm{softmax}\Big(\frac{(\phi + g_1,\, g_2)}{\tau}\Big)_1 = \mathrm{sigmoid}\Big(\frac{\phi + l}{\tau}\Big),
        \qquad z = 1[\phi + l > 0].

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        mu: Strength of the prior, see :class:`~pyro_bbits.GatePrior`.
        bits: The ladder.
        temperature: :math:`\tau`.
        simplified: Whether to use the paper's penalty in place of the KL.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    References:
        Jang, Gu, Poole, Categorical reparameterization with Gumbel-softmax, 2017 (arXiv 1611.01144), section 2.2.
    """
    network = quantize(net, example_inputs, bits=bits)
    prior = GatePrior(network, mu, simplified=simplified)
    guide = StraightThroughGuide(prior, temperature=temperature)
    model = GatedModel(network, prior, num_data, likelihood)
    return Baseline("straight-through", model, guide, None, StructureSnapshot.of(network))
