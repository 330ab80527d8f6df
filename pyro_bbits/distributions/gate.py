"""The contract of a gate distribution, and the autoregressive Bernoulli prior."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["AbstractGate", "GateBernoulli"]


class AbstractGate(dist.TorchDistribution):
    r"""Distribution of gates in [0, 1], each of which exists only while its parent gate is on.

    A gate is *on* when its value, relaxed or not, is above 0. Where the parent is off the gate is 0 with probability
    one, and its log-probability is defined as 0, so that a chain of gates adds up to the log-probability of its path.

    Arguments:
        tensors: Parameters, broadcast to the batch shape.
        on: The sampled parent gate, broadcast to the batch shape; None at the root of the chain.
    """

    support = constraints.unit_interval  # not boolean: relaxed values must pass Pyro's validation
    parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *tensors: Tensor, on: Tensor | None = None, validate_args: bool | None = None) -> None:
        *values, parent = torch.broadcast_tensors(*tensors, tensors[0] if on is None else on)
        for name, value in zip(self.parameters, values, strict=True):
            setattr(self, name, value)
        self.on = None if on is None else parent > 0
        super().__init__(values[0].shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Expand to a larger batch shape, as plates do."""
        new = self._get_checked_instance(type(self), _instance)
        shape = torch.Size(batch_shape)  # plates hand over a list
        for name in self.parameters:
            setattr(new, name, getattr(self, name).expand(shape))
        new.on = None if self.on is None else self.on.expand(shape)
        self._copy_options(new)
        super(AbstractGate, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _copy_options(self, new: Any) -> None:
        """Copy what is not a tensor parameter to an expanded instance."""

    def _where_on(self, values: Tensor) -> Tensor:
        return values if self.on is None else torch.where(self.on, values, torch.zeros_like(values))


class GateBernoulli(AbstractGate):
    r"""The gate prior: a Bernoulli gate that favours being off.

    .. math::
        p(z = 1 \mid \text{parent on}) = e^{-\lambda}, \qquad p(z = 1 \mid \text{parent off}) = 0

    :math:`\lambda = 0` pins the gate on, :math:`\lambda = \infty` pins it off.

    Arguments:
        cost: :math:`\lambda \ge 0` in nats per data set, `(*,)`.
        on: The sampled parent gate, `(*,)`; None at the root of the chain.
        simplified: Let the registered KL be the paper's penalty, :math:`\lambda` times the probability of an open
            gate, which drops the entropy and the cost of staying off.

    Raises:
        ValueError: If a cost is negative or NaN.

    Example:
        >>> GateBernoulli(torch.tensor([0.0, 1.0, torch.inf])).probs
        tensor([1.0000, 0.3679, 0.0000])

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.2.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"cost": constraints.nonnegative}
    parameters = ("cost",)
    cost: Tensor

    def __init__(
        self,
        cost: Tensor,
        on: Tensor | None = None,
        *,
        simplified: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.simplified = simplified
        super().__init__(cost, on=on, validate_args=validate_args)

    def _copy_options(self, new: Any) -> None:
        new.simplified = self.simplified

    @property
    def probs(self) -> Tensor:
        """Probability of an open gate while its parent is on."""
        return torch.exp(-self.cost)

    @property
    def log_off(self) -> Tensor:
        """Log-probability of a closed gate while its parent is on, log(1 - exp(-cost))."""
        return torch.log(-torch.expm1(-self.cost))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw 0 or 1."""
        z = torch.bernoulli(self.probs.expand(self._extended_shape(sample_shape)))
        return z if self.on is None else z * self.on

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the gates being on (`value > 0`) or off, in nats."""
        return self._where_on(torch.where(value > 0, -self.cost, self.log_off))
