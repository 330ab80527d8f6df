"""Physical removal of dead channels: a smaller network that computes the same."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pyro_bbits.deployment.coupling import CoupledChannels
from pyro_bbits.deployment.frozen import frozen_layers, scale_outputs
from pyro_bbits.insertion.inputs import Inputs, countable
from pyro_bbits.insertion.layers import out_channels

__all__ = ["RemovalReport", "count_macs", "remove_channels"]

TOLERANCE = 1e-6
"""Largest difference of float64 outputs, relative to the largest output."""


@dataclass(frozen=True)
class RemovalReport:
    """What became of the dead channels of a frozen network.

    Attributes:
        removed: Output channels that are gone, by layer, numbered as before.
        masked: Why dead channels are still there, as zeros, by layer.
        channels: Output channels before and after, by layer.
        macs_before: Multiply-accumulates per sample before.
        macs_after: Multiply-accumulates per sample after.
        error: Largest difference of the outputs on the example inputs, in float64, relative to the largest output.
    """

    removed: dict[str, tuple[int, ...]]
    masked: dict[str, str]
    channels: dict[str, tuple[int, int]]
    macs_before: int
    macs_after: int
    error: float

    def __str__(self) -> str:
        share = 100 * self.macs_after / max(1, self.macs_before)
        count = sum(map(len, self.removed.values()))
        lines = [f"removed {count} channels of {len(self.removed)} layers; {share:.4g} % of the MACs are left"]
        return "\n".join(lines + [f"  {name}: still masked, {reason}" for name, reason in self.masked.items()])


def remove_channels(frozen: nn.Module, example_inputs: Any, multiple_of: int = 1) -> tuple[nn.Module, RemovalReport]:
    """Remove the dead output channels of a frozen network, and what reads them, from its weights and codes.

    Channels that add up are one: one goes only if it is dead in every layer that writes it. What cannot be removed
    stays, as zeros; the report says why. A layer without a live channel keeps one dead one. Trained scales and codes
    are kept. The dependencies between layers are found by Torch-Pruning (the extra `deploy`); a group of channels that
    it gets wrong stays. The result is compared with the frozen network on the example inputs, in float64, where sums
    of other length do not move a value over a rounding tie.

    Arguments:
        frozen: What :func:`~pyro_bbits.deployment.freeze` returned; it is not changed.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments; a few samples.
        multiple_of: Leave so many dead channels that the number of channels is a multiple of this, as fast kernels like
            it. To have use of them open their gates again before freezing:
            :func:`~pyro_bbits.deployment.round_channels`.

    Returns:
        The smaller network, and a report.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        ValueError: If the network holds no frozen layer.
        RuntimeError: If the smaller network computes something else.

    References:
        Fang, Ma, Song, Mi, Wang: DepGraph: towards any structural pruning, 2023, arXiv:2301.12900.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1; got {multiple_of}.")
    layers = frozen_layers(frozen)
    if not layers:
        raise ValueError("there is no frozen layer in this network; give what pyro_bbits.freeze returned.")
    inputs = Inputs.of(example_inputs)
    dead = [name for name, layer in layers.items() if layer.dead.any()]
    expected = _outputs(frozen, inputs)
    coupled = CoupledChannels(copy.deepcopy(frozen), inputs, multiple_of)
    if _fails(coupled, dead, inputs, expected):
        coupled = _one_by_one(CoupledChannels(copy.deepcopy(frozen), inputs, multiple_of), dead, inputs, expected)
    error = _error(coupled.network, inputs, expected)
    if error > TOLERANCE:
        raise RuntimeError(
            f"the network without its dead channels differs by {error:.3g} of its largest output from the one with "
            "them; deploy the frozen network as it is, and please report this."
        )
    return coupled.network, _report(frozen, coupled, inputs, error)


def count_macs(net: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates per sample of a network, those of products of activations included."""
    inputs = example_inputs if isinstance(example_inputs, Inputs) else Inputs.of(example_inputs)
    with torch.no_grad(), countable(), FlopCounterMode(display=False) as counter:
        inputs.run(net)
    return int(counter.get_total_flops()) // 2 // inputs.batch_size


def _fails(coupled: CoupledChannels, names: Sequence[str], inputs: Inputs, expected: Tensor) -> bool:
    """Remove channels; whether the network does not run any more, or computes something else."""
    try:
        coupled.remove(names)
        return _error(coupled.network, inputs, expected) > TOLERANCE
    except Exception:  # of Torch-Pruning, or of the network: its shapes do not fit
        return True


def _one_by_one(coupled: CoupledChannels, names: Sequence[str], inputs: Inputs, expected: Tensor) -> CoupledChannels:
    """Remove the channels of one layer after the other, as far as that works."""
    for name in names:
        trial = copy.deepcopy(coupled)
        if _fails(trial, [name], inputs, expected):
            coupled.masked[name] = "without these channels the network would not run, or would compute something else"
        else:
            coupled = trial
    return coupled


def _outputs(net: nn.Module, inputs: Inputs) -> Tensor:
    """All outputs in float64, one after the other."""
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        result = inputs.map(lambda x: x.double() if x.is_floating_point() else x).run(net)
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.double().flatten() for leaf in leaves])


def _error(net: nn.Module, inputs: Inputs, expected: Tensor) -> float:
    for layer in frozen_layers(net).values():
        if layer.codes is not None:
            repeated = scale_outputs(layer, layer.codes.to(layer.weight.dtype), layer.scale)
            if not torch.equal(repeated, layer.weight):
                return float("inf")
    actual = _outputs(net, inputs)
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _report(frozen: nn.Module, coupled: CoupledChannels, inputs: Inputs, error: float) -> RemovalReport:
    removed, channels = {}, {}
    for name, layer in frozen_layers(frozen).items():
        count, left = out_channels(layer), set(coupled.origin[name])
        channels[name] = count, len(left)
        if len(left) < count:
            removed[name] = tuple(channel for channel in range(count) if channel not in left)
    smaller = frozen_layers(coupled.network)
    return RemovalReport(
        removed=removed,
        masked={name: reason for name, reason in coupled.masked.items() if smaller[name].dead.any()},
        channels=channels,
        macs_before=count_macs(frozen, inputs),
        macs_after=count_macs(coupled.network, inputs),
        error=error,
    )
