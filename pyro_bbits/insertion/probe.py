"""Find which channels reach which layers by running the network on marked channels.

In a copy of the network every parameter is a random positive number and every multiplying layer is replaced by a
stand-in that emits position-dependent positive values times a mark per channel, at the place where its channel gate
would act. Everything between the layers is the user's own code: residual sums, concatenation, flattening, pooling and
activations need no rule. The batch dimension carries the lanes of the experiment: all channels off, all on, all on but
one layer's, and that layer's channels one bit of their number at a time. What differs between lanes at the input of a
layer tells who reaches it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bbits.insertion.trace import Inputs, Wire

__all__ = ["Wiring", "probe"]

TOLERANCE = 1e-9
ALL_OFF, ALL_ON, ALL_BUT_ONE, FIRST_BIT = 0, 1, 2, 3

Channel = tuple[str, int]


@dataclass
class Wiring:
    """Who reaches whom.

    Attributes:
        reach: For each layer and each of its input channels, the (layer, channel) pairs that make it live; empty means
            that it is always live.
        refused: Why the output channels of a layer cannot be removed, by layer.
    """

    reach: dict[str, list[set[Channel]]]
    refused: dict[str, str] = field(default_factory=dict)


def _random_positive(shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(shape, generator=generator, dtype=torch.double)


def _twin(net: nn.Module) -> nn.Module:
    """A copy in double precision whose shifts all show: positive parameters, negative running means."""
    twin = copy.deepcopy(net).cpu().double().eval()
    with torch.no_grad():
        for seed, (name, tensor) in enumerate([*twin.named_parameters(), *twin.named_buffers()]):
            if tensor.is_floating_point():
                values = _random_positive(tensor.shape, seed)
                tensor.data = -values if name.endswith("running_mean") else values
    return twin


class _Experiment:
    """One network with stand-ins for its layers; `run` marks the channels of one producer."""

    def __init__(self, net: nn.Module, wires: Mapping[str, Wire], inputs: Inputs) -> None:
        self.wires = wires
        self.bits = max(w.out_channels for w in wires.values()).bit_length()
        self.lanes = FIRST_BIT + 2 * self.bits
        self.twin = _twin(net)
        self.inputs = inputs.map(self._lane_inputs)
        self.active = ""
        self.seen: list[tuple[str, Tensor]] = []
        modules = dict(self.twin.named_modules())
        for wire in wires.values():
            self._replace_layer(wire, modules[wire.name])
            if wire.norm is not None:
                self._replace_norm(wire, modules[wire.norm])

    def _lane_inputs(self, x: Tensor) -> Tensor:
        """The first example in every lane, positive where it is a float."""
        first = x[:1].cpu()
        first = first.double().abs() + 1 if first.is_floating_point() else first
        return first.repeat(self.lanes, *[1] * (first.dim() - 1))

    def codes(self, channels: int) -> Tensor:
        """Bits of each channel number, (bits, channels)."""
        numbers = torch.arange(channels)
        return torch.stack([numbers >> k & 1 for k in range(self.bits)]).bool()

    def _marks(self, wire: Wire) -> Tensor:
        marks = torch.zeros(self.lanes, wire.out_channels, dtype=torch.double)
        marks[ALL_ON] = 1
        marks[ALL_BUT_ONE] = float(wire.name != self.active)
        if wire.name == self.active:
            codes = self.codes(wire.out_channels)
            marks[FIRST_BIT::2], marks[FIRST_BIT + 1 :: 2] = codes.double(), (~codes).double()
        return marks

    def _emit(self, wire: Wire, shape: torch.Size, gated: bool) -> Tensor:
        """Values that differ by position but not by lane, times the marks where the gate acts."""
        values = _random_positive(shape[1:], 1).expand(shape)
        if not gated:
            return values.clone()
        marks = self._marks(wire)
        spread = [1] * (len(shape) - 2)
        return values * (
            marks.reshape(self.lanes, *spread, -1) if wire.is_linear else marks.reshape(self.lanes, -1, *spread)
        )

    def _replace_layer(self, wire: Wire, module: nn.Module) -> None:
        on_meta, real = copy.deepcopy(module).to("meta"), type(module).forward

        def forward(x: Tensor) -> Tensor:
            channels_last = x if wire.is_linear else x.movedim(1, -1)
            self.seen.append((wire.name, channels_last.reshape(self.lanes, -1, wire.in_channels).clone()))
            shape = real(on_meta, x.to("meta")).shape
            if wire.is_depthwise:  # passes its producers' marks through, and will carry their gates
                peak = x.amax(tuple(range(2, x.dim())), keepdim=True)
                return peak.repeat_interleave(wire.out_channels // wire.in_channels, 1).expand(shape).clone()
            return self._emit(wire, shape, gated=wire.norm is None)

        module.forward = forward

    def _replace_norm(self, wire: Wire, module: nn.Module) -> None:
        def forward(x: Tensor) -> Tensor:
            return x.clone() if wire.is_depthwise else self._emit(wire, x.shape, gated=True)

        module.forward = forward

    def run(self, producer: str) -> list[Tensor]:
        """Mark the channels of one producer; returns the tensors that the network gives out."""
        self.active = producer
        self.seen.clear()
        with torch.no_grad():
            out = self.inputs.run(self.twin)
        return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _check_output(lanes: int, outputs: list[Tensor]) -> str | None:
    for t in outputs:
        if t.shape[:1] != (lanes,) or (t[FIRST_BIT:] != t[:1]).any() or (t[ALL_BUT_ONE] != t[ALL_ON]).any():
            return "it feeds the network's output"
    return None


def _differs(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs() > TOLERANCE).any(-2)


class _Findings:
    """Collects what the lanes tell, one producer and one layer input at a time."""

    def __init__(self, wires: Mapping[str, Wire]) -> None:
        self.wires = wires
        self.reach: dict[str, list[set[Channel]]] = {n: [set() for _ in range(w.in_channels)] for n, w in wires.items()}
        self.always: dict[str, set[int]] = {n: set() for n in wires}
        self.refused: dict[str, str] = {}

    def refuse(self, layer: str, reason: str) -> None:
        self.refused.setdefault(layer, reason)

    def record(self, producer: str, layer: str, x: Tensor, codes: Tensor) -> None:
        """Compare the lanes of one layer's input, (lanes, positions, channels)."""
        if not x.isfinite().all():
            raise ValueError(
                f"the values that reach {layer!r} overflow when its wiring is probed; "
                "leave the layers around it out of quantization."
            )
        shown = _differs(x[FIRST_BIT:], x[ALL_OFF])
        missed = _differs(x[ALL_BUT_ONE], x[ALL_ON])
        constant = _differs(x[ALL_OFF], torch.zeros_like(x[ALL_OFF]))
        self.always[layer] |= set(constant.nonzero().flatten().tolist())
        for j in (shown.any(0) | missed).nonzero().flatten().tolist():
            if not shown[:, j].any():
                self.refuse(producer, f"it multiplies other channels on the way to {layer}")
                continue
            self.reach[layer][j] |= {(producer, c) for c in _consistent(codes, shown[0::2, j], shown[1::2, j])}
            if constant[j]:
                self.refuse(producer, f"a channel that is off does not arrive as zero at {layer}")

    def wiring(self) -> Wiring:
        arriving = {channel for sets in self.reach.values() for channels in sets for channel in channels}
        for name, wire in self.wires.items():
            if wire.is_depthwise:
                self.refuse(name, "it is depthwise and takes the gates of the channels it reads")
            elif any((name, c) not in arriving for c in range(wire.out_channels)):
                self.refuse(name, "some of its channels enter no multiplying layer as themselves")
        reach = {
            name: [set() if j in self.always[name] else channels for j, channels in enumerate(sets)]
            for name, sets in self.reach.items()
        }
        return Wiring(reach, self.refused)


def _consistent(codes: Tensor, with_bit: Tensor, without_bit: Tensor) -> list[int]:
    """Channels whose number agrees with the bits seen; several where channels mix."""
    agrees = torch.where(codes, with_bit[:, None], without_bit[:, None]).all(0)
    return [int(c) for c in agrees.nonzero().flatten()]


def probe(net: nn.Module, wires: Mapping[str, Wire], inputs: Inputs) -> Wiring:
    """Find which channels of which layers reach each layer input, and whose channels cannot be removed.

    A layer is refused when a closed channel would not arrive as zero (an activation with f(0) != 0, a norm over
    channels, a shift after the gate), when its channels multiply others (attention scores, squeeze-excite), when they
    reach the network's output or arrive nowhere as themselves.

    Arguments:
        net: The float network.
        wires: Its layers, from :func:`~pyro_bbits.insertion.trace.trace`.
        inputs: Example inputs, batch in dimension 0; samples must not interact in evaluation mode.

    Returns:
        The wiring.

    Raises:
        ValueError: If values overflow on the way.
    """
    experiment, findings = _Experiment(net, wires, inputs), _Findings(wires)
    for wire in wires.values():
        if wire.is_depthwise:
            continue
        outputs = experiment.run(wire.name)
        if reason := _check_output(experiment.lanes, outputs):
            findings.refuse(wire.name, reason)
        codes = experiment.codes(wire.out_channels)
        for layer, x in experiment.seen:
            findings.record(wire.name, layer, x, codes)
    return findings.wiring()
