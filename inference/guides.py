"""Guides: factorized posteriors over the gates, one logit each."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn

from pyro_bbits.distributions import (
    AbstractRelaxedGate,
    Deferred,
    ExpectedCost,
    HardConcrete,
    LogitBernoulli,
    StraightThroughConcrete,
)
from pyro_bbits.distributions.joint import pin_logits
from pyro_bbits.gates import DecisionRule, GateProbabilities, GateValues, decide
from pyro_bbits.inference.joint import JointSites
from pyro_bbits.models.program import BOPS_SITE, host_plate
from pyro_bbits.prior import GatePrior

__all__ = ["AbstractGateGuide", "BernoulliGuide", "HardConcreteGuide", "StraightThroughGuide"]

LARGEST_LOGIT = 1e3
"""Bound of log-odds that are set, which stay finite; a probability is 0 or 1 to float64 long before."""


class AbstractGateGuide(nn.Module):
    r"""A posterior over gates that follows the chain of the prior: :math:`q(z_2) q(z_4 \mid z_2) \dots`.

    Every gate has a logit of its own; gates that the prior pins are pinned here too. Each distribution carries the
    probability that its parent is on, so the KL that :class:`~pyro.infer.TraceMeanField_ELBO` adds up is that of the
    discrete chain, exactly. All gates are drawn at once, and the sites hand out their parts; see
    :class:`~pyro_bbits.inference.joint.JointSites`. The guide is a plain :class:`torch.nn.Module`.

    Arguments:
        prior: The gate prior of the model.
        init: Initial logits, one number or a number per bit width (`{2: 6, 4: 6, 8: 6, 16: -6}`; missing ones are 6).
            A gate moves about one learning rate per step, so it takes some `8 / learning rate` steps to close from 6.
        temperature: Temperature of the relaxation.

    Attributes:
        channel_logits: `(C,)` logits of :math:`z_2`.
        tensor_logits: `(T, R)` logits of the residual gates.

    Raises:
        ValueError: If an initial logit is not finite or belongs to no rung, or the temperature is not positive.
    """

    distribution: ClassVar[type[AbstractRelaxedGate]]

    def __init__(
        self, prior: GatePrior, *, init: float | Mapping[int, float] = 6.0, temperature: float = 2 / 3
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}.")
        self.prior, self.temperature = prior, temperature
        self._num_data: int | None = None
        first, *rest = _initial_logits(init, prior.layout.ladder.bits)
        self.channel_logits = nn.Parameter(torch.full_like(prior.channel_strength, first))
        self.tensor_logits = nn.Parameter(prior.strength.new_tensor(rest).expand_as(prior.strength).clone())

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Sample all gates; takes the arguments of the model and needs none of them."""
        layout, channels = self.prior.layout, self.channel_logits.new_ones(0)
        sites = JointSites(
            self.prior, self.channel_logits, self.tensor_logits, self.distribution, self.temperature, self._num_data
        )
        if layout.num_channels:
            with host_plate("channels", layout.num_channels):
                channels = pyro.sample(layout.channel_site, sites.channels())
        parent = channels
        with host_plate("tensors", len(layout.tensors)):
            for rung, site in enumerate(layout.residual_sites):
                parent = pyro.sample(site, sites.residual(rung, parent))
        if self.prior.bops_cost is not None:
            pyro.sample(BOPS_SITE, ExpectedCost(Deferred(torch.Size(), self._expected_bops_nats)))

    def _expected_bops_nats(self) -> Tensor:
        return self.prior.bops_nats(self.expected_gates())

    @contextmanager
    def pricing(self, num_data: int) -> Iterator[None]:
        """While this is open, gates are drawn together with their KL for a data set of `num_data` points.

        :class:`~pyro_bbits.inference.gate_elbo.GateELBO` takes it from there; other objectives find the KL of each site
        as ever.
        """
        before, self._num_data = self._num_data, num_data
        try:
            yield
        finally:
            self._num_data = before

    def probabilities(self) -> GateProbabilities:
        """Probability that each gate is open given its parent, without gradient."""
        with torch.no_grad():
            return self.expected_gates()

    def expected_gates(self) -> GateProbabilities:
        """The same, differentiable in the logits: for penalties on the expected cost."""
        tensors = self._gate(pin_logits(self.tensor_logits, self.prior.strength)).prob_on
        return GateProbabilities(self._channels().prob_on, tensors)

    def log_odds(self) -> tuple[Tensor, Tensor]:
        """Log-odds of an open gate given its parent, `(C,)` and `(T, R)`; infinite where pinned, without gradient."""
        with torch.no_grad():
            tensors = self._gate(pin_logits(self.tensor_logits, self.prior.strength))
            return self._channels().logit_on, tensors.logit_on

    def set_log_odds(self, channels: Tensor, tensors: Tensor) -> None:
        """Set the logits so that gates have these log-odds; those of pinned gates have no effect.

        Arguments:
            channels: `(C,)` log-odds of the channel gates; infinite ones are bounded, so that training can go on.
            tensors: `(T, R)` log-odds of the residual gates given their parent.
        """
        with torch.no_grad():
            for parameter, values in ((self.channel_logits, channels), (self.tensor_logits, tensors)):
                shift = self._gate(torch.zeros_like(parameter)).logit_on
                parameter.copy_(values.to(parameter).clamp(-LARGEST_LOGIT, LARGEST_LOGIT) - shift)

    def hard_gates(self, rule: DecisionRule = "map") -> GateValues:
        """The gates decided; see :func:`~pyro_bbits.gates.decide`."""
        return decide(self.probabilities(), rule)

    def _channels(self) -> AbstractRelaxedGate:
        return self._gate(pin_logits(self.channel_logits, self.prior.channel_strength))

    def _gate(self, logits: Tensor) -> AbstractRelaxedGate:
        return self.distribution(logits, temperature=self.temperature, validate_args=False)


class HardConcreteGuide(AbstractGateGuide):
    """Gates as hard concrete variables, the paper's posterior; see :class:`AbstractGateGuide` for the arguments."""

    distribution = HardConcrete


class StraightThroughGuide(AbstractGateGuide):
    """Gates as exact Bernoulli draws with straight-through gradients; arguments as :class:`AbstractGateGuide`."""

    distribution = StraightThroughConcrete


class BernoulliGuide(AbstractGateGuide):
    """Gates as exact Bernoulli draws without a relaxation, for score-function gradients: unbiased, and noisy.

    :func:`~pyro_bbits.inference.elbo_module` trains it by
    :class:`~pyro_bbits.inference.score_function.ScoreFunctionELBO`; in stock Pyro use
    :class:`~pyro.infer.TraceGraph_ELBO`. :class:`~pyro.infer.TraceMeanField_ELBO` would leave the likelihood out of the
    gradient. It suits few gates; many of them need more particles than it is worth.

    Arguments:
        prior: The gate prior of the model.
        init: Initial logits, as for :class:`AbstractGateGuide`.
    """

    distribution = LogitBernoulli

    def __init__(self, prior: GatePrior, *, init: float | Mapping[int, float] = 6.0) -> None:
        super().__init__(prior, init=init)


def _initial_logits(init: float | Mapping[int, float], bits: tuple[int, ...]) -> list[float]:
    given = dict(init) if isinstance(init, Mapping) else dict.fromkeys(bits, init)
    if unknown := set(given) - set(bits):
        raise ValueError(f"init names widths {sorted(unknown)} that the ladder {bits} does not have.")
    if not all(math.isfinite(value) for value in given.values()):
        raise ValueError(f"initial logits must be finite (pin gates in the prior instead); got {init}.")
    return [float(given.get(b, 6.0)) for b in bits]
