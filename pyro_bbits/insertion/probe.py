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

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bbits.insertion.products import ProductForward, product_name, product_place
from pyro_bbits.insertion.trace import Inputs, Trace, Wire, trace

__all__ = ["Wiring", "probe"]

TOLERANCE = 1e-9
SIDE = 64
"""Pixels to which larger images are cut, if the network allows it."""

OBJECTS = 3
"""How deep tensors are looked for in objects that a network returns."""

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


def _random(shape: Sequence[int], seed: int, sign: int | None = None) -> Tensor:
    """Numbers away from 0: positive, or of random signs, all of them turned around by `sign` = -1."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 0.5 + torch.rand(shape, generator=generator, dtype=torch.double)
    if sign is None:
        return magnitude
    return magnitude * sign * (2 * torch.randint(2, shape, generator=generator) - 1)


def _lane_count(needed: int, sizes: set[int]) -> int:
    """A prime that divides no length seen in the network, so that the dimension of the lanes is known by its length."""
    count = needed
    while any(count % n == 0 for n in range(2, int(count**0.5) + 1)) or any(n % count == 0 for n in sizes if n):
        count += 1
    return count


def _unwatched(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A stand-in's own arithmetic is none of the network's."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return run


class _Watcher:
    """Shows the operands of the products of one module to an experiment."""

    def __init__(self, experiment: "_Experiment", owner: str) -> None:
        self.experiment, self.owner = experiment, owner

    def __call__(self, index: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        for x in (left, right):
            self.experiment.watch(product_name(self.owner, index), x)
        return left, right

    def finish(self, count: int) -> None:
        """A path that only training takes is not seen here."""


class _Doubles(TorchFunctionMode):
    """Keeps the network in double precision where its code asks for another one."""

    CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
    DTYPES: Mapping[Any, torch.dtype] = {
        **dict.fromkeys([torch.float32, torch.float16, torch.bfloat16], torch.double),
        torch.complex64: torch.complex128,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in self.CASTS else func
        args, kwargs = tree_map(self._double, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _double(self, x: Any) -> Any:
        return self.DTYPES.get(x, x) if isinstance(x, torch.dtype) else x


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    """New tensors are double, and stay so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)


class _Experiment:
    """One network with stand-ins for its layers; `run` marks the channels of all layers, lane by lane."""

    def __init__(self, net: nn.Module, traced: Trace, inputs: Inputs, sizes: set[int]) -> None:
        self.wires = wires = {name: wire for name, wire in traced.wires.items() if not wire.is_product}
        self.bits = max(w.out_channels for w in wires.values()).bit_length()
        self.used = FIRST_BIT + 2 * self.bits
        self.lanes = _lane_count(self.used + 1, sizes)  # the rest are all off, one at least
        self.twin = copy.deepcopy(net).cpu().double().eval()
        self.inputs = inputs.map(self._lane_inputs)
        self.marks: Mapping[str, Tensor] = {}
        self.look: Callable[[str, Tensor], None] = lambda name, x: None
        self.operands: list[tuple[str, Tensor]] = []
        self.values: dict[tuple[int, torch.Size, int | None], Tensor] = {}
        modules = dict(self.twin.named_modules())
        for seed, wire in enumerate(wires.values()):
            self._replace_layer(wire, modules[wire.name], seed)
            if wire.norm is not None:
                self._replace_norm(wire, modules[wire.norm], seed)
        for owner in {product_place(name)[0] for name, wire in traced.wires.items() if wire.is_product}:
            modules[owner].forward = ProductForward(modules[owner], _Watcher(self, owner))
        self.draw(None)

    def draw(self, sign: int | None) -> None:
        """Give all values random numbers, so that every shift shows: positive ones, but negative running means."""
        self.sign = sign
        self.values.clear()
        used = [m for name, m in self.twin.named_modules() if name not in self.wires]
        tensors = [(n, t) for m in used for n, t in (*m._parameters.items(), *m._buffers.items()) if t is not None]
        for seed, (name, tensor) in enumerate(tensors):
            if tensor.is_floating_point():
                values = _random(tensor.shape, seed, None if name == "running_var" else sign)
                tensor.data = -values if name == "running_mean" else values

    def _lane_inputs(self, x: Tensor) -> Tensor:
        """The first example in every lane, positive where it is a float."""
        first = x[:1].cpu()
        first = first.double().abs() + 1 if first.is_floating_point() else first
        return first.repeat(self.lanes, *[1] * (first.dim() - 1))

    def codes(self, channels: int) -> Tensor:
        """Bits of each channel number, (bits, channels)."""
        numbers = torch.arange(channels)
        return torch.stack([numbers >> k & 1 for k in range(self.bits)]).bool()

    def marks_of_all(self, value: float) -> dict[str, Tensor]:
        """The same mark for all channels in all lanes, `(lanes, channels)`; what stays in float is on."""
        return {
            name: torch.full((self.lanes, w.out_channels), value if w.is_quantized else 1.0, dtype=torch.double)
            for name, w in self.wires.items()
        }

    def producer_marks(self, active: str) -> dict[str, Tensor]:
        """Marks of every layer, (lanes, channels), that single out one producer."""
        marks = self.marks_of_all(0.0)
        for name in marks:
            marks[name][ALL_ON] = 1
            marks[name][ALL_BUT_ONE] = float(name != active)
        codes = self.codes(self.wires[active].out_channels)
        marks[active][FIRST_BIT : self.used : 2] = codes.double()
        marks[active][FIRST_BIT + 1 : self.used : 2] = (~codes).double()
        return marks

    def _has_lanes(self, x: Tensor) -> bool:
        return any(length % self.lanes == 0 for length in x.shape)

    def _lanes_first(self, name: str, x: Tensor) -> Tensor:
        """The lanes in a dimension of their own before all others, wherever the user's code has put the batch."""
        own = [d for d in range(x.dim()) if x.shape[d] == self.lanes]
        if len(own) == 1:
            return x.movedim(own[0], 0)
        folded = [d for d in range(x.dim()) if x.shape[d] % self.lanes == 0]
        if len(folded) != 1 or own:
            raise ValueError(
                f"the batch is lost on the way to {name!r}: it is called on a tensor of shape {tuple(x.shape)} for "
                f"{self.lanes} samples; leave it out of quantization, exclude=({name!r},)."
            )
        unfolded: Tensor = x.unflatten(folded[0], (self.lanes, -1))
        return unfolded.movedim(folded[0], 0)

    def _fold_back(self, y: Tensor, like: torch.Size) -> Tensor:
        """The reverse of :meth:`_lanes_first`, for a result whose shape the layer has told."""
        own = [d for d in range(len(like)) if like[d] == self.lanes]
        if own:
            return y.movedim(0, own[0])
        folded = next(d for d in range(len(like)) if like[d] % self.lanes == 0)
        return y.movedim(0, folded).flatten(folded, folded + 1)

    def _positions(self, wire: Wire, seed: int, shape: torch.Size) -> Tensor:
        key = seed, shape, self.sign
        if key not in self.values:
            self.values[key] = _random(shape, seed, self.sign)
        values: Tensor = self.values[key]
        return values

    def _emit(self, wire: Wire, shape: torch.Size, seed: int, raw: bool) -> Tensor:
        """Values that differ by position but not by lane, times the marks; before a gated norm no channel is zero.

        The values are drawn for one sample, so that a batch folded with another dimension differs along that one too.
        """
        sample = self._lanes_first(wire.name, torch.empty(shape, device="meta")).shape[1:]
        marks = self.marks[wire.name]
        channel = len(sample) - 1 if wire.is_channels_last else self._channel_dim(shape)
        marks = marks.reshape(self.lanes, *(-1 if d == channel else 1 for d in range(len(sample))))
        values = self._positions(wire, seed, sample) * (1 + marks if raw else marks)
        return self._fold_back(values, shape)

    def _channel_dim(self, shape: torch.Size) -> int:
        """Where the channels of a convolution are in a sample: behind what is folded with the batch, if anything."""
        return 0 if shape[0] == self.lanes else 1

    def watch(self, name: str, x: Tensor) -> None:
        """Keep an operand of a product."""
        if self._has_lanes(x):
            self.operands.append((name, self._lanes_first(name, x).clone()))

    def _replace_layer(self, wire: Wire, module: Any, seed: int) -> None:
        on_meta, real = copy.deepcopy(module).to("meta"), type(module).forward
        # the bias of a depthwise layer stays where its norm carries the gate, or where another call keeps it alive
        shift = float(getattr(module, "bias", None) is not None and (wire.norm is not None or wire.calls > 1))

        def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = input
            if wire.is_embedding:
                shape = torch.Size([*x.shape, wire.out_channels])
            elif wire.is_channels_last:  # on the meta device it would import the whole of torch's compiler
                shape = torch.Size([*x.shape[:-1], wire.out_channels])
            else:
                shape = real(on_meta, x.to("meta", torch.double), *args, **kwargs).shape
            if not wire.is_quantized and not wire.is_channels_last and x.shape[0] % self.lanes:
                unquantized: Tensor = real(module, x, *args, **kwargs)  # nothing is asked of a layer in float
                return unquantized
            if not self._has_lanes(x):  # the same for all samples, as the embedding of a position is
                return self._positions(wire, seed, shape)
            if not wire.is_embedding:
                self.look(wire.name, self._channels_last(wire, x))
            if (
                wire.is_depthwise and wire.is_quantized
            ):  # passes its producers' marks through, and will carry their gates
                peak = x.abs().amax(tuple(range(2, x.dim())), keepdim=True)
                peak = peak.repeat_interleave(wire.out_channels // wire.in_channels, 1)
                return peak * self._positions(wire, seed, shape[1:]) + shift
            return self._emit(wire, shape, seed, raw=wire.norm is not None)

        module.forward = _unwatched(forward)

    def _channels_last(self, wire: Wire, x: Tensor) -> Tensor:
        """A view, or else a copy, as (lanes, positions, channels)."""
        if not wire.is_channels_last:
            if x.shape[0] % self.lanes:
                raise ValueError(
                    f"layer {wire.name!r} is called on a tensor whose dimension 0 is not the batch (it has length "
                    f"{x.shape[0]} for {self.lanes} samples); leave it out of quantization, exclude=({wire.name!r},)."
                )
            x = x.movedim(1, -1)
        return self._lanes_first(wire.name, x).reshape(self.lanes, -1, wire.in_channels)

    def _replace_norm(self, wire: Wire, module: nn.Module, seed: int) -> None:
        shift = float(wire.module.bias is not None)

        def forward(input: Tensor) -> Tensor:
            return input - shift if wire.is_depthwise else self._emit(wire, input.shape, seed, raw=False)

        module.forward = _unwatched(forward)

    def run(self, marks: Mapping[str, Tensor], look: Callable[[str, Tensor], None]) -> list[Tensor]:
        """Mark the channels of all layers.

        Arguments:
            marks: `(lanes, channels)` for each layer.
            look: Called with the name of each layer and its input, `(lanes, positions, channels)`.

        Returns:
            The tensors that the network gives out.
        """
        self.marks, self.look = marks, look
        self.operands.clear()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _double_precision():
            return _tensors(self.inputs.run(self.twin))

    def outputs_without_lanes(self, outputs: list[Tensor]) -> list[Tensor]:
        """Those that are one value for all samples."""
        return [x for x in outputs if not self._has_lanes(x)]

    def blame(self, producer: str) -> str:
        """Name of the function that keeps a producer's closed channels from arriving as zero, if there is one."""
        mode = _Blame(self)
        with contextlib.suppress(_Found), mode:
            self.run(self.producer_marks(producer), lambda name, x: None)
        return mode.name


def _shows(x: Tensor) -> bool:
    """Whether lanes differ that differ in the marks of one producer alone."""
    return bool((x[FIRST_BIT:] != x[:1]).any() or (x[ALL_BUT_ONE] != x[ALL_ON]).any())


def _tensors(outputs: Any, depth: int = 0) -> list[Tensor]:
    """The tensors among a network's outputs, attributes of objects included."""
    found = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth < OBJECTS and hasattr(leaf, "__dict__"):
            found += _tensors(list(vars(leaf).values()), depth + 1)
    return found


def _feeds_output(experiment: "_Experiment", outputs: list[Tensor], constants: list[Tensor]) -> bool:
    """Whether the active producer shows in an output; `constants` are the outputs without lanes if all is off."""
    alone = experiment.outputs_without_lanes(outputs)
    if len(alone) != len(constants) or any(not torch.equal(a, b) for a, b in zip(alone, constants, strict=True)):
        return True  # one value for all samples, that of a loss, depends on everything
    return any(_shows(experiment._lanes_first("the output", x)) for x in outputs if experiment._has_lanes(x))


def _differs(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs_() > TOLERANCE).any(-2)


class _Found(Exception):
    """Ends a pass whose question is answered."""


class _Blame(TorchFunctionMode):
    """Finds the first function that makes something other than zero of the zeros of closed channels."""

    def __init__(self, experiment: _Experiment) -> None:
        super().__init__()
        self.experiment, self.name = experiment, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor) and self._is_off(result) is False:
                states = [self._is_off(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                if True in states and False not in states:
                    self.name = func.__name__.strip("_")
                    raise _Found
        return result

    def _is_off(self, x: Tensor) -> bool | None:
        """Whether what depends on the active producer is zero when it is off; None if nothing depends on it."""
        if not x.is_floating_point() or not self.experiment._has_lanes(x):
            return None
        x = self.experiment._lanes_first("", x)
        depends = (x[ALL_ON] - x[ALL_BUT_ONE]).abs() > TOLERANCE
        return bool((x[ALL_OFF][depends].abs() <= TOLERANCE).all()) if depends.any() else None


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

    def refuse_recorded(self, experiment: "_Experiment") -> None:
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

    def __init__(self, experiment: _Experiment, findings: _Findings) -> None:
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
    experiment = _Experiment(net, traced, *_smaller(net, traced, inputs))
    findings = _Findings(traced.wires)
    off = experiment.marks_of_all(0.0)
    constants = experiment.outputs_without_lanes(experiment.run(off, lambda name, x: None))
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
