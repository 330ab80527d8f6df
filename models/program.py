"""The pieces of the probabilistic program: the autoregressive gate prior and the observed data."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits.distributions import CostFactor, Deferred, GateBernoulli, PriorSite
from pyro_bbits.gates import GateValues
from pyro_bbits.models.likelihoods import Likelihood
from pyro_bbits.prior import GatePrior

__all__ = ["BOPS_SITE", "call_network", "host_plate", "observe", "sample_gates"]

BOPS_SITE = "bops"
"""Where the program weighs a configuration by its BOPs, if the prior has a price for them."""


def host_plate(name: str, size: int, **options: Any) -> Any:
    """A :class:`pyro.plate` whose indices stay on the host, where nobody needs them, and so launch nothing on a GPU."""
    return pyro.plate(name, size, device="cpu", **options)


def sample_gates(prior: GatePrior, num_data: int) -> GateValues:
    r"""Sample all gates of a network from the autoregressive prior.

    One site `z2` in the plate `channels`, then `z4`, `z8`, ... in the plate `tensors`, whatever the depth of the
    network. A gate exists only while its parent is on; the residual gates of a pruned weight exist while one of its
    channels is kept. A prior with a price of BOPs adds the site `bops`, a factor with no value of its own.

    Arguments:
        prior: Costs and pins, in nats per data point.
        num_data: Number of data points `N`; costs are `N` times the prior's strength.

    Returns:
        Gate values.
    """
    layout = prior.layout
    channels = prior.channel_strength.new_ones(0)
    if layout.num_channels:
        with host_plate("channels", layout.num_channels):
            cost = _cost(prior, "channel_strength", num_data)
            channels = pyro.sample(layout.channel_site, _gate(prior, num_data, layout.channel_site, cost))
    on: Tensor | Deferred = prior.parent(channels)
    costs, rungs = _cost(prior, "strength", num_data), []
    with host_plate("tensors", len(layout.tensors)):
        for rung, site in enumerate(layout.residual_sites):
            cost = Deferred(costs.shape[:1], partial(_column, costs, rung))
            on = pyro.sample(site, _gate(prior, num_data, site, cost, on))
            rungs.append(on)
    gates = GateValues(channels, torch.stack(rungs, 1) if rungs else prior.strength)
    if prior.bops_cost is not None:
        pyro.sample(BOPS_SITE, CostFactor(Deferred(torch.Size(), partial(prior.bops_nats, gates)), num_data))
    return gates


def _cost(prior: GatePrior, strength: str, num_data: int) -> Deferred:
    prices: Tensor = getattr(prior, strength)
    return Deferred(prices.shape, lambda: num_data * prices)


def _column(costs: Deferred, rung: int) -> Tensor:
    return costs.read()[:, rung]


def _gate(
    prior: GatePrior, num_data: int, site: str, cost: Deferred, on: Tensor | Deferred | None = None
) -> GateBernoulli:
    return GateBernoulli(cost, on, simplified=prior.simplified, made_at=PriorSite(prior, num_data, site))


def call_network(net: nn.Module, x: Any, **options: Any) -> Any:
    """Call a network on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(x, Mapping):
        return net(**x, **options)
    return net(*x, **options) if isinstance(x, tuple | list) else net(x, **options)


def observe(likelihood: Likelihood, output: Any, y: Tensor | None, num_data: int) -> Tensor:
    """Observe a batch of targets as a subsample of `num_data` points, at the site `obs` in the plate `data`."""
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    size = len(first)
    with host_plate("data", max(num_data, size), subsample=torch.arange(size, device="cpu")):
        sampled: Tensor = pyro.sample("obs", likelihood(output), obs=y)
    return sampled
