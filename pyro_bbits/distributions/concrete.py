"""Gate posteriors given by a logit: hard concrete, straight-through binary concrete, and plain Bernoulli."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_bbits.distributions.deferred import Deferred, DeferredAttribute, read
from pyro_bbits.distributions.gate import AbstractGate

__all__ = ["AbstractRelaxedGate", "DrawnPart", "HardConcrete", "LogitBernoulli", "StraightThroughConcrete"]

LOW, HIGH = -0.1, 1.1
"""Stretch limits of the hard concrete: gamma and zeta in the paper."""


class DrawnPart:
    """What one site hands out of gates that were drawn together.

    It is handed out once: who asks the distribution again gets a draw of its own.

    Arguments:
        source: What drew the gates.
        site: Name of the site.
        value: The gates of the site.
    """

    def __init__(self, source: Any, site: str, value: Tensor) -> None:
        self.source, self.site = source, site
        self._value: Tensor | None = value

    def take(self) -> Tensor | None:
        """The gates, the first time; then None."""
        value, self._value = self._value, None
        return value


class AbstractRelaxedGate(AbstractGate):
    r"""A reparametrized gate posterior given by one logit.

    Arguments:
        logits: :math:`\phi`, any real number, `(*,)`; :math:`\pm\infty` pins the gate.
        reach: Probability under the posterior that the parent is on, `(*,)`; it weighs the KL. 1 at the root.
        on: The sampled parent gate, `(*,)`; None at the root.
        temperature: Temperature of the relaxation, above 0.
        part: Gates drawn beforehand for the statement that samples this distribution as it is; expanded further, the
            distribution draws by itself.

    Raises:
        ValueError: If the temperature is not positive.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # logits may be infinite
    has_rsample = True
    parameters = ("logits", "reach")
    logits = DeferredAttribute()
    reach = DeferredAttribute()

    def __init__(
        self,
        logits: Tensor | Deferred,
        reach: Tensor | Deferred | float = 1.0,
        on: Tensor | Deferred | None = None,
        *,
        temperature: float = 2 / 3,
        part: DrawnPart | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}.")
        self.temperature, self.part = temperature, part
        reached = _constant(reach, logits) if isinstance(reach, int | float) else reach
        super().__init__(logits, reached, on=on, validate_args=validate_args)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What `pyro.sample` asks for: the gates drawn beforehand, if there are any, or new ones."""
        drawn = None if self.part is None or args or kwargs else self.part.take()
        return super().__call__(*args, **kwargs) if drawn is None else drawn

    def _copy_options(self, new: Any) -> None:
        new.temperature = self.temperature
        new.part = self.part if new.batch_shape == self.batch_shape else None

    @staticmethod
    def shift(temperature: float) -> float:
        """Log-odds of an open gate, its parent on, whose logit is 0."""
        return 0.0

    @staticmethod
    def relax(noise: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Values of gates whose parents are on, from uniform noise in [0, 1)."""
        raise NotImplementedError

    @property
    def logit_on(self) -> Tensor:
        """Log-odds of an open gate (value above 0) while its parent is on."""
        shift = self.shift(self.temperature)
        return self.logits + shift if shift else self.logits

    @property
    def prob_on(self) -> Tensor:
        """Probability of an open gate (value above 0) while its parent is on."""
        return torch.sigmoid(self.logit_on)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw gates, differentiable in the logits."""
        logits, on = self.logits, self.on
        noise = torch.rand(self._extended_shape(sample_shape), dtype=logits.dtype, device=logits.device)
        z = self.relax(noise, logits, self.temperature)
        return z if on is None else z * on


def _constant(number: float, like: Tensor | Deferred) -> Deferred:
    return Deferred((), lambda: read(like).new_full((), number))


def _concrete(noise: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """A binary concrete sample: sigmoid of the logit plus logistic noise, over the temperature."""
    tiny = torch.finfo(noise.dtype).eps
    return torch.sigmoid((torch.logit(noise.clamp(tiny, 1 - tiny)) + logits) / temperature)


class HardConcrete(AbstractRelaxedGate):
    r"""The hard concrete: a stretched binary concrete, clipped to [0, 1], with atoms at both ends.

    .. math::
        s = \mathrm{sigmoid}\Big(\frac{\log u - \log(1-u) + \phi}{\tau}\Big), \qquad
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma))

    with :math:`\gamma = -0.1`, :math:`\zeta = 1.1`, :math:`\tau = 2/3`, so that
    :math:`P(z > 0) = \mathrm{sigmoid}(\phi - \tau \log(-\gamma / \zeta)) = \mathrm{sigmoid}(\phi + 1.5986)`.

    It is a mixed measure: a *sampled* KL against it, as :class:`~pyro.infer.Trace_ELBO` makes, is wrong in value and in
    gradient. Use :class:`~pyro.infer.TraceMeanField_ELBO`, which finds the analytic KL of this package.

    Arguments:
        logits: :math:`\phi`, `(*,)`.
        reach: Probability under the posterior that the parent is on, `(*,)`.
        on: The sampled parent gate, `(*,)`.
        temperature: :math:`\tau`.

    Example:
        >>> HardConcrete(torch.tensor([-2.0, 0.0, 6.0])).prob_on
        tensor([0.4010, 0.8318, 0.9995])

    References:
        Louizos, Welling, Kingma, Learning sparse neural networks through L0 regularization, 2018 (arXiv 1712.01312);
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), section 2.2.
    """

    @staticmethod
    def shift(temperature: float) -> float:
        """Log-odds that the value is above 0, its parent on, where the logit is 0."""
        return -temperature * math.log(-LOW / HIGH)

    @staticmethod
    def relax(noise: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Stretch a binary concrete sample and clip it to [0, 1]."""
        return (_concrete(noise, logits, temperature) * (HIGH - LOW) + LOW).clamp(0, 1)

    @property
    def _logit_one(self) -> Tensor:
        return self.logits - self.temperature * math.log((1 - LOW) / (HIGH - 1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the atoms at 0 and 1 and of the density in between, in nats."""
        inside = (value > 0) & (value < 1)
        s = (torch.where(inside, value, torch.full_like(value, 0.5)) - LOW) / (HIGH - LOW)
        v = self.temperature * torch.logit(s) - self.logits
        density = (
            F.logsigmoid(v) + F.logsigmoid(-v) - torch.log(s * (1 - s)) + math.log(self.temperature / (HIGH - LOW))
        )
        atoms = torch.where(value > 0, F.logsigmoid(self._logit_one), F.logsigmoid(-self.logit_on))
        return self._where_on(torch.where(inside, density, atoms))


class StraightThroughConcrete(AbstractRelaxedGate):
    r"""A binary gate whose gradient is that of its binary-concrete relaxation.

    The value is :math:`1[\log u - \log(1-u) + \phi > 0]`, an exact Bernoulli draw with
    :math:`P(z = 1) = \mathrm{sigmoid}(\phi)`; the backward pass uses :math:`\mathrm{sigmoid}((\cdot) / \tau)`.
    The network sees hard gates in training as at test time, and the posterior is nearer to the exact one than the hard
    concrete's; its gradients are biased.

    Arguments:
        logits: :math:`\phi`, `(*,)`.
        reach: Probability under the posterior that the parent is on, `(*,)`.
        on: The sampled parent gate, `(*,)`.
        temperature: :math:`\tau`.

    References:
        Maddison, Mnih, Teh, The concrete distribution, 2017 (arXiv 1611.00712);
        Bengio, Leonard, Courville, Estimating or propagating gradients through stochastic neurons, 2013
        (arXiv 1308.3432).
    """

    @staticmethod
    def relax(noise: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """0 or 1, with the gradient of the relaxation."""
        soft = _concrete(noise, logits, temperature)
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the gates being on (`value > 0`) or off, in nats."""
        return self._where_on(torch.where(value > 0, F.logsigmoid(self.logits), F.logsigmoid(-self.logits)))


class LogitBernoulli(AbstractRelaxedGate):
    r"""A binary gate without a relaxation: draws pass no gradient, so it needs a score-function estimator.

    :math:`P(z = 1) = \mathrm{sigmoid}(\phi)` while the parent is on.

    Arguments:
        logits: :math:`\phi`, `(*,)`.
        reach: Probability under the posterior that the parent is on, `(*,)`.
        on: The sampled parent gate, `(*,)`.
        temperature: Has no effect.
    """

    has_rsample = False

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw 0 or 1."""
        with torch.no_grad():
            z, on = torch.bernoulli(self.prob_on.expand(self._extended_shape(sample_shape))), self.on
            return z if on is None else z * on

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the gates being on (`value > 0`) or off, in nats."""
        return self._where_on(torch.where(value > 0, F.logsigmoid(self.logits), F.logsigmoid(-self.logits)))
