"""All gates of a network at once: values of the whole chain and its KL from one run of vectorized arithmetic."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bbits.distributions.concrete import AbstractRelaxedGate, HardConcrete, StraightThroughConcrete
from pyro_bbits.distributions.kl import link_kl
from pyro_bbits.gates import any_channel, reach_probability
from pyro_bbits.kernels import gates as kernels

__all__ = ["GateBank", "GateDraw", "draw_gates", "draw_gates_fused", "draw_gates_plain", "pin_logits"]


@dataclass(frozen=True)
class GateBank:
    r"""Logits and prices of all gates, and how they hang together.

    Arguments:
        channel_logits: `(C,)` logits of the channel gates.
        tensor_logits: `(T, R)` logits of the residual gates.
        channel_strength: `(C,)` costs of the channel gates per data point; 0 pins a gate on, infinity off.
        strength: `(T, R)` costs of the residual gates per data point.
        owner: `(C,)` int64, row of the tensor that each channel gate belongs to.
        prunable: `(T,)` booleans, which tensors have channel gates; the others are reached for certain.
        group_size: `(T,)` numbers of channel gates, at least 1.
        order: `(C,)` int32, the channels sorted by tensor.
        ends: `(T,)` int32, where each tensor's channels end in that order.
        posterior: :class:`HardConcrete` or :class:`StraightThroughConcrete`.
        temperature: Temperature of the relaxation.
        simplified: Price the gates by the paper's penalty in place of the KL.
    """

    channel_logits: Tensor
    tensor_logits: Tensor
    channel_strength: Tensor
    strength: Tensor
    owner: Tensor
    prunable: Tensor
    group_size: Tensor
    order: Tensor
    ends: Tensor
    posterior: type[AbstractRelaxedGate] = HardConcrete
    temperature: float = 2 / 3
    simplified: bool = False

    @property
    def size(self) -> int:
        """Number of gates, and so of uniform numbers that a draw takes: `C + T R`."""
        return self.channel_logits.numel() + self.tensor_logits.numel()


class GateDraw(NamedTuple):
    """Gates drawn together.

    Attributes:
        channels: `(C,)` channel gates.
        tensors: `(T, R)` residual gates; 0 behind a closed gate.
        kl: `(T,)` KL in nats per data set, each tensor's channels with it; None if it was not asked for.
    """

    channels: Tensor
    tensors: Tensor
    kl: Tensor | None


def draw_gates(bank: GateBank, noise: Tensor, num_data: int | None = None) -> GateDraw:
    """Draw all gates and price them: one kernel forward and one backward on CUDA, plain PyTorch elsewhere.

    Arguments:
        bank: Logits and prices.
        noise: `(C + R T,)` uniform numbers in [0, 1): those of the channels, then of one rung after the other, as sites
            would draw them.
        num_data: Number of data points that multiplies the costs; None leaves the KL out.

    Returns:
        Gates and KL, differentiable in both kinds of logits.
    """
    if not kernels.usable(noise, bank.channel_logits, bank.tensor_logits, bank.channel_strength, bank.strength):
        return draw_gates_plain(bank, noise, num_data)
    return draw_gates_fused(bank, noise, num_data)


def draw_gates_fused(bank: GateBank, noise: Tensor, num_data: int | None = None) -> GateDraw:
    """The same by the Triton kernels."""
    straight = issubclass(bank.posterior, StraightThroughConcrete)
    shift = bank.posterior.shift(bank.temperature)
    options = kernels.Options(bank.temperature, shift, straight, bank.simplified, num_data)
    tables = kernels.GateTables(bank.channel_strength, bank.strength, bank.owner, bank.order, bank.ends)
    return GateDraw(*kernels.draw(bank.channel_logits, bank.tensor_logits, noise, tables, options))


def draw_gates_plain(bank: GateBank, noise: Tensor, num_data: int | None = None) -> GateDraw:
    """The same by PyTorch's own operations, differentiated by autograd; the reference."""
    strength = _flat(bank.channel_strength, bank.strength)
    logits = pin_logits(_flat(bank.channel_logits, bank.tensor_logits), strength)
    channels, tensors = _parts(bank, bank.posterior.relax(noise, logits, bank.temperature))
    gates = GateDraw(channels, tensors * _exists(bank, channels, tensors), None)
    if num_data is None:
        return gates
    shift = bank.posterior.shift(bank.temperature)
    return gates._replace(kl=_kl(bank, logits + shift if shift else logits, num_data * strength))


def pin_logits(logits: Tensor, strength: Tensor) -> Tensor:
    """Logits, infinite where the prior's strength pins the gate."""
    return logits.masked_fill(strength == 0, math.inf).masked_fill(strength == math.inf, -math.inf)


def _flat(channels: Tensor, tensors: Tensor) -> Tensor:
    """The gates in the order of their noise."""
    return torch.cat([channels, *tensors.unbind(1)])


def _parts(bank: GateBank, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Channel gates `(C,)` and residual gates `(T, R)` of that order."""
    count, (tensors, rungs) = bank.channel_logits.numel(), bank.tensor_logits.shape
    return flat[:count], flat[count:].view(rungs, tensors).T


def _exists(bank: GateBank, channels: Tensor, tensors: Tensor) -> Tensor:
    """Whether all coarser gates of each residual gate are on, `(T, R)` of 0 and 1."""
    alive = any_channel(channels.detach(), bank.owner, bank.prunable)
    parents = torch.cat([alive[:, None], tensors.detach() > 0], 1)[:, :-1]
    return parents.to(tensors.dtype).cumprod(1)


def _kl(bank: GateBank, logit_on: Tensor, cost: Tensor) -> Tensor:
    """KL of each tensor's channels, plus that of its chain: `kl4 + q4 (kl8 + q8 (...))` times the reach."""
    root, chain = _parts(bank, link_kl(logit_on, cost, simplified=bank.simplified))
    root_logit, chain_logit = _parts(bank, logit_on)
    reach = reach_probability(root_logit, bank.owner, bank.prunable, bank.group_size, simplified=bank.simplified)
    total, tail = torch.zeros_like(reach).index_add(0, bank.owner, root), None
    for kl, logit in zip(reversed(chain.unbind(1)), reversed(chain_logit.unbind(1)), strict=True):
        tail = kl if tail is None else torch.addcmul(kl, torch.sigmoid(logit), tail)
    return total if tail is None else torch.addcmul(total, reach, tail)
