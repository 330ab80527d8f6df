"""Channel counts that are multiples of 8 or 16: closed gates that are opened again, and what may be asked for."""

from collections.abc import Sequence

from torch import Tensor

from pyro_bbits.gates import GateValues
from pyro_bbits.insertion.structure import NetworkStructure

__all__ = ["channel_numbers", "check_channels", "round_channels"]


def round_channels(network: NetworkStructure, gates: GateValues, probabilities: Tensor, multiple_of: int) -> GateValues:
    """Open the most probable closed channel gates until every layer has a multiple of so many channels.

    Channels that several layers add into are one channel, which is there while one of their gates is open; so it is
    these that are counted, as :func:`~pyro_bbits.deployment.remove_channels` leaves them. A layer with fewer channels
    than the next multiple gets all of them back; one without any keeps none.

    Arguments:
        network: The quantized network, or a snapshot of its structure.
        gates: Gates of 0 and 1.
        probabilities: `(C,)` probability that each channel gate is open.
        multiple_of: The number.

    Returns:
        The gates with some channels opened; tensors keep their widths.

    Raises:
        ValueError: If `multiple_of` is below 1.

    Example:
        >>> import torch
        >>> from pyro_bbits import quantize
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> network = quantize(net, torch.rand(16, 4))
        >>> p = torch.tensor([0.9, 0.1, 0.3, 0.4, 0.2, 0.8])
        >>> gates = network.open_gates()._replace(channels=(p > 0.5).float())
        >>> round_channels(network, gates, p, 4).channels
        tensor([1., 0., 1., 1., 0., 1.])
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1; got {multiple_of}.")
    channels = gates.channels.clone()
    groups = channel_numbers(network)
    layers = [sorted({groups[gate] for gate in range(*part.indices(len(channels)))}) for part in _slices(network)]
    members: dict[int, list[int]] = {}
    for gate, group in enumerate(groups):
        members.setdefault(group, []).append(gate)
    while opened := [
        gate for layer in layers for gate in _missing(layer, members, channels, probabilities, multiple_of)
    ]:
        channels[opened] = 1.0
    return gates._replace(channels=channels)


def _slices(network: NetworkStructure) -> Sequence[slice]:
    return list(network.layout.slices.values())


def check_channels(channel_multiple: int, *, reopen: bool, remove: bool = True) -> None:
    """Whether a number of channels can be asked for.

    Arguments:
        channel_multiple: What the numbers of channels shall be multiples of; 1 for as many as are in use.
        reopen: Whether channels are opened again for it, in place of being kept as zeros.
        remove: Whether channels are removed at all.

    Raises:
        ValueError: If the number is below 1, or nothing would come of what is asked for.
    """
    if channel_multiple < 1:
        raise ValueError(f"channel_multiple must be at least 1; got {channel_multiple}.")
    if reopen and channel_multiple == 1:
        raise ValueError("reopen opens channels up to a multiple: it needs a channel_multiple above 1, e.g. 8.")
    if channel_multiple > 1 and not remove and not reopen:
        raise ValueError("channel_multiple keeps some of the channels that are removed; without removal all are kept.")


def channel_numbers(network: NetworkStructure) -> list[int]:
    """Number of the channel that each gate belongs to; gates that keep one channel alive belong to the same."""
    parent = list(range(network.layout.num_channels))

    def find(gate: int) -> int:
        while parent[gate] != gate:
            parent[gate] = parent[parent[gate]]
            gate = parent[gate]
        return gate

    for together in {gates for layer in network.layers for gates in (*layer.inputs, *layer.outputs) if gates}:
        first, *others = together
        for gate in others:
            parent[find(gate)] = find(first)
    return [find(gate) for gate in range(len(parent))]


def _missing(
    layer: Sequence[int], members: dict[int, list[int]], channels: Tensor, probabilities: Tensor, multiple_of: int
) -> list[int]:
    """Gates to open, the most probable of each closed channel, so that a layer has a multiple of channels."""
    closed = [group for group in layer if not channels[members[group]].any()]
    needed = min(len(closed), -(len(layer) - len(closed)) % multiple_of)
    best = [max(members[group], key=probabilities.__getitem__) for group in closed]
    return sorted(best, key=probabilities.__getitem__, reverse=True)[:needed]
