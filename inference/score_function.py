"""Score-function gradients of the ELBO for gates that have no relaxation."""

from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

__all__ = ["ScoreFunctionELBO"]


class ScoreFunctionELBO(TraceMeanField_ELBO):
    r"""Pyro's mean-field ELBO with score-function gradients of the likelihood and a leave-one-out baseline.

    .. math::
        \nabla \mathrm{ELBO} \approx \frac{1}{S} \sum_i \Big(\ell_i - \frac{1}{S - 1} \sum_{j \ne i} \ell_j\Big)
        \nabla \log q(z_i) - \nabla \mathrm{KL}, \qquad \ell_i = \log p(D \mid z_i), \quad z_i \sim q

    Unbiased: no other draw depends on :math:`z_i`. The KL is analytic. Its loss is that of
    :class:`~pyro.infer.TraceMeanField_ELBO`, the negative ELBO in nats per data set.

    Arguments:
        num_particles: Number `S` of gate samples per step, at least 2.

    Raises:
        ValueError: If there are fewer than 2 particles.

    References:
        Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning, 1992;
        Kool, van Hoof, Welling, Buy 4 REINFORCE samples, get a baseline for free, 2019.
    """

    def __init__(self, num_particles: int = 8) -> None:
        if num_particles < 2:
            raise ValueError(f"the leave-one-out baseline needs num_particles of at least 2; got {num_particles}.")
        super().__init__(num_particles=num_particles)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Draw gates; the value is the loss, the gradient the score-function estimate of its gradient."""
        losses, scores = [], []
        with pyro.validation_enabled(False):  # its checks refuse guides that are not reparametrized
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                losses.append(self._differentiable_loss_particle(model_trace, guide_trace)[1])
                scores.append(guide_trace.log_prob_sum())
        loss, score = torch.stack(losses), torch.stack(scores)
        values = loss.detach()
        # the KL is the same for every draw, so it is no part of the difference to the others' mean
        advantage = (values - values.mean()) * len(values) / (len(values) - 1)
        return (loss + advantage * (score - score.detach())).mean()
