"""A cost of whole configurations: a factor of the prior, and its expectation under a guide."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, register_kl

from pyro_bbits.distributions.deferred import Deferred

__all__ = ["CostFactor", "ExpectedCost"]


class _Weight(dist.TorchDistribution):
    """A distribution over nothing, which weighs the trace that it stands in; batch shape `()`.

    Arguments:
        cost: A scalar in nats per data point, worked out only where it is asked for.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, cost: Deferred) -> None:
        self._cost = cost
        super().__init__(torch.Size(), torch.Size([0]), validate_args=False)

    @property
    def cost(self) -> Tensor:
        """The cost in nats per data point."""
        return self._cost.read()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """An empty tensor."""
        return torch.empty(*sample_shape, 0)


class CostFactor(_Weight):
    r"""A factor :math:`e^{-N c(z)}` of the prior over configurations, not normalized.

    Arguments:
        cost: :math:`c(z)` of the gates drawn, in nats per data point.
        num_data: Number of data points `N`.
    """

    def __init__(self, cost: Deferred, num_data: int) -> None:
        super().__init__(cost)
        self.num_data = num_data

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the factor."""
        return -self.num_data * self.cost


class ExpectedCost(_Weight):
    r"""What a guide expects the cost to be: :math:`E_{q(z)}\, c(z)`, where the model has a :class:`CostFactor`.

    It adds nothing to the density of the guide. Its KL is the analytic expectation of the factor, which a mean-field
    ELBO takes in place of the cost of the gates that happened to be drawn.

    Arguments:
        cost: The expectation, in nats per data point.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros(value.shape[:-1], device=value.device)


@register_kl(ExpectedCost, CostFactor)  # type: ignore[untyped-decorator]
def _expected_cost(q: ExpectedCost, p: CostFactor) -> Tensor:
    return p.num_data * q.cost
