"""Gate values, gate probabilities, and the layout that names them.

A network has `C` channel gates (one per prunable output channel of all its layers, side by side) and `R` residual
gates for each of its `T` quantized tensors, `R` being the number of rungs of the ladder above the first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_bbits.ladder import BitLadder

__all__ = [
    "ChannelGroup",
    "DecisionRule",
    "GateLayout",
    "GateProbabilities",
    "GateValues",
    "Liveness",
    "LivenessBank",
    "any_channel",
    "decide",
    "reach_probability",
    "rung_probabilities",
]

DecisionRule = Literal["map", "threshold"]

THRESHOLD = 0.34
"""The paper's test-time rule: a gate is open when the probability that it is exactly 0 is below this."""


class GateValues(NamedTuple):
    r"""Values of all gates of a network: relaxed in [0, 1] during training, 0 or 1 once decided.

    Attributes:
        channels: `(C,)` channel gates :math:`z_2`.
        tensors: `(T, R)` residual gates :math:`z_4, z_8, \dots`, one row per tensor.
    """

    channels: Tensor
    tensors: Tensor


class GateProbabilities(NamedTuple):
    r"""Probability that each gate is open given that the coarser gate before it is.

    Attributes:
        channels: `(C,)` probabilities :math:`q(z_2 > 0)`.
        tensors: `(T, R)` probabilities :math:`q(z_b > 0 \mid z_{b/2} > 0)`.
    """

    channels: Tensor
    tensors: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """The channel gates of one prunable layer.

    Attributes:
        layer: Name of the layer.
        tensor: Row of the layer's weight among the quantized tensors.
        channels: Number of output channels, one gate each.
    """

    layer: str
    tensor: int
    channels: int


@dataclass(frozen=True)
class GateLayout:
    """Names and order of all gates of a network.

    Attributes:
        ladder: The bit widths.
        tensors: Names of the `T` quantized tensors, e.g. `conv1.weight`, `conv2.input`.
        groups: The prunable layers, in the order in which their channel gates are concatenated.
    """

    ladder: BitLadder
    tensors: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]

    @cached_property
    def num_channels(self) -> int:
        """Number `C` of channel gates."""
        return sum(group.channels for group in self.groups)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each prunable layer's channel gates stand among all of them."""
        ends = list(accumulate((g.channels for g in self.groups), initial=0))
        return {g.layer: slice(a, b) for g, a, b in zip(self.groups, ends, ends[1:], strict=False)}

    @cached_property
    def owner(self) -> Tensor:
        """Row of the weight tensor that each channel gate belongs to, `(C,)` int64."""
        rows = [torch.full((g.channels,), g.tensor) for g in self.groups]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)

    @cached_property
    def prunable(self) -> Tensor:
        """Which tensors are weights with channel gates, `(T,)` booleans."""
        prunable = torch.zeros(len(self.tensors), dtype=torch.bool)
        prunable[self.owner] = True
        return prunable

    def any_channel(self, channels: Tensor) -> Tensor:
        """Whether each tensor has a channel left under hard gates; `(*, C)` to `(*, T)` booleans."""
        return any_channel(channels, self.owner.to(channels.device), self.prunable.to(channels.device))

    @cached_property
    def channel_names(self) -> tuple[str, ...]:
        """A name for each channel gate, e.g. `conv1[3]`."""
        return tuple(f"{g.layer}[{c}]" for g in self.groups for c in range(g.channels))

    @property
    def channel_site(self) -> str:
        """Name of the sample site of all channel gates: `z2` on the default ladder."""
        return f"z{self.ladder.base}"

    @property
    def residual_sites(self) -> tuple[str, ...]:
        """Names of the sample sites of the residual gates, coarse to fine: `z4`, `z8`, ..."""
        return tuple(f"z{bits}" for bits in self.ladder.residuals)

    def open_gates(self) -> GateValues:
        """All gates open: every tensor at its finest width, every channel kept."""
        return GateValues(torch.ones(self.num_channels), torch.ones(len(self.tensors), len(self.ladder.residuals)))

    def bits(self, gates: GateValues) -> tuple[int, ...]:
        """Width of each tensor under hard gates, in bits; 0 where no channel of a prunable weight is left."""
        rungs = gates.tensors.cumprod(1).sum(1).long().tolist()
        alive = self.any_channel(gates.channels).tolist()
        return tuple(self.ladder.bits[rung] if on else 0 for rung, on in zip(rungs, alive, strict=True))

    def kept(self, gates: GateValues) -> tuple[int, ...]:
        """Kept channels of each prunable layer under hard gates."""
        return tuple(int(gates.channels[part].sum()) for part in self.slices.values())


def any_channel(channels: Tensor, owner: Tensor, prunable: Tensor) -> Tensor:
    """Whether each tensor has a channel left, so that its residual gates exist.

    Arguments:
        channels: `(*, C)` channel gates; one is on when it is above 0.
        owner: `(C,)` row of the tensor that each gate belongs to.
        prunable: `(T,)` booleans, which tensors have channel gates at all; the others always exist.

    Returns:
        `(*, T)` booleans.
    """
    count = channels.new_zeros(*channels.shape[:-1], len(prunable))
    return ~prunable | (count.index_add(-1, owner, (channels > 0).to(channels.dtype)) > 0)


def reach_probability(
    logit_on: Tensor, owner: Tensor, prunable: Tensor, group_size: Tensor, *, simplified: bool
) -> Tensor:
    r"""Probability that each tensor has a channel left, so that its residual gates exist.

    :math:`1 - \prod_c (1 - q_c)`, or with the simplified penalty the mean of :math:`q_c`, as the paper averages a
    layer's chains over its channels.

    Arguments:
        logit_on: `(C,)` log-odds of the channel gates being on.
        owner: `(C,)` row of the tensor that each gate belongs to.
        prunable: `(T,)` booleans, which tensors have channel gates; the others are reached for certain.
        group_size: `(T,)` numbers of channel gates, at least 1.
        simplified: Take the mean.

    Returns:
        `(T,)` probabilities.
    """
    zeros = logit_on.new_zeros(len(prunable))
    if simplified:
        reach = zeros.index_add(0, owner, torch.sigmoid(logit_on)) / group_size
    else:
        reach = -torch.expm1(zeros.index_add(0, owner, nn.functional.logsigmoid(-logit_on)))
    return torch.where(prunable, reach, torch.ones_like(reach))


def rung_probabilities(conditional: Tensor) -> Tensor:
    """Distribution over the rungs of the ladder, given that the tensor is not pruned away.

    Arguments:
        conditional: `(..., R)` probability of each residual gate given its parent.

    Returns:
        `(..., R + 1)` probabilities of the widths of the ladder, coarse to fine; they sum to 1.

    Example:
        >>> rung_probabilities(torch.tensor([0.5, 0.5]))
        tensor([0.5000, 0.2500, 0.2500])
    """
    reached, rungs = conditional.new_ones(conditional.shape[:-1]), []
    for p in conditional.unbind(-1):
        rungs.append(reached * (1 - p))
        reached = reached * p
    return torch.stack([*rungs, reached], -1)


def _decide_chain(conditional: Tensor, rule: DecisionRule) -> Tensor:
    if rule == "map":
        rung = rung_probabilities(conditional).argmax(-1, keepdim=True)
        return (torch.arange(conditional.shape[-1], device=rung.device) < rung).float()
    return (1 - conditional < THRESHOLD).float().cumprod(-1)


def decide(probabilities: GateProbabilities, rule: DecisionRule = "map") -> GateValues:
    """Turn gate probabilities into hard gates.

    Arguments:
        probabilities: Conditional probabilities of all gates.
        rule: `map` takes the most probable state of every channel and the most probable width of every tensor, the
            mode of a posterior that factorizes over them; `threshold` is the paper's test-time rule, which opens a
            gate when its probability of being 0, its parent open, is below 0.34.

    Returns:
        Gates of 0 and 1.

    Raises:
        ValueError: If the rule is unknown.
    """
    if rule not in ("map", "threshold"):
        raise ValueError(f"rule must be 'map' or 'threshold'; got {rule!r}.")
    limit = 0.5 if rule == "map" else 1 - THRESHOLD
    return GateValues((probabilities.channels > limit).float(), _decide_chain(probabilities.tensors, rule))


class Liveness(nn.Module):
    r"""Which channels of a tensor are alive, from the gates of all channels that produce them.

    A channel that several layers add into is dead only when it is dead in every one of them:
    :math:`z = 1 - \prod_{p} (1 - z_p)` over its producers `p`. The same formula gives the probability of being alive
    from independent gate probabilities. A channel with no gated producer is always alive.

    Arguments:
        producers: For each channel of the tensor, the indices of its producers among the `C` channel gates.
        num_gates: The number `C`.
    """

    index: Tensor
    constants: Tensor

    def __init__(self, producers: Iterable[Iterable[int]], num_gates: int) -> None:
        super().__init__()
        rows = [sorted(p) or [num_gates + 1] for p in producers]
        width = max(map(len, rows), default=1)
        # two constants stand behind the gates: 0 pads a row, 1 keeps a channel alive
        padded = [row + [num_gates] * (width - len(row)) for row in rows]
        self.register_buffer("index", torch.tensor(padded, dtype=torch.long).reshape(-1, width), persistent=False)
        self.register_buffer("constants", torch.tensor([0.0, 1.0]), persistent=False)
        self.constant = all(row[0] > num_gates for row in rows)

    def forward(self, gates: Tensor) -> Tensor:
        """Gate values (or probabilities) `(C,)` to those of the tensor's channels, `(channels,)`."""
        known = torch.cat([gates, self.constants.to(gates.dtype)])
        columns = known.index_select(0, self.index.flatten()).view(self.index.shape).unbind(-1)
        if len(columns) == 1:
            return columns[0]
        dead = 1 - columns[0]
        for column in columns[1:]:
            dead = dead * (1 - column)
        return 1 - dead


class LivenessBank(nn.Module):
    """The liveness of the output channels of several layers, computed together once in a forward pass.

    A layer that alone produces its channels reads its own run of the gates as it is; all others share one gather.

    Arguments:
        layers: For each layer, the producers of each of its output channels, as for :class:`Liveness`.
        sizes: Numbers of channel gates of the prunable layers, in the order of the gates.
    """

    def __init__(self, layers: Iterable[Sequence[Iterable[int]]], sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        starts = list(accumulate(self.sizes, initial=0))
        runs = {tuple(range(a, b)): i for i, (a, b) in enumerate(pairwise(starts))}
        rows = [[tuple(sorted(p)) for p in layer] for layer in layers]
        self._runs = [runs.get(tuple(p[0] if len(p) == 1 else -1 for p in layer)) for layer in rows]
        joint = [layer for layer, run in zip(rows, self._runs, strict=True) if run is None]
        self._lengths = [len(layer) for layer in joint]
        self.joint = Liveness([p for layer in joint for p in layer], starts[-1]) if joint else None

    def forward(self, gates: Tensor) -> tuple[Tensor, ...]:
        """Gates `(C,)` to the liveness of each layer's output channels."""
        runs = gates.split(self.sizes) if self.sizes else ()
        joint = iter(self.joint(gates).split(self._lengths) if self.joint is not None else ())
        return tuple(next(joint) if run is None else runs[run] for run in self._runs)
