r"""L0 regularization: hard concrete gates on channels, everything else in full precision."""

from typing import Any

import torch
from torch import nn

from pyro_bbits.cost import FLOAT_BITS
from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.guides import HardConcreteGuide
from pyro_bbits.insertion import QuantizedNetwork, StructureSnapshot, quantize
from pyro_bbits.models import GatedModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName
from pyro_bbits.prior import GatePrior

__all__ = ["l0"]


def l0(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    penalty: float = 1e-6,
    per_weight: bool = True,
    init: float = 6.0,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    r"""L0 pruning of channels with hard concrete gates.

    .. math::
        \frac{1}{N} \sum_n -\log p(y_n \mid x_n, \theta \odot z) + \lambda \sum_g |g| \, P(z_g > 0), \qquad
        P(z_g > 0) = \mathrm{sigmoid}\Big(\phi_g - \tau \log \frac{-\gamma}{\zeta}\Big)

    the groups `g` being the output channels of prunable layers. It is the model of this library with one gate per
    channel and the simplified penalty; the price of a channel does not depend on what it computes. Widths are 32,
    tensors clipped to their learned range. What differs from the paper: the gates of the first layer's inputs are
    missing, there is no L2 term, and gates are decided (`guide.hard_gates()`), where the paper goes on with the mean
    gate, clipped, and so scales what it keeps.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        penalty: :math:`\lambda` in nats per sample; the paper writes :math:`\lambda / N`.
        per_weight: Count a channel with the :math:`|g|` weights it consists of (bias not counted); False with 1.
        init: Initial logit :math:`\phi`; the paper starts near log-odds of a dropout rate of 0.5 to 0.2, 0 to 1.4.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    Raises:
        ValueError: If the penalty is not a finite number above 0.

    References:
        Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2018 (arXiv 1712.01312),
        section 2.
    """
    if not 0 < penalty < float("inf"):
        raise ValueError(f"penalty must be a finite number above 0 (nats per sample); got {penalty}.")
    network = quantize(net, example_inputs, bits=(FLOAT_BITS,))
    prior = GatePrior(network, penalty, cost="constant", simplified=True)
    prior.channel_strength.copy_(penalty * _group_sizes(network) if per_weight else torch.tensor(penalty))
    model = GatedModel(network, prior, num_data, likelihood)
    guide = HardConcreteGuide(prior, init=init)
    return Baseline("l0", model, guide, None, StructureSnapshot.of(network))


def _group_sizes(network: QuantizedNetwork) -> torch.Tensor:
    """Weights behind each channel gate, `(C,)`."""
    sizes = [
        network.get_submodule(f"net.{group.layer}").weight.numel() / group.channels  # type: ignore[operator]
        for group in network.layout.groups
        for _ in range(group.channels)
    ]
    return torch.tensor(sizes)
