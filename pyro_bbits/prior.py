"""The gate prior of a whole network: what each gate costs, and which gates are pinned."""

from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyro_bbits.cost import NetworkCost, tensor_macs
from pyro_bbits.distributions import Deferred
from pyro_bbits.gates import GateLayout, GateProbabilities, GateValues, any_channel, reach_probability
from pyro_bbits.insertion import QuantizedNetwork

__all__ = ["CostRule", "GatePrior"]

CostRule = Literal["bops", "constant"]


class GatePrior(nn.Module):
    r"""Autoregressive prior over all gates of a network, priced per gate.

    Each gate is open with probability :math:`e^{-\lambda}` given that its parent is, with
    :math:`\lambda = N \mu \cdot \text{price}` nats for `N` data points, so `mu` is the strength per data point. Prices:

    - `bops`: :math:`b \, m_k` for the gate that leads to `b` bits of tensor `k`, with :math:`m_k` the MACs that use the
      tensor over those of the largest layer;
    - `constant`: 1.

    A layer's `C_k` channel gates share the price of the first rung, :math:`1 / C_k` each.

    `mu` = 0 makes every open gate certain: it pins the network to its finest width. A price of 0 or infinity is how
    any gate is pinned, see :meth:`pin` and :meth:`pin_channels`.

    With `bops` the prior has another factor, the cost of the configuration as a whole, in which widths of weights and
    inputs and kept channels multiply:

    .. math::
        p(z) \propto e^{-N \, \text{bops} \cdot B(z)} \prod p(z_b \mid z_{b/2}), \qquad
        B = \text{relative BOPs in percent}

    Its expectation under a guide is in closed form (:class:`~pyro_bbits.NetworkCost`). Draws of the program without a
    guide are those of the chain alone.

    Arguments:
        network: The quantized network.
        mu: Strength in nats per data point, at least 0; the paper uses 0.01 to 0.2.
        cost: How gates are priced.
        simplified: Use the paper's penalty (expected price of the open gates, averaged over a layer's channels) in
            place of the full KL. It is the paper's objective and selects a configuration; the full KL is the one
            whose probabilities can be read as a posterior.
        bops: Strength of the cost in BOPs, at least 0: nats per data point for each percent of relative BOPs. For an
            objective of expected BOPs alone combine it with a tiny `mu` and `simplified=True`; with the full KL a tiny
            `mu` holds gates open, the more the fewer data there are. `mu` must stay above 0.

    Attributes:
        strength: `(T, R)` costs of the residual gates in nats per data point; 0 pins on, infinity pins off.
        channel_strength: `(C,)` costs of the channel gates.
        bops_cost: Counts the BOPs where they have a price; else None.

    Raises:
        ValueError: If `mu` or `bops` is negative or not finite, `bops` comes without `mu`, or the cost rule is unknown.

    Example:
        >>> from pyro_bbits import quantize
        >>> network = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(16, 4))
        >>> prior = GatePrior(network, mu=0.1).pin("2.*", bits=8)
        >>> prior.strength
        tensor([[0.4000, 0.8000, 1.6000, 3.2000],
                [0.0000, 0.0000,    inf,    inf],
                [0.0000, 0.0000,    inf,    inf]])

    References:
        van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), sections 2.2 and 2.3.
    """

    strength: Tensor
    channel_strength: Tensor
    owner: Tensor
    prunable: Tensor
    group_size: Tensor
    channel_order: Tensor
    channel_ends: Tensor
    bops: Tensor

    def __init__(
        self,
        network: QuantizedNetwork,
        mu: float,
        *,
        cost: CostRule = "bops",
        simplified: bool = False,
        bops: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= mu < float("inf"):
            raise ValueError(f"mu must be a finite number of at least 0 (nats per data point); got {mu}.")
        if not 0 <= bops < float("inf"):
            raise ValueError(
                f"bops must be a finite number of at least 0 (nats per data point and percent); got {bops}."
            )
        if bops and not mu:
            raise ValueError(
                "a price of BOPs needs a mu above 0, such as 1e-6 with simplified=True: gates of strength 0 are "
                "pinned on."
            )
        if cost not in get_args(CostRule):
            raise ValueError(f"cost must be one of {', '.join(get_args(CostRule))}; got {cost!r}.")
        if not isinstance(getattr(network, "layout", None), GateLayout):
            raise TypeError(
                f"a gate prior is made for a quantized network, quantize(net, example_inputs); got "
                f"{type(network).__name__}."
            )
        self.layout: GateLayout = network.layout
        self.mu, self.cost, self.simplified = mu, cost, simplified
        ladder, owner = self.layout.ladder, self.layout.owner
        group_size = torch.zeros(len(self.layout.tensors)).index_add(0, owner, torch.ones(len(owner)))
        weight = tensor_macs(network) if cost == "bops" else torch.ones(len(self.layout.tensors))
        widths = torch.tensor([float(b) if cost == "bops" else 1.0 for b in ladder.bits])
        self.register_buffer("strength", mu * weight[:, None] * widths[1:])
        self.register_buffer("channel_strength", (mu * weight * widths[0] / group_size.clamp(min=1))[owner])
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("prunable", self.layout.prunable, persistent=False)
        self.register_buffer("group_size", group_size.clamp(min=1), persistent=False)
        # channels sorted by tensor, and where each tensor's end: layers that share a weight need not be neighbours
        self.register_buffer("channel_order", owner.argsort(stable=True).int(), persistent=False)
        self.register_buffer("channel_ends", group_size.cumsum(0).int(), persistent=False)
        self.bops_cost = NetworkCost(network) if bops else None
        self.register_buffer("bops", torch.tensor(float(bops)), persistent=bops > 0)
        self.to(network.quantizers.log_range.device)

    def extra_repr(self) -> str:
        """What is priced and what is pinned."""
        gates = torch.cat([self.channel_strength, self.strength.flatten()])
        pinned = int(((gates == 0) | gates.isinf()).sum())
        parts = [f"mu={self.mu:g}", f"cost={self.cost!r}", f"tensors={len(self.layout.tensors)}"]
        parts += [f"bits={self.layout.ladder.bits}", f"channels={self.layout.num_channels}"]
        parts += [f"pinned={pinned} of {len(gates)} gates"] * bool(pinned) + ["simplified=True"] * self.simplified
        return ", ".join(parts + [f"bops={self.bops.item():g}"] * (self.bops_cost is not None))

    def bops_nats(self, gates: GateValues | GateProbabilities) -> Tensor:
        """Cost of the BOPs in nats per data point, or its expectation; a differentiable scalar, 0 without a price."""
        return self.bops if self.bops_cost is None else self.bops * self.bops_cost(gates)

    def any_on(self, channels: Tensor) -> Tensor:
        """Whether each tensor has a channel left, so that its residual gates exist; `(C,)` gates to `(T,)` booleans."""
        return any_channel(channels, self.owner, self.prunable)

    def parent(self, channels: Tensor) -> Deferred:
        """The same, worked out only where a draw or a log-probability asks for it."""
        shape = (*channels.shape[:-1], len(self.prunable))
        return Deferred(shape, lambda: self.any_on(channels))

    def reach(self, logit_on: Tensor) -> Tensor:
        """Posterior probability that each tensor has a channel left, `(C,)` log-odds to `(T,)`.

        See :func:`~pyro_bbits.gates.reach_probability`.
        """
        return reach_probability(logit_on, self.owner, self.prunable, self.group_size, simplified=self.simplified)

    def allowed_rungs(self) -> list[list[int]]:
        """For each tensor, the numbers of residual gates that may be open: 0 to `R`, less what pins exclude."""
        allowed = []
        for row in self.strength.tolist():
            most = next((i for i, cost in enumerate(row) if cost == float("inf")), len(row))
            allowed.append([r for r in range(most + 1) if r == len(row) or row[r] > 0])
        return allowed

    def pin(self, pattern: str, *, bits: int) -> "GatePrior":
        """Fix the width of tensors; gates and prior stay as they are elsewhere.

        Arguments:
            pattern: Shell-style pattern of tensor names (`network.layout.tensors`), e.g. `conv1.weight`, `*.input`.
            bits: Their width, a rung of the ladder.

        Returns:
            The prior itself.

        Raises:
            ValueError: If no tensor matches or the width is no rung.
        """
        rows = _match(pattern, self.layout.tensors, "tensor")
        gates = torch.tensor(self.layout.ladder.open_gates(bits), dtype=torch.bool, device=self.strength.device)
        self.strength[rows] = _pinned(gates)
        return self

    def pin_channels(self, pattern: str = "*") -> "GatePrior":
        """Keep all channels of layers; with the default pattern nothing is pruned (quantization only).

        Arguments:
            pattern: Shell-style pattern of the names of prunable layers.

        Returns:
            The prior itself.

        Raises:
            ValueError: If no prunable layer matches.
        """
        if pattern == "*" and not self.layout.groups:
            return self
        names = [group.layer for group in self.layout.groups]
        for index in _match(pattern, names, "prunable layer"):
            self.channel_strength[self.layout.slices[names[index]]] = 0.0
        return self

    def pin_gates(self, gates: GateValues) -> "GatePrior":
        """Fix every gate at a hard value, as for fine-tuning with fixed gates.

        Arguments:
            gates: Gates of 0 and 1.

        Returns:
            The prior itself.
        """
        self.channel_strength.copy_(_pinned(gates.channels > 0.5))
        self.strength.copy_(_pinned(gates.tensors > 0.5))
        return self


def _pinned(gates: Tensor) -> Tensor:
    return torch.where(gates, 0.0, torch.inf)


def _match(pattern: str, names: tuple[str, ...] | list[str], kind: str) -> list[int]:
    rows = [i for i, name in enumerate(names) if fnmatchcase(name, pattern)]
    if not rows:
        raise ValueError(f"pattern {pattern!r} matches no {kind}; there are {', '.join(names) or 'none'}.")
    return rows
