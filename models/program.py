"""The pieces of the probabilistic program: the autoregressive gate prior and the observed data."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits.distributions import GateBernoulli
from pyro_bbits.gates import GateValues
from pyro_bbits.models.likelihoods import Likelihood
from pyro_bbits.prior import GatePrior

__all__ = ["call_network", "observe", "sample_gates"]


def sample_gates(prior: GatePrior, num_data: int) -> GateValues:
    r"""Sample all gates of a network from the autoregressive prior.

    One site `z2` in the plate `channels`, then `z4`, `z8`, ... in the plate `tensors`, whatever the depth of the
    network. A gate exists only while its parent is on; the residual gates of a pruned weight exist while one of its
    channels is kept.

    Arguments:
        prior: Costs and pins, in nats per data point.
        num_data: Number of data points `N`; costs are `N` times the prior's strength.

    Returns:
        Gate values.
    """
    layout = prior.layout
    channels = prior.channel_strength.new_ones(0)
    if layout.num_channels:
        with pyro.plate("channels", layout.num_channels):
            distribution = GateBernoulli(num_data * prior.channel_strength, simplified=prior.simplified)
            channels = pyro.sample(layout.channel_site, distribution)
    on, rungs = prior.any_on(channels), []
    with pyro.plate("tensors", len(layout.tensors)):
        for site, strength in zip(layout.residual_sites, prior.strength.unbind(1), strict=True):
            on = pyro.sample(site, GateBernoulli(num_data * strength, on, simplified=prior.simplified))
            rungs.append(on)
    return GateValues(channels, torch.stack(rungs, 1) if rungs else prior.strength)


def call_network(net: nn.Module, x: Any, **options: Any) -> Any:
    """Call a network on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(x, Mapping):
        return net(**x, **options)
    return net(*x, **options) if isinstance(x, tuple | list) else net(x, **options)


def observe(likelihood: Likelihood, output: Any, y: Tensor | None, num_data: int) -> Tensor:
    """Observe a batch of targets as a subsample of `num_data` points, at the site `obs` in the plate `data`."""
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    size = len(first)
    with pyro.plate("data", max(num_data, size), subsample=torch.arange(size, device=first.device)):
        sampled: Tensor = pyro.sample("obs", likelihood(output), obs=y)
    return sampled
