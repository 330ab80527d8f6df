"""Find which channels reach which layers by running the network on marked channels.

In a copy of the network every parameter is a random positive number and every multiplying layer is replaced by a
stand-in that emits position-dependent positive values times a mark per channel, at the place where its channel gate
would act. Everything between the layers is the user's own code: residual sums, concatenation, flattening, pooling and
activations need no rule. The batch dimension carries the lanes of the experiment: all channels off, all on, and for
each of several layers all on but its own, and its channels one bit of their number at a time. What differs between
lanes at the input of a layer tells who reaches it. So the lanes grow with the logarithm of a layer's channels, and a
small network is run once for all its layers.

Positive numbers cancel nothing, but hide what a subtraction or a product can do. So every claim that an input channel
dies with its producers is checked afterwards, with these off, all others on, and values of both signs.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.insertion.blame import blame
from pyro_bbits.insertion.experiment import ALL_OFF, ALL_ON, TOLERANCE, Experiment, Marks
from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.trace import trace
from pyro_bbits.insertion.wires import Trace, Wire

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


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ beyond rounding, which differs by lane."""
    return ~((a == b) | ((a - b).abs() <= TOLERANCE * b.abs().clamp(min=1.0)))


def _shows(experiment: Experiment, producers: int, x: Tensor) -> Tensor:
    """Which producers show in a tensor, lanes first: lanes differ that differ in its marks alone; `(producers,)`."""
    x = x.unsqueeze(-1).flatten(1)
    but_one, bits, idle = experiment.split(x, producers)
    alone = _apart(bits, x[ALL_OFF]).flatten(1).any(1) | _apart(but_one, x[ALL_ON]).any(1)
    return alone | _apart(idle, x[ALL_OFF]).any()


def _feeds_output(experiment: Experiment, producers: int, outputs: list[Tensor], constants: list[Tensor]) -> Tensor:
    """Which producers show in an output; `constants` are the outputs without lanes if all is off."""
    alone = experiment.without_lanes(outputs)
    if len(alone) != len(constants) or any(not torch.equal(a, b) for a, b in zip(alone, constants, strict=True)):
        return torch.ones(producers, dtype=torch.bool)  # one value for all samples, that of a loss, depends on all
    shows = torch.zeros(producers, dtype=torch.bool)
    for x in outputs:
        if experiment.has_lanes(x):
            shows |= _shows(experiment, producers, experiment.lanes_first("the output", x))
    return shows


def _differs(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs_() > TOLERANCE).any(-2)


def _undefined(experiment: Experiment, producers: int, x: Tensor) -> Tensor:
    """Which channels are not finite in the lanes that concern each producer, `(producers, channels)`."""
    undefined = ~x.isfinite().all(1)
    but_one, bits, idle = experiment.split(undefined, producers)
    return but_one | bits.any(1) | idle.any(0) | undefined[ALL_OFF] | undefined[ALL_ON]


class _Findings:
    """Collects what the lanes tell, one pass and one layer input at a time."""

    def __init__(self, experiment: Experiment, wires: Mapping[str, Wire]) -> None:
        self.experiment, self.wires = experiment, wires
        self.reach: dict[str, list[set[Channel]]] = {n: [set() for _ in range(w.in_channels)] for n, w in wires.items()}
        self.always: dict[str, set[int]] = {n: set() for n in wires}
        self.refused: dict[str, str] = {}
        self.order = {name: i for i, name in enumerate(wires)}
        self.known: set[str] = set()
        self.pending: dict[str, str] = {}

    def refuse(self, layer: str, reason: str) -> None:
        self.refused.setdefault(layer, reason)

    def refuse_some(self, producers: Sequence[str], chosen: Tensor, reason: str) -> None:
        for i in chosen.nonzero().flatten().tolist():
            self.refuse(producers[i], reason)

    def record(self, producers: Sequence[str], layer: str, x: Tensor) -> None:
        """Compare the lanes of one layer's input, (lanes, positions, channels)."""
        count, all_producers = self._concerned(producers, layer), len(producers)
        if not count:
            return
        self.known.add(layer)
        undefined = torch.zeros(count, x.shape[-1], dtype=torch.bool)
        if not x.sum().isfinite():  # 0 / 0 where all channels are off, or an overflow: nothing is known of these
            undefined = _undefined(self.experiment, all_producers, x)[:count]
            x = x.nan_to_num(0.0, 0.0, 0.0)
        but_one, bits, idle = self.experiment.split(x, all_producers)
        shown, missed = _differs(bits[:count], x[ALL_OFF]), _differs(but_one[:count], x[ALL_ON])
        # idle lanes are off too; if they differ, samples mix, or the network draws random numbers
        constant = _differs(x[ALL_OFF], torch.zeros_like(x[ALL_OFF])) | _differs(idle, x[ALL_OFF]).any(0)
        self.always[layer].update((constant | undefined.any(0)).nonzero().flatten().tolist())
        for i in undefined.any(1).nonzero().flatten().tolist():
            if self.order[layer] > self.order[producers[i]]:
                reason = f"values at {layer} are undefined or overflow when channels are off"
                self.pending.setdefault(producers[i], reason)
        for i in (shown.any(1) | missed).any(1).nonzero().flatten().tolist():
            self._follow(producers[i], layer, shown[i], missed[i], constant | undefined[i])

    def _concerned(self, producers: Sequence[str], layer: str) -> int:
        """How many of the producers a layer's input can tell of: the first ones, since they are in order.

        A layer that runs before a producer is looked at once all the same, for what it reads if all is off.
        """
        if self.wires[layer].calls > 1:
            return len(producers)
        before = bisect(producers, self.order[layer], key=self.order.__getitem__)
        return max(before, int(layer not in self.known))

    def _follow(self, producer: str, layer: str, shown: Tensor, missed: Tensor, constant: Tensor) -> None:
        """Note which channels of a producer reach which input channels of a layer, or what speaks against it.

        Arguments:
            producer: Its name.
            layer: The layer that reads.
            shown: `(2 * bits, channels)`, whether an input channel is on with and without each bit alone.
            missed: `(channels,)`, whether it differs when all but the producer is on.
            constant: `(channels,)`, whether it is on, or unknown, when all is off.
        """
        arrives = shown.any(0)
        multiplied = missed & ~arrives
        wrong = (multiplied | arrives & constant).nonzero().flatten()
        if len(wrong) and multiplied[wrong[0]]:
            self.pending.setdefault(producer, f"it multiplies other channels on the way to {layer}")
        elif len(wrong):
            self.pending.setdefault(producer, f"a channel that is off does not arrive as zero at {layer}")
        inputs = (arrives & ~constant).nonzero().flatten()  # where constant, who else reaches it makes no difference
        channels = self.wires[producer].out_channels
        for j, found in zip(inputs.tolist(), _origins(shown[:, inputs], channels), strict=True):
            self.reach[layer][j].update((producer, c) for c in found)

    def refuse_recorded(self) -> None:
        """Refuse what the lanes have shown, and say which function does it, where one does."""
        pending = [name for name in self.experiment.producers if name in self.pending and name not in self.refused]
        culprits = blame(self.experiment, pending)
        for name in pending:
            self.refuse(name, self.pending[name] + (f": it passes {culprits[name]}" if name in culprits else ""))

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


def _origins(shown: Tensor, channels: int) -> Iterator[list[int]]:
    """Channels whose number agrees with the bits seen; several where channels mix.

    Arguments:
        shown: `(2 * bits, columns)`, whether a column is on with each bit of the number alone, and without it.
        channels: How many there are.

    Yields:
        The channels of each column.
    """
    weights = 2 ** torch.arange(len(shown) // 2)
    with_bit, without_bit = ((half.T * weights).sum(1).tolist() for half in shown.chunk(2))
    every = int(weights.sum())
    for allowed, zeros in zip(with_bit, without_bit, strict=True):
        needed, free = every & ~zeros, allowed & zeros
        yield [c for c in _between(needed, free) if c < channels] if needed & ~allowed == 0 else []


def _between(needed: int, free: int) -> Iterator[int]:
    """Numbers with all the needed bits and any of the free ones."""
    part = free
    while part:
        yield needed | part
        part = (part - 1) & free
    yield needed


_Claim = tuple[int, frozenset[str], list[int]]
"""First lane of a claim, its producers, and the input channels of one layer that it says are zero when they are off."""


class _Check:
    """Runs the network with the producers of each claim off and everything else on, and withdraws what fails.

    Each claim has three lanes, with one half of its producers' channels off, the other half, and all of them.
    """

    def __init__(self, experiment: Experiment, findings: _Findings) -> None:
        self.experiment, self.findings = experiment, findings
        half = torch.rand(2**experiment.bits, generator=torch.Generator().manual_seed(0)) < 0.5
        self.on = torch.stack([half, ~half, torch.zeros_like(half)]).double()

    def run(self) -> None:
        claims, size = list(self.findings.claims().items()), (self.experiment.used - 1) // 3
        for start in range(0, len(claims), size):
            producers: dict[str, list[int]] = {}
            readers: dict[str, list[_Claim]] = {}
            for i, (layers, inputs) in enumerate(claims[start : start + size]):
                first = 1 + 3 * i
                for name in layers:
                    producers.setdefault(name, []).append(first)
                for name, channels in inputs.items():
                    readers.setdefault(name, []).append((first, layers, channels))
            self.experiment.run(self._marks(producers), partial(self._look, readers))

    def _marks(self, producers: Mapping[str, Sequence[int]]) -> Marks:
        """Marks with everything on but, in the lanes of each claim, its producers."""

        def marks(name: str) -> Tensor:
            marked = torch.ones(self.experiment.lanes, 1, dtype=torch.double)
            marked[ALL_OFF] = self.experiment.all_off(name)[ALL_OFF]
            if name not in producers:
                return marked
            channels = self.experiment.wires[name].out_channels
            marked = marked.repeat(1, channels)
            for first in producers[name]:
                marked[first : first + 3] = self.on[:, :channels]
            return marked

        return marks

    def _look(self, readers: Mapping[str, Sequence[_Claim]], name: str, x: Tensor) -> None:
        if name in readers:
            magnitude = x[: readers[name][-1][0] + 3].abs()
            shown = ((magnitude > TOLERANCE) & (magnitude < torch.inf)).any(1)
            for first, layers, inputs in readers[name]:
                self._withdraw(name, layers, inputs, shown[ALL_OFF], shown[first : first + 3])

    def _withdraw(self, name: str, layers: frozenset[str], inputs: list[int], none: Tensor, shown: Tensor) -> None:
        """A claim that fails for one channel is withdrawn for all that rest on the same layers."""
        if none[inputs].any():
            for layer in layers:
                self.findings.refuse(layer, f"a channel that is off does not arrive as zero at {name}")
        reach = self.findings.reach[name]
        rows, channels = torch.tensor([(i, c) for i, j in enumerate(inputs) for _, c in reach[j]]).T
        alive = self.on.new_zeros(3, len(inputs)).index_add(1, rows, self.on[:, channels]) > 0
        if (shown[:, inputs] & ~alive).any():
            self.findings.always[name].update(inputs)


def _calls(traced: Trace) -> list[Any]:
    return [(w.name, w.calls, [o.group for o in w.operands]) for w in traced.wires.values()]


def _smaller(net: nn.Module, traced: Trace, inputs: Inputs) -> tuple[Inputs, Trace]:
    """Cut large images where the network takes the cut ones in the same way: the wiring does not depend on the size.

    Returns:
        The inputs to probe with, and what a forward pass on them has shown.
    """
    images = [x for x in inputs.tensors if x.dim() >= 4]
    if max((length for x in images for length in x.shape[-2:]), default=0) <= SIDE:
        return inputs, traced
    cut = inputs.map(lambda x: x[:2, ..., :SIDE, :SIDE] if x.dim() >= 4 else x[:2])
    try:
        small = trace(net, cut)
    except Exception:  # whatever a network does not like of another size
        return inputs, traced
    for name, wire in small.wires.items():
        wire.is_quantized = name in traced.wires and traced.wires[name].is_quantized
    small.name_operands()
    return (cut, small) if _calls(small) == _calls(traced) else (inputs, traced)


def _run_pass(experiment: Experiment, findings: _Findings, producers: Sequence[str], constants: list[Tensor]) -> None:
    """Follow some producers through the network.

    Channels that enter a product of activations stay: a head of attention keeps its size.
    """
    touched: list[tuple[str, Tensor]] = []

    def touch(product: str, x: Tensor) -> None:
        touched.append((product, _shows(experiment, len(producers), x)))

    outputs = experiment.run(experiment.singling_out(producers), partial(findings.record, producers), touch)
    feeding = _feeds_output(experiment, len(producers), outputs, constants)
    findings.refuse_some(producers, feeding, "it feeds the network's output")
    for product, shows in touched:
        findings.refuse_some(producers, shows, f"it feeds the product {product}")


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
    findings = _Findings(experiment, traced.wires)
    constants = experiment.without_lanes(experiment.run(experiment.all_off))
    for producers in experiment.batches(experiment.producers):
        _run_pass(experiment, findings, producers, constants)
    findings.refuse_recorded()
    findings.refuse_unseen()
    for sign in (1, -1):
        experiment.draw(sign)
        _Check(experiment, findings).run()
    return findings.wiring()
