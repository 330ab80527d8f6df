"""The analytic KL between a relaxed gate posterior and the gate prior, registered for Pyro's mean-field ELBO."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import register_kl

from pyro_bbits.distributions.concrete import AbstractRelaxedGate
from pyro_bbits.distributions.gate import GateBernoulli

__all__ = ["gate_kl", "link_kl"]

CERTAIN = 1e4
"""A logit at which a gate is certain; an infinite one would make 0 log 0 of the other outcome, which is NaN."""


@register_kl(AbstractRelaxedGate, GateBernoulli)  # type: ignore[untyped-decorator]
def gate_kl(q: AbstractRelaxedGate, p: GateBernoulli) -> Tensor:
    r"""KL of one link of the gate chain, weighted by the probability of reaching it.

    .. math::
        \mathrm{reach} \cdot \Big[ q \log\frac{q}{e^{-\lambda}} + (1 - q) \log\frac{1 - q}{1 - e^{-\lambda}} \Big],
        \qquad q = P(z > 0 \mid \text{parent on})

    Summed over a chain this is the KL of the discrete chain, exactly. With `p.simplified` it is the paper's penalty
    :math:`\mathrm{reach} \cdot \lambda q`, which leaves out the entropy of `q` and the term in
    :math:`\log(1 - e^{-\lambda})`; probabilities fitted with it select a configuration but do not quantify doubt.
    Gates that the prior pins contribute 0 and pass no gradient.

    Arguments:
        q: The posterior, `(*,)`.
        p: The prior, `(*,)`.

    Returns:
        `(*,)` values in nats per data set.

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.2.
    """
    return q.reach * link_kl(q.logit_on, p.cost, simplified=p.simplified)


def link_kl(logit_on: Tensor, cost: Tensor, *, simplified: bool) -> Tensor:
    """KL of one link of the gate chain while its parent is on; see :func:`gate_kl`.

    Arguments:
        logit_on: Log-odds of an open gate under the posterior, `(*,)`; may be infinite.
        cost: Cost of an open gate under the prior in nats per data set, `(*,)`; 0 and infinity pin it.
        simplified: Take the paper's penalty instead.

    Returns:
        `(*,)` values in nats per data set, 0 where pinned.
    """
    pinned = (cost == 0) | (cost == math.inf)
    cost, logit = cost.masked_fill(pinned, 1.0), logit_on.masked_fill(pinned, 0.0).clamp(-CERTAIN, CERTAIN)
    on, off = torch.sigmoid(logit), torch.sigmoid(-logit)
    if simplified:
        kl = on * cost
    else:
        log_off = torch.log(-torch.expm1(-cost))
        kl = on * (F.logsigmoid(logit) + cost) + off * (F.logsigmoid(-logit) - log_off)
    return kl.masked_fill(pinned, 0.0)
