"""The contract of a gate distribution, and the autoregressive Bernoulli prior."""

from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_bbits.distributions.deferred import Deferred, DeferredAttribute, read

__all__ = ["AbstractGate", "GateBernoulli", "PriorSite"]


class AbstractGate(dist.TorchDistribution):
    r"""Distribution of gates in [0, 1], each of which exists only while its parent gate is on.

    A gate is *on* when its value, relaxed or not, is above 0. Where the parent is off the gate is 0 with probability
    one, and its log-probability is defined as 0, so that a chain of gates adds up to the log-probability of its path.

    Making or expanding one computes nothing: parameters are broadcast, and the parent is compared, when they are read.

    Arguments:
        tensors: Parameters, broadcast to the batch shape; each a tensor or a
            :class:`~pyro_bbits.distributions.Deferred` one.
        on: The sampled parent gate (or its state), broadcast to the batch shape; None at the root of the chain.
    """

    support = constraints.unit_interval  # not boolean: relaxed values must pass Pyro's validation
    parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, *tensors: Tensor | Deferred, on: Tensor | Deferred | None = None, validate_args: bool | None = None
    ) -> None:
        for name, value in zip(self.parameters, tensors, strict=True):
            setattr(self, name, value)
        self._parent = on
        shapes = [value.shape for value in (*tensors, on) if value is not None]
        super().__init__(torch.broadcast_shapes(*shapes), validate_args=validate_args)

    @property
    def on(self) -> Tensor | None:
        """Whether the parent of each gate is on, booleans of the batch shape; None at the root of the chain."""
        return None if self._parent is None else (read(self._parent) > 0).expand(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Expand to a larger batch shape, as plates do."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self.parameters:
            setattr(new, name, self.__dict__[name])
        new._parent = self._parent
        super(AbstractGate, new).__init__(torch.Size(batch_shape), validate_args=False)  # plates hand over a list
        new._validate_args = self._validate_args
        self._copy_options(new)
        return new

    def _copy_options(self, new: Any) -> None:
        """Copy what is not a tensor parameter to an expanded instance."""

    def _where_on(self, values: Tensor) -> Tensor:
        on = self.on
        return values if on is None else torch.where(on, values, torch.zeros_like(values))


class PriorSite(NamedTuple):
    """Where a gate prior was sampled by :func:`~pyro_bbits.models.sample_gates`, so that its KL may be had elsewhere.

    Attributes:
        prior: The :class:`~pyro_bbits.GatePrior` whose prices the costs are.
        num_data: The number of data points that multiplies them.
        site: Name of the sample site.
    """

    prior: object
    num_data: int
    site: str


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
        made_at: The site of a whole network's prior that this is, unless it is expanded further.

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
    cost = DeferredAttribute()

    def __init__(
        self,
        cost: Tensor | Deferred,
        on: Tensor | Deferred | None = None,
        *,
        simplified: bool = False,
        made_at: PriorSite | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.simplified, self.made_at = simplified, made_at
        super().__init__(cost, on=on, validate_args=validate_args)

    def _copy_options(self, new: Any) -> None:
        new.simplified = self.simplified
        new.made_at = self.made_at if new.batch_shape == self.batch_shape else None

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
        z, on = torch.bernoulli(self.probs.expand(self._extended_shape(sample_shape))), self.on
        return z if on is None else z * on

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the gates being on (`value > 0`) or off, in nats."""
        return self._where_on(torch.where(value > 0, -self.cost, self.log_off))
