"""A guide's gates drawn together, and the distributions of the sites that hand them out."""

from functools import partial

import torch
from torch import Tensor

from pyro_bbits.distributions import AbstractRelaxedGate, Deferred, DrawnPart, HardConcrete, StraightThroughConcrete
from pyro_bbits.distributions.joint import GateBank, GateDraw, draw_gates, pin_logits
from pyro_bbits.prior import GatePrior

__all__ = ["JointSites"]


class JointSites:
    """The distributions of a guide's sites, coarse to fine, and one draw of all gates for them to hand out.

    Each distribution is what a guide would make of its logits site by site, with the same log-probability and KL; its
    logits, reach and parent are worked out only if they are asked for. A site hands out its part of the draw if its
    parent has the value that was drawn with it and no plate has expanded it; else it draws by itself.

    Arguments:
        prior: The gate prior.
        channel_logits: `(C,)`.
        tensor_logits: `(T, R)`.
        distribution: The posterior. Hard concrete and straight-through gates are drawn together, others site by site.
        temperature: Temperature of the relaxation.
        num_data: Number of data points; makes the KL with the draw.

    Attributes:
        prior: The gate prior.
        num_data: Number of data points that the KL was made for.
        draw: All gates, and their KL if `num_data` was given; None where sites draw for themselves.
    """

    def __init__(
        self,
        prior: GatePrior,
        channel_logits: Tensor,
        tensor_logits: Tensor,
        distribution: type[AbstractRelaxedGate],
        temperature: float,
        num_data: int | None = None,
    ) -> None:
        self.prior, self.num_data = prior, num_data
        self._make = partial(distribution, temperature=temperature, validate_args=False)
        self._channels, self._tensors = (
            Deferred(logits.shape, partial(pin_logits, logits, strength))
            for logits, strength in ((channel_logits, prior.channel_strength), (tensor_logits, prior.strength))
        )
        self._reach = Deferred((len(tensor_logits),), partial(_root_reach, prior, self._make(self._channels)))
        self.draw: GateDraw | None = None
        self._rungs: tuple[Tensor, ...] = ()
        self._last: Tensor | None = None
        if distribution in (HardConcrete, StraightThroughConcrete):
            bank = _bank(prior, channel_logits, tensor_logits, distribution, temperature)
            noise = torch.rand(bank.size, dtype=channel_logits.dtype, device=channel_logits.device)
            self.draw = draw_gates(bank, noise, num_data)
            self._rungs = self.draw.tensors.unbind(1)

    def channels(self) -> AbstractRelaxedGate:
        """The distribution of the channel gates."""
        self._last = None if self.draw is None else self.draw.channels
        return self._make(self._channels, part=self._part(self.prior.layout.channel_site))

    def residual(self, rung: int, parent: Tensor) -> AbstractRelaxedGate:
        """The distribution of the residual gates of one rung; ask for them in order.

        Arguments:
            rung: Its number, from 0.
            parent: Value of the site before: the channel gates, then the rung below.
        """
        together = parent is self._last or (rung == 0 and not self.prior.layout.num_channels)
        self._last = self._rungs[rung] if self._rungs and together else None
        on = parent if rung else self.prior.parent(parent)
        column, reach = Deferred(self._reach.shape, partial(_column, self._tensors, rung)), self._reach
        self._reach = Deferred(reach.shape, partial(_reach_past, reach, self._make(column)))
        return self._make(column, reach, on, part=self._part(self.prior.layout.residual_sites[rung]))

    def _part(self, site: str) -> DrawnPart | None:
        return None if self._last is None else DrawnPart(self, site, self._last)


def _bank(
    prior: GatePrior,
    channel_logits: Tensor,
    tensor_logits: Tensor,
    distribution: type[AbstractRelaxedGate],
    temperature: float,
) -> GateBank:
    return GateBank(
        channel_logits,
        tensor_logits,
        prior.channel_strength,
        prior.strength,
        prior.owner,
        prior.prunable,
        prior.group_size,
        prior.channel_order,
        prior.channel_ends,
        distribution,
        temperature,
        prior.simplified,
    )


def _column(logits: Deferred, rung: int) -> Tensor:
    return logits.read()[:, rung]


def _root_reach(prior: GatePrior, channels: AbstractRelaxedGate) -> Tensor:
    return prior.reach(channels.logit_on)


def _reach_past(reach: Deferred, gate: AbstractRelaxedGate) -> Tensor:
    return reach.read() * gate.prob_on
