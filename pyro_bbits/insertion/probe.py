"""Find which channels reach which layers by running the network on marked channels.

In a copy of the network every parameter is a random positive number and every multiplying layer is replaced by a
stand-in that emits position-dependent positive values times a mark per channel, at the place where its channel gate
would act. Everything between the layers is the user's own code: residual sums, concatenation, flattening, pooling and
activations need no rule. The batch dimension carries the lanes of the experiment: all channels off, all on, all on but
one layer's, and that layer's channels one bit of their number at a time. What differs between lanes at the input of a
layer tells who reaches it.

Positive numbers cancel nothing, but hide what a subtraction or a product can do. So every claim that an input channel
dies with its producers is checked afterwards, with these off, all others on, and values of both signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.insertion.experiment import ALL_BUT_ONE, ALL_OFF, ALL_ON, FIRST_BIT, TOLERANCE, Experiment
from pyro_bbits.insertion.trace import Inputs, Trace, Wire, trace

__all__ = ["Wiring", "probe"]

SIDE = 64
"""Pixels to which larger images are cut, if the network allows it."""

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


def _shows(x: Tensor) -> bool:
    """Whether lanes differ that differ in the marks of one producer alone; beyond rounding, which differs by lane."""
    return _apart(x[FIRST_BIT:], x[:1]) or _apart(x[ALL_BUT_ONE], x[ALL_ON])


def _apart(a: Tensor, b: Tensor) -> bool:
    same = (a == b) | ((a - b).abs() <= TOLERANCE * b.abs().clamp(min=1.0))
    return not bool(same.all())


def _feeds_output(experiment: Experiment, outputs: list[Tensor], constants: list[Tensor]) -> bool:
    """Whether the active producer shows in an output; `constants` are the outputs without lanes if all is off."""
    alone = experiment.without_lanes(outputs)
    if len(alone) != len(constants) or any(not torch.equal(a, b) for a, b in zip(alone, constants, strict=True)):
        return True  # one value for all samples, that of a loss, depends on everything
    return any(_shows(experiment.lanes_first("the output", x)) for x in outputs if experiment.has_lanes(x))


def _differs(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs_() > TOLERANCE).any(-2)


class _Findings:
    """Collects what the lanes tell, one producer and one layer input at a time."""

    def __init__(self, wires: Mapping[str, Wire]) -> None:
        self.wires = wires
        self.reach: dict[str, list[set[Channel]]] = {n: [set() for _ in range(w.in_channels)] for n, w in wires.items()}
        self.always: dict[str, set[int]] = {n: set() for n in wires}
        self.refused: dict[str, str] = {}
        self.order = {name: i for i, name in enumerate(wires)}
        self.known: set[str] = set()
        self.pending: dict[str, str] = {}

    def refuse(self, layer: str, reason: str) -> None:
        self.refused.setdefault(layer, reason)

    def touch(self, producer: str, product: str, x: Tensor) -> None:
        """Channels that enter a product of activations stay: a head of attention keeps its size."""
        if _shows(x):
            self.refuse(producer, f"it feeds the product {product}")

    def record(self, producer: str, codes: Tensor, layer: str, x: Tensor) -> None:
        """Compare the lanes of one layer's input, (lanes, positions, channels)."""
        if self.order[layer] < self.order[producer] and self.wires[layer].calls == 1 and layer in self.known:
            return  # it runs before the producer, and has been looked at
        self.known.add(layer)
        undefined = torch.zeros(x.shape[-1], dtype=torch.bool)
        if not x.sum().isfinite():  # 0 / 0 where all channels are off, or an overflow: nothing is known of these
            undefined = ~x.isfinite().all(0).all(0)
            x = x.nan_to_num(0.0, 0.0, 0.0)
        used = FIRST_BIT + 2 * len(codes)
        # the lanes behind are off too; if they differ, samples mix, or the network draws random numbers
        unsure = _differs(x[used:], x[ALL_OFF]).any(0) | undefined
        shown = _differs(x[FIRST_BIT:used], x[ALL_OFF])
        missed = _differs(x[ALL_BUT_ONE], x[ALL_ON])
        constant = _differs(x[ALL_OFF], torch.zeros_like(x[ALL_OFF])) | unsure
        self.always[layer] |= set(constant.nonzero().flatten().tolist())
        if undefined.any() and self.order[layer] > self.order[producer]:
            self.pending.setdefault(producer, f"values at {layer} are undefined or overflow when channels are off")
        for j in (shown.any(0) | missed).nonzero().flatten().tolist():
            if not shown[:, j].any():
                self.pending.setdefault(producer, f"it multiplies other channels on the way to {layer}")
                continue
            if constant[j]:  # who else reaches it makes no difference
                self.pending.setdefault(producer, f"a channel that is off does not arrive as zero at {layer}")
                continue
            self.reach[layer][j] |= {(producer, c) for c in _consistent(codes, shown[0::2, j], shown[1::2, j])}

    def refuse_recorded(self, experiment: Experiment) -> None:
        """Refuse what the lanes have shown, and say which function does it, where one does."""
        for producer, reason in self.pending.items():
            if producer not in self.refused:
                culprit = experiment.blame(producer)
                self.refuse(producer, f"{reason}: it passes {culprit}" if culprit else reason)

    def refuse_unseen(self) -> None:
        """Refuse layers with channels that arrive nowhere, and depthwise ones."""
        arriving = {channel for sets in self.reach.values() for channels in sets for channel in channels}
        for name, wire in self.wires.items():
            if wire.is_product:
                self.refuse(name, "it multiplies two activations")
            elif not wire.is_quantized:
                self.refuse(name, "it stays in float")
            elif wire.is_depthwise:
                self.refuse(name, "it is depthwise and takes the gates of the channels it reads")
            elif any((name, c) not in arriving for c in range(wire.out_channels)):
                self.refuse(name, "some of its channels enter no multiplying layer as themselves")

    def claims(self) -> dict[frozenset[str], dict[str, list[int]]]:
        """Which input channels of which layers are said to be zero when a set of layers is off."""
        claims: dict[frozenset[str], dict[str, list[int]]] = {}
        for name, sets in self.reach.items():
            for j, channels in enumerate(sets):
                layers = frozenset(layer for layer, _ in channels)
                if j not in self.always[name] and not layers <= self.refused.keys():
                    claims.setdefault(layers, {}).setdefault(name, []).append(j)
        return claims

    def wiring(self) -> Wiring:
        """The wiring as far as it is known."""
        reach = {
            name: [set() if j in self.always[name] else channels for j, channels in enumerate(sets)]
            for name, sets in self.reach.items()
        }
        return Wiring(reach, self.refused)


def _consistent(codes: Tensor, with_bit: Tensor, without_bit: Tensor) -> list[int]:
    """Channels whose number agrees with the bits seen; several where channels mix."""
    agrees = torch.where(codes, with_bit[:, None], without_bit[:, None]).all(0)
    return [int(c) for c in agrees.nonzero().flatten()]


class _Check:
    """Runs the network with the producers of each claim off and everything else on, and withdraws what fails.

    Each claim has three lanes, with one half of its producers' channels off, the other half, and all of them.
    """

    def __init__(self, experiment: Experiment, findings: _Findings) -> None:
        self.experiment, self.findings = experiment, findings
        half = torch.rand(2**experiment.bits, generator=torch.Generator().manual_seed(0)) < 0.5
        self.on = torch.stack([half, ~half, torch.zeros_like(half)])

    def run(self) -> None:
        claims, size = list(self.findings.claims().items()), (self.experiment.used - 1) // 3
        for start in range(0, len(claims), size):
            part = claims[start : start + size]
            concerned = {name for _, inputs in part for name in inputs}
            seen: list[tuple[str, Tensor]] = []

            def look(name: str, x: Tensor, concerned: set[str] = concerned, seen: Any = seen) -> None:
                if name in concerned:
                    seen.append((name, ((x.abs() > TOLERANCE) & x.isfinite()).any(1)))

            self.experiment.run(self._marks([layers for layers, _ in part]), look)
            for name, shown in seen:
                for i, (layers, inputs) in enumerate(part):
                    self._withdraw(name, layers, inputs.get(name, []), shown[ALL_OFF], shown[1 + 3 * i : 4 + 3 * i])

    def _marks(self, claims: list[frozenset[str]]) -> dict[str, Tensor]:
        marks = self.experiment.marks_of_all(1.0)
        for name, wire in self.experiment.wires.items():
            marks[name][ALL_OFF] = float(not wire.is_quantized)
            for i, layers in enumerate(claims):
                if name in layers:
                    marks[name][1 + 3 * i : 4 + 3 * i] = self.on[:, : wire.out_channels].double()
        return marks

    def _withdraw(self, name: str, layers: frozenset[str], inputs: list[int], none: Tensor, shown: Tensor) -> None:
        """A claim that fails for one channel is withdrawn for all that rest on the same layers."""
        if any(none[j] for j in inputs):
            for layer in layers:
                self.findings.refuse(layer, f"a channel that is off does not arrive as zero at {name}")
        off = {j: ~self.on[:, [c for _, c in self.findings.reach[name][j]]].any(1) for j in inputs}
        if any((shown[:, j] & off[j]).any() for j in inputs):
            self.findings.always[name] |= set(inputs)


def _calls(traced: Trace) -> list[Any]:
    return [(w.name, w.calls, [o.group for o in w.operands]) for w in traced.wires.values()]


def _smaller(net: nn.Module, traced: Trace, inputs: Inputs) -> tuple[Inputs, set[int]]:
    """Cut large images where the network takes the cut ones in the same way: the wiring does not depend on the size.

    Returns:
        The inputs to probe with, and the lengths of all dimensions that they lead to.
    """
    images = [x for x in inputs.tensors if x.dim() >= 4]
    if max((length for x in images for length in x.shape[-2:]), default=0) <= SIDE:
        return inputs, traced.sizes
    cut = inputs.map(lambda x: x[:2, ..., :SIDE, :SIDE] if x.dim() >= 4 else x[:2])
    try:
        small = trace(net, cut)
    except Exception:  # whatever a network does not like of another size
        return inputs, traced.sizes
    for name, wire in small.wires.items():
        wire.is_quantized = name in traced.wires and traced.wires[name].is_quantized
    small.name_operands()
    return (cut, small.sizes) if _calls(small) == _calls(traced) else (inputs, traced.sizes)


def probe(net: nn.Module, traced: Trace, inputs: Inputs) -> Wiring:
    """Find which channels of which layers reach each layer input, and whose channels cannot be removed.

    A layer is refused when a closed channel would not arrive as zero (an activation with f(0) != 0, a norm over
    channels, a shift after the gate), when its channels multiply others (attention scores, squeeze-excite), when they
    reach the network's output or arrive nowhere as themselves.

    Arguments:
        net: The float network.
        traced: Its layers and products, from :func:`~pyro_bbits.insertion.trace.trace`.
        inputs: Example inputs, batch in dimension 0; samples must not interact in evaluation mode.

    Returns:
        The wiring.

    Raises:
        ValueError: If the batch is not to be found in what a layer is called on.
    """
    experiment = Experiment(net, traced, *_smaller(net, traced, inputs))
    findings = _Findings(traced.wires)
    off = experiment.marks_of_all(0.0)
    constants = experiment.without_lanes(experiment.run(off, lambda name, x: None))
    for wire in experiment.wires.values():
        if wire.is_depthwise or not wire.is_quantized:
            continue
        look = partial(findings.record, wire.name, experiment.codes(wire.out_channels))
        outputs = experiment.run(experiment.producer_marks(wire.name), look)
        if _feeds_output(experiment, outputs, constants):
            findings.refuse(wire.name, "it feeds the network's output")
        for product, x in experiment.operands:
            findings.touch(wire.name, product, x)
    findings.refuse_recorded(experiment)
    findings.refuse_unseen()
    for sign in (1, -1):
        experiment.draw(sign)
        _Check(experiment, findings).run()
    return findings.wiring()
