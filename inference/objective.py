"""The objective: Pyro's mean-field ELBO over a gated model, the parameters it trains, and stock SVI."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_bbits.inference.gate_elbo import GateELBO
from pyro_bbits.inference.guides import AbstractGateGuide, BernoulliGuide
from pyro_bbits.inference.score_function import ScoreFunctionELBO
from pyro_bbits.insertion import QuantizationRule
from pyro_bbits.models import AbstractModel, sample_gates
from pyro_bbits.prior import GatePrior
from pyro_bbits.quantizer import Quantizers

__all__ = ["EmptyGuide", "ParameterGroups", "elbo_module", "gate_kl_nats", "parameter_groups", "svi_pair"]


class EmptyGuide(nn.Module):
    """The guide of a model without latent variables."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Sample nothing."""


def elbo_module(model: nn.Module, guide: nn.Module, num_particles: int = 1) -> nn.Module:
    r"""The negative ELBO as an ordinary module: `elbo(x, y)` is a loss in nats per data set.

    .. math::
        -\frac{N}{B} \sum_{n \in \text{batch}} \log p(y_n \mid x_n, z) + \mathrm{KL}(q(z) \,\|\, p(z)), \qquad z \sim q

    The KL is analytic. Divide by the number of data points for a loss in nats per sample, as :func:`fit` does.
    Gradients are those of the relaxation; for a :class:`~pyro_bbits.inference.BernoulliGuide`, which has none, they are
    score-function gradients with a leave-one-out baseline.

    Arguments:
        model: A Pyro model, e.g. :class:`~pyro_bbits.models.GatedModel`.
        guide: Its guide.
        num_particles: Gate samples per step; at least 2 are drawn for a Bernoulli guide.

    Returns:
        A module whose parameters are those of the model and the guide.
    """
    if isinstance(guide, BernoulliGuide):
        estimator: TraceMeanField_ELBO = ScoreFunctionELBO(num_particles=max(2, num_particles))
    else:
        estimator = GateELBO(num_particles=num_particles)
    elbo: nn.Module = estimator(model, guide)
    return elbo


@dataclass(frozen=True)
class ParameterGroups:
    """Trainable parameters by kind: the paper trains each kind with an optimizer of its own.

    Attributes:
        weights: Everything that is neither gate nor range: weights, biases, norms, likelihood parameters.
        gates: Gate logits.
        ranges: Ranges of the quantizers, and parameters of a :class:`~pyro_bbits.insertion.QuantizationRule` that
            wants a learning rate of its own.
    """

    weights: list[nn.Parameter]
    gates: list[nn.Parameter]
    ranges: list[nn.Parameter]


def parameter_groups(model: nn.Module, guide: nn.Module) -> ParameterGroups:
    """Sort the trainable parameters of a model and a guide into weights, gates and ranges."""
    gates = [p for p in guide.parameters() if p.requires_grad]
    ranges = [p for m in model.modules() if _has_ranges(m) for p in m.parameters() if p.requires_grad]
    other = {id(p) for p in gates + ranges}
    return ParameterGroups([p for p in model.parameters() if p.requires_grad and id(p) not in other], gates, ranges)


def _has_ranges(module: nn.Module) -> bool:
    return isinstance(module, Quantizers) or (isinstance(module, QuantizationRule) and module.own_rate)


def gate_kl_nats(guide: nn.Module, prior: GatePrior, num_data: int) -> float:
    """KL of the gate posterior against the prior in nats per data set, cost of BOPs included, as the ELBO has it."""
    price = guide.pricing(num_data) if isinstance(guide, AbstractGateGuide) else nullcontext()
    with torch.no_grad(), price:
        kl: Tensor = GateELBO().differentiable_loss(partial(sample_gates, prior, num_data), guide)
    return kl.item()


def svi_pair(model: AbstractModel, guide: nn.Module, name: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """Model and guide as functions for stock :class:`pyro.infer.SVI`, registered under a name of their own.

    SVI keeps parameters in one global store by name; two models of one process must not share a name, or the second
    one does not train. The loss is in nats per sample.

    Arguments:
        model: The model.
        guide: The guide.
        name: A name that no other pair of this process has.

    Returns:
        Functions to give to `SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())`.

    Raises:
        ValueError: If the parameter store already holds another pair of this name.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_bbits.models import PlainModel
        >>> pair = svi_pair(PlainModel(nn.Linear(4, 2), num_data=8), EmptyGuide(), "doctest")
        >>> svi = SVI(*pair, pyro.optim.Adam({"lr": 0.01}), loss=TraceMeanField_ELBO())
        >>> svi.step(torch.ones(8, 4), torch.zeros(8, dtype=torch.long)) > 0
        True
    """
    taken = {key.split("$$$")[0] for key in pyro.get_param_store()}
    if {f"{name}.model", f"{name}.guide"} & taken:
        raise ValueError(f"the name {name!r} is taken in Pyro's parameter store; choose another for this model.")
    pyro.module(f"{name}.model", model)  # takes the name now, before another pair can
    pyro.module(f"{name}.guide", guide)

    def named_model(*args: Any, **kwargs: Any) -> Tensor:
        pyro.module(f"{name}.model", model)
        with poutine.scale(scale=1.0 / model.num_data):
            return model(*args, **kwargs)  # type: ignore[no-any-return]

    def named_guide(*args: Any, **kwargs: Any) -> None:
        pyro.module(f"{name}.guide", guide)
        with poutine.scale(scale=1.0 / model.num_data):
            guide(*args, **kwargs)

    return named_model, named_guide
